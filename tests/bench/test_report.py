"""`trsp report`: what the page says of a record, that it is the same each time, and only text."""

import importlib.util
import itertools
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typer.testing import CliRunner

from trsp.bench.cli import app
from trsp.bench.report import markdown_of, write_report
from trsp.bench.report_findings import (
    cautions,
    compared,
    equal_memory_sentence,
    find_results,
    stops,
)
from trsp.bench.report_inputs import Input, Inputs, read_inputs
from trsp.bench.report_plots import draw_plots
from trsp.bench.report_speedups import (
    blocks_table,
    negative_sentence,
    negative_table,
    speed_table,
)
from trsp.bench.report_style import to_svg
from trsp.bench.report_table import Table
from trsp.bench.report_tables import latency_table, memory_table, quality_table
from trsp.bench.report_validity import environment_table, remarks
from trsp.bench.report_values import Place, Values
from trsp.bench.serve_record import Ratio, ServeRecord, write_serve_record
from trsp.pruner.errors import UserError

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None or importlib.util.find_spec("jinja2") is None,
    reason="matplotlib or jinja2 is not installed (pip install 'trsp[report]')",
)

Build = Callable[..., ServeRecord]


class Page(HTMLParser):
    """Every element of a page with its attributes, and all text between them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def build(report_records: ModuleType) -> Build:
    function: Build = report_records.build
    return function


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, build: Build) -> Path:
    """A serve record, its page and its figures."""
    path = tmp_path_factory.mktemp("report")
    write_serve_record(path / "record.json", build(label="CPU, not a serving claim"))
    write_report([path], out=path / "report.html", png=path / "png")
    return path


@pytest.fixture(scope="module")
def page(folder: Path) -> Page:
    return Page((folder / "report.html").read_text("utf-8"))


@pytest.fixture(scope="module")
def hostile_page(tmp_path_factory: pytest.TempPathFactory, report_records: ModuleType) -> Page:
    path = tmp_path_factory.mktemp("hostile")
    (path / "record.json").write_text(json.dumps(report_records.build_hostile()))
    write_report([path], out=path / "report.html", png=path / "png")
    return Page((path / "report.html").read_text("utf-8"))


def changed_ratio(record: ServeRecord, change: dict[str, Any], **where: str) -> ServeRecord:
    """The record with the ratios that match `where` changed; at least one does."""

    def matches(ratio: Ratio) -> bool:
        return all(getattr(ratio, name) == value for name, value in where.items())

    assert any(map(matches, record.ratios))
    ratios = [
        ratio.model_copy(update=change) if matches(ratio) else ratio for ratio in record.ratios
    ]
    return record.model_copy(update={"ratios": ratios})


def texts(table: Table) -> list[tuple[str, ...]]:
    return [row.cells for group in table.groups for row in group.rows]


# The page as a file


def test_another_process_writes_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    code = "import sys; from trsp.bench.cli import main; sys.argv[0] = 'trsp'; main()"
    command = [sys.executable, "-c", code, "report", str(folder), "--out", "page.html"]
    done = subprocess.run(
        [*command, "--png", "png"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": "/usr/bin:/bin", "PYTHONHASHSEED": "7", "HOME": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "page.html").read_bytes() == (folder / "report.html").read_bytes()
    figures = sorted(path.name for path in (folder / "png").iterdir())
    assert figures == sorted(path.name for path in (tmp_path / "png").iterdir())
    for name in figures:
        assert (tmp_path / "png" / name).read_bytes() == (folder / "png" / name).read_bytes()


def test_the_page_needs_nothing_but_itself(folder: Path, page: Page) -> None:
    tags = {tag for tag, _ in page.elements}
    assert tags.isdisjoint({"script", "link", "img", "iframe", "object", "base", "form", "image"})
    for _, attributes in page.elements:
        for name, value in attributes.items():
            assert not name.startswith("on")
            assert name not in {"src", "srcset", "action", "data"}
            if name.endswith("href"):
                assert value.startswith("#")
    html = (folder / "report.html").read_text("utf-8")
    namespaces = ("http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink")
    assert set(re.findall(r"https?://[^\s\"'<>]+", html)) <= set(namespaces)
    assert set(re.findall(r"url\((.)", html)) <= {"#"}
    assert "@import" not in html


def test_every_reference_has_one_target(page: Page) -> None:
    ids = Counter(attributes["id"] for _, attributes in page.elements if "id" in attributes)
    assert [name for name, count in ids.items() if count > 1] == []
    values = [value for _, attributes in page.elements for value in attributes.values()]
    wanted = {name for value in values for name in re.findall(r"url\(#([^)]*)\)", value)}
    for _, attributes in page.elements:
        wanted |= {value[1:] for name, value in attributes.items() if name.endswith("href")}
        wanted |= {attributes[name] for name in ("aria-labelledby",) if name in attributes}
    assert len(wanted) > 10
    assert wanted <= set(ids)


def test_the_page_can_be_read_aloud(page: Page) -> None:
    assert page.all("html") == [{"lang": "en"}]
    assert len(page.all("title")) == 1
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert len(page.all("table")) == len(page.all("caption")) >= 8
    assert all(attributes.get("scope") for attributes in page.all("th"))
    figures = page.all("svg")
    assert len(figures) == len(page.all("figcaption")) == 5
    assert all(svg["role"] == "img" and len(svg["aria-label"]) > 40 for svg in figures)


@pytest.mark.parametrize("backend", ["latency", "throughput", "transformers"])
def test_every_backend_makes_a_page(backend: str, build: Build, tmp_path: Path) -> None:
    write_serve_record(tmp_path / "a.json", build(backend))
    write_report([tmp_path / "a.json"], out=tmp_path / "page.html", png=None)
    page = Page((tmp_path / "page.html").read_text("utf-8"))
    assert len(page.all("svg")) == 3
    for name in ("Throughput against interactivity", "Time to first token against load"):
        assert f"The figure \u201c{name}\u201d needs two" in page.text


def test_a_record_of_nothing_makes_a_page(build: Build, tmp_path: Path) -> None:
    lists = ("arms", "loads", "memories", "starts", "cells", "ratios", "commands", "not_measured")
    nothing: dict[str, Any] = {name: [] for name in lists}
    record = build(**nothing, hashes={}, environment={}, partial=True, num_blocks=0)
    write_serve_record(tmp_path / "record.json", record)
    inputs, _ = write_report([tmp_path], out=tmp_path / "page.html", png=None)
    page = Page((tmp_path / "page.html").read_text("utf-8"))
    assert "PARTIAL" in page.text
    assert "NO DENSE MODEL" in page.text
    assert page.text.count("The figure \u201c") == 5
    assert "None: every speed-up" not in page.text
    assert "PARTIAL" in markdown_of(inputs)


# What it says


def test_the_result_is_the_records(build: Build, page: Page) -> None:
    ratios = {
        (ratio.arm, ratio.load): ratio
        for ratio in build().ratios
        if ratio.metric == "output_throughput" and ratio.memory == "equal-kv"
    }
    for arm in ("pruned-25", "pruned-50"):
        most, least = ratios[arm, "closed 16"], ratios[arm, "closed 1"]
        assert (
            f"{arm}: speed-up in output tokens/s {most.estimate:.3f}\u00d7 with 16 requests in "
            f"flight (95% interval {most.low:.3f} to {most.high:.3f}; bound {most.bound:.3f}) and "
            f"{least.estimate:.3f}\u00d7 with 1 request in flight"
        ) in page.text
    assert "Its perplexity on wikitext-2 is 1.171\u00d7 the dense model's" in page.text


def test_the_label_stands_beside_every_result(page: Page) -> None:
    cards = [a for a in page.all("article") if a["class"].startswith("card")]
    labels = [a for a in page.all("span") if a.get("class") == "label"]
    assert len(cards) == 3
    assert len(labels) == len(cards) + 2
    assert page.text.count("CPU, not a serving claim") == len(labels) + len(page.all("svg"))


def test_equal_memory_is_no_part_of_the_result(build: Build) -> None:
    record = changed_ratio(build(), {"estimate": 9.5, "high": 9.9}, memory="equal-memory")
    told = " ".join(finding.sentence for finding in find_results(Values(record)))
    assert "1.281" in told
    assert "9.5" not in told
    assert not any("9.5" in cell for row in texts(quality_table(Values(record))) for cell in row)


def test_the_noise_floor_comes_first(build: Build) -> None:
    groups = speed_table(Values(build())).groups
    assert [group.title.partition(".")[0].partition(":")[0] for group in groups] == [
        "Noise floor, equal KV blocks",
        "Noise floor, equal GPU memory",
        "pruned-25",
        "pruned-25",
        "pruned-50",
        "pruned-50",
    ]
    assert {row.kind for row in groups[0].rows} == {"control"}


def test_p99_needs_a_thousand_requests(build: Build) -> None:
    table = latency_table(Values(build()), "equal-kv")
    columns = [n for n, column in enumerate(table.columns) if column.title == "p99"]
    assert len(columns) == 4
    for group in table.groups:
        enough = "1,000 requests" in group.title
        for row in group.rows:
            assert all((row.cells[n] == "n<1000") != enough for n in columns)
    assert sum("1,000 requests" in group.title for group in table.groups) == 1
    told = [ratio for ratio in Values(build()).ratios if ratio.metric.startswith("p99_")]
    assert {ratio.load for ratio in told} == {"closed 16"}


def test_figures_are_means_over_valid_cells(build: Build) -> None:
    record = build(num_blocks=1)
    cells = [
        cell.model_copy(
            update={
                "metrics": {**cell.metrics, "median_ttft_ms": 10.0 if cell.position < 4 else 40.0},
                "invalid": ["late"] if cell.arm == "pruned-50" and cell.position < 4 else [],
            }
        )
        for cell in record.cells
    ]
    table = latency_table(Values(record.model_copy(update={"cells": cells})), "equal-kv")
    rows = {row.cells[0]: row.cells for row in table.groups[0].rows}
    assert (rows["dense"][1], rows["dense"][3]) == ("2 of 2", "20.00")
    # A block with one valid half stands in no speed-up, and so in no figure beside one.
    assert (rows["pruned-50"][1], rows["pruned-50"][3]) == ("0 of 2", "\u2013")


NOT_SHOWN = {"estimate": 1.01, "low": 0.99, "high": 1.03}
SLOWER = {"estimate": 0.9, "low": 0.88, "high": 0.92}


@pytest.mark.parametrize(
    "change", [NOT_SHOWN, SLOWER, {"verdict": "far below the bound: unexplained"}]
)
def test_a_negative_result_is_shown_as_one(change: dict[str, Any], build: Build) -> None:
    assert texts(negative_table(Values(build()))) == []
    where = {"arm": "pruned-25", "load": "closed 4", "metric": "median_tpot_ms"}
    values = Values(changed_ratio(build(), change, **where))
    (row,) = texts(negative_table(values))
    assert row[:2] == ("4 in flight", "median TPOT")
    shown = [row for group in speed_table(values).groups for row in group.rows]
    assert [row.cells[1] for row in shown if row.kind == "negative"] == ["median TPOT"]


@pytest.mark.parametrize("estimate", [0.5, 2.5])
def test_one_block_claims_nothing(estimate: float, build: Build) -> None:
    record = changed_ratio(
        build(num_blocks=1),
        {"estimate": estimate, "verdict": "beyond the bound: unexplained"},
        arm="pruned-25",
    )
    values = Values(record)
    assert texts(negative_table(values)) == []
    assert negative_sentence(values) == "Nothing is claimed: one block, no interval."
    assert {row[5] for row in texts(speed_table(values))} == {"one block, no interval"}
    assert {row[-1] for row in texts(speed_table(values))} == {"one block, no interval"}
    told = " ".join(finding.sentence for finding in find_results(values))
    assert "no gain" not in told
    assert "unexplained" not in told
    assert not any(figure.bad for finding in find_results(values) for figure in finding.figures)


def test_no_negative_result_is_said_only_of_intervals(build: Build) -> None:
    assert negative_sentence(Values(build())).startswith("None: every speed-up's interval lies")
    some = changed_ratio(build(), {"low": None, "high": None}, arm="pruned-25", load="closed 1")
    assert "rest on one block, no interval" in negative_sentence(Values(some))
    assert negative_sentence(Values(build(invalid=["x"]))).startswith("Nothing is claimed")


LOST = [("pruned-25", "closed 4", 1), ("dense", "closed 1", 3)]


def test_blocks_stand_under_their_numbers(build: Build) -> None:
    record = build(lost=LOST)
    table = blocks_table(Values(record))
    titles = [column.title for column in table.columns]
    first, count = titles.index("1"), titles.index("blocks")
    whole = {ratio.block_numbers == [0, 1, 2, 3, 4] for ratio in record.ratios}
    assert whole == {True, False}
    group = next(group for group in table.groups if group.title == "pruned-25, equal KV blocks")
    rows = {row.cells[:2]: row.cells for row in group.rows}
    for load, name, lost in (("closed 1", "1 in flight", 3), ("closed 4", "4 in flight", 1)):
        (ratio,) = [
            ratio
            for ratio in record.ratios
            if (ratio.arm, ratio.load, ratio.metric) == ("pruned-25", load, "median_tpot_ms")
        ]
        by_number = dict(zip(ratio.block_numbers, ratio.blocks, strict=True))
        row = rows[name, "median TPOT"]
        assert row[count] == "4"
        assert row[first + lost] == "\u2013"
        for block, value in by_number.items():
            assert row[first + block] == f"{value:.3f}\u00d7"
    told = cautions(Values(record))
    assert any("rest on fewer than 5 blocks, the least on 4" in line for line in told)
    assert any("same blocks (4 in flight)" in line for line in told)
    assert not any("fewer than 5 blocks" in line for line in cautions(Values(build())))


def test_an_old_record_has_all_its_blocks(build: Build) -> None:
    record = changed_ratio(build(), {"block_numbers": []})
    assert texts(blocks_table(Values(record))) == texts(blocks_table(Values(build())))


def test_numbers_of_blocks_fit_the_blocks(build: Build, tmp_path: Path) -> None:
    write_serve_record(tmp_path / "record.json", changed_ratio(build(), {"block_numbers": [0, 1]}))
    with pytest.raises(UserError, match="block_numbers"):
        read_inputs([tmp_path])


def test_figures_beside_a_ratio_are_of_its_blocks(build: Build) -> None:
    """A lost cell's figures are ten times as large: nobody may take its partner alone."""
    record = build(lost=LOST)
    values = Values(record)
    for ratio in record.ratios:
        place = Place(ratio.memory, ratio.arm, ratio.load)
        assert values.value(place, ratio.metric) == pytest.approx(ratio.pruned)
        assert values.blocks(place) == set(ratio.block_numbers)
    one = build(lost=[("pruned-25", "closed 1", 1)])
    text = markdown_of(Inputs((Input(Path("r.json"), "0" * 64, one),), ()))
    (ratio,) = [
        ratio
        for ratio in one.ratios
        if (ratio.arm, ratio.load, ratio.metric) == ("pruned-25", "closed 1", "output_throughput")
    ]
    assert f"{ratio.pruned:.1f} (dense {ratio.dense:.1f})" in text


def test_a_load_without_limit_is_the_largest_and_stands_apart(build: Build) -> None:
    values = Values(build())
    assert [load.name for load in values.loads_of("closed")][-1] == "all at once"
    assert [told.load.name for told in values.told()] == ["closed 16", "closed 1"]
    assert "all at once" in equal_memory_sentence(values)
    assert ">None<" not in to_svg(draw_plots(values)[0][1], "x")


def test_transformers_is_told_by_generation_and_prompt(build: Build) -> None:
    values = Values(build("transformers"))
    assert [told.metric for told in values.told()] == ["generation_throughput", "prompt_throughput"]
    assert "for generation, prompts of 2,048 tokens" in compared(values)
    assert "no blocks" in equal_memory_sentence(values)
    text = markdown_of(Inputs((Input(Path("r.json"), "0" * 64, values.record),), ()))
    assert text.count("| model |") == 2


def test_nested_surroundings_are_rows_and_remarks_are_joined(build: Build) -> None:
    nested = {"engine_variables": {"A": "1", "B": {"C": None}}, "empty": {}}
    record = build(environment=nested)
    assert texts(environment_table(Values(record))) == [
        ("engine_variables.A", "1"),
        ("engine_variables.B.C", "none"),
        ("empty", "none"),
    ]
    notes = ("9 preemptions", "31 preemptions", "late")
    cells = [
        cell.model_copy(update={"notes": [note]})
        for cell, note in zip(record.cells, notes, strict=False)
    ]
    found = remarks(Values(record.model_copy(update={"cells": cells})))
    assert found == ["9 to 31 preemptions (2 measurements)", "late (1 measurement)"]


def test_what_arrivals_cap_is_negative_only_below_one(build: Build) -> None:
    where = {"arm": "pruned-50", "load": "open 0.9", "metric": "request_goodput"}
    values = Values(changed_ratio(build(), {"low": 0.99, "high": 1.01}, **where))
    assert texts(negative_table(values)) == []
    values = Values(changed_ratio(build(), SLOWER, **where))
    assert [row[1] for row in texts(negative_table(values))] == ["goodput, requests/s"]


def test_a_noisy_floor_is_said(build: Build) -> None:
    where = {"arm": "dense again", "load": "closed 1", "metric": "output_throughput"}
    values = Values(changed_ratio(build(), SLOWER, **where))
    assert [row[4] for row in texts(negative_table(values))] == ["0.900\u00d7"]
    assert any("Noise floor: for 1 of 120 figures" in line for line in cautions(values))


def test_invalid_and_partial_come_before_any_number(build: Build, tmp_path: Path) -> None:
    record = build(invalid=["prompts differ"], partial=True)
    write_serve_record(tmp_path / "record.json", record)
    write_report([tmp_path], out=tmp_path / "page.html", png=None)
    page = Page((tmp_path / "page.html").read_text("utf-8"))
    assert stops(Values(record))[0] == "INVALID: prompts differ"
    assert page.text.index("INVALID: prompts differ") < page.text.index("1.28\u00d7")
    assert page.text.index("PARTIAL: ") < page.text.index("1.28\u00d7")
    assert {a["class"] for a in page.all("article")} == {"card pruned void", "card control void"}
    plots, _ = draw_plots(Values(record))
    assert all("INVALID; PARTIAL" in to_svg(plot, "x") for plot in plots)


def test_random_weights_have_no_quality(build: Build) -> None:
    record = build()
    arms = [arm.model_copy(update={"weights": "dummy"}) for arm in record.arms]
    values = Values(record.model_copy(update={"arms": arms}))
    told = " ".join(
        [
            *(finding.sentence for finding in find_results(values)),
            *(cell for row in texts(quality_table(values)) for cell in row),
        ]
    )
    assert "7.31" not in told
    assert "2.228" not in told
    assert "Its weights are random, so it has no quality" in told
    assert any("dense, dense again, pruned-25 and pruned-50" in line for line in cautions(values))
    assert any("Speed against quality" in line for line in draw_plots(values)[1])


def test_one_model_of_random_weights_has_no_quality_either(build: Build) -> None:
    record = build()
    arms = [
        arm.model_copy(update={"weights": "dummy"}) if arm.name == "pruned-25" else arm
        for arm in record.arms
    ]
    table = quality_table(Values(record.model_copy(update={"arms": arms})))
    rows = {row[0]: row for row in texts(table)}
    first = [column.title for column in table.columns].index("value")
    assert rows["pruned-25"][first : first + 4] == ("random weights", "\u2013") * 2
    assert rows["pruned-50"][first] == "13.90"


def test_perplexities_of_other_protocols_do_not_compare(build: Build) -> None:
    record = build()
    arms = list(record.arms)
    other = [
        quality.model_copy(update={"protocol": {**quality.protocol, "window": 512}})
        for quality in arms[2].quality
    ]
    arms[2] = arms[2].model_copy(update={"quality": other})
    values = Values(record.model_copy(update={"arms": arms}))
    rows = {row[0]: row for row in texts(quality_table(values))}
    assert rows["pruned-25"].count("other protocol") == 2
    assert not any("1.171" in cell for cell in rows["pruned-25"])
    sentences = {finding.arm: finding.sentence for finding in find_results(values)}
    assert "not measured as the dense model's was" in sentences["pruned-25"]
    assert "2.228" in sentences["pruned-50"]


def test_the_room_for_the_cache_is_shown_by_memory(build: Build) -> None:
    rows = {row[:2]: row for row in texts(memory_table(Values(build())))}
    assert rows["equal KV blocks", "pruned-50"][4:6] == ("400,000", "1.00\u00d7")
    assert rows["equal GPU memory", "pruned-50"][4:6] == ("857,418", "2.14\u00d7")


# What a record says is text


def test_hostile_strings_come_out_as_text(hostile_page: Page, report_records: ModuleType) -> None:
    known = {"html", "head", "meta", "title", "style", "body", "header", "main", "section", "h1"}
    known |= {"h2", "h3", "h4", "p", "span", "div", "article", "dl", "dt", "dd", "small", "table"}
    known |= {"caption", "thead", "tbody", "tr", "th", "td", "details", "summary", "ul", "li"}
    known |= {"pre", "code", "figure", "figcaption", "svg", "g", "path", "use", "defs", "text"}
    known |= {"clippath", "rect"}
    assert {tag for tag, _ in hostile_page.elements} <= known
    for _, attributes in hostile_page.elements:
        assert not any(name.startswith("on") or name == "src" for name in attributes)
        assert not any(
            value.strip().startswith("javascript:")
            for name, value in attributes.items()
            if name.endswith("href")
        )
    for attack in report_records.HOSTILE:
        assert hostile_page.text.count(attack) > 20
    assert "49&lt;" not in hostile_page.text


def test_figures_draw_dollars_as_dollars(build: Build) -> None:
    record = build()
    arms = [
        arm.model_copy(update={"name": r"$\frac{1}{0$ $x^2$"}) if arm.name == "pruned-25" else arm
        for arm in record.arms
    ]
    cells = [
        cell.model_copy(update={"arm": r"$\frac{1}{0$ $x^2$"}) if cell.arm == "pruned-25" else cell
        for cell in record.cells
    ]
    values = Values(record.model_copy(update={"arms": arms, "cells": cells}))
    plots = {plot.name: plot for plot in draw_plots(values)[0]}
    assert r"$\frac{1}{0$ $x^2$" in to_svg(plots["pareto"], "x")


# Files


def test_a_folder_may_hold_other_files(build: Build, tmp_path: Path) -> None:
    for name in ("b", "a"):
        write_serve_record(tmp_path / f"{name}.json", build("latency"))
    (tmp_path / "kernels.json").write_text('{"kind": "kernels"}')
    (tmp_path / "list.json").write_text("[]")
    inputs = read_inputs([tmp_path, tmp_path / "a.json"])
    assert [given.path.name for given in inputs.records] == ["a.json", "b.json"]
    assert inputs.ignored[0] == "kernels.json: kind is 'kernels', not 'serve'"
    assert inputs.ignored[1].startswith("list.json: not read (")


def test_a_result_folder_is_its_record(build: Build, tmp_path: Path) -> None:
    write_serve_record(tmp_path / "record.json", build("latency"))
    (tmp_path / "raw.json").write_text("{}")
    inputs = read_inputs([tmp_path])
    assert [given.path.name for given in inputs.records] == ["record.json"]
    assert inputs.ignored == ()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "does not exist"),
        ('{"kind": "kernels"}', "no record of a speed experiment"),
        ('{"kind": "serve", "schema_version": 2}', "schema_version 2"),
        ('{"kind": "serve", "schema_version": 1}', "Field required"),
    ],
)
def test_what_is_no_record_is_refused(content: str | None, told: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    if content is not None:
        path.write_text(content)
    result = CliRunner().invoke(app, ["report", str(path), "--out", str(tmp_path / "page.html")])
    assert result.exit_code == 2
    assert told in result.output
    assert not (tmp_path / "page.html").exists()


def test_only_a_page_is_replaced(build: Build, tmp_path: Path) -> None:
    record, page = tmp_path / "record.json", tmp_path / "page.html"
    write_serve_record(record, build("throughput"))
    before = record.read_bytes()
    with pytest.raises(UserError, match="is not a page of trsp report"):
        write_report([record], out=record, png=None)
    assert record.read_bytes() == before
    write_report([record], out=page, png=None)
    first = page.stat().st_mtime_ns
    write_report([record], out=page, png=None)
    assert page.stat().st_mtime_ns > first


def test_the_folder_of_figures_is_looked_at_first(build: Build, tmp_path: Path) -> None:
    write_serve_record(tmp_path / "record.json", build("throughput"))
    with pytest.raises(UserError, match="is not a folder"):
        write_report([tmp_path], out=tmp_path / "page.html", png=tmp_path / "record.json")
    assert not (tmp_path / "page.html").exists()


def test_a_missing_extra_is_named(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_serve_record(tmp_path / "record.json", build("throughput"))
    monkeypatch.setattr("trsp.bench.report.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"jinja2 and matplotlib not installed; pip install 'trsp"):
        write_report([tmp_path], out=tmp_path / "page.html", png=None)
    inputs, written = write_report([tmp_path], out=None, png=None)
    assert written == []
    assert "| pruned-25 |" in markdown_of(inputs)


@pytest.mark.parametrize("extreme", [0.0, -1.0, 1e-300, 1e15])
def test_absurd_figures_make_a_page(extreme: float, build: Build, tmp_path: Path) -> None:
    record = build(num_blocks=1)
    cells = [
        cell.model_copy(update={"metrics": dict.fromkeys(cell.metrics, extreme)})
        if cell.arm == "pruned-25"
        else cell
        for cell in record.cells
    ]
    ratios = [
        ratio.model_copy(update={"estimate": extreme, "low": extreme, "high": extreme})
        for ratio in record.ratios
    ]
    record = record.model_copy(update={"cells": cells, "ratios": ratios})
    write_serve_record(tmp_path / "record.json", record)
    write_report([tmp_path], out=tmp_path / "page.html", png=None)
    assert len(Page((tmp_path / "page.html").read_text("utf-8")).all("svg")) >= 3


def test_a_figure_that_nothing_measured_is_refused(build: Build, tmp_path: Path) -> None:
    record = changed_ratio(build("latency"), {"bound": 1e16}, metric="avg_latency_ms")
    write_serve_record(tmp_path / "record.json", record)
    with pytest.raises(UserError, match=r"'avg_latency_ms' is 1e\+16, expected at most 1e\+15"):
        read_inputs([tmp_path])


def test_something_must_be_asked_for(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert result.exit_code == 2
    assert "--out" in result.output


def test_each_figure_is_a_png(folder: Path) -> None:
    names = sorted(path.name for path in (folder / "png").iterdir())
    assert names == [
        f"1-serve-{name}.png" for name in ("depth", "open-loop", "pareto", "quality", "speedup")
    ]
    for name in names:
        content = (folder / "png" / name).read_bytes()
        assert content[:8] == b"\x89PNG\r\n\x1a\n"
        assert int.from_bytes(content[16:20]) > 900


def test_readme_tables_are_made_from_the_record(build: Build) -> None:
    record = build(label="CPU, not a serving claim")
    text = markdown_of(Inputs((Input(Path("record.json"), "ab" * 32, record),), ()))
    assert text.startswith("**CPU, not a serving claim**\n\n")
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 2 * 4
    assert {line.count("|") for line in lines} == {11}
    (row,) = [line for line in lines if "pruned-25" in line and "16 in flight" in line]
    assert row.split(" | ")[1:7] == [
        "24", "7.310 (wikitext-2)", "16 in flight", "2,079", "1.281", "1.266 to 1.297",
    ]  # fmt: skip
    assert "ab" * 32 in text


def test_readme_tables_keep_hostile_names_in_their_cells(report_records: ModuleType) -> None:
    document = report_records.build_hostile()
    record = ServeRecord.model_validate(document)
    text = markdown_of(Inputs((Input(Path("a|b.json"), "0" * 64, record),), ()))
    assert "<" not in text
    assert re.search(r"(?<!\\)[$`*\[]", text.replace("**", "")) is None
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 10
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in rows} == {11}


def test_help_loads_no_plotting(tmp_path: Path) -> None:
    code = (
        "import sys; from trsp.bench.cli import app; app(['report', '--help'], "
        "standalone_mode=False); print({'matplotlib', 'jinja2'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "--markdown" in done.stdout
    assert done.stdout.splitlines()[-1] == "set()"

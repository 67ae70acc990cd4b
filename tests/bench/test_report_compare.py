"""The report of `trsp compare`: who is named the best, with which interval, and what is drawn."""

import importlib.util
import itertools
import json
import math
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from trsp.bench.cli import app
from trsp.bench.compare_methods import DEFAULT_METHODS, parse_method
from trsp.bench.compare_record import (
    Cell,
    CompareRecord,
    Cost,
    DenseModel,
    TextFitness,
    read_compare_record,
    write_compare_record,
)
from trsp.bench.domain_quality import Quality
from trsp.bench.report import markdown_of, write_report
from trsp.bench.report_compare import compare_chapter, quality_table
from trsp.bench.report_compare_findings import Comparison, best_sentence, losing_table, stops
from trsp.bench.report_compare_plots import choose_methods, draw_comparison
from trsp.bench.report_compare_tables import (
    cost_table,
    curve_table,
    depth_table,
    readme_tables,
    task_tables,
)
from trsp.bench.report_inputs import read_inputs
from trsp.bench.report_style import to_svg
from trsp.bench.report_table import Table
from trsp.bench.zero_shot_record import Metric, TaskResult
from trsp.pruner.errors import UserError

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None or importlib.util.find_spec("jinja2") is None,
    reason="matplotlib or jinja2 is not installed (pip install 'trsp[report]')",
)

DENSE = {"books": 3.0, "wiki": 4.0}
TRSP = "trsp+transfer"
# Perplexities beside the dense model's, by method: TRSP's and those of two rivals.
TRSP_WINS = {TRSP: (1.05, 1.06, 1.07), "sleb": (1.20, 1.22, 1.21), "trsp": (1.15, 1.15, 1.16)}
TRSP_LOSES = {TRSP: (1.20, 1.21, 1.22), "sleb": (1.05, 1.06, 1.07), "trsp": (1.25, 1.26, 1.27)}
OPEN = {TRSP: (1.02, 1.10, 1.06), "sleb": (1.07, 1.03, 1.055), "trsp": (1.25, 1.26, 1.27)}


def quality(loss: float, dense: float) -> Quality:
    return Quality(perplexity=math.exp(loss), loss=loss, kl=abs(loss - dense), top1_agreement=0.75)


def build(
    ratios: dict[str, Sequence[float]] = TRSP_WINS,
    *,
    depths: tuple[int, ...] = (2, 4),
    labels: dict[str, str] | None = None,
    **changes: Any,
) -> CompareRecord:
    """Cells of those ratios on both texts at every depth, a seed for each ratio of a method."""
    cells = []
    for name, by_seed in ratios.items():
        for count in depths:
            for seed, ratio in enumerate(by_seed):
                found = {
                    text: quality(loss + math.log(ratio), loss) for text, loss in DENSE.items()
                }
                trained = "+" in name
                cells.append(
                    Cell(
                        method=name,
                        label=(labels or {}).get(name, parse_method(name).label),
                        num_removed=count,
                        seed=seed,
                        removal_order=tuple(range(1, 1 + count)),
                        selection=Cost(flops=2 * 10**12, seconds=30.0, peak_bytes=2**30),
                        training=Cost(flops=10**13, seconds=60.0, steps=64, tokens=65536)
                        if trained
                        else None,
                        quality=found,
                        jump=0.0012 * (-1) ** seed if trained else None,
                    )
                )
    settings: dict[str, Any] = {
        "dense": DenseModel(
            folder="books-5m",
            num_hidden_layers=16,
            num_parameters=4_500_000,
            fingerprint="f" * 64,
            weights_sha256="e" * 64,
            quality={text: quality(loss, loss) for text, loss in DENSE.items()},
        ),
        "recipe": {"seed": 0, "transfer": {"steps": 64}},
        "calibrations": {"0": {"source": ["train.txt"]}},
        "protocols": {text: {"window": 256} for text in DENSE},
        "num_removed": depths,
        "seeds": tuple(range(max(map(len, ratios.values())))),
        "methods": tuple(ratios),
        "cells": tuple(cells),
        "complete": True,
        "environment": {"processor": "a CPU"},
    }
    return CompareRecord(**(settings | changes))


def one_seed(ratios: dict[str, Sequence[float]]) -> dict[str, Sequence[float]]:
    return {name: by_seed[:1] for name, by_seed in ratios.items()}


def told(record: CompareRecord, count: int = 4, text: str = "books") -> str:
    return best_sentence(Comparison(record, "x.json"), count, text)


def without_quality(record: CompareRecord, method: str, note: str) -> CompareRecord:
    cells = [
        cell.model_copy(update={"quality": None, "note": note}) if cell.method == method else cell
        for cell in record.cells
    ]
    return record.model_copy(update={"cells": tuple(cells)})


def summaries(record: CompareRecord) -> list[Any]:
    return Comparison(record, "x").rows


def rows_of(table: Table) -> dict[str, tuple[str, ...]]:
    return {row.cells[0]: row.cells for group in table.groups for row in group.rows}


class Page(HTMLParser):
    """Every element of a page, and all text between them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[dict[str, str]] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes.append({name: value or "" for name, value in attrs})

    def handle_data(self, data: str) -> None:
        self.text += data


def page_of(record: CompareRecord, folder: Path) -> Page:
    write_compare_record(folder / "compare.json", record)
    write_report([folder], out=folder / "page.html", png=None)
    return Page((folder / "page.html").read_text("utf-8"))


# Who is best


def test_a_winning_trsp_is_named() -> None:
    sentence = told(build(TRSP_WINS))
    assert sentence.startswith(
        "4 of 16 layers gone, books: lowest perplexity by TRSP, at 1.060\u00d7 the dense model's ("
    )
    assert "does not include the next, TRSP selection at 1.153\u00d7" in sentence
    assert sentence.endswith("of TRSP's: TRSP wins.")


def test_a_losing_trsp_is_said_to_lose() -> None:
    sentence = told(build(TRSP_LOSES))
    assert "lowest perplexity by SLEB, at 1.060\u00d7 the dense model's" in sentence
    assert "TRSP is at 1.210\u00d7 (" in sentence
    assert "its interval does not include the lowest" in sentence
    assert sentence.endswith("of TRSP's: TRSP loses.")


def test_an_interval_that_includes_the_lowest_shows_nothing() -> None:
    sentence = told(build(OPEN))
    assert "lowest perplexity by SLEB" in sentence
    assert "its interval includes the lowest" in sentence
    assert sentence.endswith("no difference shown.")


@pytest.mark.parametrize(("ratios", "winner"), [(TRSP_WINS, "TRSP"), (TRSP_LOSES, "SLEB")])
def test_one_seed_has_no_interval_and_no_verdict(
    ratios: dict[str, Sequence[float]], winner: str
) -> None:
    record = build(one_seed(ratios))
    sentence = told(record)
    assert f"lowest perplexity by {winner}, at 1.050\u00d7 the dense model's;" in sentence
    assert "one seed, no interval" in sentence
    assert not any(word in sentence for word in ("loses", "wins", " includ", "does not"))
    table, lines = losing_table(Comparison(record, "x"))
    assert "0 are worse and 0 better" in lines[0]
    assert {row.kind for group in table.groups for row in group.rows} <= {""}
    chapter = compare_chapter(1, record, Path("x.json"), "0" * 64)
    assert any("One seed" in line for line in chapter.cautions)


def test_each_depth_and_text_has_its_own_winner() -> None:
    record = build(TRSP_WINS)
    cells = []
    for cell in record.cells:
        if cell.method == "sleb" and cell.num_removed == 2 and cell.quality is not None:
            better = cell.quality | {"wiki": quality(DENSE["wiki"] - 0.1, DENSE["wiki"])}
            cells.append(cell.model_copy(update={"quality": better}))
        else:
            cells.append(cell)
    record = record.model_copy(update={"cells": tuple(cells)})
    winners = {
        (count, text): re.search("lowest perplexity by ([A-Za-z ]+),", told(record, count, text))
        for count in (2, 4)
        for text in DENSE
    }
    assert {place: found and found[1] for place, found in winners.items()} == {
        (2, "books"): "TRSP",
        (2, "wiki"): "SLEB",
        (4, "books"): "TRSP",
        (4, "wiki"): "TRSP",
    }


def test_methods_of_the_same_layers_win_together() -> None:
    sentence = told(build({TRSP: (1.3, 1.31), "sleb": (1.1, 1.1), "trsp": (1.1, 1.1)}))
    assert "lowest perplexity by SLEB and TRSP selection, alike, at 1.100\u00d7" in sentence


def test_a_record_without_trsp_says_so() -> None:
    record = build({"sleb": (1.1, 1.2), "trsp": (1.2, 1.3)})
    assert told(record).endswith("; TRSP was not compared.")
    chapter = compare_chapter(1, record, Path("x.json"), "0" * 64)
    assert any("was not compared" in line for line in chapter.cautions)
    note = "its loss is not finite"
    assert note in told(without_quality(build(), TRSP, note))


def test_losses_have_a_table_of_their_own() -> None:
    table, lines = losing_table(Comparison(build(TRSP_LOSES), "x"))
    rows = [row for group in table.groups for row in group.rows]
    assert [row.cells[1] for row in rows] == ["SLEB"] * 4
    assert {row.kind for row in rows} == {"negative"}
    assert {row.cells[3] for row in rows} == {"better than TRSP"}
    # Where TRSP's budget was spent: both costs stand beside the ratio.
    assert rows[0].cells[4:] == ("2.00", "12.0")
    assert "4 are worse and 4 better" in lines[0]
    table, lines = losing_table(Comparison(build(TRSP_WINS), "x"))
    assert table.num_rows == 0
    assert lines[1] == "No mean is below TRSP's."
    assert "8 are worse and 0 better" in lines[0]


# Tables


def test_every_method_stands_in_the_tables() -> None:
    found = Comparison(build(TRSP_LOSES), "x")
    rows = rows_of(quality_table(found, 4, "books"))
    assert list(rows) == ["dense", "TRSP", "SLEB", "TRSP selection"]
    assert rows["dense"][1] == f"{math.exp(3.0):.2f}"
    assert rows["SLEB"][1] == f"{math.exp(3.0) * 1.05997:.2f}"
    assert re.fullmatch(r"1\.060 \(1\.0\d\d to 1\.0\d\d\)", rows["SLEB"][2])
    assert re.fullmatch(r"0\.8760 \(0\.8\d+ to 0\.8\d+\)", rows["SLEB"][3])
    assert rows["SLEB"][4:] == ("0.058", "75.0%", "3 of 3")
    assert rows["TRSP"][3] == "1"
    cost = rows_of(cost_table(found, 4))
    assert cost["TRSP"][1:] == ("64", "65,536", "12.0", "90.0", "1.00 GiB", "+0.0012", "1")
    assert cost["SLEB"][1:4] == ("\u2013", "\u2013", "2.00")


def test_a_cell_without_quality_keeps_its_row_and_its_reason(tmp_path: Path) -> None:
    record = without_quality(build(), "sleb", "no layer to fold into")
    row = rows_of(quality_table(Comparison(record, "x"), 2, "wiki"))["SLEB"]
    assert row[1:6] == ("\u2013",) * 5
    page = page_of(record, tmp_path)
    assert page.text.count("no layer to fold into") == 6
    assert "6 cells without quality" in page.text
    assert "lowest perplexity by TRSP" in page.text


def test_an_incomplete_record_is_shown_with_a_note(tmp_path: Path) -> None:
    whole = build(TRSP_LOSES)
    assert stops(whole) == ()
    cells = [cell for cell in whole.cells if (cell.method, cell.seed) != ("sleb", 2)]
    part = whole.model_copy(update={"cells": tuple(cells), "complete": False})
    page = page_of(part, tmp_path)
    assert page.text.index("INCOMPLETE: 16 of 18 cells") < page.text.index("lowest perplexity")
    assert "lowest perplexity by SLEB (2 of 3 seeds)" in page.text
    assert "sleb, 4 of 16 layers gone: seed 2 not done" in page.text
    assert all(
        "INCOMPLETE" in to_svg(plot, "x") for plot in draw_comparison(part, summaries(part))[0]
    )
    inputs = read_inputs([tmp_path / "compare.json"])
    assert "**INCOMPLETE: 16 of 18 cells" in markdown_of(inputs)


def test_a_record_of_no_cells_makes_a_page(tmp_path: Path) -> None:
    page = page_of(build(cells=(), complete=False), tmp_path)
    assert "no method has a perplexity" in page.text
    assert page.text.count("The figure \u201c") == 3
    assert "svg" not in page.tags


# Figures


def legend(svg: str) -> list[str]:
    part = svg[svg.index("legend_") :]
    return re.findall(r"<text[^>]*>([^<]*)</text>", part)


def test_every_line_has_one_label() -> None:
    record = build(TRSP_LOSES)
    plots, missing = draw_comparison(record, summaries(record))
    assert missing == []
    assert [plot.name for plot in plots] == ["depth", "compute-1", "compute-2"]
    for plot in plots:
        assert legend(to_svg(plot, "x")) == ["TRSP", "SLEB", "TRSP selection"]
        assert "Every method is drawn." in plot.caption
    depth = plots[0].figure
    assert [axes.get_title(loc="left") for axes in depth.axes] == ["books", "wiki"]
    for axes in depth.axes:
        lines = {line.get_label(): line for line in axes.lines if line.get_marker() in "s^v"}
        assert set(lines) == {"TRSP", "SLEB", "TRSP selection"}
        ys = list(map(float, lines["SLEB"].get_ydata()))
        assert ys == pytest.approx([1.06, 1.06], abs=1e-3)
        # Side by side, in the order of depth, at the ticks.
        assert list(map(round, lines["SLEB"].get_xdata())) == [2, 4]
        # One interval a point.
        assert len(axes.containers) == 6


def test_one_seed_has_no_bars() -> None:
    record = build(one_seed(TRSP_LOSES))
    plots, _ = draw_comparison(record, summaries(record))
    assert all(not axes.containers for plot in plots for axes in plot.figure.axes)
    assert all("One seed: there are no intervals." in plot.caption for plot in plots)
    assert all("one seed" in to_svg(plot, "x") for plot in plots)


def test_compute_is_drawn_at_each_depth() -> None:
    record = build(TRSP_LOSES)
    plot = draw_comparison(record, summaries(record))[0][1]
    titles = [axes.get_title(loc="left") for axes in plot.figure.axes]
    assert titles == ["2 of 16 layers gone", "4 of 16 layers gone"]
    for axes in plot.figure.axes:
        assert axes.get_xscale() == "log"
        lines = {line.get_label(): line for line in axes.lines if line.get_marker() in "s^v"}
        xs = {label: list(map(float, line.get_xdata())) for label, line in lines.items()}
        assert xs == {"TRSP": [12.0], "SLEB": [2.0], "TRSP selection": [2.0]}


def test_a_cost_of_nothing_has_a_place_on_the_axis() -> None:
    record = build(TRSP_WINS)
    cells = [
        cell.model_copy(update={"selection": Cost(flops=0, seconds=0.0)})
        if cell.method == "sleb"
        else cell
        for cell in record.cells
    ]
    record = record.model_copy(update={"cells": tuple(cells)})
    axes = draw_comparison(record, summaries(record))[0][1].figure.axes[0]
    assert axes.get_xscale() == "symlog"
    left, right = axes.get_xlim()
    assert left < 0 < right
    assert 0 in axes.get_xticks()


def test_wide_spans_make_a_logarithmic_axis() -> None:
    for last, scale in ((1.3, "linear"), (40.0, "log")):
        record = build({**TRSP_WINS, "last": (last, last, last)})
        plot = draw_comparison(record, summaries(record))[0][0]
        assert {axes.get_yscale() for axes in plot.figure.axes} == {scale}


def test_of_many_methods_the_families_are_drawn() -> None:
    ratios: dict[str, Sequence[float]] = {
        name: (1.5 + 0.01 * place, 1.52 + 0.01 * place)
        for place, name in enumerate(DEFAULT_METHODS)
    }
    ratios |= {"taylor": (1.2, 1.21), "sleb+distil@flops": (1.01, 1.02), "last": (90.0, 99.0)}
    ratios |= {"block_influence+finetune": (1.03, 1.04), TRSP: (1.1, 1.11)}
    record = build(ratios)
    # Their intervals take time: made once.
    found = Comparison(record, "x")
    drawn = choose_methods(record, found.rows)
    roles = {one.method: one.role for one in drawn}
    assert roles[TRSP] == "the product"
    assert roles["taylor"] == "the best baseline without training"
    assert roles["sleb+distil@flops"] == "the best at the same FLOPs"
    assert roles["block_influence+finetune"] == "the best at the same tokens"
    assert roles["trsp"] == "TRSP's selection alone"
    assert roles["random"] == "chance"
    assert len(drawn) == 7
    assert len({(one.colour, one.marker) for one in drawn}) == 7
    assert len({one.colour for one in drawn}) == 7
    plots, _ = draw_comparison(record, found.rows)
    assert legend(to_svg(plots[0], "x")) == [one.label for one in drawn]
    assert f"7 of {len(ratios)} methods are drawn" in plots[0].caption
    # A method beyond the frame is told of, and the others are points with a name.
    compute = to_svg(plots[1], "x")
    assert "; 1 more above the frame" in compute
    assert legend(compute)[-1] == "the others, by name in the table"
    rows = rows_of(quality_table(found, 4, "books"))
    assert len(rows) == 1 + len(ratios)


def test_few_depths_and_equal_names_are_drawn_apart() -> None:
    record = build(depths=(4,))
    plots, missing = draw_comparison(record, summaries(record))
    assert [plot.name for plot in plots] == ["compute-1", "compute-2"]
    (reason,) = missing
    assert reason.endswith("Quality against depth\u201d needs two depths with perplexities")
    same = dict.fromkeys(TRSP_WINS, "a method of a name too long for any legend, " * 2)
    record = build(labels=same)
    labels = [one.label for one in choose_methods(record, summaries(record))]
    assert len(set(labels)) == 3
    assert len(legend(to_svg(draw_comparison(record, summaries(record))[0][0], "x"))) == 3


@pytest.mark.parametrize("depths", [(4,), (2, 4)])
def test_names_and_ticks_have_room(depths: tuple[int, ...]) -> None:
    record = build({**TRSP_LOSES, "last": (1.1, 1.2), "taylor": (1.1, 1.2), "laco": (1.3, 1.2)},
                   labels={"laco": "W" * 60, "taylor": "M" * 60}, depths=depths)  # fmt: skip
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    for plot in draw_comparison(record, summaries(record))[0]:
        figure = plot.figure
        FigureCanvasAgg(figure).draw()
        (names,) = figure.legends
        box = names.get_window_extent()
        assert box.x0 >= 0
        assert box.x1 <= figure.bbox.width
        for axes in figure.axes:
            left, right = axes.get_xlim()
            ticks = [tick for tick in axes.get_xticks() if left <= tick <= right]
            assert len(ticks) >= 2
            boxes = [
                label.get_window_extent()
                for label, tick in zip(axes.get_xticklabels(), axes.get_xticks(), strict=True)
                if tick in ticks
            ]
            assert all(a.x1 < b.x0 for a, b in itertools.pairwise(boxes))


# Page, README, files

HOSTILE = "<script>alert(1)</script>|$x^2$ & \u202e"


def test_hostile_labels_come_out_as_text(tmp_path: Path) -> None:
    record = build(labels={"sleb": HOSTILE})
    page = page_of(record, tmp_path)
    assert "script" not in page.tags
    assert page.text.count("<script>alert(1)</script>|$x^2$ &") > 8
    assert "\u202e" not in page.text
    text = markdown_of(read_inputs([tmp_path / "compare.json"]))
    assert "<script" not in text
    row = next(line for line in text.splitlines() if line.startswith("| &lt;script"))
    assert len(re.findall(r"(?<!\\)\|", row)) == 5


def test_the_page_is_sound_and_the_same_again(tmp_path: Path) -> None:
    page = page_of(build(TRSP_LOSES), tmp_path)
    first = (tmp_path / "page.html").read_bytes()
    ids = [found["id"] for found in page.attributes if "id" in found]
    assert len(ids) == len(set(ids))
    wanted = {found["aria-labelledby"] for found in page.attributes if "aria-labelledby" in found}
    assert wanted <= set(ids)
    assert page.tags.count("svg") == page.tags.count("figcaption") == 3
    assert page.tags.count("table") == page.tags.count("caption")
    assert "Every ratio is a speed-up" not in page.text
    assert "TRSP loses." in page.text
    written = write_report([tmp_path], out=tmp_path / "page.html", png=tmp_path / "png")[1]
    assert (tmp_path / "page.html").read_bytes() == first
    assert [path.name for path in written[1:]] == [
        "1-compare-depth.png",
        "1-compare-compute-1.png",
        "1-compare-compute-2.png",
    ]
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in written[1:])


def test_readme_tables_hold_winner_and_methods(tmp_path: Path) -> None:
    write_compare_record(tmp_path / "compare.json", build(TRSP_LOSES))
    options = ["report", str(tmp_path / "compare.json"), "--markdown"]
    result = CliRunner().invoke(app, options)
    assert result.exit_code == 0, result.output
    text = result.output
    assert text.count("lowest perplexity by SLEB") == 4
    assert text.count("TRSP loses.") == 4
    # The curve, and of each depth quality and cost.
    assert len([line for line in text.splitlines() if line.startswith("| SLEB |")]) == 5
    assert "From compare.json, sha256 " in text


def test_what_speaks_against_the_texts_stands_before_the_numbers(tmp_path: Path) -> None:
    fitness = TextFitness(
        overlaps={}, calibration_bits=3.1, held_out_bits={}, warnings=("the text is <odd>",)
    )
    record = build(fitness=fitness)
    text = page_of(record, tmp_path).text
    assert 0 < text.index("the text is <odd>") < text.index("Every method")
    assert "the text is <odd>" in compare_chapter(1, record, tmp_path, "").cautions
    markdown = markdown_of(read_inputs([tmp_path / "compare.json"]))
    assert "- Warning: the text is" in markdown
    assert "Warning" not in markdown_of(read_inputs([_written(build(), tmp_path / "none.json")]))


def _written(record: CompareRecord, path: Path) -> Path:
    write_compare_record(path, record)
    return path


def test_the_curve_has_every_depth_and_text() -> None:
    record = build({**TRSP_WINS, "random": (2.0, 2.0, 2.0)})
    # Of one method a depth is missing; of another the quality; and one costs next to nothing.
    cells = [c for c in record.cells if (c.method, c.num_removed) != ("sleb", 4)]
    free = Cost(flops=10, seconds=0.0)
    cells = [c.model_copy(update={"selection": free}) if c.method == "random" else c for c in cells]
    record = record.model_copy(update={"cells": tuple(cells)})
    found = Comparison(without_quality(record, "trsp", "not to be had"), "x")
    table = curve_table(found)
    assert [c.title for c in table.columns] == ["layers gone", "2 of 16", "4 of 16", "TFLOP at 4"]
    rows = rows_of(table)
    dense, random = (math.exp(DENSE["books"]), math.exp(DENSE["wiki"])), "40.17 / 109.2"
    both = f"{dense[0]:.2f} / {dense[1]:.2f}"
    assert rows["dense"] == ("dense", both, both, "")
    assert rows["random"] == ("random", random, random, "0.00")
    assert rows["SLEB"][2:] == ("\u2013", "\u2013")
    assert rows["TRSP selection"][1:] == ("\u2013", "\u2013", "2.00")
    assert rows["TRSP"][1] == "21.29 / 57.87"
    assert rows["TRSP"][3] == "12.0"


def test_a_depth_has_every_text_in_one_row() -> None:
    found = Comparison(without_quality(build(), "trsp", "not to be had"), "x")
    rows = rows_of(depth_table(found, 4))
    assert rows["dense"][1:] == ("20.09", "", "54.60", "", "", "", "")
    assert rows["TRSP"][2] == rows["TRSP"][4] == "1"
    assert rows["TRSP"][-3:] == ("0.058 / 0.058", "12.0", "64")
    assert rows["SLEB"][2].startswith("1.142 (")
    assert rows["SLEB"][-1] == "\u2013"
    assert rows["TRSP selection"][1:6] == ("\u2013",) * 5


def test_one_depth_needs_no_curve() -> None:
    captions = [table.caption for table in readme_tables(Comparison(build(depths=(4,)), "x"))]
    assert captions == ["4 of 16 layers gone (25.0%)", "4 of 16 layers gone, cost"]


def test_a_broken_record_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "compare.json"
    path.write_text('{"kind": "trsp compare", "schema_version": 1}')
    with pytest.raises(UserError, match="no record of trsp compare"):
        read_inputs([tmp_path])
    write_compare_record(path, build())
    document = json.loads(path.read_text())
    changes: list[tuple[str, Any]] = [
        (r"16 of 16 layers gone", lambda d: d.update(num_removed=[16])),
        ("stands twice", lambda d: d["cells"].append(d["cells"][0])),
        (r"has quality on \['books'\]", lambda d: d["cells"][1]["quality"].pop("wiki")),
        ("finite", lambda d: d["cells"][1]["quality"]["wiki"].update(loss=float("nan"))),
    ]
    for match, change in changes:
        broken = json.loads(json.dumps(document))
        change(broken)
        path.write_text(json.dumps(broken))
        with pytest.raises(UserError, match=match):
            compare_chapter(1, read_compare_record(path), path, "0" * 64)


def test_an_unknown_file_has_the_error_it_always_had(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"kind": "trsp compared"}')
    with pytest.raises(UserError, match="no record of a speed experiment"):
        read_inputs([tmp_path])
    write_compare_record(tmp_path / "compare.json", build())
    inputs = read_inputs([tmp_path])
    assert [given.path.name for given in inputs.compares] == ["compare.json"]
    assert inputs.ignored == ("x.json: kind is 'trsp compared', not 'serve'",)


def test_zero_shot_accuracies_are_shown_where_there_are_any() -> None:
    def result(value: float) -> TaskResult:
        metric = {"filter": "none", "stderr": 0.021, "higher_is_better": True, "hits": None}
        return TaskResult(
            task="piqa",
            version="1",
            lm_eval="0.4",
            seed=0,
            num_samples=500,
            num_documents=500,
            num_truncated=0,
            documents_sha256="0" * 64,
            file=None,
            file_sha256=None,
            metrics=[
                Metric(name="acc", value=value - 0.1, **metric),
                Metric(name="acc_norm", value=value, **metric),
            ],
        )

    record = build()
    assert task_tables(Comparison(record, "x"), 4) == ()
    dense = record.dense.model_copy(update={"tasks": {"piqa": result(0.75)}})
    cells = tuple(
        cell.model_copy(
            update={
                "tasks": {} if cell.method == "trsp" else {"piqa": result(0.6 + 0.03 * cell.seed)}
            }
        )
        for cell in record.cells
    )
    with_tasks = record.model_copy(update={"dense": dense, "cells": cells})
    (table,) = task_tables(Comparison(with_tasks, "x"), 4)
    rows = rows_of(table)
    assert [column.title for column in table.columns][1:] == ["piqa, acc_norm", "mean"]
    assert rows["dense"][1:] == ("75.0% ± 2.1", "75.0%")
    # The mean of three seeds; the items are the same, so their error does not shrink.
    assert rows["SLEB"][1:] == ("63.0% ± 2.1", "63.0%")
    assert rows["TRSP selection"][1:] == ("-", "-")

"""The report of `trsp audit`: what was lost, accepted or not, beside records of other kinds."""

import importlib.util
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from trsp.bench.audit_record import (
    AuditedModel,
    AuditRecord,
    Band,
    Closing,
    ContinuedText,
    Copies,
    Domain,
    Example,
    Generation,
    Greedy,
    Loops,
    Losses,
    Outcome,
    Paired,
    SharedText,
    Sums,
    write_audit_record,
)
from trsp.bench.report import markdown_of, write_report
from trsp.bench.report_audit import (
    acceptance_lines,
    bands_table,
    criteria_table,
    domains_table,
    examples_table,
    finding,
    generation_lines,
    generation_table,
    stops,
)
from trsp.bench.report_inputs import read_inputs
from trsp.bench.report_table import Table
from trsp.bench.serve_record import write_serve_record
from trsp.pruner.errors import UserError

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None or importlib.util.find_spec("jinja2") is None,
    reason="matplotlib or jinja2 is not installed (pip install 'trsp[report]')",
)


def losses(num_tokens: int = 1000, increase: float = 0.05, **changes: Any) -> Losses:
    settings: dict[str, Any] = {
        "num_tokens": num_tokens,
        "dense": 3.0,
        "pruned": 3.0 + increase,
        "increase": increase,
        "increase_quantiles": {"50": 0.01, "90": 0.4, "99": 1.5, "99.9": 3.0},
        "worst_increase": 2.25,
        "best_decrease": -1.75,
        "tail_dense": 10.0,
        "tail_pruned": 10.5,
        "top1_agreement": 0.875,
        "top1_lost": 0.0625,
        "kl": 0.031,
    }
    return Losses(**(settings | changes))


def paired(both: int, only_dense: int, only_pruned: int, p: float, needed: int = 5) -> Paired:
    return Paired(
        num_prompts=16,
        both=both,
        only_dense=only_dense,
        only_pruned=only_pruned,
        neither=4,
        lost=only_dense,
        gained=only_pruned,
        p=p,
        needed=needed,
    )


def generation() -> Generation:
    free = paired(10, 1, 1, 1.0)
    return Generation(
        loops=Loops(new_tokens=32, free=free, distinct_dense=0.9, distinct_pruned=0.8),
        closing=Closing(
            prompt_tokens=32,
            new_tokens=64,
            num_places=40,
            opened={"(": 13},
            right=paired(4, 12, 0, 0.0005),
        ),
        copies=[
            Copies(source="text", length=8, given=4, num_known=2, right=paired(5, 0, 14, 0.0001))
        ],
        sums=[Sums(digits=2, right=paired(0, 1, 0, 1.0, needed=13))],
        num_prompts=64,
        num_new_tokens=4096,
        seconds=3.0,
    )


def domain(name: str = "books", **changes: Any) -> Domain:
    greedy = Greedy(
        num_prompts=16,
        prompt_tokens=64,
        new_tokens=128,
        same_prefix=0.25,
        same_places=0.4,
        identical=0.125,
        worst=[ContinuedText(prompt="Once upon", dense="a time", pruned="the sea", same_prefix=0)],
    )
    settings: dict[str, Any] = {
        "name": name,
        "files": [f"{name}.txt"],
        "protocol": {"window": 256},
        "dense_perplexity": 20.0,
        "pruned_perplexity": 21.0,
        "losses": losses(),
        "bands": [
            Band(least=1, most=1, losses=losses(40, 0.5)),
            Band(least=2, most=9, losses=losses(300, 0.1)),
            Band(least=100, most=None, losses=losses(660, 0.01)),
        ],
        "greedy": greedy,
        "examples": [
            Example(
                before="It was a dark\nand stormy",
                token=" night",
                dense_says=" night",
                pruned_says="\n",
                dense=0.5,
                pruned=6.25,
            )
        ],
        "generation": generation(),
    }
    return Domain(**(settings | changes))


def build(**changes: Any) -> AuditRecord:
    def model(folder: str, layers: int) -> AuditedModel:
        return AuditedModel(
            folder=folder, num_hidden_layers=layers, fingerprint="f" * 64, weights_sha256="e" * 64
        )

    settings: dict[str, Any] = {
        "dense": model("base12", 12),
        "pruned": model("pruned-25", 9),
        "domains": [domain(), domain("wiki")],
        "criteria": {"perplexity_ratio": 1.1, "kl": 0.01},
        "criteria_sha256": "c" * 64,
        "outcomes": [
            Outcome(
                criterion="perplexity_ratio", domain="books", limit=1.1, value=1.05, passed=True
            ),
            Outcome(criterion="kl", domain="wiki", limit=0.01, value=0.031, passed=False),
            Outcome(
                criterion="arithmetic_kept",
                domain="wiki",
                limit=0.8,
                value=None,
                passed=False,
                reason="the dense model adds nothing",
            ),
        ],
        "passed": False,
        "environment": {"processor": "a CPU"},
    }
    return AuditRecord(**(settings | changes))


ACCEPTED: dict[str, Any] = {
    "outcomes": [
        Outcome(criterion="kl", domain="books", limit=0.05, value=0.031, passed=True),
    ],
    "passed": True,
}
NOT_JUDGED: dict[str, Any] = {
    "outcomes": [],
    "passed": None,
    "criteria": None,
    "criteria_sha256": None,
}


def rows_of(table: Table) -> list[tuple[str, ...]]:
    return [row.cells for group in table.groups for row in group.rows]


class Page(HTMLParser):
    """Every element of a page, and all text between them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += [value or "" for name, value in attrs if name == "id"]

    def handle_data(self, data: str) -> None:
        self.text += data


def page_of(record: AuditRecord, folder: Path) -> Page:
    write_audit_record(folder / "audit.json", record)
    write_report([folder], out=folder / "page.html", png=None)
    return Page((folder / "page.html").read_text("utf-8"))


def test_a_failed_audit_says_so_first(tmp_path: Path) -> None:
    record = build()
    assert stops(record) == ("NOT ACCEPTED: kl on wiki and arithmetic_kept on wiki",)
    assert acceptance_lines(record) == ("Not accepted: 1 of 3 criteria met.",)
    text = page_of(record, tmp_path).text
    assert text.index("NOT ACCEPTED: kl on wiki") < text.index("perplexity 20.00 to 21.00")
    rows = criteria_table(record).groups[0].rows
    assert [row.kind for row in rows] == ["negative", "negative", ""]
    assert [row.cells[4] for row in rows] == ["FAIL", "FAIL", "pass"]
    assert rows[1].cells[2:] == ("not measured", "0.8", "FAIL", "the dense model adds nothing")


def test_an_accepted_audit_says_so(tmp_path: Path) -> None:
    record = build(**ACCEPTED)
    assert stops(record) == ()
    text = page_of(record, tmp_path).text
    assert "Accepted: 1 of 1 criterion met." in text
    assert "NOT ACCEPTED" not in text
    assert "FAIL" not in text


def test_an_audit_without_criteria_is_not_judged(tmp_path: Path) -> None:
    record = build(**NOT_JUDGED)
    assert stops(record) == ()
    text = page_of(record, tmp_path).text
    assert "nothing is accepted or refused" in text
    assert "Acceptance criteria" not in text


def test_the_loss_is_told_in_numbers() -> None:
    assert finding(domain()) == (
        "books: perplexity 20.00 to 21.00, 1.050\u00d7; the tokens that lost most (1%) lost 2.25 "
        "nats; the most likely token is the same for 87.5%, and 6.2% of what the dense model had "
        "right is lost; of a greedy continuation, 25% passes before the first other token."
    )
    assert "right is lost" not in finding(domain(losses=losses(top1_lost=None)))
    assert "greedy" not in finding(domain(greedy=None))


def test_domains_stand_beside_each_other() -> None:
    record = build(
        domains=[domain(), domain("wiki", losses=losses(tail_dense=0.0, top1_lost=None))]
    )
    first, second = rows_of(domains_table(record))
    assert first == (
        "books", "1,000", "20.00", "21.00", "1.050\u00d7", "+0.050", "+0.01", "+0.40", "+1.50",
        "+2.25", "-1.75", "1.050\u00d7", "0.031", "87.5%", "6.2%",
    )  # fmt: skip
    assert (second[0], second[11], second[14]) == ("wiki", "\u2013", "\u2013")
    assert len(domains_table(record).columns) == len(first)


def test_bands_keep_their_order() -> None:
    rows = rows_of(bands_table(build()))
    assert [row[:3] for row in rows[:3]] == [
        ("books", "1", "40"),
        ("books", "2 to 9", "300"),
        ("books", "100 or more", "660"),
    ]
    assert [row[5] for row in rows] == ["+0.500", "+0.100", "+0.010"] * 2


def test_skills_are_judged_where_chance_cannot_tell() -> None:
    rows = generation_table(build(domains=[domain()])).groups[0].rows
    verdicts = [(row.cells[-1], row.kind) for row in rows]
    assert verdicts == [
        ("no difference shown", ""),
        ("LOST", "negative"),
        ("gained", ""),
        ("not compared: the dense model gets 1 right, 13 needed", "control"),
    ]
    assert rows[1].cells[1] == "open brackets and quotations (13 () closed in 64 tokens"
    assert rows[1].cells[2:8] == ("20", "16", "4", "12", "0", "0.0005")
    assert rows[3].cells[5:8] == ("\u2013",) * 3


def test_records_of_before_the_checks_say_what_they_lack(tmp_path: Path) -> None:
    old = build(domains=[domain(generation=None)])
    assert generation_table(old).num_rows == 0
    assert "books: the record holds no checks of skills." in generation_lines(old)
    none = build(domains=[domain(generation=None, greedy=None)])
    assert generation_lines(none) == ["books: nothing was generated."]
    text = page_of(none, tmp_path).text
    assert "nothing was generated" in text
    assert "Continuations that part first" not in text
    # An old record has no such key at all.
    document = json.loads((tmp_path / "audit.json").read_text())
    del document["domains"][0]["generation"]
    (tmp_path / "audit.json").write_text(json.dumps(document))
    assert len(read_inputs([tmp_path]).audits) == 1


def test_examples_show_what_cannot_be_seen() -> None:
    (row,) = rows_of(examples_table(build(domains=[domain()])))
    assert row == (
        "books", "It was a dark and stormy", "' night'", "' night'", r"'\n'", "0.50", "6.25",
    )  # fmt: skip
    long = domain(examples=[domain().examples[0].model_copy(update={"before": "word " * 90})])
    (row,) = rows_of(examples_table(build(domains=[long])))
    assert row[1].startswith("\u2026")
    assert len(row[1]) == 161


HOSTILE = "<img src=x onerror=alert(1)>|`$x$` \u202e"


def test_texts_come_out_as_text(tmp_path: Path) -> None:
    example = domain().examples[0].model_copy(update={"before": HOSTILE, "token": HOSTILE})
    record = build(domains=[domain(HOSTILE, examples=[example])])
    page = page_of(record, tmp_path)
    assert "img" not in page.tags
    assert page.text.count("<img src=x onerror=alert(1)>|`$x$`") > 6
    assert "\u202e" not in page.text
    text = markdown_of(read_inputs([tmp_path]))
    assert "<img" not in text
    rows = [line for line in text.splitlines() if line.startswith("| &lt;img")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {16, 9, 10}


def test_readme_tables(tmp_path: Path) -> None:
    write_audit_record(tmp_path / "audit.json", build())
    text = markdown_of(read_inputs([tmp_path]))
    assert text.startswith(
        "**NOT ACCEPTED: kl on wiki and arithmetic\\_kept on wiki**\n\n- pruned-25"
    )
    assert "| wiki | kl | 0.031 | 0.01 | FAIL |  |" in text
    assert "From audit.json, sha256 " in text


def test_what_speaks_against_the_texts_stands_before_the_numbers(tmp_path: Path) -> None:
    record = build(warnings=["the text is odd"])
    text = page_of(record, tmp_path).text
    assert 0 < text.index("the text is odd") < text.index("What was lost, by text")
    assert "- Warning: the text is odd." in markdown_of(read_inputs([tmp_path]))


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({}, "not measured: the record was written before this was measured."),
        ({"overlap_unknown": "the files are gone"}, "was not measured: the files are gone."),
        (
            {"domains": "seen"},
            "wiki: 2.5 % of its 13-token runs stand in the calibration sequences.",
        ),
    ],
)
def test_the_overlap_with_the_calibration_text_is_told(
    changes: dict[str, Any], line: str, tmp_path: Path
) -> None:
    if changes.get("domains"):
        shared = SharedText(
            n=13,
            num_ngrams=400,
            share=0.025,
            calibration_share=0.1,
            longest_run=15,
            longest_start=7,
        )
        seen = [one.model_copy(update={"overlap": shared}) for one in build().domains]
        changes = {"domains": seen}
    assert line in page_of(build(**changes), tmp_path).text
    assert f"{line}\n" in markdown_of(read_inputs([tmp_path]))


def test_records_of_all_kinds_share_a_page(tmp_path: Path, report_records: ModuleType) -> None:
    folder = tmp_path / "in"
    serve = report_records.build("latency")
    write_serve_record(folder / "speed.json", serve)
    _, written = write_report([folder], out=tmp_path / "alone.html", png=tmp_path / "alone")
    alone = (tmp_path / "alone.html").read_text("utf-8")
    assert "What pruning lost" not in alone
    write_audit_record(folder / "audit.json", build())
    (folder / "other.json").write_text('{"kind": "other"}')
    inputs, both = write_report([folder], out=tmp_path / "page.html", png=tmp_path / "png")
    assert inputs.ignored == ("other.json: kind is 'other', not 'serve'",)
    # An audit has no figures, and takes none away.
    assert [path.name for path in both[1:]] == [path.name for path in written[1:]]
    page = Page((tmp_path / "page.html").read_text("utf-8"))
    assert len(page.ids) == len(set(page.ids))
    order = [
        "Every ratio is a speed-up",
        "there a ratio is of perplexities",
        "1. Offline latency: the result",
        "2. What pruning lost: the result",
        "Files that are no records",
    ]
    places = [page.text.index(line) for line in order]
    assert places == sorted(places)
    # What the page says of the speed record is what it says of it alone, but for the number.
    start = "<h3>Quality beside speed</h3>"
    part = alone[alone.index(start) : alone.index("</section>", alone.index(start))]
    assert part in (tmp_path / "page.html").read_text("utf-8")
    text = markdown_of(inputs)
    assert text.index("From speed.json") < text.index("From audit.json")


@pytest.mark.parametrize(
    ("change", "match"),
    [({"schema_version": 2}, "schema_version"), ({"domains": None}, "domains")],
)
def test_a_broken_audit_is_refused(change: dict[str, Any], match: str, tmp_path: Path) -> None:
    path = tmp_path / "audit.json"
    write_audit_record(path, build())
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=match):
        read_inputs([path])


def test_a_perplexity_of_nothing_is_refused(tmp_path: Path) -> None:
    write_audit_record(tmp_path / "audit.json", build(domains=[domain(dense_perplexity=0.0)]))
    with pytest.raises(UserError, match="dense_perplexity on 'books' is 0, expected more than 0"):
        read_inputs([tmp_path])

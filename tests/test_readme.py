"""The README's tables of comparisons are what `trsp report RECORD --markdown` prints."""

import re
from itertools import pairwise, product
from pathlib import Path

import pytest

from trsp.bench.compare_record import read_compare_record
from trsp.bench.report import markdown_of
from trsp.bench.report_inputs import read_inputs

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "bench" / "records"
WAYS_TO_TRAIN = ("trsp+transfer", "trsp+distil", "trsp+finetune")
VALIDATION_BOOKS = "61ce46929de11a7cf2cf8ee0687070c49127e2619e96656319039db7f3fe5c94"
# <!-- compare-base20.json: 5 of 20 layers gone (25.0%) --> and the table behind it.
TABLE = re.compile(r"^<!-- (\S+\.json): (.+) -->\n\n((?:\|.*\n)+)", re.MULTILINE)


def tables() -> list[tuple[str, str, list[str]]]:
    text = (ROOT / "README.md").read_text("utf-8")
    return [(name, title, table.splitlines()) for name, title, table in TABLE.findall(text)]


def printed(record: str) -> dict[str, list[str]]:
    """The lines of each table, by the caption above it."""
    blocks = markdown_of(read_inputs([RECORDS / record])).split("\n\n")
    return {above: table.splitlines() for above, table in pairwise(blocks) if table.startswith("|")}


def test_there_are_tables_of_records() -> None:
    assert len(tables()) >= 5


def test_the_table_of_rates_is_the_records() -> None:
    """Its cells are perplexity / KL on the books, by depth and then by way to train."""
    text = (ROOT / "README.md").read_text("utf-8")
    (table,) = re.findall(r"^<!-- rates -->\n((?:\|.*\n)+)", text, re.MULTILINE)
    head, _, *rows = [line.strip("|\n ").split(" | ") for line in table.splitlines()]
    ways = product((4, 8), ("TRSP", "distil", "finetune"))
    assert head == ["rate", *(f"{way}, {depth} gone" for depth, way in ways)]
    assert [row[0] for row in rows] == ["1e-4", "3e-4", "7.8e-4", "1.6e-3"]
    for rate, *cells in rows:
        name = "default" if rate == "7.8e-4" else rate
        record = read_compare_record(RECORDS / f"compare-rate-{name}-valid.json")
        assert record.seeds == (0,)
        assert record.protocols["books"]["text_sha256"] == VALIDATION_BOOKS
        asked = record.recipe["transfer"]["learning_rate"]
        assert asked == (None if name == "default" else float(rate))
        found = {(cell.num_removed, cell.method): cell.quality for cell in record.cells}
        for wanted, key in zip(cells, product((4, 8), WAYS_TO_TRAIN), strict=True):
            quality = found[key]
            assert quality is not None
            books = quality["books"]
            assert wanted == f"{books.perplexity:.1f} / {books.kl:.3f}"


@pytest.mark.parametrize("name", sorted({name for name, _, _ in tables()}))
def test_every_row_is_the_records(name: str) -> None:
    """Rows may be left out, not changed, and their order is the record's."""
    found = printed(name)
    for table_of, title, lines in tables():
        if table_of != name:
            continue
        assert title in found, f"{name} prints no table {title!r}, but {sorted(found)}"
        wanted = found[title]
        assert lines[:2] == wanted[:2], title
        assert [line for line in wanted if line in lines] == lines, title

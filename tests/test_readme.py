"""The README's tables of comparisons are what `trsp report RECORD --markdown` prints."""

import re
from itertools import pairwise
from pathlib import Path

import pytest

from trsp.bench.report import markdown_of
from trsp.bench.report_inputs import read_inputs

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "bench" / "records"
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

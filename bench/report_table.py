"""What a table of the report is made of: columns, rows of text, groups of rows."""

from collections.abc import Iterable
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Column:
    """A heading; `group` stands above columns that follow each other.

    `words` aligns left and may break into lines, `short` aligns left and does not.
    """

    title: str
    group: str = ""
    words: bool = False
    short: bool = False


@dataclass(frozen=True)
class Row:
    """Cells as text, the first two naming the row. `kind`: control, dense, negative or empty.

    `span`: rows that share the first cell, counted at the first of them and 0 at the others.
    """

    cells: tuple[str, ...]
    kind: str = ""
    span: int = 1


@dataclass(frozen=True)
class Group:
    """Rows under a common line; no line where `title` is empty."""

    title: str
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Table:
    """One table; it is left out of the page when it has no rows."""

    caption: str
    columns: tuple[Column, ...]
    groups: tuple[Group, ...]

    @property
    def num_rows(self) -> int:
        """Rows of all groups."""
        return sum(len(group.rows) for group in self.groups)

    @property
    def column_groups(self) -> list[tuple[str, int]]:
        """Groups of columns that follow each other, with their widths; empty without any."""
        found: list[tuple[str, int]] = []
        for column in self.columns:
            if found and found[-1][0] == column.group:
                found[-1] = (column.group, found[-1][1] + 1)
            else:
                found.append((column.group, 1))
        return found if any(column.group for column in self.columns) else []


def one_group(rows: Iterable[Row]) -> tuple[Group, ...]:
    """Rows without a line above them; no group where there are none."""
    found = tuple(rows)
    return (Group("", found),) if found else ()


def merged(rows: Iterable[Row]) -> tuple[Row, ...]:
    """Let rows that follow each other with the same first cell share it."""
    found: list[Row] = []
    first = 0
    for row in rows:
        if found and found[first].cells[0] == row.cells[0]:
            found[first] = replace(found[first], span=found[first].span + 1)
            found.append(replace(row, span=0))
        else:
            first = len(found)
            found.append(row)
    return tuple(found)

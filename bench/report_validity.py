"""The report's tables of what was not as it should be, and of what everything ran on."""

import re
from collections.abc import Iterator
from typing import Any

from trsp.bench.report_table import Column, Row, Table, merged, one_group
from trsp.bench.report_values import Values
from trsp.bench.report_words import DASH, MEMORY_TITLES

# A count at the head of a note.
_AMOUNT = re.compile(r"[0-9]{1,12}(?= )")


def invalid_table(values: Values) -> Table:
    """Every cell that does not count, and why."""
    rows = [
        Row(
            (
                f"block {cell.block + 1}, position {cell.position + 1}",
                cell.arm,
                values.load_title(cell.load),
                MEMORY_TITLES[cell.memory],
                "; ".join(cell.invalid),
            ),
            "negative",
        )
        for cell in values.record.cells
        if cell.invalid
    ]
    titles = ("cell", "arm", "load", "memory", "why it does not count")
    columns = tuple(Column(title, words=True) for title in titles)
    return Table("Cells that do not count", columns, one_group(rows))


def config_table(values: Values) -> Table:
    """The configuration of the first engine that left one; what differs is listed elsewhere."""
    start = next((start for start in values.record.starts if start.engine_config), None)
    rows = [] if start is None else [Row(pair) for pair in sorted(start.engine_config.items())]
    columns = (Column("part", words=True), Column("value", words=True))
    arm = "" if start is None else f" of {start.arm}, {MEMORY_TITLES[start.memory]}"
    return Table(f"Configuration of the engine{arm}", columns, one_group(rows))


def remarks(values: Values) -> list[str]:
    """Notes of measurements that count all the same, each with how many carry it.

    Notes that differ in the number they begin with alone are one line: "13 to 33 preemptions".
    """
    found: dict[str, list[str]] = {}
    for cell in values.record.cells:
        for note in cell.notes if not cell.invalid else []:
            amount = _AMOUNT.match(note)
            text = note[amount.end() :] if amount else note
            found.setdefault(text, []).append(amount[0] if amount else "")
    return [
        f"{_ends(amounts)}{text} ({len(amounts)} measurement{'' if len(amounts) == 1 else 's'})"
        for text, amounts in found.items()
    ]


def _ends(amounts: list[str]) -> str:
    """The least and the most of numbers as they were written; empty where there are none."""
    known = sorted((amount for amount in amounts if amount), key=int)
    if not known:
        return ""
    return known[0] if int(known[0]) == int(known[-1]) else f"{known[0]} to {known[-1]}"


def environment_table(values: Values) -> Table:
    """Where the experiment ran, nested names written with dots."""
    rows = [Row(pair) for pair in _flat(values.record.environment, "")]
    columns = (Column("name", words=True), Column("value", words=True))
    return Table("Environment", columns, one_group(rows))


def protocols_table(values: Values) -> Table:
    """How each perplexity was measured; arms that share a protocol share its rows."""
    rows = []
    found: dict[tuple[str, str], list[str]] = {}
    for arm in values.arms:
        for quality in arm.quality if arm.weights == "checkpoint" else []:
            parts = (f"{name} = {value}" for name, value in _flat(quality.protocol, ""))
            found.setdefault((quality.text, "; ".join(parts)), []).append(arm.name)
    for (text, protocol), arms in found.items():
        rows.append(Row((text, ", ".join(arms), protocol)))
    columns = tuple(Column(title, words=True) for title in ("text", "arms", "protocol"))
    return Table("How perplexity was measured", columns, one_group(merged(rows)))


def models_table(values: Values) -> Table:
    """Each arm's model as it was named."""
    rows = [
        Row(
            (arm.name, arm.model, arm.weights, DASH if arm.fingerprint is None else arm.fingerprint)
        )
        for arm in values.arms
    ]
    titles = ("arm", "model", "weights", "fingerprint")
    columns = tuple(Column(title, words=True) for title in titles)
    return Table("Models", columns, one_group(rows))


def hashes_table(values: Values, file_name: str, file_sha256: str) -> Table:
    """sha256 of the record, and those it holds."""
    rows = [Row((f"record {file_name}", file_sha256))]
    rows += [Row(pair) for pair in values.record.hashes.items()]
    columns = (Column("of", words=True), Column("sha256", words=True))
    return Table("Hashes", columns, one_group(rows))


def _flat(value: Any, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list) and value:
        for place, inner in enumerate(value):
            yield from _flat(inner, f"{name}.{place}")
    else:
        yield name, "none" if value in (None, {}, []) else str(value)

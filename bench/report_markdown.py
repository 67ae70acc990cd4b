"""README tables: of a speed record a line for each model at the loads that tell most."""

import re
from collections.abc import Sequence

from trsp.bench.report_findings import compared, stops
from trsp.bench.report_style import plain
from trsp.bench.report_table import Table
from trsp.bench.report_values import Place, Told, Values, told_memory
from trsp.bench.report_words import (
    DASH,
    NO_INTERVAL,
    interval,
    load_title,
    metric_title,
    metric_unit,
    number,
)
from trsp.bench.serve_record import Arm, Ratio

_LATENCIES = ("median_tpot_ms", "median_ttft_ms", "median_e2el_ms")


def to_markdown(values: Values, file_name: str, file_sha256: str) -> str:
    """Tables in GitHub's Markdown, label and warnings above them, their origin below.

    One table for each metric that a load is told by.
    """
    record = values.record
    paragraphs = [f"**{_escape(text)}**" for text in (record.label, *stops(values)) if text]
    paragraphs.append(_escape(compared(values)))
    told = values.told()
    by_metric = {
        metric: [one for one in told if one.metric == metric]
        for metric in dict.fromkeys(one.metric for one in told)
    }
    for metric, ones in by_metric.items():
        paragraphs.append(_table(values, metric, ones[::-1]))
    if not told:
        paragraphs.append("Nothing was measured.")
    elif values.ratios and all(ratio.low is None for ratio in values.ratios):
        paragraphs.append(_escape(f"{NO_INTERVAL[0].upper()}{NO_INTERVAL[1:]}."))
    paragraphs.append(_escape(f"From {file_name}, sha256 {file_sha256}."))
    return "\n\n".join(paragraphs) + "\n"


def tables_to_markdown(
    stops: Sequence[str],
    sentences: Sequence[str],
    tables: Sequence[Table],
    file_name: str,
    file_sha256: str,
) -> str:
    """A comparison's or an audit's: warnings, sentences as a list, tables, their origin."""
    paragraphs = [f"**{_escape(text)}**" for text in stops]
    paragraphs.append("\n".join(f"- {_escape(text)}" for text in sentences))
    for table in tables:
        paragraphs += [_escape(table.caption), table_markdown(table)]
    paragraphs.append(_escape(f"From {file_name}, sha256 {file_sha256}."))
    return "\n\n".join(paragraphs) + "\n"


def table_markdown(table: Table) -> str:
    """One table without its caption: words to the left, figures to the right."""
    lines = [_line([_escape(column.title) for column in table.columns])]
    lines.append(_line(["---" if column.words else "---:" for column in table.columns]))
    lines += [
        _line([_escape(cell) for cell in row.cells]) for group in table.groups for row in group.rows
    ]
    return "\n".join(lines)


def _table(values: Values, metric: str, told: Sequence[Told]) -> str:
    record = values.record
    loads = {one.load.name for one in told}
    measured = {name for cell in record.cells if cell.load in loads for name in cell.metrics}
    latencies = [name for name in _LATENCIES if name in measured]
    percent = f"{record.confidence:.0%} interval"
    heads = ["model", "layers", "perplexity", "load", _head(metric), "speed-up", percent]
    heads += [_head(name) for name in latencies]
    lines = [_line(heads), _line(["---"] * len(heads))]
    for one in told:
        lines += [
            _line([_escape(cell) for cell in _cells(values, arm, one, latencies)])
            for arm in values.arms
        ]
    return "\n".join(lines)


def _cells(values: Values, arm: Arm, told: Told, latencies: Sequence[str]) -> list[str]:
    place = Place(told_memory(values), arm.name, told.load.name)
    ratio = values.ratio(place, told.metric)
    return [
        arm.name,
        str(arm.num_hidden_layers),
        _perplexity(values, arm),
        load_title(told.load),
        _figure(values, place, told.metric),
        DASH if ratio is None else f"{ratio.estimate:.3f}",
        DASH if ratio is None else interval(ratio),
        *(_figure(values, place, name) for name in latencies),
    ]


def _figure(values: Values, place: Place, metric: str) -> str:
    """A figure from the speed-up's own blocks, with the dense one where that is of other blocks."""
    ratio = values.ratio(place, metric)
    if ratio is None:
        return number(values.value(place, metric), 4)
    beside = _dense_elsewhere(values, place, ratio)
    return number(ratio.pruned, 4) + ("" if beside is None else f" (dense {number(beside, 4)})")


def _dense_elsewhere(values: Values, place: Place, ratio: Ratio) -> float | None:
    """The dense figure of a speed-up that counts in fewer blocks than the dense row; else None."""
    dense = values.dense
    if dense is None:
        return None
    row = Place(place.memory, dense.name, place.load)
    return None if values.blocks(row) == values.blocks(place) else ratio.dense


def _perplexity(values: Values, arm: Arm) -> str:
    if arm.weights == "dummy":
        return "random weights"
    dense = values.dense
    if dense is None or not dense.quality:
        return DASH
    text = dense.quality[0].text
    found = [quality for quality in arm.quality if quality.text == text]
    if not found or values.same_protocol(found[0]) is None:
        return DASH
    return f"{number(found[0].perplexity, 4)} ({text})"


def _head(metric: str) -> str:
    unit = metric_unit(metric)
    return _escape(metric_title(metric) + (f", {unit}" if unit in ("ms", "s") else ""))


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _escape(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    text = " ".join(plain(text).split())
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~#!$])", r"\\\1", text)

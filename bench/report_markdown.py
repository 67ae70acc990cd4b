"""README tables of a record: a line for each model at the two loads that tell most."""

import re
from collections.abc import Sequence

from trsp.bench.report_findings import compared, stops
from trsp.bench.report_style import plain
from trsp.bench.report_values import Place, Values, told_memory
from trsp.bench.report_words import DASH, interval, load_title, metric_title, metric_unit, number
from trsp.bench.serve_record import Arm, Load

_LATENCIES = ("median_tpot_ms", "median_ttft_ms", "median_e2el_ms")


def to_markdown(values: Values, file_name: str, file_sha256: str) -> str:
    """A table in GitHub's Markdown, its label and warnings above it, its origin below it."""
    record = values.record
    measured = {name for cell in record.cells for name in cell.metrics}
    latencies = [name for name in _LATENCIES if name in measured]
    metric = values.main_metric()
    percent = f"{record.confidence:.0%} interval"
    heads = ["model", "layers", "perplexity", "load", _head(metric), "speed-up", percent]
    heads += [_head(name) for name in latencies]
    table = [_line(heads), _line(["---"] * len(heads))]
    for load in reversed(values.main_loads()):
        table += [
            _line([_escape(cell) for cell in _cells(values, arm, load, metric, latencies)])
            for arm in values.arms
        ]
    paragraphs = [f"**{_escape(text)}**" for text in (record.label, *stops(values)) if text]
    paragraphs += [_escape(compared(values)), "\n".join(table)]
    paragraphs.append(_escape(f"From {file_name}, sha256 {file_sha256}."))
    return "\n\n".join(paragraphs) + "\n"


def _cells(values: Values, arm: Arm, load: Load, metric: str, latencies: list[str]) -> list[str]:
    place = Place(told_memory(values), arm.name, load.name)
    ratio = values.ratio(place, metric)
    return [
        arm.name,
        str(arm.num_hidden_layers),
        _perplexity(values, arm),
        load_title(load),
        number(values.value(place, metric), 4),
        DASH if ratio is None else f"{ratio.estimate:.3f}",
        DASH if ratio is None else interval(ratio),
        *(number(values.value(place, name), 4) for name in latencies),
    ]


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

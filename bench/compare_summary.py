"""A comparison's cells over seeds: means, intervals, and each method beside TRSP."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from trsp.bench.compare_methods import REFERENCE
from trsp.bench.compare_record import Cell, CompareRecord
from trsp.bench.compare_tasks import accuracy
from trsp.bench.statistics import Interval, ratio_interval
from trsp.bench.zero_shot_record import TaskResult


@dataclass(frozen=True)
class TextSummary:
    """One method on one text, over the seeds.

    Attributes:
        perplexity: geometric mean.   to_dense: perplexity over the dense model's.
        to_reference: over TRSP's with the same seed and depth; None without that row.
        kl: nats a token.   top1_agreement: share of tokens.
    """

    perplexity: float
    to_dense: Interval
    to_reference: Interval | None
    kl: float
    top1_agreement: float


@dataclass(frozen=True)
class TaskSummary:
    """A zero-shot accuracy over the seeds.

    Attributes:
        metric: lm-eval's name of it.
        stderr: of one seed's value, from the task's items: they are the same for every seed, so
            more seeds do not make it smaller. None where lm-eval has none.
    """

    metric: str
    value: float
    stderr: float | None


@dataclass(frozen=True)
class Row:
    """One method at one depth. Costs are means over the seeds.

    Attributes:
        texts: None where a seed has no quality; `note` says why.   tasks: by task.
        num_choices: how many different sets of layers the seeds chose.
    """

    method: str
    label: str
    num_removed: int
    num_seeds: int
    texts: dict[str, TextSummary] | None
    tasks: dict[str, TaskSummary]
    steps: float
    flops: float
    seconds: float
    peak_bytes: float | None
    num_choices: int
    note: str | None


def summarize(record: CompareRecord) -> list[Row]:
    """One row a method and depth, in the order of the record; only finished cells count."""
    rows = []
    for count in record.num_removed:
        reference = {c.seed: c for c in _cells(record, REFERENCE, count)}
        for method in record.methods:
            cells = _cells(record, method, count)
            if cells:
                rows.append(_row(record, cells, reference))
    return rows


def _cells(record: CompareRecord, method: str, count: int) -> list[Cell]:
    return [cell for cell in record.cells if (cell.method, cell.num_removed) == (method, count)]


def _row(record: CompareRecord, cells: Sequence[Cell], reference: dict[int, Cell]) -> Row:
    notes = [cell.note for cell in cells if cell.note]
    peaks = [
        max(part.peak_bytes or 0 for part in (cell.selection, cell.training) if part is not None)
        for cell in cells
    ]
    steps = [(cell.training or cell.selection).steps for cell in cells]
    return Row(
        method=cells[0].method,
        label=cells[0].label,
        num_removed=cells[0].num_removed,
        num_seeds=len(cells),
        texts=None
        if any(cell.quality is None for cell in cells)
        else {name: _text(record, cells, reference, name) for name in record.protocols},
        tasks=summarize_tasks([cell.tasks for cell in cells]),
        steps=_mean(steps),
        flops=_mean([cell.total_flops for cell in cells]),
        seconds=_mean([cell.total_seconds for cell in cells]),
        peak_bytes=_mean(peaks) if all(peaks) else None,
        num_choices=len({frozenset(cell.removal_order) for cell in cells}),
        note=notes[0] if notes else None,
    )


def _text(
    record: CompareRecord, cells: Sequence[Cell], reference: dict[int, Cell], name: str
) -> TextSummary:
    qualities = {cell.seed: cell.quality[name] for cell in cells if cell.quality is not None}
    dense = record.dense.quality[name].loss
    found = list(qualities.values())
    references = {
        seed: cell.quality[name] for seed, cell in reference.items() if cell.quality is not None
    }
    beside = [
        quality.loss - references[seed].loss
        for seed, quality in qualities.items()
        if seed in references
    ]
    return TextSummary(
        perplexity=math.exp(_mean([quality.loss for quality in found])),
        to_dense=ratio_interval([quality.loss - dense for quality in found]),
        to_reference=ratio_interval(beside) if len(beside) == len(found) else None,
        kl=_mean([quality.kl for quality in found]),
        top1_agreement=_mean([quality.top1_agreement for quality in found]),
    )


def summarize_tasks(results: Sequence[dict[str, TaskResult]]) -> dict[str, TaskSummary]:
    """By task, over models that have all been through the same tasks; empty without tasks."""
    found = {}
    for name in results[0] if all(results) else ():
        metrics = [accuracy(one[name]) for one in results]
        shown = [metric for metric in metrics if metric is not None]
        if len(shown) == len(results):
            errors = [metric.stderr for metric in shown if metric.stderr is not None]
            found[name] = TaskSummary(
                shown[0].name,
                _mean([metric.value for metric in shown]),
                _mean(errors) if len(errors) == len(shown) else None,
            )
    return found


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)

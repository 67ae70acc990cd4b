"""What the report reads from one record: arms and loads in order, figures of an arm under a load.

A figure is the geometric mean over the cells that count (both halves of every block in which the
arm and the dense one are valid), as the speed-ups are; a block's is over its own. Where a cell has
0, it is the plain mean.
"""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean, geometric_mean

from trsp.bench.report_words import load_title
from trsp.bench.serve_record import Arm, Backend, Cell, Load, Memory, Quality, Ratio, ServeRecord

# Fewer requests put fewer than ten beyond the 99th percentile.
MIN_REQUESTS_FOR_P99 = 1000
# Every arm is measured so often in a block.
HALVES = 2
_ROLES = ("dense", "control", "pruned")
# The first that a record has ratios for is the one its result is told by.
_MAIN_METRICS: dict[Backend, tuple[str, ...]] = {
    "serve": ("output_throughput", "request_throughput", "median_tpot_ms", "median_e2el_ms"),
    "latency": ("avg_latency_ms", "p50_latency_ms"),
    "throughput": ("tokens_per_second", "requests_per_second"),
    "transformers": (
        "generation_throughput", "prompt_throughput", "generation_latency_s", "prompt_latency_s",
    ),
}  # fmt: skip
# What the table of speed-ups shows outside the details, by backend and kind of load.
_TOLD: dict[tuple[Backend, str], tuple[str, ...]] = {
    ("serve", "closed"): (
        "output_throughput", "median_ttft_ms", "median_tpot_ms", "median_e2el_ms",
    ),
    ("serve", "open"): ("request_goodput", "p90_ttft_ms", "median_tpot_ms", "median_e2el_ms"),
    ("latency", "batch"): ("avg_latency_ms", "p50_latency_ms", "p90_latency_ms"),
    ("throughput", "batch"): ("tokens_per_second", "requests_per_second"),
    ("transformers", "batch"): ("generation_throughput", "prompt_throughput"),
}  # fmt: skip


@dataclass(frozen=True)
class Told:
    """What the result is told by: a load, and the metric that tells most of it."""

    load: Load
    metric: str


@dataclass(frozen=True)
class Place:
    """Where a figure belongs: an arm under a load, with one kind of memory."""

    memory: Memory
    arm: str
    load: str


class Values:
    """One record, asked for its figures."""

    def __init__(self, record: ServeRecord) -> None:
        self.record = record
        self.arms: list[Arm] = sorted(record.arms, key=lambda arm: _ROLES.index(arm.role))
        self.loads: list[Load] = list(record.loads)
        self.memories: list[Memory] = list(record.memories)
        self.ratios: list[Ratio] = [
            ratio for ratio in record.ratios if not is_too_rare(ratio.metric, self.load(ratio.load))
        ]
        self._all_cells: dict[Place, list[Cell]] = {}
        for cell in record.cells:
            place = Place(cell.memory, cell.arm, cell.load)
            self._all_cells.setdefault(place, []).append(cell)
        whole = {place: _whole_blocks(cells) for place, cells in self._all_cells.items()}
        self._blocks = {place: blocks & self._beside(place, whole) for place, blocks in
                        whole.items()}  # fmt: skip
        self._cells = {
            place: [cell for cell in cells if cell.block in self._blocks[place]]
            for place, cells in self._all_cells.items()
        }

    def _beside(self, place: Place, whole: dict[Place, set[int]]) -> set[int]:
        """Blocks in which what a place is compared with is valid: dense, or any arm for dense."""
        dense = self.dense
        if dense is None:
            return whole[place]
        if place.arm != dense.name:
            return whole.get(Place(place.memory, dense.name, place.load), set())
        others = (
            whole.get(Place(place.memory, arm.name, place.load), set())
            for arm in self.arms
            if arm.name != dense.name
        )
        return set().union(*others)

    @property
    def dense(self) -> Arm | None:
        """The arm that the others are compared with; None in a record without one."""
        return next((arm for arm in self.arms if arm.role == "dense"), None)

    @property
    def pruned(self) -> list[Arm]:
        """The pruned arms, in the record's order."""
        return [arm for arm in self.arms if arm.role == "pruned"]

    @property
    def controls(self) -> set[str]:
        """Names of the control arms."""
        return {arm.name for arm in self.arms if arm.role == "control"}

    def cells(self, place: Place) -> list[Cell]:
        """The cells of a place that count."""
        return self._cells.get(place, [])

    def blocks(self, place: Place) -> set[int]:
        """The blocks of a place that count, 0 first."""
        return self._blocks.get(place, set())

    def block_numbers(self) -> list[int]:
        """Every block that was measured or that a speed-up has, in order."""
        found = {cell.block for cell in self.record.cells}
        for ratio in self.record.ratios:
            found |= blocks_of(ratio).keys()
        return sorted(found)

    def all_cells(self, place: Place) -> list[Cell]:
        """The cells of a place with those that do not count."""
        return self._all_cells.get(place, [])

    def load(self, name: str) -> Load | None:
        """The load of this name."""
        return next((load for load in self.loads if load.name == name), None)

    def load_title(self, name: str) -> str:
        """What the load of this name is, in words; an unknown name as it is."""
        load = self.load(name)
        return name if load is None else load_title(load)

    def value(self, place: Place, metric: str) -> float | None:
        """The figure of a place; None where nothing that counts was measured."""
        return _mean(self.cells(place), metric)

    def by_block(self, place: Place, metric: str) -> list[float]:
        """The figure of each block that has one, in order."""
        cells = self.cells(place)
        found = (
            _mean([cell for cell in cells if cell.block == block], metric)
            for block in sorted({cell.block for cell in cells})
        )
        return [value for value in found if value is not None]

    def ratio(self, place: Place, metric: str) -> Ratio | None:
        """The speed-up of a place in a metric."""
        for ratio in self.ratios:
            if (ratio.memory, ratio.arm, ratio.load, ratio.metric) == (
                place.memory, place.arm, place.load, metric,
            ):  # fmt: skip
                return ratio
        return None

    def loads_of(self, *kinds: str) -> list[Load]:
        """Loads of these kinds, least concurrency (or share) first, without a limit last."""
        chosen = [load for load in self.loads if load.kind in kinds]
        return sorted(chosen, key=lambda load: load.concurrency or load.share or math.inf)

    def main_loads(self) -> list[Load]:
        """The loads the result is told at: most concurrency first, then least; one if only one."""
        memory = told_memory(self)
        measured = {place.load for place in self._all_cells if place.memory == memory}
        for kinds in (("closed", "batch"), ("open",)):
            loads = [load for load in self.loads_of(*kinds) if load.name in measured]
            if loads:
                return [loads[-1], loads[0]] if len(loads) > 1 else loads
        return []

    def told(self) -> list[Told]:
        """The loads the result is told at, each with the metric that it is told by."""
        return [Told(load, self._told_metric(load)) for load in self.main_loads()]

    def _told_metric(self, load: Load) -> str:
        metrics = _MAIN_METRICS[self.record.backend]
        compared = {ratio.metric for ratio in self.ratios if ratio.load == load.name}
        measured = {name for cell in self.record.cells if cell.load == load.name
                    for name in cell.metrics}  # fmt: skip
        for found in (compared, measured):
            for metric in metrics:
                if metric in found:
                    return metric
        return metrics[0]

    def is_told(self, ratio: Ratio) -> bool:
        """Whether a speed-up is shown outside the details; all are where a load is unusual."""
        load = self.load(ratio.load)
        told = _TOLD.get((self.record.backend, load.kind if load else ""))
        return told is None or ratio.metric in told

    def same_protocol(self, quality: Quality) -> float | None:
        """The dense model's perplexity on the same text by the same protocol; None where none."""
        for dense in self.dense.quality if self.dense else []:
            if (dense.text, dense.protocol) == (quality.text, quality.protocol):
                return dense.perplexity
        return None

    def quality_ratio(self, arm: Arm) -> tuple[Quality, float] | None:
        """The first text whose perplexity compares with the dense one's, and the ratio.

        None where none does; random weights have no quality.
        """
        if arm.weights == "dummy":
            return None
        for quality in arm.quality:
            dense = self.same_protocol(quality)
            if dense is not None:
                return quality, quality.perplexity / dense
        return None


def _whole_blocks(cells: Iterable[Cell]) -> set[int]:
    """Blocks with both halves valid, as a speed-up needs them."""
    halves = Counter(cell.block for cell in cells if not cell.invalid)
    return {block for block, count in halves.items() if count == HALVES}


def _mean(cells: Iterable[Cell], metric: str) -> float | None:
    found = [cell.metrics[metric] for cell in cells if metric in cell.metrics]
    if not found:
        return None
    return geometric_mean(found) if min(found) > 0 else fmean(found)


def told_memory(values: Values) -> Memory:
    """The memory that results are told at: equal KV blocks unless that was not measured."""
    return "equal-kv" if "equal-kv" in values.memories or not values.memories else "equal-memory"


def is_unexplained(ratio: Ratio) -> bool:
    """Whether the record says that nothing explains a speed-up."""
    return "unexplained" in ratio.verdict.lower()


def has_interval(ratio: Ratio) -> bool:
    """Whether anything can be claimed of a speed-up: one block has no interval."""
    return ratio.low is not None and ratio.high is not None


def blocks_of(ratio: Ratio) -> dict[int, float]:
    """The speed-up of each block that counts, by the block's number, 0 first.

    Raises:
        ValueError: as many numbers as blocks are expected, or none in a record from before them.
    """
    numbers = ratio.block_numbers or range(len(ratio.blocks))
    return dict(zip(numbers, ratio.blocks, strict=True))


def is_negative(ratio: Ratio) -> bool:
    """Whether a speed-up failed to show: its interval contains or lies below 1, or unexplained.

    Without an interval nothing is claimed.
    """
    if ratio.low is None or ratio.high is None:
        return False
    return ratio.low <= 1 or is_unexplained(ratio)


def excludes_one(ratio: Ratio) -> bool:
    """Whether the interval lies on one side of 1; for a control, that its noise floor is broken."""
    return ratio.low is not None and ratio.high is not None and not ratio.low <= 1 <= ratio.high


def is_too_rare(metric: str, load: Load | None) -> bool:
    """Whether a metric is a 99th percentile of too few requests to be one."""
    return metric.startswith("p99_") and (load is None or load.num_requests < MIN_REQUESTS_FOR_P99)

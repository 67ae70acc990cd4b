"""From measurements to speed-ups: pairs in blocks, intervals over blocks, bounds beside them."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from trsp.bench.bounds import ModelCost, achieved_over_bound, decode_bound, prefill_bound, verdict
from trsp.bench.serve_plan import CONTROL, DENSE, Step
from trsp.bench.serve_record import Cell, Load, Memory, Ratio, Workload
from trsp.bench.statistics import Interval, block_log_ratio, ratio_interval

# In an open loop the client sets the pace: a throughput says what was asked for.
_PACED = ("throughput", "per_second")
_LOWER_IS_BETTER = ("_ms", "_s", "latency")


def is_cost(metric: str) -> bool:
    """Whether less of this metric is better."""
    return metric.endswith(_LOWER_IS_BETTER)


def ratios(
    cells: Sequence[Cell],
    loads: Sequence[Load],
    workload: Workload,
    costs: Mapping[str, ModelCost],
    *,
    steps: Sequence[Step] = (),
) -> tuple[list[Ratio], list[str]]:
    """Speed-up over the dense arm for every arm, load and metric, in the blocks that count.

    A block counts for an arm when its cells and the dense arm's are all there and valid.
    Args:
        costs: by arm.
        steps: the plan, so that what was never measured is missed too; without it, only blocks and
            arms that have a cell under the load are.
    Returns:
        the ratios, and one line for everything that could not be compared.
    """
    found: list[Ratio] = []
    missing: list[str] = []
    by_load = {load.name: load for load in loads}
    for (memory, name), (arms, planned) in _places(cells, steps).items():
        chosen = [cell for cell in cells if (cell.memory, cell.load) == (memory, name)]
        for arm in arms:
            beside = _beside_dense(chosen, memory, by_load[name], arm)
            where = f"{arm}, {memory}, {name}"
            if not beside.blocks:
                missing.append(f"{where}: no block with every cell valid")
                continue
            if len(beside.blocks) < planned:
                missing.append(f"{where}: {len(beside.blocks)} of {planned} blocks count")
            judged, uncompared = _judged_metrics(beside, workload, costs)
            found += judged
            missing += uncompared
    return found, missing


@dataclass(frozen=True)
class _Beside:
    """An arm beside the dense one under one load: the blocks that count, their cells in pairs."""

    memory: Memory
    load: Load
    arm: str
    blocks: list[int]
    pairs: list[tuple[list[Cell], list[Cell]]]


def _places(
    cells: Sequence[Cell], steps: Sequence[Step]
) -> dict[tuple[Memory, str], tuple[list[str], int]]:
    """By memory and load: the arms beside the dense one, and how many blocks were meant to be."""
    points = [(step.memory, load.name, step.arm, step.block) for step in steps
              for load in step.loads]  # fmt: skip
    points += [(cell.memory, cell.load, cell.arm, cell.block) for cell in cells]
    arms: dict[tuple[Memory, str], dict[str, None]] = {}
    blocks: dict[tuple[Memory, str], set[int]] = {}
    for memory, load, arm, block in points:
        blocks.setdefault((memory, load), set()).add(block)
        here = arms.setdefault((memory, load), {})
        if arm != DENSE:
            here[arm] = None
    return {place: (list(arms[place]), len(blocks[place])) for place in arms}


def _beside_dense(chosen: Sequence[Cell], memory: Memory, load: Load, arm: str) -> _Beside:
    dense, other = _by_block(chosen, DENSE), _by_block(chosen, arm)
    blocks = [block for block in dense if block in other]
    return _Beside(memory, load, arm, blocks, [(dense[block], other[block]) for block in blocks])


def _judged_metrics(
    beside: _Beside, workload: Workload, costs: Mapping[str, ModelCost]
) -> tuple[list[Ratio], list[str]]:
    """The speed-up in every metric beside its bound, and a line for each metric without one."""
    found: list[Ratio] = []
    missing: list[str] = []
    dense, pruned = costs[DENSE], costs[beside.arm]
    first = beside.pairs[0][0][0]
    for metric in first.metrics:
        # In an open loop the client sets the pace: nothing to compare, and nothing missed.
        if beside.load.kind == "open" and any(word in metric for word in _PACED):
            continue
        ratio = _ratio(metric, beside)
        if isinstance(ratio, str):
            missing.append(ratio)
            continue
        bound = _bound(
            metric, beside.load, workload, dense, pruned, beside.memory, _prompt_tokens(first)
        )
        found.append(_judged(ratio, bound, _layer_ratio(dense, pruned)))
    return found, missing


def _layer_ratio(dense: ModelCost, pruned: ModelCost) -> float:
    return dense.num_hidden_layers / pruned.num_hidden_layers


def _prompt_tokens(cell: Cell) -> int:
    """Tokens of one prompt, which the paper's protocol does not take from the workload."""
    return max(1, cell.total_input_tokens // max(1, cell.completed))


def _by_block(cells: Iterable[Cell], arm: str) -> dict[int, list[Cell]]:
    """An arm's two cells of each block in which both count."""
    blocks: dict[int, list[Cell]] = {}
    for cell in cells:
        if cell.arm == arm and not cell.invalid:
            blocks.setdefault(cell.block, []).append(cell)
    return {block: halves for block, halves in blocks.items() if len(halves) == 2}


def _ratio(metric: str, beside: _Beside) -> Ratio | str:
    """The speed-up in one metric; text: why there is none."""
    values = [([c.metrics[metric] for c in dense], [c.metrics[metric] for c in other])
              for dense, other in beside.pairs]  # fmt: skip
    flat = [value for pair in values for half in pair for value in half]
    if min(flat) <= 0:
        return (
            f"{beside.arm}, {beside.memory}, {beside.load.name}: {metric} is 0 in a block: no ratio"
        )
    sign = -1.0 if is_cost(metric) else 1.0
    logs = [sign * block_log_ratio(dense, other) for dense, other in values]
    interval = ratio_interval(logs)
    return Ratio(
        memory=beside.memory,
        arm=beside.arm,
        load=beside.load.name,
        metric=metric,
        dense=_geometric_mean(value for dense, _ in values for value in dense),
        pruned=_geometric_mean(value for _, other in values for value in other),
        estimate=interval.estimate,
        low=interval.low,
        high=interval.high,
        blocks=[math.exp(log) for log in logs],
        block_numbers=list(beside.blocks),
        bound=None,
        achieved_over_bound=None,
        verdict="",
    )


def _bound(
    metric: str,
    load: Load,
    workload: Workload,
    dense: ModelCost,
    pruned: ModelCost,
    memory: Memory,
    prompt_tokens: int,
) -> float | None:
    """The most that fewer bytes and FLOPs can gain: the larger of the roofline's two ratios.

    A step that takes max(bytes / bandwidth, FLOPs / rate) cannot speed up by more than the larger
    of the two ratios. None where time is spent waiting (open loop), and where KV room differs.
    """
    if load.kind == "open" or memory == "equal-memory" or "goodput" in metric:
        return None
    batch = load.concurrency or load.num_requests
    context = workload.input_len + workload.output_len // 2
    decode = max(
        decode_bound(dense, pruned, batch=batch, context=context),
        prefill_bound(dense, pruned, tokens=1),
    )
    # A prompt's weights are read once, whatever its length.
    prefill = max(
        prefill_bound(dense, pruned, tokens=prompt_tokens),
        decode_bound(dense, pruned, batch=1, context=0),
    )
    if metric.startswith("prompt_") or (batch == 1 and "ttft" in metric):
        return prefill
    if batch == 1 and ("tpot" in metric or "itl" in metric):
        return decode
    # A step may work on prompts and on other requests' tokens at once.
    return max(decode, prefill)


def _judged(ratio: Ratio, bound: float | None, layer_ratio: float) -> Ratio:
    if ratio.arm == CONTROL:
        inside = ratio.low is not None and ratio.high is not None and ratio.low <= 1 <= ratio.high
        told = "contains 1" if inside else "does not contain 1: drift or bias above the noise"
        if ratio.low is None:
            told = "one block: no interval"
        return ratio.model_copy(update={"verdict": told})
    if bound is None:
        told = "no bound applies"
        if ratio.high is not None and ratio.high < 1:
            told += "; slower than dense"
        return ratio.model_copy(update={"verdict": told})
    return ratio.model_copy(
        update={
            "bound": bound,
            "achieved_over_bound": achieved_over_bound(ratio.estimate, bound),
            "verdict": _told(ratio, bound, layer_ratio),
        }
    )


def _told(ratio: Ratio, bound: float, layer_ratio: float) -> str:
    interval = Interval(ratio.estimate, ratio.low, ratio.high, len(ratio.blocks))
    told = verdict(interval, bound, layer_ratio)
    return told if ratio.high is None or ratio.high >= 1 else f"{told}; slower than dense"


def _geometric_mean(values: Iterable[float]) -> float:
    logs = [math.log(value) for value in values]
    return math.exp(math.fsum(logs) / len(logs))

"""From measurements to speed-ups: pairs in blocks, intervals over blocks, bounds beside them."""

import math
from collections.abc import Iterable, Mapping, Sequence

from trsp.bench.bounds import ModelCost, achieved_over_bound, decode_bound, prefill_bound, verdict
from trsp.bench.serve_plan import CONTROL, DENSE
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
) -> tuple[list[Ratio], list[str]]:
    """Speed-up over the dense arm for every arm, load and metric that all blocks measured.

    Invalid cells take their block out of that load.
    Args:
        costs: by arm.
    Returns:
        the ratios, and one line for everything that could not be compared.
    """
    found: list[Ratio] = []
    missing: list[str] = []
    by_load = {load.name: load for load in loads}
    for memory in dict.fromkeys(cell.memory for cell in cells):
        for name in dict.fromkeys(cell.load for cell in cells if cell.memory == memory):
            chosen = [cell for cell in cells if (cell.memory, cell.load) == (memory, name)]
            dense = _by_block(chosen, DENSE)
            for arm in dict.fromkeys(cell.arm for cell in chosen if cell.arm != DENSE):
                other = _by_block(chosen, arm)
                blocks = [block for block in dense if block in other]
                planned = len({cell.block for cell in chosen})
                if 0 < len(blocks) < planned:
                    missing.append(
                        f"{arm}, {memory}, {name}: {len(blocks)} of {planned} blocks count"
                    )
                if not blocks:
                    missing.append(f"{arm}, {memory}, {name}: no block with every cell valid")
                    continue
                pairs = [(dense[block], other[block]) for block in blocks]
                for metric in pairs[0][0][0].metrics:
                    ratio = _ratio(metric, blocks, pairs, by_load[name], memory, arm)
                    if isinstance(ratio, str):
                        if ratio:
                            missing.append(ratio)
                        continue
                    tokens = _prompt_tokens(chosen[0])
                    bound = _bound(
                        metric, by_load[name], workload, costs[DENSE], costs[arm], memory, tokens
                    )
                    found.append(
                        _judged(
                            ratio,
                            bound,
                            costs[DENSE].num_hidden_layers / costs[arm].num_hidden_layers,
                        )
                    )
    return found, missing


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


def _ratio(
    metric: str,
    blocks: Sequence[int],
    pairs: Sequence[tuple[Sequence[Cell], Sequence[Cell]]],
    load: Load,
    memory: Memory,
    arm: str,
) -> Ratio | str:
    """The speed-up in one metric; text: why there is none, empty where none is meant to be."""
    if load.kind == "open" and any(word in metric for word in _PACED):
        return ""
    values = [([c.metrics[metric] for c in dense], [c.metrics[metric] for c in other])
              for dense, other in pairs]  # fmt: skip
    flat = [value for pair in values for half in pair for value in half]
    if min(flat) <= 0:
        return f"{arm}, {memory}, {load.name}: {metric} is 0 in a block: no ratio"
    sign = -1.0 if is_cost(metric) else 1.0
    logs = [sign * block_log_ratio(dense, other) for dense, other in values]
    interval = ratio_interval(logs)
    return Ratio(
        memory=memory,
        arm=arm,
        load=load.name,
        metric=metric,
        dense=_geometric_mean(value for dense, _ in values for value in dense),
        pruned=_geometric_mean(value for _, other in values for value in other),
        estimate=interval.estimate,
        low=interval.low,
        high=interval.high,
        blocks=[math.exp(log) for log in logs],
        block_numbers=list(blocks),
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

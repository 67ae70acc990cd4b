"""Speed-ups by hand: directions, blocks that do not count, loads without a bound."""

import math
from dataclasses import replace
from typing import Any

import pytest

from trsp.bench.bounds import BEYOND, FAR_BELOW, WITHIN, LayerCost, ModelCost
from trsp.bench.serve_plan import CONTROL, DENSE, palindrome, steps
from trsp.bench.serve_record import Cell, Load, Memory, Ratio, Workload
from trsp.bench.speed_analysis import is_cost, ratios

ARMS = (DENSE, CONTROL, "p")
WORKLOAD = Workload(
    input_len=16, output_len=4, dtype="float32", seed=0, ttft_slo_ms=2000.0, tpot_slo_ms=100.0
)
LOADS = (
    Load(name="closed 1", kind="closed", concurrency=1, num_requests=200),
    Load(name="closed 8", kind="closed", concurrency=8, num_requests=200),
    Load(name="open 0.5", kind="open", share=0.5, request_rate=1.0, num_requests=200),
)
# Half of a dense model's weights are in its four layers; the pruned one has two of them.
LAYER = LayerCost(
    parameters=1000, matrix_parameters=1000, kv_width=8, attention_width=16, window=None
)


def cost(num_layers: int) -> ModelCost:
    return ModelCost(
        layers=(LAYER,) * num_layers,
        embedding_parameters=4000,
        embedding_width=10,
        head_parameters=4000,
        rest_parameters=0,
        tied=False,
        bytes_per_parameter=4,
        bytes_per_kv=4,
    )


COSTS = {DENSE: cost(4), CONTROL: cost(4), "p": cost(2)}


def cells(
    figures: dict[str, list[float]],
    *,
    metric: str = "output_throughput",
    load: str = "closed 1",
    memory: Memory = "equal-kv",
    **changes: Any,
) -> list[Cell]:
    """Blocks in which each arm reads its next two figures."""
    found = []
    for block in range(len(figures[DENSE]) // 2):
        seen = dict.fromkeys(figures, 0)
        for position, arm in enumerate(palindrome(tuple(figures))):
            value = figures[arm][2 * block + seen[arm]]
            seen[arm] += 1
            fields: dict[str, Any] = {
                "block": block, "position": position, "memory": memory, "arm": arm, "load": load,
                "started_at": "2026-01-01", "completed": 200, "failed": 0,
                "total_input_tokens": 3200, "total_output_tokens": 800,
                "metrics": {metric: value}, "prompts_sha256": "aa", "client_cpu_share": 0.1,
                "prefix_cache_hits": 0, "num_preemptions": 0, "notes": [], "invalid": [],
            }  # fmt: skip
            found.append(Cell(**(fields | changes)))
    return found


def analysed(measured: list[Cell]) -> tuple[list[Ratio], list[str]]:
    return ratios(measured, LOADS, WORKLOAD, COSTS)


def of(found: list[Ratio], arm: str) -> Ratio:
    (ratio,) = [ratio for ratio in found if ratio.arm == arm]
    return ratio


@pytest.mark.parametrize(
    ("metric", "cost_like"),
    [
        ("output_throughput", False),
        ("request_throughput", False),
        ("total_token_throughput", False),
        ("request_goodput", False),
        ("tokens_per_second", False),
        ("requests_per_second", False),
        ("generation_throughput", False),
        ("median_ttft_ms", True),
        ("p99_e2el_ms", True),
        ("avg_latency_ms", True),
        ("prompt_latency_s", True),
        ("generation_latency_s", True),
    ],
)
def test_less_is_better_for_times_only(metric: str, cost_like: bool) -> None:
    assert is_cost(metric) is cost_like


def test_a_throughput_by_hand() -> None:
    found, missing = analysed(cells({DENSE: [10, 10, 10, 40], CONTROL: [10, 10, 20, 20],
                                     "p": [20, 20, 20, 20]}))  # fmt: skip
    assert missing == []
    p = of(found, "p")
    # Blocks: 20 / 10 and 20 / sqrt(10 * 40).
    assert p.blocks == pytest.approx([2.0, 1.0])
    assert p.estimate == pytest.approx(math.sqrt(2))
    assert p.dense == pytest.approx((10 * 10 * 10 * 40) ** 0.25)
    assert p.pruned == pytest.approx(20)
    assert p.low is not None
    assert p.high is not None
    assert p.low < p.estimate < p.high
    assert of(found, CONTROL).blocks == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize("metric", ["median_tpot_ms", "avg_latency_ms", "prompt_latency_s"])
def test_a_time_that_halves_is_a_speed_up_of_two(metric: str) -> None:
    found, _ = analysed(cells({DENSE: [10, 10], "p": [5, 5]}, metric=metric))
    assert of(found, "p").estimate == pytest.approx(2)
    found, _ = analysed(cells({DENSE: [5, 5], "p": [10, 10]}, metric=metric))
    assert of(found, "p").estimate == pytest.approx(0.5)


def test_an_invalid_cell_takes_its_block_out_for_its_arm() -> None:
    measured = cells({DENSE: [10, 10, 10, 10], CONTROL: [10, 10, 10, 10], "p": [99, 99, 20, 20]})
    spoiled = [
        cell.model_copy(update={"invalid": ["bad"]})
        if (cell.block, cell.arm, cell.position) == (0, "p", 2)
        else cell
        for cell in measured
    ]
    found, missing = analysed(spoiled)
    assert of(found, "p").blocks == pytest.approx([2.0])
    assert of(found, "p").low is None
    assert of(found, "p").block_numbers == [1]
    assert of(found, CONTROL).block_numbers == [0, 1]
    assert missing == ["p, equal-kv, closed 1: 1 of 2 blocks count"]


def test_an_invalid_dense_cell_takes_its_block_out_for_all() -> None:
    measured = cells({DENSE: [10, 10, 10, 10], CONTROL: [10, 10, 10, 10], "p": [20, 20, 20, 20]})
    measured[0] = measured[0].model_copy(update={"invalid": ["bad"]})
    found, _ = analysed(measured)
    assert [len(ratio.blocks) for ratio in found] == [1, 1]


def test_no_valid_block_is_said() -> None:
    measured = cells({DENSE: [10, 10], "p": [20, 20]}, invalid=["bad"])
    found, missing = analysed(measured)
    assert found == []
    assert missing == ["p, equal-kv, closed 1: no block with every cell valid"]


@pytest.mark.parametrize("count", range(1, 6))
def test_a_block_that_was_not_finished_does_not_count(count: int) -> None:
    measured = cells({DENSE: [10, 10, 10, 10], CONTROL: [10, 10, 10, 10], "p": [20, 20, 20, 20]})
    found, _ = analysed(measured[: 6 + count])
    assert of(found, "p").blocks == pytest.approx([2.0])


@pytest.mark.parametrize(
    ("num_cells", "told"),
    [
        (0, ["dense again: no", "p: no"]),
        (3, ["dense again: no", "p: no"]),
        (6, ["dense again: 1", "p: 1"]),
        (9, ["dense again: 1", "p: 1"]),
        (12, ["dense again: 2", "p: 2"]),
    ],
)
def test_blocks_of_the_plan_that_were_never_measured_are_missed(
    num_cells: int, told: list[str]
) -> None:
    """A run that was killed has cells of some blocks, and of others none at all."""
    measured = cells({DENSE: [10] * 4, CONTROL: [10] * 4, "p": [20] * 4})[:num_cells]
    plan = list(steps(ARMS, LOADS[:1], LOADS[1], ["equal-kv", "equal-memory"], 3))
    _, missing = ratios(measured, LOADS, WORKLOAD, COSTS, steps=plan)
    ends = {"no": "no block with every cell valid", "1": "1 of 3 blocks count",
            "2": "2 of 3 blocks count"}  # fmt: skip
    here = [line.split(": ") for line in told]
    assert missing == [
        *(f"{arm}, equal-kv, closed 1: {ends[end]}" for arm, end in here),
        *(f"{arm}, equal-memory, closed 8: {ends['no']}" for arm in (CONTROL, "p")),
    ]


def test_a_whole_plan_misses_nothing() -> None:
    measured = cells({DENSE: [10] * 4, CONTROL: [10] * 4, "p": [20] * 4})
    plan = list(steps(ARMS, LOADS[:1], LOADS[1], ["equal-kv"], 2))
    assert ratios(measured, LOADS, WORKLOAD, COSTS, steps=plan)[1] == []


@pytest.mark.parametrize(
    ("control", "told"),
    [
        ([10, 10.1, 10.1, 10, 9.9, 10], "contains 1"),
        ([12, 12.1, 12.1, 12, 11.9, 12], "does not contain 1: drift or bias above the noise"),
        ([12, 12], "one block: no interval"),
    ],
)
def test_the_verdict_of_the_control(control: list[float], told: str) -> None:
    dense = [10.0, 10.1, 9.9, 10.0, 10.0, 10.1][: len(control)]
    found, _ = analysed(cells({DENSE: dense, CONTROL: control, "p": control}))
    assert of(found, CONTROL).verdict == told
    assert of(found, CONTROL).bound is None


@pytest.mark.parametrize("metric", ["output_throughput", "tokens_per_second"])
def test_an_open_loop_gives_no_throughput(metric: str) -> None:
    figures = {DENSE: [10.0, 10.0], CONTROL: [10.0, 10.0], "p": [10.0, 10.0]}
    assert analysed(cells(figures, metric=metric, load="open 0.5")) == ([], [])
    assert len(analysed(cells(figures, metric=metric, load="closed 8"))[0]) == 2


def test_an_open_loop_gives_times_without_a_bound() -> None:
    figures = {DENSE: [10.0, 10.0], "p": [1.0, 1.0]}
    found, _ = analysed(cells(figures, metric="median_ttft_ms", load="open 0.5"))
    assert of(found, "p").estimate == pytest.approx(10)
    assert of(found, "p").bound is None
    assert of(found, "p").verdict == "no bound applies"


def test_equal_memory_has_no_bound() -> None:
    figures = {DENSE: [10.0, 10.0], "p": [90.0, 90.0]}
    found, _ = analysed(cells(figures, load="closed 8", memory="equal-memory"))
    assert of(found, "p").memory == "equal-memory"
    assert of(found, "p").bound is None
    assert of(found, "p").achieved_over_bound is None


def test_a_goodput_has_no_bound() -> None:
    """What misses its deadline by a hair counts nothing: goodput can rise without limit."""
    figures = {DENSE: [0.1, 0.1], "p": [9.0, 9.0]}
    found, _ = analysed(cells(figures, metric="request_goodput", load="closed 8"))
    assert of(found, "p").bound is None
    assert of(found, "p").verdict == "no bound applies"


def test_a_goodput_of_zero_is_named_and_not_compared() -> None:
    figures = {DENSE: [0.0, 0.0], "p": [9.0, 9.0]}
    found, missing = analysed(cells(figures, metric="request_goodput"))
    assert found == []
    assert missing == ["p, equal-kv, closed 1: request_goodput is 0 in a block: no ratio"]


# At batch 1 a step reads head, layers, a row of the embedding, and 18 cached tokens a layer:
# 4 * (4000 + 4 * 1000 + 10) + 4 * 18 * 8 * 4 = 34344 bytes dense, 24 * 1000 + 40 + 1152 pruned.
BYTES = (4 * (4000 + 4 * 1000 + 10) + 4 * 18 * 8 * 4) / (
    4 * (4000 + 2 * 1000 + 10) + 2 * 18 * 8 * 4
)


@pytest.mark.parametrize(
    ("speedup", "verdict"),
    [(BYTES - 0.02, WITHIN), (2.5, BEYOND), (1.05, FAR_BELOW)],
)
def test_the_bound_of_decoding_one_request(speedup: float, verdict: str) -> None:
    figures = {DENSE: [10.0, 10.0], "p": [10.0 / speedup] * 2}
    found, _ = analysed(cells(figures, metric="median_tpot_ms"))
    p = of(found, "p")
    assert p.bound == pytest.approx(BYTES, rel=0.02)
    assert p.bound is not None
    assert p.achieved_over_bound == pytest.approx((speedup - 1) / (p.bound - 1))
    assert p.verdict == verdict


def test_slower_than_dense_is_said() -> None:
    figures = {DENSE: [10, 10, 10, 10.1], "p": [8, 8, 8, 8.1]}
    assert of(analysed(cells(figures))[0], "p").verdict.endswith("slower than dense")
    found, _ = analysed(cells(figures, memory="equal-memory"))
    assert of(found, "p").verdict == "no bound applies; slower than dense"


@pytest.mark.parametrize("metric", ["median_ttft_ms", "median_tpot_ms", "output_throughput"])
@pytest.mark.parametrize("load", ["closed 1", "closed 8"])
def test_no_bound_is_above_the_ratio_of_layers(metric: str, load: str) -> None:
    figures = {DENSE: [10.0, 10.0], "p": [10.0, 10.0]}
    bound = of(analysed(cells(figures, metric=metric, load=load))[0], "p").bound
    assert bound is not None
    assert 1 < bound < 2


def test_a_bound_follows_the_bytes_where_the_largest_layers_went() -> None:
    """More than the ratio of layers can be gained, and is no mystery."""
    large = replace(LAYER, parameters=99_000, matrix_parameters=99_000)
    dense = replace(cost(4), layers=(large, large, LAYER, LAYER))
    figures = {DENSE: [10.0, 10.0], "p": [5.0, 5.0]}
    measured = cells(figures, metric="median_tpot_ms")
    found, _ = ratios(measured, LOADS, WORKLOAD, {DENSE: dense, "p": cost(2)})
    assert (of(found, "p").bound or 0) > 10


def test_every_memory_and_load_is_compared_by_itself() -> None:
    figures = {DENSE: [10.0, 10.0], "p": [20.0, 20.0]}
    other = {DENSE: [10.0, 10.0], "p": [30.0, 30.0]}
    measured = [
        *cells(figures),
        *cells(other, load="closed 8"),
        *cells(other, load="closed 8", memory="equal-memory"),
    ]
    found, _ = analysed(measured)
    told = [(ratio.memory, ratio.load, round(ratio.estimate)) for ratio in found]
    assert told == [
        ("equal-kv", "closed 1", 2),
        ("equal-kv", "closed 8", 3),
        ("equal-memory", "closed 8", 3),
    ]

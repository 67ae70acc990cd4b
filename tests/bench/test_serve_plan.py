"""The order of measurements cancels drift, and loads are what was asked for or a clear no."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trsp.bench.serve_plan import (
    CONTROL,
    DENSE,
    Step,
    arm_names,
    closed_loads,
    enough_requests,
    open_loads,
    palindrome,
    saturating_load,
    steps,
)
from trsp.bench.statistics import block_log_ratio, ratio_interval
from trsp.pruner.errors import UserError

ARMS = st.lists(st.text("abcdef", min_size=1), min_size=1, max_size=6, unique=True)


def visits(order: tuple[str, ...], arm: str) -> list[int]:
    return [place for place, name in enumerate(order) if name == arm]


@given(ARMS)
def test_all_arms_of_a_block_have_the_same_mean_position(arms: list[str]) -> None:
    order = palindrome(arms)
    assert len(order) == 2 * len(arms)
    assert {sum(visits(order, arm)) for arm in arms} == {2 * len(arms) - 1}
    assert {len(visits(order, arm)) for arm in arms} == {2}


def drifting_estimate(
    orders: list[tuple[str, ...]], costs: dict[str, float], drift: float
) -> float:
    """The speed-up of b over a when every measurement is slower than the one before."""
    logs = []
    for block, order in enumerate(orders):
        measured: dict[str, list[float]] = {arm: [] for arm in costs}
        for place, arm in enumerate(order):
            when = block * len(order) + place
            measured[arm].append(costs[arm] * math.exp(drift * when))
        logs.append(-block_log_ratio(measured["a"], measured["b"]))
    return ratio_interval(logs).estimate


DRIFT = st.floats(-0.05, 0.05)
COST = st.floats(0.1, 100)


# scipy is imported by the first example, whatever its deadline.
@settings(deadline=None, max_examples=50)
@given(COST, COST, DRIFT, st.integers(1, 4), st.integers(0, 3))
def test_a_steady_drift_cancels_exactly(
    a: float, b: float, drift: float, num_blocks: int, num_others: int
) -> None:
    others = [f"other {n}" for n in range(num_others)]
    costs = {"a": a, "b": b, **dict.fromkeys(others, 1.0)}
    orders = [palindrome(["a", *others, "b"])] * num_blocks
    assert drifting_estimate(orders, costs, drift) == pytest.approx(a / b, rel=1e-9)


def test_another_order_would_not_cancel_it() -> None:
    costs = {"a": 2.0, "b": 1.0}
    assert drifting_estimate([("a", "b", "a", "b")] * 3, costs, 0.02) == pytest.approx(
        2 * math.exp(-0.02)
    )


def test_the_steps_of_an_experiment() -> None:
    loads = closed_loads([4, 1], 8)
    every = saturating_load(50)
    found = list(steps([DENSE, CONTROL, "p"], loads, every, ["equal-kv", "equal-memory"], 2))
    assert len(found) == 2 * 2 * 6
    assert found[0] == Step("equal-kv", 0, 0, DENSE, tuple(loads))
    assert [step.arm for step in found[:6]] == [DENSE, CONTROL, "p", "p", CONTROL, DENSE]
    assert [step.arm for step in found[6:12]] == ["p", CONTROL, DENSE, DENSE, CONTROL, "p"]
    assert [step.position for step in found[6:12]] == [0, 1, 2, 3, 4, 5]
    assert {step.block for step in found[6:12]} == {1}
    assert {step.memory for step in found[12:]} == {"equal-memory"}
    assert {load for step in found[12:] for load in step.loads} == {every}


@pytest.mark.parametrize(("concurrency", "count"), [(1, 200), (20, 200), (21, 210), (128, 1280)])
def test_enough_requests(concurrency: int, count: int) -> None:
    assert enough_requests(concurrency) == count
    (load,) = closed_loads([concurrency], None)
    assert (load.kind, load.concurrency, load.num_requests) == ("closed", concurrency, count)


@pytest.mark.parametrize("concurrencies", [[], [0], [-1, 2], [2, 2]])
def test_concurrencies_that_mean_nothing(concurrencies: list[int]) -> None:
    with pytest.raises(UserError, match=r"--concurrency .*different positive numbers"):
        closed_loads(concurrencies, None)


@pytest.mark.parametrize("count", [3, 0, -5])
def test_fewer_requests_than_slots(count: int) -> None:
    with pytest.raises(UserError, match=rf"--num-requests {count} is less than --concurrency 4"):
        closed_loads([1, 4], count)


def test_open_loads_are_shares_of_the_capacity() -> None:
    low, high = open_loads([0.9, 0.5], 20.0, None)
    assert (low.name, low.kind, low.share, low.request_rate) == ("open 0.5", "open", 0.5, 10.0)
    assert (high.name, high.request_rate, high.num_requests) == ("open 0.9", 18.0, 200)
    assert open_loads([0.5], 20.0, 7)[0].num_requests == 7


@pytest.mark.parametrize("shares", [[0.0], [1.0], [-0.1], [30.0], [0.5, 0.5], [float("nan")]])
def test_rates_that_mean_nothing(shares: list[float]) -> None:
    with pytest.raises(UserError, match=r"--rate .*different shares"):
        open_loads(shares, 10.0, None)


def test_arms_are_called_by_the_end_of_their_path() -> None:
    assert arm_names(["/a/pruned-25/", "b/pruned 50%"]) == ["pruned-25", "pruned_50_"]


@pytest.mark.parametrize("folders", [["a/x", "b/x"], ["a/dense"], ["a/x y", "a/x_y"]])
def test_arms_of_one_name_are_refused(folders: list[str]) -> None:
    with pytest.raises(UserError, match=r"two models are called .*rename one"):
        arm_names(folders)

"""Intervals over blocks: numbers worked out by hand, and coverage by simulation."""

import math
import warnings

import pytest

from trsp.bench.statistics import Interval, block_log_ratio, linear_fit, ratio_interval
from trsp.pruner.errors import UserError


def test_a_blocks_ratio_is_that_of_geometric_means() -> None:
    assert block_log_ratio([2.0, 8.0], [3.0, 12.0]) == pytest.approx(math.log(6 / 4))
    assert block_log_ratio([5.0], [5.0]) == 0.0


@pytest.mark.parametrize(
    ("dense", "pruned"),
    [([], []), ([1.0], [1.0, 1.0]), ([0.0], [1.0]), ([1.0], [-1.0]), ([1.0], [math.inf]),
     ([math.nan], [1.0])],
)  # fmt: skip
def test_a_block_that_has_no_ratio_is_refused(dense: list[float], pruned: list[float]) -> None:
    with pytest.raises(ValueError, match="a block has"):
        block_log_ratio(dense, pruned)


def test_drift_falls_out_of_a_palindrome() -> None:
    # Everything slows by 1 % a visit: A B B A sees it equally in both arms.
    speed = [0.99**visit for visit in range(4)]
    dense, pruned = [speed[0], speed[3]], [1.3 * speed[1], 1.3 * speed[2]]
    assert block_log_ratio(dense, pruned) == pytest.approx(math.log(1.3))


def test_the_interval_of_two_blocks_is_the_one_worked_out_by_hand() -> None:
    # Resampled means are a, (a + b) / 2, b with chances 1/4, 1/2, 1/4: the 95 % percentile
    # interval is [a, b]. The factor is t(1) / z * sqrt(2) = 12.7062 / 1.9600 * 1.4142.
    found = ratio_interval([0.0, 0.2])
    factor = 12.706205 / 1.959964 * math.sqrt(2)
    assert found.estimate == pytest.approx(math.exp(0.1))
    assert found.low == pytest.approx(math.exp(0.1 - factor * 0.1), rel=1e-5)
    assert found.high == pytest.approx(math.exp(0.1 + factor * 0.1), rel=1e-5)
    assert found.num_blocks == 2


def test_one_block_has_no_interval_and_equal_blocks_a_point() -> None:
    assert ratio_interval([math.log(2)]) == Interval(pytest.approx(2.0), None, None, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = ratio_interval([0.1] * 5)
    assert found.low == found.estimate == found.high == pytest.approx(math.exp(0.1))


def test_the_same_seed_gives_the_same_interval() -> None:
    blocks = [0.1013, 0.3072, 0.2131, 0.2517, 0.0544, 0.1729, 0.2298]
    assert ratio_interval(blocks, seed=3) == ratio_interval(blocks, seed=3)
    assert ratio_interval(blocks, seed=3) != ratio_interval(blocks, seed=4)
    wide, narrow = ratio_interval(blocks, confidence=0.99), ratio_interval(blocks, confidence=0.5)
    assert wide.low is not None
    assert narrow.low is not None
    assert wide.low < narrow.low < narrow.estimate


@pytest.mark.parametrize("blocks", [[], [0.1, math.nan], [math.inf]])
def test_blocks_without_a_mean_are_refused(blocks: list[float]) -> None:
    with pytest.raises(ValueError, match="at least one finite"):
        ratio_interval(blocks)


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95.0])
def test_a_confidence_is_a_share(confidence: float) -> None:
    with pytest.raises(ValueError, match="confidence"):
        ratio_interval([0.1, 0.2], confidence=confidence)


def test_five_blocks_cover_as_often_as_promised() -> None:
    """The plain percentile interval covers 0.84 here and would fail."""
    import numpy as np

    rng = np.random.default_rng(20)
    num_experiments = 500
    covered = 0
    for blocks in 0.25 + 0.03 * rng.standard_normal((num_experiments, 5)):
        found = ratio_interval(blocks.tolist())
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= math.exp(0.25) <= found.high
    # 0.945 in the long run; the error of 500 experiments is 0.010.
    assert 0.91 < covered / num_experiments < 0.975


def test_a_line_is_found_and_inverted() -> None:
    fit = linear_fit([32, 8, 16], [[34.0, 36.0], [10.0, 12.0], [18.0, 20.0]])
    assert (fit.intercept, fit.slope) == pytest.approx((3.0, 1.0))
    assert fit.layers == (8, 16, 32)
    assert fit.relative_residual == pytest.approx(0.0, abs=1e-12)
    found = fit.predict(24)
    assert found.estimate == pytest.approx(27.0)
    assert found.low is not None
    assert found.high is not None
    assert found.low < 26.0 < 28.0 < found.high
    assert fit.layers_for(27.0) == 24
    assert fit.layers_for(26.9) == 23
    assert fit.layers_for(4.0) == 1
    assert fit.layers_for(3.9) is None
    # Pruning removes layers: a target that the deepest meets asks for no more of them.
    assert fit.layers_for(100.0) == 32


def test_the_band_knows_that_depths_are_paired() -> None:
    """A block that is slow at all depths leaves the slope alone."""
    fit = linear_fit([8, 16], [[10.0, 13.0, 11.0], [18.0, 21.0, 19.0]])
    assert fit.block_slopes == pytest.approx((1.0, 1.0, 1.0))
    assert fit.block_intercepts == pytest.approx((2.0, 5.0, 3.0))
    assert fit.relative_residual is None


def test_what_a_line_misses_is_told() -> None:
    # Least squares through (1, 1), (2, 3), (3, 2): 1 + 0.5 x, misses -0.5, 1, -0.5, mean 2.
    fit = linear_fit([1, 2, 3], [[1.0], [3.0], [2.0]])
    assert (fit.intercept, fit.slope) == pytest.approx((1.0, 0.5))
    assert fit.relative_residual == pytest.approx(math.sqrt((0.25 + 1 + 0.25) / 3) / 2)
    assert fit.predict(2) == Interval(pytest.approx(2.0), None, None, 1)


def test_a_cost_that_falls_with_depth_gives_the_deepest_or_nothing() -> None:
    fit = linear_fit([8, 16], [[12.0], [10.0]])
    assert fit.layers_for(10.0) == 16
    assert fit.layers_for(9.0) is None


@pytest.mark.parametrize(
    ("layers", "costs", "reason"),
    [
        ([8, 8], [[1.0], [2.0]], "each once"),
        ([0, 8], [[1.0], [2.0]], "at least 1 layer"),
        ([8, 16], [[1.0]], "1 sequences"),
        ([8, 16], [[1.0], [2.0, 3.0]], "blocks"),
        ([8, 16], [[], []], "blocks"),
        ([8, 16], [[1.0], [0.0]], "positive"),
        ([8, 16], [[1.0], [math.nan]], "positive"),
    ],
)
def test_costs_that_are_no_experiment_are_refused(
    layers: list[int], costs: list[list[float]], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        linear_fit(layers, costs)


def test_one_depth_is_the_users_mistake() -> None:
    with pytest.raises(UserError, match="a line needs two"):
        linear_fit([8], [[1.0]])


def test_predictions_and_targets_are_checked() -> None:
    fit = linear_fit([8, 16], [[1.0], [2.0]])
    with pytest.raises(ValueError, match="at least 1"):
        fit.predict(0)
    with pytest.raises(ValueError, match="finite"):
        fit.layers_for(math.nan)

"""Fused and unfused training stay together for 50 steps; an op with a wrong gradient does not."""

from typing import Any

import pytest

from trsp.bench import fused_training
from trsp.bench.fused_training import ARMS, TOLERANCE, Shape, compare_arms, peak_bytes
from trsp.pruner import gated_model

SHAPE = Shape(
    num_layers=4, hidden_size=64, num_sequences=16, sequence_length=16, batch_size=4, steps=51,
    device="cpu", precision="fp32",
)  # fmt: skip
pytestmark = pytest.mark.usefixtures("one_thread")


def test_losses_stay_together_for_50_steps() -> None:
    record = compare_arms(SHAPE)
    assert all(len(record["losses"][arm]) == 50 for arm in ARMS)
    assert record["losses"]["eager"][-1] < record["losses"]["eager"][0] - 1
    assert 0 < max(record["largest_relative_difference"].values()) < TOLERANCE["fp32"]
    saved = record["saved_activation_bytes"]
    assert saved["gate + norm"] < saved["gate"]


def test_losses_part_where_a_gradient_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    fused = gated_model.gated_branch

    def with_half_the_penalty_s_gradient(*args: Any, **kwargs: Any) -> Any:
        z, diff_norm, x_norm = fused(*args, **kwargs)
        return z, (diff_norm + diff_norm.detach()) / 2, x_norm

    monkeypatch.setattr(gated_model, "gated_branch", with_half_the_penalty_s_gradient)
    monkeypatch.setattr(fused_training, "ARMS", ("eager", "gate"))
    differences = compare_arms(SHAPE)["largest_relative_difference"]
    assert differences["gate"] > TOLERANCE["fp32"]


def test_a_loss_that_is_not_a_number_is_no_agreement() -> None:
    nan = float("nan")
    losses = {"eager": [1.0, 1.0, 1.0], "gate": [1.0, nan, 1.0], "gate + norm": [1.0] * 3}
    differences = fused_training.largest_relative_difference(losses)  # type: ignore[arg-type]
    assert not differences["gate"] <= TOLERANCE["fp32"]
    assert differences["gate + norm"] == 0


def test_every_arm_s_peak_is_measured() -> None:
    """Linux tells it; elsewhere the table says unknown."""
    assert {type(peak_bytes(arm, SHAPE)) for arm in ARMS} <= {int, type(None)}

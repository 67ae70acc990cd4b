"""What a pruned checkpoint tells of deletion: a jump that was measured, or that none can be."""

import pytest

from trsp.pruner.model_card import deletion_words

TRANSFER = {
    "loss_dense": 3.0,
    "loss_before_deletion": 3.1,
    "loss_after_deletion": 3.25,
    "jump_at_deletion": 0.15,
    "residual_difference": {2: 0.03, 5: 0.125},
}


def test_a_jump_is_given_with_what_the_layers_still_did() -> None:
    words = deletion_words(TRANSFER)
    assert "3.1000 before deletion, 3.2500 after (+0.1500)" in words
    assert "by up to 0.12 of its norm" in words


@pytest.mark.parametrize("loss", [3.1, 3.25])
def test_closed_layers_are_not_said_to_have_been_measured_before(loss: float) -> None:
    closed = {**TRANSFER, "loss_before_deletion": loss, "residual_difference": {2: 0.0, 5: 0.0}}
    words = deletion_words(closed)
    assert "before deletion" not in words
    assert "3.2500 without the layers" in words
    assert words.endswith("so deletion changes nothing")

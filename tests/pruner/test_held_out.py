"""The held-out slice: split by seed, measured sequence by sequence, compared in pairs."""

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from trsp.pruner.calibration import CalibrationSet
from trsp.pruner.errors import UserError
from trsp.pruner.gated_model import GatedModel
from trsp.pruner.held_out import HeldOutLoss, held_out_loss, hold_out
from trsp.pruner.token_ids import hash_ids

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_loss_is_that_of_the_masked_model_sequence_by_sequence(
    model: PreTrainedModel, tokens: Tensor
) -> None:
    with GatedModel(model) as gated:
        loss = held_out_loss(gated, tokens, (1, 3), batch_size=3)
        assert loss.mean == pytest.approx(gated.masked_loss(tokens, (1, 3), 8), rel=1e-5)
        alone = gated.masked_loss(tokens[5:6], (1, 3), 1)
        assert loss.each[5] == pytest.approx(alone, rel=1e-5)


def test_differences_are_taken_in_pairs() -> None:
    hard_and_easy = HeldOutLoss((1.0, 5.0, 9.0))
    above, error = HeldOutLoss((1.1, 5.1, 9.1)).above(hard_and_easy)
    assert above == pytest.approx(0.1)
    assert error == pytest.approx(0, abs=1e-12)
    above, error = HeldOutLoss((1.0, 5.0, 9.3)).above(hard_and_easy)
    assert (above, error) == (pytest.approx(0.1), pytest.approx(0.1))


def test_the_split_is_by_seed_and_whole() -> None:
    ids = torch.arange(40 * 8).reshape(40, 8)
    whole_set = CalibrationSet(ids, ("text",), hash_ids(ids), 0, False)
    split = hold_out(whole_set, 0.125, seed=1)
    assert (len(split.held_out), len(split.training.input_ids)) == (5, 35)
    both = torch.cat([split.held_out, split.training.input_ids])
    assert sorted(both[:, 0].tolist()) == ids[:, 0].tolist()
    assert torch.equal(hold_out(whole_set, 0.125, seed=1).held_out, split.held_out)
    assert not torch.equal(hold_out(whole_set, 0.125, seed=2).held_out, split.held_out)
    assert len(hold_out(whole_set, 0.01, seed=1).held_out) == 4
    with pytest.raises(UserError, match=r"calibration\.num_sequences"):
        hold_out(CalibrationSet(ids[:7], (), "", 0, False), 0.125, seed=1)

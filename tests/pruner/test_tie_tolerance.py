"""A choice is a tie within the rounding of two ways to compute it, wider for recurrent layers."""

import torch
from transformers import LlamaConfig

from trsp.pruner.probes import Probe, agreement, tie_tolerance


def chosen(margin: float, tolerance: float) -> tuple[int, str | None]:
    """Token 1 was chosen; of the other model's logits token 0's is higher by `margin`."""
    logits = torch.tensor([[[1.0, 1.0 - margin, 0.0]]])
    probe = Probe("random", torch.zeros(1, 3, dtype=torch.long), 2)
    found = agreement([probe], [torch.tensor([[1]])], [logits], tolerance)
    return found.num_ties, found.first_mismatch


def test_a_difference_within_the_tolerance_is_a_tie() -> None:
    assert chosen(2e-5, 1e-3) == (1, None)
    num_ties, mismatch = chosen(2e-5, 1e-5)
    assert num_ties == 0
    assert mismatch is not None


def test_recurrent_layers_have_a_wider_one() -> None:
    config = LlamaConfig(num_hidden_layers=2)
    assert tie_tolerance(config) == 1e-5
    config.layer_types = ["full_attention", "linear_attention"]
    assert tie_tolerance(config) == 1e-3

"""Operations are counted as they run: products, attention, both directions, skipped layers not."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from trsp.bench.compute_meter import ComputeMeter
from trsp.pruner.gated_model import GatedModel


def counted(model: PreTrainedModel, tokens: Tensor, removed: tuple[int, ...] = ()) -> int:
    with ComputeMeter("cpu") as meter, torch.no_grad(), GatedModel(model) as gated:
        before = meter.flops
        with gated.masking(removed):
            gated.logits(tokens)
        return meter.flops - before


def test_a_product_is_two_operations_a_multiply_add() -> None:
    x, layer = torch.randn(3, 5), nn.Linear(5, 7, bias=False)
    x.requires_grad_(True)
    with ComputeMeter("cpu") as meter:
        layer(x).sum().backward()
    assert meter.spent().flops == 3 * (2 * 3 * 5 * 7)
    assert meter.spent().seconds > 0


def test_attention_on_the_cpu_is_counted_in_both_directions() -> None:
    batch, heads, length, width = 2, 3, 16, 8
    q, k, v = (torch.randn(batch, heads, length, width, requires_grad=True) for _ in range(3))
    product = 2 * batch * heads * length * length * width
    with ComputeMeter("cpu") as meter:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        assert meter.flops == 2 * product
        out.sum().backward()
    # Scores once more, and one product for each of dv, dp, dq and dk.
    assert meter.flops == 7 * product


def test_a_skipped_layer_costs_nothing(model: PreTrainedModel, tokens: Tensor) -> None:
    whole, less, least = (
        counted(model, tokens, removed) for removed in ((), (2,), tuple(range(6)))
    )
    head = 2 * tokens.numel() * model.config.hidden_size * model.config.vocab_size
    assert least == head
    assert whole - less == (whole - least) / 6

"""`fuse_norms` reaches the ops of both stages and changes nothing but the way of computing."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trsp.pruner import gated_model
from trsp.pruner.families import decoder_layers
from trsp.pruner.gated_model import GatedModel
from trsp.pruner.next_norms import find_next_norms
from trsp.pruner.recipe import FuseNorms, SelectionRecipe, TransferRecipe
from trsp.pruner.selection import select_layers
from trsp.pruner.transfer import transfer


@pytest.fixture
def fused_calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The weights of the norms that were computed with a gate, call by call."""
    calls: list[Any] = []
    fused = gated_model.gated_branch_rmsnorm

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args[4])
        return fused(*args, **kwargs)

    monkeypatch.setattr(gated_model, "gated_branch_rmsnorm", counted)
    return calls


def test_selection(model: PreTrainedModel, tokens: Tensor, fused_calls: list[Any]) -> None:
    rounds = []
    settings: tuple[FuseNorms, ...] = ("auto", "off", "on")
    for fuse_norms in settings:
        assert not fused_calls
        recipe = SelectionRecipe(
            method="gates", first_round_steps=6, batch_size=4, fuse_norms=fuse_norms
        )
        state = select_layers(
            model, tokens, recipe, num_to_remove=1, protected=frozenset({0}), seed=0
        )
        rounds.append(state.rounds[0])
    assert len(fused_calls) == 6 * 5
    assert rounds[0] == rounds[1], "auto does not fuse on a CPU"
    assert rounds[2]["picked"] == rounds[1]["picked"]
    assert rounds[2]["losses"] == pytest.approx(rounds[1]["losses"], rel=1e-6)
    assert rounds[2]["gates"][1:] == pytest.approx(rounds[1]["gates"][1:], rel=1e-4)


def test_transfer(model: PreTrainedModel, tokens: Tensor, fused_calls: list[Any]) -> None:
    results = []
    settings: tuple[FuseNorms, ...] = ("auto", "off", "on")
    for fuse_norms in settings:
        assert not fused_calls
        recipe = TransferRecipe(
            steps=6, batch_size=4, closing="linear", closing_fraction=1, fuse_norms=fuse_norms
        )
        own = copy.deepcopy(model)
        results.append(transfer(own, tokens, recipe, dropped=(2, 4), seed=3))
    # Five steps of two gated layers; in the sixth they are closed. Two measurements follow.
    assert len(fused_calls) >= 5 * 2
    assert results[0] == results[1], "auto does not fuse on a CPU"
    for one, other in zip(results[1].steps, results[2].steps, strict=True):
        assert other == pytest.approx(one, rel=1e-4)


def test_fusing_with_checkpointing_is_refused() -> None:
    with pytest.raises(ValueError, match="excludes checkpoint_activations"):
        TransferRecipe(fuse_norms="on", checkpoint_activations=True)


class CalledByKeyword(nn.Module):
    """A caller of a decoder layer's norm that names its arguments."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, hidden_states: Tensor) -> Tensor:
        normed: Tensor = self.norm(hidden_states=hidden_states)
        return normed


class CalledWithAScale(CalledByKeyword):
    """Another call of it: the same module and tensor, and something else to compute."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__(norm)
        plain = norm.forward
        self.norm.forward = lambda hidden_states, scale=1.0: plain(hidden_states) * scale

    def forward(self, hidden_states: Tensor) -> Tensor:
        normed: Tensor = self.norm(hidden_states, scale=2.0)
        return normed


@pytest.mark.parametrize("caller", [CalledByKeyword, CalledWithAScale])
def test_a_norm_called_with_keywords_is_left_alone(
    model: PreTrainedModel, tokens: Tensor, caller: Any, fused_calls: list[Any]
) -> None:
    layers: Any = decoder_layers(model)
    own = layers[2].input_layernorm
    layers[2].input_layernorm = caller(own)
    found = find_next_norms(model)
    assert [index for index, norm in enumerate(found) if norm is None] == [2]
    dense = model(input_ids=tokens, use_cache=False).logits
    with GatedModel(model, fuse_norms="on") as gated:
        gated.gated, gated.gates = frozenset({0, 1}), torch.ones(len(layers))
        torch.testing.assert_close(gated.logits(tokens), dense)
    # Layer 0 with the norm of layer 1; layer 1 without that of layer 2.
    assert [weight is own.weight for weight in fused_calls] == [False]

"""Joint gates find planted layers, close exactly the budget, and leave the model as it was."""

import copy

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from trsp.bench import baseline_joint
from trsp.bench.baseline_joint import _straight_through, joint_gates
from trsp.pruner.errors import RunError, UserError
from trsp.pruner.gated_model import GatedModel

IDLE = {2, 4}


@pytest.fixture
def llama() -> PreTrainedModel:
    """Six layers of which two do nothing; the head makes every other one count."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for index, layer in enumerate(model.model.layers):
            scale = 0.0 if index in IDLE else 20.0
            layer.self_attn.o_proj.weight.mul_(scale)
            layer.mlp.down_proj.weight.mul_(scale)
        model.lm_head.weight.mul_(20)
    return model


@pytest.fixture
def tokens(llama: PreTrainedModel) -> Tensor:
    """Text that the model itself finds likely, so that a layer that goes is missed."""
    ids = torch.randint(0, 64, (8, 1), generator=torch.Generator().manual_seed(1))
    return llama.generate(ids, max_new_tokens=23, do_sample=False, pad_token_id=0)  # type: ignore[no-any-return, operator]


def test_idle_layers_are_found(llama: PreTrainedModel, tokens: Tensor) -> None:
    with GatedModel(llama) as gated:
        assert set(joint_gates(gated, tokens, num_to_remove=2, seed=0)) == IDLE


def test_a_gate_is_closed_or_open_and_its_gradient_is_a_sigmoids() -> None:
    scores = torch.tensor([0.3, -1.0, 2.0, 0.1], requires_grad=True)
    gates = _straight_through(scores, 2)
    torch.testing.assert_close(gates.detach(), torch.tensor([1.0, 0.0, 1.0, 0.0]))
    gates.sum().backward()  # type: ignore[no-untyped-call]
    soft = torch.sigmoid((scores.detach() - 0.2) / baseline_joint.TEMPERATURE)
    assert scores.grad is not None
    torch.testing.assert_close(scores.grad, soft * (1 - soft) / baseline_joint.TEMPERATURE)


def test_the_model_is_left_as_it_was(llama: PreTrainedModel, tokens: Tensor) -> None:
    before = copy.deepcopy(llama.state_dict())
    frozen = next(llama.parameters())
    frozen.requires_grad_(False)
    with GatedModel(llama) as gated:
        first = joint_gates(gated, tokens, num_to_remove=3, seed=0)
        assert gated.gates is None
        assert joint_gates(gated, tokens, num_to_remove=3, seed=0) == first
    assert all(value.equal(before[name]) for name, value in llama.state_dict().items())
    assert not frozen.requires_grad
    assert all(p.grad is None for p in llama.parameters())
    assert all(p.requires_grad for p in llama.parameters() if p is not frozen)


def test_what_cannot_be_is_refused(llama: PreTrainedModel, tokens: Tensor) -> None:
    with GatedModel(llama) as gated:
        with pytest.raises(UserError, match="expected 1 to 5"):
            joint_gates(gated, tokens, num_to_remove=6, seed=0)
        with torch.no_grad():
            llama.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
        with pytest.raises(RunError, match="joint gates"):
            joint_gates(gated, tokens, num_to_remove=2, seed=0)

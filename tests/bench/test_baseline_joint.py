"""Joint gates find planted layers, close exactly the budget, and leave the model as it was."""

import copy

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from trsp.bench.baseline_joint import _straight_through, joint_gates, soft_gates
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


def test_what_must_stay_stays(llama: PreTrainedModel, tokens: Tensor) -> None:
    with GatedModel(llama) as gated:
        found = joint_gates(gated, tokens, num_to_remove=2, seed=0, never={2})
        assert 4 in found
        assert 2 not in found
        assert joint_gates(gated, tokens, num_to_remove=2, seed=0, never={0, 1, 2, 3}) == (4, 5)
        with pytest.raises(UserError, match="3 layers are to go, 2 are not protected"):
            joint_gates(gated, tokens, num_to_remove=3, seed=0, never={0, 1, 2, 3})


def test_a_gate_is_closed_or_open_and_its_gradient_is_the_soft_gates() -> None:
    scores = torch.tensor([0.3, -1.0, 2.0, 0.1], requires_grad=True)
    worth = torch.tensor([1.0, 2.0, 4.0, 8.0])
    gates = _straight_through(scores, 2)
    assert gates.tolist() == [1, 0, 1, 0]
    (gates @ worth).backward()  # type: ignore[no-untyped-call]
    soft = scores.detach().requires_grad_()
    (soft_gates(soft, 2) @ worth).backward()  # type: ignore[no-untyped-call]
    assert scores.grad is not None
    torch.testing.assert_close(scores.grad, soft.grad)
    assert scores.grad.abs().max() > 0.1
    # The number of open gates does not depend on the scores: one opens as another closes.
    torch.testing.assert_close(scores.grad.sum(), torch.tensor(0.0), atol=1e-6, rtol=0)


def test_soft_gates_keep_the_budget_and_their_threshold_follows() -> None:
    scores = torch.tensor([0.4, -1.2, 2.0, 0.1, -0.3], dtype=torch.float64, requires_grad=True)
    soft = soft_gates(scores, 2)
    torch.testing.assert_close(soft.sum(), torch.tensor(3.0, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda given: soft_gates(given, 2), (scores,))


def test_soft_gates_are_gates_where_scores_are_apart() -> None:
    apart = soft_gates(torch.tensor([0.0, 40.0, -30.0, 80.0, 20.0]), 2)
    torch.testing.assert_close(apart, torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0]), atol=1e-4, rtol=0)
    torch.testing.assert_close(soft_gates(torch.zeros(5), 2), torch.full((5,), 0.6))


def test_an_open_layer_far_away_still_hears_of_the_others() -> None:
    """In float32 the gates would sum to the budget for a whole range of thresholds."""
    scores = torch.tensor([0.0, 40.0, -1.0, 41.0], requires_grad=True)
    soft_gates(scores, 2)[1].backward()  # type: ignore[no-untyped-call]
    assert scores.grad is not None
    assert 1e-10 < scores.grad[1] < 1e-7
    torch.testing.assert_close(-scores.grad[0] - scores.grad[2:].sum(), scores.grad[1])


def test_the_model_is_left_as_it_was(llama: PreTrainedModel, tokens: Tensor) -> None:
    before = copy.deepcopy(llama.state_dict())
    frozen = next(llama.parameters())
    frozen.requires_grad_(False)
    with GatedModel(llama) as gated:
        first = joint_gates(gated, tokens, num_to_remove=3, seed=0)
        assert gated.gates is None
        assert gated.gated == frozenset()
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

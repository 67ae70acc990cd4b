"""The refit solves its least-squares problem, changes nothing else, and says where it cannot."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)

from trsp.pruner.activations import residual_stream, watching
from trsp.pruner.gated_model import GatedModel
from trsp.pruner.recipe import TransferRecipe
from trsp.pruner.refit import refit, runs_of
from trsp.pruner.transfer import TransferState, closing_gates, transfer

DROPPED = (4, 2, 3)


def refitted(
    model: PreTrainedModel, tokens: Tensor, dropped: tuple[int, ...], **settings: Any
) -> Any:
    settings = {"ridge": 0.01, "relaxation": 1.0, "batch_size": 2, **settings}
    with GatedModel(model) as gated:
        return refit(gated, tokens, dropped, **settings)


def test_runs_of_neighbours() -> None:
    assert runs_of((7, 2, 4, 3, 9, 8)) == ((2, 4), (7, 9))
    assert runs_of((5,)) == ((5, 5),)


def test_the_projection_is_the_least_squares_solution(
    model: PreTrainedModel, tokens: Tensor
) -> None:
    """Against numpy's solver on the augmented system, built from the definition."""
    dense = copy.deepcopy(model)
    projection = dense.model.layers[1].mlp.down_proj
    with GatedModel(dense) as gated, watching([projection]) as seen:
        stream = residual_stream(gated, tokens)
    inputs = seen.inputs[projection].flatten(0, 1).double()
    update = (stream[5] - stream[2]).flatten(0, 1).double()
    damping = 0.01 * float(inputs.square().sum(0).mean())
    rows = torch.cat([inputs, damping**0.5 * torch.eye(inputs.shape[1], dtype=torch.float64)])
    zeros = torch.zeros(inputs.shape[1], update.shape[1], dtype=torch.float64)
    change = torch.linalg.lstsq(rows, torch.cat([update, zeros])).solution

    (found,) = refitted(model, tokens, DROPPED)
    moved = model.model.layers[1].mlp.down_proj.weight - projection.weight
    torch.testing.assert_close(moved.double(), change.T, atol=1e-4, rtol=1e-3)
    left = (update - inputs @ change).square().sum() / update.square().sum()
    assert (found.first, found.last) == (2, 4)
    assert found.explained == pytest.approx(1 - float(left.detach()), abs=1e-4)


def test_a_relaxed_change_is_a_part_of_the_whole_and_counted_as_such(
    model: PreTrainedModel, tokens: Tensor
) -> None:
    dense, whole = copy.deepcopy(model), copy.deepcopy(model)
    refitted(whole, tokens, DROPPED)
    (found,) = refitted(model, tokens, DROPPED, relaxation=0.25)
    start, all_of_it, part = (m.model.layers[1].mlp.down_proj.weight for m in (dense, whole, model))
    torch.testing.assert_close(part - start, 0.25 * (all_of_it - start))

    with GatedModel(dense) as gated, watching([dense.model.layers[1].mlp.down_proj]) as seen:
        stream = residual_stream(gated, tokens)
    inputs = seen.inputs[dense.model.layers[1].mlp.down_proj]
    update = stream[5] - stream[2]
    left = (update - inputs @ (part - start).T).square().sum() / update.square().sum()
    assert found.explained == pytest.approx(1 - float(left.detach()), abs=1e-4)


def test_only_the_projections_before_the_runs_change(
    model: PreTrainedModel, tokens: Tensor
) -> None:
    before = copy.deepcopy(model.state_dict())
    refitted(model, tokens, (2, 4))
    changed = {name for name, value in model.state_dict().items() if not value.equal(before[name])}
    assert changed == {f"model.layers.{layer}.mlp.down_proj.weight" for layer in (1, 3)}


def test_removal_costs_less_after_it(model: PreTrainedModel, tokens: Tensor) -> None:
    """Of the difference to the dense model's last hidden states."""

    def distance() -> float:
        with GatedModel(model) as gated, gated.masking(DROPPED), torch.no_grad():
            hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state
        return float((hidden - dense).norm() / dense.norm())

    with torch.no_grad():
        dense = model.model(input_ids=tokens, use_cache=False).last_hidden_state
    raw = distance()
    refitted(model, tokens, DROPPED, ridge=1e-4)
    assert distance() < 0.9 * raw


def test_work_that_is_linear_in_the_mlp_is_taken_over_whole(
    model: PreTrainedModel, tokens: Tensor
) -> None:
    """Layer 2 repeats layer 1's MLP output: the projection doubles, and nothing is lost."""
    first, second = model.model.layers[1], model.model.layers[2]

    def repeat(_module: object, _args: object, _output: object) -> Tensor:
        return seen.outputs[first.mlp]  # type: ignore[no-any-return]

    with torch.no_grad():
        second.self_attn.o_proj.weight.zero_()
    weight = first.mlp.down_proj.weight.detach().clone()
    with GatedModel(model) as gated, watching([first.mlp]) as seen:
        handle = second.mlp.register_forward_hook(repeat)
        (found,) = refit(gated, tokens, (2,), ridge=0.0, relaxation=1.0, batch_size=4)
        handle.remove()
    assert found.explained == pytest.approx(1.0, abs=1e-5)
    torch.testing.assert_close(first.mlp.down_proj.weight, 2 * weight, atol=1e-3, rtol=1e-3)


def test_a_bias_is_fitted_with_the_weight() -> None:
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=64, hidden_size=16, ffn_dim=32, num_hidden_layers=4, num_attention_heads=2,
        max_position_embeddings=32, word_embed_proj_dim=16, do_layer_norm_before=True,
    )  # fmt: skip
    model = OPTForCausalLM(config).eval()
    tokens = torch.randint(4, 64, (4, 16))
    fc2 = model.model.decoder.layers[1].fc2
    before = fc2.bias.detach().clone()
    with GatedModel(model) as gated:
        (found,) = refit(gated, tokens, (2,), ridge=0.01, relaxation=1.0, batch_size=2)
    assert found.explained is not None
    assert not fc2.bias.equal(before)


def test_gpt2_whose_projections_are_transposed_is_fitted() -> None:
    """Conv1D keeps [in, out]: against numpy's solver, weight and bias, and nothing else moves."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_embd=16, n_layer=4, n_head=2, n_positions=32)
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.transformer.h.named_parameters():
            if "ln_" not in name:
                parameter.copy_(torch.randn_like(parameter) * 0.5)
    tokens = torch.randint(0, 64, (8, 32))
    dense = copy.deepcopy(model)
    projection = dense.transformer.h[0].mlp.c_proj
    with GatedModel(dense) as gated, watching([projection]) as seen:
        stream = residual_stream(gated, tokens)
    inputs = seen.inputs[projection].flatten(0, 1).double()
    inputs = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], dim=-1)
    update = (stream[3] - stream[1]).flatten(0, 1).double()
    damping = 0.01 * float(inputs.square().sum(0).mean())
    rows = torch.cat([inputs, damping**0.5 * torch.eye(inputs.shape[1], dtype=torch.float64)])
    zeros = torch.zeros(inputs.shape[1], update.shape[1], dtype=torch.float64)
    change = torch.linalg.lstsq(rows, torch.cat([update, zeros])).solution

    (found,) = refitted(model, tokens, (1, 2))
    fitted = model.transformer.h[0].mlp.c_proj
    moved = torch.cat([fitted.weight - projection.weight, (fitted.bias - projection.bias)[None]])
    torch.testing.assert_close(moved.double(), change, atol=1e-4, rtol=1e-3)
    left = (update - inputs @ change).square().sum() / update.square().sum()
    assert (found.first, found.last, found.reason) == (1, 2, None)
    assert found.explained == pytest.approx(1 - float(left.detach()), abs=1e-4)
    before = dense.state_dict()
    changed = {name for name, value in model.state_dict().items() if not value.equal(before[name])}
    assert changed == {f"transformer.h.0.mlp.c_proj.{part}" for part in ("weight", "bias")}


def test_a_run_at_the_first_layer_is_left_and_said(model: PreTrainedModel, tokens: Tensor) -> None:
    before = copy.deepcopy(model.state_dict())
    first, other = refitted(model, tokens, (0, 1, 4))
    assert (first.first, first.last, first.explained) == (0, 1, None)
    assert first.reason == "no layer stands before it"
    assert other.explained is not None
    changed = {name for name, value in model.state_dict().items() if not value.equal(before[name])}
    assert changed == {"model.layers.3.mlp.down_proj.weight"}


def test_an_mlp_without_a_last_projection_is_left_and_said(
    model: PreTrainedModel, tokens: Tensor
) -> None:
    mlp = model.model.layers[1].mlp
    handle = mlp.register_forward_hook(lambda _m, _a, output: output * 2)
    (found,) = refitted(model, tokens, (2,))
    handle.remove()
    assert found.explained is None
    assert found.reason == "layer 1's MLP does not end in a linear layer"


def test_batches_and_their_order_do_not_matter(model: PreTrainedModel, tokens: Tensor) -> None:
    other = copy.deepcopy(model)
    refitted(model, tokens, DROPPED, batch_size=1)
    refitted(other, tokens.flip(0), DROPPED, batch_size=4)
    ours, theirs = (m.model.layers[1].mlp.down_proj.weight for m in (model, other))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)


def test_transfer_begins_with_it_and_says_so(model: PreTrainedModel, tokens: Tensor) -> None:
    alone = copy.deepcopy(model)
    refitted(alone, tokens, DROPPED, batch_size=1, relaxation=0.75)
    recipe = TransferRecipe(steps=0, batch_size=4, closing="refit")
    result = transfer(model, tokens, recipe, dropped=DROPPED, seed=0)
    assert all(value.equal(alone.state_dict()[name]) for name, value in model.state_dict().items())
    assert result.steps == ()
    assert result.loss_before_deletion == result.loss_after_deletion
    (entry,) = result.to_document()["refits"]
    assert (entry["first"], entry["last"], entry["reason"]) == (2, 4, None)


@pytest.mark.parametrize(
    ("settings", "relaxation"),
    [({"steps": 1}, 0.5), ({"steps": 1, "relaxation": 0.9}, 0.9), ({"relaxation": 1.0}, 1.0)],
)
def test_how_far_it_goes_depends_on_what_is_trained_behind_it(
    model: PreTrainedModel, tokens: Tensor, settings: dict[str, Any], relaxation: float
) -> None:
    alone = copy.deepcopy(model)
    refitted(alone, tokens, DROPPED, batch_size=1, relaxation=relaxation)
    # A rate at which no fp32 weight moves.
    recipe = TransferRecipe.model_validate(
        {"closing": "refit", "steps": 0, "learning_rate": 1e-30, **settings}
    )
    transfer(model, tokens, recipe, dropped=DROPPED, seed=0)
    assert all(value.equal(alone.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("relaxation", [0.0, 1.5])
def test_a_relaxation_out_of_range_is_refused(relaxation: float) -> None:
    with pytest.raises(ValueError, match="relaxation"):
        TransferRecipe(relaxation=relaxation)


def test_the_teacher_is_the_model_before_it(model: PreTrainedModel, tokens: Tensor) -> None:
    """With nothing dropped worth learning, the first loss is the distance to the dense model."""
    with GatedModel(model) as gated, torch.no_grad():
        dense = gated.logits(tokens).log_softmax(-1)
    result = transfer(
        model, tokens, TransferRecipe(
            steps=1, batch_size=len(tokens), learning_rate=1e-30, closing="refit"
        ),
        dropped=DROPPED, seed=0,
    )  # fmt: skip
    with GatedModel(model) as gated, torch.no_grad(), gated.masking(DROPPED):
        student = gated.logits(tokens).log_softmax(-1)
    kl = (dense.exp() * (dense - student)).sum(-1).mean()
    assert result.steps[0]["distill_loss"] == pytest.approx(float(kl), rel=1e-4)


@pytest.mark.parametrize("lora", [None, {"rank": 2, "alpha": 4}])
def test_a_resumed_transfer_ends_where_an_unbroken_one_does(
    model: PreTrainedModel, tokens: Tensor, lora: dict[str, int] | None
) -> None:
    recipe = TransferRecipe(steps=4, batch_size=4, lora=lora)
    unbroken, resumed = copy.deepcopy(model), copy.deepcopy(model)
    states: list[TransferState] = []

    def keep(step: int, snapshot: Any) -> None:
        if step == 2:
            states.append(copy.deepcopy(snapshot()))

    torch.manual_seed(1)
    transfer(unbroken, tokens, recipe, dropped=DROPPED, seed=0, on_step=keep)
    torch.manual_seed(1)
    transfer(resumed, tokens, recipe, dropped=DROPPED, seed=0, state=states[0])
    for name, value in unbroken.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, atol=0, rtol=0)


def test_no_steps_need_a_refit() -> None:
    with pytest.raises(ValueError, match="no steps with closing 'linear' do nothing"):
        TransferRecipe(steps=0, closing="linear")


@pytest.mark.parametrize("closing", ["linear", "progressive"])
def test_gates_need_two_steps_to_close(closing: str) -> None:
    with pytest.raises(ValueError, match="leaves the layers open"):
        TransferRecipe.model_validate({"steps": 1, "closing": closing})
    assert closing_gates(
        TransferRecipe.model_validate({"steps": 2, "closing": closing}), 1, (3, 1)
    ) == {3: 0.0, 1: 0.0}


def test_the_ridge_may_not_be_negative() -> None:
    with pytest.raises(ValueError, match="ridge"):
        TransferRecipe(ridge=-1.0)


def test_llama_with_bias_in_the_mlp(tokens: Tensor) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=int(tokens.max()) + 1, hidden_size=16, intermediate_size=32, mlp_bias=True,
        num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    constant = 3.0
    with torch.no_grad():
        for parameter in model.model.layers[2].parameters():
            parameter.zero_()
        model.model.layers[2].mlp.down_proj.bias.fill_(constant)
    (found,) = refitted(model, tokens, (2,), ridge=1e-9)
    assert found.explained == pytest.approx(1.0, abs=1e-4)

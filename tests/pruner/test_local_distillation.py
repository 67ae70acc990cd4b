"""The layer before a run learns the run's work from the dense model, or keeps its weights."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from trsp.pruner.activations import residual_stream
from trsp.pruner.errors import RunError
from trsp.pruner.gated_model import GatedModel
from trsp.pruner.local_distillation import RETRY_FACTOR, _Student, local_distillation
from trsp.pruner.recipe import TransferRecipe
from trsp.pruner.refit import Refit
from trsp.pruner.sampling import batch_indices
from trsp.pruner.transfer import local_learning_rate, transfer

DROPPED = (4, 2, 3)
RATE = 3e-3


def distilled(
    model: PreTrainedModel, tokens: Tensor, dropped: tuple[int, ...], **settings: Any
) -> Any:
    words: dict[str, Any] = {
        "steps": 24, "batch_size": 4, "micro_batch_size": 4, "rate": lambda step: RATE,
        "weight_decay": 0.0, "seed": 0,
    }  # fmt: skip
    with GatedModel(model) as gated:
        return local_distillation(gated, tokens, dropped, **{**words, **settings})


def stream_of(model: PreTrainedModel, tokens: Tensor) -> list[Tensor]:
    with GatedModel(model) as gated:
        return residual_stream(gated, tokens)


@pytest.mark.parametrize("micro", [4, 1])
def test_a_step_is_adamw_on_the_relative_error_of_that_layer(
    model: PreTrainedModel, tokens: Tensor, micro: int
) -> None:
    """Against a plain loop, written from the definition, over the layer's own parameters.

    Micro-batches are averaged, each with its own relative error.
    """
    dense, student = copy.deepcopy(model), copy.deepcopy(model)
    layer = student.model.layers[1]
    made: list[Tensor] = []
    layer.register_forward_hook(lambda _m, _a, output: made.append(output))
    optimizer = torch.optim.AdamW(layer.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(3):
        batch = tokens[batch_indices(step, num_sequences=len(tokens), batch_size=4, seed=7)]
        optimizer.zero_grad()
        for part in batch.split(micro):
            stream = stream_of(dense, part)
            student(input_ids=part, use_cache=False)
            update = stream[5] - stream[1]
            loss = (made.pop() - stream[5]).square().sum() / update.square().sum()
            (loss * len(part) / len(batch)).backward()
        optimizer.step()
    distilled(model, tokens, DROPPED, steps=3, seed=7, weight_decay=0.1, micro_batch_size=micro)
    for name, value in model.model.layers[1].named_parameters():
        torch.testing.assert_close(value, layer.get_parameter(name), rtol=1e-4, atol=1e-6)


def test_only_the_layers_before_the_runs_change(model: PreTrainedModel, tokens: Tensor) -> None:
    before = copy.deepcopy(model.state_dict())
    distilled(model, tokens, (2, 4))
    changed = {name for name, value in model.state_dict().items() if not value.equal(before[name])}
    assert {name.split(".")[2] for name in changed} == {"1", "3"}
    assert all(value.grad is None for value in model.parameters())


def test_what_is_explained_is_what_the_layer_gives_of_the_run(
    model: PreTrainedModel, tokens: Tensor
) -> None:
    """One step sees all sequences, so the last steps' figure is that of all tokens."""
    dense = copy.deepcopy(model)
    (found,) = distilled(
        model, tokens, DROPPED, steps=40, batch_size=len(tokens), micro_batch_size=len(tokens),
        rate=lambda step: RATE if step < 32 else 0.0,
    )  # fmt: skip
    stream = stream_of(dense, tokens)
    left = (stream_of(model, tokens)[2] - stream[5]).square().sum()
    whole = (stream[2] - stream[5]).square().sum()
    assert (found.first, found.last, found.reason) == (2, 4, None)
    assert found.explained == pytest.approx(1 - float(left / whole), abs=1e-4)
    assert found.explained > 0.3


def test_a_run_at_the_first_layer_is_left_and_said(model: PreTrainedModel, tokens: Tensor) -> None:
    before = copy.deepcopy(model.state_dict())
    first, other = distilled(model, tokens, (0, 1, 4))
    assert (first.first, first.last, first.explained) == (0, 1, None)
    assert first.reason == "no layer stands before it"
    assert other.explained is not None
    changed = {name for name, value in model.state_dict().items() if not value.equal(before[name])}
    assert {name.split(".")[2] for name in changed} == {"3"}


def test_a_layer_that_does_not_learn_keeps_its_weights_and_says_so(
    model: PreTrainedModel, tokens: Tensor
) -> None:
    before = copy.deepcopy(model.state_dict())
    (found,) = distilled(model, tokens, (2,), rate=lambda step: 3.0)
    assert found.explained is None
    assert found.reason is not None
    assert "layer 1 came no closer" in found.reason
    assert "transfer.local_learning_rate" in found.reason
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


def test_a_rate_that_is_too_high_is_tried_again_at_a_quarter(
    model: PreTrainedModel, tokens: Tensor
) -> None:
    """Only by the layer that needs it, and from the dense model still."""
    both, alone = copy.deepcopy(model), copy.deepcopy(model)
    with pytest.MonkeyPatch.context() as patch:
        judged = _Student.judged
        seen: list[int] = []

        def fails_once(student: _Student) -> Refit:
            seen.append(student.first)
            if seen == [2, 4]:
                return Refit(student.first, student.last, None, "not yet")
            return judged(student)

        patch.setattr(_Student, "judged", fails_once)
        found = distilled(model, tokens, (2, 4))
    assert seen == [2, 4, 4]
    assert all(entry.explained is not None for entry in found)
    distilled(both, tokens, (2, 4))
    distilled(alone, tokens, (4,), rate=lambda step: RETRY_FACTOR * RATE)
    for layer, other in ((1, both), (3, alone)):
        for name, value in model.model.layers[layer].named_parameters():
            torch.testing.assert_close(value, other.model.layers[layer].get_parameter(name))


def test_layers_that_do_nothing_are_taken_over_whole(
    model: PreTrainedModel, tokens: Tensor
) -> None:
    with torch.no_grad():
        model.model.layers[2].self_attn.o_proj.weight.zero_()
        model.model.layers[2].mlp.down_proj.weight.zero_()
    before = copy.deepcopy(model.state_dict())
    (found,) = distilled(model, tokens, (2,), steps=3)
    assert found.explained == 1.0
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=1e-6)


def test_a_loss_that_is_not_finite_stops_it_and_no_weight_has_changed(
    model: PreTrainedModel, tokens: Tensor
) -> None:
    with torch.no_grad():
        model.model.layers[3].mlp.down_proj.weight.fill_(float("nan"))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RunError, match="the local loss of layer 1"):
        distilled(model, tokens, DROPPED)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)


def test_a_bf16_model_learns_in_fp32_and_stays_bf16(model: PreTrainedModel, tokens: Tensor) -> None:
    """At a rate whose steps bf16 could not hold one by one."""
    model.to(torch.bfloat16)
    before = copy.deepcopy(model.state_dict())
    distilled(model, tokens, DROPPED, rate=lambda step: 1e-4)
    assert {value.dtype for value in model.state_dict().values()} == {torch.bfloat16}
    weight = "model.layers.1.mlp.down_proj.weight"
    assert not model.state_dict()[weight].equal(before[weight])


def test_gpt2_learns_too(tokens: Tensor) -> None:
    """Its layers take their input by position and return it in a tuple."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=96, n_embd=16, n_layer=4, n_head=2, n_positions=64)
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.transformer.h.named_parameters():
            if "ln_" not in name:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    (found,) = distilled(model, tokens % 96, (1, 2), steps=60)
    assert found.explained is not None
    assert found.explained > 0.1


def test_transfer_begins_with_it_and_the_teacher_is_the_model_before_it(
    model: PreTrainedModel, tokens: Tensor
) -> None:
    dense = copy.deepcopy(model)
    recipe = TransferRecipe(steps=1, local_steps=8, batch_size=len(tokens), learning_rate=1e-30)
    result = transfer(model, tokens, recipe, dropped=DROPPED, seed=0)
    rates = [local_learning_rate(recipe, model.config.hidden_size, step) for step in range(8)]
    alone = copy.deepcopy(dense)
    distilled(
        alone, tokens, DROPPED, steps=8, batch_size=len(tokens), micro_batch_size=len(tokens),
        rate=lambda step: rates[step],
    )  # fmt: skip
    assert all(value.equal(alone.state_dict()[name]) for name, value in model.state_dict().items())
    assert [entry["first"] for entry in result.to_document()["refits"]] == [2]
    with torch.no_grad():
        target = dense(tokens).logits.log_softmax(-1)
        with GatedModel(model) as gated, gated.masking(DROPPED):
            ours = gated.logits(tokens).log_softmax(-1)
    kl = (target.exp() * (target - ours)).sum(-1).mean()
    assert result.steps[0]["distill_loss"] == pytest.approx(float(kl), rel=1e-4)


def test_it_learns_under_autocast_too(model: PreTrainedModel, tokens: Tensor) -> None:
    recipe = TransferRecipe(steps=0, local_steps=24, batch_size=4, precision="bf16")
    result = transfer(model, tokens, recipe, dropped=DROPPED, seed=0)
    assert result.refits[0].explained is not None
    assert result.refits[0].explained > 0.1
    assert {value.dtype for value in model.parameters()} == {torch.float32}


def test_the_rate_is_llm_streamlines_by_width() -> None:
    recipe = TransferRecipe(local_steps=100, warmup_fraction=0.1)
    rates = [local_learning_rate(recipe, 4096, step) for step in range(100)]
    assert max(rates) == pytest.approx(2e-4, rel=0.03)
    assert rates[0] < max(rates) / 5
    assert rates[-1] == pytest.approx(2e-5, rel=0.03)
    own = recipe.model_copy(update={"local_learning_rate": 1e-3})
    assert max(local_learning_rate(own, 4096, step) for step in range(100)) == pytest.approx(1e-3)


@pytest.mark.parametrize(
    ("settings", "number"),
    [({"steps": 6}, 6), ({"steps": 0}, 128), ({"steps": 6, "local_steps": 3}, 3)],
)
def test_it_takes_as_many_steps_as_the_training_behind_it(
    settings: dict[str, int], number: int
) -> None:
    assert TransferRecipe.model_validate(settings).num_local_steps == number

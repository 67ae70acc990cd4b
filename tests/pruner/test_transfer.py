"""Stage 2: the penalty shrinks the chosen layers, annealing makes deletion exact, it resumes."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from trsp.bench.pico_checkpoint import make_pico_model
from trsp.pruner.checkpoint import load_model, open_checkpoint
from trsp.pruner.distillation import record_teacher
from trsp.pruner.errors import RunError, UserError
from trsp.pruner.gated_model import GatedModel
from trsp.pruner.losses import distillation_loss, hidden_state_loss, language_model_loss
from trsp.pruner.recipe import LoraRecipe, TransferRecipe
from trsp.pruner.transfer import TransferState, closing_gates, learning_rate, transfer

DROPPED = (2, 4)
PAPER: dict[str, Any] = {
    "label_weight": 1.0, "distill_weight": 0.0, "closing": "never", "steps": 20, "batch_size": 4,
    "learning_rate": 1e-3, "lambda2": 0.3,
}  # fmt: skip


def run(model: PreTrainedModel, tokens: Tensor, **settings: Any) -> Any:
    recipe = TransferRecipe(**{"steps": 6, "batch_size": 4, **settings})
    return transfer(model, tokens, recipe, dropped=DROPPED, seed=3)


@pytest.mark.parametrize("norm", ["l1", "l2", "l2_squared"])
def test_the_penalty_drives_the_chosen_layers_towards_identity(
    model: PreTrainedModel, tokens: Tensor, norm: str
) -> None:
    with GatedModel(model, norm="l2") as gated, torch.no_grad():
        gated.measured = frozenset(range(6))
        gated.logits(tokens)
        before = {layer: float(d.relative()) for layer, d in gated.differences.items()}
    result = run(model, tokens, **{**PAPER, "norm": norm, "lambda2": 2.0})
    for layer in DROPPED:
        assert result.residual_difference[layer] < 0.8 * before[layer]
        assert result.residual_difference[layer] == result.branch_difference[layer]
    assert result.loss_after_deletion != result.loss_before_deletion
    assert result.steps[-1]["penalty"] < result.steps[0]["penalty"]


def test_without_a_penalty_they_do_not(model: PreTrainedModel, tokens: Tensor) -> None:
    """The control of the test above: its threshold is not met by training alone."""
    with GatedModel(model) as gated, torch.no_grad():
        gated.measured = frozenset(DROPPED)
        gated.logits(tokens)
        before = {layer: float(d.relative()) for layer, d in gated.differences.items()}
    result = run(model, tokens, **{**PAPER, "lambda2": 0.0})
    assert any(result.branch_difference[layer] >= 0.8 * before[layer] for layer in DROPPED)


def test_annealing_makes_deletion_lossless(model: PreTrainedModel, tokens: Tensor) -> None:
    result = run(model, tokens, closing="linear", closing_fraction=0.5)
    assert result.loss_before_deletion == result.loss_after_deletion
    assert set(result.residual_difference.values()) == {0.0}
    assert all(value > 0 for value in result.branch_difference.values())
    assert [step["gate"] for step in result.steps] == [1.0, 0.5, 0.0, 0.0, 0.0, 0.0]


def test_the_gate_falls_to_exactly_zero() -> None:
    for steps in (2, 5, 64, 100):
        for fraction in (0.01, 0.3, 0.5, 1.0):
            recipe = TransferRecipe(steps=steps, closing="linear", closing_fraction=fraction)
            gates = [closing_gates(recipe, step, (3,))[3] for step in range(steps)]
            assert gates == sorted(gates, reverse=True)
            assert gates[-1] == 0.0
            assert gates[0] == 1.0


def test_progressive_annealing_closes_one_layer_after_the_other() -> None:
    recipe = TransferRecipe(steps=40, closing="progressive", closing_fraction=0.525)
    gates = [closing_gates(recipe, step, (7, 2)) for step in range(40)]
    assert gates[0] == {7: 1.0, 2: 1.0}
    assert gates[5] == {7: 0.5, 2: 1.0}
    assert gates[10] == {7: 0.0, 2: 1.0}
    assert gates[15] == {7: 0.0, 2: 0.5}
    assert all(gate == {7: 0.0, 2: 0.0} for gate in gates[20:])


def test_closed_layers_take_no_part_from_the_first_step_on(
    model: PreTrainedModel, tokens: Tensor
) -> None:
    before = copy.deepcopy(model.state_dict())
    result = run(model, tokens, closing="at_once")
    assert {step["gate"] for step in result.steps} == {0.0}
    assert {step["penalty"] for step in result.steps} == {0.0}
    assert result.loss_before_deletion == result.loss_after_deletion
    moved = {name for name, value in model.state_dict().items() if not value.equal(before[name])}
    inside = {name for name in before if any(f".layers.{layer}." in name for layer in DROPPED)}
    assert not moved & inside
    assert set(before) - inside == moved


def test_progressive_skips_a_closed_layer_while_another_is_open(
    model: PreTrainedModel, tokens: Tensor
) -> None:
    result = run(model, tokens, closing="progressive", closing_fraction=1.0)
    assert result.loss_before_deletion == result.loss_after_deletion
    assert [step["gate"] for step in result.steps] == sorted(
        (step["gate"] for step in result.steps), reverse=True
    )


def test_distilling_hidden_states_brings_them_nearer(
    model: PreTrainedModel, tokens: Tensor
) -> None:
    with torch.no_grad():
        dense = model.model(input_ids=tokens, use_cache=False).last_hidden_state
    settings = {"distill_weight": 0.0, "hidden_weight": 1.0, "closing": "at_once", "steps": 20}
    result = run(model, tokens, **settings)
    with torch.no_grad(), GatedModel(model) as gated, gated.masking(DROPPED):
        after = model.model(input_ids=tokens, use_cache=False).last_hidden_state
    assert result.steps[0]["distill_loss"] == 0.0
    assert result.steps[-1]["hidden_loss"] < 0.5 * result.steps[0]["hidden_loss"]
    assert float(hidden_state_loss(after, dense)) < 0.5 * result.steps[0]["hidden_loss"]


def test_weighing_by_entropy_counts_unsure_tokens_more() -> None:
    teacher = torch.tensor([[[0.0, 0.0, 0.0], [20.0, 0.0, 0.0]]])
    wrong_where_unsure = torch.tensor([[[1.0, 0.0, 0.0], [20.0, 0.0, 0.0]]])
    plain = distillation_loss(wrong_where_unsure, teacher, 1.0)
    weighed = distillation_loss(wrong_where_unsure, teacher, 1.0, by_entropy=True)
    assert float(weighed) == pytest.approx(2 * float(plain), rel=1e-4)
    wrong_where_sure = torch.tensor([[[0.0, 0.0, 0.0], [0.0, 20.0, 0.0]]])
    assert float(distillation_loss(wrong_where_sure, teacher, 1.0, by_entropy=True)) < 1e-3


def test_the_learning_rate_warms_up_and_falls() -> None:
    recipe = TransferRecipe(steps=100)
    rates = [learning_rate(recipe, 128, step) for step in range(100)]
    assert max(rates) == pytest.approx(0.1 / 128, rel=0.02)
    assert rates[0] < rates[5] < max(rates)
    assert rates[-1] == pytest.approx(0.1 * max(rates), rel=0.05)
    with_lora = TransferRecipe(steps=100, lora=LoraRecipe())
    assert learning_rate(with_lora, 128, 50) == pytest.approx(10 * rates[50])


def test_the_teacher_reproduces_the_dense_model(model: PreTrainedModel, tokens: Tensor) -> None:
    with torch.no_grad():
        dense = model(input_ids=tokens, use_cache=False).logits
        teacher = record_teacher(model, tokens, batch_size=3)
        for parameter in model.parameters():
            parameter.mul_(2)
    torch.testing.assert_close(teacher.logits([5, 1]), dense[[5, 1]], rtol=0, atol=1e-6)


def test_a_head_whose_logits_change_afterwards_is_refused(
    model: PreTrainedModel, tokens: Tensor
) -> None:
    def bend(_module: Any, _args: Any, output: Tensor) -> Tensor:
        return output + output.abs()

    handle = model.get_output_embeddings().register_forward_hook(bend)
    with pytest.raises(UserError, match=r"transfer.distill_weight=0"):
        record_teacher_without_hooks(model, tokens)
    handle.remove()


def record_teacher_without_hooks(model: PreTrainedModel, tokens: Tensor) -> None:
    """The copy of the head loses the hook, as it would lose what a model does after its head."""
    head = model.get_output_embeddings()
    plain = copy.deepcopy(head)
    plain._forward_hooks.clear()
    head.__class__.__deepcopy__ = lambda self, memo: plain
    try:
        record_teacher(model, tokens)
    finally:
        del head.__class__.__deepcopy__


def test_losses_are_their_definitions() -> None:
    logits = torch.randn(2, 5, 7, dtype=torch.float64)
    ids = torch.randint(0, 7, (2, 5))
    log_p = logits.log_softmax(-1)
    expected = -sum(float(log_p[b, t, ids[b, t + 1]]) for b in range(2) for t in range(4)) / 8
    assert float(language_model_loss(logits, ids)) == pytest.approx(expected, rel=1e-5)
    teacher = torch.randn(2, 5, 7)
    p = (teacher / 2).softmax(-1)
    kl = (p * (p.log() - (logits.float() / 2).log_softmax(-1))).sum(-1).mean() * 4
    assert float(distillation_loss(logits, teacher, 2.0)) == pytest.approx(float(kl), rel=1e-4)
    assert float(distillation_loss(teacher, teacher, 2.0)) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("change", [{"micro_batch_size": 2}, {"checkpoint_activations": True}])
def test_the_layout_of_a_step_changes_no_result(
    pico_llama: Path, tokens: Tensor, change: dict[str, Any]
) -> None:
    results = []
    for settings in ({}, change):
        model = load_model(open_checkpoint(pico_llama))
        results.append((run(model, tokens, steps=3, closing="linear", **settings), model))
    (plain, plain_model), (other, other_model) = results
    for a, b in zip(plain.steps, other.steps, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
    for a, b in zip(plain_model.parameters(), other_model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


def test_bf16_autocast_trains_fp32_weights(model: PreTrainedModel, tokens: Tensor) -> None:
    result = run(model, tokens, precision="bf16")
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert all(math.isfinite(step["loss"]) for step in result.steps)


def test_lora_is_merged_and_leaves_no_adapter(
    model: PreTrainedModel, tokens: Tensor, pico_llama: Path
) -> None:
    torch.manual_seed(0)
    names = [name for name, _ in model.named_parameters()]
    result = run(model, tokens, lora=LoraRecipe(rank=2), closing="at_once")
    assert [name for name, _ in model.named_parameters()] == names
    assert result.loss_before_deletion == result.loss_after_deletion
    dense = load_model(open_checkpoint(pico_llama))
    changed = {
        name
        for (name, a), b in zip(model.named_parameters(), dense.parameters(), strict=True)
        if not torch.equal(a, b)
    }
    assert any("q_proj" in name for name in changed)
    assert not any("embed" in name or "norm" in name for name in changed)


@pytest.mark.parametrize("settings", [{}, {"lora": LoraRecipe(rank=2)}, PAPER | {"steps": 6}])
def test_a_stopped_transfer_resumes_bit_for_bit(
    pico_llama: Path, tokens: Tensor, settings: dict[str, Any]
) -> None:
    recipe = TransferRecipe(**{"steps": 6, "batch_size": 4, **settings})
    saved: list[TransferState] = []

    def stop(step: int, snapshot: Any) -> None:
        if step == 3:
            saved.append(copy.deepcopy(snapshot()))
            raise KeyboardInterrupt

    def start(**more: Any) -> tuple[Any, PreTrainedModel]:
        torch.manual_seed(0)
        model = load_model(open_checkpoint(pico_llama))
        return transfer(model, tokens, recipe, dropped=DROPPED, seed=3, **more), model

    whole, whole_model = start()
    with pytest.raises(KeyboardInterrupt):
        start(on_step=stop)
    resumed, resumed_model = start(state=saved[0])
    assert resumed == whole
    for a, b in zip(whole_model.parameters(), resumed_model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_poisoned_batch_stops_with_step_and_sequences(
    model: PreTrainedModel, tokens: Tensor
) -> None:
    def poison(_m: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        bad = (args[0][:, :1] == tokens[6, 0]).all(-1)
        return output.masked_fill(bad[:, None, None], float("nan"))

    before = [parameter.detach().clone() for parameter in model.parameters()]
    model.get_input_embeddings().register_forward_hook(poison)
    with pytest.raises(RunError, match=r"stage 2 loss is nan at step \d, .*sequences \["):
        run(model, tokens, **PAPER, micro_batch_size=1)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert len(before) == len(list(model.parameters()))


def test_lambda2_ramps_up(model: PreTrainedModel, tokens: Tensor) -> None:
    ramped = run(
        model, tokens, **{**PAPER, "steps": 4, "ramp_fraction": 1.0, "learning_rate": 1e-9}
    )
    first, last = ramped.steps[0]["penalty"], ramped.steps[3]["penalty"]
    assert last / first == pytest.approx(4, rel=0.05)


def test_absolute_units_are_activation_units(model: PreTrainedModel, tokens: Tensor) -> None:
    settings = {**PAPER, "steps": 1, "norm_units": "absolute", "lambda2": 1.0}
    with GatedModel(model) as gated, torch.no_grad():
        gated.measured = frozenset(DROPPED)
        expected = 0.0
        from trsp.pruner.sampling import batch_indices

        sequences = batch_indices(0, num_sequences=8, batch_size=4, seed=3)
        gated.logits(tokens[sequences])
        expected = sum(float(d.absolute()) for d in gated.differences.values())
    assert run(model, tokens, **settings).steps[0]["penalty"] == pytest.approx(expected, rel=1e-5)


def test_adapters_are_taken_off_a_model_whose_training_fails(
    model: PreTrainedModel, tokens: Tensor
) -> None:
    names = set(model.state_dict())
    with pytest.raises(RunError):
        run(model, tokens, lora=LoraRecipe(rank=2), learning_rate=1e30)
    assert set(model.state_dict()) == names


@pytest.mark.parametrize(
    ("family", "scale"), [("granite", 1 / 8), ("cohere2", 0.0625), ("gemma2", 1.0), ("llama", 1.0)]
)
def test_the_teacher_makes_the_logits_of_families_that_scale_or_cap_them(
    family: str, scale: float
) -> None:
    model = make_pico_model(family)
    tokens = torch.arange(3, 43).view(2, 20)
    teacher = record_teacher(model, tokens, batch_size=1)
    assert teacher._head.scale == pytest.approx(scale, rel=1e-5)
    with torch.no_grad():
        logits = model(input_ids=tokens, use_cache=False).logits
    torch.testing.assert_close(teacher.logits([0, 1]), logits, rtol=1e-5, atol=1e-6)

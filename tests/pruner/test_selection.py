"""Stage 1: gates learn which layers are cheap, weights stay frozen, picks are logged."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from trsp.pruner.criteria import block_influence
from trsp.pruner.errors import RunError, UserError
from trsp.pruner.families import decoder_layers
from trsp.pruner.gated_model import GatedModel
from trsp.pruner.recipe import SelectionRecipe
from trsp.pruner.sampling import batch_indices
from trsp.pruner.selection import SelectionState, select_layers

FAST = SelectionRecipe(
    method="gates",
    first_round_steps=12,
    round_steps=4,
    batch_size=2,
    num_candidates=2,
    verification_sequences=4,
)
BY_LOSS = SelectionRecipe(batch_size=2, verification_sequences=4)
FIRST = frozenset({0})


def test_a_layer_that_does_nothing_is_picked_first(model: PreTrainedModel, tokens: Tensor) -> None:
    idle = decoder_layers(model)[3]
    with torch.no_grad():
        idle.self_attn.o_proj.weight.zero_()
        idle.mlp.down_proj.weight.zero_()
    state = select_layers(model, tokens, FAST, num_to_remove=2, protected=FIRST, seed=0)
    assert state.picks[0] == 3
    by_gate_alone = FAST.model_copy(update={"num_candidates": 1})
    state = select_layers(model, tokens, by_gate_alone, num_to_remove=1, protected=FIRST, seed=0)
    assert state.picks == (3,)


def test_verified_gates_do_not_take_a_first_layer_that_everything_rests_on(
    pico_llama: Path, model: PreTrainedModel, tokens: Tensor
) -> None:
    """A first layer whose output dwarfs its input: gates alone are blind to it (method.md)."""
    embedding = model.get_input_embeddings().weight
    with torch.no_grad():
        model.get_output_embeddings().weight = torch.nn.Parameter(embedding.clone())
        embedding.mul_(0.02)
    for protected in (FIRST, frozenset()):
        state = select_layers(model, tokens, FAST, num_to_remove=3, protected=protected, seed=0)
        assert 0 not in state.picks, f"with layers {set(protected)} protected"


def test_weights_are_frozen_and_left_as_they_were(model: PreTrainedModel, tokens: Tensor) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    frozen = next(model.parameters())
    frozen.requires_grad_(False)
    select_layers(model, tokens, FAST, num_to_remove=1, protected=FIRST, seed=0)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not frozen.requires_grad
    assert all(p.requires_grad for p in model.parameters() if p is not frozen)


def test_rounds_log_gates_losses_and_picks(model: PreTrainedModel, tokens: Tensor) -> None:
    state = select_layers(model, tokens, FAST, num_to_remove=2, protected=FIRST, seed=0)
    assert len(state.rounds) == 2
    first, second = state.rounds
    assert (len(first["losses"]), len(second["losses"])) == (12, 4)
    assert first["gates"][0] is None, "the protected layer has no gate"
    assert second["gates"][first["picked"]] is None, "nor has a removed one"
    assert second["picked"] == state.picks[1]
    assert first["picked"] in first["candidates"]
    best = min(first["candidate_losses"])
    assert first["candidates"][first["candidate_losses"].index(best)] == first["picked"]
    with GatedModel(model) as gated:
        removed_loss = gated.masked_loss(tokens[:4], state.picks[:1], 2)
    assert best == pytest.approx(removed_loss, rel=1e-6)


def test_relative_lambda1_scales_with_the_dense_loss_over_the_layers(
    model: PreTrainedModel, tokens: Tensor
) -> None:
    relative = FAST.model_copy(update={"first_round_steps": 1, "lambda1": 0.3})
    state = select_layers(model, tokens, relative, num_to_remove=1, protected=FIRST, seed=0)
    num_gated = 5  # of 6; all are still 1 when the first step's penalty is taken
    expected = 0.3 * state.dense_loss / 6 * num_gated
    assert state.rounds[0]["penalties"][0] == pytest.approx(expected, rel=1e-5)
    absolute = relative.model_copy(update={"lambda1_units": "absolute"})
    state = select_layers(model, tokens, absolute, num_to_remove=1, protected=FIRST, seed=0)
    assert state.rounds[0]["penalties"][0] == pytest.approx(0.3 * num_gated, rel=1e-5)


@pytest.mark.parametrize("stop_after", [1, 2])
def test_a_stopped_selection_goes_on_as_if_it_had_not_been(
    model: PreTrainedModel, tokens: Tensor, stop_after: int
) -> None:
    whole = select_layers(model, tokens, FAST, num_to_remove=3, protected=FIRST, seed=5)
    saved: list[SelectionState] = []

    def stop(state: SelectionState) -> None:
        saved.append(state)
        if len(saved) == stop_after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        select_layers(model, tokens, FAST, num_to_remove=3, protected=FIRST, seed=5, on_round=stop)
    reread = SelectionState.from_document(saved[-1].to_document())
    resumed = select_layers(
        model, tokens, FAST, num_to_remove=3, protected=FIRST, seed=5, state=reread
    )
    assert resumed == whole


def test_too_few_unprotected_layers_are_refused(model: PreTrainedModel, tokens: Tensor) -> None:
    with pytest.raises(UserError, match="only 2 of 6 are unprotected"):
        select_layers(
            model, tokens, FAST, num_to_remove=3, protected=frozenset({0, 1, 2, 5}), seed=0
        )


def test_a_loss_that_is_not_finite_stops_with_step_and_batch(
    model: PreTrainedModel, tokens: Tensor
) -> None:
    def poison(module: torch.nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        bad = (args[0] == tokens[6, 0]) & (args[0][:, :1] == tokens[6, 0])
        return output.masked_fill(bad.unsqueeze(-1), float("nan"))

    model.get_input_embeddings().register_forward_hook(poison)
    with pytest.raises(RunError, match=r"stage 1 loss is nan at step \d+, .*sequences \[.*6"):
        select_layers(model, tokens, FAST, num_to_remove=1, protected=FIRST, seed=0)


@torch.no_grad()
def test_block_influence_is_one_minus_cosine(model: PreTrainedModel, tokens: Tensor) -> None:
    scores = block_influence(model, tokens, batch_size=3)
    states = model(input_ids=tokens, use_cache=False, output_hidden_states=True).hidden_states
    for index in range(5):  # the last hidden state is after the final norm
        cosine = torch.cosine_similarity(states[index], states[index + 1], dim=-1).mean()
        assert scores[index] == pytest.approx(1 - float(cosine), abs=1e-5)


def test_block_influence_orders_by_score_and_respects_protection(
    model: PreTrainedModel, tokens: Tensor
) -> None:
    recipe = FAST.model_copy(update={"method": "block_influence", "num_candidates": 1})
    scores = block_influence(model, tokens)
    order = sorted(range(6), key=lambda layer: scores[layer])
    state = select_layers(model, tokens, recipe, num_to_remove=3, protected=frozenset(), seed=0)
    assert list(state.picks) == order[:3]
    protected = frozenset({order[0]})
    state = select_layers(model, tokens, recipe, num_to_remove=3, protected=protected, seed=0)
    assert list(state.picks) == order[1:4]


def test_every_epoch_sees_every_sequence_once_in_another_order() -> None:
    drawn = [
        i for step in range(6) for i in batch_indices(step, num_sequences=8, batch_size=4, seed=1)
    ]
    epochs = [drawn[start : start + 8] for start in (0, 8, 16)]
    assert all(sorted(epoch) == list(range(8)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert batch_indices(3, num_sequences=8, batch_size=4, seed=1) == drawn[12:16]
    assert batch_indices(0, num_sequences=3, batch_size=7, seed=1)[:3] != [0, 0, 0]


def test_influence_proposes_and_the_loss_picks(model: PreTrainedModel, tokens: Tensor) -> None:
    recipe = FAST.model_copy(
        update={"method": "block_influence", "num_candidates": 3, "verification_sequences": 8}
    )
    scores = block_influence(model, tokens)
    state = select_layers(model, tokens, recipe, num_to_remove=2, protected=frozenset({1}), seed=0)
    picks: list[int] = []
    with GatedModel(model) as gated:
        for record in state.rounds:
            rest = [layer for layer in range(6) if layer not in (1, *picks)]
            candidates = sorted(rest, key=lambda layer: scores[layer])[:3]
            losses = [gated.masked_loss(tokens, (*picks, layer), 4) for layer in candidates]
            assert record["candidates"] == candidates
            assert record["candidate_losses"] == pytest.approx(losses)
            picks.append(candidates[losses.index(min(losses))])
    assert list(state.picks) == picks


def test_without_later_steps_the_first_gates_propose_every_pick(
    model: PreTrainedModel, tokens: Tensor
) -> None:
    recipe = FAST.model_copy(update={"round_steps": 0, "num_candidates": 1})
    state = select_layers(model, tokens, recipe, num_to_remove=3, protected=frozenset(), seed=0)
    gates = state.rounds[0]["gates"]
    assert list(state.picks) == sorted(range(6), key=lambda layer: abs(gates[layer]))[:3]
    assert [len(record["losses"]) for record in state.rounds] == [FAST.first_round_steps, 0, 0]


def increases(state: SelectionState) -> list[dict[int, float]]:
    """What each measured layer added to the loss, round by round."""
    loss, found = state.dense_loss, []
    for record in state.rounds:
        losses = dict(zip(record["candidates"], record["candidate_losses"], strict=True))
        found.append({layer: value - loss for layer, value in losses.items()})
        loss = losses[record["picked"]]
    return found


def test_the_lazy_search_finds_what_the_full_search_finds(
    model: PreTrainedModel, tokens: Tensor
) -> None:
    """Layers that are added up at different strengths: none gets cheaper as others go."""
    with torch.no_grad():
        for index, layer in enumerate(decoder_layers(model)):
            layer.mlp.down_proj.weight.mul_(0.2 + 0.5 * ((index * 3) % 6))
    lazy = select_layers(model, tokens, BY_LOSS, num_to_remove=4, protected=FIRST, seed=0)
    picks: tuple[int, ...] = ()
    with GatedModel(model) as gated:
        while len(picks) < 4:
            rest = [layer for layer in range(1, 6) if layer not in picks]
            losses = {r: gated.masked_loss(tokens[:4], (*picks, r), 2) for r in rest}
            picks = (*picks, min(rest, key=lambda layer: losses[layer]))
    assert lazy.picks == picks
    measured = [len(record["candidates"]) for record in lazy.rounds]
    assert measured[0] == 5
    assert sum(measured) < 5 + 4 + 3 + 2, "no round measured less than all of its layers"


def test_a_layer_is_passed_over_only_where_it_was_dearer_when_last_measured(
    model: PreTrainedModel, tokens: Tensor
) -> None:
    state = select_layers(model, tokens, BY_LOSS, num_to_remove=5, protected=FIRST, seed=0)
    known: dict[int, float] = {}
    left = set(range(1, 6))
    for record, fresh in zip(state.rounds, increases(state), strict=True):
        known |= fresh
        assert record["picked"] in fresh
        assert known[record["picked"]] == min(known[layer] for layer in left)
        left.remove(record["picked"])
    assert state.gates == (1.0,) * 6


def test_a_stopped_search_by_loss_measures_nothing_twice(
    model: PreTrainedModel, tokens: Tensor
) -> None:
    whole = select_layers(model, tokens, BY_LOSS, num_to_remove=4, protected=FIRST, seed=0)
    part = select_layers(model, tokens, BY_LOSS, num_to_remove=2, protected=FIRST, seed=0)
    saved = SelectionState.from_document(part.to_document())
    again = select_layers(
        model, tokens, BY_LOSS, num_to_remove=4, protected=FIRST, seed=0, state=saved
    )
    assert again == whole

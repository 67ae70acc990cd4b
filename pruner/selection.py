"""Stage 1: learn which layers the model can do without, one after the other.

By `masked_loss` each pick is the layer without which the language-model loss is lowest: the greedy
search of SLEB (arXiv 2402.09025), made lazy (Minoux, 1978). What a layer cost when it was last
measured stands for what it costs now, and only the cheapest is measured again, until it stays the
cheapest: a few layers a round instead of all. Where no layer gets cheaper as others go, these are
the full search's picks; nothing is trained.

By `gates`, the paper's way, they are learned:

    loss = L_LM(gates) + lambda1 * S * sum |gates|        weights frozen, gates [L] fp32

A round trains the gates of the layers still there; the layers with the smallest |gate| are the
candidates; the candidate whose removal costs the least language-model loss is picked and masked;
the next round goes on from the learned gates. `num_candidates` 1 leaves the choice to the gate
alone, as TRSP (arXiv 2505.18232, algorithm 1) has it.

The scale S makes lambda1 mean the same on any model: S = dense loss / L, so setting every gate to
zero is rewarded with lambda1 times the dense loss, whatever the depth, vocabulary or text. Near
s = 1 the loss is about delta_i * (1 - s)^2, delta_i being what removing layer i costs, so a gate
settles at 1 - lambda1 * S / (2 * delta_i): it orders layers by what they cost. S = 1 for absolute
units, the paper's.

L layers, N sequences, T tokens.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trsp.pruner.criteria import block_influence
from trsp.pruner.errors import UserError
from trsp.pruner.gated_model import GatedModel
from trsp.pruner.losses import language_model_loss, require_finite
from trsp.pruner.progress import Progress, silent
from trsp.pruner.recipe import SelectionRecipe
from trsp.pruner.sampling import batch_indices


@dataclass(frozen=True)
class SelectionState:
    """All that later rounds need from earlier ones, and all that the layer map tells of them.

    Attributes:
        dense_loss: language-model loss of the unpruned model on the verification sequences, nats.
        gates: the learned gates [L] after the last finished round.
        picks: removed layers, in order.
        rounds: one record a round: gates, losses and penalty of each step, candidates, pick.
    """

    dense_loss: float
    gates: tuple[float, ...]
    picks: tuple[int, ...] = ()
    rounds: tuple[dict[str, Any], ...] = field(default_factory=tuple)

    def to_document(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_document(cls, document: dict[str, Any]) -> "SelectionState":
        return cls(
            dense_loss=document["dense_loss"],
            gates=tuple(document["gates"]),
            picks=tuple(document["picks"]),
            rounds=tuple(document["rounds"]),
        )


def select_layers(
    model: PreTrainedModel,
    input_ids: Tensor,
    recipe: SelectionRecipe,
    *,
    num_to_remove: int,
    protected: frozenset[int],
    seed: int,
    state: SelectionState | None = None,
    on_round: Callable[[SelectionState], None] = lambda state: None,
    progress: Progress = silent,
) -> SelectionState:
    """Pick `num_to_remove` layers, one after the other.

    Args:
        model: frozen for the duration; left as it was.
        input_ids: calibration tokens [N, T].
        protected: layers that are never picked and never gated.
        state: where an interrupted selection stopped.
        on_round: called with the state after every pick; it may raise to stop the run.
    Raises:
        UserError: too few unprotected layers.
        RunError: a loss that is not finite, with its step and batch.
    """
    num_layers = model.config.get_text_config(decoder=True).num_hidden_layers
    check_target(num_layers, num_to_remove, protected)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    try:
        with GatedModel(model, gate_kind=recipe.gate_kind, fuse_norms=recipe.fuse_norms) as gated:
            verification = input_ids[: recipe.verification_sequences]
            if state is None:
                dense_loss = gated.masked_loss(verification, (), recipe.batch_size)
                require_finite(
                    dense_loss, "the dense model's loss", 0, list(range(len(verification)))
                )
                state = SelectionState(dense_loss, (1.0,) * num_layers)
            scores = None
            if recipe.method == "block_influence":
                scores = _block_influence(model, input_ids, recipe, progress)
            while len(state.picks) < num_to_remove:
                if recipe.method == "masked_loss":
                    state = _pick_by_masked_loss(
                        gated, verification, recipe, num_to_remove, protected, state, progress
                    )
                elif scores is not None:
                    state = _pick_by_influence(
                        gated, input_ids, recipe, num_to_remove, protected, scores, state, progress
                    )
                else:
                    state = _run_round(
                        gated, input_ids, recipe, num_to_remove, protected, seed, state, progress
                    )
                on_round(state)
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
    return state


def check_target(num_layers: int, num_to_remove: int, protected: frozenset[int]) -> None:
    """UserError when fewer layers are unprotected than are to be removed."""
    if num_to_remove > num_layers - len(protected):
        raise UserError(
            f"{num_to_remove} layers are to go but only {num_layers - len(protected)} of "
            f"{num_layers} are unprotected (selection.protected: {sorted(protected)}); "
            "protect fewer or remove fewer"
        )


def _block_influence(
    model: PreTrainedModel, input_ids: Tensor, recipe: SelectionRecipe, progress: Progress
) -> list[float]:
    scores = block_influence(model, input_ids, batch_size=recipe.batch_size, progress=progress)
    for layer, score in enumerate(scores):
        require_finite(score, f"the block influence of layer {layer}", 0, [])
    return scores


def _pick_by_masked_loss(
    gated: GatedModel,
    verification: Tensor,
    recipe: SelectionRecipe,
    num_to_remove: int,
    protected: frozenset[int],
    state: SelectionState,
    progress: Progress,
) -> SelectionState:
    """Pick the layer that costs least, measuring again only what could still be it."""
    index = len(state.picks)
    remaining = _remaining(gated.num_layers, protected, state)
    loss, known = _last_costs(state)
    measured: dict[int, float] = {}
    while True:
        # What was never measured comes first.
        pick = min(remaining, key=lambda layer: (known.get(layer, -math.inf), layer))
        if pick in measured:
            break
        measured[pick] = gated.masked_loss(verification, (*state.picks, pick), recipe.batch_size)
        require_finite(measured[pick], f"the loss without layer {pick}", index, [pick])
        known[pick] = measured[pick] - loss
        progress(f"loss without, round {index + 1}/{num_to_remove}", len(measured), len(remaining))
    record = {
        "round": index,
        "picked": pick,
        "criterion": "masked_loss",
        "candidates": list(measured),
        "candidate_losses": list(measured.values()),
    }
    return _after(state, record)


def _last_costs(state: SelectionState) -> tuple[float, dict[int, float]]:
    """The loss without the layers picked, and what each layer added when it was last measured."""
    loss, known = state.dense_loss, {}
    for record in state.rounds:
        losses = dict(zip(record["candidates"], record["candidate_losses"], strict=True))
        known.update({layer: value - loss for layer, value in losses.items()})
        loss = losses[record["picked"]]
    return loss, known


def _pick_by_influence(
    gated: GatedModel,
    input_ids: Tensor,
    recipe: SelectionRecipe,
    num_to_remove: int,
    protected: frozenset[int],
    scores: list[float],
    state: SelectionState,
    progress: Progress,
) -> SelectionState:
    """Pick one of the remaining layers with the smallest block influence in the dense model."""
    index = len(state.picks)
    remaining = _remaining(gated.num_layers, protected, state)
    candidates = sorted(remaining, key=lambda layer: (scores[layer], layer))
    candidates = candidates[: recipe.num_candidates]
    pick, losses = _verify(gated, input_ids, recipe, num_to_remove, candidates, state, progress)
    record = {
        "round": index,
        "picked": pick,
        "criterion": "block_influence",
        "scores": scores,
        "candidates": candidates,
        "candidate_losses": losses,
    }
    return _after(state, record)


def _after(state: SelectionState, record: dict[str, Any]) -> SelectionState:
    """The state behind a round that trained no gates."""
    return replace(state, picks=(*state.picks, record["picked"]), rounds=(*state.rounds, record))


def _remaining(num_layers: int, protected: frozenset[int], state: SelectionState) -> list[int]:
    return [
        layer for layer in range(num_layers) if layer not in protected and layer not in state.picks
    ]


def _verify(
    gated: GatedModel,
    input_ids: Tensor,
    recipe: SelectionRecipe,
    num_to_remove: int,
    candidates: list[int],
    state: SelectionState,
    progress: Progress,
) -> tuple[int, list[float | None]]:
    """The candidate whose removal leaves the lowest loss, and all their losses.

    A single candidate is not tried.
    """
    if len(candidates) == 1:
        return candidates[0], [None]
    index = len(state.picks)
    losses: list[float] = []
    for layer in candidates:
        losses.append(
            gated.masked_loss(
                input_ids[: recipe.verification_sequences],
                (*state.picks, layer),
                recipe.batch_size,
            )
        )
        require_finite(losses[-1], f"the loss without layer {layer}", index, candidates)
        progress(f"verifying, round {index + 1}/{num_to_remove}", len(losses), len(candidates))
    return candidates[losses.index(min(losses))], list(losses)


def _run_round(
    gated: GatedModel,
    input_ids: Tensor,
    recipe: SelectionRecipe,
    num_to_remove: int,
    protected: frozenset[int],
    seed: int,
    state: SelectionState,
    progress: Progress,
) -> SelectionState:
    """Train the gates of the remaining layers, then pick one of them."""
    index = len(state.picks)
    remaining = _remaining(gated.num_layers, protected, state)
    steps = recipe.first_round_steps if index == 0 else recipe.round_steps
    gates = torch.tensor(state.gates, dtype=torch.float32, device=gated.model.device)
    gates.requires_grad_(True)
    gated.skipped, gated.gates, gated.gated = frozenset(state.picks), gates, frozenset(remaining)
    losses, penalties = _train_gates(
        gated,
        gates,
        remaining,
        input_ids,
        recipe,
        steps,
        seed + 7919 * index,
        recipe.lambda1 * _penalty_scale(recipe, state.dense_loss, gated.num_layers),
        lambda step: progress(f"gates, round {index + 1}/{num_to_remove}", step, steps),
    )
    learned = gates.detach().cpu().tolist()
    proposed = sorted(remaining, key=lambda layer: (abs(learned[layer]), layer))
    candidates = proposed[: recipe.num_candidates]
    pick, losses_without = _verify(
        gated, input_ids, recipe, num_to_remove, candidates, state, progress
    )
    record = {
        "round": index,
        "picked": pick,
        "gates": [learned[layer] if layer in remaining else None for layer in range(len(learned))],
        "losses": losses,
        "penalties": penalties,
        "candidates": candidates,
        "candidate_losses": losses_without,
    }
    return SelectionState(
        state.dense_loss, tuple(learned), (*state.picks, pick), (*state.rounds, record)
    )


def _penalty_scale(recipe: SelectionRecipe, dense_loss: float, num_layers: int) -> float:
    return dense_loss / num_layers if recipe.lambda1_units == "relative" else 1.0


def _train_gates(
    gated: GatedModel,
    gates: Tensor,
    remaining: list[int],
    input_ids: Tensor,
    recipe: SelectionRecipe,
    steps: int,
    seed: int,
    lambda1: float,
    on_step: Callable[[int], None],
) -> tuple[list[float], list[float]]:
    """Adam on the gates alone, learning rate falling to 0 by a cosine; the losses of each step."""
    optimizer = torch.optim.Adam([gates], lr=recipe.learning_rate)
    losses, penalties = [], []
    chosen = torch.tensor(remaining, device=gates.device)
    for step in range(steps):
        rate = recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = rate
        sequences = batch_indices(
            step, num_sequences=len(input_ids), batch_size=recipe.batch_size, seed=seed
        )
        batch = input_ids[sequences].to(gates.device)
        loss = language_model_loss(gated.logits(batch), batch)
        penalty = lambda1 * gates[chosen].abs().sum()
        optimizer.zero_grad()
        (loss + penalty).backward()
        losses.append(loss.item())
        penalties.append(penalty.item())
        require_finite(losses[-1] + penalties[-1], "the stage 1 loss", step, sequences)
        optimizer.step()
        on_step(step + 1)
    return losses, penalties

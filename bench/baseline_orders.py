"""Other people's choices of layers, none of which trains or changes a weight.

Each selector returns the layers that go, in the order in which they go. They see the dense model,
except for SLEB, which sees it without the layers that it has already taken.

L layers, N sequences, T tokens, D hidden size.
"""

import math
from collections.abc import Callable, Collection
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from trsp.pruner.activations import residual_stream
from trsp.pruner.criteria import block_influence
from trsp.pruner.errors import UserError
from trsp.pruner.gated_model import GatedModel
from trsp.pruner.losses import language_model_loss, require_finite
from trsp.pruner.progress import Progress, silent

# Shortened-LLaMA never takes these many layers at the front and at the end.
TAYLOR_KEPT_FIRST, TAYLOR_KEPT_LAST = 4, 2


class NotApplicableError(UserError):
    """The method cannot be done on this model, whatever the user does; the text says why."""


def nothing() -> None:
    """Do nothing at a pick."""


class Selector(Protocol):
    """Choose the layers that go.

    Args:
        gated: entered, frozen; left as it was.
        input_ids: calibration tokens [N, T].
        on_pick: called after each pick by a method that picks one layer after the other, so that
            the cost of a shallower cut can be read; never by one that scores all layers at once.
    Returns:
        `num_to_remove` layers, in order of removal.
    Raises:
        UserError: num_to_remove is not in 1..L-1. RunError: a score that is not finite.
    """

    def __call__(
        self,
        gated: GatedModel,
        input_ids: Tensor,
        *,
        num_to_remove: int,
        seed: int,
        batch_size: int = 4,
        progress: Progress = silent,
        on_pick: Callable[[], None] = nothing,
    ) -> tuple[int, ...]: ...


def check_number(gated: GatedModel, num_to_remove: int) -> None:
    """UserError unless num_to_remove is in 1..L-1."""
    if not 1 <= num_to_remove < gated.num_layers:
        raise UserError(
            f"{num_to_remove} layers are to go of {gated.num_layers}; "
            f"expected 1 to {gated.num_layers - 1}"
        )


def removable_layers(
    gated: GatedModel, num_to_remove: int, never: Collection[int]
) -> tuple[int, ...]:
    """All layers but those of `never`.

    Raises:
        UserError: num_to_remove is not in 1..L-1, or more than may go.
    """
    check_number(gated, num_to_remove)
    removable = tuple(layer for layer in range(gated.num_layers) if layer not in never)
    if num_to_remove > len(removable):
        raise UserError(
            f"{num_to_remove} layers are to go, {len(removable)} are not protected "
            "(selection.protected); protect fewer or remove fewer"
        )
    return removable


@torch.no_grad()
def block_cosines(
    gated: GatedModel,
    input_ids: Tensor,
    *,
    length: int,
    batch_size: int,
    progress: Progress = silent,
) -> list[float]:
    """Mean cosine over all tokens between what enters and what leaves a block of `length` layers.

    Returns:
        L - length + 1 values; entry i is of layers i .. i + length - 1.
    Raises:
        RunError: one of them is not finite.
    """
    totals = [0.0] * (gated.num_layers - length + 1)
    for start in range(0, len(input_ids), batch_size):
        stream = residual_stream(gated, input_ids[start : start + batch_size])
        for first in range(len(totals)):
            cosine = F.cosine_similarity(
                stream[first].float(), stream[first + length].float(), dim=-1
            )
            totals[first] += float(cosine.double().sum())
        progress("block cosines", min(start + batch_size, len(input_ids)), len(input_ids))
    cosines = [total / input_ids.numel() for total in totals]
    for first, value in enumerate(cosines):
        require_finite(value, f"the cosine across the {length} layers from {first} on", 0, [])
    return cosines


def random_layers(
    gated: GatedModel,
    input_ids: Tensor,
    *,
    num_to_remove: int,
    seed: int,
    batch_size: int = 4,
    progress: Progress = silent,
    on_pick: Callable[[], None] = nothing,
    never: Collection[int] = (),
) -> tuple[int, ...]:
    """A permutation of all layers but those of `never`, drawn with `seed`, from its beginning."""
    removable = removable_layers(gated, num_to_remove, never)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(removable), generator=generator).tolist()
    return tuple(removable[place] for place in order[:num_to_remove])


def last_layers(
    gated: GatedModel,
    input_ids: Tensor,
    *,
    num_to_remove: int,
    seed: int,
    batch_size: int = 4,
    progress: Progress = silent,
    on_pick: Callable[[], None] = nothing,
) -> tuple[int, ...]:
    """The last layers, from the end."""
    check_number(gated, num_to_remove)
    return tuple(range(gated.num_layers - 1, gated.num_layers - 1 - num_to_remove, -1))


def block_influence_order(
    gated: GatedModel,
    input_ids: Tensor,
    *,
    num_to_remove: int,
    seed: int,
    batch_size: int = 4,
    progress: Progress = silent,
    on_pick: Callable[[], None] = nothing,
) -> tuple[int, ...]:
    """Layers that turn their input least, first. Source: ShortGPT, arXiv 2403.03853."""
    check_number(gated, num_to_remove)
    with gated.masking(()):
        scores = block_influence(gated.model, input_ids, batch_size=batch_size, progress=progress)
    return _lowest(scores, "the block influence of", num_to_remove)


@torch.no_grad()
def angular_block(
    gated: GatedModel,
    input_ids: Tensor,
    *,
    num_to_remove: int,
    seed: int,
    batch_size: int = 4,
    progress: Progress = silent,
    on_pick: Callable[[], None] = nothing,
) -> tuple[int, ...]:
    """The contiguous block with the smallest angle between what enters it and what leaves it.

    The angle is arccos(cosine) / pi at the last token of each sequence, averaged over sequences,
    as the paper has it; its search includes blocks that start at the first layer or end at the
    last. The deepest layer of the block goes first. Source: Gromov et al., arXiv 2403.17887.
    """
    check_number(gated, num_to_remove)
    totals = torch.zeros(gated.num_layers - num_to_remove + 1, dtype=torch.float64)
    for start in range(0, len(input_ids), batch_size):
        stream = residual_stream(gated, input_ids[start : start + batch_size])
        last = torch.stack([hidden[:, -1] for hidden in stream]).double().cpu()
        cosine = F.cosine_similarity(last[: len(totals)], last[num_to_remove:], dim=-1)
        totals += (cosine.clamp(-1, 1).arccos() / math.pi).sum(-1)
        progress("angular distance", min(start + batch_size, len(input_ids)), len(input_ids))
    distances = (totals / len(input_ids)).tolist()
    first = _lowest(distances, "the angular distance across the block from", 1)[0]
    return tuple(range(first + num_to_remove - 1, first - 1, -1))


def sleb(
    gated: GatedModel,
    input_ids: Tensor,
    *,
    num_to_remove: int,
    seed: int,
    batch_size: int = 4,
    progress: Progress = silent,
    on_pick: Callable[[], None] = nothing,
) -> tuple[int, ...]:
    """Greedy: each round takes the layer whose removal leaves the lowest language-model loss.

    The authors' release never tries the first and the last layer that are still there; here every
    layer is tried, and the loss decides. Source: SLEB, arXiv 2402.09025.
    """
    check_number(gated, num_to_remove)
    picks: tuple[int, ...] = ()
    for index in range(num_to_remove):
        remaining = [layer for layer in range(gated.num_layers) if layer not in picks]
        losses = {}
        for done, layer in enumerate(remaining, start=1):
            losses[layer] = gated.masked_loss(input_ids, (*picks, layer), batch_size)
            require_finite(losses[layer], f"the loss without layer {layer}", index, [])
            progress(f"SLEB, round {index + 1}/{num_to_remove}", done, len(remaining))
        picks = (*picks, min(remaining, key=lambda layer: losses[layer]))
        on_pick()
    return picks


def one_shot_loss(
    gated: GatedModel,
    input_ids: Tensor,
    *,
    num_to_remove: int,
    seed: int,
    batch_size: int = 4,
    progress: Progress = silent,
    on_pick: Callable[[], None] = nothing,
) -> tuple[int, ...]:
    """Layers by the loss that the model has without each alone, lowest first.

    Source: the perplexity criterion of Shortened-LLaMA, arXiv 2402.02834.
    """
    check_number(gated, num_to_remove)
    losses = []
    for layer in range(gated.num_layers):
        losses.append(gated.masked_loss(input_ids, (layer,), batch_size))
        progress("loss without one layer", layer + 1, gated.num_layers)
    return _lowest(losses, "the loss without", num_to_remove)


def taylor_plus(
    gated: GatedModel,
    input_ids: Tensor,
    *,
    num_to_remove: int,
    seed: int,
    batch_size: int = 4,
    progress: Progress = silent,
    on_pick: Callable[[], None] = nothing,
) -> tuple[int, ...]:
    """Layers by the sum over their parameters of |w * dL/dw|, lowest first; the ends are kept.

    L is the mean language-model loss over all of input_ids: gradients are summed over batches
    before the absolute value. The first four and the last two layers stay while any other is
    left. After that they go too, the one furthest from its own end first and of two equally far
    the deeper one, whatever their scores: 3, 2, L-2, 1, L-1, 0.

    The release counts weights only, not biases; here every parameter of the layer counts.
    Source: Taylor+ of Shortened-LLaMA, arXiv 2402.02834.
    """
    check_number(gated, num_to_remove)
    scores = taylor_scores(gated, input_ids, batch_size=batch_size, progress=progress)
    for layer, score in enumerate(scores):
        require_finite(score, f"the Taylor score of layer {layer}", 0, [])
    kept = _kept_ends(gated.num_layers)
    free = sorted((score, layer) for layer, score in enumerate(scores) if layer not in kept)
    order = [layer for _, layer in free] + kept
    return tuple(order[:num_to_remove])


def taylor_scores(
    gated: GatedModel, input_ids: Tensor, *, batch_size: int = 4, progress: Progress = silent
) -> list[float]:
    """Sum over a layer's parameters of |w * dL/dw|, for each of the L layers.

    Memory: one fp32 copy of the layers for the gradients, and what one batch's backward needs.
    """
    parameters = [list(layer.parameters()) for layer in gated.layers]
    flat = [parameter for layer in parameters for parameter in layer]
    required = [parameter.requires_grad for parameter in flat]
    totals = {id(parameter): torch.zeros_like(parameter, dtype=torch.float32) for parameter in flat}
    try:
        for parameter in flat:
            parameter.requires_grad_(True)
        with gated.masking(()), torch.enable_grad():
            for start in range(0, len(input_ids), batch_size):
                batch = input_ids[start : start + batch_size].to(gated.model.device)
                loss = language_model_loss(gated.logits(batch), batch)
                # Not backward(): the model's own .grad fields are not ours.
                gradients = torch.autograd.grad(loss, flat, allow_unused=True)
                for parameter, gradient in zip(flat, gradients, strict=True):
                    if gradient is not None:
                        share = len(batch) / len(input_ids)
                        totals[id(parameter)].add_(gradient.float(), alpha=share)
                progress("Taylor", min(start + batch_size, len(input_ids)), len(input_ids))
    finally:
        for parameter, before in zip(flat, required, strict=True):
            parameter.requires_grad_(before)
    return [
        sum(float((p.detach().float() * totals[id(p)]).abs().double().sum()) for p in layer)
        for layer in parameters
    ]


def _kept_ends(num_layers: int) -> list[int]:
    """The layers that Taylor+ keeps as long as it can, the first to be given up first."""
    from_end = {layer: layer for layer in range(min(TAYLOR_KEPT_FIRST, num_layers))}
    for distance in range(min(TAYLOR_KEPT_LAST, num_layers)):
        layer = num_layers - 1 - distance
        from_end[layer] = min(distance, from_end.get(layer, distance))
    return sorted(from_end, key=lambda layer: (-from_end[layer], -layer))


def _lowest(scores: list[float], what: str, number: int) -> tuple[int, ...]:
    """The layers of the `number` lowest scores, lowest first; of equal ones the first."""
    for layer, score in enumerate(scores):
        require_finite(score, f"{what} layer {layer}", 0, [])
    return tuple(sorted(range(len(scores)), key=lambda layer: scores[layer])[:number])


SELECTORS: dict[str, Selector] = {
    "random": random_layers,
    "last": last_layers,
    "block_influence": block_influence_order,
    "angular": angular_block,
    "sleb": sleb,
    "one_shot_loss": one_shot_loss,
    "taylor": taylor_plus,
}
# Their picks for k are the first k of their picks for n: one call serves every depth.
NESTED: frozenset[str] = frozenset(SELECTORS) - {"angular"}

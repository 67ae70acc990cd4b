"""Joint gates: all layers that go are learned at once, under a budget of k closed layers.

Each layer has a logit. A step perturbs the logits with Gumbel noise, closes the k lowest layers and
leaves the others open: the loss is that of a model that really misses k layers. Such a Gumbel top-k
is E3-Pruner's mask search too (arXiv 2511.17205); its distillation belongs to the recovery here.

The gradient, which is this project's, passes to the logits as if a gate were
sigmoid(logit / temperature - threshold), with the threshold at which the gates sum to what stays
(the LML layer of Amos et al., arXiv 1906.08707). The threshold follows the logits, so that each
layer hears whether closing it is worse than closing the others. Without that part of the gradient
the choice was worse: 16 layers, 4 and 8 gone, one seed, perplexity on 4,096 tokens of validation
text 86.3 and 117 against 77.5 and 103, and 76.9 and 102 by SLEB. Temperatures 0.5 and 1 chose the
same layers, 32 steps at four times the rate worse ones (79.3 and 104). None of these is on record.

Weights are frozen. The noise falls to none over the steps, the rate by a cosine to zero.

L layers, R of them removable, N sequences, T tokens.
"""

import math
from collections.abc import Callable, Collection

import torch
from torch import Tensor

from trsp.bench.baseline_orders import nothing, removable_layers
from trsp.pruner.gated_model import GatedModel
from trsp.pruner.losses import language_model_loss, require_finite
from trsp.pruner.progress import Progress, silent
from trsp.pruner.sampling import batch_indices

STEPS = 128
LEARNING_RATE = 0.1
TEMPERATURE = 1.0
# Of the sigmoid: so far from the threshold it is 0 or 1 to 4e-18.
_SATURATED = 40.0
_BISECTIONS = 50


def joint_gates(
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
    """The `num_to_remove` layers with the lowest logits, the lowest first; for this depth only.

    Where every removable layer goes there is nothing to learn: they come in their own order.

    Args:
        gated: entered; weights are left as they were, and so is what they require.
        input_ids: calibration tokens [N, T].
        never: layers that stay open and have no logit.
    Raises:
        UserError: as removable_layers. RunError: a loss that is not finite.
    """
    removable = removable_layers(gated, num_to_remove, never)
    if num_to_remove == len(removable):
        return removable
    device = gated.model.device
    # A few numbers, and a threshold that wants float64: on the CPU, whatever the model runs on.
    logits = torch.zeros(len(removable), requires_grad=True)
    places = torch.tensor(removable)
    optimizer = torch.optim.Adam([logits], lr=LEARNING_RATE)
    generator = torch.Generator().manual_seed(seed)
    trainable = [parameter for parameter in gated.model.parameters() if parameter.requires_grad]
    gated.model.requires_grad_(False)
    try:
        for step in range(STEPS):
            left = 1 - step / STEPS
            optimizer.param_groups[0]["lr"] = (
                LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * step / STEPS))
            )
            uniform = torch.rand(len(removable), generator=generator).clamp(1e-6, 1 - 1e-6)
            noise = -(-uniform.log()).log() * left
            gated.gated = frozenset(removable)
            gates = _straight_through(logits + noise, num_to_remove)
            gated.gates = torch.ones(gated.num_layers).index_put((places,), gates).to(device)
            sequences = batch_indices(
                step, num_sequences=len(input_ids), batch_size=batch_size, seed=seed
            )
            batch = input_ids[sequences].to(device)
            loss = language_model_loss(gated.logits(batch), batch)
            require_finite(loss.item(), "the loss of the joint gates", step, sequences)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            progress("joint gates", step + 1, STEPS)
    finally:
        gated.gates, gated.gated = None, frozenset()
        for parameter in trainable:
            parameter.requires_grad_(True)
    learned = logits.detach().tolist()
    return tuple(layer for _, layer in sorted(zip(learned, removable, strict=True)))[:num_to_remove]


def _straight_through(scores: Tensor, num_closed: int) -> Tensor:
    """Gates [R]: 0 for the lowest `num_closed` scores, else 1; with the gradient of soft_gates."""
    hard = torch.ones_like(scores).index_fill(0, scores.detach().argsort()[:num_closed], 0.0)
    soft = soft_gates(scores, num_closed)
    # Exactly 0 and 1: the parentheses leave a zero to be added.
    return hard + (soft - soft.detach())


def soft_gates(scores: Tensor, num_closed: int) -> Tensor:
    """Sigmoids [R] of the scores less a threshold, which sum to R - `num_closed`."""
    scaled = scores.double() / TEMPERATURE
    fixed = scaled.detach()
    # At the lower end all gates are nearly open, at the upper one nearly closed.
    low, high = fixed.min() - _SATURATED, fixed.max() + _SATURATED
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        too_open = torch.sigmoid(fixed - middle).sum() > len(scores) - num_closed
        low, high = torch.where(too_open, middle, low), torch.where(too_open, high, middle)
    slopes = torch.sigmoid(fixed - low)
    slopes = slopes * (1 - slopes)
    # By the implicit function theorem the threshold follows the scores, by their slopes.
    follows = (slopes * (scaled - fixed)).sum() / slopes.sum().clamp_min(1e-30)
    return torch.sigmoid(scaled - low - follows).to(scores.dtype)

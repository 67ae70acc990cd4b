"""Joint gates: all layers that go are learned at once, by a straight-through top-k of the budget.

Each layer has a logit. A step perturbs the logits with Gumbel noise, closes the k lowest layers and
leaves the others open: the loss is that of a model that really misses k layers. The gradient of a
gate passes to its logit as if the gate were sigmoid((logit - threshold) / temperature), the
threshold lying half-way between the last that goes and the first that stays. Weights are frozen.

In the manner of E3-Pruner's mask search, without its distillation, which belongs to
the recovery here. The noise falls to none over the steps, the rate by a cosine to zero.

L layers, N sequences, T tokens.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from trsp.bench.baseline_orders import check_number, nothing
from trsp.pruner.gated_model import GatedModel
from trsp.pruner.losses import language_model_loss, require_finite
from trsp.pruner.progress import Progress, silent
from trsp.pruner.sampling import batch_indices

STEPS = 128
LEARNING_RATE = 0.1
TEMPERATURE = 0.5


def joint_gates(
    gated: GatedModel,
    input_ids: Tensor,
    *,
    num_to_remove: int,
    seed: int,
    batch_size: int = 4,
    progress: Progress = silent,
    on_pick: Callable[[], None] = nothing,
) -> tuple[int, ...]:
    """The `num_to_remove` layers with the lowest logits, the lowest first; for this depth only.

    Args:
        gated: entered; weights are left as they were, and so is what they require.
        input_ids: calibration tokens [N, T].
    Raises:
        UserError: num_to_remove is not in 1..L-1. RunError: a loss that is not finite.
    """
    check_number(gated, num_to_remove)
    device = gated.model.device
    logits = torch.zeros(gated.num_layers, device=device, requires_grad=True)
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
            uniform = torch.rand(gated.num_layers, generator=generator).clamp(1e-6, 1 - 1e-6)
            noise = -(-uniform.log()).log() * left
            gated.gated = frozenset(range(gated.num_layers))
            gated.gates = _straight_through(logits + noise.to(device), num_to_remove)
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
    learned = logits.detach().cpu().tolist()
    return tuple(sorted(range(len(learned)), key=lambda layer: (learned[layer], layer)))[
        :num_to_remove
    ]


def _straight_through(scores: Tensor, num_closed: int) -> Tensor:
    """Gates [L]: 0 for the lowest `num_closed` scores, else 1; with the gradient of a sigmoid."""
    ordered = scores.detach().sort().values
    threshold = (ordered[num_closed - 1] + ordered[num_closed]) / 2
    soft = torch.sigmoid((scores - threshold) / TEMPERATURE)
    hard = (scores.detach() > threshold).to(soft.dtype)
    return hard + soft - soft.detach()

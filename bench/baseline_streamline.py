"""LLM-Streamline: one layer is trained to do what a block of layers did.

The block is contiguous and one longer than what is to be removed: its first layer stays.

L layers, N sequences, T tokens, D hidden size.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from trsp.bench.baseline_orders import block_cosines, check_number
from trsp.pruner.families import first_tensor, text_config
from trsp.pruner.gated_model import GatedModel
from trsp.pruner.losses import require_finite
from trsp.pruner.progress import Progress, silent
from trsp.pruner.sampling import batch_indices

# The paper's 2e-4 at a width of 4096, by width.
LEARNING_RATE_BY_WIDTH = 0.8
WEIGHT_DECAY = 1e-3


def streamline(
    gated: GatedModel,
    input_ids: Tensor,
    *,
    num_to_remove: int,
    steps: int,
    batch_size: int = 4,
    learning_rate: float | None = None,
    seed: int,
    progress: Progress = silent,
) -> tuple[int, ...]:
    """Train the first layer of the best block to give the block's output, in place.

    The block of num_to_remove + 1 layers has the highest mean cosine over all tokens between what
    enters and what leaves it. Its first layer starts from its own weights and learns by AdamW,
    from the dense model's inputs to the block, the mean squared error to the dense model's output
    of the block; the rate falls to 0 by a cosine. Weights are trained in fp32 and written back in
    the model's dtype at the end, so every target is the dense model's.

    The paper stores inputs and targets once and trains for epochs over them; here each step
    computes its own. Source: LLM-Streamline, arXiv 2403.19135, with a transformer layer as the
    lightweight network and the pruned layers' first as its start.

    Args:
        gated: entered; the parameters of one layer are changed in place.
        input_ids: calibration tokens [N, T].
        steps: optimizer steps of `batch_size` sequences.
        learning_rate: the first step's; None: 0.8 / D, the paper's 2e-4 at 4096.
        seed: which sequences each step sees.
    Returns:
        The layers that go, the deepest first.
    Raises:
        UserError: num_to_remove is not in 1..L-1. RunError: a loss that is not finite; no weight
            has been changed then.
    """
    check_number(gated, num_to_remove)
    cosines = block_cosines(
        gated, input_ids, length=num_to_remove + 1, batch_size=batch_size, progress=progress
    )
    first = max(range(len(cosines)), key=lambda start: cosines[start])
    last = first + num_to_remove
    layer = gated.layers[first]
    weights = {
        name: parameter.detach().float().clone().requires_grad_(True)
        for name, parameter in layer.named_parameters()
    }
    peak = learning_rate or LEARNING_RATE_BY_WIDTH / text_config(gated.model).hidden_size
    optimizer = torch.optim.AdamW(weights.values(), lr=peak, weight_decay=WEIGHT_DECAY)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = peak * 0.5 * (1 + math.cos(math.pi * step / steps))
        sequences = batch_indices(
            step, num_sequences=len(input_ids), batch_size=batch_size, seed=seed
        )
        call = _block_call(gated, input_ids[sequences], first, last)
        loss = _distance(gated, layer, weights, call)
        optimizer.zero_grad()
        with torch.enable_grad():
            loss.backward()
        require_finite(loss.item(), "the streamline loss", step, sequences)
        optimizer.step()
        progress("streamline", step + 1, steps)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.copy_(weights[name])
    return tuple(range(last, first, -1))


@dataclass(frozen=True)
class BlockCall:
    """How the dense model called the block's first layer, and what the block made of it."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor


@torch.no_grad()
def _block_call(gated: GatedModel, batch: Tensor, first: int, last: int) -> BlockCall:
    """Run the dense model over token ids [B, T]; the layers behind the block are skipped."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    outputs: list[Tensor] = []

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((args, dict(kwargs)))

    def after(_module: nn.Module, _args: object, output: object) -> None:
        outputs.append(first_tensor(output))

    handles = [
        gated.layers[first].register_forward_pre_hook(before, with_kwargs=True),
        gated.layers[last].register_forward_hook(after),
    ]
    try:
        with gated.masking(range(last + 1, gated.num_layers)):
            gated.model.base_model(input_ids=batch.to(gated.model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    (args, kwargs), output = calls[0], outputs[0]
    return BlockCall(args, kwargs, output)


def _distance(
    gated: GatedModel, layer: nn.Module, weights: dict[str, Tensor], call: BlockCall
) -> Tensor:
    """Mean squared error, fp32, of the layer with other weights to the block's output."""
    # Not a deep copy of the layer: the gated forward that it carries is bound to the original.
    with gated.masking(()), torch.enable_grad():
        cast = {
            name: weights[name].to(parameter.dtype) for name, parameter in layer.named_parameters()
        }
        output = first_tensor(functional_call(layer, cast, call.args, call.kwargs))
        return F.mse_loss(output.float(), call.output.float())

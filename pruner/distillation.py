"""The dense model as its own teacher, kept as last hidden states instead of a second model.

The student starts as the teacher, so before the first step one pass over the calibration text
stores what enters the output head; the teacher's logits are formed again from a copy of the head.
128 x 2048 tokens of a 7B model are 2 GB of hidden states against 17 GB of logits.

N sequences, T tokens, D hidden size, V vocabulary.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trsp.pruner.errors import UserError
from trsp.pruner.families import text_config
from trsp.pruner.progress import Progress, silent

_NUM_COMPARED = 256


@dataclass(frozen=True)
class Head:
    """A model's way from last hidden states to logits: cap * tanh(scale * W h / cap).

    Attributes:
        scale: the constant by which Granite and Cohere multiply what the projection gives.
        soft_cap: Gemma 2's; None where there is none.
    """

    projection: nn.Module
    scale: float
    soft_cap: float | None

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] to [..., V]."""
        logits: Tensor = self.projection(hidden)
        if self.scale != 1.0:
            logits = logits * self.scale
        cap = self.soft_cap
        return logits if cap is None else cap * torch.tanh(logits / cap)


class Teacher:
    """Logits of the model as it was when this was made, for the sequences it was made with."""

    def __init__(self, head: Head, hidden: Tensor) -> None:
        self._head = head
        self._hidden = hidden

    @torch.no_grad()
    def logits(self, sequences: list[int]) -> Tensor:
        """Logits [B, T, V] of these calibration sequences, on the head's device."""
        return self._head.logits(self.hidden(sequences))

    def hidden(self, sequences: list[int]) -> Tensor:
        """Last hidden states [B, T, D] of these calibration sequences, on the head's device."""
        return self._hidden[sequences].to(next(self._head.projection.parameters()).device)


@torch.no_grad()
def record_teacher(
    model: PreTrainedModel, input_ids: Tensor, *, batch_size: int = 1, progress: Progress = silent
) -> Teacher:
    """Run the model over [N, T] calibration tokens and keep its last hidden states [N, T, D].

    Memory: N * T * D elements of the model's dtype on the CPU, and one copy of the output head.

    Raises:
        UserError: the head does something to its logits that the copy does not reproduce.
    """
    projection = model.get_output_embeddings()
    if projection is None:
        raise UserError(f"{type(model).__name__} has no output head to distil from")
    copied = copy.deepcopy(projection).requires_grad_(False)
    head: Head | None = None
    seen: list[Tensor] = []

    def keep(_module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(args[0])

    was_training = model.training
    model.eval()
    handle = projection.register_forward_pre_hook(keep)
    stored: Tensor | None = None
    try:
        for start in range(0, len(input_ids), batch_size):
            batch = input_ids[start : start + batch_size].to(model.device)
            logits = model(input_ids=batch, use_cache=False).logits
            hidden = seen.pop()
            if stored is None:
                head = _find_head(model, copied, hidden, logits)
                stored = hidden.new_empty((*input_ids.shape, hidden.shape[-1]), device="cpu")
            stored[start : start + len(batch)] = hidden.cpu()
            progress("recording the teacher", start + len(batch), len(input_ids))
    finally:
        handle.remove()
        model.train(was_training)
    assert stored is not None, "there is at least one calibration sequence"
    assert head is not None, "found with the first sequence"
    return Teacher(head, stored)


def _find_head(
    model: PreTrainedModel, projection: nn.Module, hidden: Tensor, logits: Tensor
) -> Head:
    """The head that makes these logits of these hidden states; its scale is what they tell."""
    soft_cap = getattr(text_config(model), "final_logit_softcapping", None)
    # Some positions tell it all: logits of a whole batch take gigabytes.
    hidden = hidden.flatten(0, -2)[:_NUM_COMPARED]
    logits = logits.flatten(0, -2)[:_NUM_COMPARED]
    bare = projection(hidden).double()
    scale = 1.0
    if soft_cap is None and bool(bare.any()):
        scale = float((logits.double() * bare).sum() / bare.square().sum())
        # A model without a scale shows 1 up to the rounding of its dtype.
        scale = 1.0 if abs(scale - 1) < 1e-3 else scale
    head = Head(projection, scale, soft_cap)
    largest = float(logits.float().abs().max())
    worst = float((logits.float() - head.logits(hidden).float()).abs().max())
    if worst > 1e-2 * largest:
        raise UserError(
            f"{type(model).__name__} changes its logits after the output head (off by {worst:.3g} "
            f"of {largest:.3g}); distil from labels instead: --set transfer.distill_weight=0 "
            "--set transfer.label_weight=1"
        )
    return head

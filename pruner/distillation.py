"""The dense model as its own teacher, kept as last hidden states instead of a second model.

The student starts as the teacher, so before the first step one pass over the calibration text
stores what enters the output head; the teacher's logits are formed again from a copy of the head.
128 x 2048 tokens of a 7B model are 2 GB of hidden states against 17 GB of logits.

N sequences, T tokens, D hidden size, V vocabulary.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trsp.pruner.errors import UserError
from trsp.pruner.families import text_config
from trsp.pruner.progress import Progress, silent


class Teacher:
    """Logits of the model as it was when this was made, for the sequences it was made with."""

    def __init__(self, head: nn.Module, soft_cap: float | None, hidden: Tensor) -> None:
        self._head = head
        self._soft_cap = soft_cap
        self._hidden = hidden

    @torch.no_grad()
    def logits(self, sequences: list[int]) -> Tensor:
        """Logits [B, T, V] of these calibration sequences, on the head's device."""
        return _apply_head(self._head, self._soft_cap, self.hidden(sequences))

    def hidden(self, sequences: list[int]) -> Tensor:
        """Last hidden states [B, T, D] of these calibration sequences, on the head's device."""
        return self._hidden[sequences].to(next(self._head.parameters()).device)


def _apply_head(head: nn.Module, soft_cap: float | None, hidden: Tensor) -> Tensor:
    logits: Tensor = head(hidden)
    return logits if soft_cap is None else soft_cap * torch.tanh(logits / soft_cap)


@torch.no_grad()
def record_teacher(
    model: PreTrainedModel, input_ids: Tensor, *, batch_size: int = 1, progress: Progress = silent
) -> Teacher:
    """Run the model over [N, T] calibration tokens and keep its last hidden states [N, T, D].

    Memory: N * T * D elements of the model's dtype on the CPU, and one copy of the output head.

    Raises:
        UserError: the head does something to its logits that the copy does not reproduce.
    """
    head = model.get_output_embeddings()
    if head is None:
        raise UserError(f"{type(model).__name__} has no output head to distil from")
    soft_cap = getattr(text_config(model), "final_logit_softcapping", None)
    teacher_head = copy.deepcopy(head).requires_grad_(False)
    seen: list[Tensor] = []

    def keep(_module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(args[0])

    was_training = model.training
    model.eval()
    handle = head.register_forward_pre_hook(keep)
    stored: Tensor | None = None
    try:
        for start in range(0, len(input_ids), batch_size):
            batch = input_ids[start : start + batch_size].to(model.device)
            logits = model(input_ids=batch, use_cache=False).logits
            hidden = seen.pop()
            if stored is None:
                _require_same_logits(model, logits, _apply_head(teacher_head, soft_cap, hidden))
                stored = hidden.new_empty((*input_ids.shape, hidden.shape[-1]), device="cpu")
            stored[start : start + len(batch)] = hidden.cpu()
            progress("recording the teacher", start + len(batch), len(input_ids))
    finally:
        handle.remove()
        model.train(was_training)
    assert stored is not None, "there is at least one calibration sequence"
    return Teacher(teacher_head, soft_cap, stored)


def _require_same_logits(model: PreTrainedModel, logits: Tensor, replayed: Tensor) -> None:
    scale = float(logits.float().abs().max())
    worst = float((logits.float() - replayed.float()).abs().max())
    if worst > 1e-2 * scale:
        raise UserError(
            f"{type(model).__name__} changes its logits after the output head (off by {worst:.3g} "
            f"of {scale:.3g}); distil from labels instead: --set transfer.distill_weight=0 "
            "--set transfer.label_weight=1"
        )

"""A model's quality on held-out texts beside the dense model's, whose run is kept.

The dense model's last hidden states are stored once and its logits formed again from its head, so
each further model costs one pass.

W tokens of a window, B windows of a batch.
"""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from transformers import PreTrainedModel

from trsp.bench.token_losses import compare_predictions
from trsp.pruner.distillation import Teacher, record_teacher
from trsp.pruner.evaluation import exp_loss
from trsp.pruner.losses import require_finite
from trsp.pruner.progress import Progress, silent
from trsp.pruner.windows import Windows


class Quality(BaseModel):
    """On one text. Losses and divergence in nats a token; agreement is a share of the tokens.

    Attributes:
        kl: mean divergence of the predictions from the dense model's.
        top1_agreement: how often both find the same token most likely.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    perplexity: float
    loss: float
    kl: float
    top1_agreement: float


class DomainQuality:
    """Measure models on the windows of one text; made while `model` is still the dense one."""

    def __init__(
        self, model: PreTrainedModel, windows: Windows, progress: Progress = silent
    ) -> None:
        self.windows = windows
        self._batches = list(windows.batches())
        # The last window may be shorter: a run, and a copy of the head, for each width there is.
        self._teachers: dict[int, Teacher] = {}
        for width in dict.fromkeys(batch.shape[1] for batch, _ in self._batches):
            alike = torch.cat([batch for batch, _ in self._batches if batch.shape[1] == width])
            self._teachers[width] = record_teacher(
                model, alike, batch_size=windows.batch_size, progress=progress
            )

    def protocol(self) -> dict[str, Any]:
        """What the perplexities hold for."""
        return asdict(self.windows.protocol)

    @torch.no_grad()
    def measure(self, logits: Callable[[Tensor], Tensor], progress: Progress = silent) -> Quality:
        """Quality of a model given as a function from token ids [B, W] to logits [B, W, V].

        Raises:
            RunError: a loss is not finite.
        """
        sums = dict.fromkeys(("loss", "kl", "same"), 0.0)
        count = 0
        seen = dict.fromkeys(self._teachers, 0)
        for number, (batch, labels) in enumerate(self._batches):
            width, begin = batch.shape[1], seen[batch.shape[1]]
            seen[width] += len(batch)
            ours = self._teachers[width].logits(list(range(begin, seen[width])))[:, :-1]
            theirs = logits(batch)[:, :-1]
            targets = labels[:, 1:].to(theirs.device)
            # Window by window: fp32 log-probabilities of a whole batch would be large.
            for row in range(len(batch)):
                (places,) = torch.nonzero(targets[row] >= 0, as_tuple=True)
                found = compare_predictions(
                    ours[row, places], theirs[row, places], targets[row, places]
                )
                sums["loss"] += float(found["pruned"].sum())
                sums["kl"] += float(found["kl"].sum())
                sums["same"] += float((found["dense_says"] == found["pruned_says"]).sum())
                count += len(places)
            progress("evaluating", number + 1, len(self._batches))
        loss = sums["loss"] / count
        require_finite(loss, "the loss on held-out text", 0, [])
        return Quality(
            perplexity=exp_loss(loss),
            loss=loss,
            kl=max(0.0, sums["kl"] / count),
            top1_agreement=sums["same"] / count,
        )

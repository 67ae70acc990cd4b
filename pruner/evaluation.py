"""Perplexity on local text, with the protocol that it holds for; see `windows`.

W: tokens of a window, B: windows of a batch, V: vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trsp.pruner.errors import RunError
from trsp.pruner.progress import Progress, silent
from trsp.pruner.windows import Protocol, Windows, cut_windows

# Logits are turned to fp32 for this many tokens at a time.
_CHUNK_TOKENS = 512


@dataclass(frozen=True)
class Perplexity:
    """exp(loss), the loss being the mean over `protocol.num_tokens` tokens in nats."""

    perplexity: float
    loss: float
    protocol: Protocol

    def to_document(self) -> dict[str, Any]:
        """Return the fields as a JSON-ready mapping."""
        return {"schema_version": 1, **asdict(self)}


@torch.no_grad()
def evaluate_perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    paths: Sequence[str | Path],
    *,
    progress: Progress = silent,
    **settings: Any,
) -> Perplexity:
    """Measure the perplexity of a causal language model on local text.

    Cross-entropy is taken per token in fp32 and summed in float64; the cache is off. The model runs
    where it is and in its dtype; its training mode is restored.

    Args:
        paths: text files and folders, as read_texts takes them.
        progress: task "evaluating", in windows; "reading text" before.
        settings: of `cut_windows`: window, stride, add_bos, max_tokens, batch_size, text_field.
    Raises:
        UserError: as cut_windows.
        RunError: the loss is not finite.
    """
    windows = cut_windows(model, tokenizer, paths, progress=progress, **settings)
    was_training = model.training
    model.eval()
    try:
        loss = _score(model, windows, progress)
    finally:
        model.train(was_training)
    return Perplexity(perplexity=exp_loss(loss), loss=loss, protocol=windows.protocol)


def _score(model: PreTrainedModel, windows: Windows, progress: Progress) -> float:
    """Mean loss over the scored tokens of the stream."""
    total = 0.0
    num_done = 0
    for batch, labels in windows.batches():
        progress("evaluating", num_done, len(windows))
        logits = model(input_ids=batch.to(model.device), use_cache=False).logits
        batch_loss = _summed_loss(logits[:, :-1], labels[:, 1:].to(logits.device))
        if not math.isfinite(batch_loss):
            raise RunError(
                f"the loss is {batch_loss} in windows {num_done} to {num_done + len(batch) - 1}"
                f" of the text ({windows.stride} tokens apart): the model or its dtype is broken"
            )
        total += batch_loss
        num_done += len(batch)
    progress("evaluating", len(windows), len(windows))
    return total / windows.protocol.num_tokens


def _summed_loss(logits: Tensor, labels: Tensor) -> float:
    """Sum over the labels [B, W] that are not -100, in nats; logits [B, W, V]."""
    total = 0.0
    # Row by row: a row's logits are split without a copy.
    for row_logits, row_labels in zip(logits, labels, strict=True):
        parts = zip(row_logits.split(_CHUNK_TOKENS), row_labels.split(_CHUNK_TOKENS), strict=True)
        for part_logits, part_labels in parts:
            losses = F.cross_entropy(part_logits.float(), part_labels, reduction="none")
            total += losses.cpu().double().sum().item()
    return total


def exp_loss(loss: float) -> float:
    """Perplexity of a loss in nats.   RunError: it has none."""
    try:
        return math.exp(loss)
    except OverflowError as error:
        raise RunError(
            f"a loss of {loss} nats per token has no finite perplexity: the model is broken"
        ) from error

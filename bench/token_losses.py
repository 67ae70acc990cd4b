"""Two models on the same tokens: what each token costs them, and where they would say another.

N scored tokens, B windows of W tokens in a batch, V the vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from trsp.pruner.errors import RunError
from trsp.pruner.progress import Progress, silent
from trsp.pruner.windows import Windows

# Logits are turned to fp32 for this many tokens at a time.
_CHUNK_TOKENS = 512


@dataclass(frozen=True)
class TokenLosses:
    """One row for each scored token, in the order of the text; arrays [N].

    Attributes:
        token: its id.   window: the number of the window that it was scored in.
        offset: its place in that window.
        dense, pruned: loss in nats.   kl: of the pruned prediction from the dense one, in nats.
        dense_says, pruned_says: the token that the model finds most likely.
    """

    token: NDArray[np.int64]
    window: NDArray[np.int64]
    offset: NDArray[np.int64]
    dense: NDArray[np.float64]
    pruned: NDArray[np.float64]
    kl: NDArray[np.float64]
    dense_says: NDArray[np.int64]
    pruned_says: NDArray[np.int64]

    @property
    def increase(self) -> NDArray[np.float64]:
        """How much more a token costs the pruned model, in nats."""
        return self.pruned - self.dense


@torch.no_grad()
def compare_tokens(
    dense: PreTrainedModel, pruned: PreTrainedModel, windows: Windows, progress: Progress = silent
) -> TokenLosses:
    """Run both models over the windows. Losses are taken in fp32, whatever the models' dtype.

    Args:
        dense, pruned: on one device, in eval mode, with one vocabulary.
        progress: task "comparing", in windows.
    Raises:
        RunError: a loss is not finite.
    """
    rows: dict[str, list[Tensor]] = {}
    done = 0
    for batch, labels in windows.batches():
        progress("comparing", done, len(windows))
        inputs = batch.to(dense.device)
        ours, theirs = (
            model(input_ids=inputs, use_cache=False).logits[:, :-1] for model in (dense, pruned)
        )
        targets = labels[:, 1:].to(inputs.device)
        for number in range(len(batch)):
            (places,) = torch.nonzero(targets[number] >= 0, as_tuple=True)
            for part in places.split(_CHUNK_TOKENS):
                found = compare_predictions(
                    ours[number, part], theirs[number, part], targets[number, part]
                )
                found |= {"window": torch.full_like(part, done + number), "offset": part + 1}
                for name, values in found.items():
                    rows.setdefault(name, []).append(values.cpu())
        done += len(batch)
    progress("comparing", len(windows), len(windows))
    columns: dict[str, Any] = {name: torch.cat(parts).numpy() for name, parts in rows.items()}
    told = {"dense": "dense model's loss", "pruned": "pruned model's loss", "kl": "divergence"}
    for name, what in told.items():
        if not np.isfinite(columns[name]).all():
            first = int(columns["window"][~np.isfinite(columns[name])][0])
            raise RunError(
                f"the {what} is not finite in window {first} of the text: a model or its dtype is "
                "broken, or its head holds an infinity"
            )
    return TokenLosses(**columns)


def compare_predictions(ours: Tensor, theirs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Losses, divergence and choices for logits [n, V] of both models and targets [n], each [n]."""
    log_p, log_q = F.log_softmax(ours.float(), -1), F.log_softmax(theirs.float(), -1)
    return {
        "token": targets,
        "dense": F.nll_loss(log_p, targets, reduction="none").double(),
        "pruned": F.nll_loss(log_q, targets, reduction="none").double(),
        "kl": F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).double(),
        "dense_says": log_p.argmax(-1),
        "pruned_says": log_q.argmax(-1),
    }

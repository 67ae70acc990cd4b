"""The part of the calibration set that no stage trains on, and the losses that are measured on it.

N calibration sequences, M of them held out, T tokens.
"""

import math
from dataclasses import dataclass, replace
from statistics import fmean, stdev

import torch
import torch.nn.functional as F
from torch import Tensor

from trsp.pruner.calibration import CalibrationError, CalibrationSet
from trsp.pruner.gated_model import GatedModel
from trsp.pruner.losses import require_finite
from trsp.pruner.token_ids import hash_ids

MIN_HELD_OUT = 4  # fewer give no standard error worth the name
MIN_TRAINED = 4  # two for each half whose orders of layers are compared


@dataclass(frozen=True)
class SplitCalibration:
    """What is trained on, a calibration set of its own, and what is measured on: tokens [M, T]."""

    training: CalibrationSet
    held_out: Tensor


def count_held_out(count: int, part: float) -> int:
    """How many of `count` sequences are held out as `part`, at least MIN_HELD_OUT.

    Raises:
        CalibrationError: fewer than MIN_TRAINED would be left.
    """
    num_held_out = max(MIN_HELD_OUT, round(part * count))
    if count - num_held_out < MIN_TRAINED:
        raise CalibrationError(
            f"{count} calibration sequences, {num_held_out} of them held out, leave fewer than "
            f"{MIN_TRAINED} to train on; give more (--set calibration.num_sequences=N) or hold out "
            "less (--set auto.held_out=X)"
        )
    return num_held_out


def hold_out(calibration: CalibrationSet, part: float, seed: int) -> SplitCalibration:
    """Hold out `part` of the sequences, drawn by `seed`; how many and errors as count_held_out."""
    count = len(calibration.input_ids)
    num_held_out = count_held_out(count, part)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    held_out, rest = order[:num_held_out].sort().values, order[num_held_out:].sort().values
    trained = calibration.input_ids[rest]
    training = replace(calibration, input_ids=trained, sha256=hash_ids(trained))
    return SplitCalibration(training, calibration.input_ids[held_out])


@dataclass(frozen=True)
class HeldOutLoss:
    """Language-model loss of each held-out sequence, in nats."""

    each: tuple[float, ...]

    @property
    def mean(self) -> float:
        return fmean(self.each)

    def above(self, other: "HeldOutLoss") -> tuple[float, float]:
        """How much higher than `other`, in nats, and that difference's standard error.

        The differences are taken sequence by sequence: what makes a text hard is in both.
        """
        pairs = zip(self.each, other.each, strict=True)
        differences = [mine - others for mine, others in pairs]
        return fmean(differences), stdev(differences) / math.sqrt(len(differences))

    def ratio(self, dense: "HeldOutLoss") -> float:
        """Perplexity over the dense model's."""
        return math.exp(self.above(dense)[0])


@torch.no_grad()
def held_out_loss(
    gated: GatedModel, held_out: Tensor, removed: tuple[int, ...], batch_size: int
) -> HeldOutLoss:
    """The loss of each of the sequences [M, T] with the layers `removed` skipped.

    Raises:
        RunError: it is not finite.
    """
    each: list[float] = []
    with gated.masking(removed):
        for start in range(0, len(held_out), batch_size):
            batch = held_out[start : start + batch_size].to(gated.model.device)
            logits = gated.logits(batch)[:, :-1].float()
            losses = F.cross_entropy(logits.transpose(1, 2), batch[:, 1:], reduction="none")
            each += losses.mean(dim=1).tolist()
    for sequence, loss in enumerate(each):
        require_finite(loss, "the held-out loss", 0, [sequence])
    return HeldOutLoss(tuple(each))

"""Closed-form transfer: one projection before each run of chosen layers takes over their work.

Layers a..b go and layer a - 1 stays. In the dense model, with h what enters the last projection W
of layer a - 1's MLP, and x_a and x_b+1 the residual stream before and behind the run,

    W <- W + r D,   D = argmin  sum over tokens ||D h - (x_b+1 - x_a)||^2  +  ridge * s * ||D||^2

with s the mean squared entry of h times the number of tokens, so that ridge has no unit. All runs
are fitted on one pass of the unchanged model. Each is fitted as if the others stayed, so r, the
relaxation, is below 1: measured, the whole of D goes too far (default_relaxation).

Related: ReplaceMe (arXiv 2505.02819) fits a map of the MLP's output, D = (T - I) W, for one
contiguous block. Measured on the 16-layer model of the README, 8 layers, books/test, one seed, r
1: perplexity 154 as it is here; 158 with a map of the MLP's output; 169 with that map and each run
fitted behind the ones already cut, which corrects their errors too; 184 without.

N sequences of T tokens, D hidden size, I the width that enters the projection.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trsp.pruner.activations import (
    Projection,
    last_projection,
    matrix_of,
    residual_stream,
    watching,
)
from trsp.pruner.gated_model import GatedModel
from trsp.pruner.losses import require_finite
from trsp.pruner.progress import Progress, silent


@dataclass(frozen=True)
class Refit:
    """One run of removed layers, first..last, and how much of its work was taken over.

    Attributes:
        explained: part of the run's squared update, over all tokens, that the refitted projection
            gives; None where nothing could be refitted.
        reason: why not.
    """

    first: int
    last: int
    explained: float | None
    reason: str | None = None


@torch.no_grad()
def refit(
    gated: GatedModel,
    input_ids: Tensor,
    dropped: tuple[int, ...],
    *,
    ridge: float,
    relaxation: float,
    batch_size: int,
    progress: Progress = silent,
) -> tuple[Refit, ...]:
    """Change, in place, the projection before each run of the layers `dropped`.

    Cost: one forward pass over the text. Memory, for every run: I * I + I * D values of 8 bytes on
    the model's device.

    Args:
        gated: entered, with the dense model in it.
        input_ids: calibration tokens [N, T].
        ridge: at least 0; above 0 where there may be fewer tokens than I.
        relaxation: the part of the solution by which a projection is changed.
    Returns:
        One entry a run, from the first layer up. A run that begins at layer 0, or behind an MLP
        that does not end in a linear layer, is left without and says so.
    Raises:
        RunError: a solution that is not finite.
    """
    fits: list[_LeastSquares] = []
    found: dict[int, Refit] = {}
    for first, last in runs_of(dropped):
        if first == 0:
            found[first] = Refit(first, last, None, "no layer stands before it")
            continue
        projection = last_projection(gated, first - 1, input_ids[:1])
        if projection is None:
            reason = f"layer {first - 1}'s MLP does not end in a linear layer"
            found[first] = Refit(first, last, None, reason)
            continue
        fits.append(_LeastSquares(first, last, projection))
    if fits:
        for start in range(0, len(input_ids), batch_size):
            with watching([fit.projection for fit in fits]) as seen:
                stream = residual_stream(gated, input_ids[start : start + batch_size])
            for fit in fits:
                fit.add(seen.inputs[fit.projection], stream[fit.first], stream[fit.last + 1])
            progress("refitting", min(start + batch_size, len(input_ids)), len(input_ids))
    # Only now: all of them are fitted to the model as it came.
    for fit in fits:
        found[fit.first] = Refit(fit.first, fit.last, fit.solve(ridge, relaxation))
    return tuple(found[first] for first in sorted(found))


def default_relaxation(steps: int) -> float:
    """Of a refit that so many training steps follow.

    Measured, perplexity on held-out text that is in no table of the README, one seed, relaxation
    1, 0.75, 0.5, 0.25: 10 of 20 layers gone, the refit alone 91.4, 89.8, 89.8, with 64 steps behind
    it 79.8, 79.1, 78.6, 78.6, and 79.5 without a refit; 8 of 16 layers gone, 94.8, 95.2, 97.2, with
    steps 85.6, 85.4, 85.2, 85.4, and 86.3 without. A ridge of 0.1 or 1 at the whole change is no
    substitute: 93.0, 97.9 alone and 79.8, 79.6 trained on the first.
    """
    return 0.5 if steps else 0.75


def runs_of(layers: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Maximal runs of neighbouring layers as (first, last), ascending."""
    runs: list[tuple[int, int]] = []
    for layer in sorted(layers):
        if runs and runs[-1][1] == layer - 1:
            runs[-1] = (runs[-1][0], layer)
        else:
            runs.append((layer, layer))
    return tuple(runs)


def refit_warnings(refits: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each run whose work no projection could take over; from a transfer's record."""
    return [
        f"nothing takes over the work of layers {entry['first']} to {entry['last']} before the "
        f"training: {entry['reason']}"
        for entry in refits
        if entry["reason"] is not None
    ]


class _LeastSquares:
    """Sums of one run's normal equations, and their solution."""

    def __init__(self, first: int, last: int, projection: Projection) -> None:
        self.first, self.last, self.projection = first, last, projection
        num_outputs, num_inputs = matrix_of(projection).shape
        # A bias is one more input that is always 1.
        width = num_inputs + (projection.bias is not None)
        place = {"dtype": torch.float64, "device": projection.weight.device}
        self._gram = torch.zeros(width, width, **place)  # type: ignore[call-overload]
        self._moments = torch.zeros(width, num_outputs, **place)  # type: ignore[call-overload]
        self._energy = 0.0

    def add(self, h: Tensor, before: Tensor, behind: Tensor) -> None:
        """Take in a batch: h [B, T, I], the stream before and behind the run [B, T, D]."""
        inputs = h.flatten(0, -2).float()
        if self.projection.bias is not None:
            inputs = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], dim=-1)
        update = (behind.float() - before.float()).flatten(0, -2)
        # The caller's autocast is for the forward pass, not for these sums.
        with torch.autocast(inputs.device.type, enabled=False):
            self._gram += (inputs.T @ inputs).double()
            self._moments += (inputs.T @ update).double()
        self._energy += float(update.double().square().sum())

    def solve(self, ridge: float, relaxation: float) -> float:
        """Change the projection; the part of the update that the change explains."""
        # An MLP that gives nothing but zeros leaves nothing to solve.
        damping = max(ridge * float(self._gram.diagonal().mean()), 1e-30)
        damped = self._gram + damping * torch.eye(
            len(self._gram), dtype=torch.float64, device=self._gram.device
        )
        change = relaxation * torch.linalg.solve(damped, self._moments)
        error = self._energy - float((change * (2 * self._moments - self._gram @ change)).sum())
        require_finite(error, f"the projection refitted for layers {self.first} on", 0, [])
        matrix = matrix_of(self.projection)
        width = matrix.shape[1]
        matrix.copy_(matrix.double() + change[:width].T)
        if self.projection.bias is not None:
            self.projection.bias.copy_(self.projection.bias.double() + change[width])
        return 1.0 - error / self._energy if self._energy > 0 else 1.0

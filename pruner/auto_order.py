"""How far an order of layers can be trusted: whether two halves of the text order them alike.

N sequences, T tokens.
"""

from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedModel

from trsp.pruner.auto_record import StabilityTrial
from trsp.pruner.gated_model import GatedModel
from trsp.pruner.losses import require_finite
from trsp.pruner.progress import Progress

SAME_CORRELATION = 0.02  # correlations closer than this are a tie
NOISY_CORRELATION = 0.5


def rank_correlation(first: list[float], second: list[float]) -> float:
    """Spearman's, of two scores of the same layers; 0 where one of them orders nothing."""
    from scipy.stats import spearmanr

    if len(set(first)) < 2 or len(set(second)) < 2:
        return 0.0
    return float(spearmanr(first, second).statistic)


def choose_stable(trials: list[StabilityTrial], own: float) -> StabilityTrial:
    """The highest correlation; the recipe's `own` lambda1 where it is within SAME_CORRELATION."""
    best = max(trials, key=lambda trial: trial.correlation)
    for trial in trials:
        if trial.lambda1 == own and best.correlation - trial.correlation <= SAME_CORRELATION:
            return trial
    return best


def losses_without(
    model: PreTrainedModel,
    input_ids: Tensor,
    layers: Sequence[int],
    batch_size: int,
    progress: Progress,
) -> list[float]:
    """The language-model loss on tokens [N, T] without each of `layers` alone, in nats.

    Raises:
        RunError: one is not finite.
    """
    losses: list[float] = []
    with GatedModel(model, fuse_norms="off") as gated:
        for layer in layers:
            losses.append(gated.masked_loss(input_ids, (layer,), batch_size))
            require_finite(losses[-1], f"the loss without layer {layer}", 0, [layer])
            progress("losses without", len(losses), len(layers))
    return losses


def noise_warning(correlation: float, remedy: str) -> list[str]:
    """What to say of an order that two halves of the text do not share; nothing of another."""
    if correlation >= NOISY_CORRELATION:
        return []
    return [
        f"two halves of the text order the layers with a rank correlation of {correlation:.2f}: "
        f"the order is mostly noise: more text or more {remedy}"
    ]

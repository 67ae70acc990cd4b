"""The two losses both stages are made of, and the check that stops a run on a broken one.

B batch, T tokens, V vocabulary.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from trsp.pruner.errors import RunError


def language_model_loss(logits: Tensor, input_ids: Tensor) -> Tensor:
    """Mean next-token cross-entropy in nats, fp32; logits [B, T, V], input_ids [B, T]."""
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), input_ids[:, 1:].flatten())


def distillation_loss(
    logits: Tensor, teacher_logits: Tensor, temperature: float, *, by_entropy: bool = False
) -> Tensor:
    """Mean over all tokens of KL(teacher || student) in nats, times temperature squared.

    Both [B, T, V]; computed in fp32; no gradient reaches the teacher. Source: Hinton et al.,
    arXiv 1503.02531.

    Args:
        by_entropy: weigh each token by the teacher's entropy there, the weights' mean being 1: what
            the teacher is sure of, the student mostly knows (as EA-KD does, arXiv 2311.13621).
    """
    student = torch.log_softmax(logits.float().flatten(0, 1) / temperature, dim=-1)
    teacher = torch.log_softmax(teacher_logits.detach().float().flatten(0, 1) / temperature, dim=-1)
    if by_entropy:
        each = F.kl_div(student, teacher, log_target=True, reduction="none").sum(-1)
        entropy = -(teacher.exp() * teacher).sum(-1)
        divergence = (each * entropy / entropy.mean().clamp_min(1e-6)).sum()
    else:
        divergence = F.kl_div(student, teacher, log_target=True, reduction="sum")
    return divergence * (temperature**2 / student.shape[0])


def hidden_state_loss(hidden: Tensor, teacher_hidden: Tensor) -> Tensor:
    """Mean over tokens of ||h - h_t||^2 / ||h_t||^2, fp32; both [B, T, D], none of a token zero."""
    target = teacher_hidden.detach().float()
    distance = (hidden.float() - target).square().sum(-1)
    return (distance / target.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)).mean()


def require_finite(value: float, what: str, step: int, sequences: list[int]) -> None:
    """Stop the run on a NaN or infinity, saying where it came from.

    Raises:
        RunError: names the quantity, the step and the calibration sequences of its batch.
    """
    if not math.isfinite(value):
        raise RunError(
            f"{what} is {value} at step {step}, calibration sequences {sequences}: stopped before "
            "any weight was changed by it; look at that text and those weights, or lower the "
            "learning rate"
        )

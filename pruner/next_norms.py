"""The RMSNorm that reads a decoder layer's output first: the next layer's own, or the final one.

Found on a probe, not by name: a norm reads the very tensor that a layer returns, and on it, with
other weights than its own, it computes one of the two known conventions bit for bit.

D hidden size, L layers.
"""

from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from trsp.kernels.arguments import Convention
from trsp.kernels.launch import MAX_ROW
from trsp.kernels.reference import rmsnorm
from trsp.pruner.families import decoder_layers, first_tensor, run_probe


@dataclass(frozen=True)
class NextNorm:
    """A norm that can be computed with the gate before it."""

    module: nn.Module
    eps: float
    convention: Convention

    @property
    def weight(self) -> Tensor:
        """[D], learnable."""
        return self.module.get_parameter("weight")


@torch.no_grad()
def find_next_norms(model: PreTrainedModel) -> tuple[NextNorm | None, ...]:
    """For each layer, then for the end of the stack, the norm that reads its input; L + 1 entries.

    None where nothing reads that tensor through an RMSNorm of a known convention, or where a row
    is too long for one pass. Runs one forward pass on at most eight tokens in eval mode.
    """
    layers = decoder_layers(model)
    boundaries: dict[int, Tensor] = {}
    calls: list[tuple[nn.Module, Tensor]] = []
    handles = []

    def watch_layer(index: int) -> None:
        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            boundaries[index] = args[0] if args else kwargs["hidden_states"]

        handles.append(layers[index].register_forward_pre_hook(before, with_kwargs=True))

    def after_last(_: nn.Module, _args: Any, output: Any) -> None:
        boundaries[len(layers)] = first_tensor(output)

    def after_norm(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        if len(args) == 1 and not kwargs and isinstance(output, Tensor):
            calls.append((module, args[0]))

    for index in range(len(layers)):
        watch_layer(index)
    handles.append(layers[-1].register_forward_hook(after_last))
    for module in model.modules():
        if _eps_of(module) is not None:
            handles.append(module.register_forward_hook(after_norm, with_kwargs=True))
    run_probe(model, handles)
    readers: dict[int, NextNorm] = {}
    for index, boundary in boundaries.items():
        for module, read in calls:
            norm = _match_norm(module, read) if read is boundary else None
            if norm is not None:
                readers.setdefault(index, norm)
    return tuple(readers.get(index) for index in range(len(layers) + 1))


def _eps_of(module: nn.Module) -> float | None:
    """The eps of what looks like an RMSNorm: one weight vector and nothing else."""
    parameters = dict(module.named_parameters())
    if set(parameters) != {"weight"} or parameters["weight"].ndim != 1:
        return None
    for name in ("variance_epsilon", "eps"):
        eps = getattr(module, name, None)
        if isinstance(eps, float) and eps > 0:
            return eps
    return None


def _match_norm(module: nn.Module, read: Tensor) -> NextNorm | None:
    eps, own = _eps_of(module), module.get_parameter("weight")
    assert eps is not None
    if own.shape != read.shape[-1:] or own.dtype != read.dtype or len(own) > MAX_ROW:
        return None
    # Its own weight may be all ones or zeros, where different formulas agree.
    weight = torch.linspace(-1, 2, len(own), dtype=own.dtype, device=own.device)
    # The small rows are of eps's own size, so that another eps shows.
    small = read * (eps**0.5 / read.abs().mean()).to(read.dtype)
    for convention in get_args(Convention):
        if all(
            torch.equal(
                rmsnorm(z, weight, eps, convention)[0],
                functional_call(module, {"weight": weight}, (z,)),
            )
            for z in (read, small)
        ):
            return NextNorm(module, eps, convention)
    return None

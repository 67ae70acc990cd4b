"""What flows through a model's decoder layers: the residual stream, and what its modules give.

T tokens, D hidden size, L layers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from trsp.pruner.families import first_tensor
from trsp.pruner.gated_model import GatedModel

# What may end an MLP: y = x @ W.T + b, or, in GPT-2's, y = x @ W + b.
Projection = nn.Linear | Conv1D


@torch.no_grad()
def residual_stream(gated: GatedModel, batch: Tensor) -> list[Tensor]:
    """What enters each layer of the dense model, then what leaves the last: L + 1 of [B, T, D].

    The last is before the final norm. The output head does not run.
    """
    stream: list[Tensor] = []

    def before(_module: object, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        stream.append(args[0] if args else kwargs["hidden_states"])

    def after(_module: object, _args: object, output: object) -> None:
        stream.append(first_tensor(output))

    handles = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in gated.layers]
    handles.append(gated.layers[-1].register_forward_hook(after))
    try:
        with gated.masking(()):
            gated.model.base_model(input_ids=batch.to(gated.model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return stream


@dataclass
class Watched:
    """What watched modules got and gave in the last forward pass."""

    inputs: dict[nn.Module, Tensor]
    outputs: dict[nn.Module, Any]


@contextmanager
def watching(modules: list[nn.Module]) -> Iterator[Watched]:
    """Keep the first input and the main output of these modules while the block runs."""
    seen = Watched({}, {})

    def keep(module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        if args:
            seen.inputs[module] = args[0]
        seen.outputs[module] = first_tensor(output)

    handles = [module.register_forward_hook(keep) for module in modules]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def matrix_of(projection: Projection) -> Tensor:
    """The weight as [out, in], a view to read and to write; Conv1D keeps it as [in, out]."""
    weight: Tensor = projection.weight
    return weight.T if isinstance(projection, Conv1D) else weight


def last_projection(gated: GatedModel, index: int, batch: Tensor) -> Projection | None:
    """The linear layer whose output is what layer `index`'s MLP branch adds to the residual stream.

    Found by running the dense model on `batch` [B, T]. None where no linear layer makes the very
    output that enters the stream, as when a norm, a gate or experts stand between. Dropout is the
    identity here and may stand there.
    """
    branches = gated.branches[index]
    if branches is None:
        return None
    branch = gated.layers[index].get_submodule(branches.mlp)
    linears = [module for module in branch.modules() if isinstance(module, Projection)]
    with watching([branch, *linears]) as seen:
        residual_stream(gated, batch)
    whole = seen.outputs[branch]
    for linear in reversed(linears):
        # An expert that no token chose has not run.
        output = seen.outputs.get(linear)
        if output is not None and _same_rows(output, whole):
            return linear
    return None


def _same_rows(output: Tensor, whole: Tensor) -> bool:
    return output.numel() == whole.numel() and torch.equal(output.reshape(whole.shape), whole)

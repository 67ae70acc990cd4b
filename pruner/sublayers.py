"""One branch of a decoder layer left out: x + attention(x) alone, or x + mlp(x) alone.

For layers that are sequential: y = (x + a) + m, where m is computed from x + a. Where both branches
read x side by side the branches could be masked as well, but nothing serves such a model.

The branch runs and adds zeros in place of its output. `x + 0` is x, so the rest of the model gets
bit for bit what a layer without the branch would give.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from trsp.pruner.errors import UserError
from trsp.pruner.families import (
    Branches,
    decoder_layers,
    find_branches,
    first_tensor,
    run_probe,
)
from trsp.pruner.gated_model import GatedModel
from trsp.pruner.layer_map import SUBLAYERS, Removal


def find_sublayers(model: PreTrainedModel) -> tuple[Branches, ...]:
    """The two branches of every decoder layer, each of which can go without the other.

    Runs two forward passes on at most eight tokens; in the second one each layer runs twice.
    Raises:
        UserError: a layer is not the sum of its input and two branches of its own, or its MLP does
            not read what its attention added.
    """
    layers = decoder_layers(model)
    found = find_branches(model)
    sublayers = []
    for index, (layer, branches) in enumerate(zip(layers, found, strict=True)):
        if branches is None:
            raise UserError(
                f"layer {index} ({type(layer).__name__}) is not its input plus two branches of its "
                "own: they cannot be taken out alone; remove whole layers"
            )
        sublayers.append(branches)
    for index, reads in enumerate(_mlp_reads_attention(model, layers, sublayers)):
        if not reads:
            raise UserError(
                f"layer {index} ({type(layers[index]).__name__}) computes attention and MLP side "
                "by side from the same input: they cannot be taken out alone; remove whole layers"
            )
    return tuple(sublayers)


@contextmanager
def masking_sublayers(
    model: PreTrainedModel, sublayers: Sequence[Branches], missing: Iterable[tuple[int, str]]
) -> Iterator[None]:
    """Leave out these branches, (layer, "attention" or "mlp"), inside the block.

    Args:
        sublayers: what `find_sublayers` found.
    Raises:
        UserError: no such layer or branch.
    """
    layers = decoder_layers(model)
    handles: list[RemovableHandle] = []
    try:
        for layer, sublayer in missing:
            if not 0 <= layer < len(layers) or sublayer not in SUBLAYERS:
                raise UserError(
                    f"the {sublayer} of layer {layer} is to go; expected attention or mlp of a "
                    f"layer 0 to {len(layers) - 1}"
                )
            name: str = getattr(sublayers[layer], sublayer)
            handles.append(_mask(layers[layer].get_submodule(name)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def removal_loss(
    gated: GatedModel,
    sublayers: Sequence[Branches],
    input_ids: Tensor,
    removals: Iterable[Removal],
    batch_size: int,
) -> float:
    """Language-model loss in nats on tokens [N, T] without these layers and single branches.

    Raises:
        UserError: no such layer or branch.
    """
    whole, parts = [], []
    for removal in removals:
        if isinstance(removal, tuple):
            parts.append(removal)
        else:
            whole.append(removal)
    with masking_sublayers(gated.model, sublayers, parts):
        return gated.masked_loss(input_ids, whole, batch_size)


def _mask(branch: nn.Module) -> RemovableHandle:
    """Zeros in place of the branch's output; what it returns beside it stays."""

    def zero(_module: nn.Module, _args: Any, output: Any) -> Any:
        zeros = torch.zeros_like(first_tensor(output))
        return (zeros, *output[1:]) if isinstance(output, tuple) else zeros

    # First of all hooks: whoever watches the branch sees what enters the residual stream.
    return branch.register_forward_hook(zero, prepend=True)


def _mlp_reads_attention(
    model: PreTrainedModel, layers: nn.ModuleList, sublayers: Sequence[Branches]
) -> list[bool]:
    """Whether each layer's MLP branch changes when its attention adds nothing."""
    outputs: list[list[Tensor]] = [[] for _ in layers]
    reads = [False] * len(layers)
    running_again = False

    def keep(index: int) -> Callable[..., None]:
        def after_mlp(_module: nn.Module, _args: Any, output: Any) -> None:
            outputs[index].append(first_tensor(output))

        return after_mlp

    def run_again(index: int) -> Callable[..., None]:
        def after(layer: nn.Module, args: Any, kwargs: dict[str, Any], _output: Any) -> None:
            nonlocal running_again
            if running_again:
                return
            running_again = True
            handle = _mask(layer.get_submodule(sublayers[index].attention))
            try:
                layer(*args, **kwargs)
            finally:
                handle.remove()
                running_again = False
            with_attention, without = outputs[index]
            reads[index] = not torch.equal(with_attention, without)

        return after

    hooks = []
    for index, (layer, branches) in enumerate(zip(layers, sublayers, strict=True)):
        hooks.append(layer.get_submodule(branches.mlp).register_forward_hook(keep(index)))
        hooks.append(layer.register_forward_hook(run_again(index), with_kwargs=True))
    run_probe(model, hooks)
    return reads

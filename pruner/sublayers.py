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
            handles.append(_replace_output(layers[layer].get_submodule(name), torch.zeros_like))
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


def _replace_output(branch: nn.Module, change: Callable[[Tensor], Tensor]) -> RemovableHandle:
    """Another main output of the branch; what it returns beside it stays."""

    def replace(_module: nn.Module, _args: Any, output: Any) -> Any:
        changed = change(first_tensor(output))
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    # First of all hooks: whoever watches the branch sees what enters the residual stream.
    return branch.register_forward_hook(replace, prepend=True)


def _ramp(output: Tensor) -> Tensor:
    """The output and something that no norm takes away again, also where the output is 0."""
    size = output.shape[-1]
    return output + torch.linspace(-1, 1, size, device=output.device, dtype=output.dtype)


def _mlp_reads_attention(
    model: PreTrainedModel, layers: nn.ModuleList, sublayers: Sequence[Branches]
) -> list[bool]:
    """Whether what each layer's MLP branch is given changes when its attention adds more.

    What it is given, not what it returns: a branch whose last projection is 0 returns 0 always.
    """
    inputs: list[list[Tensor]] = [[] for _ in layers]
    reads = [False] * len(layers)
    running_again = False

    def keep(index: int) -> Callable[..., None]:
        def before_mlp(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            inputs[index].append(args[0] if args else next(iter(kwargs.values())))

        return before_mlp

    def run_again(index: int) -> Callable[..., None]:
        def after(layer: nn.Module, args: Any, kwargs: dict[str, Any], _output: Any) -> None:
            nonlocal running_again
            if running_again:
                return
            running_again = True
            attention = layer.get_submodule(sublayers[index].attention)
            handle = _replace_output(attention, _ramp)
            try:
                layer(*args, **kwargs)
            finally:
                handle.remove()
                running_again = False
            first, second = inputs[index]
            reads[index] = not torch.equal(first, second)

        return after

    hooks = []
    for index, (layer, branches) in enumerate(zip(layers, sublayers, strict=True)):
        mlp = layer.get_submodule(branches.mlp)
        hooks.append(mlp.register_forward_pre_hook(keep(index), with_kwargs=True))
        hooks.append(layer.register_forward_hook(run_again(index), with_kwargs=True))
    run_probe(model, hooks)
    return reads

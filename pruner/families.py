"""Where a loaded model keeps its decoder layers, their residual branches and its output head.

Found from structure and checked on a probe, not looked up by family name: a layer's branches are
the two children whose outputs `a` and `m` satisfy `y == (x + a) + m` bit for bit.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from trsp.pruner.errors import UserError


@dataclass(frozen=True)
class Branches:
    """Names of the two children of a layer whose outputs enter its residual stream, in order."""

    attention: str
    mlp: str


def text_config(model: PreTrainedModel) -> Any:
    """The configuration of the language model, also inside a multimodal one."""
    return model.config.get_text_config(decoder=True)


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The list of decoder layers, in order.

    Raises:
        UserError: no list of modules, or more than one, has the configured number of layers.
    """
    expected = text_config(model).num_hidden_layers
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and name.rpartition(".")[2] in ("layers", "h", "blocks")
        and len(module) == expected
    ]
    if len(found) > 1:
        # A vision or audio tower may be as deep as the language model.
        language = set(model.get_decoder().modules())
        found = [(name, module) for name, module in found if module in language]
    if len(found) != 1:
        names = [name for name, _ in found]
        raise UserError(
            f"{type(model).__name__}: expected one list of {expected} decoder layers, found "
            f"{names or 'none'}; this architecture is not supported yet"
        )
    return found[0][1]


def first_tensor(output: Any) -> Any:
    """A module's main output: transformers return it bare or as the first of a tuple."""
    return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def run_probe(model: PreTrainedModel, hooks: list[RemovableHandle]) -> Tensor:
    """Logits of at most eight tokens in eval mode; removes the hooks that watch the pass."""
    config = text_config(model)
    length = min(8, getattr(config, "max_position_embeddings", 8))
    tokens = torch.arange(length, device=model.device).remainder(config.vocab_size).unsqueeze(0)
    was_training = model.training
    try:
        model.eval()
        logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return logits


def count_side_results(model: PreTrainedModel) -> tuple[int | None, ...]:
    """How many results each decoder layer returns behind its hidden states; None: a bare tensor.

    A skipped layer has none to return. That nobody misses them is proven on a probe: with None in
    their places, the logits are the same bit for bit.

    Raises:
        UserError: a layer returns no tensor first, or the model reads what comes behind it.
    """
    layers = decoder_layers(model)
    counts: list[int | None] = [None] * len(layers)

    def look(index: int) -> Callable[..., None]:
        def after(module: nn.Module, _args: Any, output: Any) -> None:
            if not isinstance(first_tensor(output), Tensor):
                raise UserError(
                    f"{type(module).__name__} returns {type(output).__name__} and not its hidden "
                    "states first; this architecture is not supported"
                )
            counts[index] = len(output) - 1 if isinstance(output, tuple) else None

        return after

    def forget(_module: nn.Module, _args: Any, output: Any) -> Any:
        return with_side_results(first_tensor(output), len(output) - 1)

    logits = run_probe(
        model, [layer.register_forward_hook(look(n)) for n, layer in enumerate(layers)]
    )
    telling = [layer for layer, count in zip(layers, counts, strict=True) if count]
    if not telling:
        return tuple(counts)
    try:
        forgotten = run_probe(model, [layer.register_forward_hook(forget) for layer in telling])
    except (TypeError, AttributeError):
        forgotten = None
    if forgotten is None or not torch.equal(logits, forgotten):
        raise UserError(
            f"the model reads what {type(telling[0]).__name__} returns beside its hidden states: "
            "a layer with such results cannot be skipped; this architecture is not supported"
        )
    return tuple(counts)


def with_side_results(hidden_states: Tensor, count: int | None) -> Any:
    """What a layer with `count` side results returns, with none of them; None: a bare tensor."""
    return hidden_states if count is None else (hidden_states, *(None,) * count)


@torch.no_grad()
def find_branches(model: PreTrainedModel) -> tuple[Branches | None, ...]:
    """Each decoder layer's residual branches; None where the layer is not x + a + m.

    Runs one forward pass on at most eight tokens with the model in eval mode.
    """
    layers = decoder_layers(model)
    inputs: dict[int, Tensor] = {}
    outputs: dict[int, Tensor] = {}
    children: dict[int, dict[str, Tensor]] = {index: {} for index in range(len(layers))}
    handles = []

    def watch_layer(index: int) -> None:
        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs[index] = args[0] if args else kwargs["hidden_states"]

        def after(_module: nn.Module, _args: Any, output: Any) -> None:
            outputs[index] = first_tensor(output)

        handles.append(layers[index].register_forward_pre_hook(before, with_kwargs=True))
        handles.append(layers[index].register_forward_hook(after))
        for name, child in layers[index].named_children():

            def after_child(_m: nn.Module, _a: Any, output: Any, name: str = name) -> None:
                tensor = first_tensor(output)
                if isinstance(tensor, Tensor):
                    children[index][name] = tensor

            handles.append(child.register_forward_hook(after_child))

    for index in range(len(layers)):
        watch_layer(index)
    run_probe(model, handles)
    return tuple(
        _match_branches(inputs[index], outputs[index], children[index])
        for index in range(len(layers))
    )


def _match_branches(x: Tensor, y: Tensor, children: dict[str, Tensor]) -> Branches | None:
    fitting = {
        name: tensor.reshape(x.shape)
        for name, tensor in children.items()
        if tensor.numel() == x.numel()
    }
    # Children are in order of execution: hooks fill the dictionary as they fire.
    for first, second in combinations(fitting, 2):
        if torch.equal((x + fitting[first]) + fitting[second], y):
            return Branches(first, second)
    return None

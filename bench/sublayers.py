"""`python -m trsp.bench.sublayers`: attention or MLP alone against whole layers. Research only.

A layer's branches can be taken out one by one: y = x + m(x) without attention, y = x + a(x) without
the MLP. Both kinds of units are removed greedily, each time the one whose absence costs the least
loss for each parameter it frees, until the same part of the layers' parameters is gone; then both
are measured on held-out text.

No layer map says this, because no checkpoint of it can be served. transformers has no class for a
Llama without one branch. vLLM 0.32 has DeciLMForCausalLM (models/nemotron_nas.py), whose
block_configs have no_op for each branch, but a folder for it cannot be made: with model_type
nemotron-nas transformers' AutoConfig does not know the type, and vLLM brings no class of its own;
with model_type llama the entries stay plain dicts, and the layer reads `block_config.attention`
(`'dict' object has no attribute 'attention'`). Both were tried. It takes remote code, which we do
not write. Zeroed projections would load everywhere and be no faster.

L layers, N sequences of T tokens.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from torch import Tensor, nn
from transformers import PreTrainedModel

from trsp.bench.record import environment, write_record
from trsp.pruner.calibration import build_calibration
from trsp.pruner.checkpoint import load_model, load_tokenizer, open_checkpoint
from trsp.pruner.console import ErrorsAsExitCodes
from trsp.pruner.errors import UserError
from trsp.pruner.evaluation import evaluate_perplexity
from trsp.pruner.families import decoder_layers, find_branches
from trsp.pruner.losses import language_model_loss

Branch = Literal["attention", "mlp"]
BRANCHES: tuple[Branch, ...] = ("attention", "mlp")


@dataclass(frozen=True, order=True)
class Sublayer:
    """One residual branch of a decoder layer."""

    source_layer: int
    branch: Branch


class Sublayers:
    """A model whose residual branches can be left out.

    Raises:
        UserError: a layer is not x + a + m with m computed of x + a: branches in parallel, norms
            around the sum, or side results.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.modules: dict[Sublayer, nn.Module] = {}
        self.num_parameters: dict[Sublayer, int] = {}
        layers, found = decoder_layers(model), find_branches(model)
        for index, (layer, branches) in enumerate(zip(layers, found, strict=True)):
            if branches is None:
                raise UserError(
                    f"{type(layer).__name__} is not x + attention + MLP, one after the other: its "
                    "branches cannot be taken out alone"
                )
            for branch in BRANCHES:
                module = layer.get_submodule(getattr(branches, branch))
                sublayer = Sublayer(index, branch)
                self.modules[sublayer] = module
                self.num_parameters[sublayer] = sum(p.numel() for p in module.parameters())

    @contextmanager
    def without(self, removed: frozenset[Sublayer]) -> Iterator[None]:
        """Leave these branches out inside the block."""

        def nothing(_module: nn.Module, _args: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (torch.zeros_like(output[0]), *output[1:])
            return torch.zeros_like(output)

        handles = [self.modules[one].register_forward_hook(nothing) for one in sorted(removed)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def loss(self, input_ids: Tensor, removed: frozenset[Sublayer], batch_size: int = 4) -> float:
        """Language-model loss in nats on tokens [N, T] without these branches."""
        total = 0.0
        with self.without(removed):
            for batch in input_ids.split(batch_size):
                logits = self.model(input_ids=batch, use_cache=False).logits
                total += float(language_model_loss(logits, batch)) * len(batch)
        return total / len(input_ids)


def remove_greedily(
    sublayers: Sublayers, input_ids: Tensor, num_parameters: int, *, whole_layers: bool
) -> frozenset[Sublayer]:
    """Take out units until at least so many parameters are gone.

    Each time the unit whose absence adds the least loss for each of its parameters; the first of
    equals. Whole layers are both branches at once.

    Raises:
        UserError: the branches have fewer parameters, or no unit would be left.
    """
    units = [frozenset({one}) for one in sorted(sublayers.modules)]
    if whole_layers:
        num_layers = len(sublayers.modules) // len(BRANCHES)
        units = [frozenset(Sublayer(n, branch) for branch in BRANCHES) for n in range(num_layers)]
    sizes = sublayers.num_parameters
    if not 0 < num_parameters < sum(sizes.values()):
        raise UserError(f"{num_parameters} of {sum(sizes.values())} parameters cannot be removed")
    removed: frozenset[Sublayer] = frozenset()
    while sum(sizes[one] for one in removed) < num_parameters:
        costs = {
            unit: sublayers.loss(input_ids, removed | unit) / sum(sizes[one] for one in unit)
            for unit in units
        }
        base = sublayers.loss(input_ids, removed)
        costs = {
            unit: cost - base / sum(sizes[one] for one in unit) for unit, cost in costs.items()
        }
        chosen = min(units, key=lambda unit: costs[unit])
        removed |= chosen
        units.remove(chosen)
    return removed


app = typer.Typer(cls=ErrorsAsExitCodes, add_completion=False, pretty_exceptions_enable=False)


# A group's only action rather than a command: groups are what turns errors into exit codes.
@app.callback(invoke_without_command=True)
def main(
    model: Annotated[Path, typer.Option(help="checkpoint folder")],
    data: Annotated[list[str], typer.Option(help="text to choose on; repeatable")],
    eval_data: Annotated[list[str], typer.Option(help="held-out text; repeatable")],
    ratio: Annotated[float, typer.Option(help="part of the layers' parameters that goes")] = 0.25,
    num_sequences: Annotated[int, typer.Option()] = 16,
    sequence_length: Annotated[int, typer.Option(help="also the window of evaluation")] = 128,
    max_tokens: Annotated[int, typer.Option(help="of the held-out text")] = 20_000,
    seed: Annotated[int, typer.Option()] = 0,
    out: Annotated[Path | None, typer.Option(help="record to write")] = None,
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False,
) -> None:
    """Remove whole layers and single branches of equal size, and compare on held-out text."""
    if not 0 < ratio < 1:
        raise UserError(f"--ratio {ratio} is not within 0 and 1")
    checkpoint = open_checkpoint(model)
    tokenizer = load_tokenizer(checkpoint)
    loaded = load_model(checkpoint, dtype=torch.float32)
    sublayers = Sublayers(loaded)
    total = sum(sublayers.num_parameters.values())
    tokens = build_calibration(
        data, tokenizer, num_sequences=num_sequences, sequence_length=sequence_length, seed=seed
    ).input_ids
    rows: dict[str, Any] = {}
    for name in ("dense", "layers", "sublayers"):
        removed: frozenset[Sublayer] = frozenset()
        if name != "dense":
            wanted = round(ratio * total)
            removed = remove_greedily(sublayers, tokens, wanted, whole_layers=name == "layers")
        with sublayers.without(removed):
            perplexity = evaluate_perplexity(
                loaded, tokenizer, eval_data, window=sequence_length, max_tokens=max_tokens
            ).perplexity
        rows[name] = {
            "removed": [[one.source_layer, one.branch] for one in sorted(removed)],
            "part": sum(sublayers.num_parameters[one] for one in removed) / total,
            "perplexity": perplexity,
        }
        taken = (
            ", ".join(f"{one.source_layer} {one.branch}" for one in sorted(removed)) or "nothing"
        )
        print(f"{name:<9} {100 * rows[name]['part']:5.1f} %  perplexity {perplexity:.2f}: {taken}")
    if out is not None:
        write_record(out, {"kind": "trsp sublayers", "rows": rows, "environment": environment()})
        print(f"record: {out}", file=sys.stderr)


if __name__ == "__main__":
    app()

"""`python -m trsp.bench.sublayers`: attention or MLP alone against whole layers.

A layer's branches can be taken out one by one: y = x + m(x) without attention, y = x + a(x) without
the MLP. Each kind of unit (whole layers; attention; MLPs; either branch) is removed greedily, each
time the one whose absence costs the least loss for each parameter it frees, until the same part of
the layers' parameters is gone; then all are measured on held-out text. Nothing is trained.

`--export` writes what the search for either branch left for vLLM's DeciLM with the trsp plugin
(`trsp.pruner.sublayer_checkpoint` says what stock vLLM lacks). transformers cannot load it: it has
no class for a Llama without one branch. Zeroed projections would load everywhere and be no faster.

L layers, N sequences of T tokens.
"""

import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from torch import Tensor
from transformers import PreTrainedModel

from trsp.bench.record import environment, write_record
from trsp.pruner.calibration import build_calibration
from trsp.pruner.checkpoint import load_model, load_tokenizer, open_checkpoint
from trsp.pruner.console import ErrorsAsExitCodes
from trsp.pruner.durable import refuse_existing
from trsp.pruner.errors import UserError
from trsp.pruner.evaluation import evaluate_perplexity
from trsp.pruner.families import decoder_layers
from trsp.pruner.layer_map import SUBLAYERS, BaseModel, LayerMap, write_layer_map
from trsp.pruner.losses import language_model_loss, require_finite
from trsp.pruner.sublayer_checkpoint import export_sublayers
from trsp.pruner.sublayers import find_sublayers, masking_sublayers

# What is taken out as one: a branch, or both of a layer.
KINDS = ("layers", "attention", "mlp", "sublayers")
# Norms in front of the branches.
_MAX_OUTSIDE = 0.01


class Sublayer(NamedTuple):
    """One residual branch of a decoder layer, "attention" or "mlp"."""

    source_layer: int
    branch: str


class Sublayers:
    """A model whose residual branches can be left out.

    Raises:
        UserError: it has layers whose branches cannot (`find_sublayers`), or that keep more than
            1 % of their parameters elsewhere, as where norms stand behind the branches.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.branches = find_sublayers(model)
        self.num_parameters: dict[Sublayer, int] = {}
        for index, layer in enumerate(decoder_layers(model)):
            for branch in SUBLAYERS:
                module = layer.get_submodule(getattr(self.branches[index], branch))
                size = sum(parameter.numel() for parameter in module.parameters())
                self.num_parameters[Sublayer(index, branch)] = size
            total = sum(parameter.numel() for parameter in layer.parameters())
            inside = sum(self.num_parameters[Sublayer(index, branch)] for branch in SUBLAYERS)
            if total - inside > _MAX_OUTSIDE * total:
                raise UserError(
                    f"layer {index} ({type(layer).__name__}) has {total - inside} of its {total} "
                    "parameters outside its branches: sizes of branches would not compare"
                )

    def without(self, removed: frozenset[Sublayer]) -> AbstractContextManager[None]:
        """Leave these branches out inside the block."""
        return masking_sublayers(self.model, self.branches, sorted(removed))

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
    sublayers: Sublayers,
    input_ids: Tensor,
    num_parameters: int,
    *,
    kind: str,
    kept: frozenset[Sublayer] = frozenset(),
) -> tuple[Sublayer, ...]:
    """Take out units until at least so many parameters are gone; the branches in that order.

    Each time the unit whose absence adds the least loss for each of its parameters; the first of
    equals. Whole layers are both branches at once.

    Args:
        kind: of KINDS.   kept: branches that no unit may take.
    Raises:
        UserError: the units have fewer parameters, or none would be left.
        RunError: a loss that is not finite.
    """
    units = _units(sublayers, kind, kept)
    sizes = sublayers.num_parameters
    available = _num_parameters(sublayers, kind, kept)
    if not 0 < num_parameters <= min(available, sum(sizes.values()) - 1):
        raise UserError(f"{num_parameters} of {available} parameters in {kind} cannot be removed")
    removed: tuple[Sublayer, ...] = ()
    while sum(sizes[one] for one in removed) < num_parameters:
        base = sublayers.loss(input_ids, frozenset(removed))
        costs = {}
        for unit in units:
            loss = sublayers.loss(input_ids, frozenset((*removed, *unit)))
            require_finite(loss, f"the loss without {unit}", len(removed), [])
            costs[unit] = (loss - base) / sum(sizes[one] for one in unit)
        chosen = min(units, key=lambda unit: costs[unit])
        removed += chosen
        units.remove(chosen)
    return removed


def _units(
    sublayers: Sublayers, kind: str, kept: frozenset[Sublayer]
) -> list[tuple[Sublayer, ...]]:
    """What is taken out as one, in the order of the layers."""
    every = sorted(sublayers.num_parameters)
    units = [(one,) for one in every if kind in (one.branch, "sublayers")]
    if kind == "layers":
        return [unit for unit in zip(every[::2], every[1::2], strict=True) if kept.isdisjoint(unit)]
    return [unit for unit in units if kept.isdisjoint(unit)]


def _num_parameters(sublayers: Sublayers, kind: str, kept: frozenset[Sublayer]) -> int:
    units = _units(sublayers, kind, kept)
    return sum(sublayers.num_parameters[one] for unit in units for one in unit)


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
    map_out: Annotated[
        Path | None, typer.Option("--map", help="layer map to write of the search over sublayers")
    ] = None,
    export: Annotated[
        Path | None, typer.Option(help="folder to write of that map, for vLLM's DeciLM")
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False,
) -> None:
    """Remove whole layers and single branches of equal size, and compare on held-out text."""
    if not 0 < ratio < 1:
        raise UserError(f"--ratio {ratio} is not within 0 and 1")
    if export is not None:
        refuse_existing(export)
    checkpoint = open_checkpoint(model)
    tokenizer = load_tokenizer(checkpoint)
    loaded = load_model(checkpoint, dtype=torch.float32)
    sublayers = Sublayers(loaded)
    total = sum(sublayers.num_parameters.values())
    tokens = build_calibration(
        data, tokenizer, num_sequences=num_sequences, sequence_length=sequence_length, seed=seed
    ).input_ids
    rows: dict[str, Any] = {}
    for kind in ("dense", *KINDS):
        removed: tuple[Sublayer, ...] = ()
        if kind != "dense":
            # DeciLM cannot be without the first attention.
            kept = frozenset({Sublayer(0, "attention")} if kind != "layers" else ())
            wanted = round(ratio * total)
            if (held := _num_parameters(sublayers, kind, kept)) < wanted:
                print(f"{kind:<9} {100 * held / total:5.1f} % is all there is of them")
                continue
            removed = remove_greedily(sublayers, tokens, wanted, kind=kind, kept=kept)
        with sublayers.without(frozenset(removed)):
            perplexity = evaluate_perplexity(
                loaded, tokenizer, eval_data, window=sequence_length, max_tokens=max_tokens
            ).perplexity
        rows[kind] = {
            "removed": removed,
            "part": sum(sublayers.num_parameters[one] for one in removed) / total,
            "perplexity": perplexity,
        }
        taken = ", ".join(f"{one.source_layer} {one.branch}" for one in removed) or "nothing"
        print(f"{kind:<9} {100 * rows[kind]['part']:5.1f} %  perplexity {perplexity:.2f}: {taken}")
    if out is not None:
        write_record(out, {"kind": "trsp sublayers", "rows": rows, "environment": environment()})
        print(f"record: {out}", file=sys.stderr)
    base = BaseModel(model.name, checkpoint.num_hidden_layers, checkpoint.fingerprint)
    removals = [tuple(one) for one in rows["sublayers"]["removed"]]
    layer_map = LayerMap.from_removals(base, removals, method={"name": "trsp.bench.sublayers"})
    if map_out is not None:
        write_layer_map(layer_map, map_out)
        print(f"layer map: {map_out}", file=sys.stderr)
    if export is not None:
        export_sublayers(checkpoint, layer_map, export)
        print(f"for vLLM: {export}", file=sys.stderr)


if __name__ == "__main__":
    app()

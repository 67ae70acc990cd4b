"""`python -m trsp.bench.family_properties`: what must hold of every compaction, on every family.

For random keep lists of a family's pico model, through the real files on disk:

    masked       the cut has the logits of the dense model with those layers masked, bit for bit,
                 with images too where it reads them
    cache        greedy tokens are the same with the KV cache on and off
    again        cutting nothing off the cut gives the same files; so does saving it by transformers
    prefix       the first n removals of an order give the files of that keep list
    composed     a cut of the cut gives the files of one cut to the layers that both keep

Two checkpoints of a family take turns: fp32 in one file, bf16 in shards; both run in fp32.
"""

import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from trsp.bench.pico_checkpoint import write_pico_checkpoint
from trsp.bench.pico_families import PICO_CONFIGS
from trsp.bench.pico_images import image_inputs
from trsp.bench.record import environment, write_record
from trsp.pruner.checkpoint import Checkpoint, load_model, open_checkpoint
from trsp.pruner.compaction import compact
from trsp.pruner.config_surgery import layers_that_must_stay, rewrite_config
from trsp.pruner.console import ErrorsAsExitCodes
from trsp.pruner.errors import RunError, UserError
from trsp.pruner.families import text_config
from trsp.pruner.family_registry import registry
from trsp.pruner.gated_model import GatedModel
from trsp.pruner.layer_map import LayerMap
from trsp.pruner.probes import (
    agreement,
    continuation_logits,
    continue_with_cache,
    make_probes,
    tie_tolerance,
)
from trsp.pruner.run import base_model_of

PROPERTIES = ("masked", "cache", "again", "prefix", "composed")
# A cut tells of its history in these, and the same cut may have several.
_HISTORIES = {"layer_map.json", "manifest.json"}
_SHARD_SIZE = "100KB"


class Subject:
    """A family's pico checkpoint on disk, and its model in memory."""

    def __init__(self, name: str, folder: Path, *, sharded: bool) -> None:
        self.folder = folder
        dense = folder / "dense"
        if sharded:
            write_pico_checkpoint(name, dense, dtype=torch.bfloat16, max_shard_size=_SHARD_SIZE)
        else:
            write_pico_checkpoint(name, dense)
        self.checkpoint = open_checkpoint(dense)
        self.model = _load(self.checkpoint)
        self.num_layers = self.checkpoint.num_hidden_layers
        self.must_stay = frozenset(layers_that_must_stay(self.checkpoint.config))
        self._num_cuts = 0

    def cut(self, source: Checkpoint, layer_map: LayerMap) -> Path:
        """A compaction in a folder of its own."""
        self._num_cuts += 1
        return compact(source, layer_map, self.folder / f"cut-{self._num_cuts}")

    def draw(self, generator: random.Random) -> list[int]:
        """A keep list: any layers with those that must stay, and not all."""
        return _draw_of(self.num_layers, self.must_stay, generator)


def check_keep_list(subject: Subject, kept: Sequence[int], generator: random.Random) -> int:
    """Try every property on one keep list; the number of cases.

    `composed` is tried, and counted, where the cut has a layer that can go.

    Raises:
        AssertionError: one does not hold; the text names it and the layers.
        UserError, RunError: a compaction that is refused or fails.
    """
    base = base_model_of(subject.checkpoint)
    direct = subject.cut(subject.checkpoint, LayerMap.from_keep(base, kept))
    cut = open_checkpoint(direct)
    model = _load(cut)
    where = f"kept {list(kept)}"
    dropped = [layer for layer in range(subject.num_layers) if layer not in kept]
    assert torch.equal(_logits(model), _masked_logits(subject.model, dropped)), f"masked, {where}"
    _check_cache(model, where)

    whole = LayerMap.from_keep(base_model_of(cut), range(len(kept)))
    assert _files(subject.cut(cut, whole)) == _files(direct), f"again, {where}"
    saved = subject.folder / f"saved-{direct.name}"
    model.save_pretrained(saved)
    reloaded = _load(open_checkpoint(saved))
    assert torch.equal(_logits(reloaded), _logits(model)), f"again, saved by transformers, {where}"

    generator.shuffle(dropped)
    order = LayerMap.from_removal_order(base, dropped)
    count = generator.randint(1, len(dropped))
    staying = [layer for layer in range(subject.num_layers) if layer not in dropped[:count]]
    by_prefix = subject.cut(subject.checkpoint, order.prefix(count))
    by_list = subject.cut(subject.checkpoint, LayerMap.from_keep(base, staying))
    assert _files(by_prefix) == _files(by_list), f"prefix, first {count} of {dropped}"

    inner = _draw_of(len(kept), frozenset(layers_that_must_stay(cut.config)), generator)
    if len(inner) == len(kept):
        return len(PROPERTIES) - 1
    twice = subject.cut(cut, LayerMap.from_keep(base_model_of(cut), inner))
    composed = LayerMap.from_keep(base, [kept[layer] for layer in inner])
    once = subject.cut(subject.checkpoint, composed)
    assert _weights(twice) == _weights(once), f"composed, {where}, then {inner}"
    assert _meaning(twice) == _meaning(once), f"composed, config, {where}, then {inner}"
    return len(PROPERTIES)


def prove_family(name: str, num_lists: int, *, seed: int = 0) -> int:
    """Try the properties on random keep lists of one family; the number of cases.

    Raises:
        AssertionError, UserError, RunError: see check_keep_list.
    """
    generator, cases = random.Random(f"{seed} {name}"), 0
    for sharded in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            subject = Subject(name, Path(folder), sharded=sharded)
            for _ in range((num_lists + (not sharded)) // 2):
                cases += check_keep_list(subject, subject.draw(generator), generator)
    return cases


def refusal(name: str) -> str | None:
    """Why a family cannot be cut at all; None where it can."""
    config = PICO_CONFIGS[name]().to_dict()
    kept = sorted({0, *layers_that_must_stay(config)})
    try:
        rewrite_config(config, kept)
    except UserError as error:
        return str(error)
    return None


def _load(checkpoint: Checkpoint) -> PreTrainedModel:
    # In bf16 two sums of the same numbers may choose between near ties.
    model = load_model(checkpoint, dtype=torch.float32)
    # Weights mapped from a file lie where its header ends, and off a boundary of 64 bytes kernels
    # sum in another order: 4e-6 in the logits of Llama 4 with an image.
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


@torch.no_grad()
def _logits(model: PreTrainedModel) -> Tensor:
    """Logits [tokens, vocabulary] of text, and of text with images where the model reads them."""
    text = {"input_ids": torch.arange(3, 43).view(2, 20)}
    given = [text, *filter(None, [image_inputs(model.config)])]
    logits = [model(**inputs, use_cache=False).logits.flatten(0, 1) for inputs in given]
    # Qwen-VL goes on counting positions behind the last image, also for the next caller's text.
    base: Any = model.base_model
    if hasattr(base, "rope_deltas"):
        base.rope_deltas = None
    return torch.cat(logits)


def _masked_logits(model: PreTrainedModel, dropped: Sequence[int]) -> Tensor:
    with GatedModel(model) as gated, gated.masking(dropped):
        return _logits(model)


def _check_cache(model: PreTrainedModel, where: str) -> None:
    probes = make_probes(model.config, None)
    given = [continue_with_cache(model, probe) for probe in probes]
    tokens = [continuation.tokens for continuation in given]
    uncached = [continuation_logits(model, p, t) for p, t in zip(probes, tokens, strict=True)]
    ties = tie_tolerance(text_config(model))
    mismatch = agreement(probes, tokens, uncached, ties).first_mismatch
    assert not mismatch, f"cache, {where}: {mismatch}"


def _draw_of(num_layers: int, must_stay: frozenset[int], generator: random.Random) -> list[int]:
    """Any layers with those that must stay, and not all; all where none can go."""
    free = [layer for layer in range(num_layers) if layer not in must_stay]
    fewest, most = 0 if must_stay else 1, len(free) - 1
    if most < fewest:
        return list(range(num_layers))
    return sorted({*generator.sample(free, generator.randint(fewest, most)), *must_stay})


def _files(folder: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes() for path in folder.iterdir() if path.name not in _HISTORIES
    }


def _weights(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in _files(folder).items() if name.endswith(".safetensors")}


def _meaning(folder: Path) -> dict[str, Any]:
    """What transformers makes of a config: what one says in an interval, another says in a list.

    An interval that is true of all the kept layers stays, and goes with a cut between.
    """
    config: dict[str, Any] = AutoConfig.from_pretrained(folder).to_dict()
    del config["_name_or_path"]
    section = config.get("text_config") or config
    family = registry().families[section["model_type"]]
    for name in family.intervals:
        section.pop(name, None)
    return config


app = typer.Typer(cls=ErrorsAsExitCodes, add_completion=False, pretty_exceptions_enable=False)


# A group's only action rather than a command: groups are what turns errors into exit codes.
@app.callback(invoke_without_command=True)
def main(
    lists: Annotated[int, typer.Option(min=1, help="keep lists of each family")] = 20,
    family: Annotated[list[str] | None, typer.Option(help="repeatable; all")] = None,
    seed: Annotated[int, typer.Option()] = 0,
    out: Annotated[Path | None, typer.Option(help="record to write")] = None,
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False,
) -> None:
    """Try the properties on random keep lists; exit 1 where one does not hold."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    if unknown := sorted(set(family or ()) - set(PICO_CONFIGS)):
        raise UserError(f"{unknown[0]!r} is unknown; choose from {', '.join(PICO_CONFIGS)}")
    cases: dict[str, int] = {}
    failures: dict[str, str] = {}
    refused: dict[str, str] = {}
    for name in family or PICO_CONFIGS:
        reason = refusal(name)
        if reason is not None:
            refused[name] = reason
            print(f"{name}: refused: {reason}", file=sys.stderr, flush=True)
            continue
        try:
            cases[name] = prove_family(name, lists, seed=seed)
            print(f"{name}: {cases[name]} cases", file=sys.stderr, flush=True)
        except (AssertionError, UserError, RunError) as error:
            failures[name] = str(error)
            print(f"{name}: FAILED: {error}", file=sys.stderr, flush=True)
    total = sum(cases.values())
    print(f"{total} cases of {len(PROPERTIES)} properties in {len(cases)} families")
    if out is not None:
        record = {
            "kind": "trsp family properties", "properties": list(PROPERTIES), "cases": cases,
            "total": total, "failures": failures, "refused": refused, "seed": seed,
            "environment": environment(),
        }  # fmt: skip
        write_record(out, record)
    if failures:
        raise RunError(f"failed: {', '.join(failures)}")


if __name__ == "__main__":
    app()

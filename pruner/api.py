"""The Python entry: the command line's words, as functions.

    from trsp.pruner.api import compact, evaluate, plan, prune, verify
    prune("llama", "llama-24", ratio=0.25, data=["calibration.txt"])

Paths are local. Errors: UserError for what cannot be done as asked, RunError for a failed run.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trsp.pruner.errors import UserError
from trsp.pruner.layer_map import LayerMap, read_layer_map
from trsp.pruner.progress import Progress, silent
from trsp.pruner.recipe import Recipe, build_recipe

if TYPE_CHECKING:
    from trsp.pruner.proof import Proof, VllmCheck

StrPath = str | Path


def recipe_from(
    *,
    recipe: StrPath | Recipe | None = None,
    preset: str = "trsp",
    ratio: float | None = None,
    layers: int | None = None,
    keep: Sequence[int] | None = None,
    data: Sequence[StrPath] = (),
    eval_data: Sequence[StrPath] = (),
    seed: int | None = None,
    device: str | None = None,
    auto: bool = False,
    max_increase: float | None = None,
    settings: Sequence[str] = (),
) -> Recipe:
    """One recipe from a preset, a file, these flags and `section.name=value` settings, in order.

    Args:
        auto: search for the settings on held-out text; `max_increase`, of perplexity, then chooses
            the depth: 0.05 is 5 %.
    Raises:
        UserError: an unknown name, or a value outside its range.
    """
    if max_increase is not None and not auto:
        raise UserError("max_increase is the quality budget of a search: add auto (--auto)")
    flags: dict[str, Any] = {
        "ratio": ratio,
        "layers": layers,
        "seed": seed,
        "device": device,
        "keep": None if keep is None else sorted(keep),
        "calibration": {"data": [str(path) for path in data] or None},
        "evaluation": {"data": [str(path) for path in eval_data] or None},
    }
    if isinstance(recipe, Recipe):
        if _given(flags) or settings or auto or preset != "trsp":
            raise UserError("a Recipe is whole: change it with model_copy, not by further words")
        return recipe
    searched = {"auto": _given({"max_increase": max_increase})} if auto else {}
    return build_recipe(
        file=None if recipe is None else Path(recipe),
        preset=preset,
        flags=_given(flags) | searched,
        settings=tuple(settings),
    )


def _given(flags: dict[str, Any]) -> dict[str, Any]:
    cleaned = {
        key: _given(value) if isinstance(value, dict) else value for key, value in flags.items()
    }
    return {key: value for key, value in cleaned.items() if value is not None and value != {}}


def prune(
    model: StrPath,
    out: StrPath,
    *,
    layer_map: StrPath | None = None,
    resume: bool = False,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    vllm: "VllmCheck" = "auto",
    command: str = "",
    progress: Progress = silent,
    **recipe_words: Any,
) -> dict[str, Any]:
    """Prune the checkpoint folder `model` into the folder `out` and prove it; the run's report.

    `recipe_words` are those of `recipe_from`. With `keep` or `layer_map` and no `data`, nothing is
    trained.
    """
    from trsp.pruner import pipeline

    return pipeline.prune(
        Path(model),
        Path(out),
        recipe_from(**recipe_words),
        layer_map=None if layer_map is None else Path(layer_map),
        resume=resume,
        overwrite=overwrite,
        trust_remote_code=trust_remote_code,
        vllm=vllm,
        command=command,
        progress=progress,
    )


def describe(
    model: StrPath,
    *,
    out: StrPath,
    layer_map: StrPath | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    **recipe_words: Any,
) -> list[str]:
    """What `prune` would do, one line each; writes nothing, refuses what `prune` would."""
    from trsp.pruner import pipeline

    return pipeline.describe(
        Path(model),
        recipe_from(**recipe_words),
        out=Path(out),
        layer_map=None if layer_map is None else Path(layer_map),
        overwrite=overwrite,
        trust_remote_code=trust_remote_code,
    )


def describe_search(
    model: StrPath, *, trust_remote_code: bool = False, **recipe_words: Any
) -> list[str]:
    """How much the search of `prune` will train at most; nothing where none is asked for."""
    from trsp.pruner import pipeline

    recipe = recipe_from(**recipe_words)
    return pipeline.describe_search(Path(model), recipe, trust_remote_code=trust_remote_code)


def plan(
    model: StrPath,
    out: StrPath,
    *,
    resume: bool = False,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: Progress = silent,
    **recipe_words: Any,
) -> LayerMap:
    """Stage 1 only: learn which layers go, write the layer map to the file `out`, return it."""
    from trsp.pruner import pipeline

    return pipeline.plan(
        Path(model),
        Path(out),
        recipe_from(**recipe_words),
        resume=resume,
        overwrite=overwrite,
        trust_remote_code=trust_remote_code,
        progress=progress,
    )


def compact(
    model: StrPath,
    layer_map: StrPath | LayerMap,
    out: StrPath,
    *,
    prefix: int | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> Path:
    """Write `model` without the layers `layer_map` drops (its first `prefix` removals) to `out`."""
    from trsp.pruner import compaction
    from trsp.pruner.checkpoint import open_checkpoint

    chosen = _map_prefix(layer_map, prefix)
    checkpoint = open_checkpoint(Path(model), trust_remote_code=trust_remote_code)
    return compaction.compact(checkpoint, chosen, Path(out), overwrite=overwrite, progress=progress)


def describe_compaction(
    model: StrPath,
    layer_map: StrPath | LayerMap,
    *,
    prefix: int | None = None,
    trust_remote_code: bool = False,
) -> str:
    """What `compact` would read, write and change; writes nothing."""
    from trsp.pruner.checkpoint import open_checkpoint
    from trsp.pruner.compaction import plan_compaction

    checkpoint = open_checkpoint(Path(model), trust_remote_code=trust_remote_code)
    return plan_compaction(checkpoint, _map_prefix(layer_map, prefix)).describe()


def _map_prefix(layer_map: StrPath | LayerMap, prefix: int | None) -> LayerMap:
    chosen = layer_map if isinstance(layer_map, LayerMap) else read_layer_map(Path(layer_map))
    return chosen if prefix is None else chosen.prefix(prefix)


def verify(
    folder: StrPath,
    *,
    against: StrPath | None = None,
    trust_remote_code: bool = False,
    device: str = "auto",
    vllm: "VllmCheck" = "auto",
    progress: Progress = silent,
) -> "Proof":
    """Prove that `folder` is what its layer map says; `against` the checkpoint it was cut from."""
    from trsp.pruner.proof import prove
    from trsp.pruner.run import resolve_device

    return prove(
        Path(folder),
        against=None if against is None else Path(against),
        trust_remote_code=trust_remote_code,
        device=resolve_device(device),
        vllm=vllm,
        progress=progress,
    )


def evaluate(
    folder: StrPath,
    data: Sequence[StrPath],
    *,
    window: int | None = None,
    stride: int | None = None,
    add_bos: bool | None = None,
    max_tokens: int | None = None,
    batch_size: int = 1,
    dtype: str = "auto",
    device: str = "auto",
    text_field: str = "text",
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Perplexity of the checkpoint `folder` on local text, with the stamp of its protocol."""
    import torch

    from trsp.pruner.checkpoint import (
        check_tokenizer,
        load_model,
        load_tokenizer,
        open_checkpoint,
    )
    from trsp.pruner.evaluation import evaluate_perplexity
    from trsp.pruner.run import resolve_device

    dtypes: dict[str, str | torch.dtype] = {
        "auto": "auto",
        "fp32": torch.float32,
        "bf16": torch.bfloat16,
        "fp16": torch.float16,
    }
    if dtype not in dtypes:
        raise UserError(f"dtype {dtype!r} is unknown; choose from {', '.join(dtypes)}")
    if not data:
        raise UserError("nothing to evaluate on: give text with --data")
    checkpoint = open_checkpoint(Path(folder), trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(checkpoint, trust_remote_code=trust_remote_code)
    check_tokenizer(checkpoint, tokenizer)
    model = load_model(
        checkpoint,
        dtype=dtypes[dtype],
        device=resolve_device(device),
        trust_remote_code=trust_remote_code,
    )
    result = evaluate_perplexity(
        model,
        tokenizer,
        [str(path) for path in data],
        window=window,
        stride=stride,
        add_bos=add_bos,
        max_tokens=max_tokens,
        batch_size=batch_size,
        text_field=text_field,
        progress=progress,
    )
    return result.to_document()

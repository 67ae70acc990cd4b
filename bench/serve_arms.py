"""The arms of a speed experiment, from folders or from a known shape, and what each one weighs."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trsp.bench.bounds import ModelCost
from trsp.bench.model_shapes import SHAPES, copy_config_only, write_shape
from trsp.bench.serve_plan import CONTROL, DENSE, arm_names
from trsp.bench.serve_record import Arm, Quality
from trsp.pruner.bounded_json import read_json_object
from trsp.pruner.checkpoint import language_config, open_checkpoint, sample_weights
from trsp.pruner.config_surgery import num_hidden_layers
from trsp.pruner.errors import UserError
from trsp.pruner.layer_map import read_layer_map
from trsp.pruner.recipe import build_recipe

LAYER_MAP_NAME = "layer_map.json"
REPORT_NAME = "trsp_report.json"
_MAX_BYTES = 2**26
_SAMPLE_TEXT = "The 3 quick brown foxes, \u00e9\u4e2d\u6587 don't jump: x = 1.5e-3\n\tover."


@dataclass(frozen=True)
class Candidate:
    """An arm before anything was started: its folder, its record, its cost."""

    arm: Arm
    folder: Path
    cost: ModelCost
    weights_sha256: str | None


def from_folders(
    dense: Path, pruned: Sequence[Path], *, dtype: str | None, dummy_weights: bool
) -> list[Candidate]:
    """The dense arm, its control, and one arm for each pruned folder.

    Args:
        dtype: of the weights when served; None: the dense config's own.
        dummy_weights: engines make up weights; a folder needs config and tokenizer only.
    Raises:
        UserError: a folder is no checkpoint; its tokenizer is not the dense one's; a pruned model
            is not shallower than the dense one.
    """
    names = [DENSE, *arm_names([str(folder.resolve()) for folder in pruned])]
    folders = [dense, *pruned]
    for folder in folders:
        if not (folder / "config.json").is_file():
            raise UserError(f"{folder}: has no config.json; give the folder of a checkpoint")
    for folder in pruned:
        _require_same_tokenizer(dense, folder)
    dtype = dtype or config_dtype(dense)
    qualities = _qualities(dense, pruned)
    candidates = [
        _candidate(name, folder, str(folder), dtype, dummy_weights, qualities.get(name, []))
        for name, folder in zip(names, folders, strict=True)
    ]
    for candidate in candidates[1:]:
        if candidate.arm.num_hidden_layers >= candidates[0].arm.num_hidden_layers:
            raise UserError(
                f"{candidate.folder}: has {candidate.arm.num_hidden_layers} layers, the dense "
                f"model {candidates[0].arm.num_hidden_layers}: give the dense model first"
            )
        if candidate.arm.num_parameters >= candidates[0].arm.num_parameters:
            raise UserError(
                f"{candidate.folder}: has fewer layers than the dense model and not fewer "
                f"parameters ({candidate.arm.num_parameters:,}): it is not that model pruned"
            )
    return _with_control(candidates)


def from_shape(
    shape: str | Path, removals: Sequence[int], folder: Path, *, dtype: str | None
) -> list[Candidate]:
    """A shape, its control, and the shape with layers removed, without any weights.

    Args:
        shape: a known name, or a model's folder of which config and tokenizer are taken.
        folder: where configs and tokenizers are written, a folder for each arm.
    Raises:
        UserError: the shape is unknown, or a number of removals leaves no layer.
    """
    if isinstance(shape, Path):
        config = read_json_object(shape / "config.json", max_bytes=_MAX_BYTES)
        label = shape.resolve().name
    else:
        if shape not in SHAPES:
            raise UserError(f"--shape {shape!r} is unknown; choose from {', '.join(SHAPES)}")
        config, label = dict(SHAPES[shape]), shape
    layers = num_hidden_layers(config)
    wrong = [count for count in removals if not 1 <= count < layers]
    if not removals or wrong or len(set(removals)) < len(removals):
        raise UserError(
            f"--remove {list(removals)}: {label} has {layers} layers; give one or more different "
            f"numbers from 1 to {layers - 1}"
        )
    candidates = []
    for removed in (0, *sorted(removals)):
        made = folder / (f"{label}-minus-{removed}" if removed else label)
        if isinstance(shape, Path):
            copy_config_only(shape, made, num_layers=layers - removed)
        else:
            write_shape(shape, made, num_layers=layers - removed)
        name = f"{label}-minus-{removed}" if removed else DENSE
        shown = f"{label}, {layers - removed} of {layers} layers"
        candidates.append(_candidate(name, made, shown, dtype or config_dtype(made), True, []))
    return _with_control(candidates)


def config_dtype(folder: Path) -> str:
    """The dtype a config states: float32, bfloat16 or float16."""
    config = read_json_object(folder / "config.json", max_bytes=_MAX_BYTES)
    for section in (config, language_config(config)):
        for name in ("dtype", "torch_dtype"):
            if isinstance(section.get(name), str):
                return str(section[name]).removeprefix("torch.")
    return "float32"


def context_length(folder: Path) -> int | None:
    """The most positions a config states; None where it states none."""
    config = language_config(read_json_object(folder / "config.json", max_bytes=_MAX_BYTES))
    found = [config.get(name) for name in ("max_position_embeddings", "n_positions")]
    return next((value for value in found if isinstance(value, int)), None)


def vocabulary_size(folder: Path) -> int:
    """The number of token ids that a config states."""
    config = read_json_object(folder / "config.json", max_bytes=_MAX_BYTES)
    size = language_config(config).get("vocab_size")
    if not isinstance(size, int):
        raise UserError(f"{folder}: config.json states no vocab_size")
    return size


def _candidate(
    name: str, folder: Path, shown: str, dtype: str, dummy: bool, quality: list[Quality]
) -> Candidate:
    cost = ModelCost.from_config(folder, dtype=dtype)
    fingerprint = weights = None
    disk = None
    if not dummy:
        checkpoint = open_checkpoint(folder)
        fingerprint, weights = checkpoint.fingerprint, sample_weights(checkpoint)
        disk = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    arm = Arm(
        name=name,
        role="dense" if name == DENSE else "pruned",
        model=shown,
        num_hidden_layers=cost.num_hidden_layers,
        weights="dummy" if dummy else "checkpoint",
        fingerprint=fingerprint,
        disk_bytes=disk,
        num_parameters=cost.num_parameters,
        weight_bytes=cost.weight_bytes,
        kv_bytes_per_token=cost.kv_bytes_per_token,
        quality=quality,
    )
    return Candidate(arm, folder, cost, weights)


def _with_control(candidates: list[Candidate]) -> list[Candidate]:
    dense = candidates[0]
    arm = dense.arm.model_copy(update={"name": CONTROL, "role": "control"})
    control = Candidate(arm, dense.folder, dense.cost, dense.weights_sha256)
    return [dense, control, *candidates[1:]]


def _qualities(dense: Path, pruned: Sequence[Path]) -> dict[str, list[Quality]]:
    """What `trsp prune --eval-data` measured of this dense model and its offspring, by arm."""
    found: dict[str, list[Quality]] = {}
    names = arm_names([str(folder.resolve()) for folder in pruned])
    for name, folder in zip(names, pruned, strict=True):
        path = folder / REPORT_NAME
        if not path.is_file() or not (folder / LAYER_MAP_NAME).is_file():
            continue
        base = read_layer_map(folder / LAYER_MAP_NAME).base_model
        if base.fingerprint != open_checkpoint(dense).fingerprint:
            continue
        evaluation = read_json_object(path, max_bytes=_MAX_BYTES).get("evaluation") or {}
        text = _evaluated_text(folder)
        for label, arm in (("dense", DENSE), ("pruned", name)):
            if label in evaluation:
                quality = Quality(
                    text=text,
                    perplexity=float(evaluation[label]["perplexity"]),
                    protocol=dict(evaluation[label]["protocol"]),
                )
                if quality not in found.setdefault(arm, []):
                    found[arm].append(quality)
    return found


def _evaluated_text(folder: Path) -> str:
    """Names of the held-out files of a run, from its recipe."""
    path = folder / "recipe.yaml"
    if not path.is_file():
        return "held-out text"
    recipe = build_recipe(file=path)
    return ", ".join(Path(item).name for item in recipe.evaluation.data) or "held-out text"


def _require_same_tokenizer(dense: Path, pruned: Path) -> None:
    """Same prompts in text are the same tokens only with the same tokenizer."""
    ours, theirs = (_tokenizer_digest(folder) for folder in (dense, pruned))
    if ours == theirs:
        return
    from transformers import AutoTokenizer

    loaded = []
    for folder in (dense, pruned):
        try:
            loaded.append(AutoTokenizer.from_pretrained(str(folder), local_files_only=True))
        # The tokenizers library raises bare Exceptions, and a KeyError for a missing part.
        except Exception as error:
            why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise UserError(f"{folder}: its tokenizer cannot be loaded: {why}") from error
    if loaded[0].get_vocab() != loaded[1].get_vocab() or loaded[0](_SAMPLE_TEXT) != loaded[1](
        _SAMPLE_TEXT
    ):
        raise UserError(
            f"{pruned}: its tokenizer is not that of {dense}: the same text would be other tokens, "
            "and nothing could be compared; copy the dense model's tokenizer files"
        )


def _tokenizer_digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*")):
        if path.is_file() and path.name.startswith(("tokenizer.", "vocab", "merges")):
            digest.update(json.dumps(path.name).encode() + path.read_bytes())
    return digest.hexdigest()

"""What the pruned folder tells of its calibration text, held against the text of an audit."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from trsp.pruner.bounded_json import read_json_object
from trsp.pruner.calibration import build_calibration
from trsp.pruner.errors import UserError
from trsp.pruner.held_out import hold_out
from trsp.pruner.layer_map import read_layer_map
from trsp.pruner.progress import Progress, silent
from trsp.pruner.recipe import build_recipe
from trsp.pruner.self_text import SELF
from trsp.pruner.text_checks import (
    WARNED_SHARE,
    Overlap,
    describe_overlap,
    kind_warnings,
    overlap,
    refuse_same_files,
    require_no_overlap,
    unknown_text_warnings,
)
from trsp.pruner.text_files import TextError, find_files, unpacked_blocks

_LAYER_MAP_NAME = "layer_map.json"
_REPORT_NAME = "trsp_report.json"
_RECIPE_NAME = "recipe.yaml"
_MAX_REPORT_BYTES = 256 * 2**20
_REMEDY = "name other files with --data"


def refuse_calibration_text(pruned: Path, data: Mapping[str, Sequence[Path]]) -> None:
    """Refuse text that the pruned model learned from, as far as its folder and the disk tell.

    The layer map has the paths as they were given to `trsp prune`. What cannot be read here is
    not compared, and no relative path where the report does not tell the folder it starts from.

    Raises:
        UserError: a text is calibration text, by place or content; layer map or report is broken.
    """
    files = [file for source in _calibration_files(pruned) for file in source]
    for paths in data.values() if files else ():
        refuse_same_files(files, paths, remedy=_REMEDY)


@dataclass(frozen=True)
class SeenText:
    """The calibration sequences.

    Attributes:
        input_ids: [N, T]; None where they could not be drawn again.
        unknown: why not.
        allowed: the run was told to go on with held-out text among them.
    """

    input_ids: Tensor | None
    unknown: str | None = None
    allowed: bool = False


def seen_text(
    pruned: Path, tokenizer: PreTrainedTokenizerBase, progress: Progress = silent
) -> SeenText:
    """Draw the calibration sequences again, from the files and numbers that the folder tells.

    They are the same ones, by their hash in the layer map, or none.

    Raises:
        UserError: layer map or report is broken.
    """
    path = pruned / _LAYER_MAP_NAME
    told = read_layer_map(path, sublayers=True).calibration if path.is_file() else None
    if not told:
        return SeenText(None, "the pruned folder has no layer map that names calibration text")
    if told.get("source") == [SELF]:
        return SeenText(None, "the dense model wrote the calibration text")
    sources = _calibration_files(pruned)
    if not sources or not all(sources):
        return SeenText(None, "calibration text that the layer map names is not to be read here")
    count, length, seed = (told.get(name) for name in ("num_sequences", "sequence_length", "seed"))
    if not (isinstance(count, int) and isinstance(length, int) and isinstance(seed, int)):
        return SeenText(None, "the layer map does not say how the calibration text was drawn")
    recipe = pruned / _RECIPE_NAME
    try:
        asked = build_recipe(file=recipe if recipe.is_file() else None)
        drawn = build_calibration(
            [file for source in sources for file in source],
            tokenizer,
            # A search keeps a part of what it draws for itself.
            num_sequences=count if asked.auto is None else asked.calibration.num_sequences,
            sequence_length=length,
            seed=seed,
            text_field=asked.calibration.text_field,
            progress=progress,
        )
        if asked.auto is not None:
            drawn = hold_out(drawn, asked.auto.held_out, seed).training
    except UserError as error:
        return SeenText(None, f"the calibration text could not be drawn again: {error}")
    if drawn.sha256 != told.get("sha256"):
        return SeenText(None, "the calibration files hold another text by now")
    return SeenText(drawn.input_ids, allowed=asked.evaluation.allow_overlap)


def overlaps(
    seen: SeenText, texts: Mapping[str, Tensor], tokenizer: PreTrainedTokenizerBase
) -> tuple[dict[str, Overlap], list[str]]:
    """What each text [S] has in common with the sequences, and warnings where that is much.

    Both are empty where the sequences are not known.

    Raises:
        UserError: it is too much, and the run was not told to allow that.
    """
    if seen.input_ids is None:
        return {}, []
    found: dict[str, Overlap] = {}
    warnings = []
    for name, ids in texts.items():
        called = f"the text {name}"
        if seen.allowed:
            found[name] = overlap(seen.input_ids, ids)
        else:
            found[name] = require_no_overlap(
                seen.input_ids, ids, tokenizer, held_out=called, remedy=_REMEDY
            )
        if found[name].share > WARNED_SHARE or found[name].too_much:
            warnings.append(describe_overlap(found[name], ids, tokenizer, held_out=called))
    return found, warnings


def audit_warnings(bits: Mapping[str, float | None], calibration: float | None) -> list[str]:
    """What the dense model's losses on the texts, in bits per byte, say against them.

    Args:
        bits: by domain.   calibration: on the calibration text, see calibration_bits.
    """
    warnings = []
    for domain, found in bits.items():
        warnings += unknown_text_warnings(found, name=f"the text {domain}")
        warnings += kind_warnings(calibration, found, name=f"the text {domain}")
    return warnings


def calibration_bits(pruned: Path) -> float | None:
    """The dense model's bits per byte of the calibration text, where the folder's report has them.

    Raises:
        UserError: the report is no JSON object.
    """
    found: Any = _report(pruned)
    for key in ("texts", "bits_per_byte", "calibration"):
        found = found.get(key) if isinstance(found, dict) else None
    return float(found) if isinstance(found, int | float) else None


def _report(pruned: Path) -> dict[str, Any]:
    path = pruned / _REPORT_NAME
    return read_json_object(path, max_bytes=_MAX_REPORT_BYTES) if path.is_file() else {}


def _calibration_files(pruned: Path) -> list[list[Path]]:
    """The files of each source that the layer map names; none of one that cannot be read here."""
    path = pruned / _LAYER_MAP_NAME
    if not path.is_file():
        return []
    named = (read_layer_map(path, sublayers=True).calibration or {}).get("source")
    if not isinstance(named, list) or named == [SELF]:
        return []
    start = _working_folder(pruned)
    return [_readable(start, str(source)) for source in named]


def _readable(start: Path | None, source: str) -> list[Path]:
    """The text files of a source; none where one cannot be read, or nobody knows where it is."""
    if start is None and not Path(source).is_absolute():
        return []
    try:
        files = find_files([(start or Path()) / source])
        for file in files:
            next(unpacked_blocks(file, 1), b"")
    except (TextError, OSError):
        return []
    return files


def _working_folder(pruned: Path) -> Path | None:
    """Where `trsp prune` ran: the pruned folder's place less the --out that the report has."""
    out = _report(pruned).get("out")
    place = pruned.resolve().parts
    if not isinstance(out, str) or Path(out).is_absolute():
        return None
    parts = Path(out).parts
    if not parts or ".." in parts or place[-len(parts) :] != parts:
        return None
    return Path(*place[: -len(parts)])

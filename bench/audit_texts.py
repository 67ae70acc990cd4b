"""What the pruned folder tells of its calibration text, held against the text of an audit."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from trsp.pruner.bounded_json import read_json_object
from trsp.pruner.calibration import build_calibration
from trsp.pruner.errors import UserError
from trsp.pruner.layer_map import read_layer_map
from trsp.pruner.progress import Progress, silent
from trsp.pruner.self_text import SELF
from trsp.pruner.text_checks import (
    WARNED_SHARE,
    Overlap,
    describe_overlap,
    kind_warnings,
    refuse_same_files,
    require_no_overlap,
    unknown_text_warnings,
)
from trsp.pruner.text_files import TextError, find_files, unpacked_blocks

_LAYER_MAP_NAME = "layer_map.json"
_REPORT_NAME = "trsp_report.json"
_MAX_REPORT_BYTES = 256 * 2**20
_REMEDY = "name other files with --data"


def refuse_calibration_text(pruned: Path, data: Mapping[str, Sequence[Path]]) -> None:
    """Refuse text that the pruned model learned from, as far as its folder and the disk tell.

    The layer map has the paths as they were given to `trsp prune`. What cannot be read here is
    not compared, and no relative path where the report does not tell the folder it starts from.

    Raises:
        UserError: a text is calibration text, by place or content; layer map or report is broken.
    """
    sources = _calibration_files(pruned)
    for paths in data.values() if sources else ():
        refuse_same_files(sources, paths, remedy=_REMEDY)


def calibration_ids(
    pruned: Path, tokenizer: PreTrainedTokenizerBase, progress: Progress = silent
) -> Tensor | None:
    """The calibration sequences [N, T], drawn again from the files that the layer map names.

    None where they are not to be had: the map names none, the model wrote the text itself, or what
    is drawn has another hash than the map says, as where a file is gone.

    Raises:
        UserError: layer map or report is broken.
    """
    sources = _calibration_files(pruned)
    if not sources:
        return None
    layer_map = read_layer_map(pruned / _LAYER_MAP_NAME, sublayers=True)
    told = layer_map.calibration or {}
    settings: Any = layer_map.method
    for key in ("recipe", "calibration"):
        settings = settings.get(key) if isinstance(settings, dict) else None
    field = settings.get("text_field") if isinstance(settings, dict) else None
    count, length, seed = (told.get(name) for name in ("num_sequences", "sequence_length", "seed"))
    if not (isinstance(count, int) and isinstance(length, int) and isinstance(seed, int)):
        return None
    try:
        drawn = build_calibration(
            sources,
            tokenizer,
            num_sequences=count,
            sequence_length=length,
            seed=seed,
            text_field=str(field or "text"),
            progress=progress,
        )
    except UserError:
        # The files are others by now: too short, or without that field.
        return None
    return drawn.input_ids if drawn.sha256 == told.get("sha256") else None


def overlaps_with_calibration(
    calibration: Tensor | None, texts: Mapping[str, Tensor], tokenizer: PreTrainedTokenizerBase
) -> tuple[dict[str, Overlap], list[str]]:
    """What each text [S] has in common with the sequences [N, T], and warnings where that is much.

    Both are empty where the sequences are not known.

    Raises:
        UserError: it is too much.
    """
    if calibration is None:
        return {}, []
    overlaps: dict[str, Overlap] = {}
    warnings = []
    for name, ids in texts.items():
        called = f"the text {name}"
        found = require_no_overlap(calibration, ids, tokenizer, held_out=called, remedy=_REMEDY)
        overlaps[name] = found
        if found.share > WARNED_SHARE:
            warnings.append(describe_overlap(found, ids, tokenizer, held_out=called))
    return overlaps, warnings


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


def _calibration_files(pruned: Path) -> list[Path]:
    """The calibration files that the layer map names and that can be read here."""
    path = pruned / _LAYER_MAP_NAME
    if not path.is_file():
        return []
    named = (read_layer_map(path, sublayers=True).calibration or {}).get("source")
    if not isinstance(named, list) or named == [SELF]:
        return []
    start = _working_folder(pruned)
    files: list[Path] = []
    for source in map(str, named):
        if start is None and not Path(source).is_absolute():
            continue
        try:
            found = find_files([(start or Path()) / source])
            for file in found:
                next(unpacked_blocks(file, 1), b"")
        except (TextError, OSError):
            continue
        files += found
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

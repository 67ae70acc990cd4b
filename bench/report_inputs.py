"""Finding the records a report is made of: files, or folders that hold them."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trsp.bench.serve_record import MAX_RECORD_BYTES, ServeRecord, read_serve_record
from trsp.pruner.bounded_json import read_json_object
from trsp.pruner.errors import UserError

# The output folder of `trsp bench serve` holds this, and raw files that are no records beside it.
RECORD_NAME = "record.json"
# No time in milliseconds and no rate comes near; axes of larger numbers overflow.
MOST = 1e15


@dataclass(frozen=True)
class Input:
    """A record and the file it was read from, of which the page shows name and sha256."""

    path: Path
    sha256: str
    record: ServeRecord


@dataclass(frozen=True)
class Inputs:
    """The records of a report, and the files that were looked at and are none."""

    records: tuple[Input, ...]
    ignored: tuple[str, ...]


def read_inputs(paths: Sequence[Path]) -> Inputs:
    """Read every record that `paths` name: files, folders with record.json, folders of *.json.

    A file of another kind is ignored, and said so. A file that claims to be a speed record and is
    broken is an error.

    Raises:
        UserError: a path does not exist, a record is broken, or nothing is a speed record.
    """
    files: list[Path] = []
    for path in paths:
        files += _files_at(path)
    records: list[Input] = []
    ignored: list[str] = []
    for file in dict.fromkeys(files):
        reason = _no_record(file)
        if reason is None:
            sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
            record = read_serve_record(file)
            _refuse_absurd(file, record)
            records.append(Input(file, sha256, record))
        else:
            ignored.append(f"{file.name}: {reason}")
    if not records:
        raise UserError(
            f"{', '.join(map(str, paths))}: no record of a speed experiment "
            f"({'; '.join(ignored) or 'no *.json file'}); name the folder `trsp bench serve` wrote"
        )
    return Inputs(tuple(records), tuple(ignored))


def _files_at(path: Path) -> list[Path]:
    if path.is_dir():
        record = path / RECORD_NAME
        return [record] if record.is_file() else sorted(path.glob("*.json"))
    if not path.exists():
        raise UserError(f"{path}: does not exist; name a record or the folder that holds it")
    return [path]


def _no_record(file: Path) -> str | None:
    """Why a file is no speed record; None when it claims to be one."""
    try:
        kind = read_json_object(file, max_bytes=MAX_RECORD_BYTES).get("kind")
    except UserError as error:
        return f"not read ({str(error).removeprefix(f'{file}: ')})"
    return None if kind == "serve" else f"kind is {kind!r}, not 'serve'"


def _refuse_absurd(file: Path, record: ServeRecord) -> None:
    """UserError for figures that nothing measured."""
    figures = [pair for cell in record.cells for pair in cell.metrics.items()]
    for ratio in record.ratios:
        if ratio.block_numbers and len(set(ratio.block_numbers)) != len(ratio.blocks):
            raise UserError(
                f"{file}: {ratio.arm}, {ratio.load}, {ratio.metric}: block_numbers "
                f"{ratio.block_numbers} for {len(ratio.blocks)} blocks, expected one for each; "
                "damaged?"
            )
        numbers = (ratio.dense, ratio.pruned, ratio.estimate, ratio.low, ratio.high, ratio.bound)
        figures += [(ratio.metric, value) for value in numbers if value is not None]
    for metric, value in figures:
        if abs(value) > MOST:
            raise UserError(f"{file}: {metric!r} is {value:g}, expected at most {MOST:g}; damaged?")

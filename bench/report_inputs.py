"""Finding the records a report is made of: files, or folders that hold them."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

from trsp.bench.serve_record import MAX_RECORD_BYTES, ServeRecord, read_serve_record
from trsp.pruner.bounded_json import read_json_object
from trsp.pruner.errors import UserError

if TYPE_CHECKING:
    from trsp.bench.audit_record import AuditRecord
    from trsp.bench.compare_record import CompareRecord

R = TypeVar("R")
# The output folder of `trsp bench serve` holds this, and raw files that are no records beside it.
RECORD_NAME = "record.json"
# No time in milliseconds and no rate comes near; axes of larger numbers overflow.
MOST = 1e15


@dataclass(frozen=True)
class Input(Generic[R]):
    """A record and the file it was read from, of which the page shows name and sha256."""

    path: Path
    sha256: str
    record: R


@dataclass(frozen=True)
class Inputs:
    """The records of a report, and the files that were looked at and are none.

    `records` are of speed experiments, `compares` of trsp compare, `audits` of trsp audit.
    """

    records: tuple[Input[ServeRecord], ...]
    ignored: tuple[str, ...]
    compares: tuple[Input["CompareRecord"], ...] = ()
    audits: tuple[Input["AuditRecord"], ...] = ()


def read_inputs(paths: Sequence[Path]) -> Inputs:
    """Read every record that `paths` name: files, folders with record.json, folders of *.json.

    A file of another kind is ignored, and said so. A file that claims to be a record and is broken
    is an error.

    Raises:
        UserError: a path does not exist, a record is broken, or nothing is a record.
    """
    files: list[Path] = []
    for path in paths:
        files += _files_at(path)
    records: list[Input[ServeRecord]] = []
    compares: list[Input[CompareRecord]] = []
    audits: list[Input[AuditRecord]] = []
    ignored: list[str] = []
    for file in dict.fromkeys(files):
        kind, reason = _kind(file)
        if kind is None:
            ignored.append(f"{file.name}: {reason}")
            continue
        sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
        if kind == "serve":
            record = read_serve_record(file)
            _refuse_absurd(file, record)
            records.append(Input(file, sha256, record))
        elif kind == "audit":
            audits.append(Input(file, sha256, _read_audit(file)))
        else:
            compares.append(Input(file, sha256, _read_compare(file)))
    if not (records or compares or audits):
        raise UserError(
            f"{', '.join(map(str, paths))}: no record of a speed experiment, comparison or audit "
            f"({'; '.join(ignored) or 'no *.json file'}); name the folder `trsp bench serve` or "
            "`trsp compare` wrote, or the file of `trsp audit`"
        )
    return Inputs(tuple(records), tuple(ignored), tuple(compares), tuple(audits))


def _files_at(path: Path) -> list[Path]:
    if path.is_dir():
        record = path / RECORD_NAME
        return [record] if record.is_file() else sorted(path.glob("*.json"))
    if not path.exists():
        raise UserError(f"{path}: does not exist; name a record or the folder that holds it")
    return [path]


def _read_compare(file: Path) -> "CompareRecord":
    # It brings torch, which a page of speed alone does not wait for.
    from trsp.bench.compare_record import read_compare_record

    return read_compare_record(file)


def _read_audit(file: Path) -> "AuditRecord":
    from trsp.bench.audit_record import read_audit_record

    record = read_audit_record(file)
    for domain in record.domains:
        for name in ("dense_perplexity", "pruned_perplexity"):
            if getattr(domain, name) <= 0:
                raise UserError(
                    f"{file}: {name} on {domain.name!r} is {getattr(domain, name):g}, expected "
                    "more than 0; damaged?"
                )
    return record


def _kind(file: Path) -> tuple[str | None, str]:
    """The kind of record that a file claims to be; None, and why, when it is none."""
    try:
        kind = read_json_object(file, max_bytes=MAX_RECORD_BYTES).get("kind")
    except UserError as error:
        return None, f"not read ({str(error).removeprefix(f'{file}: ')})"
    if kind in ("serve", "trsp compare", "audit"):
        return str(kind), ""
    return None, f"kind is {kind!r}, not 'serve'"


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

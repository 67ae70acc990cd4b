"""`trsp bench kernels`: one run from the plan to the record, and its table."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from trsp.bench.kernel_bars import BARS, Bar, applies, judge_bars
from trsp.bench.kernel_plan import Item, check_selection, plan_dry_run, plan_items
from trsp.bench.kernel_speed import DIRECTIONS, ROUNDS, WARMUP_ROUNDS, failures, measure
from trsp.bench.record import write_record
from trsp.kernels.launch import choose_backend
from trsp.pruner.errors import UserError

DEFAULT_MINUTES = 8.0
_TABLE_WIDTH = 190
_ROOT = Path(__file__).resolve().parent.parent
RECORDS = _ROOT / "bench" / "records"
DRY_RUN = "dry run: nothing was timed"
_NVIDIA_SMI_FIELDS = (
    "name",
    "driver_version",
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "clocks.max.mem",
    "power.limit",
    "temperature.gpu",
)


def run_kernels(
    *,
    dry_run: bool = False,
    ops: Sequence[str] | None = None,
    hidden_sizes: Sequence[int] | None = None,
    tokens: Sequence[int] | None = None,
    dtype: str | None = None,
    minutes: float | None = None,
    bars: bool = True,
    out: Path | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measure on CUDA, or go through everything once on the CPU; the record, as it was written.

    On CUDA the record is written after every case, so that an interrupted run has left one, to
    `out` or `default_record`. A dry run writes only where `out` says.

    Raises:
        UserError: the fused ops cannot run as kernels here, the selection names what cannot be
            measured, or a dry run is to be written among the records.
    """
    check_selection(ops=ops, hidden_sizes=hidden_sizes, tokens=tokens, dtype=dtype, minutes=minutes)
    minutes = DEFAULT_MINUTES if minutes is None else minutes
    if dry_run:
        refuse_as_record(out)
        items = plan_dry_run(ops=ops, dtype=dtype)
        path = out
    else:
        require_fused_kernels()
        items = plan_items(ops=ops, hidden_sizes=hidden_sizes, tokens=tokens, dtype=dtype)
        path = out or default_record(gpu_slug())
    document: dict[str, Any] = {
        "benchmark": "kernels",
        "dry_run": dry_run,
        "complete": False,
        "settings": {"minutes": minutes, "rounds": ROUNDS, "warmup_rounds": WARMUP_ROUNDS},
        "gpu_at_start": None if dry_run else gpu_facts(),
        "liger_version": _liger_version(),
    }

    def record(results: list[dict[str, Any]], left: list[Item]) -> None:
        document["results"] = results
        document["left_out"] = [item.name for item in left]
        document["bars"] = [] if dry_run else judge_bars(results)
        document["failed"] = failures(results)
        if bars and not dry_run:
            document["failed"] += failed_bars(document["bars"], results, left)
        if path is not None:
            write_record(path, document)

    results, left = measure(
        items,
        device="cpu" if dry_run else "cuda",
        seconds=None if dry_run else 60 * minutes,
        after_each=record,
        progress=progress,
    )
    document["complete"] = not left
    document["gpu_at_end"] = None if dry_run else gpu_facts()
    record(results, left)
    document["written_to"] = None if path is None else str(path)
    return document


def _is_held_to(bar: Bar, result: dict[str, Any]) -> bool:
    size = (result["op"], result["dtype"], result["tokens"], result["tensor_bytes"])
    return applies(bar, *size)


def failed_bars(
    bars: Sequence[dict[str, Any]], results: Sequence[dict[str, Any]], left: Sequence[Item]
) -> list[str]:
    """Bars that were missed or could not be measured, and those that time ran out before."""
    found = [
        f"bar: {bar['bar']}: {bar['measured']:.3g}, expected at "
        f"{'most' if bar['at_most'] else 'least'} {bar['bound']:g} ({bar['worst_case']})"
        for bar in bars
        if bar["met"] == "NO"
    ]
    found += [
        f"bar: {bar.name}: not measured, although its sizes were tried"
        for bar, judged in zip(BARS, bars, strict=True)
        if judged["met"] == "not measured" and any(_is_held_to(bar, result) for result in results)
    ]
    waiting = [item.name for item in left if item.for_bars]
    if waiting:
        found.append(f"bar: time ran out before {', '.join(waiting)}; raise --minutes")
    return found


def require_fused_kernels() -> None:
    """Refuse to measure where the fused arm would not be the Triton kernels on a GPU.

    Raises:
        UserError: there is no CUDA device, or the ops would take another path on it.
    """
    if not torch.cuda.is_available():
        raise UserError(
            "trsp bench kernels: no CUDA device here; use --dry-run (every arm once, no times), "
            "--static (machine code) or --traffic (bytes moved), or run it on a GPU machine"
        )
    try:
        path: str = choose_backend(torch.empty(1, device="cuda"))
    except ValueError as error:
        raise UserError(f"trsp bench kernels: {error}") from error
    if path == "triton" and os.environ.get("TRITON_INTERPRET", "0") == "0":
        return
    if path == "triton":
        path = "interpreter"
    raise UserError(
        f"trsp bench kernels: the fused arm would be the {path}; "
        "unset TRSP_KERNELS and TRITON_INTERPRET, and install triton"
    )


def default_record(gpu: str) -> Path:
    """Among the records of the checkout that runs; of an installed trsp in the current folder."""
    is_checkout = (_ROOT / "pyproject.toml").is_file()
    return (RECORDS if is_checkout else Path()) / f"kernels-{gpu}.json"


def refuse_as_record(out: Path | None) -> None:
    """A dry run is no measurement: it is not kept among those."""
    if out is not None and out.resolve().is_relative_to(RECORDS):
        raise UserError(f"{out}: a dry run is not written into bench/records; choose another path")


def gpu_slug() -> str:
    """The GPU's name for a file name: nvidia-h200."""
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")


def gpu_facts() -> dict[str, Any]:
    """Name, cache and multiprocessors, and what nvidia-smi says of driver and clocks; read only."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    facts: dict[str, Any] = {
        "name": properties.name,
        "l2_bytes": properties.L2_cache_size,
        "num_multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
    }
    if shutil.which("nvidia-smi") is None:
        return {**facts, "nvidia_smi": "not found"}
    done = subprocess.run(
        [
            "nvidia-smi",
            f"--id=GPU-{properties.uuid}",
            f"--query-gpu={','.join(_NVIDIA_SMI_FIELDS)}",
            "--format=csv,noheader",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        return {**facts, "nvidia_smi": f"failed: {(done.stdout + done.stderr).strip()[:200]}"}
    values = [value.strip() for value in done.stdout.strip().split(",")]
    return {**facts, "nvidia_smi": dict(zip(_NVIDIA_SMI_FIELDS, values, strict=False))}


def show_kernels(document: dict[str, Any], *, as_json: bool) -> None:
    """Print the record as JSON, or its tables."""
    if as_json:
        print(json.dumps(document, indent=1))
        return
    # Tables are read in logs too: a pipe's 80 columns would fold every name.
    console = Console(width=_TABLE_WIDTH)
    console.print(_dry_run_table(document) if document["dry_run"] else _times_table(document))
    if not document["dry_run"]:
        console.print(_bars_table(document["bars"]))
    for name in document["left_out"]:
        console.print(f"left out for lack of time: {name}")
    for line in document["failed"]:
        console.print(f"FAILED: {line}")
    if document["dry_run"]:
        console.print(DRY_RUN)
    if document["written_to"] is not None:
        console.print(f"record: {document['written_to']}")


def _times_table(document: dict[str, Any]) -> Table:
    table = Table(
        "case", "arm", *(f"{d}, us (p20-p80)" for d in DIRECTIONS), "of copy", "saved", "bars"
    )
    for result in document["results"]:
        met = [bar["met"] for bar in result.get("bars", [])]
        verdict = "NO" if "NO" in met else "yes" if met else ""
        for arm, row in {"copy": result.get("copy", {}), **result["arms"]}.items():
            times = [
                f"{t['median_us']:.1f} ({t['p20_us']:.1f}-{t['p80_us']:.1f})"
                if (t := row.get(direction))
                else ""
                for direction in DIRECTIONS
            ]
            shares = row.get("share_of_copy", {})
            table.add_row(
                result["name"] if arm == "copy" else "",
                arm if row.get("status", "ok") == "ok" else f"{arm}: {row['status']}",
                *times,
                " / ".join(f"{share:.2f}" for share in shares.values()),
                _saved(row, result),
                verdict if arm == "fused" else "",
            )
    return table


def _dry_run_table(document: dict[str, Any]) -> Table:
    table = Table("case", "arm", "result", "saved")
    for result in document["results"]:
        for arm, row in result["arms"].items():
            table.add_row(result["name"], arm, row["status"], _saved(row, result))
    return table


def _saved(row: dict[str, Any], result: dict[str, Any]) -> str:
    """Saved activations as tensors of the case's size and bytes a token beyond them."""
    if "saved_bytes" not in row:
        return ""
    tensors, beyond = divmod(row["saved_bytes"], result["tensor_bytes"])
    return f"{tensors} x [T, D] + {beyond / result['tokens']:.0f} B/token"


def _bars_table(bars: Sequence[dict[str, Any]]) -> Table:
    table = Table("bar", "bound", "measured", "cases", "worst case", "met")
    for bar in bars:
        measured = "" if bar["measured"] is None else f"{bar['measured']:.3g}"
        bound = f"{'<=' if bar['at_most'] else '>='} {bar['bound']:g}"
        cases = str(bar["num_cases"])
        table.add_row(bar["bar"], bound, measured, cases, bar["worst_case"] or "", bar["met"])
    return table


def _liger_version() -> str | None:
    try:
        return version("liger-kernel")
    except PackageNotFoundError:
        return None

"""The traffic proof as a record and a table, beside what eager torch moves.

T tokens (rows), D hidden size; a pass is one [T, D] tensor read or written once. Triton chooses
between compiler and interpreter when it is imported, so the proof runs in a process of its own.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from trsp.bench.record import write_record
from trsp.pruner.errors import RunError, UserError

Row = dict[str, Any]
_DIRECTIONS = ("forward", "backward")


def run_traffic(*, out: Path | None) -> dict[str, Any]:
    """Prove the traffic of every fused op and count that of eager torch; about half a minute.

    Args:
        out: JSON record to write, or None.
    Returns:
        "benchmark": "traffic"; "failed": what contradicts the proof, empty where it holds;
        "cases": launches, passes and bytes of each case; "eager": passes of each eager arm;
        "triton": its version.
    Raises:
        UserError: Triton is not installed. RunError: the proof could not run to its end.
    """
    if find_spec("triton") is None:
        raise UserError("the traffic proof needs Triton (it exists for Linux): pip install triton")
    from trsp.bench.aten_traffic import eager_table

    command = [sys.executable, "-m", "trsp.bench.interpreter_traffic"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        raise RunError(f"the traffic proof ended with {done.returncode}:\n{done.stderr}")
    proof = json.loads(done.stdout)
    record: dict[str, Any] = {"benchmark": "traffic", **proof, "eager": eager_table()}
    if out is not None:
        write_record(out, record)
    return record


def show_traffic(record: dict[str, Any], as_json: bool) -> None:
    """Print the record: one JSON document, or both tables and every failure."""
    if as_json:
        typer.echo(json.dumps(record, indent=1))
        return
    console = Console(soft_wrap=True)
    console.print(traffic_table(record))
    console.print(eager_passes_table(record))
    failed = record["failed"]
    verdict = "every byte as allowed" if not failed else f"{len(failed)} contradictions"
    console.print(
        f"{len(record['cases'])} cases under Triton {record['triton']}: {verdict}", highlight=False
    )
    for reason in failed:
        console.print(f"  {reason}", highlight=False)


def traffic_table(record: dict[str, Any]) -> Table:
    """One row for all dtypes, sizes and conventions of a case, and for norms of equal figures."""
    table = Table(
        "op", "case", "norm", "launches\nfwd / bwd", "passes counted / allowed\nforward",
        "backward", "total", "bytes\na token", "bytes a program\n(D in elements)",
        title="fused ops",
    )  # fmt: skip
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in record["cases"]:
        case = row["case"]
        branches = "" if case["op"] == "gated_difference" else f", {case['num_branches']} branch"
        label = f"{case['gate_kind']} gate{branches}{'es' if '2' in branches else ''}"
        groups.setdefault((case["op"], label, str(case["norm"])), []).append(row)
    merged: dict[tuple[str, ...], list[str]] = {}
    for (op, label, norm), rows in groups.items():
        merged.setdefault((op, label, *_figures(rows)), []).append(norm)
    for (op, label, *figures), norms in merged.items():
        table.add_row(op, label, ", ".join(norms), *figures)
    return table


def eager_passes_table(record: dict[str, Any]) -> Table:
    """Passes of eager torch, at their least, beside the fused op's (bf16, l2, residual gate)."""
    table = Table(
        "op", "arm", "eager passes\nforward", "backward", "total", "fused", "eager / fused",
        title="eager torch, each aten op one kernel",
    )  # fmt: skip
    for op, arms in record["eager"].items():
        fused = max(_total(row) for row in record["cases"] if _is_default(row["case"], op))
        for arm, counted in arms.items():
            passes = [f"{counted[key]:g}" for key in (*_DIRECTIONS, "total")]
            table.add_row(op, arm, *passes, f"{fused:g}", f"{counted['total'] / fused:.2f}")
    return table


def _figures(rows: list[Row]) -> tuple[str, ...]:
    launches = " / ".join(_range(row[side]["launches"] for row in rows) for side in _DIRECTIONS)
    counted = [
        f"{_range(row[side]['passes'] for row in rows)} / "
        f"{_range(row[side]['allowed_passes'] for row in rows)}"
        for side in _DIRECTIONS
    ]
    total = _range(_total(row) for row in rows)
    token = _range(sum(row[side]["bytes_a_token"] for side in _DIRECTIONS) for row in rows)
    gate = _range(sum(row[side]["gate_bytes_a_program"] for side in _DIRECTIONS) for row in rows)
    bytes_of_d = [
        sum(row[side]["row_bytes_a_program"] for side in _DIRECTIONS) / row["case"]["hidden_size"]
        for row in rows
    ]
    program = f"{gate} + ({_range(bytes_of_d)}) D" if any(bytes_of_d) else gate
    return launches, *counted, total, token, program


def _range(values: Iterable[float]) -> str:
    """The value that all have, or the least and the greatest."""
    found = sorted(set(values))
    return f"{found[0]:g}" if len(found) == 1 else f"{found[0]:g} to {found[-1]:g}"


def _total(row: Row) -> float:
    return float(sum(row[side]["passes"] for side in _DIRECTIONS))


def _is_default(case: dict[str, Any], op: str) -> bool:
    from trsp.bench.kernel_cases import KernelCase

    names = ("op", "dtype", "norm", "gate_kind", "num_branches", "convention")
    default = KernelCase(op)  # type: ignore[arg-type]
    return all(case[name] == getattr(default, name) for name in names)

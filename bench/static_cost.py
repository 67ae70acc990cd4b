"""The static cost of the fused kernels: compiled ahead of time for absent GPUs, held to limits.

Shows the absence of known defects (spills, narrow accesses, atomics, extra passes) and of
regressions against the baseline of the same Triton. It is no measurement of speed.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from trsp.bench.kernel_cases import DTYPES
from trsp.bench.record import write_record
from trsp.bench.static_baseline import (
    Entry,
    baseline_path,
    improvements,
    read_baseline,
    regressions,
    summarise,
    write_baseline,
)
from trsp.bench.static_jobs import compile_jobs, jobs
from trsp.bench.static_limits import (
    StaticKernel,
    allowed_traffic,
    counted_traffic,
    passes_of,
    refusals,
)

_LOG_WIDTH = 180


def run_static(*, full: bool, out: Path | None, update_baseline: bool) -> dict[str, Any]:
    """Compile, judge and compare; `failed` lists every reason, empty if all is well.

    `update_baseline` accepts the present machine code, limits apart, and implies the full set.
    """
    full = full or update_baseline
    version, kernels = compile_jobs(jobs(full))
    if update_baseline:
        write_baseline(version, {k: summarise(found) for k, found in by_key(kernels).items()})
    record = judge(version, kernels, read_baseline(version), full=full)
    if out is not None:
        write_record(out, record)
    return record


def by_key(kernels: Sequence[StaticKernel]) -> dict[str, list[StaticKernel]]:
    """The launches of one case in one direction on one target, together."""
    groups: dict[str, list[StaticKernel]] = {}
    for kernel in kernels:
        groups.setdefault(kernel.key, []).append(kernel)
    return dict(sorted(groups.items()))


def judge(
    version: str,
    kernels: Sequence[StaticKernel],
    baseline: dict[str, list[Entry]] | None,
    *,
    full: bool,
) -> dict[str, Any]:
    """The record of a run: what each kernel costs, may cost, and cost when last accepted."""
    groups, failed, improved, documents = by_key(kernels), [], [], []
    update = "trsp bench kernels --static --update-baseline"
    if baseline is None:
        name = baseline_path(version).name
        failed.append(f"no baseline of Triton {version} ({name}): create it with `{update}`")
    elif full and (gone := sorted(set(baseline) - set(groups))):
        failed.append(
            f"{len(gone)} kernels of the baseline are not compiled, {gone[0]}: `{update}`"
        )
    for key, launches in groups.items():
        reasons, better, now = refusals(launches), [], summarise(launches)
        if baseline is not None and key not in baseline:
            reasons.append(f"not in the baseline: `{update}`")
        elif baseline is not None:
            reasons += regressions(now, baseline[key])
            better = improvements(now, baseline[key])
        failed += [f"{key}: {reason}" for reason in reasons]
        improved += [f"{key}: {step}" for step in better]
        documents.append(_document(key, launches, now, reasons))
    return {
        "kind": "static cost",
        "meaning": "Machine code held to limits and to its baseline; not a speed",
        "triton": version,
        "full": full,
        "failed": failed,
        "improved": improved,
        "kernels": documents,
    }


def _document(
    key: str, launches: list[StaticKernel], entries: list[Entry], reasons: list[str]
) -> dict[str, Any]:
    first = launches[0]
    passes = passes_of(first.case, first.direction)
    shapes = [{"kernel": k.kernel, "block": k.block, "num_warps": k.num_warps} for k in launches]
    return {
        "key": key,
        "capability": first.capability,
        "case": asdict(first.case),
        "direction": first.direction,
        "max_registers": first.max_registers,
        "launches": [
            {
                **shape,
                **entry,
                "atomics": kernel.code.num_atomics,
                "traffic": asdict(counted_traffic(kernel)[0]),
            }
            for shape, entry, kernel in zip(shapes, entries, launches, strict=True)
        ],
        "allowed_passes": {"reads": len(passes.reads), "writes": len(passes.writes)},
        "allowed_traffic": asdict(allowed_traffic(first.case, first.direction)),
        "reasons": reasons,
    }


def show_static(record: dict[str, Any], as_json: bool) -> None:
    """One JSON document, or a table with one row for each op, direction, dtype and choice."""
    if as_json:
        print(json.dumps(record, indent=1))
        return
    console = Console(soft_wrap=True)
    if not console.is_terminal:
        # Into a log or a pipe: 80 columns, what rich assumes there, would break every cell.
        console = Console(soft_wrap=True, width=_LOG_WIDTH)
    console.print(cost_table(record))
    for step in record["improved"]:
        console.print(f"cheaper than the baseline: {step}", highlight=False)
    for reason in record["failed"]:
        console.print(f"failed: {reason}", highlight=False)
    console.print(
        f"static cost with Triton {record['triton']}: {len(record['kernels'])} kernels, "
        f"{len(record['failed'])} failures. {record['meaning']}."
    )


def cost_table(record: dict[str, Any]) -> Table:
    """Ranges over targets and D. Registers and warps: found; passes: read + written."""
    rows: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for kernel in record["kernels"]:
        case = kernel["case"]
        choices = [str(case["norm"]), case["gate_kind"]]
        choices += ["one branch"] if case["num_branches"] == 1 else []
        choices += ["gemma"] if case["convention"] == "gemma" else []
        place: tuple[str, ...] = (case["op"], kernel["direction"], case["dtype"])
        rows.setdefault((*place, ", ".join(choices)), []).append(kernel)
    table = Table(
        "op", "direction", "dtype", "choices", "kernels", "registers", "warps", "spills",
        "bits", "atomics", "barriers", "passes, counted / allowed", "verdict",
    )  # fmt: skip
    for key, kernels in rows.items():
        launches = [launch for kernel in kernels for launch in kernel["launches"]]
        widths = {int(w) for launch in launches for w in (*launch["loads"], *launch["stores"])}
        failures = sum(bool(kernel["reasons"]) for kernel in kernels)
        table.add_row(
            *key,
            str(len(kernels)),
            f"{_range(launches, 'registers')} of {kernels[0]['max_registers']}",
            _range(launches, "resident_warps"),
            _range(launches, "spills"),
            # 32 bits is the width of a row's scalars.
            " ".join(str(width) for width in sorted(widths - {32})),
            _range(launches, "atomics"),
            _range(launches, "barriers"),
            " ".join(sorted({_passes(kernel) for kernel in kernels})),
            f"{failures} FAILED" if failures else "ok",
        )
    return table


def _range(launches: list[dict[str, Any]], name: str) -> str:
    values = [launch[name] for launch in launches]
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}-{high}"


def _passes(kernel: dict[str, Any]) -> str:
    """Tensors, or bytes an element where the tensors' dtypes differ."""
    allowed, case = kernel["allowed_traffic"], kernel["case"]
    stream, branch = DTYPES[case["dtype"]]
    unit = stream.itemsize if stream == branch else 1
    read = sum(launch["traffic"]["read"] for launch in kernel["launches"]) / unit
    written = sum(launch["traffic"]["written"] for launch in kernel["launches"]) / unit
    counted = f"{read:g} + {written:g}"
    bar = f"{allowed['read'] / unit:g} + {allowed['written'] / unit:g}"
    return f"{counted} / {bar}{'' if stream == branch else ' bytes'}"

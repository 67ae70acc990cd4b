"""The static cost of the fused kernels: compiled ahead of time for absent GPUs, held to limits.

Shows the absence of known defects (spills, narrow accesses, atomics, extra passes) and of
regressions against the baseline of the same Triton. It is no measurement of speed.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from trsp.bench.kernel_cases import DTYPES, OPS, KernelCase
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
from trsp.bench.static_limits import (
    StaticKernel,
    allowed_traffic,
    counted_traffic,
    passes_of,
    refusals,
)
from trsp.pruner.errors import UserError

CAPABILITIES = (80, 90, 100)
HIDDEN_SIZES = (2048, 3072, 4096, 5120, 8192)
_VARIANT_HIDDEN_SIZE = 4096
# The default set looks at sm_90 in full and at the others where their code may differ most: the
# gate kernels are the same code at every D, the row kernels differ by their number of warps.
_DEFAULT_CAPABILITY = 90
_THIN_HIDDEN_SIZES = (4096, 8192)
# They change what the compiler does; the result must be Triton's own.
_COMPILER_SETTINGS = ("TRITON_", "TRSP_", "PTXAS_", "DISABLE_PTXAS", "NVPTX", "LLVM_", "MLIR_")
_NUM_PROCESSES = 2
_COMMAND = (sys.executable, "-m", "trsp.bench.compile_ahead")

Job = tuple[int, KernelCase]


def canonical_cases(hidden_sizes: Sequence[int]) -> list[KernelCase]:
    """Every op in every dtype, as the training stages call it: l2, residual gate, two branches."""
    return [
        KernelCase(op, dtype, hidden_size)
        for op in OPS
        for dtype in DTYPES
        for hidden_size in hidden_sizes
        # x and y are one residual stream, of one dtype.
        if (op, dtype) != ("gated_difference", "mixed")
    ]


def variant_cases(dtypes: Sequence[str]) -> list[KernelCase]:
    """Each other choice alone, at one D: norms, the output gate, one branch, Gemma's RMSNorm."""
    cases = []
    for case in canonical_cases((_VARIANT_HIDDEN_SIZE,)):
        if case.dtype not in dtypes:
            continue
        cases += [replace(case, norm=norm) for norm in (None, "l1", "l2_squared")]
        cases.append(replace(case, gate_kind="output"))
        if case.op != "gated_difference":
            # gated_difference without a norm is z = s * y, so short that ptxas unrolls it with a
            # remainder: its passes cannot be told from its machine code.
            cases.append(replace(case, gate_kind="output", norm=None))
            cases.append(replace(case, num_branches=1))
        if case.op == "gated_branch_rmsnorm":
            cases.append(replace(case, convention="gemma"))
    return cases


def jobs(full: bool) -> list[Job]:
    """What a run compiles; the default set is for every change, the full one for a baseline."""
    if full:
        cases = canonical_cases(HIDDEN_SIZES) + variant_cases(tuple(DTYPES))
        return [(capability, case) for capability in CAPABILITIES for case in cases]
    return [
        (capability, case)
        for capability in CAPABILITIES
        for case in (
            canonical_cases(HIDDEN_SIZES) + variant_cases(("bf16",))
            if capability == _DEFAULT_CAPABILITY
            else canonical_cases(_THIN_HIDDEN_SIZES)
        )
    ]


def compile_jobs(
    wanted: Sequence[Job], command: Sequence[str] = _COMMAND
) -> tuple[str, list[StaticKernel]]:
    """Triton's version and every launch of the jobs, from processes whose Triton compiles.

    Raises:
        UserError: Triton is not installed. RuntimeError: a process failed; its last words.
    """
    if importlib.util.find_spec("triton") is None:
        raise UserError("the static cost needs Triton, which exists for Linux: pip install triton")
    parts: dict[tuple[int, bool], list[Job]] = {}
    for capability, case in wanted:
        row = case.op == "gated_branch_rmsnorm"
        parts.setdefault((capability, row), []).append((capability, case))
    # The longest first, so that the processes end together.
    ordered = sorted(parts.values(), key=len, reverse=True)
    with ThreadPoolExecutor(_NUM_PROCESSES) as pool:
        documents = list(pool.map(lambda part: _compile_part(part, command), ordered))
    kernels = [
        StaticKernel.from_document(kernel)
        for document in documents
        for kernel in document["kernels"]
    ]
    return documents[0]["triton"], kernels


def _compile_part(part: Sequence[Job], command: Sequence[str]) -> dict[str, Any]:
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(_COMPILER_SETTINGS)
    }
    with tempfile.TemporaryDirectory() as folder:
        wanted, out = Path(folder) / "jobs.json", Path(folder) / "kernels.json"
        wanted.write_text(
            json.dumps([{"capability": target, "case": asdict(case)} for target, case in part])
        )
        # An empty cache of compiled kernels: a stale one cannot lie.
        environment |= {"TRSP_KERNELS": "triton", "TRITON_CACHE_DIR": str(Path(folder) / "cache")}
        done = subprocess.run(
            [*command, str(wanted), str(out)], env=environment, capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"compiling ahead of time failed:\n{done.stderr[-4000:]}")
        document: dict[str, Any] = json.loads(out.read_text())
        return document


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

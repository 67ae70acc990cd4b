"""Which kernels the static cost looks at, and the processes that compile them."""

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

from trsp.bench.kernel_cases import DTYPES, OPS, KernelCase, dtypes_of
from trsp.bench.static_limits import StaticKernel
from trsp.pruner.errors import RunError, UserError

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
        for dtype in dtypes_of(op)
        for hidden_size in hidden_sizes
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
        UserError: Triton is not installed. RunError: a process failed; its last words.
    """
    if importlib.util.find_spec("triton") is None:
        raise UserError("the static cost needs Triton, which exists for Linux: pip install triton")
    shares = [share for share in _shares(wanted) if share]
    with ThreadPoolExecutor(_NUM_PROCESSES) as pool:
        documents = list(pool.map(lambda share: _compile_share(share, command), shares))
    kernels = [
        StaticKernel.from_document(kernel)
        for document in documents
        for kernel in document["kernels"]
    ]
    return documents[0]["triton"], kernels


def _shares(wanted: Sequence[Job]) -> list[list[Job]]:
    """The jobs of each process: one op of one target stays together, the longest first."""
    parts: dict[tuple[int, str], list[Job]] = {}
    for job in wanted:
        parts.setdefault((job[0], job[1].op), []).append(job)
    shares: list[list[Job]] = [[] for _ in range(_NUM_PROCESSES)]
    for part in sorted(parts.values(), key=_effort, reverse=True):
        min(shares, key=_effort).extend(part)
    return shares


def _effort(part: Sequence[Job]) -> int:
    """About its time: a gate kernel is one for all D, a row kernel takes twice as long."""
    distinct = {(case.op == "gated_branch_rmsnorm", target, case) for target, case in part}
    gates = {(target, replace(case, hidden_size=0)) for row, target, case in distinct if not row}
    return len(gates) + 2 * sum(row for row, *_ in distinct)


def _compile_share(share: Sequence[Job], command: Sequence[str]) -> dict[str, Any]:
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(_COMPILER_SETTINGS)
    }
    with tempfile.TemporaryDirectory() as folder:
        wanted, out = Path(folder) / "jobs.json", Path(folder) / "kernels.json"
        wanted.write_text(
            json.dumps([{"capability": target, "case": asdict(case)} for target, case in share])
        )
        # An empty cache of compiled kernels: a stale one cannot lie.
        environment |= {"TRSP_KERNELS": "triton", "TRITON_CACHE_DIR": str(Path(folder) / "cache")}
        done = subprocess.run(
            [*command, str(wanted), str(out)], env=environment, capture_output=True, text=True
        )
        if done.returncode:
            raise RunError(f"compiling ahead of time failed:\n{done.stderr[-4000:]}")
        document: dict[str, Any] = json.loads(out.read_text())
        return document

"""Compiles the kernels of measured cases for GPUs that are absent, and reads their machine code.

    python -m trsp.bench.compile_ahead jobs.json kernels.json

A process of its own, because Triton compiles or interprets for a whole process. The public ops and
their autograd run on CPU tensors under a driver that names a target and has no device: nothing is
executed, and a kernel gets the very specialisation and options of a production launch.
"""

import hashlib
import json
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from trsp.bench.kernel_cases import KernelCase, fused_forward, gradients, make_problem
from trsp.bench.machine_code import MachineCode, read_machine_code
from trsp.bench.static_limits import Direction, StaticKernel
from trsp.kernels import launch

# Divisible by 16, as a training step's number of tokens is.
_NUM_TOKENS = 16


class _AbsentGpu:
    """A driver that names its target and has no device behind it."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_target(self) -> Any:
        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        # Kernels are cached by device: one number for each target.
        return self._capability

    def get_current_stream(self, device: int) -> int:
        return 0


class _Disassembler:
    """Triton's own tools on one cubin; equal ones (a gate kernel at another D) are read once."""

    def __init__(self, folder: Path) -> None:
        self._cubin = folder / "kernel.cubin"
        self._read: dict[str, MachineCode] = {}

    def read(self, cubin: bytes) -> MachineCode:
        key = hashlib.sha256(cubin).hexdigest()
        if key not in self._read:
            self._cubin.write_bytes(cubin)
            tools = triton.knobs.nvidia
            usage = self._run(tools.cuobjdump.path, "-res-usage")
            self._read[key] = read_machine_code(usage, self._run(tools.nvdisasm.path, "-c"))
        return self._read[key]

    def _run(self, tool: str, option: str) -> str:
        done = subprocess.run(
            [tool, option, str(self._cubin)], capture_output=True, text=True, check=True
        )
        return done.stdout


def compile_cases(jobs: list[tuple[int, KernelCase]]) -> Iterator[StaticKernel]:
    """Every kernel that a training step of each (capability, case) launches, in order.

    Raises:
        RuntimeError: Triton interprets in this process, or a case launches nothing.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("Triton interprets in this process: start one without TRITON_INTERPRET")
    original = JITFunction.run
    compiled: list[tuple[Any, dict[str, Any]]] = []

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        compiled.append((original(self, *args, grid=grid, warmup=True, **kwargs), kwargs))

    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(launch, "_triton_obstacle", return_value=None),
        warnings.catch_warnings(),
    ):
        # gated_difference warns of cancellation in 16 bits: nothing is computed here.
        warnings.simplefilter("ignore", UserWarning)
        disassembler = _Disassembler(Path(folder))
        for capability, case in jobs:
            triton.runtime.driver.set_active(_AbsentGpu(capability))
            problem = make_problem(case, _NUM_TOKENS, "cpu")
            compiled.clear()
            outputs = fused_forward(problem)
            num_forward = len(compiled)
            gradients(problem, outputs)
            if not 0 < num_forward < len(compiled):
                raise RuntimeError(f"{case.name}: forward or backward launched no Triton kernel")
            for position, (kernel, options) in enumerate(compiled):
                direction: Direction = "forward" if position < num_forward else "backward"
                code = disassembler.read(kernel.asm["cubin"])
                yield _describe(capability, case, direction, kernel, options, code)


def _describe(
    capability: int,
    case: KernelCase,
    direction: Direction,
    kernel: Any,
    options: dict[str, Any],
    code: MachineCode,
) -> StaticKernel:
    return StaticKernel(
        capability=capability,
        case=case,
        direction=direction,
        kernel=kernel.metadata.name,
        block=options["BLOCK"],
        num_warps=kernel.metadata.num_warps,
        shared_bytes=kernel.metadata.shared,
        multiplied=tuple(sorted(set(re.findall(r"arith\.muli .*? : (i\d+)", kernel.asm["ttir"])))),
        ptx_atomics=tuple(re.findall(r"\b(?:atom|red)\.\S+", kernel.asm["ptx"])),
        code=code,
    )


def compile_file(jobs: Path, out: Path) -> None:
    """Compile the jobs of a JSON file into a JSON file: Triton's version and the kernels."""
    cases = [(job["capability"], KernelCase(**job["case"])) for job in json.loads(jobs.read_text())]
    kernels = [asdict(kernel) for kernel in compile_cases(cases)]
    out.write_text(json.dumps({"triton": triton.__version__, "kernels": kernels}))


if __name__ == "__main__":
    compile_file(Path(sys.argv[1]), Path(sys.argv[2]))

"""Compiles every kernel for GPUs that are absent: a script, for a Triton that does not interpret.

The launchers themselves are called, on CPU tensors, under a driver that names a target and has no
device. So a variant is compiled with the very specialisation and options of a production launch.
Prints a JSON list: for each compiled kernel what `cuobjdump` and the intermediate code say of it.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from trsp.kernels import gated_branch_triton, gated_difference_triton

D = 4096
CAPABILITIES = (80, 90)
DTYPES = {
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16, torch.float16),
    "fp32": (torch.float32, torch.float32),
    "mixed": (torch.float32, torch.bfloat16),
}
# Every norm in bf16, every dtype with l2, both gates: dtype, norm, gate_kind.
VARIANTS = (
    *(("bf16", norm, "residual") for norm in (None, "l1", "l2", "l2_squared")),
    *((dtype, "l2", "residual") for dtype in ("fp16", "fp32", "mixed")),
    ("bf16", "l2", "output"),
)


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


def launches(dtype: str, norm: Any, gate_kind: Any) -> Iterator[Callable[[], Any]]:
    """The launches of a training step of both ops: forward and backward, everything learning."""
    stream_dtype, branch_dtype = DTYPES[dtype]
    x, y = torch.ones(2, 2, D, dtype=stream_dtype)
    attn_out, mlp_out = torch.ones(2, 2, D, dtype=branch_dtype)
    gate, per_token = torch.ones(1), None if norm is None else torch.ones(2)
    choice = {"gate_kind": gate_kind, "norm": norm}
    ref_norm, output = norm is not None, gate_kind == "output"
    yield lambda: gated_branch_triton.gated_branch_forward(
        x, attn_out, mlp_out, gate, **choice, ref_norm=ref_norm, save_d=True
    )
    if (dtype, norm) == ("bf16", "l2"):
        yield lambda: gated_branch_triton.gated_branch_forward(
            x, attn_out, None, gate, **choice, ref_norm=ref_norm, save_d=True
        )
    yield lambda: gated_branch_triton.gated_branch_backward(
        y,
        x,
        x if output else None,
        per_token,
        per_token,
        gate,
        **choice,
        branch_dtype=branch_dtype,
        need_dx=output,
        need_dgate=True,
    )
    if stream_dtype != branch_dtype:
        return
    yield lambda: gated_difference_triton.gated_difference_forward(
        x, y, gate, **choice, ref_norm=ref_norm
    )
    yield lambda: gated_difference_triton.gated_difference_backward(
        y,
        x,
        y,
        per_token,
        per_token,
        gate,
        **choice,
        need_dx=True,
        need_dy=True,
        need_dgate=True,
    )


def record(name: str, compiled: Any, cubin: Path) -> dict[str, Any]:
    """What became of one kernel."""
    cubin.write_bytes(compiled.asm["cubin"])
    usage = subprocess.run(
        [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    (resources,) = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    return {
        "kernel": name,
        **dict(zip(("registers", "stack", "local"), map(int, resources), strict=True)),
        "multiplied": sorted(set(re.findall(r"arith\.muli .*? : (i\d+)", compiled.asm["ttir"]))),
        "atomics": re.findall(r"\b(?:atom|red)\.\S+", compiled.asm["ptx"]),
    }


def main() -> None:
    run, compiled = JITFunction.run, []

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        compiled.append((self.__name__, run(self, *args, grid=grid, warmup=True, **kwargs)))

    JITFunction.run = compile_only
    records = []
    with tempfile.TemporaryDirectory() as folder:
        for capability in CAPABILITIES:
            triton.runtime.driver.set_active(_AbsentGpu(capability))
            for variant in VARIANTS:
                for launch in launches(*variant):
                    launch()
                    entry = record(*compiled.pop(), cubin=Path(folder) / "kernel.cubin")
                    label = "-".join(str(part) for part in variant)
                    records.append({"variant": f"sm_{capability}-{label}", **entry})
    json.dump(records, sys.stdout)


if __name__ == "__main__":
    main()

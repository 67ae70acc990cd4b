"""Compiles for GPUs that are absent: a script, run in a process whose Triton does not interpret.

The launchers themselves are called, with CPU tensors, under a driver that names a target and
launches nothing. So each variant is compiled with exactly the arguments, alignments and options
that production launches it with. Prints one JSON record for each compiled kernel.
"""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from trsp.kernels import gated_branch_triton, gated_difference_triton

HALF = torch.bfloat16
NORMS = (None, "l1", "l2", "l2_squared")


class _AbsentGpu:
    """A driver of one target without a device behind it."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def _variants() -> Iterator[tuple[str, Callable[[int], None]]]:
    """Every norm in bf16, every dtype with l2, both gates: a name and the launches behind it."""
    stream_dtypes = {"bf16": (HALF, HALF), "fp16": (torch.float16,) * 2, "fp32": (torch.float32,) * 2}
    stream_dtypes["mixed"] = (torch.float32, HALF)
    chosen = [("bf16", norm) for norm in NORMS] + [(dtype, "l2") for dtype in ("fp16", "fp32", "mixed")]
    for dtype, norm in chosen:
        yield f"{dtype}-{norm}-residual", _launches(*stream_dtypes[dtype], norm, "residual")
    yield "bf16-l2-output", _launches(HALF, HALF, "l2", "output")


def _launches(stream: torch.dtype, branch: torch.dtype, norm: Any, gate_kind: Any) -> Callable[[int], None]:
    def launch(hidden_size: int) -> None:
        x, z = torch.ones(2, 2, hidden_size, dtype=stream)
        attn, mlp = torch.ones(2, 2, hidden_size, dtype=branch)
        gate, row = torch.ones(1), torch.ones(2)
        per_row = None if norm is None else row
        choice = {"gate_kind": gate_kind, "norm": norm}
        gated_branch_triton.gated_branch_forward(
            x, attn, mlp, gate, **choice, ref_norm=norm is not None, save_d=True
        )
        output = gate_kind == "output"
        gated_branch_triton.gated_branch_backward(
            z, x, x if output else None, per_row, per_row, gate, **choice,
            branch_dtype=branch, need_dx=output, need_dgate=True,
        )
        if stream == branch:
            gated_difference_triton.gated_difference_forward(
                x, z, gate, **choice, ref_norm=norm is not None
            )
            gated_difference_triton.gated_difference_backward(
                z, x, z, per_row, per_row, gate, **choice,
                need_dx=True, need_dy=True, need_dgate=True,
            )
    return launch

compiled = []
run = JITFunction.run
def compile_only(self, *args, grid, warmup, **kwargs):
    compiled.append((self, run(self, *args, grid=grid, warmup=True, **kwargs)))
JITFunction.run = compile_only
import time
for cap in (80, 90):
    triton.runtime.driver.set_active(_AbsentGpu(cap))
    for k in list(vars(gated_branch_triton).values())+list(vars(gated_difference_triton).values()):
        if isinstance(k, JITFunction): k.device_caches.clear()
    for name, launch in _variants():
        t=time.time(); launch(4096); dt=time.time()-t
        for fn,k in compiled:
            Path("/tmp/kern/k.cubin").write_bytes(k.asm["cubin"])
            out=subprocess.run([triton.knobs.nvidia.cuobjdump.path,"-res-usage","/tmp/kern/k.cubin"],capture_output=True,text=True).stdout
            r=re.findall(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)",out)
            ptx=k.asm["ptx"]
            print(cap,name,fn.__name__,r,len(re.findall("cvt.rn.(bf16|f16)",ptx)),"fma",len(re.findall("fma",ptx)),sorted(set(re.findall(r"(?:ld|st)\.global\S*",ptx))),re.findall(r"arith.muli .*",k.asm["ttir"]))
        compiled.clear()
        print(dt)

"""Kernels with one planted defect each, compiled as the production kernels are.

    python tests/bench/mutant_kernels.py FOLDER

For each FOLDER/MUTANT.json, jobs of trsp.bench.compile_ahead, writes FOLDER/MUTANT.out.json. The
defect replaces a part of the launchers, in a fork of this process for each mutant.
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl

from trsp.bench.compile_ahead import compile_file
from trsp.kernels import gated_branch_rmsnorm_triton, gated_branch_triton, gated_difference_triton
from trsp.kernels.gate_math_triton import apply_gate, norm_of_sum, norm_term

LAUNCHERS = (gated_branch_triton, gated_branch_rmsnorm_triton, gated_difference_triton)


@triton.jit
def _unfused_forward_kernel(
    x_ptr,
    y_ptr,
    gate_ptr,
    z_ptr,
    diff_norm_ptr,
    x_norm_ptr,
    x_row_stride,
    y_row_stride,
    D,
    GATE_KIND: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """gated_difference's forward whose norms read x and y again."""
    row = tl.program_id(0).to(tl.int64)
    gate = tl.load(gate_ptr)
    for start in range(0, D, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = columns < D
        x = tl.load(x_ptr + row * x_row_stride + columns, mask=mask, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + row * y_row_stride + columns, mask=mask, other=0.0).to(tl.float32)
        z = apply_gate(x, y, gate, GATE_KIND)
        tl.store(z_ptr + row * D + columns, z.to(z_ptr.dtype.element_ty), mask=mask)
    diff_sum = tl.zeros([BLOCK], tl.float32)
    x_sum = tl.zeros([BLOCK], tl.float32)
    for start in range(0, D, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = columns < D
        x = tl.load(x_ptr + row * x_row_stride + columns, mask=mask, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + row * y_row_stride + columns, mask=mask, other=0.0).to(tl.float32)
        diff_sum += norm_term(y - x, NORM)
        x_sum += norm_term(x, NORM)
    tl.store(diff_norm_ptr + row, norm_of_sum(tl.sum(diff_sum, axis=0), NORM))
    tl.store(x_norm_ptr + row, norm_of_sum(tl.sum(x_sum, axis=0), NORM))


@triton.jit
def _atomic_backward_kernel(
    dz_ptr,
    x_ptr,
    y_ptr,
    diff_norm_ptr,
    norm_grad_ptr,
    gate_ptr,
    dx_ptr,
    dy_ptr,
    row_dgate_ptr,
    dz_row_stride,
    x_row_stride,
    y_row_stride,
    D,
    GATE_KIND: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """gated_difference's backward for l1 whose rows add to one gradient of the gate."""
    row = tl.program_id(0).to(tl.int64)
    gate = tl.load(gate_ptr)
    scale = tl.load(norm_grad_ptr + row)
    dgate_sum = tl.zeros([BLOCK], tl.float32)
    for start in range(0, D, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = columns < D
        dz = tl.load(dz_ptr + row * dz_row_stride + columns, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + row * x_row_stride + columns, mask=mask, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + row * y_row_stride + columns, mask=mask, other=0.0).to(tl.float32)
        c = scale * tl.where(y > x, 1.0, -1.0)
        dgate_sum += dz * (y - x)
        dx = ((1.0 - gate) * dz - c).to(dx_ptr.dtype.element_ty)
        dy = (gate * dz + c).to(dy_ptr.dtype.element_ty)
        tl.store(dx_ptr + row * D + columns, dx, mask=mask)
        tl.store(dy_ptr + row * D + columns, dy, mask=mask)
    tl.atomic_add(row_dgate_ptr, tl.sum(dgate_sum, axis=0))


class _Options:
    """Launch options other than the launch table's."""

    def __init__(self, launch: Any, **changed: Any) -> None:
        self.num_warps = changed.get("num_warps", launch.num_warps)
        self._options = {**launch.options(), **changed}

    def options(self) -> dict[str, Any]:
        return self._options


def _change_launches(**changed: Any) -> None:
    for module in LAUNCHERS:
        for name in [name for name in vars(module) if name.endswith("_launch")]:
            launch = getattr(module, name)
            setattr(module, name, lambda size, launch=launch: _Options(launch(size), **changed))


def _shift_by_one_element(rows: torch.Tensor) -> torch.Tensor:
    """The same shape and strides, from an address that 16 bytes do not divide."""
    flat = torch.zeros(rows.numel() + 1, dtype=rows.dtype)
    return flat[1:].view(rows.shape)


def _plant_unaligned() -> None:
    for module in LAUNCHERS:
        as_rows = module.as_rows
        module.as_rows = lambda tensor, as_rows=as_rows: _shift_by_one_element(as_rows(tensor))


def _plant_twice() -> None:
    """The forward launched twice: every tensor moves twice."""
    launcher = gated_branch_triton.gated_branch_forward

    def twice(*args: Any, **kwargs: Any) -> Any:
        launcher(*args, **kwargs)
        return launcher(*args, **kwargs)

    gated_branch_triton.gated_branch_forward = twice


MUTANTS = {
    "unaligned": _plant_unaligned,
    "narrow": lambda: _change_launches(BLOCK=256, num_warps=4),
    "spilling": lambda: _change_launches(maxnreg=24),
    "greedy": lambda: _change_launches(BLOCK=4096, num_warps=4, maxnreg=None),
    "unfused": lambda: setattr(
        gated_difference_triton, "_gated_difference_forward_kernel", _unfused_forward_kernel
    ),
    "atomic": lambda: setattr(
        gated_difference_triton, "_gated_difference_backward_kernel", _atomic_backward_kernel
    ),
    "twice": _plant_twice,
}


def main() -> None:
    folder, children = Path(sys.argv[1]), {}
    for jobs in sorted(folder.glob("*.json")):
        child = os.fork()
        if child == 0:
            MUTANTS[jobs.stem]()
            compile_file(jobs, jobs.with_suffix(".out.json"))
            sys.exit()
        children[child] = jobs.stem
    failed = [name for child, name in children.items() if os.waitpid(child, 0)[1]]
    if failed:
        sys.exit(f"these mutants do not compile: {failed}")


if __name__ == "__main__":
    main()

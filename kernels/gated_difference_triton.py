"""The Triton kernels of `gated_difference` and their launchers; one program a row.

T tokens (rows), D hidden size, d = y - x. Formulas: trsp.kernels.reference, whose functions have
the same names and arguments as the launchers here. A pointer that a call does not need is None,
and its loads or stores are not compiled.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from trsp.kernels.arguments import GateKind, Norm
from trsp.kernels.gate_math_triton import (
    apply_gate,
    norm_gradient,
    norm_gradient_scale,
    norm_of_sum,
    norm_term,
)
from trsp.kernels.launch import as_rows, contiguous_like, gate_launch


@triton.jit
def _gated_difference_forward_kernel(
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
    row = tl.program_id(0).to(tl.int64)
    gate = tl.load(gate_ptr)
    diff_sum = tl.zeros([BLOCK], tl.float32)
    x_sum = tl.zeros([BLOCK], tl.float32)
    for start in range(0, D, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = columns < D
        x = tl.load(x_ptr + row * x_row_stride + columns, mask=mask, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + row * y_row_stride + columns, mask=mask, other=0.0).to(tl.float32)
        z = apply_gate(x, y, gate, GATE_KIND)
        if diff_norm_ptr is not None:
            diff_sum += norm_term(y - x, NORM)
        if x_norm_ptr is not None:
            x_sum += norm_term(x, NORM)
        tl.store(z_ptr + row * D + columns, z.to(z_ptr.dtype.element_ty), mask=mask)
    if diff_norm_ptr is not None:
        tl.store(diff_norm_ptr + row, norm_of_sum(tl.sum(diff_sum, axis=0), NORM))
    if x_norm_ptr is not None:
        tl.store(x_norm_ptr + row, norm_of_sum(tl.sum(x_sum, axis=0), NORM))


@triton.jit
def _gated_difference_backward_kernel(
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
    row = tl.program_id(0).to(tl.int64)
    gate = tl.load(gate_ptr)
    if norm_grad_ptr is not None:
        scale = norm_gradient_scale(tl.load(norm_grad_ptr + row), diff_norm_ptr, row, NORM)
    dgate_sum = tl.zeros([BLOCK], tl.float32)
    for start in range(0, D, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = columns < D
        dx = tl.zeros([BLOCK], tl.float32)
        dy = tl.zeros([BLOCK], tl.float32)
        if dz_ptr is not None:
            dz = tl.load(dz_ptr + row * dz_row_stride + columns, mask=mask, other=0.0)
            dz = dz.to(tl.float32)
            dy = gate * dz
            if GATE_KIND == "residual":
                # Not dz - dy: that would round c away where dz is large.
                dx = (1.0 - gate) * dz
        if x_ptr is not None:
            x = tl.load(x_ptr + row * x_row_stride + columns, mask=mask, other=0.0).to(tl.float32)
        if y_ptr is not None:
            y = tl.load(y_ptr + row * y_row_stride + columns, mask=mask, other=0.0).to(tl.float32)
        if norm_grad_ptr is not None:
            c = norm_gradient(y - x, scale, NORM)
            dx -= c
            dy += c
        if row_dgate_ptr is not None:
            moved = y
            if GATE_KIND == "residual":
                moved = y - x
            dgate_sum += dz * moved
        if dx_ptr is not None:
            tl.store(dx_ptr + row * D + columns, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if dy_ptr is not None:
            tl.store(dy_ptr + row * D + columns, dy.to(dy_ptr.dtype.element_ty), mask=mask)
    if row_dgate_ptr is not None:
        tl.store(row_dgate_ptr + row, tl.sum(dgate_sum, axis=0))


def gated_difference_forward(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    *,
    gate_kind: GateKind,
    norm: Norm | None,
    ref_norm: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """z, diff_norm, x_norm."""
    z = contiguous_like(x, x.dtype)
    diff_norm = None if norm is None else z.new_empty(x.shape[:-1], dtype=torch.float32)
    x_norm = torch.empty_like(diff_norm) if ref_norm and diff_norm is not None else None
    x_rows, y_rows = as_rows(x), as_rows(y)
    if x.numel() > 0:
        with torch.cuda.device_of(x):
            _gated_difference_forward_kernel[(x_rows.shape[0],)](
                x_ptr=x_rows,
                y_ptr=y_rows,
                gate_ptr=gate,
                z_ptr=z,
                diff_norm_ptr=diff_norm,
                x_norm_ptr=x_norm,
                x_row_stride=x_rows.stride(0),
                y_row_stride=y_rows.stride(0),
                D=x.shape[-1],
                GATE_KIND=gate_kind,
                NORM=norm,
                **gate_launch(x.shape[-1]).options(),
            )
    return z, diff_norm, x_norm


def gated_difference_backward(
    dz: Tensor | None,
    x: Tensor | None,
    y: Tensor | None,
    diff_norm: Tensor | None,
    norm_grad: Tensor | None,
    gate: Tensor,
    *,
    gate_kind: GateKind,
    norm: Norm | None,
    need_dx: bool,
    need_dy: bool,
    need_dgate: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx, dy, dgate."""
    like = y if dz is None else dz
    assert like is not None
    dx = contiguous_like(like, like.dtype) if need_dx else None
    dy = contiguous_like(like, like.dtype) if need_dy else None
    row_dgate = like.new_empty(like.shape[:-1], dtype=torch.float32) if need_dgate else None
    reads_xy = norm_grad is not None or need_dgate
    dz_rows = None if dz is None else as_rows(dz)
    x_rows = as_rows(x) if x is not None and reads_xy else None
    y_rows = as_rows(y) if y is not None and reads_xy else None
    if like.numel() > 0 and (need_dx or need_dy or need_dgate):
        with torch.cuda.device_of(like):
            _gated_difference_backward_kernel[(like.numel() // like.shape[-1],)](
                dz_ptr=dz_rows,
                x_ptr=x_rows,
                y_ptr=y_rows,
                diff_norm_ptr=diff_norm,
                norm_grad_ptr=None if norm_grad is None else norm_grad.contiguous(),
                gate_ptr=gate,
                dx_ptr=dx,
                dy_ptr=dy,
                row_dgate_ptr=row_dgate,
                dz_row_stride=0 if dz_rows is None else dz_rows.stride(0),
                x_row_stride=0 if x_rows is None else x_rows.stride(0),
                y_row_stride=0 if y_rows is None else y_rows.stride(0),
                D=like.shape[-1],
                GATE_KIND=gate_kind,
                NORM=norm,
                **gate_launch(like.shape[-1]).options(),
            )
    return dx, dy, None if row_dgate is None else row_dgate.sum().view(1)

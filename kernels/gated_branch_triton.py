"""The Triton kernels of `gated_branch` and their launchers; one program a row.

T tokens (rows), D hidden size, d = attn_out + mlp_out (the name of what is saved). Formulas:
trsp.kernels.reference, whose functions have the same names and arguments as the launchers here.
A pointer that a call does not need is None, and its loads or stores are not compiled.
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
    round_to,
)
from trsp.kernels.launch import as_rows, contiguous_like, gate_launch


@triton.jit
def _gated_branch_forward_kernel(
    x_ptr,
    attn_ptr,
    mlp_ptr,
    gate_ptr,
    z_ptr,
    d_ptr,
    diff_norm_ptr,
    x_norm_ptr,
    x_row_stride,
    attn_row_stride,
    mlp_row_stride,
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
        attn = tl.load(attn_ptr + row * attn_row_stride + columns, mask=mask, other=0.0)
        attn = attn.to(tl.float32)
        y = round_to(x + attn, z_ptr)
        d = attn
        if mlp_ptr is not None:
            mlp = tl.load(mlp_ptr + row * mlp_row_stride + columns, mask=mask, other=0.0)
            mlp = mlp.to(tl.float32)
            y = round_to(y + mlp, z_ptr)
            d = attn + mlp
        z = apply_gate(x, y, gate, GATE_KIND)
        tl.store(z_ptr + row * D + columns, z.to(z_ptr.dtype.element_ty), mask=mask)
        if d_ptr is not None:
            tl.store(d_ptr + row * D + columns, d.to(d_ptr.dtype.element_ty), mask=mask)
        if diff_norm_ptr is not None:
            diff_sum += norm_term(d, NORM)
        if x_norm_ptr is not None:
            x_sum += norm_term(x, NORM)
    if diff_norm_ptr is not None:
        tl.store(diff_norm_ptr + row, norm_of_sum(tl.sum(diff_sum, axis=0), NORM))
    if x_norm_ptr is not None:
        tl.store(x_norm_ptr + row, norm_of_sum(tl.sum(x_sum, axis=0), NORM))


@triton.jit
def _gated_branch_backward_kernel(
    dz_ptr,
    d_ptr,
    x_ptr,
    diff_norm_ptr,
    norm_grad_ptr,
    gate_ptr,
    dbranch_ptr,
    dx_ptr,
    row_dgate_ptr,
    dz_row_stride,
    d_row_stride,
    x_row_stride,
    D,
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
        scaled = tl.zeros([BLOCK], tl.float32)
        if dz_ptr is not None:
            dz = tl.load(dz_ptr + row * dz_row_stride + columns, mask=mask, other=0.0)
            dz = dz.to(tl.float32)
            scaled = gate * dz
        if dx_ptr is not None:
            tl.store(dx_ptr + row * D + columns, scaled.to(dx_ptr.dtype.element_ty), mask=mask)
        if d_ptr is not None:
            d = tl.load(d_ptr + row * d_row_stride + columns, mask=mask, other=0.0).to(tl.float32)
        if dbranch_ptr is not None:
            dbranch = scaled
            if norm_grad_ptr is not None:
                dbranch += norm_gradient(d, scale, NORM)
            dbranch = dbranch.to(dbranch_ptr.dtype.element_ty)
            tl.store(dbranch_ptr + row * D + columns, dbranch, mask=mask)
        if row_dgate_ptr is not None:
            moved = d
            if x_ptr is not None:
                x = tl.load(x_ptr + row * x_row_stride + columns, mask=mask, other=0.0)
                moved += x.to(tl.float32)
            dgate_sum += dz * moved
    if row_dgate_ptr is not None:
        tl.store(row_dgate_ptr + row, tl.sum(dgate_sum, axis=0))


def gated_branch_forward(
    x: Tensor,
    attn_out: Tensor,
    mlp_out: Tensor | None,
    gate: Tensor,
    *,
    gate_kind: GateKind,
    norm: Norm | None,
    ref_norm: bool,
    save_d: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """z, d in x's dtype if `save_d` (attn_out itself where it is d), diff_norm, x_norm."""
    z = contiguous_like(x, x.dtype)
    d = torch.empty_like(z) if save_d and mlp_out is not None else None
    diff_norm = None if norm is None else z.new_empty(x.shape[:-1], dtype=torch.float32)
    x_norm = torch.empty_like(diff_norm) if ref_norm and diff_norm is not None else None
    x_rows, attn_rows = as_rows(x), as_rows(attn_out)
    mlp_rows = None if mlp_out is None else as_rows(mlp_out)
    if x.numel() > 0:
        with torch.cuda.device_of(x):
            _gated_branch_forward_kernel[(x_rows.shape[0],)](
                x_ptr=x_rows,
                attn_ptr=attn_rows,
                mlp_ptr=mlp_rows,
                gate_ptr=gate,
                z_ptr=z,
                d_ptr=d,
                diff_norm_ptr=diff_norm,
                x_norm_ptr=x_norm,
                x_row_stride=x_rows.stride(0),
                attn_row_stride=attn_rows.stride(0),
                mlp_row_stride=0 if mlp_rows is None else mlp_rows.stride(0),
                D=x.shape[-1],
                GATE_KIND=gate_kind,
                NORM=norm,
                **gate_launch(x.shape[-1]).options(),
            )
    return z, attn_out if save_d and mlp_out is None else d, diff_norm, x_norm


def gated_branch_backward(
    dz: Tensor | None,
    d: Tensor | None,
    x: Tensor | None,
    diff_norm: Tensor | None,
    norm_grad: Tensor | None,
    gate: Tensor,
    *,
    gate_kind: GateKind,
    norm: Norm | None,
    branch_dtype: torch.dtype | None,
    need_dx: bool,
    need_dgate: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dbranch (of both branches) if `branch_dtype`, dx of an output gate, dgate."""
    like = d if dz is None else dz
    assert like is not None
    dbranch = None if branch_dtype is None else contiguous_like(like, branch_dtype)
    dx = contiguous_like(like, like.dtype) if need_dx else None
    row_dgate = like.new_empty(like.shape[:-1], dtype=torch.float32) if need_dgate else None
    d_rows = as_rows(d) if d is not None and (norm_grad is not None or need_dgate) else None
    dz_rows = None if dz is None else as_rows(dz)
    x_rows = as_rows(x) if x is not None and need_dgate else None
    if like.numel() > 0 and (need_dx or need_dgate or branch_dtype is not None):
        with torch.cuda.device_of(like):
            _gated_branch_backward_kernel[(like.numel() // like.shape[-1],)](
                dz_ptr=dz_rows,
                d_ptr=d_rows,
                x_ptr=x_rows,
                diff_norm_ptr=diff_norm,
                norm_grad_ptr=None if norm_grad is None else norm_grad.contiguous(),
                gate_ptr=gate,
                dbranch_ptr=dbranch,
                dx_ptr=dx,
                row_dgate_ptr=row_dgate,
                dz_row_stride=0 if dz_rows is None else dz_rows.stride(0),
                d_row_stride=0 if d_rows is None else d_rows.stride(0),
                x_row_stride=0 if x_rows is None else x_rows.stride(0),
                D=like.shape[-1],
                NORM=norm,
                **gate_launch(like.shape[-1]).options(),
            )
    return dbranch, dx, None if row_dgate is None else row_dgate.sum().view(1)

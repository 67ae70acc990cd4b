"""The Triton kernels of `gated_branch_rmsnorm` and their launchers; a row is held in registers.

T tokens (rows), D hidden size, d = attn_out + mlp_out (the name of what is saved). Formulas:
trsp.kernels.reference, whose functions have the same names and arguments as the launchers here.
A pointer that a call does not need is None, and its loads or stores are not compiled.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from trsp.kernels.arguments import Convention, GateKind, Norm
from trsp.kernels.gate_math_triton import (
    apply_gate,
    norm_gradient,
    norm_gradient_scale,
    norm_of_sum,
    norm_term,
    rmsnorm_gain,
    round_to,
)

# The op takes every launcher from this module: where z alone has a gradient, that is this one.
from trsp.kernels.gated_branch_triton import gated_branch_backward as gated_branch_backward
from trsp.kernels.launch import (
    as_rows,
    contiguous_like,
    num_row_programs,
    row_backward_launch,
    row_forward_launch,
)


@triton.jit
def _gated_branch_rmsnorm_forward_kernel(
    x_ptr,
    attn_ptr,
    mlp_ptr,
    gate_ptr,
    weight_ptr,
    z_ptr,
    normed_ptr,
    rstd_ptr,
    d_ptr,
    diff_norm_ptr,
    x_norm_ptr,
    x_row_stride,
    attn_row_stride,
    mlp_row_stride,
    D,
    eps,
    GATE_KIND: tl.constexpr,
    NORM: tl.constexpr,
    CONVENTION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < D
    gate = tl.load(gate_ptr)
    x = tl.load(x_ptr + row * x_row_stride + columns, mask=mask, other=0.0).to(tl.float32)
    attn = tl.load(attn_ptr + row * attn_row_stride + columns, mask=mask, other=0.0)
    d = attn.to(tl.float32)
    y = round_to(x + d, z_ptr)
    if mlp_ptr is not None:
        mlp = tl.load(mlp_ptr + row * mlp_row_stride + columns, mask=mask, other=0.0)
        mlp = mlp.to(tl.float32)
        y = round_to(y + mlp, z_ptr)
        d += mlp
    # The norm reads what the next layer reads: z as it is stored.
    z = round_to(apply_gate(x, y, gate, GATE_KIND), z_ptr)
    mean_square = tl.div_rn(tl.sum(z * z, axis=0), D * 1.0)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(mean_square + eps))
    weight = tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    normed = z * rstd
    if CONVENTION == "llama":
        normed = round_to(normed, normed_ptr)
    normed = normed * rmsnorm_gain(weight, CONVENTION)
    tl.store(z_ptr + row * D + columns, z.to(z_ptr.dtype.element_ty), mask=mask)
    tl.store(normed_ptr + row * D + columns, normed.to(normed_ptr.dtype.element_ty), mask=mask)
    tl.store(rstd_ptr + row, rstd)
    if d_ptr is not None:
        tl.store(d_ptr + row * D + columns, d.to(d_ptr.dtype.element_ty), mask=mask)
    if diff_norm_ptr is not None:
        total = tl.sum(norm_term(d, NORM), axis=0)
        tl.store(diff_norm_ptr + row, norm_of_sum(total, NORM))
    if x_norm_ptr is not None:
        total = tl.sum(norm_term(x, NORM), axis=0)
        tl.store(x_norm_ptr + row, norm_of_sum(total, NORM))


@triton.jit
def _gated_branch_rmsnorm_backward_kernel(
    dz_ptr,
    dnormed_ptr,
    z_ptr,
    rstd_ptr,
    weight_ptr,
    d_ptr,
    x_ptr,
    diff_norm_ptr,
    norm_grad_ptr,
    gate_ptr,
    dbranch_ptr,
    dx_ptr,
    row_dgate_ptr,
    program_dweight_ptr,
    dz_row_stride,
    dnormed_row_stride,
    d_row_stride,
    x_row_stride,
    num_rows,
    D,
    GATE_KIND: tl.constexpr,
    NORM: tl.constexpr,
    CONVENTION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < D
    gate = tl.load(gate_ptr)
    weight = tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    gain = rmsnorm_gain(weight, CONVENTION)
    dweight = tl.zeros([BLOCK], tl.float32)
    for row in range(program, num_rows, tl.num_programs(0)):
        rstd = tl.load(rstd_ptr + row)
        z = tl.load(z_ptr + row * D + columns, mask=mask, other=0.0).to(tl.float32)
        dnormed = tl.load(
            dnormed_ptr + row * dnormed_row_stride + columns, mask=mask, other=0.0
        ).to(tl.float32)
        normed = z * rstd
        dweight += dnormed * normed
        dnormed *= gain
        along_row = tl.div_rn(tl.sum(dnormed * normed, axis=0), D * 1.0)
        dz = rstd * (dnormed - normed * along_row)
        if dz_ptr is not None:
            own_dz = tl.load(dz_ptr + row * dz_row_stride + columns, mask=mask, other=0.0)
            dz = own_dz.to(tl.float32) + dz
        scaled = gate * dz
        # After the sum over the row: before it, registers are short.
        if d_ptr is not None:
            d = tl.load(d_ptr + row * d_row_stride + columns, mask=mask, other=0.0).to(tl.float32)
        if dx_ptr is not None:
            dx = dz
            if GATE_KIND == "output":
                dx = scaled
            tl.store(dx_ptr + row * D + columns, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if dbranch_ptr is not None:
            dbranch = scaled
            if norm_grad_ptr is not None:
                scale = norm_gradient_scale(tl.load(norm_grad_ptr + row), diff_norm_ptr, row, NORM)
                dbranch += norm_gradient(d, scale, NORM)
            dbranch = dbranch.to(dbranch_ptr.dtype.element_ty)
            tl.store(dbranch_ptr + row * D + columns, dbranch, mask=mask)
        if row_dgate_ptr is not None:
            moved = d
            if x_ptr is not None:
                x = tl.load(x_ptr + row * x_row_stride + columns, mask=mask, other=0.0)
                moved += x.to(tl.float32)
            tl.store(row_dgate_ptr + row, tl.sum(dz * moved, axis=0))
    if program_dweight_ptr is not None:
        tl.store(program_dweight_ptr + program * D + columns, dweight, mask=mask)


def gated_branch_rmsnorm_forward(
    x: Tensor,
    attn_out: Tensor,
    mlp_out: Tensor | None,
    gate: Tensor,
    weight: Tensor,
    *,
    eps: float,
    convention: Convention,
    gate_kind: GateKind,
    norm: Norm | None,
    ref_norm: bool,
    save_d: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """z, normed, rstd, d in x's dtype if `save_d` (attn_out itself where it is d), both norms."""
    z, normed = contiguous_like(x, x.dtype), contiguous_like(x, x.dtype)
    d = torch.empty_like(z) if save_d and mlp_out is not None else None
    rstd = z.new_empty(x.shape[:-1], dtype=torch.float32)
    diff_norm = None if norm is None else torch.empty_like(rstd)
    x_norm = torch.empty_like(rstd) if ref_norm and norm is not None else None
    x_rows, attn_rows = as_rows(x), as_rows(attn_out)
    mlp_rows = None if mlp_out is None else as_rows(mlp_out)
    if x.numel() > 0:
        with torch.cuda.device_of(x):
            _gated_branch_rmsnorm_forward_kernel[(x_rows.shape[0],)](
                x_ptr=x_rows,
                attn_ptr=attn_rows,
                mlp_ptr=mlp_rows,
                gate_ptr=gate,
                weight_ptr=weight.contiguous(),
                z_ptr=z,
                normed_ptr=normed,
                rstd_ptr=rstd,
                d_ptr=d,
                diff_norm_ptr=diff_norm,
                x_norm_ptr=x_norm,
                x_row_stride=x_rows.stride(0),
                attn_row_stride=attn_rows.stride(0),
                mlp_row_stride=0 if mlp_rows is None else mlp_rows.stride(0),
                D=x.shape[-1],
                eps=eps,
                GATE_KIND=gate_kind,
                NORM=norm,
                CONVENTION=convention,
                **row_forward_launch(x.shape[-1]).options(),
            )
    saved = attn_out if save_d and mlp_out is None else d
    return z, normed, rstd, saved, diff_norm, x_norm


def gated_branch_rmsnorm_backward(
    dz: Tensor | None,
    dnormed: Tensor,
    z: Tensor,
    rstd: Tensor,
    weight: Tensor,
    d: Tensor | None,
    x: Tensor | None,
    diff_norm: Tensor | None,
    norm_grad: Tensor | None,
    gate: Tensor,
    *,
    convention: Convention,
    gate_kind: GateKind,
    norm: Norm | None,
    branch_dtype: torch.dtype | None,
    need_dx: bool,
    need_dgate: bool,
    need_dweight: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dbranch (of both branches) if `branch_dtype`, dx, dgate, dweight."""
    hidden_size = z.shape[-1]
    launch, num_rows = row_backward_launch(hidden_size), z.numel() // hidden_size
    num_programs = num_row_programs(z, num_rows, launch)
    dbranch = None if branch_dtype is None else contiguous_like(z, branch_dtype)
    dx = contiguous_like(z, z.dtype) if need_dx else None
    row_dgate = torch.empty_like(rstd) if need_dgate else None
    program_dweight = None
    if need_dweight:
        program_dweight = rstd.new_empty(num_programs, hidden_size)
    d_rows = as_rows(d) if d is not None and (norm_grad is not None or need_dgate) else None
    dz_rows, dnormed_rows = None if dz is None else as_rows(dz), as_rows(dnormed)
    x_rows = as_rows(x) if x is not None and need_dgate else None
    if num_rows > 0:
        with torch.cuda.device_of(z):
            _gated_branch_rmsnorm_backward_kernel[(num_programs,)](
                dz_ptr=dz_rows,
                dnormed_ptr=dnormed_rows,
                z_ptr=z,
                rstd_ptr=rstd,
                weight_ptr=weight.contiguous(),
                d_ptr=d_rows,
                x_ptr=x_rows,
                diff_norm_ptr=diff_norm,
                norm_grad_ptr=None if norm_grad is None else norm_grad.contiguous(),
                gate_ptr=gate,
                dbranch_ptr=dbranch,
                dx_ptr=dx,
                row_dgate_ptr=row_dgate,
                program_dweight_ptr=program_dweight,
                dz_row_stride=0 if dz_rows is None else dz_rows.stride(0),
                dnormed_row_stride=dnormed_rows.stride(0),
                d_row_stride=0 if d_rows is None else d_rows.stride(0),
                x_row_stride=0 if x_rows is None else x_rows.stride(0),
                num_rows=num_rows,
                D=hidden_size,
                GATE_KIND=gate_kind,
                NORM=norm,
                CONVENTION=convention,
                **launch.options(),
            )
    return (
        dbranch,
        dx,
        None if row_dgate is None else row_dgate.sum().view(1),
        None if program_dweight is None else program_dweight.sum(dim=0).to(weight.dtype),
    )

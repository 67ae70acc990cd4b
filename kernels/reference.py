"""The gate ops in plain torch: the formulas that the Triton kernels are held to.

T tokens (any leading shape), D hidden size; x, attn_out (a), mlp_out (m) and y are [..., D], the
gate s is [1], norms are [...]. Everything is computed in fp32 (float64 for float64 inputs) and
rounded where the unmodified model rounds:

    y = (x + a) + m         each sum rounded to x's dtype, as the model does
    d = a + m  or  y - x    never rounded before the norm
    z = x + s * (y - x)     residual gate; exactly y at s = 1, exactly x at s = 0
    z = s * y               output gate
    n = ||d||_p             l1, l2, or squared l2
    h = w * r  or (1 + w) * r, r = z / sqrt(mean(z^2) + eps)      the RMSNorm that follows

Formulas: TRSP, arXiv 2505.18232, stages 1 and 2.
"""

import torch
from torch import Tensor

from trsp.kernels.arguments import Convention, GateKind, Norm


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
    dtype = _compute_dtype(x)
    y = (x + attn_out).to(x.dtype)
    if mlp_out is not None:
        y = (y + mlp_out).to(x.dtype)
    z = _apply_gate(x, y, gate, gate_kind)
    saved = diff_norm = None
    if save_d or norm is not None:
        d = attn_out.to(dtype) if mlp_out is None else attn_out.to(dtype) + mlp_out.to(dtype)
        if save_d:
            saved = attn_out if mlp_out is None else d.to(x.dtype)
        if norm is not None:
            diff_norm = _norm_of(d, norm)
    x_norm = _norm_of(x.to(dtype), norm) if ref_norm and norm is not None else None
    return z, saved, diff_norm, x_norm


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
    """dbranch (of both branches) if `branch_dtype`, dx of an output gate, dgate.

    At least one of dz and norm_grad is given. x is read for an output gate's dgate alone.
    """
    dtype = _compute_dtype(_given(dz, norm_grad))
    dz_wide, d_wide = _widen(dz, dtype), _widen(d, dtype)
    c = _norm_gradient(d_wide, diff_norm, norm_grad, norm)
    dbranch = dx = dgate = None
    if branch_dtype is not None or need_dx:
        scaled = None if dz_wide is None else gate.to(dtype) * dz_wide
        dbranch = _narrow(_add(scaled, c), branch_dtype)
        dx = _narrow(scaled, None if dz is None or not need_dx else dz.dtype)
    if need_dgate and dz_wide is not None:
        assert d_wide is not None
        moved = d_wide if x is None else d_wide + x.to(dtype)
        dgate = _sum_to_gate(dz_wide * moved, gate)
    return dbranch, dx, dgate


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
    """z, normed, rstd, d as of `gated_branch_forward`, diff_norm, x_norm."""
    z, d, diff_norm, x_norm = gated_branch_forward(
        x,
        attn_out,
        mlp_out,
        gate,
        gate_kind=gate_kind,
        norm=norm,
        ref_norm=ref_norm,
        save_d=save_d,
    )
    normed, rstd = rmsnorm(z, weight, eps, convention)
    return z, normed, rstd, d, diff_norm, x_norm


def rmsnorm(z: Tensor, weight: Tensor, eps: float, convention: Convention) -> tuple[Tensor, Tensor]:
    """normed and 1 / sqrt(mean(z^2) + eps), computed in the order of transformers' own norms."""
    z_wide = z.to(_compute_dtype(z))
    rstd = torch.rsqrt(z_wide.pow(2).mean(dim=-1) + eps)
    row = z_wide * rstd.unsqueeze(-1)
    if convention == "llama":
        return weight * row.to(z.dtype), rstd
    return (row * (1.0 + weight.to(row.dtype))).to(z.dtype), rstd


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
    """dbranch (of both branches) if `branch_dtype`, dx, dgate, dweight.

    The gradient of z, its own dz and what the norm sends back, is rounded only as dx. d is read
    for the norm's gradient and dgate, x for an output gate's dgate alone.
    """
    dtype = _compute_dtype(z)
    dnormed_wide, w = dnormed.to(dtype), weight.to(dtype)
    row = z.to(dtype) * rstd.unsqueeze(-1)
    drow = dnormed_wide * (w if convention == "llama" else 1.0 + w)
    along_row = (drow * row).mean(dim=-1, keepdim=True)
    dz_wide = rstd.unsqueeze(-1) * (drow - row * along_row)
    if dz is not None:
        dz_wide = dz.to(dtype) + dz_wide
    c = _norm_gradient(_widen(d, dtype), diff_norm, norm_grad, norm)
    scaled = gate.to(dtype) * dz_wide
    dbranch = _narrow(_add(scaled, c), branch_dtype)
    dx = (dz_wide if gate_kind == "residual" else scaled).to(z.dtype) if need_dx else None
    dgate = dweight = None
    if need_dgate:
        assert d is not None
        moved = d.to(dtype) if x is None else d.to(dtype) + x.to(dtype)
        dgate = _sum_to_gate(dz_wide * moved, gate)
    if need_dweight:
        terms = (dnormed_wide * row).reshape(-1, row.shape[-1])
        dweight = terms.sum(dim=0).to(weight.dtype)
    return dbranch, dx, dgate, dweight


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
    dtype = _compute_dtype(x)
    z = _apply_gate(x, y, gate, gate_kind)
    diff_norm = None if norm is None else _norm_of(y.to(dtype) - x.to(dtype), norm)
    x_norm = _norm_of(x.to(dtype), norm) if ref_norm and norm is not None else None
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
    """dx, dy, dgate; at least one of dz and norm_grad is given.

    y is given with norm_grad and for dgate; x too, except for an output gate's dgate alone.
    dx is (1 - s) * dz - c and never dz - dy: that would round c away where dz is large.
    """
    grad = _given(dz, norm_grad)
    dtype, grad_dtype = _compute_dtype(grad), grad.dtype if y is None else y.dtype
    dz_wide, x_wide, y_wide = _widen(dz, dtype), _widen(x, dtype), _widen(y, dtype)
    d = None if x_wide is None or y_wide is None else y_wide - x_wide
    c = _norm_gradient(d, diff_norm, norm_grad, norm)
    s = gate.to(dtype)
    dx = dy = dgate = None
    if need_dx:
        along_x = None if dz_wide is None or gate_kind == "output" else (1 - s) * dz_wide
        dx = _narrow(_add(along_x, None if c is None else -c), grad_dtype)
    if need_dy:
        dy = _narrow(_add(None if dz_wide is None else s * dz_wide, c), grad_dtype)
    if need_dgate and dz_wide is not None:
        moved = y_wide if gate_kind == "output" else d
        assert moved is not None
        dgate = _sum_to_gate(dz_wide * moved, gate)
    return dx, dy, dgate


def _compute_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _given(dz: Tensor | None, norm_grad: Tensor | None) -> Tensor:
    """Either gradient tells the dtype to compute in; backward runs with at least one."""
    grad = norm_grad if dz is None else dz
    assert grad is not None
    return grad


def _widen(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


def _narrow(tensor: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
    return None if tensor is None or dtype is None else tensor.to(dtype)


def _add(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    if first is None or second is None:
        return second if first is None else first
    return first + second


def _apply_gate(x: Tensor, y: Tensor, gate: Tensor, gate_kind: GateKind) -> Tensor:
    dtype = _compute_dtype(x)
    s, y_wide = gate.to(dtype), y.to(dtype)
    if gate_kind == "output":
        return (s * y_wide).to(x.dtype)
    x_wide = x.to(dtype)
    z = (x_wide + s * (y_wide - x_wide)).to(x.dtype)
    # Selected, not computed: y - x is not exact in fp32, and 0 * inf would revive a dead layer.
    return torch.where(s == 0, x, torch.where(s == 1, y, z))


def _norm_of(d: Tensor, norm: Norm) -> Tensor:
    if norm == "l1":
        return d.abs().sum(dim=-1)
    squared = d.square().sum(dim=-1)
    return squared.sqrt() if norm == "l2" else squared


def _norm_gradient(
    d: Tensor | None, diff_norm: Tensor | None, norm_grad: Tensor | None, norm: Norm | None
) -> Tensor | None:
    """c, the gradient of the norms' weighted sum to d: finite and 0 where d is 0."""
    if norm_grad is None:
        return None
    assert d is not None
    if norm == "l1":
        return norm_grad.unsqueeze(-1) * d.sign()
    if norm == "l2_squared":
        return (2 * norm_grad).unsqueeze(-1) * d
    assert diff_norm is not None
    still = diff_norm == 0
    scale = torch.where(still, 0.0, norm_grad / torch.where(still, 1.0, diff_norm))
    return scale.unsqueeze(-1) * d


def _sum_to_gate(terms: Tensor, gate: Tensor) -> Tensor:
    """Sum per token, then over tokens: the order of the kernels."""
    return terms.sum(dim=-1).sum().view(1).to(gate.dtype)

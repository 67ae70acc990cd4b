"""The gate of a layer together with the RMSNorm that reads its output: the last op of one layer
and the first of the next in one pass.

T tokens (any leading shape), D hidden size. Formulas: trsp.kernels.reference; kernels:
trsp.kernels.gated_branch_rmsnorm_triton. Both run inside one autograd.Function, so what is saved,
what is skipped and what is None is one contract.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trsp.kernels import reference
from trsp.kernels.arguments import (
    Convention,
    GateKind,
    Norm,
    check_branch_dtypes,
    check_gate_arguments,
    check_rmsnorm_arguments,
)
from trsp.kernels.launch import MAX_ROW, Backend, choose_backend

GatedNormed = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


class _GatedBranchRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        attn_out: Tensor,
        mlp_out: Tensor | None,
        gate: Tensor,
        weight: Tensor,
        eps: float,
        convention: Convention,
        gate_kind: GateKind,
        norm: Norm | None,
        ref_norm: bool,
        backend: Backend,
    ) -> GatedNormed:
        need_x, need_attn, need_mlp, need_gate = ctx.needs_input_grad[:4]
        norm_has_grad = norm is not None and (need_attn or need_mlp)
        z, normed, rstd, d, diff_norm, x_norm = _formulas(backend).gated_branch_rmsnorm_forward(
            x,
            attn_out,
            mlp_out,
            gate,
            weight,
            eps=eps,
            convention=convention,
            gate_kind=gate_kind,
            norm=norm,
            ref_norm=ref_norm,
            save_d=need_gate or norm_has_grad,
        )
        ctx.save_for_backward(
            gate,
            weight,
            z,
            rstd,
            d,
            x if need_gate and gate_kind == "output" else None,
            diff_norm if norm_has_grad and norm == "l2" else None,
        )
        ctx.convention, ctx.gate_kind, ctx.norm, ctx.backend = convention, gate_kind, norm, backend
        ctx.branch_dtype = attn_out.dtype
        ctx.set_materialize_grads(False)
        # x_norm as well: a penalty relative to ||x|| must not be lowered by inflating x.
        without_grad = [x_norm] if norm_has_grad else [diff_norm, x_norm]
        if not (need_x or need_attn or need_mlp or need_gate):
            without_grad.append(z)
        ctx.mark_non_differentiable(*[tensor for tensor in without_grad if tensor is not None])
        return z, normed, diff_norm, x_norm

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        dz: Tensor | None,
        dnormed: Tensor | None,
        norm_grad: Tensor | None,
        _x_norm_grad: None,
    ) -> tuple[Tensor | None, ...]:
        if dz is None and dnormed is None and norm_grad is None:
            return (None,) * 11
        gate, weight, z, rstd, d, x, diff_norm = ctx.saved_tensors
        need_x, need_attn, need_mlp, need_gate, need_weight = ctx.needs_input_grad[:5]
        residual = ctx.gate_kind == "residual"
        formulas = _formulas(ctx.backend)
        choices: dict[str, Any] = {
            "gate_kind": ctx.gate_kind,
            "norm": None if norm_grad is None else ctx.norm,
            "branch_dtype": ctx.branch_dtype if need_attn or need_mlp else None,
        }
        dweight = None
        if dnormed is None:
            dbranch, dx, dgate = formulas.gated_branch_backward(
                dz,
                d,
                x,
                diff_norm,
                norm_grad,
                gate,
                **choices,
                need_dx=need_x and not residual and dz is not None,
                need_dgate=need_gate and dz is not None,
            )
            # z = x + s * d: x's gradient is dz itself, the same tensor.
            dx = dz if residual else dx
        else:
            dbranch, dx, dgate, dweight = formulas.gated_branch_rmsnorm_backward(
                dz,
                dnormed,
                z,
                rstd,
                weight,
                d,
                x,
                diff_norm,
                norm_grad,
                gate,
                **choices,
                convention=ctx.convention,
                need_dx=need_x,
                need_dgate=need_gate,
                need_dweight=need_weight,
            )
        return (
            dx if need_x else None,
            dbranch if need_attn else None,
            dbranch if need_mlp else None,
            dgate,
            dweight,
            *(None,) * 6,
        )


def _formulas(backend: Backend) -> Any:
    """The module that computes forward and backward; Triton is imported where it is used."""
    if backend == "reference":
        return reference
    from trsp.kernels import gated_branch_rmsnorm_triton

    return gated_branch_rmsnorm_triton


def _gated_branch_rmsnorm(
    op: str,
    x: Tensor,
    attn_out: Tensor,
    mlp_out: Tensor | None,
    gate: Tensor,
    weight: Tensor,
    eps: float,
    convention: Convention,
    gate_kind: GateKind,
    norm: Norm | None,
    ref_norm: bool,
    backend: Backend | None,
) -> GatedNormed:
    """Check, choose where `backend` is None, and enter autograd only where something learns."""
    branches = {"attn_out": attn_out}
    if mlp_out is not None:
        branches["mlp_out"] = mlp_out
    check_gate_arguments(op, x, branches, gate, gate_kind, norm, ref_norm)
    check_branch_dtypes(op, x, branches)
    check_rmsnorm_arguments(op, x, weight, eps, convention, MAX_ROW)
    backend = backend or choose_backend(x)
    inputs = (x, attn_out, mlp_out, gate, weight)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        result: GatedNormed = _GatedBranchRMSNorm.apply(  # type: ignore[no-untyped-call]
            *inputs, eps, convention, gate_kind, norm, ref_norm, backend
        )
        return result
    z, normed, _, _, diff_norm, x_norm = _formulas(backend).gated_branch_rmsnorm_forward(
        *inputs,
        eps=eps,
        convention=convention,
        gate_kind=gate_kind,
        norm=norm,
        ref_norm=ref_norm,
        save_d=False,
    )
    return z, normed, diff_norm, x_norm


def gated_branch_rmsnorm(
    x: Tensor,
    attn_out: Tensor,
    mlp_out: Tensor | None,
    gate: Tensor,
    weight: Tensor,
    *,
    eps: float,
    convention: Convention,
    gate_kind: GateKind = "residual",
    norm: Norm | None = "l1",
    ref_norm: bool = False,
) -> GatedNormed:
    """`gated_branch`, and the RMSNorm that reads its output, in one pass.

        z, diff_norm, x_norm = gated_branch(x, attn_out, mlp_out, gate, ...)
        r      = z / sqrt(mean(z^2) + eps)       over D, of the rounded z
        normed = weight * round(r)               convention "llama"
        normed = round((1 + weight) * r)         convention "gemma"

    z and both norms are those of `gated_branch`, bit for bit at either end of the gate. In the
    reference normed is that of transformers' LlamaRMSNorm and GemmaRMSNorm to the bit; a kernel
    adds the squares in another order. The gradient of z is the sum of its own and the norm's,
    in fp32, rounded once. Values and gradients are bit-equal on a second run on one device: the
    weight's gradient is summed over tokens in a fixed order, without atomics. For training it
    keeps d and z, in x's dtype, and 8 bytes a token. Differentiable once.

    Args:
        x: [..., D], D at most 8192, bf16/fp16/fp32 (float64 in the reference); any strides,
            though rows without unit stride in D, or without one common stride, are copied.
        attn_out, mlp_out, gate, gate_kind, norm, ref_norm: as in `gated_branch`.
        weight: [D], x's dtype and device: the weight of the norm that follows the layer.
        eps: added to the mean square, above 0.
        convention: "llama" or "gemma".
    Returns:
        z, normed: [..., D], x's dtype. diff_norm, x_norm: [...], fp32, or None.
    Raises:
        ValueError: shapes or devices differ, D is beyond the limit, a choice is unknown, or
            TRSP_KERNELS forces the impossible. TypeError: dtypes differ or are unsupported.
    Accumulates in fp32. Sources: TRSP, arXiv 2505.18232; RMSNorm, arXiv 1910.07467; checked
    against gated_branch_rmsnorm_reference and float64.
    """
    return _gated_branch_rmsnorm(
        "gated_branch_rmsnorm",
        x,
        attn_out,
        mlp_out,
        gate,
        weight,
        eps,
        convention,
        gate_kind,
        norm,
        ref_norm,
        None,
    )


def gated_branch_rmsnorm_reference(
    x: Tensor,
    attn_out: Tensor,
    mlp_out: Tensor | None,
    gate: Tensor,
    weight: Tensor,
    *,
    eps: float,
    convention: Convention,
    gate_kind: GateKind = "residual",
    norm: Norm | None = "l1",
    ref_norm: bool = False,
) -> GatedNormed:
    """`gated_branch_rmsnorm` in plain torch with the same backward, whatever TRSP_KERNELS says."""
    return _gated_branch_rmsnorm(
        "gated_branch_rmsnorm_reference",
        x,
        attn_out,
        mlp_out,
        gate,
        weight,
        eps,
        convention,
        gate_kind,
        norm,
        ref_norm,
        "reference",
    )

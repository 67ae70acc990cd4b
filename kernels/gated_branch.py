"""The gate of a layer whose residual branches can be reached: one op in place of its two adds.

T tokens (any leading shape), D hidden size. Formulas: trsp.kernels.reference; kernels:
trsp.kernels.gated_branch_triton. Both run inside one autograd.Function, so what is saved, what is
skipped and what is None is one contract.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trsp.kernels import reference
from trsp.kernels.arguments import GateKind, Norm, check_branch_dtypes, check_gate_arguments
from trsp.kernels.launch import Backend, choose_backend

GatedTriple = tuple[Tensor, Tensor | None, Tensor | None]


class _GatedBranch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        attn_out: Tensor,
        mlp_out: Tensor | None,
        gate: Tensor,
        gate_kind: GateKind,
        norm: Norm | None,
        ref_norm: bool,
        backend: Backend,
    ) -> GatedTriple:
        _, need_attn, need_mlp, need_gate = ctx.needs_input_grad[:4]
        norm_has_grad = norm is not None and (need_attn or need_mlp)
        z, d, diff_norm, x_norm = _formulas(backend).gated_branch_forward(
            x,
            attn_out,
            mlp_out,
            gate,
            gate_kind=gate_kind,
            norm=norm,
            ref_norm=ref_norm,
            save_d=need_gate or norm_has_grad,
        )
        ctx.save_for_backward(
            gate,
            d,
            x if need_gate and gate_kind == "output" else None,
            diff_norm if norm_has_grad and norm == "l2" else None,
        )
        ctx.gate_kind, ctx.norm, ctx.backend = gate_kind, norm, backend
        ctx.branch_dtype = attn_out.dtype
        ctx.set_materialize_grads(False)
        # x_norm as well: a penalty relative to ||x|| must not be lowered by inflating x.
        without_grad = [x_norm] if norm_has_grad else [diff_norm, x_norm]
        ctx.mark_non_differentiable(*[tensor for tensor in without_grad if tensor is not None])
        return z, diff_norm, x_norm

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dz: Tensor | None, norm_grad: Tensor | None, _x_norm_grad: None
    ) -> tuple[Tensor | None, ...]:
        if dz is None and norm_grad is None:
            return (None,) * 8
        gate, d, x, diff_norm = ctx.saved_tensors
        need_x, need_attn, need_mlp, need_gate = ctx.needs_input_grad[:4]
        residual = ctx.gate_kind == "residual"
        dbranch, dx, dgate = _formulas(ctx.backend).gated_branch_backward(
            dz,
            d,
            x,
            diff_norm,
            norm_grad,
            gate,
            gate_kind=ctx.gate_kind,
            norm=None if norm_grad is None else ctx.norm,
            branch_dtype=ctx.branch_dtype if need_attn or need_mlp else None,
            need_dx=need_x and not residual and dz is not None,
            need_dgate=need_gate and dz is not None,
        )
        return (
            # z = x + s * d: x's gradient is dz itself, the same tensor.
            (dz if residual else dx) if need_x else None,
            dbranch if need_attn else None,
            dbranch if need_mlp else None,
            dgate,
            *(None,) * 4,
        )


def _formulas(backend: Backend) -> Any:
    """The module that computes forward and backward; Triton is imported where it is used."""
    if backend == "reference":
        return reference
    from trsp.kernels import gated_branch_triton

    return gated_branch_triton


def _gated_branch(
    op: str,
    x: Tensor,
    attn_out: Tensor,
    mlp_out: Tensor | None,
    gate: Tensor,
    gate_kind: GateKind,
    norm: Norm | None,
    ref_norm: bool,
    backend: Backend | None,
) -> GatedTriple:
    """Check, choose where `backend` is None, and enter autograd only where something learns."""
    branches = {"attn_out": attn_out}
    if mlp_out is not None:
        branches["mlp_out"] = mlp_out
    check_gate_arguments(op, x, branches, gate, gate_kind, norm, ref_norm)
    check_branch_dtypes(op, x, branches)
    backend = backend or choose_backend(x)
    inputs = (x, attn_out, mlp_out, gate)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        triple: GatedTriple = _GatedBranch.apply(  # type: ignore[no-untyped-call]
            *inputs, gate_kind, norm, ref_norm, backend
        )
        return triple
    z, _, diff_norm, x_norm = _formulas(backend).gated_branch_forward(
        *inputs, gate_kind=gate_kind, norm=norm, ref_norm=ref_norm, save_d=False
    )
    return z, diff_norm, x_norm


def gated_branch(
    x: Tensor,
    attn_out: Tensor,
    mlp_out: Tensor | None,
    gate: Tensor,
    *,
    gate_kind: GateKind = "residual",
    norm: Norm | None = "l1",
    ref_norm: bool = False,
) -> GatedTriple:
    """Add a layer's branches to its input under a gate, and measure how far they move it.

        d         = attn_out + mlp_out
        z         = x + gate * d            residual gate: 1 keeps the layer, 0 removes it
        z         = gate * (x + d)          output gate
        diff_norm = ||d||                   per token; l1, l2 or squared l2
        x_norm    = ||x||                   the same norm, on request, without gradient

    At gate 1 z is `(x + attn_out) + mlp_out` bit for bit; a residual gate of 0 returns x bit for
    bit. d is summed in fp32, so it keeps its bits where y - x would cancel. Values and gradients
    are bit-equal on a second run. For training it keeps d, in x's dtype (an output gate
    that is trained: x too), and nothing of size [T, D] where neither the gate nor a norm can ask
    for it. Differentiable once.

    Args:
        x: [..., D], bf16/fp16/fp32 (float64 in the reference); any strides, though rows without
            unit stride in D, or without one common stride, are copied.
        attn_out, mlp_out: as x, or both of one 16-bit dtype beside an fp32 x. mlp_out is None
            for a layer of one branch or of parallel branches, which are added beforehand.
        gate: [1], fp32, x's device: gates[layer:layer + 1] of the model's vector.
        gate_kind: "residual" or "output".
        norm: "l1", "l2", "l2_squared", or None to skip it (stage 1 needs z alone).
        ref_norm: also return x_norm.
    Returns:
        z: [..., D], x's dtype. diff_norm: [...], fp32, activation units (squared
        for l2_squared), or None. x_norm: as diff_norm, or None.
    Raises:
        ValueError: shapes or devices differ, a choice is unknown, or TRSP_KERNELS forces the
            impossible. TypeError: dtypes differ or are unsupported.
    Accumulates in fp32. Source: TRSP, arXiv 2505.18232, stages 1 and 2; checked against
    gated_branch_reference and float64.
    """
    op = "gated_branch"
    return _gated_branch(op, x, attn_out, mlp_out, gate, gate_kind, norm, ref_norm, None)


def gated_branch_reference(
    x: Tensor,
    attn_out: Tensor,
    mlp_out: Tensor | None,
    gate: Tensor,
    *,
    gate_kind: GateKind = "residual",
    norm: Norm | None = "l1",
    ref_norm: bool = False,
) -> GatedTriple:
    """`gated_branch` in plain torch with the same explicit backward, whatever TRSP_KERNELS says."""
    op = "gated_branch_reference"
    return _gated_branch(op, x, attn_out, mlp_out, gate, gate_kind, norm, ref_norm, "reference")

"""The gate of a layer known by its input and output alone: for any architecture, from a hook.

T tokens (any leading shape), D hidden size. Formulas: trsp.kernels.reference; kernels:
trsp.kernels.gated_difference_triton. Both run inside one autograd.Function, so what is saved,
what is skipped and what is None is one contract.
"""

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trsp.kernels import reference
from trsp.kernels.arguments import GateKind, Norm, check_gate_arguments, check_same_dtype
from trsp.kernels.launch import Backend, choose_backend

GatedTriple = tuple[Tensor, Tensor | None, Tensor | None]

_cancellation_warned = False


class _GatedDifference(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor,
        gate: Tensor,
        gate_kind: GateKind,
        norm: Norm | None,
        ref_norm: bool,
        backend: Backend,
    ) -> GatedTriple:
        need_x, need_y, need_gate = ctx.needs_input_grad[:3]
        z, diff_norm, x_norm = _formulas(backend).gated_difference_forward(
            x, y, gate, gate_kind=gate_kind, norm=norm, ref_norm=ref_norm
        )
        norm_has_grad = norm is not None and (need_x or need_y)
        saves_x = norm_has_grad or (need_gate and gate_kind == "residual")
        ctx.save_for_backward(
            gate,
            x if saves_x else None,
            y if norm_has_grad or need_gate else None,
            diff_norm if norm_has_grad and norm == "l2" else None,
        )
        ctx.gate_kind, ctx.norm, ctx.backend = gate_kind, norm, backend
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
            return (None,) * 7
        gate, x, y, diff_norm = ctx.saved_tensors
        need_x, need_y, need_gate = ctx.needs_input_grad[:3]
        # z = s * y does not hold x: only the norm leads there.
        x_has_grad = norm_grad is not None or ctx.gate_kind == "residual"
        dx, dy, dgate = _formulas(ctx.backend).gated_difference_backward(
            dz,
            x,
            y,
            diff_norm,
            norm_grad,
            gate,
            gate_kind=ctx.gate_kind,
            norm=None if norm_grad is None else ctx.norm,
            need_dx=need_x and x_has_grad,
            need_dy=need_y,
            need_dgate=need_gate and dz is not None,
        )
        return dx, dy, dgate, *(None,) * 4


def _formulas(backend: Backend) -> Any:
    """The module that computes forward and backward; Triton is imported where it is used."""
    if backend == "reference":
        return reference
    from trsp.kernels import gated_difference_triton

    return gated_difference_triton


def _gated_difference(
    op: str,
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    gate_kind: GateKind,
    norm: Norm | None,
    ref_norm: bool,
    backend: Backend | None,
) -> GatedTriple:
    """Check, choose where `backend` is None, and enter autograd only where something learns."""
    check_gate_arguments(op, x, {"y": y}, gate, gate_kind, norm, ref_norm)
    check_same_dtype(op, x, y)
    backend = backend or choose_backend(x)
    if norm is not None and x.dtype in (torch.bfloat16, torch.float16):
        _warn_of_cancellation(op, x.dtype)
    inputs = (x, y, gate)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
        triple: GatedTriple = _GatedDifference.apply(  # type: ignore[no-untyped-call]
            *inputs, gate_kind, norm, ref_norm, backend
        )
    else:
        triple = _formulas(backend).gated_difference_forward(
            *inputs, gate_kind=gate_kind, norm=norm, ref_norm=ref_norm
        )
    return triple


# torch.compile cannot trace a warning: it calls this once, while it traces.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _warn_of_cancellation(op: str, dtype: torch.dtype) -> None:
    global _cancellation_warned
    if not _cancellation_warned:
        _cancellation_warned = True
        # At ||d|| = 1e-3 ||x|| in bf16, 79 % of y - x is exactly 0 and its cosine to d is .54.
        warnings.warn(
            f"{op} measures y - x of a {dtype} residual stream, which cancels where the layer "
            "moves little; use gated_branch, or keep the residual stream in float32",
            stacklevel=4,
        )


def gated_difference(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    *,
    gate_kind: GateKind = "residual",
    norm: Norm | None = "l1",
    ref_norm: bool = False,
) -> GatedTriple:
    """Blend a decoder layer's output into its input under a gate, and measure how far it moved.

        z         = x + gate * (y - x)      residual gate: 1 keeps the layer, 0 removes it
        z         = gate * y                output gate
        diff_norm = ||y - x||               per token; l1, l2 or squared l2
        x_norm    = ||x||                   the same norm, on request, without gradient

    At gate 1 z is y bit for bit; a residual gate of 0 returns x bit for bit. y - x of a 16-bit
    residual stream has lost its bits where the layer moves little: prefer `gated_branch` where
    the branches can be reached (with a norm the first such call warns). Values and gradients
    are bit-equal on a second run. For training it keeps x and y themselves, and neither where
    neither the gate nor a norm can ask for it. Differentiable once.

    Args:
        x, y: [..., D], the layer's input and output, bf16/fp16/fp32 (float64 in the reference),
            one dtype; any strides, though rows without unit stride in D, or without one common
            stride, are copied.
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
    gated_difference_reference and float64.
    """
    return _gated_difference("gated_difference", x, y, gate, gate_kind, norm, ref_norm, None)


def gated_difference_reference(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    *,
    gate_kind: GateKind = "residual",
    norm: Norm | None = "l1",
    ref_norm: bool = False,
) -> GatedTriple:
    """`gated_difference` in plain torch with the same backward, whatever TRSP_KERNELS says."""
    op = "gated_difference_reference"
    return _gated_difference(op, x, y, gate, gate_kind, norm, ref_norm, "reference")

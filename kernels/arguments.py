"""What the gate ops accept: every wrong argument is named before any arithmetic starts."""

import math
from typing import Literal, get_args

import torch
from torch import Tensor

GateKind = Literal["residual", "output"]
Norm = Literal["l1", "l2", "l2_squared"]
# How an RMSNorm applies its weight w to the normalised row r: llama w * r with r rounded to its
# dtype before, gemma (1 + w) * r rounded after.
Convention = Literal["llama", "gemma"]

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_HALF_DTYPES = (torch.bfloat16, torch.float16)


def check_gate_arguments(
    op: str,
    x: Tensor,
    others: dict[str, Tensor],
    gate: Tensor,
    gate_kind: GateKind,
    norm: Norm | None,
    ref_norm: bool,
) -> None:
    """Refuse what `op` cannot compute; `others` are the tensors of x's shape, by argument name.

    Raises:
        ValueError: shapes or devices differ, or a choice is unknown.
        TypeError: a dtype is unsupported.
    """
    if gate_kind not in get_args(GateKind):
        raise ValueError(f"{op}: gate_kind={gate_kind!r}; choose 'residual' or 'output'")
    if norm is not None and norm not in get_args(Norm):
        raise ValueError(f"{op}: norm={norm!r}; choose 'l1', 'l2', 'l2_squared' or None")
    if ref_norm and norm is None:
        raise ValueError(f"{op}: ref_norm=True without a norm; choose a norm or drop ref_norm")
    if x.dtype not in _DTYPES:
        raise TypeError(
            f"{op}: x is {x.dtype}; expected bfloat16, float16, float32 or float64: cast it"
        )
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"{op}: x has shape {list(x.shape)}; expected [..., D] with D >= 1")
    for name, tensor in others.items():
        if tensor.shape != x.shape:
            raise ValueError(
                f"{op}: {name} has shape {list(tensor.shape)}, x {list(x.shape)}; "
                "both must be the same: broadcast it first"
            )
        if tensor.device != x.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, x on {x.device}: move one")
    _check_gate(op, gate, x)


def check_branch_dtypes(op: str, x: Tensor, branches: dict[str, Tensor]) -> None:
    """Branches have x's dtype, or are all of one 16-bit dtype beside an fp32 residual stream."""
    dtypes = {tensor.dtype for tensor in branches.values()}
    same = dtypes == {x.dtype}
    mixed = x.dtype == torch.float32 and len(dtypes) == 1 and dtypes <= set(_HALF_DTYPES)
    if not (same or mixed):
        named = ", ".join(f"{name} is {tensor.dtype}" for name, tensor in branches.items())
        raise TypeError(
            f"{op}: {named} and x is {x.dtype}; branches must share x's dtype, or one 16-bit "
            "dtype with x in float32: cast them"
        )


def check_same_dtype(op: str, x: Tensor, y: Tensor) -> None:
    """A layer's input and output are one residual stream, of one dtype."""
    if y.dtype != x.dtype:
        raise TypeError(f"{op}: y is {y.dtype}, x is {x.dtype}; both must be the same: cast one")


def check_rmsnorm_arguments(
    op: str, x: Tensor, weight: Tensor, eps: float, convention: Convention, max_hidden_size: int
) -> None:
    """Refuse an RMSNorm of x's rows that `op` cannot compute.

    Raises:
        ValueError: a shape, a device, eps, the convention or the hidden size.
        TypeError: weight's dtype is not x's.
    """
    if convention not in get_args(Convention):
        raise ValueError(f"{op}: convention={convention!r}; choose 'llama' or 'gemma'")
    if x.shape[-1] > max_hidden_size:
        raise ValueError(
            f"{op}: x has D = {x.shape[-1]}; one pass holds a whole row, at most "
            f"{max_hidden_size}: use gated_branch and the model's own norm"
        )
    if weight.shape != x.shape[-1:]:
        raise ValueError(
            f"{op}: weight has shape {list(weight.shape)}; expected [{x.shape[-1]}], x's last "
            "dimension: pass the weight of the norm that follows the layer"
        )
    if weight.dtype != x.dtype:
        raise TypeError(f"{op}: weight is {weight.dtype}, x is {x.dtype}; cast the weight")
    if weight.device != x.device:
        raise ValueError(f"{op}: weight is on {weight.device}, x on {x.device}: move one")
    if not 0 < eps < math.inf:
        raise ValueError(f"{op}: eps={eps!r}; expected a finite number above 0, such as 1e-6")


def _check_gate(op: str, gate: Tensor, x: Tensor) -> None:
    if gate.shape != (1,):
        raise ValueError(
            f"{op}: gate has shape {list(gate.shape)}; expected [1]: pass gates[layer:layer + 1]"
        )
    if gate.dtype != torch.float32 and not gate.dtype == x.dtype == torch.float64:
        raise TypeError(
            f"{op}: gate is {gate.dtype}; expected float32 (float64 only beside float64 x): "
            "keep the gates outside mixed precision"
        )
    if gate.device != x.device:
        raise ValueError(f"{op}: gate is on {gate.device}, x on {x.device}: move one")

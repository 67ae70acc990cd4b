"""Errors of both gate ops against float64: at most twice eager torch's, plus a derived floor.

T tokens, D hidden size. Eager torch is the same formula in the same dtypes under plain autograd,
its norms accumulated in fp32. A floor is what an exact op must lose too: one rounding of each
stored value, and of a sum of D terms added blockwise in fp32.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from trsp.kernels.gated_branch import gated_branch
from trsp.kernels.gated_difference import gated_difference

DTYPES = {
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16, torch.float16),
    "fp32": (torch.float32, torch.float32),
    "mixed": (torch.float32, torch.bfloat16),
}
pytestmark = pytest.mark.filterwarnings("ignore:gated_difference measures")


@dataclass(frozen=True)
class Case:
    """One problem: x with its branches, or x with y; the gate; the gradients of z and the norm."""

    streams: tuple[Tensor, ...]
    gate: Tensor
    gate_kind: Any
    norm: Any
    dz: Tensor
    norm_grad: Tensor


def make_case(
    device: str,
    form: str,
    *,
    dtype: str = "bf16",
    norm: str | None = "l2",
    gate_kind: str = "residual",
    gate: float = 0.7,
    num_tokens: int = 5,
    hidden_size: int = 100,
) -> Case:
    """A layer that moves its input by half of it: sums round, and nothing cancels."""
    generator = torch.Generator().manual_seed(num_tokens * hidden_size)
    x, attn_out, mlp_out, dz = torch.randn(4, num_tokens, hidden_size, generator=generator)
    branches = {
        "two branches": [attn_out / 3, mlp_out / 3],
        "one branch": [attn_out / 2],
        "difference": [x + attn_out / 2],
    }[form]
    stream_dtype, branch_dtype = DTYPES[dtype]
    return Case(
        streams=(x.to(device, stream_dtype), *(b.to(device, branch_dtype) for b in branches)),
        gate=torch.tensor([gate], device=device),
        gate_kind=gate_kind,
        norm=norm,
        dz=dz.to(device, stream_dtype),
        norm_grad=torch.randn(num_tokens, generator=generator).to(device),
    )


def fused(form: str) -> Callable[..., Any]:
    """The op under test, called with x, the other streams and the gate."""
    if form == "difference":
        return gated_difference
    if form == "one branch":
        return lambda x, attn_out, gate, **choices: gated_branch(x, attn_out, None, gate, **choices)
    return gated_branch


def eager(form: str) -> Callable[..., Any]:
    """The formula as one writes it in torch."""

    def op(x: Tensor, *rest: Tensor, gate_kind: str, norm: str | None, ref_norm: bool) -> Any:
        *branches, gate = rest
        y = branches[0] if form == "difference" else sum(branches, start=x)
        z = (gate * y if gate_kind == "output" else x + gate * (y - x)).to(x.dtype)
        if norm is None:
            return z, None, None
        return z, _norm_of(y - x, norm), _norm_of(x, norm)

    return op


def _norm_of(d: Tensor, norm: str) -> Tensor:
    accumulate = torch.float64 if d.dtype == torch.float64 else torch.float32
    value: Tensor = torch.linalg.vector_norm(d, 1 if norm == "l1" else 2, dim=-1, dtype=accumulate)
    return value.square() if norm == "l2_squared" else value


def measure(
    op: Callable[..., Any], case: Case, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Values and gradients by name; in `dtype` where given."""

    def leaf(tensor: Tensor) -> Tensor:
        return tensor.detach().to(dtype or tensor.dtype).requires_grad_()

    streams, gate = [leaf(stream) for stream in case.streams], leaf(case.gate)
    z, diff_norm, x_norm = op(
        *streams, gate, gate_kind=case.gate_kind, norm=case.norm, ref_norm=case.norm is not None
    )
    roots = [(z, case.dz)] + ([] if case.norm is None else [(diff_norm, case.norm_grad)])
    torch.autograd.backward([root for root, _ in roots], [grad.to(r.dtype) for r, grad in roots])
    named = {"z": z, "diff_norm": diff_norm, "x_norm": x_norm, "dgate": gate.grad}
    named |= {f"gradient of stream {index}": stream.grad for index, stream in enumerate(streams)}
    return {name: tensor.detach() for name, tensor in named.items() if tensor is not None}


def floors(form: str, case: Case, truth: dict[str, Tensor]) -> dict[str, float]:
    """What one rounding of each stored value and fp32 sums may cost, for each name of `measure`."""
    stored = torch.finfo(case.streams[-1].dtype).eps / 2
    num_tokens, hidden_size = case.dz.shape
    # A term passes one addition a block, a tree over the block and a tree over the rows.
    additions = math.ceil(hidden_size / 1024) + 10 + math.ceil(math.log2(num_tokens)) + 2
    summed = additions * torch.finfo(torch.float32).eps / 2
    x, *branches = [stream.double() for stream in case.streams]
    y = branches[0] if form == "difference" else sum(branches, start=x)
    dgate_terms = case.dz.double() * (y if case.gate_kind == "output" else y - x)
    bars = {}
    for name, value in truth.items():
        scale = value.abs().max().item()
        if name == "z":
            bars[name] = torch.finfo(case.dz.dtype).eps / 2 * scale
        elif name == "dgate":
            bars[name] = (stored + summed) * dgate_terms.abs().sum().item()
        elif name in ("diff_norm", "x_norm"):
            bars[name] = summed * scale
        else:
            # s * dz + c: c stems from a stored d and a summed norm, and the sum is stored again.
            scale += (case.gate * case.dz).abs().max().item()
            bars[name] = (2 * stored + summed) * scale
    return bars


def check(form: str, case: Case) -> None:
    truth = measure(eager(form), case, torch.float64)
    theirs, ours = measure(eager(form), case), measure(fused(form), case)
    bars = floors(form, case, truth)
    assert ours.keys() == truth.keys()
    for name, value in truth.items():
        error = (ours[name].double() - value).abs().max().item()
        eager_error = (theirs[name].double() - value).abs().max().item()
        assert error <= 2 * eager_error + bars[name], (name, error, eager_error, bars[name])


FORMS = ("two branches", "one branch", "difference")


@pytest.mark.parametrize("norm", ["l1", "l2", "l2_squared"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["two branches", "one branch"])
def test_every_dtype_and_norm_of_branches(
    device: str, backend: str, form: str, dtype: str, norm: str
) -> None:
    check(form, make_case(device, form, dtype=dtype, norm=norm))


@pytest.mark.parametrize("norm", ["l1", "l2", "l2_squared"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_every_dtype_and_norm_of_a_difference(
    device: str, backend: str, dtype: str, norm: str
) -> None:
    check("difference", make_case(device, "difference", dtype=dtype, norm=norm))


@pytest.mark.parametrize("norm", [None, "l2"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("form", FORMS)
def test_output_gate(device: str, backend: str, form: str, dtype: str, norm: str | None) -> None:
    check(form, make_case(device, form, dtype=dtype, norm=norm, gate_kind="output"))


@pytest.mark.parametrize("gate", [0.0, 1.0, -0.6, 1.7])
@pytest.mark.parametrize("form", FORMS)
def test_every_gate_value(device: str, backend: str, form: str, gate: float) -> None:
    check(form, make_case(device, form, gate=gate))


@pytest.mark.parametrize(
    ("num_tokens", "hidden_size"), [(1, 1), (1, 60), (16, 63), (2, 1025), (3, 4096)]
)
@pytest.mark.parametrize("form", FORMS)
def test_odd_and_long_rows(
    device: str, backend: str, form: str, num_tokens: int, hidden_size: int
) -> None:
    case = make_case(device, form, dtype="fp32", num_tokens=num_tokens, hidden_size=hidden_size)
    check(form, case)


@pytest.mark.parametrize("num_tokens", [63, 127])
@pytest.mark.parametrize("form", FORMS)
def test_many_tokens(
    device: str, monkeypatch: pytest.MonkeyPatch, form: str, num_tokens: int
) -> None:
    """Too many rows for the interpreter: the kernels where there is a GPU, else the reference."""
    monkeypatch.setenv("TRSP_KERNELS", "auto")
    check(form, make_case(device, form, num_tokens=num_tokens, hidden_size=4096))

"""Errors of the gate ops against float64: at most twice eager torch's, plus a derived floor.

T tokens, D hidden size. Eager torch is the same formula in the same dtypes under plain autograd,
its norms accumulated in fp32, the RMSNorm that of transformers. A floor is what an exact op must
lose too: one rounding of each stored value, and of a sum of D terms added blockwise in fp32.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from trsp.kernels.gated_branch import gated_branch
from trsp.kernels.gated_branch_rmsnorm import gated_branch_rmsnorm
from trsp.kernels.gated_difference import gated_difference

DTYPES = {
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16, torch.float16),
    "fp32": (torch.float32, torch.float32),
    "mixed": (torch.float32, torch.bfloat16),
}
pytestmark = pytest.mark.filterwarnings("ignore:gated_difference measures")


EPS = 1e-6
CONVENTIONS = {"llama": LlamaRMSNorm, "gemma": GemmaRMSNorm}
Values = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One problem: its learners by name, its choices, and the gradients of its outputs by name."""

    form: str
    inputs: Values
    choices: dict[str, Any]
    convention: Any
    grads: Values

    @property
    def branches(self) -> list[Tensor]:
        return [tensor for name, tensor in self.inputs.items() if name.endswith("_out")]


def make_case(
    device: str,
    form: str,
    *,
    dtype: str = "bf16",
    norm: str | None = "l2",
    gate_kind: str = "residual",
    gate: float = 0.7,
    convention: str | None = None,
    num_tokens: int = 5,
    hidden_size: int = 100,
    scale: float = 1.0,
) -> Case:
    """A layer that moves its input by half of it: sums round, and nothing cancels."""
    generator = torch.Generator().manual_seed(num_tokens * hidden_size)
    streams = torch.randn(4, num_tokens, hidden_size, generator=generator)
    dz, (x, attn_out, mlp_out) = streams[3], streams[:3] * scale
    stream_dtype, branch_dtype = DTYPES[dtype]
    inputs = {"x": x.to(device, stream_dtype)} | {
        name: tensor.to(device, branch_dtype)
        for name, tensor in {
            "two branches": {"attn_out": attn_out / 3, "mlp_out": mlp_out / 3},
            "one branch": {"attn_out": attn_out / 2},
            "difference": {"y": x + attn_out / 2},
        }[form].items()
    }
    inputs["gate"] = torch.tensor([gate], device=device)
    grads = {"z": dz.to(device, stream_dtype)}
    if norm is not None:
        grads["diff_norm"] = torch.randn(num_tokens, generator=generator).to(device)
    if convention is not None:
        weight = 1 + torch.randn(hidden_size, generator=generator)
        inputs["weight"] = weight.to(device, stream_dtype)
        dnormed = torch.randn(num_tokens, hidden_size, generator=generator)
        grads["normed"] = dnormed.to(device, stream_dtype)
    choices = {"gate_kind": gate_kind, "norm": norm, "ref_norm": norm is not None}
    return Case(form, inputs, choices, convention, grads)


def fused(case: Case, inputs: Values) -> dict[str, Tensor | None]:
    """The op under test."""
    x, gate = inputs["x"], inputs["gate"]
    names = ["z", "diff_norm", "x_norm"]
    outputs: Any
    if case.form == "difference":
        outputs = gated_difference(x, inputs["y"], gate, **case.choices)
    elif case.convention is None:
        outputs = gated_branch(x, inputs["attn_out"], inputs.get("mlp_out"), gate, **case.choices)
    else:
        names.insert(1, "normed")
        branches = inputs["attn_out"], inputs.get("mlp_out")
        outputs = gated_branch_rmsnorm(
            x,
            *branches,
            gate,
            inputs["weight"],
            eps=EPS,
            convention=case.convention,
            **case.choices,
        )
    return dict(zip(names, outputs, strict=True))


def eager(case: Case, inputs: Values) -> dict[str, Tensor | None]:
    """The formula as one writes it in torch; in float64 it is the truth."""
    x, gate, norm = inputs["x"], inputs["gate"], case.choices["norm"]
    y = inputs["y"] if case.form == "difference" else x + inputs["attn_out"]
    if "mlp_out" in inputs:
        y = y + inputs["mlp_out"]
    z = (gate * y if case.choices["gate_kind"] == "output" else x + gate * (y - x)).to(x.dtype)
    outputs: dict[str, Tensor | None] = {"z": z}
    if norm is not None:
        outputs |= {"diff_norm": _norm_of(y - x, norm), "x_norm": _norm_of(x, norm)}
    if case.convention is not None:
        outputs["normed"] = _rmsnorm_of(z, inputs["weight"], case.convention)
    return outputs


def _norm_of(d: Tensor, norm: str) -> Tensor:
    accumulate = torch.float64 if d.dtype == torch.float64 else torch.float32
    value: Tensor = torch.linalg.vector_norm(d, 1 if norm == "l1" else 2, dim=-1, dtype=accumulate)
    return value.square() if norm == "l2_squared" else value


def _rmsnorm_of(z: Tensor, weight: Tensor, convention: str) -> Tensor:
    if z.dtype != torch.float64:
        module = CONVENTIONS[convention](z.shape[-1], eps=EPS).to(z.device)
        normed: Tensor = functional_call(module, {"weight": weight}, (z,))
        return normed
    gain = weight if convention == "llama" else 1 + weight
    return gain * z * (z.square().mean(-1, keepdim=True) + EPS).rsqrt()


def measure(op: Callable[..., Any], case: Case, dtype: torch.dtype | None = None) -> Values:
    """Values and gradients by name; in `dtype` where given."""
    inputs = {
        name: tensor.detach().to(dtype or tensor.dtype).requires_grad_()
        for name, tensor in case.inputs.items()
    }
    outputs = op(case, inputs)
    roots = [outputs[name] for name in case.grads]
    torch.autograd.backward(
        roots, [grad.to(root.dtype) for grad, root in zip(case.grads.values(), roots, strict=True)]
    )
    named = outputs | {f"d{name}": tensor.grad for name, tensor in inputs.items()}
    return {name: tensor.detach() for name, tensor in named.items() if tensor is not None}


def floors(case: Case, truth: Values) -> dict[str, float]:
    """What one rounding of each stored value and fp32 sums may cost, for each name of `measure`."""
    wide = {name: tensor.double() for name, tensor in (case.inputs | case.grads).items()}
    # Branches are as narrow as the stream, or narrower.
    stored = torch.finfo([*case.branches, case.inputs["x"]][0].dtype).eps / 2
    stream = torch.finfo(case.inputs["x"].dtype).eps / 2
    num_tokens, hidden_size = case.inputs["x"].shape
    # A term passes one addition a block, a tree over the block and a tree over the rows.
    additions = math.ceil(hidden_size / 1024) + 10 + math.ceil(math.log2(num_tokens)) + 2
    summed = additions * torch.finfo(torch.float32).eps / 2
    y = (
        wide["y"]
        if case.form == "difference"
        else wide["x"] + sum(t.double() for t in case.branches)
    )
    moved = y if case.choices["gate_kind"] == "output" else y - wide["x"]
    dz = wide["z"].abs()
    if case.convention is not None:
        # One rounding more of z, of rstd for its sake, and of the normalised row.
        stored += 3 * stream
        gain = wide["weight"] if case.convention == "llama" else 1 + wide["weight"]
        z = truth["z"]
        rstd = (z.square().mean(-1, keepdim=True) + EPS).rsqrt()
        drow = (wide["normed"] * gain).abs()
        row = (z * rstd).abs()
        dz = dz + rstd * (drow + row * (drow * row).mean(-1, keepdim=True))
    bars = {}
    for name, value in truth.items():
        scale = value.abs().max().item()
        if name == "z":
            bars[name] = stream * scale
        elif name == "normed":
            bars[name] = (4 * stream + summed) * scale
        elif name == "dgate":
            bars[name] = (stored + summed) * (dz * moved).abs().sum().item()
        elif name == "dweight":
            bars[name] = (stored + summed) * (wide["normed"].abs() * row).sum(0).max().item()
        elif name in ("diff_norm", "x_norm"):
            bars[name] = summed * scale
        else:
            # s * dz + c: c stems from a stored d and a summed norm, and the sum is stored again.
            through_gate = wide["gate"].abs() if case.convention is None else 1 + wide["gate"].abs()
            bars[name] = (2 * stored + summed) * (scale + (through_gate * dz).max().item())
    return bars


def check(case: Case) -> None:
    truth = measure(eager, case, torch.float64)
    theirs, ours = measure(eager, case), measure(fused, case)
    bars = floors(case, truth)
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
    check(make_case(device, form, dtype=dtype, norm=norm))


@pytest.mark.parametrize("norm", ["l1", "l2", "l2_squared"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_every_dtype_and_norm_of_a_difference(
    device: str, backend: str, dtype: str, norm: str
) -> None:
    check(make_case(device, "difference", dtype=dtype, norm=norm))


@pytest.mark.parametrize("norm", [None, "l2"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("form", FORMS)
def test_output_gate(device: str, backend: str, form: str, dtype: str, norm: str | None) -> None:
    check(make_case(device, form, dtype=dtype, norm=norm, gate_kind="output"))


@pytest.mark.parametrize("gate", [0.0, 1.0, -0.6, 1.7])
@pytest.mark.parametrize("form", FORMS)
def test_every_gate_value(device: str, backend: str, form: str, gate: float) -> None:
    check(make_case(device, form, gate=gate))


@pytest.mark.parametrize(
    ("num_tokens", "hidden_size"), [(1, 1), (1, 60), (16, 63), (2, 1025), (3, 4096)]
)
@pytest.mark.parametrize("form", FORMS)
def test_odd_and_long_rows(
    device: str, backend: str, form: str, num_tokens: int, hidden_size: int
) -> None:
    case = make_case(device, form, dtype="fp32", num_tokens=num_tokens, hidden_size=hidden_size)
    check(case)


@pytest.mark.parametrize("num_tokens", [63, 127])
@pytest.mark.parametrize("form", FORMS)
def test_many_tokens(
    device: str, monkeypatch: pytest.MonkeyPatch, form: str, num_tokens: int
) -> None:
    """Too many rows for the interpreter: the kernels where there is a GPU, else the reference."""
    monkeypatch.setenv("TRSP_KERNELS", "auto")
    check(make_case(device, form, num_tokens=num_tokens, hidden_size=4096))


@pytest.mark.parametrize("norm", [None, "l1", "l2", "l2_squared"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("convention", CONVENTIONS)
def test_every_dtype_and_norm_before_an_rmsnorm(
    device: str, backend: str, convention: str, dtype: str, norm: str | None
) -> None:
    check(make_case(device, "two branches", dtype=dtype, norm=norm, convention=convention))


# The number of branches, the gate's kind and its value meet the convention in no formula: each
# is crossed with one other choice, not with all.
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_branch_before_an_rmsnorm(device: str, backend: str, dtype: str) -> None:
    check(make_case(device, "one branch", dtype=dtype, convention="llama"))


@pytest.mark.parametrize("norm", [None, "l1", "l2_squared"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_output_gate_before_an_rmsnorm(
    device: str, backend: str, dtype: str, norm: str | None
) -> None:
    kind, convention = "output", "gemma" if norm == "l1" else "llama"
    case = make_case(
        device, "two branches", dtype=dtype, norm=norm, gate_kind=kind, convention=convention
    )
    check(case)


@pytest.mark.parametrize("gate", [0.0, 1.0, -0.6, 1.7])
@pytest.mark.parametrize("gate_kind", ["residual", "output"])
def test_every_gate_value_before_an_rmsnorm(
    device: str, backend: str, gate_kind: str, gate: float
) -> None:
    form, kind = "two branches", gate_kind
    check(make_case(device, form, gate_kind=kind, gate=gate, convention="gemma"))


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize(
    ("num_tokens", "hidden_size"),
    # The last four have more rows than the programs of the interpreter's backward.
    [(1, 1), (1, 60), (3, 63), (17, 100), (9, 1025), (5, 3072), (4, 4096)],
)
def test_odd_and_long_rows_before_an_rmsnorm(
    device: str, backend: str, num_tokens: int, hidden_size: int, dtype: str
) -> None:
    shape = {"num_tokens": num_tokens, "hidden_size": hidden_size}
    check(make_case(device, "two branches", dtype=dtype, convention="llama", **shape))


def test_the_longest_row_before_an_rmsnorm(device: str, backend: str) -> None:
    check(make_case(device, "one branch", convention="gemma", num_tokens=2, hidden_size=8192))


@pytest.mark.parametrize(("dtype", "scale"), [("fp32", 1e-20), ("fp16", 1e4), ("bf16", 1e15)])
@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_tiny_and_huge_rows_before_an_rmsnorm(
    device: str, backend: str, norm: str, dtype: str, scale: float
) -> None:
    """Squares below fp32's normal numbers, and beyond fp16's largest."""
    case = make_case(
        device, "two branches", dtype=dtype, norm=norm, convention="llama", scale=scale
    )
    check(case)


@pytest.mark.parametrize("num_tokens", [63, 127])
def test_many_tokens_before_an_rmsnorm(
    device: str, monkeypatch: pytest.MonkeyPatch, num_tokens: int
) -> None:
    monkeypatch.setenv("TRSP_KERNELS", "auto")
    shape = {"num_tokens": num_tokens, "hidden_size": 4096}
    check(make_case(device, "two branches", convention="llama", **shape))

"""The calls of the fused ops that are measured, and the passes over memory that each may make.

One definition for the machine code, the byte count and the clock: a case is one op in one training
step, everything learning, through the public op and its autograd. T tokens (rows), D hidden size;
a pass is one [T, D] tensor read or written once.
"""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from trsp.kernels.arguments import Convention, GateKind, Norm
from trsp.kernels.gated_branch import gated_branch
from trsp.kernels.gated_branch_rmsnorm import gated_branch_rmsnorm
from trsp.kernels.gated_difference import gated_difference

Op = Literal["gated_difference", "gated_branch", "gated_branch_rmsnorm"]
OPS: tuple[Op, ...] = get_args(Op)

# The dtypes of the residual stream and of what the branches add to it.
DTYPES = {
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16, torch.float16),
    "fp32": (torch.float32, torch.float32),
    "mixed": (torch.float32, torch.bfloat16),
}
# Of the RMSNorm, in every arm and in what they are held to.
EPS = 1e-6


def dtypes_of(op: Op) -> tuple[str, ...]:
    """The dtypes that an op is measured in, in the order of DTYPES.

    gated_difference has no mixed one: its x and y are one residual stream.
    """
    return tuple(
        name
        for name, (stream, branch) in DTYPES.items()
        if stream == branch or op != "gated_difference"
    )


@dataclass(frozen=True)
class KernelCase:
    """One op with its choices; `norm` also asks for `ref_norm`, as the training stages do.

    Raises:
        ValueError: the op has no such dtype.
    """

    op: Op
    dtype: str = "bf16"
    hidden_size: int = 4096
    norm: Norm | None = "l2"
    gate_kind: GateKind = "residual"
    num_branches: int = 2
    convention: Convention = "llama"

    def __post_init__(self) -> None:
        if self.dtype not in dtypes_of(self.op):
            raise ValueError(
                f"{self.op} is not measured in {self.dtype}; choose {', '.join(dtypes_of(self.op))}"
            )

    @property
    def name(self) -> str:
        """Names the case in tables and records, and no other case."""
        parts = [self.op, self.dtype, f"D{self.hidden_size}", str(self.norm), self.gate_kind]
        if self.num_branches == 1:
            parts.append("one-branch")
        if self.op == "gated_branch_rmsnorm":
            parts.append(self.convention)
        return "-".join(parts)


@dataclass(frozen=True)
class Passes:
    """The [T, D] tensors that a direction reads and writes, each once."""

    reads: tuple[str, ...]
    writes: tuple[str, ...]

    @property
    def total(self) -> int:
        return len(self.reads) + len(self.writes)


def forward_passes(case: KernelCase) -> Passes:
    """The least a training forward can move, which is what the kernel may move."""
    if case.op == "gated_difference":
        return Passes(("x", "y"), ("z",))
    # The sum of two branches is saved for backward; one branch is saved as it is.
    branches, saved = (
        (("attn_out", "mlp_out"), ("d",)) if case.num_branches == 2 else (("attn_out",), ())
    )
    normed = ("normed",) if case.op == "gated_branch_rmsnorm" else ()
    return Passes(("x", *branches), ("z", *saved, *normed))


def backward_passes(case: KernelCase) -> Passes:
    """The same for backward, with x, the branches, the gate (and the norm's weight) learning."""
    output_gate = case.gate_kind == "output"
    if case.op == "gated_difference":
        if output_gate and case.norm is None:
            return Passes(("dz", "y"), ("dy",))
        return Passes(("dz", "x", "y"), ("dx", "dy"))
    # An output gate's own gradient is sum(dz * (x + d)), and its dx is no longer dz.
    x = ("x",) if output_gate else ()
    if case.op == "gated_branch":
        return Passes(("dz", "d", *x), ("dbranch", "dx") if output_gate else ("dbranch",))
    return Passes(("dz", "dnormed", "z", "d", *x), ("dx", "dbranch"))


@dataclass(frozen=True)
class Problem:
    """Tensors for one case. `inputs` learn: x, branches (or y), gate, and the norm's weight."""

    case: KernelCase
    inputs: dict[str, Tensor]
    dz: Tensor
    norm_grad: Tensor | None
    dnormed: Tensor | None


def make_problem(case: KernelCase, num_tokens: int, device: str, seed: int = 0) -> Problem:
    """Random tensors [num_tokens, D]: branches a third of x, no gradient of a special value."""
    generator = torch.Generator(device).manual_seed(seed)
    stream, branch = DTYPES[case.dtype]

    def draw(dtype: torch.dtype, *shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).mul_(scale).to(dtype)

    shape = (num_tokens, case.hidden_size)
    inputs = {"x": draw(stream, *shape)}
    if case.op == "gated_difference":
        inputs["y"] = draw(stream, *shape, scale=1 / 3).add_(inputs["x"])
    else:
        inputs["attn_out"] = draw(branch, *shape, scale=1 / 3)
        if case.num_branches == 2:
            inputs["mlp_out"] = draw(branch, *shape, scale=1 / 3)
    inputs["gate"] = torch.full((1,), 0.7, device=device)
    fused_norm = case.op == "gated_branch_rmsnorm"
    if fused_norm:
        inputs["weight"] = draw(stream, case.hidden_size).add_(1)
    return Problem(
        case=case,
        inputs={name: tensor.requires_grad_() for name, tensor in inputs.items()},
        dz=draw(stream, *shape),
        norm_grad=None if case.norm is None else draw(torch.float32, num_tokens),
        dnormed=draw(stream, *shape) if fused_norm else None,
    )


def fused_forward(problem: Problem) -> dict[str, Tensor]:
    """z, normed, diff_norm, x_norm by name, those that the case has; recorded for backward."""
    case, inputs = problem.case, problem.inputs
    choices: dict[str, Any] = {
        "gate_kind": case.gate_kind,
        "norm": case.norm,
        "ref_norm": case.norm is not None,
    }
    x, gate = inputs["x"], inputs["gate"]
    if case.op == "gated_difference":
        z, diff_norm, x_norm = gated_difference(x, inputs["y"], gate, **choices)
        named = {"z": z, "diff_norm": diff_norm, "x_norm": x_norm}
        return {name: tensor for name, tensor in named.items() if tensor is not None}
    attn_out, mlp_out = inputs["attn_out"], inputs.get("mlp_out")
    if case.op == "gated_branch":
        z, diff_norm, x_norm = gated_branch(x, attn_out, mlp_out, gate, **choices)
        named = {"z": z, "diff_norm": diff_norm, "x_norm": x_norm}
    else:
        weight = inputs["weight"]
        z, normed, diff_norm, x_norm = gated_branch_rmsnorm(
            x, attn_out, mlp_out, gate, weight, eps=EPS, convention=case.convention, **choices
        )
        named = {"z": z, "normed": normed, "diff_norm": diff_norm, "x_norm": x_norm}
    return {name: tensor for name, tensor in named.items() if tensor is not None}


def gradients(problem: Problem, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradient of every input that has one, from the problem's gradients of the outputs.

    z = s * y alone does not depend on x.
    """
    given = {"z": problem.dz, "normed": problem.dnormed, "diff_norm": problem.norm_grad}
    roots = {name: grad for name, grad in given.items() if grad is not None}
    found = torch.autograd.grad(
        [outputs[name] for name in roots],
        list(problem.inputs.values()),
        list(roots.values()),
        allow_unused=True,
    )
    named = zip(problem.inputs, found, strict=True)
    return {name: gradient for name, gradient in named if gradient is not None}

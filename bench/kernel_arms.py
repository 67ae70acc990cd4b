"""The ways of computing one measured case: the fused op, and what it is compared with.

T tokens (rows), D hidden size. An arm takes a Problem of trsp.bench.kernel_cases, reads its inputs
and returns its outputs recorded for autograd, in the problem's dtypes. `liger` alone computes
something else: z = x + attn_out and its RMSNorm, without gate, second branch and norm of the
difference.
"""

import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterable
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from trsp.bench.kernel_cases import DTYPES, EPS, KernelCase, Passes, Problem, fused_forward
from trsp.kernels.arguments import Convention
from trsp.kernels.gated_branch import gated_branch_reference
from trsp.kernels.gated_branch_rmsnorm import gated_branch_rmsnorm_reference
from trsp.kernels.gated_difference import gated_difference_reference

Arm = Literal[
    "fused",
    "eager_hf",
    "eager_careful",
    "eager_f_rms_norm",
    "eager_hf_norm",
    "compile_natural",
    "compile_explicit",
    "liger",
]
ARMS: tuple[Arm, ...] = get_args(Arm)
COMPILED_ARMS: tuple[Arm, ...] = ("compile_natural", "compile_explicit")
LIGER_DIFFERS = (
    "Liger-Kernel's fused_add_rms_norm: z = x + attn_out and its norm; no gate, no second branch, "
    "no norm of the difference"
)
_LIGER_INSTALL = "liger-kernel is not installed: pip install --no-deps liger-kernel"

Outputs = dict[str, Tensor]


class ArmUnavailableError(RuntimeError):
    """An arm cannot run here; the text says why and what to do."""


def arms_of(case: KernelCase) -> tuple[Arm, ...]:
    """The arms that say something about `case`, the fused op first."""
    if case.op != "gated_branch_rmsnorm":
        return ("fused", "eager_hf", "eager_careful", *COMPILED_ARMS)
    arms: tuple[Arm, ...] = ("fused", "eager_f_rms_norm", "eager_hf_norm", *COMPILED_ARMS)
    stream, branch = DTYPES[case.dtype]
    alike = (case.gate_kind, case.convention) == ("residual", "llama") and stream == branch
    return (*arms, "liger") if alike else arms


def arm_forward(arm: Arm, problem: Problem) -> Outputs:
    """z, normed, diff_norm, x_norm by name, those that the case and the arm have.

    Raises:
        ArmUnavailableError: a package that the arm needs is missing.
        ValueError: the arm does not compute this case.
    """
    if arm not in arms_of(problem.case):
        raise ValueError(f"{arm} does not compute {problem.case.name}; see arms_of")
    if arm == "fused":
        return fused_forward(problem)
    if arm == "liger":
        return _liger(problem.inputs)
    call: Callable[..., Outputs] = {
        "eager_hf": _hf_shaped,
        "eager_careful": _careful,
        "eager_f_rms_norm": _hf_shaped_with_f_rms_norm,
        "eager_hf_norm": _hf_shaped_with_hf_norm,
        "compile_natural": _compiled(_careful_with_hf_norm),
        "compile_explicit": _compiled(_explicit),
    }[arm]
    return call(problem.inputs, problem.case)


def arm_inputs(arm: Arm, problem: Problem) -> dict[str, Tensor]:
    """The problem's inputs that the arm's outputs depend on."""
    if arm == "liger":
        return {name: problem.inputs[name] for name in ("x", "attn_out", "weight")}
    case, inputs = problem.case, problem.inputs
    if case.op == "gated_difference" and case.gate_kind == "output" and case.norm is None:
        return {name: inputs[name] for name in ("y", "gate")}
    return inputs


def arm_gradients(arm: Arm, problem: Problem, outputs: Outputs) -> dict[str, Tensor]:
    """The gradient of every input of the arm, from the problem's gradients of the outputs.

    Frees the graph, as a training step does.
    """
    given = {"z": problem.dz, "normed": problem.dnormed, "diff_norm": problem.norm_grad}
    roots = {name: grad for name, grad in given.items() if grad is not None and name in outputs}
    inputs = arm_inputs(arm, problem)
    found = torch.autograd.grad(
        [outputs[name] for name in roots], list(inputs.values()), list(roots.values())
    )
    return dict(zip(inputs, found, strict=True))


def liger_passes() -> tuple[Passes, Passes]:
    """The [T, D] tensors that Liger's op moves, forward and backward (dx is both gradients)."""
    forward = Passes(("x", "attn_out"), ("z", "normed"))
    return forward, Passes(("dz", "dnormed", "z"), ("dx",))


def saved_bytes(arm: Arm, problem: Problem) -> int:
    """Bytes of distinct activations that one forward of the arm keeps for backward.

    x and z are not counted: the RMSNorms before and after keep them in any model. Neither are
    parameters. Branch outputs are: no other op of a decoder layer keeps them.
    """
    kept = {
        problem.inputs[name].untyped_storage().data_ptr()
        for name in ("x", "gate", "weight")
        if name in problem.inputs
    }
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        # The tensor is held, so that no later one can take its address.
        saved.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = arm_forward(arm, problem)
    kept.add(outputs["z"].untyped_storage().data_ptr())
    storages = [tensor.untyped_storage() for tensor in saved.values()]
    return sum(storage.nbytes() for storage in storages if storage.data_ptr() not in kept)


def forget_compiled_code() -> None:
    """Let the next shape be compiled as if it were the first."""
    torch.compiler.reset()
    _compiled.cache_clear()


@functools.cache
def _compiled(function: Callable[..., Outputs]) -> Callable[..., Outputs]:
    return torch.compile(function, dynamic=False, fullgraph=True)


def _hf_shaped(inputs: dict[str, Tensor], case: KernelCase) -> Outputs:
    """The adds as transformers' decoder layers write them, and the gate added behind."""
    x, gate = inputs["x"], inputs["gate"].to(inputs["x"].dtype)
    y = _layer_output(inputs)
    if case.norm is None:
        return {"z": gate * y if case.gate_kind == "output" else x + gate * (y - x)}
    moved = y - x
    z = gate * y if case.gate_kind == "output" else x + gate * moved
    return {"z": z, **_norms(moved.float(), x, case)}


def _careful(inputs: dict[str, Tensor], case: KernelCase) -> Outputs:
    """The op's own roundings under plain autograd.

    The selection of x and y at the ends of the gate is left out: plain autograd would cut the
    gate's gradient there.
    """
    x, wide = inputs["x"], _wide_dtype(inputs["x"])
    y = _layer_output(inputs).to(wide)
    s = inputs["gate"].to(wide)
    z = (s * y if case.gate_kind == "output" else x + s * (y - x)).to(x.dtype)
    if case.norm is None:
        return {"z": z}
    if "y" in inputs:
        d = y - x
    else:
        d = inputs["attn_out"].to(wide)
        if "mlp_out" in inputs:
            d = d + inputs["mlp_out"]
    return {"z": z, **_norms(d, x, case)}


def _hf_shaped_with_f_rms_norm(inputs: dict[str, Tensor], case: KernelCase) -> Outputs:
    outputs, weight = _hf_shaped(inputs, case), inputs["weight"]
    gain = 1 + weight if case.convention == "gemma" else weight
    normed = F.rms_norm(outputs["z"], (case.hidden_size,), gain, EPS)
    return {**outputs, "normed": normed}


def _hf_shaped_with_hf_norm(inputs: dict[str, Tensor], case: KernelCase) -> Outputs:
    outputs = _hf_shaped(inputs, case)
    return {**outputs, "normed": hf_rmsnorm(outputs["z"], inputs["weight"], case.convention)}


def _careful_with_hf_norm(inputs: dict[str, Tensor], case: KernelCase) -> Outputs:
    """`_careful`, and where the case has an RMSNorm, that in transformers' order."""
    outputs = _careful(inputs, case)
    if case.op == "gated_branch_rmsnorm":
        outputs["normed"] = hf_rmsnorm(outputs["z"], inputs["weight"], case.convention)
    return outputs


def hf_rmsnorm(z: Tensor, weight: Tensor, convention: Convention) -> Tensor:
    """The statements of transformers' LlamaRMSNorm.forward and GemmaRMSNorm.forward."""
    wide = z.to(_wide_dtype(z))
    row = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    if convention == "llama":
        return weight * row.to(z.dtype)
    return (row * (1.0 + weight.to(row.dtype))).to(z.dtype)


def _explicit(inputs: dict[str, Tensor], case: KernelCase) -> Outputs:
    """The reference op with its explicit backward, for Inductor to fuse."""
    choices: dict[str, Any] = {
        "gate_kind": case.gate_kind,
        "norm": case.norm,
        "ref_norm": case.norm is not None,
    }
    x, gate = inputs["x"], inputs["gate"]
    normed = None
    if case.op == "gated_difference":
        z, diff_norm, x_norm = gated_difference_reference(x, inputs["y"], gate, **choices)
    elif case.op == "gated_branch":
        z, diff_norm, x_norm = gated_branch_reference(
            x, inputs["attn_out"], inputs.get("mlp_out"), gate, **choices
        )
    else:
        z, normed, diff_norm, x_norm = gated_branch_rmsnorm_reference(
            x,
            inputs["attn_out"],
            inputs.get("mlp_out"),
            gate,
            inputs["weight"],
            eps=EPS,
            convention=case.convention,
            **choices,
        )
    return _present({"z": z, "normed": normed, "diff_norm": diff_norm, "x_norm": x_norm}.items())


def _liger(inputs: dict[str, Tensor]) -> Outputs:
    if importlib.util.find_spec("liger_kernel") is None:
        raise ArmUnavailableError(_LIGER_INSTALL)
    if not inputs["x"].is_cuda:
        raise ArmUnavailableError("Liger-Kernel has no CPU path")
    module = importlib.import_module("liger_kernel.ops.fused_add_rms_norm")
    normed, z = module.LigerFusedAddRMSNormFunction.apply(
        inputs["attn_out"], inputs["x"], inputs["weight"], EPS, 0.0, "llama", False
    )
    return {"z": z, "normed": normed}


def _layer_output(inputs: dict[str, Tensor]) -> Tensor:
    """y in x's dtype: given, or (x + attn_out) + mlp_out."""
    if "y" in inputs:
        return inputs["y"]
    y = inputs["x"] + inputs["attn_out"]
    return y + inputs["mlp_out"] if "mlp_out" in inputs else y


def _norms(d: Tensor, x: Tensor, case: KernelCase) -> Outputs:
    """diff_norm, and x_norm without gradient, both accumulated in d's dtype."""
    return {"diff_norm": _norm_of(d, case), "x_norm": _norm_of(x.detach().to(d.dtype), case)}


def _norm_of(d: Tensor, case: KernelCase) -> Tensor:
    if case.norm == "l2_squared":
        return d.square().sum(dim=-1)
    norm: Tensor = torch.linalg.vector_norm(d, 1 if case.norm == "l1" else 2, dim=-1)
    return norm


def _wide_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _present(named: Iterable[tuple[str, Tensor | None]]) -> Outputs:
    return {name: tensor for name, tensor in named if tensor is not None}

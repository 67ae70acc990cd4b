"""Is a fused op right at the shape that is timed? Against float64, in chunks of rows.

T tokens (rows), D hidden size. Every bound is derived, element by element: one rounding of each
value that the op stores, and fp32 sums; twice that is allowed. dgate and dweight are sums over
rows whose rounding errors are independent, so theirs is eight standard deviations of the error: a
worst case there would exceed the value itself and let a gradient of zero pass.
"""

import math
from typing import Any

import torch
from torch import Tensor

from trsp.bench.kernel_arms import Outputs, arm_inputs
from trsp.bench.kernel_cases import DTYPES, EPS, Problem

_CHUNK_ELEMENTS = 2**25
_ALLOWED = 2.0
_DEVIATIONS = 8.0
# Eager and compiled forms round more often than the op does; a wrong formula is off by far more.
ARM_TOLERANCE = 0.05
_FP32 = torch.finfo(torch.float32).eps / 2


class Judgement:
    """Worst error of every value, as a share of what is allowed; above 1, or NaN, it is wrong."""

    def __init__(self) -> None:
        self.worst: dict[str, float] = {}
        # sqrt(sum (dz * d)^2): the size of dgate's terms, where dgate itself may cancel.
        self.dgate_scale = 0.0

    def compare(self, name: str, found: Tensor, truth: Tensor, bound: Tensor) -> None:
        """Take one tensor's errors in."""
        shares = (found.double() - truth).abs() / (_ALLOWED * bound)
        share = math.nan if shares.isnan().any() else shares.max().item()
        before = self.worst.get(name, 0.0)
        self.worst[name] = math.nan if math.isnan(share) else max(before, share)

    @property
    def wrong(self) -> list[str]:
        """The names of wrong values; empty when the op is right."""
        return [name for name, share in self.worst.items() if not share <= 1]


def judge(
    problem: Problem,
    outputs: Outputs,
    gradients: Outputs,
    *,
    chunk_elements: int = _CHUNK_ELEMENTS,
) -> Judgement:
    """Compare the fused op's outputs and gradients with float64.

    normed and what flows back through it are held to the z that the op stored: the model's norm
    reads that one too.
    """
    num_tokens, hidden_size = problem.dz.shape
    judgement = Judgement()
    missing = _expected(problem) - (outputs.keys() | {f"d{name}" for name in gradients})
    judgement.worst.update(dict.fromkeys(missing, math.nan))
    if missing:
        return judgement
    sums = _Sums(problem)
    chunk = max(1, chunk_elements // hidden_size)
    for start in range(0, num_tokens, chunk):
        _judge_rows(problem, outputs, gradients, slice(start, start + chunk), judgement, sums)
    sums.judge(gradients, judgement)
    return judgement


def disagreements(
    ours: tuple[Outputs, Outputs], theirs: tuple[Outputs, Outputs], dgate_scale: float
) -> list[str]:
    """What another arm computes differently from the fused op, or not at all.

    Each value is held to 5 % in the norm. Not for `liger`, which computes less by design
    (trsp.bench.kernel_arms.LIGER_DIFFERS).
    """
    found = []
    for group, other in zip(ours, theirs, strict=True):
        found += [f"{name} (missing)" for name in group.keys() - other.keys()]
        for name in other.keys() & group.keys():
            scale = dgate_scale if name == "gate" else _frobenius(group[name])
            error = _frobenius(other[name] - group[name])
            if not error <= ARM_TOLERANCE * scale:
                found.append(name)
    return sorted(found)


def _expected(problem: Problem) -> set[str]:
    norms = set() if problem.case.norm is None else {"diff_norm", "x_norm"}
    normed = set() if problem.dnormed is None else {"normed"}
    return {"z", *norms, *normed, *(f"d{name}" for name in arm_inputs("fused", problem))}


class _Sums:
    """dgate and dweight, and the sizes of their terms, over all chunks."""

    def __init__(self, problem: Problem) -> None:
        hidden_size = problem.dz.shape[-1]
        self._problem = problem
        self._row_error = _row_sum_error(hidden_size)
        zero = torch.zeros((), dtype=torch.float64, device=problem.dz.device)
        self._dgate, self._squares, self._row_squares, self._rows = (zero.clone() for _ in range(4))
        self._dweight = zero.new_zeros(hidden_size)
        self._dweight_squares = zero.new_zeros(hidden_size)

    def add(self, gate_terms: Tensor, weight_terms: Tensor | None) -> None:
        self._dgate += gate_terms.sum()
        self._squares += gate_terms.square().sum()
        self._row_squares += gate_terms.abs().sum(dim=-1).square().sum()
        self._rows += gate_terms.sum(dim=-1).abs().sum()
        if weight_terms is not None:
            self._dweight += weight_terms.sum(dim=0)
            self._dweight_squares += weight_terms.square().sum(dim=0)

    def judge(self, gradients: Outputs, judgement: Judgement) -> None:
        num_tokens = self._problem.dz.shape[0]
        stored = torch.finfo(self._problem.dz.dtype).eps / 2
        random = stored * self._squares.sqrt() + self._row_error * self._row_squares.sqrt()
        summed = (math.log2(num_tokens + 1) + 4) * _FP32 * self._rows
        bound = _DEVIATIONS * random + summed + torch.finfo(torch.float32).tiny
        judgement.dgate_scale = self._squares.sqrt().item()
        judgement.compare("dgate", gradients["gate"], self._dgate.view(1), bound)
        if "weight" in gradients:
            # Partial sums grow like a random walk over the tokens.
            walk = 4 * math.sqrt(num_tokens) * _FP32 * self._dweight_squares.sqrt()
            bound = (
                stored * self._dweight.abs() + _DEVIATIONS * walk + torch.finfo(torch.float32).tiny
            )
            judgement.compare("dweight", gradients["weight"], self._dweight, bound)


def _judge_rows(
    problem: Problem,
    outputs: Outputs,
    gradients: Outputs,
    rows: slice,
    judgement: Judgement,
    sums: _Sums,
) -> None:
    case = problem.case
    stream, branch = (torch.finfo(dtype) for dtype in DTYPES[case.dtype])
    u, f = stream.eps / 2, _row_sum_error(case.hidden_size)
    # What lies below the smallest normal number is rounded in steps of this size.
    step = max(dtype.tiny * dtype.eps for dtype in (stream, branch))
    inputs = {
        name: tensor.detach()[rows].double()
        for name, tensor in problem.inputs.items()
        if tensor.shape == problem.dz.shape
    }
    x, s = inputs["x"], problem.inputs["gate"].detach().double()
    output_gate = case.gate_kind == "output"
    first = inputs.get("attn_out", x)
    d = inputs["y"] - x if "y" in inputs else first + inputs.get("mlp_out", 0.0)
    y = x + d
    z = s * y if output_gate else x + s * d

    def compare(name: str, truth: Tensor, bound: Tensor, found: Tensor) -> None:
        judgement.compare(name, found[rows], truth, bound + step)

    rounded_sums = 0.0 if "y" in inputs else (x + first).abs() + y.abs()
    widest = x.abs() + s.abs() * (x.abs() + y.abs())
    compare("z", z, u * (s.abs() * rounded_sums + z.abs()) + 4 * _FP32 * widest, outputs["z"])

    dz, dz_size = problem.dz[rows].double(), problem.dz[rows].double().abs()
    weight_terms = None
    if problem.dnormed is not None:
        stored_z = outputs["z"].detach()[rows].double()
        weight = problem.inputs["weight"].detach().double()
        gain = 1 + weight if case.convention == "gemma" else weight
        rstd = (stored_z.square().mean(dim=-1, keepdim=True) + EPS).rsqrt()
        row = stored_z * rstd
        normed = row * gain
        compare("normed", normed, (2 * u + f) * normed.abs(), outputs["normed"])
        dnormed = problem.dnormed[rows].double()
        drow = dnormed * gain
        along = drow * row
        dz = dz + rstd * (drow - row * along.mean(dim=-1, keepdim=True))
        dz_size = dz_size + rstd * (drow.abs() + row.abs() * along.abs().mean(dim=-1, keepdim=True))
        weight_terms = dnormed * row

    c: Any = torch.zeros((), dtype=torch.float64, device=dz.device)
    if problem.norm_grad is not None:
        diff_norm, x_norm = _norm(d, case.norm), _norm(x, case.norm)
        compare("diff_norm", diff_norm, 2 * f * diff_norm, outputs["diff_norm"])
        compare("x_norm", x_norm, 2 * f * x_norm, outputs["x_norm"])
        c = _norm_gradient(d, diff_norm, case.norm) * problem.norm_grad[rows].double().unsqueeze(-1)
    scaled, scaled_size = s * dz, s.abs() * dz_size
    along_x: Tensor = scaled if output_gate else dz
    if "y" in inputs:
        kept = torch.zeros_like(dz) if output_gate else (1 - s) * dz
        dx, dx_size = kept - c, kept.abs() + c.abs()
        if "x" in gradients:
            compare("dx", dx, u * dx.abs() + f * dx_size, gradients["x"])
        dy = scaled + c
        compare("dy", dy, u * dy.abs() + f * (scaled_size + c.abs()), gradients["y"])
    else:
        compare(
            "dx",
            along_x,
            u * along_x.abs() + f * dz_size * max(1.0, s.abs().item()),
            gradients["x"],
        )
        dbranch = scaled + c
        # c stems from the stored d.
        bound = branch.eps / 2 * dbranch.abs() + (u + f) * c.abs() + f * scaled_size
        for name in inputs.keys() & {"attn_out", "mlp_out"}:
            compare(f"d{name}", dbranch, bound, gradients[name])
    sums.add(dz * (y if output_gate else d), weight_terms)


def _row_sum_error(hidden_size: int) -> float:
    """Relative error of a sum of one row in fp32: blockwise, then a tree, then a few operations."""
    return (math.ceil(hidden_size / 1024) + 16) * _FP32


def _norm(d: Tensor, norm: str | None) -> Tensor:
    if norm == "l1":
        return d.abs().sum(dim=-1)
    squared = d.square().sum(dim=-1)
    return squared.sqrt() if norm == "l2" else squared


def _norm_gradient(d: Tensor, diff_norm: Tensor, norm: str | None) -> Tensor:
    if norm == "l1":
        return d.sign()
    if norm == "l2":
        return d / diff_norm.unsqueeze(-1).clamp_min(torch.finfo(torch.float64).tiny)
    return 2 * d


def _frobenius(tensor: Tensor) -> float:
    norm: float = torch.linalg.vector_norm(tensor.detach(), dtype=torch.float32).item()
    return norm

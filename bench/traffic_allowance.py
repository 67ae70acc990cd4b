"""What the traffic proof holds each case to: the cases, and the bytes of every tensor they touch.

T tokens (rows), D hidden size. The [T, D] tensors are those of trsp.bench.kernel_cases; this adds
their sizes, the per-token vectors (4 bytes, fp32) and what every program reads or writes for
itself: the gate, the RMSNorm's weight, and its part of that weight's gradient.
"""

from dataclasses import dataclass, replace
from typing import Literal, get_args

from trsp.bench.kernel_cases import (
    DTYPES,
    OPS,
    KernelCase,
    backward_passes,
    dtypes_of,
    forward_passes,
)
from trsp.kernels.arguments import Convention, GateKind, Norm
from trsp.kernels.launch import row_backward_launch

Direction = Literal["forward", "backward"]
# Bytes read and bytes written.
Bytes = tuple[int, int]

HIDDEN_SIZES = (100, 1024, 1500)
_TOKENS = (3, 4, 6)
_FP32 = 4
# Of the branches' dtype where it is not the residual stream's.
_BRANCH_TENSORS = {"attn_out", "mlp_out", "dbranch"}
# The interpreter has one multiprocessor; 128 registers a thread leave room for 16 warps.
_INTERPRETED_WARPS = 16


@dataclass(frozen=True)
class Allowance:
    """Bytes by tensor of one direction: whole passes, of all tokens, and of all programs."""

    num_programs: int
    passes: dict[str, Bytes]
    vectors: dict[str, Bytes]
    gate: dict[str, Bytes]
    rows: dict[str, Bytes]

    @property
    def tensors(self) -> dict[str, Bytes]:
        """Everything that may be touched, and by how much."""
        return self.passes | self.vectors | self.gate | self.rows


def proof_cases() -> list[tuple[KernelCase, int]]:
    """Every variant in every dtype with its number of tokens; sizes take turns, l2 has all."""
    variants = [
        KernelCase(op, norm=norm, gate_kind=gate_kind, num_branches=branches, convention=convention)
        for op in OPS
        for norm in (*get_args(Norm), None)
        for gate_kind in get_args(GateKind)
        for branches in ((2,) if op == "gated_difference" else (2, 1))
        for convention in (get_args(Convention) if op == "gated_branch_rmsnorm" else ("llama",))
    ]
    cases = []
    for turn, variant in enumerate(variants):
        sizes = []
        for place, dtype in enumerate(dtypes_of(variant.op), start=turn):
            sizes.append(HIDDEN_SIZES[place % 3])
            case = replace(variant, dtype=dtype, hidden_size=sizes[-1])
            cases.append((case, _TOKENS[place // 3 % 3]))
        if variant.norm == "l2":
            others = [size for size in HIDDEN_SIZES if size != sizes[0]]
            cases += [(replace(variant, hidden_size=size), _TOKENS[0]) for size in others]
    return cases


def allowance(case: KernelCase, direction: Direction, num_tokens: int) -> Allowance:
    """The bytes that one direction of `case` moves on [num_tokens, D], no more and no less."""
    forward = direction == "forward"
    table = forward_passes(case) if forward else backward_passes(case)
    one_pass = num_tokens * case.hidden_size
    passes = {name: (one_pass * _itemsize(case, name), 0) for name in table.reads}
    passes |= {name: (0, one_pass * _itemsize(case, name)) for name in table.writes}

    read, written = (num_tokens * _FP32, 0), (0, num_tokens * _FP32)
    vectors = {} if forward else {"row_dgate": written}
    if case.norm is not None:
        vectors |= {"diff_norm": written, "x_norm": written} if forward else {"norm_grad": read}
    if case.norm == "l2" and not forward:
        vectors["diff_norm"] = read

    num_programs, rows = num_tokens, {}
    if case.op == "gated_branch_rmsnorm":
        vectors["rstd"] = written if forward else read
        if not forward:
            resident = _INTERPRETED_WARPS // row_backward_launch(case.hidden_size).num_warps
            num_programs = min(num_tokens, resident)
            rows["program_dweight"] = (0, num_programs * case.hidden_size * _FP32)
        itemsize = DTYPES[case.dtype][0].itemsize
        rows["weight"] = (num_programs * case.hidden_size * itemsize, 0)
    return Allowance(num_programs, passes, vectors, {"gate": (num_programs * _FP32, 0)}, rows)


def _itemsize(case: KernelCase, name: str) -> int:
    """One branch is saved as it is, in its own dtype; the sum of two in the stream's."""
    stream, branch = DTYPES[case.dtype]
    of_branch = name in _BRANCH_TENSORS or (name == "d" and case.num_branches == 1)
    return (branch if of_branch else stream).itemsize

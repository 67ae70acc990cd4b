"""Bytes that eager torch moves, counted op by op: the least its kernels can move.

T tokens (rows), D hidden size; a pass is one [T, D] bf16 tensor read or written once, so an fp32
one counts double. Each aten op that computes is taken for one kernel that reads every tensor input
once and writes every output once, of a tensor the distinct elements alone (an expanded [T, 1]
column is T elements). Views, metadata and allocation move nothing; a fill only writes. That is the
least for tensors that no cache holds: kernels that read twice move more, so a ratio to these
counts does not flatter the fused op.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from trsp.bench.kernel_arms import Arm, arm_forward, arm_gradients, arms_of
from trsp.bench.kernel_cases import OPS, KernelCase, make_problem

PASS_ITEMSIZE = 2
_NUM_TOKENS, _HIDDEN_SIZE = 8, 64
_ALLOCATES = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
_ONLY_NAMES_ITS_INPUT = {
    "fill_", "zero_", "full_like", "ones_like", "zeros_like", "new_full", "new_ones", "new_zeros",
}  # fmt: skip


@dataclass(frozen=True)
class Move:
    """A tensor that one op reads or writes once."""

    op: str
    address: int
    elements: int
    itemsize: int
    is_write: bool

    @property
    def num_bytes(self) -> int:
        return self.elements * self.itemsize


class AtenMoves(TorchDispatchMode):
    """Within it every move of an aten op is in `moves`, but for those in `paused()`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.moves: list[Move] = []
        self._is_paused = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around what is no op of the program that is measured."""
        before, self._is_paused = self._is_paused, True
        try:
            yield
        finally:
            self._is_paused = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not self._is_paused and not func.is_view:
            name = func.overloadpacket.__name__
            if name in _ALLOCATES or name == "detach":
                return result
            read, written = _tensors_of(func, args, kwargs, result)
            self.add(name, [] if name in _ONLY_NAMES_ITS_INPUT else read, written)
        return result

    def add(self, op: str, read: Iterable[Tensor], written: Iterable[Tensor]) -> None:
        """Note one op."""
        for tensors, is_write in ((read, False), (written, True)):
            for tensor in tensors:
                self.moves.append(
                    Move(op, tensor.data_ptr(), _distinct(tensor), tensor.element_size(), is_write)
                )


def _tensors_of(
    func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any
) -> tuple[list[Tensor], list[Tensor]]:
    """What an op reads and writes; a tensor written in place is both, `out=` alone written."""
    read: list[Tensor] = []
    written = [leaf for leaf in _pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
    named = {argument.name: argument for argument in func._schema.arguments}
    given = dict(zip(named, args, strict=False)) | kwargs
    for name, value in given.items():
        if not named[name].is_out:
            read += [leaf for leaf in _pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
    return read, written


def _distinct(tensor: Tensor) -> int:
    """Elements behind a tensor, an expanded dimension counted once."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return math.prod(size for size, stride in sizes if stride != 0 or size == 0)


class _CudaRMSNorm(torch.autograd.Function):
    """F.rms_norm as CUDA runs it, one op forward and one backward; a CPU has no such kernel."""

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, gain: Tensor, eps: float, meter: AtenMoves, rms_norm: Any
    ) -> Tensor:
        with meter.paused():
            normed: Tensor = rms_norm(z, z.shape[-1:], gain, eps)
            rstd = z.new_empty(z.shape[:-1], dtype=torch.float32)
        meter.add("_fused_rms_norm", [z, gain], [normed, rstd])
        ctx.save_for_backward(z, gain, rstd)
        ctx.meter = meter
        return normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dnormed: Tensor) -> tuple[Tensor | None, ...]:
        z, gain, rstd = ctx.saved_tensors
        with ctx.meter.paused():
            dz, dgain = torch.zeros_like(z), torch.zeros_like(gain)
        ctx.meter.add("_fused_rms_norm_backward", [dnormed, z, rstd, gain], [dz, dgain])
        return dz, dgain, None, None, None


@contextmanager
def _rms_norm_as_on_cuda(meter: AtenMoves) -> Iterator[None]:
    """torch.nn.functional.rms_norm dispatches by device; here it counts as the fused op."""
    original: Callable[..., Tensor] = F.rms_norm

    def rms_norm(
        input: Tensor, normalized_shape: Any, weight: Any = None, eps: Any = None
    ) -> Tensor:
        normed: Tensor = _CudaRMSNorm.apply(  # type: ignore[no-untyped-call]
            input, weight, eps, meter, original
        )
        return normed

    F.rms_norm = rms_norm
    try:
        yield
    finally:
        F.rms_norm = original


def count_eager(case: KernelCase, arm: Arm) -> dict[str, Any]:
    """Passes of an eager arm, forward and backward: {"forward": ..., "backward": ..., "ops": ...}.

    Moves of fewer than T * D elements are no passes: norms, gates, the RMSNorm's weight.
    """
    case = replace(case, hidden_size=_HIDDEN_SIZE)
    problem = make_problem(case, _NUM_TOKENS, "cpu")
    counted: dict[str, Any] = {}
    ops: dict[str, list[str]] = {}
    meter = AtenMoves()
    with meter, _rms_norm_as_on_cuda(meter):
        outputs = arm_forward(arm, problem)
        counted["forward"], ops["forward"] = _passes(meter.moves)
        meter.moves.clear()
        arm_gradients(arm, problem, outputs)
        counted["backward"], ops["backward"] = _passes(meter.moves)
    return {**counted, "total": counted["forward"] + counted["backward"], "ops": ops}


def _passes(moves: list[Move]) -> tuple[float, list[str]]:
    """Passes of all moves, and each of them in words."""
    one = _NUM_TOKENS * _HIDDEN_SIZE * PASS_ITEMSIZE
    large = [move for move in moves if move.elements >= _NUM_TOKENS * _HIDDEN_SIZE]
    words = [
        f"{move.op} {'writes' if move.is_write else 'reads'} {move.num_bytes / one:g}"
        for move in large
    ]
    return sum(move.num_bytes for move in large) / one, words


def eager_table() -> dict[str, dict[str, Any]]:
    """Every eager arm of each op's default case (bf16, l2, residual gate, two branches)."""
    table: dict[str, dict[str, Any]] = {}
    for op in OPS:
        case = KernelCase(op)
        eager = [arm for arm in arms_of(case) if arm.startswith("eager_")]
        table[op] = {arm: count_eager(case, arm) for arm in eager}
    return table

"""What a fused kernel may statically cost, and the reasons why a compiled one is refused.

D hidden size. The traffic of a row is counted in bytes an element: bytes that the threads of a
program access in one loop iteration, divided by the columns (or rows) that the iteration covers.

- Gate kernels loop over blocks of a row. The columns of an iteration are the constant by which the
  loop's counter advances in the machine code, so an unrolled loop counts right. Two loops add up.
- The RMSNorm forward holds a row and has no loop: its accesses are those of one row.
- The RMSNorm backward loops over rows. An iteration covers as many rows as its 32-bit accesses
  show (rstd, the norm's gradient and value; the gate's gradient), loads and stores agreeing.
  Outside its loop a program reads the weight and writes its part of the weight's gradient.

An access that fits no place in this picture is refused, and so is a loop that hides its step.
Masked lanes count as moved: exact where BLOCK divides D, an upper bound elsewhere. What is not
seen: launches by torch itself (a copy for strides, the sum over programs), caches, and time.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

import torch

from trsp.bench.kernel_cases import (
    DTYPES,
    KernelCase,
    Passes,
    backward_passes,
    forward_passes,
)
from trsp.bench.machine_code import MachineCode, Widths

Direction = Literal["forward", "backward"]

MAX_REGISTERS = 64
MAX_ROW_BACKWARD_REGISTERS = 128
WIDE = 128
# A multiprocessor of compute capability 8.0, 9.0 and 10.0: registers, warps, programs.
_REGISTERS, _WARPS, _PROGRAMS = 65536, 64, 32
_REGISTER_UNIT = 256
_SHARED_BYTES = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}
_RESERVED_SHARED_BYTES = 1024


@dataclass(frozen=True)
class StaticKernel:
    """One compiled launch: where it belongs, its shape, and what the compiler made of it."""

    capability: int
    case: KernelCase
    direction: Direction
    kernel: str
    block: int
    num_warps: int
    shared_bytes: int
    multiplied: tuple[str, ...]
    ptx_atomics: tuple[str, ...]
    code: MachineCode

    @property
    def key(self) -> str:
        """Names the launch in records and baselines."""
        return f"sm_{self.capability}-{self.case.name}-{self.direction}"

    @property
    def max_registers(self) -> int:
        row_backward = self.case.op == "gated_branch_rmsnorm" and self.direction == "backward"
        return MAX_ROW_BACKWARD_REGISTERS if row_backward else MAX_REGISTERS

    @property
    def resident_warps(self) -> int:
        """Warps of this kernel that fit a multiprocessor: registers, shared memory, programs."""
        a_warp = -(-self.code.registers * 32 // _REGISTER_UNIT) * _REGISTER_UNIT
        shared = _SHARED_BYTES[self.capability] // (self.shared_bytes + _RESERVED_SHARED_BYTES)
        by_registers = _REGISTERS // a_warp // self.num_warps
        return self.num_warps * min(by_registers, shared, _PROGRAMS, _WARPS // self.num_warps)

    @classmethod
    def from_document(cls, document: dict[str, Any]) -> "StaticKernel":
        """The inverse of `dataclasses.asdict` after JSON."""
        return cls(
            **{
                **document,
                "case": KernelCase(**document["case"]),
                "multiplied": tuple(document["multiplied"]),
                "ptx_atomics": tuple(document["ptx_atomics"]),
                "code": MachineCode.from_document(document["code"]),
            }
        )


@dataclass(frozen=True)
class Traffic:
    """Bytes an element of a row, and of a row's length once a program."""

    read: float = 0
    written: float = 0
    program_read: float = 0
    program_written: float = 0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(
            self.read + other.read,
            self.written + other.written,
            self.program_read + other.program_read,
            self.program_written + other.program_written,
        )


@dataclass(frozen=True)
class _Scalars:
    """32-bit accesses of one value a row or a program, outside and inside a loop over rows."""

    loads: int
    stores: int
    loop_loads: int = 0
    loop_stores: int = 0


def passes_of(case: KernelCase, direction: Direction) -> Passes:
    """The traffic table's entry."""
    return forward_passes(case) if direction == "forward" else backward_passes(case)


def allowed_traffic(case: KernelCase, direction: Direction) -> Traffic:
    """The traffic table in bytes; the RMSNorm's weight is the only tensor without T rows."""
    passes = passes_of(case, direction)
    read = sum(_itemsize(case, name) for name in passes.reads)
    written = sum(_itemsize(case, name) for name in passes.writes)
    if case.op != "gated_branch_rmsnorm":
        return Traffic(read, written)
    weight = _itemsize(case, "weight")
    # One row a program: the weight's row is read with every row, from cache.
    if direction == "forward":
        return Traffic(read, written, program_read=weight)
    return Traffic(read, written, weight, torch.float32.itemsize)


def counted_traffic(kernel: StaticKernel) -> tuple[Traffic, list[str]]:
    """What the machine code moves, and why a part of it could not be counted."""
    scalars = _scalars(kernel.case, kernel.direction)
    loads, stores = kernel.code.outside_loops()
    threads = 32 * kernel.num_warps
    outside_read = (_bytes(loads) - 4 * scalars.loads) * threads / kernel.block
    outside_written = (_bytes(stores) - 4 * scalars.stores) * threads / kernel.block
    if kernel.case.op == "gated_branch_rmsnorm":
        if kernel.direction == "forward":
            weight = allowed_traffic(kernel.case, "forward").program_read
            found = Traffic(outside_read - weight, outside_written, weight)
            return found, ["a loop in a kernel that holds its row"] if kernel.code.loops else []
        return _row_loop_traffic(kernel, scalars, outside_read, outside_written)
    total, problems = Traffic(), []
    for loop in kernel.code.loops:
        if loop.step is None:
            problems.append("a loop whose step the machine code does not show")
            continue
        read, written = _bytes(loop.loads) * threads, _bytes(loop.stores) * threads
        total += Traffic(read / loop.step, written / loop.step)
    # Narrow ones are named as such.
    if outside_read or outside_written:
        problems.append("accesses outside the loop over a row")
    return total, problems


def refusals(launches: list[StaticKernel]) -> list[str]:
    """Why one case's launches in one direction on one target are refused; empty if they pass."""
    reasons = [reason for kernel in launches for reason in _defects(kernel)]
    if len(launches) != 1:
        reasons.append(f"{len(launches)} launches, 1 allowed")
    total = Traffic()
    for kernel in launches:
        traffic, problems = counted_traffic(kernel)
        total += traffic
        reasons += problems
    allowed = allowed_traffic(launches[0].case, launches[0].direction)
    for name, found, bar in (
        ("reads", total.read, allowed.read),
        ("writes", total.written, allowed.written),
        ("reads once a program", total.program_read, allowed.program_read),
        ("writes once a program", total.program_written, allowed.program_written),
    ):
        if found != bar:
            reasons.append(f"{name} {found:g} bytes an element, {bar:g} allowed")
    return reasons


def _defects(kernel: StaticKernel) -> list[str]:
    code, reasons = kernel.code, []
    if code.registers > kernel.max_registers:
        reasons.append(f"{code.registers} registers, {kernel.max_registers} allowed")
    if code.num_spills or code.stack_bytes or code.local_bytes:
        reasons.append(
            f"{code.num_spills} spill instructions, {code.stack_bytes + code.local_bytes} bytes"
        )
    if code.num_atomics or kernel.ptx_atomics:
        reasons.append(f"{code.num_atomics or len(kernel.ptx_atomics)} atomics")
    if kernel.multiplied != ("i64",):
        reasons.append(f"offsets multiplied in {' and '.join(kernel.multiplied) or 'nothing'}")
    if code.uncounted:
        reasons.append(f"accesses of a kind that is not counted: {', '.join(code.uncounted)}")
    if narrow := _narrow(kernel):
        reasons.append(f"{narrow} streaming accesses narrower than {WIDE} bits")
    return reasons


def _narrow(kernel: StaticKernel) -> int:
    scalars = _scalars(kernel.case, kernel.direction)
    rows = _rows_of_iteration(kernel, scalars) or 1
    narrow = Counter[int]()
    for widths in (kernel.code.loads, kernel.code.stores):
        narrow.update({width: number for width, number in widths.items() if width < WIDE})
    inside = rows * (scalars.loop_loads + scalars.loop_stores)
    narrow[32] -= scalars.loads + scalars.stores + inside
    return sum((+narrow).values())


def _row_loop_traffic(
    kernel: StaticKernel, scalars: _Scalars, program_read: float, program_written: float
) -> tuple[Traffic, list[str]]:
    if len(kernel.code.loops) != 1:
        return Traffic(), [f"{len(kernel.code.loops)} loops over rows, expected 1"]
    (loop,), threads = kernel.code.loops, 32 * kernel.num_warps
    rows, problems = _rows_of_iteration(kernel, scalars), []
    if rows is None:
        rows, problems = 1, ["a loop whose rows an iteration the machine code does not show"]
    read = _bytes(loop.loads) / rows - 4 * scalars.loop_loads
    written = _bytes(loop.stores) / rows - 4 * scalars.loop_stores
    scale = threads / kernel.block
    return Traffic(read * scale, written * scale, program_read, program_written), problems


def _rows_of_iteration(kernel: StaticKernel, scalars: _Scalars) -> int | None:
    """Copies of the body of the loop over rows; None where loads and stores tell differently."""
    if not scalars.loop_stores or len(kernel.code.loops) != 1:
        return None
    (loop,) = kernel.code.loops
    rows, rest = divmod(loop.stores.get(32, 0), scalars.loop_stores)
    agree = loop.loads.get(32, 0) == rows * scalars.loop_loads
    return rows if agree and not rest and rows else None


def _scalars(case: KernelCase, direction: Direction) -> _Scalars:
    """The gate is loaded once a program; norms and rstd are one value a row."""
    norms = 0 if case.norm is None else 2
    fused_norm = case.op == "gated_branch_rmsnorm"
    if direction == "forward":
        return _Scalars(loads=1, stores=norms + fused_norm)
    # The gradient of the norm; l2 divides by its value.
    given = (case.norm is not None) + (case.norm == "l2")
    if fused_norm:
        return _Scalars(loads=1, stores=0, loop_loads=1 + given, loop_stores=1)
    return _Scalars(loads=1 + given, stores=1)


def _itemsize(case: KernelCase, name: str) -> int:
    stream, branch = DTYPES[case.dtype]
    of_branch = {"attn_out", "mlp_out", "dbranch"}
    # The sum of two branches is saved in the stream's dtype, one branch as it is.
    if case.num_branches == 1 and case.op != "gated_difference":
        of_branch.add("d")
    return (branch if name in of_branch else stream).itemsize


def _bytes(widths: Widths) -> int:
    return sum(width // 8 * number for width, number in widths.items())

"""The traffic proof: every fused op makes one launch a direction and moves what its table allows.

    TRITON_INTERPRET=1 python -m trsp.bench.interpreter_traffic        one JSON document on stdout

T tokens (rows), D hidden size. An op runs through its public function and autograd, so what is
saved for backward, and how it is read, is part of the proof:

- each [T, D] tensor of trsp.bench.kernel_cases is read or written exactly once, byte for byte;
  nothing else of that size is touched, by a kernel or by a torch op between the launches;
- vectors and what each program reads for itself move exactly the bytes of traffic_allowance;
- a tensor that the caller or the other direction holds is the kernel's own argument, no copy;
- no byte outside the launch's tensors, no atomics.
"""

import json
import os
import sys
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from trsp.bench.aten_traffic import AtenMoves, Move
from trsp.bench.interpreter_meter import LaunchMeter, LaunchTraffic
from trsp.bench.kernel_cases import KernelCase, Problem, fused_forward, gradients, make_problem
from trsp.bench.traffic_allowance import Allowance, Bytes, Direction, allowance, proof_cases

_TABLE_NAMES = {"attn": "attn_out", "mlp": "mlp_out"}
_NONE: Bytes = (0, 0)


@dataclass(frozen=True)
class DirectionTraffic:
    """What forward or backward of one case moved, and the passes that it was allowed."""

    launches: int
    passes: float
    allowed_passes: int
    bytes_a_token: float
    gate_bytes_a_program: float
    row_bytes_a_program: float


@dataclass(frozen=True)
class _Run:
    """One direction as it ran. `held` is the address of each tensor that must not be copied."""

    launches: list[LaunchTraffic]
    torch_moves: list[Move]
    held: dict[str, int]


def prove(case: KernelCase, num_tokens: int) -> tuple[dict[Direction, DirectionTraffic], list[str]]:
    """Run one training step of `case` and hold it to its table; the list says what is wrong."""
    traffic: dict[Direction, DirectionTraffic] = {}
    failed = []
    for direction, run in _run(make_problem(case, num_tokens, "cpu")).items():
        allowed = allowance(case, direction, num_tokens)
        traffic[direction] = _summary(run, allowed, num_tokens)
        faults = [
            *_launch_faults(run.launches, allowed.num_programs),
            *_byte_faults(run.launches, allowed),
            *_copy_faults(run),
            *_torch_faults(run, num_tokens * case.hidden_size),
        ]
        failed += [f"{case.name} T{num_tokens} {direction}: {fault}" for fault in faults]
    return traffic, failed


def _run(problem: Problem) -> dict[Direction, _Run]:
    """Forward and backward, metered, and which tensors either had to take as they were."""
    case, learning = problem.case, problem
    if case.op == "gated_difference" and case.gate_kind == "output" and case.norm is None:
        # z = s * y does not hold x: it has no gradient to ask for.
        inputs = {name: tensor for name, tensor in problem.inputs.items() if name != "x"}
        learning = replace(problem, inputs=inputs)
    moves = AtenMoves()
    meter = LaunchMeter(moves)
    with meter.counting():
        outputs = fused_forward(problem)
        num_launches, num_moves = len(meter.launches), len(moves.moves)
        grads = gradients(learning, outputs)
    forward = meter.launches[:num_launches]

    held = _addresses(problem.inputs.items())
    given = {"dz": problem.dz, "dnormed": problem.dnormed, "norm_grad": problem.norm_grad}
    targets = {"dx": "x", "dy": "y", "dbranch": "attn_out"}
    backward_held = {
        **held,
        **_addresses(outputs.items()),
        # What forward made and only autograd holds: d, rstd.
        **{
            _table_name(parameter): tensor.address
            for launch in forward
            for parameter, tensor in launch.tensors.items()
        },
        **_addresses((name, tensor) for name, tensor in given.items() if tensor is not None),
        **{name: grads[of].data_ptr() for name, of in targets.items() if of in grads},
    }
    if case.num_branches == 1 and case.op != "gated_difference":
        backward_held["d"] = held["attn_out"]
    return {
        "forward": _Run(forward, moves.moves[:num_moves], held | _addresses(outputs.items())),
        "backward": _Run(meter.launches[num_launches:], moves.moves[num_moves:], backward_held),
    }


def _addresses(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in tensors}


def _table_name(parameter: str) -> str:
    name = parameter.removesuffix("_ptr")
    return _TABLE_NAMES.get(name, name)


def _moved(launches: list[LaunchTraffic]) -> dict[str, Bytes]:
    """Bytes read and written of each tensor that is touched, over all launches."""
    read: Counter[str] = Counter()
    written: Counter[str] = Counter()
    for launch in launches:
        for parameter, tensor in launch.tensors.items():
            read[_table_name(parameter)] += int(tensor.loads.sum())
            written[_table_name(parameter)] += int(tensor.stores.sum())
    return {name: (read[name], written[name]) for name in read if read[name] or written[name]}


def _summary(run: _Run, allowed: Allowance, num_tokens: int) -> DirectionTraffic:
    moved = _moved(run.launches)

    def total(names: Iterable[str]) -> int:
        return sum(sum(moved.get(name, _NONE)) for name in names)

    small = allowed.vectors | allowed.gate | allowed.rows
    one_pass = {name: sum(size) for name, size in allowed.passes.items()}
    return DirectionTraffic(
        launches=len(run.launches),
        # A tensor that is in no table is a pass of its own, of whatever size.
        passes=sum(
            sum(size) / one_pass.get(name, sum(size))
            for name, size in moved.items()
            if name not in small
        ),
        allowed_passes=len(allowed.passes),
        bytes_a_token=total(allowed.vectors) / num_tokens,
        gate_bytes_a_program=total(allowed.gate) / allowed.num_programs,
        row_bytes_a_program=total(allowed.rows) / allowed.num_programs,
    )


def _launch_faults(launches: list[LaunchTraffic], num_programs: int) -> list[str]:
    faults = []
    if len(launches) != 1:
        kernels = ", ".join(launch.kernel for launch in launches)
        faults.append(f"{len(launches)} launches ({kernels}), allowed 1")
    for launch in launches:
        if launch.num_programs != num_programs:
            faults.append(f"{launch.num_programs} programs, expected {num_programs}")
        if launch.stray_bytes:
            faults.append(f"{launch.stray_bytes} bytes at addresses of no tensor of the launch")
        faults += [f"{_table_name(name)}: atomic access" for name in launch.atomics]
    return faults


def _byte_faults(launches: list[LaunchTraffic], allowed: Allowance) -> list[str]:
    """Wrong totals of any tensor; bytes of a [T, D] tensor that are not accessed exactly once."""
    moved, allowed_bytes, faults = _moved(launches), allowed.tensors, []
    for name in sorted(allowed_bytes.keys() | moved.keys()):
        is_, may = moved.get(name, _NONE), allowed_bytes.get(name, _NONE)
        for place, verb in enumerate(("read", "written")):
            if is_[place] != may[place]:
                faults.append(f"{name}: {is_[place]} bytes {verb}, allowed {may[place]}")
    for launch in launches:
        for parameter, tensor in launch.tensors.items():
            counts = tensor.loads + tensor.stores
            if _table_name(parameter) in allowed.passes and not (counts == 1).all():
                times = f"{counts.min()} to {counts.max()} times"
                faults.append(f"{_table_name(parameter)}: each byte is accessed {times}, not once")
    return faults


def _copy_faults(run: _Run) -> list[str]:
    return [
        f"{name}: the kernel works on a copy"
        for launch in run.launches
        for name, tensor in ((_table_name(p), tensor) for p, tensor in launch.tensors.items())
        if run.held.get(name, tensor.address) != tensor.address
    ]


def _torch_faults(run: _Run, one_pass: int) -> list[str]:
    """Torch ops on [T, D] tensors beside the kernel; dweight's partial sums are none of those."""
    names = {address: name for name, address in run.held.items()}
    names |= {
        tensor.address: _table_name(parameter)
        for launch in run.launches
        for parameter, tensor in launch.tensors.items()
    }
    return [
        f"{names.get(move.address, 'a new tensor')}: {move.num_bytes} bytes "
        f"{'written' if move.is_write else 'read'} by aten.{move.op}, outside the kernel"
        for move in run.torch_moves
        if move.elements >= one_pass
        and (move.op, names.get(move.address)) != ("sum", "program_dweight")
    ]


def main() -> None:
    """Prove every case; the document goes to stdout, also where cases fail."""
    import triton

    os.environ["TRSP_KERNELS"] = "triton"
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "gated_difference measures y - x")
    rows: list[dict[str, Any]] = []
    failed: list[str] = []
    for case, num_tokens in proof_cases():
        traffic, faults = prove(case, num_tokens)
        row: dict[str, Any] = {"case": asdict(case), "name": case.name, "num_tokens": num_tokens}
        row.update((direction, asdict(moved)) for direction, moved in traffic.items())
        rows.append(row)
        failed += faults
    json.dump({"triton": triton.__version__, "cases": rows, "failed": failed}, sys.stdout)


if __name__ == "__main__":
    main()

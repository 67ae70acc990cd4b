"""What each kernel cost statically when it was last accepted, for every version of Triton.

The compiler comes with Triton, so one version gives one result on every machine and a difference
is a change of ours. A file holds no path, no time and no machine.
"""

import json
from pathlib import Path
from typing import Any

from trsp.bench.machine_code import Widths
from trsp.bench.static_limits import WIDE, StaticKernel
from trsp.pruner.durable import atomic_write

FOLDER = Path(__file__).parent / "records" / "static-cost"
SCHEMA_VERSION = 1
# Registers are given out by eight a thread: half of that is the compiler's own wavering.
REGISTER_TOLERANCE = 4
INSTRUCTION_TOLERANCE = 0.05

Entry = dict[str, Any]


def summarise(launches: list[StaticKernel]) -> list[Entry]:
    """What is compared, one entry a launch."""
    return [
        {
            "registers": kernel.code.registers,
            "resident_warps": kernel.resident_warps,
            "spills": kernel.code.num_spills,
            "barriers": kernel.code.num_barriers,
            "instructions": kernel.code.num_instructions,
            "shared_bytes": kernel.shared_bytes,
            "loads": _as_text(kernel.code.loads),
            "stores": _as_text(kernel.code.stores),
        }
        for kernel in launches
    ]


def baseline_path(triton_version: str) -> Path:
    """Where the baseline of one Triton lies, whether or not it exists."""
    return FOLDER / f"triton-{triton_version}.json"


def read_baseline(triton_version: str) -> dict[str, list[Entry]] | None:
    """The accepted entries by kernel key; None where this Triton has no baseline.

    Raises:
        ValueError: the file is of another schema or Triton.
    """
    path = baseline_path(triton_version)
    if not path.is_file():
        return None
    document = json.loads(path.read_text("utf-8"))
    if (document["schema_version"], document["triton"]) != (SCHEMA_VERSION, triton_version):
        raise ValueError(f"{path.name} is not a baseline of schema {SCHEMA_VERSION} of its Triton")
    kernels: dict[str, list[Entry]] = document["kernels"]
    return kernels


def write_baseline(triton_version: str, kernels: dict[str, list[Entry]]) -> Path:
    """Accept `kernels`, one line each, in order of their keys."""
    lines = [f"  {json.dumps(key)}: {json.dumps(kernels[key])}" for key in sorted(kernels)]
    head = f'{{\n "schema_version": {SCHEMA_VERSION},\n "triton": {json.dumps(triton_version)},\n'
    path = baseline_path(triton_version)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, head + ' "kernels": {\n' + ",\n".join(lines) + "\n }\n}\n")
    return path


def regressions(found: list[Entry], accepted: list[Entry]) -> list[str]:
    """What became dearer than accepted, beyond the tolerances."""
    if len(found) != len(accepted):
        return [f"{len(found)} launches, baseline {len(accepted)}"]
    reasons = []
    for now, then in zip(found, accepted, strict=True):
        bars = {
            "registers": then["registers"] + REGISTER_TOLERANCE,
            "instructions": then["instructions"] * (1 + INSTRUCTION_TOLERANCE),
            **{name: then[name] for name in ("spills", "barriers", "shared_bytes")},
        }
        reasons += [
            f"{now[name]} {name.replace('_', ' ')}, baseline {then[name]}"
            for name, bar in bars.items()
            if now[name] > bar
        ]
        if now["resident_warps"] < then["resident_warps"]:
            reasons.append(
                f"{now['resident_warps']} resident warps, baseline {then['resident_warps']}"
            )
        for name in ("loads", "stores"):
            if sum(now[name].values()) > sum(then[name].values()):
                reasons.append(f"more {name} than the baseline: {now[name]}, was {then[name]}")
            if _narrow(now[name]) > _narrow(then[name]):
                reasons.append(f"narrower {name} than the baseline: {now[name]}, was {then[name]}")
    return reasons


def improvements(found: list[Entry], accepted: list[Entry]) -> list[str]:
    """What became cheaper; reported, so that the baseline can be tightened."""
    return [
        f"{now[name]} {name.replace('_', ' ')}, baseline {then[name]}"
        for now, then in zip(found, accepted, strict=False)
        for name in ("registers", "spills", "barriers", "shared_bytes")
        if now[name] < then[name]
    ]


def _as_text(widths: Widths) -> dict[str, int]:
    return {str(width): number for width, number in sorted(widths.items())}


def _narrow(widths: dict[str, int]) -> int:
    return sum(number for width, number in widths.items() if int(width) < WIDE)

"""What a kernel's machine code says of its cost, read from the text of `cuobjdump` and `nvdisasm`.

Pure functions of text: nothing is compiled or run here. A loop is a set of basic blocks that can
reach each other, so a cold block that jumps back is none, and nested loops are one.
"""

import re
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

# Accesses of global memory by their width in bits.
Widths = dict[int, int]

_LOADS = {"LDG", "LDGSTS"}
_STORES = {"STG"}
_SPILLS = {"LDL", "STL"}
_ATOMICS = re.compile(r"(ATOM[GS]?|RED[GS]?|SUATOM|SURED|UBLKRED|UTMAREDG)$")
# They move memory in ways that are not counted here: bulk copies, generic and surface accesses.
_UNCOUNTED = re.compile(r"(LD|ST|UTMALDG|UTMASTG|UBLKCP|UBLKPF|SULD|SUST|TEX|TLD|BRX|JMX|JMP)$")
_WIDTHS = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}

_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")
_LABEL = re.compile(r"\s*(\.L_\w+):")
_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(.*?)\s*;")
_PARTS = re.compile(r"(?:@(!?U?P\w+)\s+)?([A-Z]\w*)((?:\.\w+)*)\s*(.*)")
_TARGET = re.compile(r"`\((\.L_\w+)\)")
# R4 = R4 + 0x400 in the spellings of sm_80, sm_90 (VIADD) and sm_100 (carries before the sum).
_ADVANCE = re.compile(r"(U?R\d+), (?:U?PT, )*\1(?:\.reuse)?, (0x[0-9a-f]+)(?:, U?RZ)?$")


@dataclass(frozen=True)
class Loop:
    """The global accesses of one iteration, and by how much its counter advances, if told."""

    loads: Widths
    stores: Widths
    step: int | None


@dataclass(frozen=True)
class MachineCode:
    """One kernel. `loads` and `stores` are of the whole kernel, its loops included."""

    registers: int
    stack_bytes: int
    local_bytes: int
    num_instructions: int
    num_spills: int
    num_atomics: int
    num_barriers: int
    loads: Widths
    stores: Widths
    loops: tuple[Loop, ...]
    uncounted: tuple[str, ...]

    def outside_loops(self) -> tuple[Widths, Widths]:
        """Loads and stores that a program makes once."""
        loads, stores = Counter(self.loads), Counter(self.stores)
        for loop in self.loops:
            loads.subtract(loop.loads)
            stores.subtract(loop.stores)
        return dict(+loads), dict(+stores)

    def to_document(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)

    @classmethod
    def from_document(cls, document: dict[str, Any]) -> "MachineCode":
        """The inverse of `to_document` after JSON, whose keys are text."""

        def widths(found: dict[str, int]) -> Widths:
            return {int(width): number for width, number in found.items()}

        loops = [
            Loop(widths(loop["loads"]), widths(loop["stores"]), loop["step"])
            for loop in document["loops"]
        ]
        parts = {"loads": widths(document["loads"]), "stores": widths(document["stores"])}
        uncounted = tuple(document["uncounted"])
        return cls(**{**document, **parts, "loops": tuple(loops), "uncounted": uncounted})


@dataclass(frozen=True)
class _Instruction:
    guarded: bool
    name: str
    modifiers: tuple[str, ...]
    operands: str

    @property
    def width(self) -> int:
        return next((_WIDTHS[part] for part in self.modifiers if part in _WIDTHS), 32)


def read_machine_code(usage: str, sass: str) -> MachineCode:
    """One kernel's cost from `cuobjdump -res-usage` and `nvdisasm -c` of its cubin.

    Raises:
        ValueError: the text is not of exactly one kernel.
    """
    resources = _USAGE.findall(usage)
    if len(resources) != 1:
        raise ValueError(f"cuobjdump names {len(resources)} kernels, expected one: {usage!r}")
    registers, stack_bytes, local_bytes = map(int, resources[0])
    instructions, labels = _parse(sass)
    if not instructions:
        raise ValueError("nvdisasm printed no instruction")
    names = Counter(instruction.name for instruction in instructions)
    loads, stores = _accesses(instructions)
    return MachineCode(
        registers=registers,
        stack_bytes=stack_bytes,
        local_bytes=local_bytes,
        num_instructions=len(instructions) - names["NOP"],
        num_spills=sum(names[name] for name in _SPILLS),
        num_atomics=sum(number for name, number in names.items() if _ATOMICS.match(name)),
        num_barriers=names["BAR"],
        loads=loads,
        stores=stores,
        loops=tuple(_read_loop(body) for body in _loops(instructions, labels)),
        uncounted=tuple(sorted(name for name in names if _UNCOUNTED.match(name))),
    )


def _parse(sass: str) -> tuple[list[_Instruction], dict[str, int]]:
    """The instructions in order, and the position that each label marks."""
    instructions: list[_Instruction] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif (found := _INSTRUCTION.match(line)) and (parts := _PARTS.match(found[1])):
            guard, name, modifiers, operands = parts.groups()
            split = tuple(modifiers.split(".")[1:])
            instructions.append(_Instruction(guard is not None, name, split, operands))
    return instructions, labels


def _accesses(instructions: list[_Instruction]) -> tuple[Widths, Widths]:
    loads = Counter(found.width for found in instructions if found.name in _LOADS)
    stores = Counter(found.width for found in instructions if found.name in _STORES)
    return dict(sorted(loads.items())), dict(sorted(stores.items()))


def _loops(instructions: list[_Instruction], labels: dict[str, int]) -> list[list[_Instruction]]:
    """The instructions of every loop that touches global memory."""
    size = len(instructions)
    ends = {i + 1 for i, found in enumerate(instructions) if found.name in ("BRA", "EXIT", "RET")}
    starts = sorted(({0, *labels.values()} | ends) - {size})
    block_at = {start: block for block, start in enumerate(starts)}
    bodies = [
        instructions[start:end] for start, end in zip(starts, [*starts[1:], size], strict=True)
    ]
    successors: list[set[int]] = []
    for block, body in enumerate(bodies):
        last, following = body[-1], {block + 1} & set(range(len(bodies)))
        if last.name == "BRA":
            target = _TARGET.search(last.operands)
            if target is None:
                raise ValueError(f"nvdisasm prints a branch without a label: {last.operands!r}")
            # `BRA.U !UP0, target` and `@P0 BRA target` may also fall through.
            falls = last.guarded or not last.operands.startswith("`")
            position = labels[target[1]]
            jumps = {block_at[position]} if position in block_at else set()
            successors.append(jumps | (following if falls else set()))
        elif last.name in ("EXIT", "RET"):
            successors.append(following if last.guarded else set())
        else:
            successors.append(following)
    reach = [_reachable(block, successors) for block in range(len(bodies))]
    loops = {
        frozenset(other for other in reach[block] if block in reach[other])
        for block in range(len(bodies))
        if block in reach[block]
    }
    found = [[line for block in sorted(loop) for line in bodies[block]] for loop in loops]
    return [body for body in found if any(_accesses(body))]


def _reachable(block: int, successors: list[set[int]]) -> set[int]:
    seen: set[int] = set()
    todo = list(successors[block])
    while todo:
        current = todo.pop()
        if current not in seen:
            seen.add(current)
            todo += successors[current]
    return seen


def _read_loop(body: list[_Instruction]) -> Loop:
    """A counter is a register that adds a constant to itself and is compared."""
    compared = {
        register
        for found in body
        if found.name in ("ISETP", "UISETP")
        for register in re.findall(r"U?R\d+", found.operands)
    }
    advances = {
        found[1]: int(found[2], 16)
        for line in body
        if line.name in ("IADD", "IADD3", "UIADD3", "VIADD", "UVIADD")
        and (found := _ADVANCE.match(line.operands))
    }
    steps = {step for register, step in advances.items() if register in compared}
    loads, stores = _accesses(body)
    return Loop(loads, stores, steps.pop() if len(steps) == 1 else None)

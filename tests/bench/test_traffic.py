"""The traffic proof holds, and whatever a kernel or its launcher moves too much breaks it."""

import importlib.util
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from trsp.bench import traffic
from trsp.bench.aten_traffic import AtenMoves, count_eager
from trsp.bench.kernel_cases import KernelCase
from trsp.kernels import gated_branch, gated_branch_rmsnorm, gated_difference
from trsp.pruner.errors import RunError, UserError

HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
# In this process Triton interprets only where tests/conftest.py found no GPU; the proof itself
# runs in a process of its own and needs no such condition.
interprets = pytest.mark.skipif(
    not HAS_TRITON or torch.cuda.is_available(), reason="Triton compiles in this process"
)
NUM_TOKENS = 3


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("traffic") / "traffic.json"
    returned = traffic.run_traffic(out=out)
    written: dict[str, Any] = json.loads(out.read_text())
    assert (written["schema_version"], written["benchmark"]) == (1, "traffic")
    assert {name: written[name] for name in returned} == returned
    return returned


@needs_triton
def test_every_op_moves_exactly_what_its_table_allows(record: dict[str, Any]) -> None:
    assert record["failed"] == []
    for row in record["cases"]:
        for direction in ("forward", "backward"):
            moved = row[direction]
            assert moved["launches"] == 1
            assert moved["passes"] == moved["allowed_passes"]


@needs_triton
def test_the_proof_covers_every_variant(record: dict[str, Any]) -> None:
    def values(op: str, name: str) -> set[Any]:
        return {row["case"][name] for row in record["cases"] if row["case"]["op"] == op}

    for op in ("gated_difference", "gated_branch", "gated_branch_rmsnorm"):
        assert values(op, "norm") == {None, "l1", "l2", "l2_squared"}
        assert values(op, "gate_kind") == {"residual", "output"}
        assert values(op, "hidden_size") == {100, 1024, 1500}
        mixed = set() if op == "gated_difference" else {"mixed"}
        assert values(op, "dtype") == {"bf16", "fp16", "fp32"} | mixed
    assert values("gated_branch", "num_branches") == {1, 2}
    assert values("gated_branch_rmsnorm", "num_branches") == {1, 2}
    assert values("gated_branch_rmsnorm", "convention") == {"llama", "gemma"}


@needs_triton
def test_the_table_shows_passes_and_failures(
    record: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    traffic.show_traffic({**record, "failed": ["z: 8 bytes written, allowed 4"]}, False)
    shown = capsys.readouterr().out
    assert "1 contradictions" in shown
    assert "z: 8 bytes written, allowed 4" in shown
    assert "3 / 3" in shown
    assert "eager_hf_norm" in shown
    traffic.show_traffic(record, True)
    assert json.loads(capsys.readouterr().out) == record


def test_a_proof_that_breaks_off_is_no_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    if HAS_TRITON:
        monkeypatch.setattr(traffic.sys, "executable", "/bin/false")
        with pytest.raises(RunError, match="ended with 1"):
            traffic.run_traffic(out=None)
    monkeypatch.setattr(traffic, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install triton"):
        traffic.run_traffic(out=None)


# A mutant: the op, what to replace in its kernel module, and what the proof must say of it.
Mutant = tuple[ModuleType, list[tuple[str, str]], list[str]]
X_LOAD = """\
        x = tl.load(x_ptr + row * x_row_stride + columns, mask=mask, other=0.0).to(tl.float32)
"""
FORWARD_GUARD = "    if x.numel() > 0:\n        with torch.cuda.device_of(x):\n"
MUTANTS: dict[str, Mutant] = {
    "reads an input twice": (
        gated_branch,
        [(X_LOAD, X_LOAD + X_LOAD)],
        ["forward: x: 1200 bytes read, allowed 600"],
    ),
    "reads one half twice and the other never": (
        gated_branch,
        [(X_LOAD, X_LOAD.replace("+ columns", "+ columns % (D // 2)"))],
        ["forward: x: each byte is accessed 0 to 2 times, not once"],
    ),
    "reads a per-token vector again": (
        gated_branch,
        [("    dgate_sum = tl.zeros([BLOCK], tl.float32)\n",
          "    dgate_sum = tl.zeros([BLOCK], tl.float32) + 0 * tl.load(norm_grad_ptr + row)\n")],
        ["backward: norm_grad: 24 bytes read, allowed 12"],
    ),
    "writes an extra tensor": (
        gated_branch,
        [("    x_norm_ptr,\n    x_row", "    x_norm_ptr,\n    spare_ptr,\n    x_row"),
         ("        if d_ptr is not None:\n            tl.store(d_ptr",
          "        tl.store(spare_ptr + row * D + columns, x, mask=mask)\n"
          "        if d_ptr is not None:\n            tl.store(d_ptr"),
         ("                x_norm_ptr=x_norm,\n",
          "                x_norm_ptr=x_norm,\n                spare_ptr=torch.empty_like(z),\n")],
        ["forward: spare: 600 bytes written, allowed 0"],
    ),
    "writes a dtype too wide": (
        gated_branch,
        [("d = torch.empty_like(z) if", "d = z.new_empty(z.shape, dtype=torch.float32) if")],
        ["forward: d: 1200 bytes written, allowed 600",
         "backward: d: 1200 bytes read, allowed 600"],
    ),
    "launches twice": (
        gated_branch,
        [(FORWARD_GUARD, "    if x.numel() > 0:\n        for _ in range(2):\n")],
        ["forward: 2 launches (_gated_branch_forward_kernel, _gated_branch_forward_kernel)",
         "forward: x: 1200 bytes read, allowed 600", "forward: z: 1200 bytes written, allowed 600"],
    ),
    "reads beyond D": (
        gated_branch,
        [(X_LOAD, X_LOAD.replace(", mask=mask, other=0.0", ""))],
        ["forward: x: 712 bytes read, allowed 600",
         "forward: x: each byte is accessed 1 to 2 times, not once"],
    ),
    "writes beyond the tensor": (
        gated_branch,
        [("tl.store(z_ptr + row * D + columns,", "tl.store(z_ptr + row * D + 1048576 + columns,")],
        ["forward: 600 bytes at addresses of no tensor",
         "forward: z: 0 bytes written, allowed 600"],
    ),
    "adds atomically": (
        gated_branch,
        [("tl.store(row_dgate_ptr + row,", "tl.atomic_add(row_dgate_ptr + row,")],
        ["backward: row_dgate: atomic access"],
    ),
    "copies an input first": (
        gated_branch,
        [("x_rows, attn_rows = as_rows(x), as_rows(attn_out)",
          "x_rows, attn_rows = as_rows(x), as_rows(attn_out).clone()")],
        ["forward: attn_out: the kernel works on a copy",
         "forward: attn_out: 600 bytes read by aten.clone, outside the kernel"],
    ),
    "reads the weight twice": (
        gated_branch_rmsnorm,
        [("    normed = z * rstd\n    if CONVENTION",
          "    weight += 0.0 * tl.load(weight_ptr + columns, mask=mask, other=0.0)\n"
          "    normed = z * rstd\n    if CONVENTION")],
        ["forward: weight: 1200 bytes read, allowed 600"],
    ),
    "splits the rows of backward over more programs": (
        gated_branch_rmsnorm,
        [("num_programs = num_row_programs(z, num_rows, launch)", "num_programs = num_rows + 1")],
        ["backward: 4 programs, expected 3", "program_dweight: 1600 bytes written, allowed 1200"],
    ),
    "reads x for an output gate alone": (
        gated_difference,
        [("x_rows = as_rows(x) if x is not None and reads_xy else None", "x_rows = as_rows(y)")],
        ["backward: x: the kernel works on a copy"],
    ),
}  # fmt: skip


@pytest.fixture
def load_mutant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[ModuleType, list[tuple[str, str]]], None]:
    """Put a changed copy of an op's kernel module in its place; Triton needs it in a file."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("TRSP_KERNELS", "triton")

    def load(op: ModuleType, changes: list[tuple[str, str]]) -> None:
        original = importlib.import_module(f"{op.__name__}_triton")
        source = inspect.getsource(original)
        for old, new in changes:
            assert source.count(old) == 1, old
            source = source.replace(old, new)
        path = tmp_path / "mutant_triton.py"
        path.write_text(source)
        spec = importlib.util.spec_from_file_location("mutant_triton", path)
        assert spec is not None
        assert spec.loader is not None
        mutant = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(mutant)
        monkeypatch.setattr(op, "_formulas", lambda backend: mutant)

    return load


def prove_small(op: ModuleType) -> list[str]:
    from trsp.bench.interpreter_traffic import prove

    case = KernelCase(op.__name__.rpartition(".")[2], hidden_size=100)  # type: ignore[arg-type]
    return prove(case, NUM_TOKENS)[1]


@interprets
@pytest.mark.parametrize("name", MUTANTS)
@pytest.mark.filterwarnings("ignore:gated_difference measures")
def test_a_planted_mutant_is_named(name: str, load_mutant: Callable[..., None]) -> None:
    op, changes, expected = MUTANTS[name]
    load_mutant(op, changes)
    failed = prove_small(op)
    for text in expected:
        assert any(text in reason for reason in failed), failed


@interprets
@pytest.mark.parametrize("op", [gated_branch, gated_branch_rmsnorm, gated_difference])
@pytest.mark.filterwarnings("ignore:gated_difference measures")
def test_an_unchanged_copy_passes(op: ModuleType, load_mutant: Callable[..., None]) -> None:
    load_mutant(op, [])
    assert prove_small(op) == []


@interprets
def test_the_interpreter_is_left_as_it_was(load_mutant: Callable[..., None]) -> None:
    from triton.runtime import interpreter

    def functions() -> list[Any]:
        memory = interpreter._interpreter
        return [
            memory.load, memory.store, memory.atomic_rmw, memory.atomic_cas,
            interpreter.GridExecutor.__call__, interpreter.GridExecutor._init_args_hst,
            interpreter.InterpreterBuilder.set_grid_dim,
        ]  # fmt: skip

    before = functions()
    load_mutant(gated_branch, [("tl.store(z_ptr + row * D", "tl.store(no_such_name + row * D")])
    with pytest.raises(interpreter.InterpreterError):
        prove_small(gated_branch)
    assert functions() == before


def test_an_op_counts_what_it_reads_and_writes_once() -> None:
    x = torch.ones(4, 8, dtype=torch.bfloat16)
    column = torch.ones(4, 1).expand(4, 8)
    with AtenMoves() as meter:
        x.view(8, 4).t()
        torch.empty_like(x)
        assert meter.moves == []
        _ = x * column
        x.add_(x)
        x.zero_()
    moved = [(move.op, move.is_write, move.num_bytes) for move in meter.moves]
    assert moved == [
        ("mul", False, 64),
        ("mul", False, 16),
        ("mul", True, 128),
        ("add_", False, 64),
        ("add_", False, 64),
        ("add_", True, 64),
        ("zero_", True, 64),
    ]


# Counted by hand from the arms' statements; the norm of x (5 passes) is in all of them.
@pytest.mark.parametrize(
    ("op", "arm", "forward", "backward"),
    [
        ("gated_difference", "eager_hf", 3 + 2 + 3 + 3 + 2 + 5, 29),
        ("gated_branch", "eager_hf", 3 + 3 + 3 + 2 + 3 + 3 + 2 + 5, 32),
        ("gated_branch_rmsnorm", "eager_f_rms_norm", 24 + 2, 32 + 3 + 3),
    ],
)
def test_the_passes_of_eager_torch(op: Any, arm: Any, forward: int, backward: int) -> None:
    counted = count_eager(KernelCase(op), arm)
    assert (counted["forward"], counted["backward"]) == (forward, backward)
    assert counted["total"] == forward + backward

"""The kernels' machine code has no known defect, and each planted one is found.

Thin in D and complete in choices; `trsp bench kernels --static` runs the whole set.
"""

import copy
import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from trsp.bench import static_baseline, static_cost, static_jobs
from trsp.bench.kernel_cases import DTYPES, OPS, KernelCase
from trsp.bench.static_baseline import REGISTER_TOLERANCE, Entry, improvements, regressions
from trsp.bench.static_limits import StaticKernel, refusals
from trsp.pruner.errors import RunError

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)
Compiled = tuple[str, list[StaticKernel]]

KERNELS = {f"_{op}_{direction}_kernel" for op in OPS for direction in ("forward", "backward")}
CANONICAL = static_jobs.canonical_cases((4096,))
VARIANTS = static_jobs.variant_cases(("bf16",))
GATES = [case for case in CANONICAL + VARIANTS if case.op != "gated_branch_rmsnorm"]


@pytest.fixture(scope="module")
def compiled() -> Compiled:
    """Triton's version and every launch of every choice for sm_90, most of them for the others."""
    row = KernelCase("gated_branch_rmsnorm")
    wanted = [(80, case) for case in [*GATES, row]]
    wanted += [(90, case) for case in CANONICAL + VARIANTS]
    wanted += [(100, case) for case in CANONICAL if case in GATES or case == row]
    # The interpreter that this process uses must not reach the compiling ones.
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("TRITON_INTERPRET", "1")
        return static_jobs.compile_jobs(wanted)


@pytest.fixture
def entry() -> Entry:
    return {
        "registers": 48,
        "resident_warps": 40,
        "spills": 0,
        "barriers": 2,
        "instructions": 300,
        "shared_bytes": 16,
        "loads": {"32": 1, "128": 3},
        "stores": {"32": 2, "128": 2},
    }


def test_every_choice_compiles_to_one_launch_a_direction(compiled: Compiled) -> None:
    kernels = compiled[1]
    assert {kernel.kernel for kernel in kernels} == KERNELS
    assert {kernel.case.dtype for kernel in kernels} == set(DTYPES)
    for capability, cases in ((80, GATES), (90, CANONICAL + VARIANTS)):
        for case in cases:
            found = [k for k in kernels if (k.capability, k.case) == (capability, case)]
            assert [kernel.direction for kernel in found] == ["forward", "backward"], case
    assert {kernel.capability for kernel in kernels} == {80, 90, 100}


def test_the_choices_are_those_of_the_ops() -> None:
    cases = CANONICAL + VARIANTS
    for op in OPS:
        own = [case for case in cases if case.op == op and case.dtype == "bf16"]
        assert {case.norm for case in own} == {None, "l1", "l2", "l2_squared"}
        assert {case.gate_kind for case in own} == {"residual", "output"}
    assert {(case.op, case.num_branches) for case in cases} >= {(op, 1) for op in OPS[1:]}
    assert any(case.convention == "gemma" for case in cases)
    full = static_jobs.jobs(full=True)
    assert set(static_jobs.jobs(full=False)) < set(full)
    assert {case.hidden_size for _, case in full} == {2048, 3072, 4096, 5120, 8192}
    assert len(full) == len(set(full))


def test_no_kernel_spills(compiled: Compiled) -> None:
    spilling = [
        kernel.key
        for kernel in compiled[1]
        if kernel.code.num_spills or kernel.code.stack_bytes or kernel.code.local_bytes
    ]
    assert spilling == []


def test_row_offsets_are_multiplied_in_64_bits(compiled: Compiled) -> None:
    assert {kernel.multiplied for kernel in compiled[1]} == {("i64",)}


def test_no_kernel_adds_in_an_undefined_order(compiled: Compiled) -> None:
    atomic = [k.key for k in compiled[1] if k.code.num_atomics or k.ptx_atomics]
    assert atomic == []


def test_no_kernel_is_refused_or_dearer_than_its_baseline(compiled: Compiled) -> None:
    version, kernels = compiled
    baseline = static_baseline.read_baseline(version)
    assert baseline is not None, f"no baseline of Triton {version}"
    assert static_cost.judge(version, kernels, baseline, full=False)["failed"] == []


def test_the_machine_code_is_the_same_on_a_second_compilation(compiled: Compiled) -> None:
    case = KernelCase("gated_branch_rmsnorm")
    _, again = static_jobs.compile_jobs([(90, case)])
    assert again == [k for k in compiled[1] if (k.capability, k.case) == (90, case)]


def test_a_process_that_fails_says_why() -> None:
    command = (sys.executable, "-c", "raise SystemExit('no compiler here')")
    with pytest.raises(RunError, match="no compiler here"):
        static_jobs.compile_jobs([(90, KernelCase("gated_branch"))], command)


# The mutant, the case it changes, the direction, and the reason that must be among those named.
PLANTED = (
    ("unaligned", KernelCase("gated_branch"), "forward", "24 streaming accesses narrower"),
    ("narrow", KernelCase("gated_branch", "fp32"), "forward", "streaming accesses narrower"),
    ("spilling", KernelCase("gated_branch"), "forward", "spill instructions"),
    ("spilling", KernelCase("gated_branch_rmsnorm"), "forward", "spill instructions"),
    ("greedy", KernelCase("gated_branch"), "forward", "registers, 64 allowed"),
    ("unfused", KernelCase("gated_difference"), "forward", "reads 8 bytes an element, 4 allowed"),
    ("atomic", KernelCase("gated_difference", norm="l1"), "backward", "1 atomics"),
    ("twice", KernelCase("gated_branch"), "forward", "2 launches, 1 allowed"),
    ("twice", KernelCase("gated_branch"), "forward", "reads 12 bytes an element, 6 allowed"),
    ("twice", KernelCase("gated_branch"), "forward", "writes 8 bytes an element, 4 allowed"),
)


@pytest.fixture(scope="module")
def mutants(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[StaticKernel]]:
    """The launches of each mutant's cases for sm_90."""
    folder = tmp_path_factory.mktemp("mutants")
    for name in {name for name, *_ in PLANTED}:
        cases = {case for mutant, case, *_ in PLANTED if mutant == name}
        jobs = [{"capability": 90, "case": asdict(case)} for case in cases]
        (folder / f"{name}.json").write_text(json.dumps(jobs))
    script = Path(__file__).with_name("mutant_kernels.py")
    clean = {name: v for name, v in os.environ.items() if not name.startswith("TRITON_")}
    clean |= {"TRSP_KERNELS": "triton", "TRITON_CACHE_DIR": str(folder / "cache")}
    subprocess.run([sys.executable, str(script), str(folder)], env=clean, check=True, timeout=300)
    return {
        path.name.removesuffix(".out.json"): [
            StaticKernel.from_document(kernel) for kernel in json.loads(path.read_text())["kernels"]
        ]
        for path in folder.glob("*.out.json")
    }


@pytest.mark.parametrize(("mutant", "case", "direction", "reason"), PLANTED)
def test_a_planted_defect_is_refused(
    mutants: dict[str, list[StaticKernel]],
    mutant: str,
    case: KernelCase,
    direction: str,
    reason: str,
) -> None:
    launches = [k for k in mutants[mutant] if (k.case, k.direction) == (case, direction)]
    assert any(reason in found for found in refusals(launches)), refusals(launches)


def test_an_intact_direction_of_a_mutant_is_not_refused(
    mutants: dict[str, list[StaticKernel]],
) -> None:
    """Only the planted part is refused, so the reasons above are the defects'."""
    for mutant, direction in (("unfused", "backward"), ("atomic", "forward")):
        assert refusals([k for k in mutants[mutant] if k.direction == direction]) == []


def test_a_row_offset_of_32_bits_is_refused(compiled: Compiled) -> None:
    kernel = next(k for k in compiled[1] if k.case == KernelCase("gated_branch"))
    assert refusals([kernel]) == []
    narrow = replace(kernel, multiplied=("i32", "i64"))
    assert refusals([narrow]) == ["offsets multiplied in i32 and i64"]
    assert refusals([replace(kernel, multiplied=())]) == ["offsets multiplied in nothing"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"registers": 48 + REGISTER_TOLERANCE + 1}, "53 registers, baseline 48"),
        ({"barriers": 3}, "3 barriers, baseline 2"),
        ({"resident_warps": 32}, "32 resident warps, baseline 40"),
        ({"spills": 1}, "1 spills, baseline 0"),
        ({"shared_bytes": 4096}, "4096 shared bytes, baseline 16"),
        ({"instructions": 316}, "316 instructions, baseline 300"),
        ({"loads": {"32": 1, "64": 2, "128": 2}}, "narrower loads"),
        ({"stores": {"32": 2, "128": 4}}, "more stores"),
    ],
)
def test_what_is_dearer_than_the_baseline_is_named(
    entry: Entry, change: dict[str, Any], reason: str
) -> None:
    reasons = regressions([{**entry, **change}], [entry])
    assert any(reason in found for found in reasons), reasons


def test_within_the_tolerances_and_cheaper_is_no_regression(entry: Entry) -> None:
    within = {**entry, "registers": 48 + REGISTER_TOLERANCE, "instructions": 315}
    assert regressions([within], [entry]) == []
    cheaper = {**entry, "registers": 40, "barriers": 1}
    assert regressions([cheaper], [entry]) == []
    assert improvements([cheaper], [entry]) == [
        "40 registers, baseline 48",
        "1 barriers, baseline 2",
    ]
    assert regressions([entry, entry], [entry]) == ["2 launches, baseline 1"]


@pytest.fixture
def one_case(compiled: Compiled, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Compiled:
    """A run that compiles one case, and baselines in a folder of its own."""
    version, kernels = compiled
    few = [k for k in kernels if (k.capability, k.case) == (90, KernelCase("gated_branch"))]
    monkeypatch.setattr(static_cost, "compile_jobs", lambda wanted: (version, few))
    monkeypatch.setattr(static_baseline, "FOLDER", tmp_path / "baselines")
    return version, few


def test_a_triton_without_a_baseline_fails_and_names_the_command(one_case: Compiled) -> None:
    record = static_cost.run_static(full=False, out=None, update_baseline=False)
    assert len(record["failed"]) == 1
    assert "trsp bench kernels --static --update-baseline" in record["failed"][0]


def test_an_updated_baseline_is_what_the_next_run_is_held_to(
    one_case: Compiled, tmp_path: Path
) -> None:
    version, few = one_case
    assert static_cost.run_static(full=True, out=None, update_baseline=True)["failed"] == []
    path = static_baseline.baseline_path(version)
    written = path.read_bytes()
    out = tmp_path / "record.json"
    assert static_cost.run_static(full=True, out=out, update_baseline=True)["failed"] == []
    assert path.read_bytes() == written
    record = json.loads(out.read_text())
    assert record["kind"] == "static cost"
    assert "commit" in record["environment"]

    document = json.loads(written)
    cheaper, dropped = copy.deepcopy(document), copy.deepcopy(document)
    barriers = cheaper["kernels"][few[0].key][0]["barriers"]
    cheaper["kernels"][few[0].key][0]["barriers"] -= 1
    path.write_text(json.dumps(cheaper))
    failed = static_cost.run_static(full=True, out=None, update_baseline=False)["failed"]
    assert failed == [f"{few[0].key}: {barriers} barriers, baseline {barriers - 1}"]
    del dropped["kernels"][few[0].key]
    dropped["kernels"]["sm_90-of-old"] = []
    path.write_text(json.dumps(dropped))
    failed = static_cost.run_static(full=True, out=None, update_baseline=False)["failed"]
    assert "1 kernels of the baseline are not compiled, sm_90-of-old" in failed[0]
    assert "not in the baseline" in failed[1]
    path.write_text(json.dumps({**document, "triton": "0.0"}))
    with pytest.raises(ValueError, match="not a baseline"):
        static_cost.run_static(full=True, out=None, update_baseline=False)


def test_the_table_names_the_failures(
    one_case: Compiled, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "240")
    version, few = one_case
    greedy = [replace(k, code=replace(k.code, registers=90)) for k in few]
    record = static_cost.judge(version, greedy, {}, full=False)
    static_cost.show_static(record, as_json=False)
    shown = capsys.readouterr().out
    assert "90 of 64" in shown
    assert "1 FAILED" in shown
    assert "3 + 2 / 3 + 2" in shown
    assert "90 registers, 64 allowed" in shown
    static_cost.show_static(record, as_json=True)
    assert json.loads(capsys.readouterr().out) == record


def test_a_16_bit_branch_beside_a_wider_stream_is_counted_in_bytes(compiled: Compiled) -> None:
    version, kernels = compiled
    mixed = [k for k in kernels if k.case.dtype == "mixed" and k.direction == "forward"]
    record = static_cost.judge(version, mixed, {}, full=False)
    cells = list(static_cost.cost_table(record).columns[11].cells)
    assert set(cells) == {"8 + 8 / 8 + 8 bytes", "8 + 12 / 8 + 12 bytes"}


def test_warps_that_fit_a_multiprocessor(compiled: Compiled) -> None:
    kernel = replace(compiled[1][0], capability=80, num_warps=8, shared_bytes=0)

    def resident(registers: int, **changed: Any) -> int:
        code = replace(kernel.code, registers=registers)
        return replace(kernel, code=code, **changed).resident_warps

    assert (resident(128), resident(64), resident(32), resident(129)) == (16, 32, 64, 8)
    assert resident(32, shared_bytes=82 * 1024) == 8
    assert resident(32, num_warps=1) == 32

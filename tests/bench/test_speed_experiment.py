"""Going through a plan with invented engines: what is kept, what is skipped, what is closed."""

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from trsp.bench.serve_plan import CONTROL, DENSE, Step, closed_loads, saturating_load, steps
from trsp.bench.serve_record import Arm, Load, Memory, Start
from trsp.bench.speed_backend import ArmModel, Measured, Session
from trsp.bench.speed_experiment import Notebook, run_steps
from trsp.pruner.errors import Interrupted, RunError, UserError

PLAN = {"schema_version": 1, "num_blocks": 2, "flags": ["--a"], "shares": [0.5]}
ARMS = (DENSE, CONTROL, "p")


@dataclass
class Backend:
    """Invented engines. `fails_at`: the measurement that raises, counted over all."""

    fails_at: int | None = None
    name: str = "fake"
    engine: str = "fake 1"
    environment: dict[str, str] = field(default_factory=dict)
    started: list[str] = field(default_factory=list)
    open: list[str] = field(default_factory=list)
    most_open: int = 0
    measured: list[tuple[str, str]] = field(default_factory=list)

    @contextlib.contextmanager
    def session(
        self, model: ArmModel, memory: Memory, block: int, waiting: Callable[[], None]
    ) -> Iterator[Session]:
        waiting()
        self.started.append(f"{model.arm.name} {memory} {block}")
        self.open.append(model.arm.name)
        self.most_open = max(self.most_open, len(self.open))
        try:
            yield Engine(self, model.arm.name, memory, block)
        finally:
            self.open.remove(model.arm.name)


@dataclass
class Engine:
    backend: Backend
    arm: str
    memory: Memory
    block: int

    @property
    def start(self) -> Start:
        return Start(
            arm=self.arm, memory=self.memory, block=self.block, command="x", load_seconds=1.0,
            weights_gib=None, kv_cache_tokens=16, num_kv_blocks=1, engine_config={"a": "b"},
        )  # fmt: skip

    def measure(self, load: Load) -> Measured:
        if len(self.backend.measured) == self.backend.fails_at:
            raise RunError("the engine fell over")
        self.backend.measured.append((self.arm, load.name))
        value = float(len(self.backend.measured))
        return Measured(
            metrics={"output_throughput": value}, completed=8, failed=0, total_input_tokens=8,
            total_output_tokens=8, raw={"value": value}, invalid=["odd"] if value == 2 else [],
        )  # fmt: skip


def models() -> dict[str, ArmModel]:
    return {
        name: ArmModel(
            Arm(
                name=name, role="dense", model="m", num_hidden_layers=2, weights="dummy",
                fingerprint=None, disk_bytes=None, num_parameters=1, weight_bytes=1,
                kv_bytes_per_token=1, quality=[],
            ),
            Path("m"),
            {"equal-kv": 1, "equal-memory": 1},
        )
        for name in ARMS
    }  # fmt: skip


def plan_steps(memories: tuple[Memory, ...] = ("equal-kv",), num_blocks: int = 2) -> list[Step]:
    return list(steps(ARMS, closed_loads([1, 2], 8), saturating_load(8), memories, num_blocks))


def go(
    notebook: Notebook, backend: Backend, todo: list[Step], *, resident: bool, **changes: Any
) -> list[str]:
    told: list[str] = []
    words: dict[str, Any] = {"waiting": lambda: None, "tell": told.append}
    run_steps(todo, models(), backend, notebook, resident=resident, **(words | changes))
    assert backend.open == []
    return told


def kept(notebook: Notebook, todo: list[Step]) -> list[float]:
    cells = [notebook.cell(step, load) for step in todo for load in step.loads]
    return [cell.metrics["output_throughput"] for cell in cells if cell is not None]


@pytest.mark.parametrize(("resident", "num_starts", "most"), [(True, 3, 3), (False, 12, 1)])
def test_everything_is_measured_once_in_order(
    resident: bool, num_starts: int, most: int, tmp_path: Path
) -> None:
    notebook, backend, todo = (
        Notebook(tmp_path / "out", PLAN, resume=False),
        Backend(),
        plan_steps(),
    )
    told = go(notebook, backend, todo, resident=resident)
    assert backend.measured == [(step.arm, load.name) for step in todo for load in step.loads]
    assert kept(notebook, todo) == [float(n) for n in range(1, 25)]
    assert len(backend.started) == len(notebook.starts) == num_starts
    assert backend.most_open == most
    lines = [line for line in told if not line.startswith("starting")]
    assert lines[0] == "1/24 block 1 dense, closed 1: output_throughput 1"
    assert lines[1] == "2/24 block 1 dense, closed 2: output_throughput 2 INVALID: odd"
    assert lines[-1].startswith("24/24 block 2 p, closed 2")


def test_resident_engines_leave_before_those_of_the_next_memory_come(tmp_path: Path) -> None:
    notebook, backend = Notebook(tmp_path / "out", PLAN, resume=False), Backend()
    go(notebook, backend, plan_steps(("equal-kv", "equal-memory")), resident=True)
    assert backend.most_open == 3
    assert len(backend.started) == 6
    assert [start.memory for start in notebook.starts] == ["equal-kv"] * 3 + ["equal-memory"] * 3


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("fails_at", [0, 1, 5, 23])
def test_what_was_measured_before_a_failure_is_kept_and_not_measured_again(
    fails_at: int, resident: bool, tmp_path: Path
) -> None:
    notebook, todo = Notebook(tmp_path / "out", PLAN, resume=False), plan_steps()
    broken = Backend(fails_at=fails_at)
    with pytest.raises(RunError, match="fell over"):
        go(notebook, broken, todo, resident=resident)
    assert broken.open == []
    assert len(kept(notebook, todo)) == fails_at

    again, backend = Notebook(tmp_path / "out", PLAN, resume=True), Backend()
    go(again, backend, todo, resident=resident)
    whole = [(step.arm, load.name) for step in todo for load in step.loads]
    assert broken.measured + backend.measured == whole
    assert len(kept(again, todo)) == 24

    third = Backend()
    told = go(Notebook(tmp_path / "out", PLAN, resume=True), third, todo, resident=resident)
    assert (third.started, third.measured, told) == ([], [], [])


def test_every_arm_that_was_measured_has_its_start_kept(tmp_path: Path) -> None:
    """Also of an engine that failed in its second load: its first one counts."""
    notebook, todo = Notebook(tmp_path / "out", PLAN, resume=False), plan_steps()
    with pytest.raises(RunError):
        go(notebook, Backend(fails_at=1), todo, resident=False)
    assert [start.arm for start in Notebook(tmp_path / "out", PLAN, resume=True).starts] == [DENSE]


@pytest.mark.parametrize("resident", [True, False])
def test_a_signal_before_a_start_ends_what_runs(resident: bool, tmp_path: Path) -> None:
    notebook, backend, todo = (
        Notebook(tmp_path / "out", PLAN, resume=False),
        Backend(),
        plan_steps(),
    )

    def stop() -> None:
        if len(backend.started) == 2:
            raise Interrupted(15)

    with pytest.raises(Interrupted):
        go(notebook, backend, todo, resident=resident, waiting=stop)
    assert backend.open == []
    assert len(kept(notebook, todo)) == 4


def test_the_engines_own_words_lie_beside_the_cell(tmp_path: Path) -> None:
    notebook, todo = Notebook(tmp_path / "out", PLAN, resume=False), plan_steps(num_blocks=1)
    go(notebook, Backend(), todo, resident=True)
    files = sorted((tmp_path / "out" / "cells").iterdir())
    assert len(files) == 12
    document = json.loads(files[0].read_text())
    assert document["schema_version"] == 1
    assert document["raw"] == {"value": document["cell"]["metrics"]["output_throughput"]}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"num_blocks": 3}, r"\(num_blocks differ\)"),
        ({"flags": [], "shares": []}, r"\(flags, shares differ\)"),
        ({"new": 1}, r"\(new differ\)"),
    ],
)
def test_another_plan_is_refused_and_named(
    change: dict[str, Any], told: str, tmp_path: Path
) -> None:
    Notebook(tmp_path / "out", PLAN, resume=False)
    before = (tmp_path / "out/plan.json").read_text()
    with pytest.raises(UserError, match=told):
        Notebook(tmp_path / "out", PLAN | change, resume=True)
    assert (tmp_path / "out/plan.json").read_text() == before


def test_an_experiment_is_not_overwritten(tmp_path: Path) -> None:
    Notebook(tmp_path / "out", PLAN, resume=False)
    with pytest.raises(UserError, match="holds an experiment already; --resume goes on"):
        Notebook(tmp_path / "out", PLAN, resume=False)


@pytest.mark.parametrize("resume", [True, False])
def test_a_folder_of_something_else_is_refused(resume: bool, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("three years")
    with pytest.raises(UserError, match="is not empty and holds no experiment"):
        Notebook(tmp_path, PLAN, resume=resume)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("x")
    with pytest.raises(UserError, match="out: is no folder"):
        Notebook(tmp_path / "out", PLAN, resume=False)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"value": [{"arm": 1}]}', "{}"])
def test_damaged_notes_are_one_line(text: str, tmp_path: Path) -> None:
    Notebook(tmp_path / "out", PLAN, resume=False)
    (tmp_path / "out/starts.json").write_text(text)
    with pytest.raises(UserError, match=r"starts\.json") as raised:
        Notebook(tmp_path / "out", PLAN, resume=True)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("text", ["", "{}", '{"cell": {"block": -1}}'])
def test_a_damaged_cell_is_one_line(text: str, tmp_path: Path) -> None:
    notebook, todo = Notebook(tmp_path / "out", PLAN, resume=False), plan_steps()
    go(notebook, Backend(), todo, resident=True)
    path = notebook._path(todo[0], todo[0].loads[0])
    path.write_text(text)
    with pytest.raises(UserError, match=r"cells/") as raised:
        notebook.cell(todo[0], todo[0].loads[0])
    assert "\n" not in str(raised.value)

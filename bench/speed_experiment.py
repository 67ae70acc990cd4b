"""Going through the plan: every step once, each result on disk before the next begins.

The folder holds `plan.json`, a file in `cells/` for each measurement with the engine's own JSON,
`starts.json`, and logs. `--resume` skips what is there, if the plan is the same to the letter.
"""

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from trsp.bench.serve_plan import Step
from trsp.bench.serve_record import Cell, Load, Start
from trsp.bench.speed_backend import ArmModel, Measured, Session, SpeedBackend
from trsp.pruner.bounded_json import read_json_object
from trsp.pruner.durable import atomic_write
from trsp.pruner.errors import UserError, first_problem

PLAN_NAME = "plan.json"
_MAX_PLAN_BYTES = 2**24
_MAX_CELL_BYTES = 2**28


_DAMAGED = "it is damaged; remove it, and --resume measures that again"
_Note = TypeVar("_Note", Cell, Start)


class Notebook:
    """The experiment's folder: the plan, and what was measured so far.

    Raises:
        UserError: the folder holds another experiment, or one and `resume` was not asked for.
    """

    def __init__(self, folder: Path, plan: Mapping[str, Any], *, resume: bool) -> None:
        self.folder = folder
        text = json.dumps(plan, indent=1, sort_keys=True) + "\n"
        path = folder / PLAN_NAME
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder}: is no folder; give another --out")
        if path.exists():
            if not resume:
                raise UserError(
                    f"{folder}: holds an experiment already; --resume goes on with it, or give "
                    "another --out"
                )
            old = read_json_object(path, max_bytes=_MAX_PLAN_BYTES)
            if old != json.loads(text):
                changed = sorted(
                    key for key in old.keys() | plan.keys() if old.get(key) != plan.get(key)
                )
                raise UserError(
                    f"{folder}: is another experiment ({', '.join(changed)} differ); give the same "
                    "command to --resume, or another --out"
                )
        elif folder.exists() and any(folder.iterdir()):
            raise UserError(f"{folder}: is not empty and holds no experiment; give another --out")
        else:
            folder.mkdir(parents=True, exist_ok=True)
            atomic_write(path, text)
        kept = self.read("starts", [])
        self.starts = [_validated(Start, start, self.folder / "starts.json") for start in kept]

    def read(self, name: str, otherwise: Any) -> Any:
        """The value kept under a name; `otherwise` if there is none."""
        path = self.folder / f"{name}.json"
        if not path.exists():
            return otherwise
        kept = read_json_object(path, max_bytes=_MAX_CELL_BYTES)
        if "value" not in kept:
            raise UserError(f"{path}: holds no value: {_DAMAGED}")
        return kept["value"]

    def write(self, name: str, value: Any) -> None:
        """Keep a value under a name."""
        atomic_write(self.folder / f"{name}.json", json.dumps({"value": value}) + "\n")

    def cell(self, step: Step, load: Load) -> Cell | None:
        """What was measured at this point of the plan; None if nothing was."""
        path = self._path(step, load)
        if not path.exists():
            return None
        kept = read_json_object(path, max_bytes=_MAX_CELL_BYTES)
        return _validated(Cell, kept.get("cell"), path)

    def keep(self, step: Step, load: Load, measured: Measured, started_at: str) -> None:
        """Write down one measurement."""
        cell = Cell(
            block=step.block,
            position=step.position,
            memory=step.memory,
            arm=step.arm,
            load=load.name,
            started_at=started_at,
            completed=measured.completed,
            failed=measured.failed,
            total_input_tokens=measured.total_input_tokens,
            total_output_tokens=measured.total_output_tokens,
            metrics=measured.metrics,
            prompts_sha256=measured.prompts_sha256,
            client_cpu_share=measured.client_cpu_share,
            prefix_cache_hits=measured.prefix_cache_hits,
            num_preemptions=measured.num_preemptions,
            notes=measured.notes,
            invalid=measured.invalid,
        )
        path = self._path(step, load)
        path.parent.mkdir(exist_ok=True)
        document = {"schema_version": 1, "cell": cell.model_dump(), "raw": measured.raw}
        atomic_write(path, json.dumps(document) + "\n")

    def keep_start(self, start: Start) -> None:
        """Write down one start of an engine."""
        self.starts.append(start)
        self.write("starts", [one.model_dump() for one in self.starts])

    def _path(self, step: Step, load: Load) -> Path:
        slug = f"{step.memory}-b{step.block:02d}-p{step.position}-{step.arm}-{load.name}"
        return self.folder / "cells" / f"{slug.replace(' ', '-')}.json"


def _validated(kind: type[_Note], document: object, path: Path) -> _Note:
    try:
        return kind.model_validate_json(json.dumps(document))
    except ValidationError as error:
        raise UserError(f"{path}: {first_problem(error)}: {_DAMAGED}") from error


def run_steps(
    steps: Sequence[Step],
    models: Mapping[str, ArmModel],
    backend: SpeedBackend,
    notebook: Notebook,
    *,
    resident: bool,
    waiting: Callable[[], None],
    tell: Callable[[str], None],
) -> None:
    """Measure every step that the notebook does not hold yet.

    Args:
        resident: engines stay up until their memory arm is done; otherwise one at a time.
        tell: called with one line after each measurement.
    """
    total = sum(len(step.loads) for step in steps)
    done = 0
    with contextlib.ExitStack() as stack:
        up: dict[str, Session] = {}
        memory = None
        for step in steps:
            if step.memory != memory:
                stack.close()
                up.clear()
                memory = step.memory
            missing = [load for load in step.loads if notebook.cell(step, load) is None]
            done += len(step.loads) - len(missing)
            if not missing:
                continue
            with contextlib.ExitStack() as alone:
                session = up.get(step.arm)
                if session is None:
                    keeper = stack if resident else alone
                    tell(f"starting {step.arm} ({step.memory})")
                    session = keeper.enter_context(
                        backend.session(models[step.arm], step.memory, step.block, waiting)
                    )
                    if resident:
                        up[step.arm] = session
                        notebook.keep_start(session.start)
                for load in missing:
                    started_at = datetime.now(UTC).isoformat(timespec="seconds")
                    measured = session.measure(load)
                    if not resident and load is missing[0]:
                        notebook.keep_start(session.start)
                    notebook.keep(step, load, measured, started_at)
                    done += 1
                    tell(_line(done, total, step, load, measured))


_SHOWN = (
    "output_throughput", "median_tpot_ms", "median_ttft_ms", "avg_latency_ms", "tokens_per_second",
    "prompt_throughput", "generation_throughput",
)  # fmt: skip


def _line(done: int, total: int, step: Step, load: Load, measured: Measured) -> str:
    values = [f"{name} {measured.metrics[name]:.4g}" for name in _SHOWN if name in measured.metrics]
    line = f"{done}/{total} block {step.block + 1} {step.arm}, {load.name}: {', '.join(values)}"
    return line + "".join(f" INVALID: {problem}" for problem in measured.invalid)

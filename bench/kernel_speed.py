"""The kernels against the clock: correctness first, then every arm in turns with a copy.

T tokens (rows), D hidden size. Times are microseconds of cold work (trsp.bench.event_timing); a
case whose fused op is wrong gets no times at all.
"""

import gc
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from trsp.bench.event_timing import Action, Clock, EventClock, HostClock, Timing, interleave
from trsp.bench.kernel_arms import (
    LIGER_DIFFERS,
    Arm,
    ArmUnavailableError,
    Outputs,
    arm_forward,
    arm_gradients,
    forget_compiled_code,
    liger_passes,
    saved_bytes,
)
from trsp.bench.kernel_bars import bars_of
from trsp.bench.kernel_cases import (
    DTYPES,
    Problem,
    backward_passes,
    forward_passes,
    make_problem,
)
from trsp.bench.kernel_plan import Item
from trsp.bench.kernel_truth import disagreements, judge

DIRECTIONS = ("forward", "backward", "both")
ROUNDS = 25
WARMUP_ROUNDS = 4
_COPY = "copy"
_OUT_OF_MEMORY = "out of memory"

Progress = Callable[[str], None]


class _ArmOutOfMemoryError(RuntimeError):
    """An arm that ran once had no memory left when it was timed."""

    def __init__(self, arm: Arm) -> None:
        super().__init__(f"{arm}: {_OUT_OF_MEMORY}")
        self.arm = arm


def measure(
    items: Sequence[Item],
    *,
    device: str,
    seconds: float | None = None,
    rounds: int = ROUNDS,
    after_each: Callable[[list[dict[str, Any]], list[Item]], None] = lambda done, left: None,
    progress: Progress = lambda line: None,
) -> tuple[list[dict[str, Any]], list[Item]]:
    """Results of the items, and the items for which `seconds` were not enough.

    Without CUDA this is a dry run: one round on the host's clock, and no time in any result.
    """
    dry_run = not device.startswith("cuda")
    # Its advice is for training; here the op is measured as it is.
    warnings.filterwarnings("ignore", message="gated_difference measures")
    clock: Clock = HostClock() if dry_run else EventClock(torch.device(device))
    started = time.perf_counter()
    results: list[dict[str, Any]] = []
    for position, item in enumerate(items):
        if seconds is not None and time.perf_counter() - started > seconds:
            return results, list(items[position:])
        progress(f"{position + 1}/{len(items)} {item.name}")
        results.append(measure_item(item, clock, device=device, rounds=1 if dry_run else rounds))
        after_each(results, list(items[position + 1 :]))
    return results, []


def measure_item(
    item: Item, clock: Clock, *, device: str, rounds: int, dry_run: bool | None = None
) -> dict[str, Any]:
    """Gate, agreement of the arms, saved bytes, and times of one item."""
    dry_run = isinstance(clock, HostClock) if dry_run is None else dry_run
    _free_memory()
    if isinstance(clock, EventClock):
        clock.forget()
        torch.cuda.reset_peak_memory_stats()
    case = item.case
    result: dict[str, Any] = {
        "name": item.name,
        "op": case.op,
        "dtype": case.dtype,
        "hidden_size": case.hidden_size,
        "tokens": item.tokens,
        "case": asdict(case),
        "tensor_bytes": item.tensor_bytes,
        "status": "correct",
        "arms": {},
    }
    try:
        problem = make_problem(case, item.tokens, device)
        ready, result["arms"] = _check_arms(item, problem, result)
    except torch.OutOfMemoryError:
        result["status"] = f"not timed: {_OUT_OF_MEMORY}"
        return result
    if result["status"] == "correct":
        # The fused op or the copy out of memory, or a host too slow to keep the GPU fed: named,
        # and it fails the run.
        try:
            _time_arms(problem, ready, result, clock, rounds, dry_run)
        except RuntimeError as error:
            result["status"] = f"not timed: {_first_line(error)}"
        result["bars"] = bars_of(result)
    if isinstance(clock, EventClock):
        result["peak_bytes"] = torch.cuda.max_memory_allocated()
    return result


def failures(results: Sequence[dict[str, Any]]) -> list[str]:
    """One line for every wrong op, and for every arm that should have run and did not."""
    found = []
    for result in results:
        if result["status"] != "correct":
            found.append(f"{result['name']}: {result['status']}")
        for arm, row in result["arms"].items():
            if row["status"].startswith(("wrong", "error")):
                found.append(f"{result['name']}, {arm}: {row['status']}")
    return found


def direction_bytes(item_problem: Problem, arm: Arm) -> dict[str, int]:
    """The least bytes that forward and backward of the arm move; T-sized vectors included."""
    case = item_problem.case
    num_tokens, hidden_size = item_problem.dz.shape
    forward, backward = (
        liger_passes() if arm == "liger" else (forward_passes(case), backward_passes(case))
    )
    stream, branch = DTYPES[case.dtype]
    narrow = {"attn_out", "mlp_out", "dbranch"}

    def moved(names: Sequence[str]) -> int:
        return (
            num_tokens
            * hidden_size
            * sum((branch if name in narrow else stream).itemsize for name in names)
        )

    fused_norm = case.op == "gated_branch_rmsnorm"
    has_norm = case.norm is not None and arm != "liger"
    # fp32, a token: both norms and rstd out; the norm, its gradient and rstd in, dgate's sum out.
    forward_vectors = 2 * has_norm + fused_norm
    backward_vectors = 2 * has_norm + fused_norm + (arm != "liger")
    return {
        "forward": moved(forward.reads + forward.writes) + 4 * num_tokens * forward_vectors,
        "backward": moved(backward.reads + backward.writes) + 4 * num_tokens * backward_vectors,
    }


def _check_arms(
    item: Item, problem: Problem, result: dict[str, Any]
) -> tuple[list[Arm], dict[str, Any]]:
    """The arms that can be timed, and a row of each; the fused op is judged before all others."""
    rows: dict[str, Any] = {}
    ready: list[Arm] = []
    ours: tuple[Outputs, Outputs] | None = None
    dgate_scale = 0.0
    if any(arm.startswith("compile") for arm in item.arms):
        forget_compiled_code()
    for arm in item.arms:
        row = rows[arm] = {"status": "ok"}
        try:
            outputs = arm_forward(arm, problem)
            gradients = arm_gradients(arm, problem, outputs)
            row["saved_bytes"] = saved_bytes(arm, problem)
        except ArmUnavailableError as error:
            row["status"] = f"not run: {error}"
        except torch.OutOfMemoryError:
            row["status"] = _OUT_OF_MEMORY
        # Torch, Inductor or Liger may fail in any way; it is named, and it fails the run.
        except Exception as error:
            row["status"] = f"error: {type(error).__name__}: {_first_line(error)}"
        else:
            outputs = {name: tensor.detach() for name, tensor in outputs.items()}
            if arm == "fused":
                judgement = judge(problem, outputs, gradients)
                result["gate"] = {"worst_share_of_allowed": judgement.worst}
                ours, dgate_scale = (outputs, gradients), judgement.dgate_scale
                if judgement.wrong:
                    result["status"] = row["status"] = f"incorrect: {', '.join(judgement.wrong)}"
                    return [], rows
            elif arm == "liger":
                row["differs"] = LIGER_DIFFERS
            elif ours is not None:
                differing = disagreements(ours, (outputs, gradients), dgate_scale)
                if differing:
                    row["status"] = f"wrong: {', '.join(differing)}"
            if row["status"] == "ok":
                ready.append(arm)
            del outputs, gradients
        if arm == "fused" and ours is None:
            result["status"] = f"the fused op did not run: {row['status']}"
            return [], rows
        _free_memory()
    return ready, rows


def _time_arms(
    problem: Problem,
    arms: Sequence[Arm],
    result: dict[str, Any],
    clock: Clock,
    rounds: int,
    dry_run: bool,
) -> None:
    """Write times and shares into the result's rows; a dry run runs it all and writes nothing.

    An arm that runs out of memory is marked so, and left out from that direction on.
    """
    source = problem.dz
    target = torch.empty_like(source)
    copy = Action(_COPY, lambda: None, lambda _: target.copy_(source))
    time_all = partial(
        interleave, clock=clock, rounds=rounds, warmup_rounds=0 if dry_run else WARMUP_ROUNDS
    )
    fitting = list(arms)
    for direction in DIRECTIONS:
        actions = {arm: _action(arm, direction, problem) for arm in fitting}
        timings, too_large = _time_what_fits(copy, actions, time_all)
        for arm in too_large:
            result["arms"][arm]["status"] = _OUT_OF_MEMORY
            fitting.remove(arm)
        if dry_run:
            continue
        copy_bandwidth = 2 * source.nbytes / timings[_COPY].median_us
        result.setdefault(_COPY, {})[direction] = {
            **asdict(timings[_COPY]),
            "gb_per_s": copy_bandwidth / 1e3,
        }
        for arm in fitting:
            _write_times(result["arms"][arm], arm, direction, timings[arm], problem, copy_bandwidth)


def _time_what_fits(
    copy: Action,
    actions: dict[Arm, Action],
    time_all: Callable[[Sequence[Action]], dict[str, Timing]],
) -> tuple[dict[str, Timing], list[Arm]]:
    """Times of the copy and of the arms that fit, and the arms that do not.

    Raises:
        RuntimeError: the fused op or the copy does not fit: nothing is left to compare.
    """
    too_large: list[Arm] = []
    while True:
        fitting = [action for arm, action in actions.items() if arm not in too_large]
        try:
            return time_all([copy, *fitting]), too_large
        except _ArmOutOfMemoryError as error:
            if error.arm == "fused":
                raise
            too_large.append(error.arm)
        # Not while the error lives: its traceback holds what the arm had allocated.
        _free_memory()


def _write_times(
    row: dict[str, Any],
    arm: Arm,
    direction: str,
    timing: Timing,
    problem: Problem,
    copy_bandwidth: float,
) -> None:
    row[direction] = asdict(timing)
    if arm in ("fused", "liger") and direction != "both":
        bandwidth = direction_bytes(problem, arm)[direction] / timing.median_us
        row.setdefault("share_of_copy", {})[direction] = bandwidth / copy_bandwidth


def _action(arm: Arm, direction: str, problem: Problem) -> Action:
    def forward() -> Outputs:
        try:
            return arm_forward(arm, problem)
        except torch.OutOfMemoryError as error:
            raise _ArmOutOfMemoryError(arm) from error

    def backward(outputs: Outputs) -> Outputs:
        try:
            return arm_gradients(arm, problem, outputs)
        except torch.OutOfMemoryError as error:
            raise _ArmOutOfMemoryError(arm) from error

    if direction == "forward":
        return Action(arm, lambda: None, lambda _: forward())
    if direction == "backward":
        # A graph of its own for each sample: compiled backwards may reuse what was saved.
        return Action(arm, forward, backward)
    return Action(arm, lambda: None, lambda _: backward(forward()))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0]


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

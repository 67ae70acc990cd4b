"""The clock's bookkeeping on a fake clock, the gate before it, bars, plan and dry run."""

import importlib.util
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from trsp.bench import cli, kernel_run, kernel_speed
from trsp.bench.cli import app
from trsp.bench.event_timing import Action, EventClock, interleave, summarize, turn_order
from trsp.bench.kernel_bars import BARS, MIN_TENSOR_BYTES, judge_bars
from trsp.bench.kernel_cases import OPS, KernelCase
from trsp.bench.kernel_compare import run_comparison
from trsp.bench.kernel_plan import (
    HIDDEN_SIZES,
    TOKENS,
    Item,
    plan_comparison,
    plan_dry_run,
    plan_items,
)
from trsp.bench.kernel_run import (
    default_record,
    failed_bars,
    refuse_as_record,
    require_fused_kernels,
    run_kernels,
)
from trsp.bench.kernel_speed import failures, measure_item
from trsp.kernels import launch
from trsp.pruner.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:gated_difference measures")


class FakeClock:
    """Says what it was told to, an action's samples in turn; remembers the order."""

    def __init__(self, tell: Callable[[str, int], float | None]) -> None:
        self.tell = tell
        self.order: list[str] = []

    def measure(self, action: Action) -> float | None:
        action.run(action.prepare())
        self.order.append(action.name)
        return self.tell(action.name, self.order.count(action.name) - 1)


def idle(name: str) -> Action:
    return Action(name, lambda: None, lambda _: None)


def test_an_arm_that_is_twice_as_slow_is_reported_so() -> None:
    clock = FakeClock(lambda name, _: {"a": 10.0, "b": 20.0}[name])
    timings = interleave([idle("a"), idle("b")], clock, rounds=5, warmup_rounds=2)
    assert timings["b"].median_us == 2 * timings["a"].median_us
    assert timings["a"].num_samples == 5


def test_warm_up_and_outliers_do_not_move_the_median() -> None:
    clock = FakeClock(lambda _, turn: 1e6 if turn < 2 or turn == 4 else 10.0 + turn / 100)
    timing = interleave([idle("a")], clock, rounds=9, warmup_rounds=2)["a"]
    assert 10 < timing.p20_us <= timing.median_us <= timing.p80_us < 11


def test_actions_take_turns_and_each_comes_first_and_last() -> None:
    clock = FakeClock(lambda *_: 1.0)
    actions = [idle(name) for name in "abc"]
    interleave(actions, clock, rounds=6, warmup_rounds=0)
    rounds = [clock.order[start : start + 3] for start in range(0, 18, 3)]
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert {order[0] for order in rounds} == {order[-1] for order in rounds} == set("abc")
    assert [a.name for a in turn_order(actions, 1)] == ["c", "b", "a"]


def test_late_samples_are_taken_again_and_counted() -> None:
    clock = FakeClock(lambda _, turn: None if turn == 1 else 10.0)
    timing = interleave([idle("a")], clock, rounds=3, warmup_rounds=0)["a"]
    assert (timing.num_samples, timing.num_late, timing.median_us) == (3, 1, 10.0)
    with pytest.raises(RuntimeError, match="the host is too slow"):
        interleave([idle("a")], FakeClock(lambda *_: None), rounds=2, warmup_rounds=0)


def test_percentiles_are_of_the_samples() -> None:
    timing = summarize([float(value) for value in range(1, 11)])
    assert (timing.p20_us, timing.median_us, timing.p80_us) == (2.0, 5.5, 8.0)


def test_events_surround_cold_work_and_a_late_host_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The order of what is queued, on a pretended device."""
    log: list[str] = []
    late = [True, False]

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            pass

        def record(self) -> None:
            log.append("event")

        def query(self) -> bool:
            return late.pop(0)

        def elapsed_time(self, other: Any) -> float:
            return 0.25

    class Flush:
        def zero_(self) -> None:
            log.append("flush")

    class Properties:
        L2_cache_size = 50 * 2**20

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append("spin"), raising=False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("wait"))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: Flush())
    clock = EventClock(torch.device("cpu"))
    assert clock.flush_bytes >= max(2 * clock.l2_bytes, 256 * 2**20)
    action = Action("a", lambda: log.append("prepare"), lambda _: log.append("run"))
    log.clear()
    assert clock.measure(action) is None
    assert log == ["prepare", "wait", "spin", "flush", "event", "run", "event", "wait"]
    assert clock.measure(action) == 250.0


def small_item(op: Any = "gated_branch", arms: Any = ("fused", "eager_hf")) -> Item:
    return Item(KernelCase(op, hidden_size=64), 9, arms)


def test_times_shares_and_saved_bytes_of_an_item() -> None:
    clock = FakeClock(lambda name, _: {"copy": 10.0, "fused": 20.0, "eager_hf": 90.0}[name])
    result = measure_item(small_item(), clock, device="cpu", rounds=3)
    fused = result["arms"]["fused"]
    assert result["status"] == "correct"
    assert result["arms"]["eager_hf"]["both"]["median_us"] == 90.0
    # 5 passes of 64 bf16 values and two norms of 4 bytes, in twice the time of the copy's 2.
    assert fused["share_of_copy"]["forward"] == pytest.approx((5 * 128 + 8) / (2 * 128) / 2)
    assert fused["saved_bytes"] == result["tensor_bytes"] + 4 * 9


def test_a_wrong_op_gets_no_time_and_fails_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    right = kernel_speed.arm_forward

    def wrong(arm: Any, problem: Any) -> Any:
        outputs = right(arm, problem)
        return {**outputs, "z": outputs["z"] * 1.05} if arm == "fused" else outputs

    monkeypatch.setattr(kernel_speed, "arm_forward", wrong)
    clock = FakeClock(lambda *_: 1.0)
    result = measure_item(small_item(), clock, device="cpu", rounds=3)
    assert clock.order == []
    assert "median_us" not in json.dumps(result)
    assert failures([result])[0].startswith(f"{result['name']}: incorrect: ")


def test_a_wrong_arm_and_a_broken_arm_are_named_and_not_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = kernel_speed.arm_forward

    def planted(arm: Any, problem: Any) -> Any:
        if arm == "eager_careful":
            raise torch.OutOfMemoryError("planted")
        outputs = right(arm, problem)
        return {**outputs, "z": outputs["z"] * 2} if arm == "eager_hf" else outputs

    monkeypatch.setattr(kernel_speed, "arm_forward", planted)
    clock = FakeClock(lambda *_: 1.0)
    item = small_item(arms=("fused", "eager_hf", "eager_careful"))
    result = measure_item(item, clock, device="cpu", rounds=2)
    assert set(clock.order) == {"copy", "fused"}
    assert result["arms"]["eager_hf"]["status"].startswith("wrong: ")
    assert result["arms"]["eager_careful"]["status"] == "out of memory"
    assert len(failures([result])) == 1


def out_of_memory_from_call(number: int, arm: str, original: Any) -> Any:
    """`original` of (arm, ...), that fails for one arm from its n-th call on."""
    calls: list[str] = []

    def planted(called: Any, *arguments: Any) -> Any:
        calls.append(called)
        if called == arm and calls.count(arm) >= number:
            raise torch.OutOfMemoryError("planted")
        return original(called, *arguments)

    return planted


def test_an_arm_that_does_not_fit_when_timed_costs_no_other_its_times(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Its first call is the check of its results.
    planted = out_of_memory_from_call(2, "eager_hf", kernel_speed.arm_gradients)
    monkeypatch.setattr(kernel_speed, "arm_gradients", planted)
    item = small_item(arms=("fused", "eager_hf", "eager_careful"))
    result = measure_item(item, FakeClock(lambda *_: 5.0), device="cpu", rounds=2)
    assert result["status"] == "correct"
    fused, lost, other = (result["arms"][arm] for arm in item.arms)
    assert lost["status"] == "out of memory"
    assert lost["forward"]["median_us"] == 5.0
    assert "backward" not in lost
    assert "both" not in lost
    for row in (result["copy"], fused, other):
        assert [row[direction]["num_samples"] for direction in kernel_speed.DIRECTIONS] == [2] * 3
    assert failures([result]) == []


def test_a_fused_op_that_does_not_fit_when_timed_fails_the_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    planted = out_of_memory_from_call(2, "fused", kernel_speed.arm_forward)
    monkeypatch.setattr(kernel_speed, "arm_forward", planted)
    result = measure_item(small_item(), FakeClock(lambda *_: 5.0), device="cpu", rounds=2)
    assert failures([result]) == [f"{result['name']}: not timed: fused: out of memory"]


def test_an_arm_s_error_is_one_plain_line(monkeypatch: pytest.MonkeyPatch) -> None:
    right = kernel_speed.arm_forward

    def broken(arm: Any, problem: Any) -> Any:
        if arm == "eager_hf":
            raise TypeError("no such\nthing")
        return right(arm, problem)

    monkeypatch.setattr(kernel_speed, "arm_forward", broken)
    result = measure_item(small_item(), FakeClock(lambda *_: 5.0), device="cpu", rounds=2)
    assert failures([result]) == [f"{result['name']}, eager_hf: error: TypeError: no such"]


def result_with(op: str, **arms: float) -> dict[str, Any]:
    """A measured result of T = 8191, D = 8192 with total times by arm, and good shares."""
    rows: dict[str, Any] = {
        arm: {"status": "ok", "both": {"median_us": time}} for arm, time in arms.items()
    }
    size = 8191 * 8192 * 2
    rows["fused"] |= {
        "share_of_copy": {"forward": 0.95, "backward": 0.95},
        "saved_bytes": size + 4 * 8191,
    }
    named = {"name": op, "op": op, "dtype": "bf16", "tokens": 8191, "tensor_bytes": size}
    return {**named, "arms": rows}


def verdicts(result: dict[str, Any]) -> dict[str, str]:
    return {bar["bar"]: bar["met"] for bar in judge_bars([result])}


def test_bars_are_reached_missed_or_not_measured() -> None:
    good = result_with(
        "gated_branch", fused=10, eager_hf=43, compile_explicit=10, compile_natural=13
    )
    found = verdicts(good)
    assert found.pop("gated_difference x eager") == "not measured"
    assert found["gated_branch x HF-shaped eager"] == found["gate x compiled natural"] == "yes"
    assert "NO" not in found.values()
    good["arms"]["fused"]["share_of_copy"]["backward"] = 0.87
    good["arms"]["compile_explicit"]["both"]["median_us"] = 9.4
    good["arms"]["fused"]["saved_bytes"] += 9 * 8191
    missed = [name for name, met in verdicts(good).items() if met == "NO"]
    assert missed == [
        "gate backward, share of copy bandwidth",
        "gate x compiled explicit",
        "saved beyond 1 tensor, bytes a token",
    ]
    assert len(failed_bars(judge_bars([good]), [good], [])) == 3


def test_small_tensors_and_other_dtypes_are_not_held_to_bars() -> None:
    small = {**result_with("gated_branch", fused=10), "tensor_bytes": MIN_TENSOR_BYTES - 1}
    assert set(verdicts(small).values()) == {"not measured"}
    assert set(verdicts({**small, "dtype": "fp32"}).values()) == {"not measured"}


def test_a_bar_whose_sizes_were_tried_in_vain_is_a_failure() -> None:
    good = result_with(
        "gated_branch", fused=10, eager_hf=43, compile_explicit=10, compile_natural=13
    )
    assert failed_bars(judge_bars([good]), [good], []) == []
    del good["arms"]["compile_natural"]["both"]
    said = "bar: gate x compiled natural: not measured, although its sizes were tried"
    assert failed_bars(judge_bars([good]), [good], []) == [said]


def test_a_bar_that_time_ran_out_for_is_a_failure() -> None:
    item = plan_items()[0]
    assert "time ran out" in failed_bars(judge_bars([]), [], [item])[0]


def test_the_plan_has_every_size_once_and_what_bars_need_first() -> None:
    items = plan_items()
    assert len({item.name for item in items}) == len(items)
    sizes = {(item.case.op, item.case.hidden_size, item.tokens) for item in items}
    assert sizes == {(op, D, T) for op in OPS for D in HIDDEN_SIZES for T in TOKENS}
    for bar in BARS:
        needed = [
            item
            for item in items
            if item.for_bars
            and item.case.op in bar.ops
            and item.tensor_bytes >= MIN_TENSOR_BYTES
            and bar.tokens in (None, item.tokens)
            and (bar.against is None or bar.against in item.arms)
        ]
        assert needed, bar.name
    flags = [item.for_bars for item in items]
    assert flags == sorted(flags, reverse=True)


@pytest.mark.parametrize(
    "items",
    [
        plan_items(dtype="mixed"),
        plan_items(dtype="mixed", hidden_sizes=[64], tokens=[5]),
        plan_dry_run(dtype="mixed"),
        plan_comparison(dtype="mixed"),
    ],
    ids=["all", "sizes", "dry run", "comparison"],
)
def test_a_plan_has_the_ops_that_have_the_dtype(items: list[Item]) -> None:
    assert {(item.case.op, item.case.dtype) for item in items} == {
        ("gated_branch", "mixed"),
        ("gated_branch_rmsnorm", "mixed"),
    }


def test_a_dry_run_has_every_arm_and_no_figure_of_speed(tmp_path: Path) -> None:
    record = run_kernels(dry_run=True, ops=["gated_branch"], out=tmp_path / "dry.json")
    assert record["failed"] == []
    assert record["bars"] == []
    written = (tmp_path / "dry.json").read_text()
    assert "_us" not in written
    assert "share_of_copy" not in written
    arms = {arm for result in record["results"] for arm in result["arms"]}
    assert arms == {"fused", "eager_hf", "eager_careful", "compile_natural", "compile_explicit"}
    assert {item.case.op for item in plan_dry_run()} == set(OPS)


def test_a_dry_run_is_not_kept_among_the_records() -> None:
    records = Path(kernel_speed.__file__).parent / "records"
    with pytest.raises(UserError, match="not written into bench/records"):
        refuse_as_record(records / "kernels-dry.json")


def test_a_measurement_s_record_lies_in_the_checkout_wherever_it_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    records = Path(kernel_speed.__file__).resolve().parent / "records"
    assert default_record("nvidia-h200") == records / "kernels-nvidia-h200.json"
    # Of an installed wheel nothing but its packages is there.
    monkeypatch.setattr(kernel_run, "_ROOT", tmp_path)
    assert default_record("nvidia-h200") == Path("kernels-nvidia-h200.json")


@pytest.fixture
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A CUDA device, of which the choice of a backend sees one tensor."""

    class OnCuda:
        is_cuda = True
        dtype = torch.bfloat16
        device = "cuda:0"

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: OnCuda())
    for name in ("TRSP_KERNELS", "TRITON_INTERPRET"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_the_fused_arm_is_never_another_path(pretended_gpu: pytest.MonkeyPatch) -> None:
    require_fused_kernels()
    pretended_gpu.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(UserError, match="the fused arm would be the interpreter; unset"):
        require_fused_kernels()
    pretended_gpu.setenv("TRSP_KERNELS", "reference")
    with pytest.raises(UserError, match="the fused arm would be the reference; unset"):
        require_fused_kernels()
    pretended_gpu.setenv("TRSP_KERNELS", "cuda")
    with pytest.raises(UserError, match="TRSP_KERNELS='cuda'; choose auto, triton or reference"):
        require_fused_kernels()


def test_without_triton_nothing_is_measured(pretended_gpu: pytest.MonkeyPatch) -> None:
    pretended_gpu.setattr(launch, "_triton_is_installed", lambda: False)
    with pytest.raises(UserError, match=r"would be the reference.* install triton"):
        require_fused_kernels()
    for begin in (run_kernels, partial(run_comparison, "HEAD")):
        with pytest.raises(UserError, match="would be the reference"):
            begin()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_the_command_says_what_it_can_do() -> None:
    done = CliRunner().invoke(app, ["bench", "kernels"])
    assert done.exit_code == 2
    assert all(mode in done.output for mode in ("--dry-run", "--static", "--traffic"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--static", "--traffic"], "exclude each other"),
        (["--static", "--op", "gated_branch"], "--op means nothing to --static"),
        (["--dry-run", "--tokens", "5"], "--tokens means nothing to --dry-run"),
        (["--compare", "HEAD", "--no-bars"], "--no-bars means nothing to --compare COMMIT"),
        (["--full"], "--full means nothing to a measurement"),
        (["--dry-run", "--op", "nosuch"], "--op nosuch: unknown"),
        (["--dry-run", "--dtype", "int8"], "--dtype int8: unknown"),
        (
            ["--dry-run", "--op", "gated_difference", "--dtype", "mixed"],
            "--op gated_difference --dtype mixed: nothing to measure; choose bf16, fp16, fp32",
        ),
    ],
)
def test_settings_that_a_mode_ignores_are_errors(arguments: list[str], said: str) -> None:
    done = CliRunner().invoke(app, ["bench", "kernels", *arguments])
    assert done.exit_code == 2
    assert said in done.output


@pytest.mark.parametrize(
    "mode",
    [
        ["--static"],
        ["--traffic"],
        ["--dry-run"],
        ["--compare", "HEAD"],
        ["--compare", "a.json"],
        [],
    ],
    ids=" ".join,
)
def test_a_record_that_could_not_be_written_is_refused_before_any_work(
    mode: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "_run_kernel_mode", lambda *_: pytest.fail("work was begun"))
    (tmp_path / "file").touch()
    for path, said in ((tmp_path, "is a folder"), (tmp_path / "file" / "a.json", "is no folder")):
        done = CliRunner().invoke(app, ["bench", "kernels", *mode, "--out", str(path)])
        assert done.exit_code == 2
        assert said in done.output


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_twofold_copy_takes_twice_as_long_on_the_gpu() -> None:
    source = torch.randn(2**26, device="cuda")
    target = torch.empty_like(source)

    def copies(count: int) -> Action:
        return Action(
            str(count), lambda: None, lambda _: [target.copy_(source) for _ in range(count)]
        )

    clock = EventClock(torch.device("cuda"))
    timings = interleave([copies(1), copies(2)], clock, rounds=10, warmup_rounds=2)
    assert timings["2"].median_us / timings["1"].median_us == pytest.approx(2, rel=0.1)

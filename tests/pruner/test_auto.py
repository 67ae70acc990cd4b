"""The search: planted answers are found, held-out text stays untouched, no work is done twice."""

import hashlib
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from trsp.bench.cli import app
from trsp.pruner import api, auto, auto_trials, run
from trsp.pruner.auto_order import choose_stable, losses_without, rank_correlation
from trsp.pruner.auto_plan import plan_search
from trsp.pruner.auto_record import AutoRecord, StabilityTrial, console_lines
from trsp.pruner.auto_trials import Trial
from trsp.pruner.calibration import CalibrationSet
from trsp.pruner.checkpoint import load_model, open_checkpoint
from trsp.pruner.errors import Interrupted, RunError, UserError
from trsp.pruner.gated_model import GatedModel
from trsp.pruner.held_out import HeldOutLoss, held_out_loss
from trsp.pruner.recipe import AutoRecipe, Recipe, build_recipe
from trsp.pruner.token_ids import hash_ids

SETTINGS = (
    "calibration.num_sequences=16", "calibration.sequence_length=32",
    "selection.method=gates", "selection.first_round_steps=8", "selection.round_steps=3",
    "selection.batch_size=2", "transfer.closing=linear",
    "selection.num_candidates=2", "selection.verification_sequences=4",
    "transfer.steps=4", "transfer.batch_size=2", "transfer.learning_rate=2e-5",
    "auto.learning_rate_factors=[3.0, 0.3333333333333333]", "auto.max_steps_factor=1",
)  # fmt: skip
# A search by steps alone, without gates.
LONGER = (*SETTINGS, "selection.method=masked_loss", "auto.learning_rate_factors=[]",
    "auto.max_steps_factor=4",
)  # fmt: skip
# Any setting of auto turns the search on.
PLAIN = tuple(setting for setting in SETTINGS if not setting.startswith("auto."))
IDLE = (2, 4)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def planted(pico_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pico Llama with two layers that do nothing: these two may go, and no third."""
    folder = Path(shutil.copytree(pico_llama, tmp_path_factory.mktemp("planted") / "llama"))
    tensors = load_file(folder / "model.safetensors")
    for layer in IDLE:
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            tensors[f"model.layers.{layer}.{name}.weight"].zero_()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture
def words(text_file: Path) -> dict[str, Any]:
    return {"data": [text_file], "settings": SETTINGS, "vllm": "off", "auto": True}


class Spy:
    """What was trained: sequences, gate trainings, and transfers as (layers, peak rate)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.gate_trainings = 0
        self.transfers: list[tuple[int, float | None]] = []
        self.steps: list[int] = []
        self.trained: list[Tensor] = []
        for module in (auto, run):
            monkeypatch.setattr(module, "select_layers", self._select(module.select_layers))
        monkeypatch.setattr(run, "transfer", self._transfer(run.transfer))

    def _select(self, honest: Callable[..., Any]) -> Callable[..., Any]:
        def select(model: Any, input_ids: Tensor, *args: Any, **options: Any) -> Any:
            self.trained.append(input_ids)
            before = 0 if options.get("state") is None else len(options["state"].picks)
            state = honest(model, input_ids, *args, **options)
            self.gate_trainings += len(state.picks) - before
            return state

        return select

    def _transfer(self, honest: Callable[..., Any]) -> Callable[..., Any]:
        def transfer(model: Any, input_ids: Tensor, recipe: Any, **options: Any) -> Any:
            self.trained.append(input_ids)
            self.transfers.append((len(options["dropped"]), recipe.learning_rate))
            self.steps.append(recipe.steps)
            return honest(model, input_ids, recipe, **options)

        return transfer


def digest(folder: Path) -> str:
    shards = sorted(folder.glob("*.safetensors"))
    return hashlib.sha256(b"".join(shard.read_bytes() for shard in shards)).hexdigest()


def test_a_quality_budget_finds_the_planted_layers_and_stops(
    planted: Path, tmp_path: Path, words: dict[str, Any]
) -> None:
    out = tmp_path / "out"
    report = api.prune(planted, out, max_increase=0.01, **words)
    assert report["removal_order"] == list(IDLE)
    assert open_checkpoint(out).num_hidden_layers == 4
    record = AutoRecord.model_validate(report["auto"])
    assert record.layers == 2
    assert (len(record.stability), record.order) == (3, None), "gates order the layers"
    assert [point.layers for point in record.curve] == [0, 1, 2, 3]
    assert record.curve[2].raw_ratio == pytest.approx(1, abs=1e-6)
    assert record.curve[3].raw_ratio > 1.01
    assert {trial.layers for trial in record.transfers} == {2, 3}, "bisection: 2, then 3"
    third = next(trial for trial in record.transfers if trial.layers == 3)
    assert third.ratio is not None
    assert third.ratio > 1.01
    assert {decision.setting for decision in record.decisions} >= {
        "lambda1", "layers", "learning rate", "steps", "lambda2",
    }  # fmt: skip
    lines = console_lines(report["auto"])
    assert any("<- chosen" in line and line.split()[1] == "2" for line in lines)
    assert "## Search" in (out / "README.md").read_text()
    assert not (tmp_path / "out.run" / "search").exists(), "what lost takes no space"
    assert api.verify(out, against=tmp_path / "out.run" / "transferred", vllm="off").passed
    again = tmp_path / "again"
    api.prune(planted, again, recipe=out / "recipe.yaml", vllm="off")
    assert digest(again) == digest(out), "the saved recipe makes the same model"


def test_an_ample_budget_goes_as_deep_as_it_may(
    planted: Path, tmp_path: Path, words: dict[str, Any]
) -> None:
    report = api.prune(planted, tmp_path / "out", max_increase=9.0, **words)
    assert report["auto"]["layers"] == 3, "half of 6: auto.deepest_ratio"


def test_held_out_sequences_are_trained_on_by_nothing(
    planted: Path, tmp_path: Path, words: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[Tensor] = []

    def measure(gated: Any, held_out: Tensor, *args: Any) -> HeldOutLoss:
        measured.append(held_out)
        return held_out_loss(gated, held_out, *args)

    for module in (auto, auto_trials):
        monkeypatch.setattr(module, "held_out_loss", measure)
    spy = Spy(monkeypatch)
    report = api.prune(planted, tmp_path / "out", layers=2, **words)
    held_out = {tuple(row) for row in measured[0].tolist()}
    assert len(held_out) == 4
    assert all({tuple(row) for row in ids.tolist()} == held_out for ids in measured)
    assert len(spy.trained) >= 8, "six halves, one selection, transfers"
    for input_ids in spy.trained:
        assert held_out.isdisjoint(tuple(row) for row in input_ids.tolist())
    assert len(spy.trained[-1]) == 12
    assert report["calibration"]["num_sequences"] == 12
    assert report["calibration"]["sha256"] == hash_ids(spy.trained[-1])


def test_the_plan_is_what_runs(
    planted: Path, tmp_path: Path, words: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    spy = Spy(monkeypatch)
    report = api.prune(planted, tmp_path / "out", layers=2, **words)
    recipe = api.recipe_from(data=words["data"], settings=SETTINGS, auto=True, layers=2)
    plan = plan_search(recipe, 6)
    assert (plan.gate_trainings, plan.transfers) == (3 * 2 + 2, 3)
    assert (spy.gate_trainings, len(spy.transfers)) == (plan.gate_trainings, plan.transfers)
    assert report["auto"]["gate_trainings"] == spy.gate_trainings
    assert len(report["auto"]["transfers"]) == len(spy.transfers), "and the winner is not repeated"
    rates = [rate for _, rate in spy.transfers]
    assert rates == pytest.approx([2e-5, 6e-5, 2e-5 / 3])
    # 8 sequences a round of 8 steps of 2, 3 of 2 later; 8 a transfer.
    stages = 16 + 6
    assert plan.proportion == pytest.approx((6 * 16 + stages + 3 * 8) / (stages + 8))


def test_without_steps_no_rate_and_no_more_steps_are_tried() -> None:
    recipe = api.recipe_from(data=["text"], settings=["transfer.steps=0"], auto=True, layers=2)
    assert plan_search(recipe, 6).transfers == 1
    made = MadeTrials({1.0: (4.0, 5.0, 6.0, 7.0)})
    search: Any = object.__new__(auto._Search)
    search.asked, search.trials, search.decisions = recipe, made, []
    assert search._by_learning_rate(made.make(2)).factor == 1.0
    assert search._by_steps(made.make(2)).steps_factor == 1
    assert search.decisions[-1].reason == "not searched: transfer.steps is 0"


@pytest.mark.parametrize("max_transfers", [1, 2])
def test_the_search_stops_at_its_budget_and_says_so(
    planted: Path,
    tmp_path: Path,
    words: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    max_transfers: int,
) -> None:
    spy = Spy(monkeypatch)
    words["settings"] = (*SETTINGS, f"auto.max_transfers={max_transfers}")
    report = api.prune(planted, tmp_path / "out", max_increase=0.01, **words)
    assert len(spy.transfers) == max_transfers
    assert report["auto"]["stopped_at_budget"]
    assert report["auto"]["layers"] == 2, "the best so far"
    assert any("best so far" in line for line in console_lines(report["auto"]))


def test_an_impossible_budget_fails_with_what_was_measured(
    pico_llama: Path, tmp_path: Path, words: dict[str, Any]
) -> None:
    with pytest.raises(RunError) as failure:
        api.prune(pico_llama, tmp_path / "out", max_increase=1e-6, **words)
    text = str(failure.value)
    assert "not even 1 layer less" in text
    assert "1 layer less: +" in text
    assert "1 less: +" in text, "after transfer"
    assert "raise --max-increase" in text
    assert not (tmp_path / "out").exists()
    words["settings"] = (*SETTINGS, "transfer.enabled=false")
    with pytest.raises(RunError, match="not even 1 layer less"):
        api.prune(pico_llama, tmp_path / "other", max_increase=1e-6, **words)


def test_without_transfer_the_raw_curve_decides(
    planted: Path, tmp_path: Path, words: dict[str, Any]
) -> None:
    words["settings"] = (*SETTINGS, "transfer.enabled=false")
    report = api.prune(planted, tmp_path / "out", max_increase=0.01, **words)
    assert report["removal_order"] == list(IDLE)
    assert report["auto"]["transfers"] == []
    assert report["transfer"] is None


def shifted(
    monkeypatch: pytest.MonkeyPatch, by: Callable[[float], float], *, of: str = "factor"
) -> None:
    """Add `by(factor)` nats to every held-out loss of a transfer at that factor `of` it."""
    honest, made, now = auto_trials.held_out_loss, auto_trials.Trials._transfer, {"factor": 1.0}

    def transfer(trials: Any, layers: int, factor: float, steps_factor: int, *args: Any) -> Any:
        now["factor"] = {"factor": factor, "steps_factor": steps_factor}[of]
        return made(trials, layers, factor, steps_factor, *args)

    def loss(*measured: Any) -> HeldOutLoss:
        return HeldOutLoss(tuple(x + by(now["factor"]) for x in honest(*measured).each))

    monkeypatch.setattr(auto_trials.Trials, "_transfer", transfer)
    monkeypatch.setattr(auto_trials, "held_out_loss", loss)


def test_a_transfer_that_is_behind_halfway_is_stopped(
    planted: Path, tmp_path: Path, words: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    shifted(monkeypatch, lambda factor: 1.0 if factor == 3 else 0.0)
    seen: list[tuple[str, int]] = []
    report = api.prune(
        planted, tmp_path / "out", layers=2, **words,
        progress=lambda task, done, total: seen.append((task, done)),
    )  # fmt: skip
    outcomes = {trial["factor"]: trial["outcome"] for trial in report["auto"]["transfers"]}
    assert outcomes[3.0] == "stopped halfway"
    assert outcomes[1.0] == "finished"
    steps = [done for task, done in seen if "x3: transfer" in task]
    assert max(steps, default=0) <= 2, "of four steps"


@pytest.mark.parametrize("better", [3.0, 1.0])
def test_the_best_rate_wins_and_its_weights_are_the_runs(
    planted: Path,
    tmp_path: Path,
    words: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    better: float,
) -> None:
    """The other rates are made worse: the winner is known. A plain run at it has its weights."""
    shifted(monkeypatch, lambda factor: 0.0 if factor == better else 0.5)
    spy = Spy(monkeypatch)
    out = tmp_path / "out"
    report = api.prune(planted, out, layers=2, **words)
    told = json.dumps(report["auto"]["settings"])
    assert ("transfer.learning_rate" in told) == (better != 1.0)
    training = spy.trained[-1]
    rate = 2e-5 * better

    def given(_run: Any, *, resume: bool = False) -> CalibrationSet:
        return CalibrationSet(training, (), hash_ids(training), 0, False)

    monkeypatch.setattr(run.Run, "calibration", given)
    plain = {key: value for key, value in words.items() if key != "auto"}
    settings = (*PLAIN, f"transfer.learning_rate={rate!r}")
    api.prune(planted, tmp_path / "plain", **{**plain, "settings": settings}, layers=2)
    assert digest(tmp_path / "plain") == digest(out)


def test_a_better_rate_may_go_deeper(
    planted: Path, tmp_path: Path, words: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    shifted(monkeypatch, lambda factor: -0.5 if factor == 3 else 0.0)
    report = api.prune(planted, tmp_path / "out", max_increase=0.01, **words)
    assert report["auto"]["layers"] == 3, "bisection at the default rate stops at 2"
    tried = [(trial["layers"], trial["factor"]) for trial in report["auto"]["transfers"]]
    assert tried[:3] == [(2, 1.0), (3, 1.0), (2, 3.0)]
    assert tried[-1] == (3, 3.0)
    assert len(tried) <= report["auto"]["plan"]["transfers"]
    assert open_checkpoint(tmp_path / "out").num_hidden_layers == 3


def test_a_transfer_that_does_harm_is_warned_of(
    planted: Path, tmp_path: Path, words: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    shifted(monkeypatch, lambda _factor: 0.5)
    report = api.prune(planted, tmp_path / "out", layers=2, **words)
    assert any("worse than plain removal" in warning for warning in report["warnings"])


def test_more_steps_that_help_are_taken_and_the_run_is_repeatable(
    planted: Path,
    tmp_path: Path,
    words: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """4 times the steps are made worst, twice the steps best; it is stopped in the second."""
    shifted(monkeypatch, lambda times: {1: 0.0, 2: -0.5, 4: 0.5}[int(times)], of="steps_factor")
    spy = Spy(monkeypatch)
    out = tmp_path / "out"
    words["settings"] = LONGER
    stopper = Stopper("steps x2: transfer", 3, signal.SIGINT)
    with pytest.raises(Interrupted):
        api.prune(planted, out, layers=2, progress=stopper, **words)
    report = api.prune(planted, out, layers=2, resume=True, **words)
    assert spy.steps == [4, 8, 8, 16], "the second went on, and the first was not made again"
    plan = plan_search(api.recipe_from(data=["t"], settings=LONGER, auto=True, layers=2), 6)
    assert (plan.transfers, plan.proportion) == (1 + 2 + 4, 7.0), "a plain run trains 4 steps"
    assert [trial["steps_factor"] for trial in report["auto"]["transfers"]] == [1, 2, 4]
    (steps,) = (one for one in report["auto"]["decisions"] if one["setting"] == "steps")
    assert steps["value"] == "8 (x2)"
    assert "8 steps " in steps["reason"]
    assert "(better: -0." in steps["reason"]
    assert "(worse: +" in steps["reason"]
    assert "transfer.steps=8" in report["auto"]["settings"]
    assert len(report["transfer"]["steps"]) == 8
    training = spy.trained[-1]

    def given(_run: Any, *, resume: bool = False) -> CalibrationSet:
        return CalibrationSet(training, (), hash_ids(training), 0, False)

    monkeypatch.setattr(run.Run, "calibration", given)
    plain = {key: value for key, value in words.items() if key != "auto"}
    plain["settings"] = [s for s in LONGER if not s.startswith("auto.")]
    plain["settings"] += [s for s in report["auto"]["settings"] if not s.startswith("layers")]
    api.prune(planted, tmp_path / "plain", **plain, layers=2)
    assert digest(tmp_path / "plain") == digest(out)


def test_more_steps_may_go_deeper(
    planted: Path, tmp_path: Path, words: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    shifted(monkeypatch, lambda times: -0.5 if times > 1 else 0.0, of="steps_factor")
    words["settings"] = (*LONGER, "auto.max_steps_factor=2")
    report = api.prune(planted, tmp_path / "out", max_increase=0.01, **words)
    tried = [(trial["layers"], trial["steps_factor"]) for trial in report["auto"]["transfers"]]
    assert tried == [(2, 1), (3, 1), (2, 2), (3, 2)], "bisection at the recipe's steps stops at 2"
    assert report["auto"]["layers"] == 3
    assert report["auto"]["plan"]["transfers"] == 2 + 2 + 2 * 2, "two depths, twice the steps each"
    assert "transfer.steps=8" in report["auto"]["settings"]


def test_twice_the_steps_count_as_two_of_the_budget(
    planted: Path, tmp_path: Path, words: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    spy = Spy(monkeypatch)
    words["settings"] = (*LONGER, "auto.max_transfers=2")
    report = api.prune(planted, tmp_path / "out", layers=2, **words)
    assert spy.steps == [4]
    assert report["auto"]["stopped_at_budget"]
    (steps,) = (one for one in report["auto"]["decisions"] if one["setting"] == "steps")
    assert steps["value"] == "4 (x1)"
    assert "the search budget (auto.max_transfers) has no room" in steps["reason"]


class MadeTrials:
    """Transfers whose held-out losses are given, by factor, or by steps_factor above 1."""

    def __init__(self, losses: dict[float, tuple[float, ...]]) -> None:
        self.losses, self.dropped = losses, list[float]()

    def make(
        self,
        layers: int,
        factor: float = 1.0,
        *,
        steps_factor: int = 1,
        best: Trial | None = None,
    ) -> Trial:
        loss = HeldOutLoss(self.losses[factor if steps_factor == 1 else steps_factor])
        return Trial(layers, factor, 1e-3 * factor, "finished", None, loss, steps_factor)

    def drop(self, trial: Trial) -> None:
        self.dropped.append(trial.factor if trial.steps_factor == 1 else trial.steps_factor)


@pytest.mark.parametrize(
    ("tripled", "third", "winner"),
    [
        ((3.9, 5.0, 6.0, 7.0), (4.0, 5.0, 5.9, 7.0), 1.0),  # each better by its standard error
        ((3.8, 4.9, 5.9, 6.9), (3.9, 5.0, 5.9, 7.0), 3.0),
        ((3.8, 4.9, 5.9, 6.9), (3.5, 4.6, 5.6, 6.6), 0.3),
        ((3.8, 4.9, 5.9, 6.9), (3.7, 4.9, 5.9, 6.9), 3.0),  # a tie with the better one
        ((4.1, 5.1, 6.1, 7.1), (4.2, 5.2, 6.2, 7.2), 1.0),
    ],
)
def test_a_rate_wins_by_more_than_the_standard_error(
    tripled: tuple[float, ...], third: tuple[float, ...], winner: float
) -> None:
    made = MadeTrials({1.0: (4.0, 5.0, 6.0, 7.0), 3.0: tripled, 0.3: third})
    search: Any = object.__new__(auto._Search)
    search.asked = Recipe(auto=AutoRecipe(learning_rate_factors=(3.0, 0.3)))
    search.trials, search.decisions = made, []
    best = search._by_learning_rate(made.make(2))
    assert best.factor == winner
    assert sorted([*made.dropped, winner]) == [0.3, 1.0, 3.0], "all others are dropped"


@pytest.mark.parametrize(
    ("twice", "four_times", "winner", "told"),
    [
        ((3.9, 5.0, 6.0, 7.0), (0.0, 0.0, 0.0, 0.0), 1, "(a tie: -0.0250"),  # by its error: no
        ((3.8, 4.9, 5.9, 6.9), (3.7, 4.9, 5.9, 6.9), 2, "(a tie: -0.0250"),
        ((3.8, 4.9, 5.9, 6.9), (3.5, 4.6, 5.6, 6.6), 4, "not tried (auto.max_steps_factor 4)"),
        ((4.1, 5.1, 6.1, 7.2), (0.0, 0.0, 0.0, 0.0), 1, "(worse: +0.1250"),
    ],
)
def test_steps_double_while_that_wins_by_more_than_the_standard_error(
    twice: tuple[float, ...], four_times: tuple[float, ...], winner: int, told: str
) -> None:
    made = MadeTrials({1.0: (4.0, 5.0, 6.0, 7.0), 2: twice, 4: four_times})
    search: Any = object.__new__(auto._Search)
    search.asked = Recipe(auto=AutoRecipe(max_steps_factor=4))
    search.trials, search.decisions, search.auto = made, [], search.asked.auto
    assert search._by_steps(made.make(2)).steps_factor == winner
    (decision,) = search.decisions
    assert decision.value == f"{winner * search.asked.transfer.steps} (x{winner})"
    assert told in decision.reason
    tried = {1: [1, 2], 2: [1, 2, 4], 4: [1, 2, 4]}[winner]
    assert sorted([*made.dropped, winner]) == tried, "all others that were made are dropped"


def test_another_rate_that_diverges_is_an_answer_and_the_default_a_failure(
    planted: Path, tmp_path: Path, words: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = run.transfer

    def diverging(at: float) -> Callable[..., Any]:
        def transfer(model: Any, input_ids: Tensor, recipe: Any, **options: Any) -> Any:
            if recipe.learning_rate == pytest.approx(at):
                raise RunError("the stage 2 loss is nan at step 1")
            return honest(model, input_ids, recipe, **options)

        return transfer

    monkeypatch.setattr(run, "transfer", diverging(6e-5))
    report = api.prune(planted, tmp_path / "out", layers=2, **words)
    outcomes = {trial["factor"]: trial["outcome"] for trial in report["auto"]["transfers"]}
    assert outcomes[3.0] == "diverged"
    monkeypatch.setattr(run, "transfer", diverging(2e-5))
    with pytest.raises(RunError, match="nan at step 1"):
        api.prune(planted, tmp_path / "other", layers=2, **words)


class Stopper:
    """Progress that kills or interrupts this process where `task` is part of a task's name."""

    def __init__(self, task: str, at: int, number: int) -> None:
        self.task, self.at, self.number = task, at, number

    def __call__(self, task: str, completed: int, total: int) -> None:
        if self.task in task and completed == self.at:
            os.kill(os.getpid(), self.number)


@pytest.fixture(scope="module")
def whole(
    one_thread: None, planted: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, dict[str, Any], list[str]]:
    """Digest, record and work, as task and count, of a search that nothing stopped."""
    out = tmp_path_factory.mktemp("whole") / "out"
    seen: list[str] = []
    report = api.prune(
        planted, out, data=[text_file], settings=SETTINGS, vllm="off", auto=True,
        max_increase=0.01, progress=lambda task, done, total: seen.append(f"{task} {done}"),
    )  # fmt: skip
    return digest(out), report["auto"], [line for line in seen if _is_training(line)]


def _is_training(line: str) -> bool:
    return line.startswith(("lambda1", "gates", "quality")) or "transfer" in line


STOPS = [
    ("lambda1 0.1, half 2/2", 3),
    ("quality by depth", 2),
    ("try 2, 3 layers", 2),
    ("prove", 1),
    ("x3: transfer", 1),
]


@pytest.mark.parametrize(("task", "at"), STOPS)
def test_a_stopped_search_resumes_to_the_same_answer(
    planted: Path,
    tmp_path: Path,
    words: dict[str, Any],
    whole: tuple[str, dict[str, Any], list[str]],
    task: str,
    at: int,
) -> None:
    out = tmp_path / "out"
    words["max_increase"] = 0.01
    with pytest.raises(Interrupted):
        api.prune(planted, out, progress=Stopper(task, at, signal.SIGINT), **words)
    report = api.prune(planted, out, resume=True, **words)
    assert digest(out) == whole[0]
    assert {**report["auto"], "seconds": 0} == {**whole[1], "seconds": 0}


@pytest.mark.parametrize(("task", "at"), [("x1: transfer", 3), ("x3: transfer", 1)])
def test_a_killed_search_does_nothing_twice(
    planted: Path,
    tmp_path: Path,
    words: dict[str, Any],
    whole: tuple[str, dict[str, Any], list[str]],
    task: str,
    at: int,
) -> None:
    out = tmp_path / "out"
    words["max_increase"] = 0.01
    words["settings"] = (*SETTINGS, "state_every_seconds=0")
    child = os.fork()
    if child == 0:
        api.prune(planted, out, progress=Stopper(task, at, signal.SIGKILL), **words)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    seen: list[str] = []
    api.prune(
        planted, out, resume=True, **words,
        progress=lambda name, done, total: seen.append(f"{name} {done}"),
    )  # fmt: skip
    again = [line for line in seen if _is_training(line)]
    stopped = next(i for i, line in enumerate(whole[2]) if task in line and line.endswith(f" {at}"))
    assert again == whole[2][stopped + 1 :], "the steps after the kill, and only they"
    assert digest(out) == whole[0]


def test_a_search_is_resumed_with_its_own_settings_only(
    planted: Path, tmp_path: Path, words: dict[str, Any]
) -> None:
    out = tmp_path / "out"
    stop = Stopper("x3: transfer", 1, signal.SIGINT)
    with pytest.raises(Interrupted):
        api.prune(planted, out, layers=2, progress=stop, **words)
    for change, what in (
        (("auto.held_out=0.3",), "another auto"),
        (("transfer.steps=9",), "another transfer"),
    ):
        settings = {**words, "settings": (*SETTINGS, *change)}
        with pytest.raises(UserError, match=what):
            api.prune(planted, out, layers=2, resume=True, **settings)
    with pytest.raises(UserError, match="another auto"):
        api.prune(
            planted, out, layers=2, resume=True, **{**words, "auto": False, "settings": PLAIN}
        )


def test_stability_ties_go_to_the_recipes_own() -> None:
    def trials(*pairs: tuple[float, float]) -> list[StabilityTrial]:
        return [StabilityTrial(lambda1=value, correlation=c) for value, c in pairs]

    assert choose_stable(trials((0.03, 0.5), (0.1, 0.6), (0.3, 0.615)), 0.1).lambda1 == 0.1
    assert choose_stable(trials((0.03, 0.5), (0.1, 0.6), (0.3, 0.63)), 0.1).lambda1 == 0.3
    assert choose_stable(trials((0.03, 0.9), (0.1, 0.6), (0.3, 0.63)), 0.1).lambda1 == 0.03


def test_rank_correlation() -> None:
    assert rank_correlation([1, 2, 3, 4], [10, 20, 30, 90]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert rank_correlation([1, 1, 1], [1, 2, 3]) == 0.0, "what orders nothing agrees with nothing"


def test_an_order_that_is_noise_is_warned_of(
    planted: Path, tmp_path: Path, words: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def opposed(search: Any, lambda1: float, half: int) -> list[float]:
        return [1.0, 2.0, 3.0, 4.0, 5.0][:: 1 if half else -1]

    monkeypatch.setattr(auto._Search, "_gates", opposed)
    words["settings"] = (*SETTINGS, "transfer.enabled=false")
    report = api.prune(planted, tmp_path / "out", layers=1, **words)
    assert any("mostly noise" in warning for warning in report["warnings"])


def test_losses_without_one_layer_rank_the_planted_ones_lowest(planted: Path) -> None:
    model = load_model(open_checkpoint(planted), device="cpu")
    tokens = torch.arange(64).reshape(2, 32) % 50
    seen: list[tuple[str, int, int]] = []
    losses = losses_without(model, tokens, [1, 2, 4, 5], 1, lambda *step: seen.append(step))
    with GatedModel(model, fuse_norms="off") as gated:
        dense, without = (gated.masked_loss(tokens, removed, 2) for removed in ((), (5,)))
    assert losses[1:3] == pytest.approx([dense, dense], abs=1e-6)
    assert losses[3] == pytest.approx(without, abs=1e-6)
    assert min(abs(losses[0] - dense), abs(losses[3] - dense)) > 1e-5
    assert seen == [("losses without", done, 4) for done in (1, 2, 3, 4)]


@pytest.mark.parametrize(("method", "second"), [("masked_loss", 1), ("block_influence", -1)])
def test_an_order_by_losses_is_compared_between_halves_of_the_training_text(
    planted: Path,
    tmp_path: Path,
    words: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    second: int,
) -> None:
    """The second half's losses are the first one's, or their opposites."""
    halves: list[Tensor] = []
    first: list[float] = []

    def losses(model: Any, input_ids: Tensor, layers: Any, *args: Any) -> list[float]:
        halves.append(input_ids)
        assert list(layers) == [1, 2, 3, 4, 5], "layer 0 is protected"
        first[:] = first or losses_without(model, input_ids, layers, *args)
        return [loss if len(halves) == 1 else second * loss for loss in first]

    monkeypatch.setattr(auto, "losses_without", losses)
    words["settings"] = (*SETTINGS, f"selection.method={method}", "transfer.enabled=false")
    stopper = Stopper("quality by depth", 1, signal.SIGINT)
    with pytest.raises(Interrupted):
        api.prune(planted, tmp_path / "out", layers=1, progress=stopper, **words)
    report = api.prune(planted, tmp_path / "out", layers=1, resume=True, **words)
    assert [len(half) for half in halves] == [4, 4], "once each, verification_sequences of 6"
    rows = [{tuple(row) for row in half.tolist()} for half in halves]
    assert rows[0].isdisjoint(rows[1])
    record = AutoRecord.model_validate(report["auto"])
    assert record.order is not None
    assert record.order.correlation == pytest.approx(second)
    line = f"order: two halves of the text agree with rank correlation {second:.2f}"
    assert sum(line in told for told in console_lines(report["auto"])) == 1
    noisy = [told for told in report["warnings"] if "mostly noise" in told]
    assert len(noisy) == (second < 0)
    assert all("selection.verification_sequences" in told for told in noisy)
    notes = json.loads((tmp_path / "out.run" / "auto.json").read_text())["done"]
    spent = sum(entry["cost"]["seconds"] for entry in notes.values())
    assert {f"losses without, half {half}" for half in (1, 2)} <= set(notes)
    assert report["auto"]["seconds"] == pytest.approx(spent)
    del report["auto"]["order"]
    assert AutoRecord.model_validate(report["auto"]).order is None, "as before it was measured"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_increase": 0.0}, "max_increase"),
        ({"max_increase": -0.1}, "max_increase"),
        ({"max_increase": 0.1, "layers": 2}, "choose one"),
        ({"max_increase": 0.1, "ratio": 0.5}, "choose one"),
        ({"max_increase": 0.1, "keep": [0, 1]}, "choose one"),
        ({"keep": [0, 1]}, "nothing for auto to search"),
        ({"auto": False, "max_increase": 0.1}, "--auto"),
        ({"data": ()}, "--data"),
        ({"settings": (*SETTINGS, "calibration.num_sequences=7")}, "held out"),
        ({"settings": (*SETTINGS, "auto.held_out=0.9")}, "held out"),
        ({"settings": (*SETTINGS, "auto.max_transfers=0")}, "max_transfers"),
        ({"settings": (*SETTINGS, "auto.max_steps_factor=0")}, "max_steps_factor"),
        ({"settings": (*SETTINGS, "auto.learning_rate_factors=[0]")}, "above 0"),
        ({"settings": (*SETTINGS, "auto.lambda1=[-1]")}, "below 0"),
        ({"layers": 6}, "not pruning"),
    ],
)
def test_what_cannot_be_searched_is_refused_and_leaves_nothing(
    pico_llama: Path, tmp_path: Path, words: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        api.prune(pico_llama, tmp_path / "out", **{**words, **change})
    described = {key: value for key, value in {**words, **change}.items() if key != "vllm"}
    with pytest.raises(UserError, match=message):
        api.describe(pico_llama, out=tmp_path / "out", **described)
    assert list(tmp_path.iterdir()) == []


def test_a_map_or_a_plan_is_not_searched(
    pico_llama: Path, tmp_path: Path, words: dict[str, Any]
) -> None:
    api.prune(pico_llama, tmp_path / "first", keep=[0, 1, 2], vllm="off")
    layer_map = tmp_path / "first" / "layer_map.json"
    with pytest.raises(UserError, match="leave out --auto"):
        api.prune(pico_llama, tmp_path / "out", layer_map=layer_map, **words)
    words.pop("vllm")
    with pytest.raises(UserError, match="trsp prune"):
        api.plan(pico_llama, tmp_path / "map.json", **words)


def test_a_recipe_file_may_ask_for_a_search(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("auto: {max_increase: 0.05, max_transfers: 3}\n")
    recipe = build_recipe(file=file)
    assert recipe.auto is not None
    assert (recipe.auto.max_increase, recipe.auto.max_transfers) == (0.05, 3)
    assert recipe.deepest_to_remove(16) == 8
    assert Recipe().deepest_to_remove(16) == 4
    from_flags = api.recipe_from(recipe=file, auto=True, max_increase=0.1).auto
    assert from_flags is not None
    assert (from_flags.max_increase, from_flags.max_transfers) == (0.1, 3)


def test_the_command_says_the_plan_before_and_why_after(
    planted: Path, tmp_path: Path, text_file: Path
) -> None:
    settings = [word for setting in SETTINGS for word in ("--set", setting)]
    arguments = [
        "prune", str(planted), "--out", str(tmp_path / "out"), "--data", str(text_file),
        "--auto", "--max-increase", "0.01", "--vllm", "off", *settings,
    ]  # fmt: skip
    dry = CliRunner().invoke(app, [*arguments, "--dry-run"])
    assert dry.exit_code == 0, dry.output
    planned = "at most 9 gate trainings (a plain run: 3) and 6 transfers (a plain run: 1;"
    assert planned in dry.stdout
    assert "4 of 16 sequences are held out" in dry.stdout
    assert list(tmp_path.iterdir()) == []
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert planned in result.stderr
    for setting in ("lambda1", "layers 2", "learning rate", "lambda2"):
        assert f"why      {setting}" in result.stdout
    assert result.stdout.count("\ndepth ") == 3
    impossible = CliRunner().invoke(
        app, [*arguments[:2], "--out", str(tmp_path / "no"), *arguments[4:-len(settings) - 4],
              "--auto", "--max-increase", "1e-9", "--vllm", "off", *settings,
              "--set", "selection.protected=[0,2,4]"],
    )  # fmt: skip
    assert impossible.exit_code == 1, impossible.output
    assert "not even 1 layer" in impossible.stderr

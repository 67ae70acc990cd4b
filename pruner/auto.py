"""`trsp prune --auto`: the settings of a run, chosen on calibration text that nothing trains on.

In order: lambda1, by how well the orders of layers from two halves of the text agree, which is
measured where nothing depends on it too; the removal order, every prefix of it measured without
recovery; the depth, by bisection where a quality budget asks for it (quality is taken to fall with
depth); the learning rate at that depth; the steps, at that depth and rate, doubled while it helps.
A resumed search goes through the same decisions and finds done what is done (auto_trials.py). No
optimizer library (optuna) chooses what to try: at most 8 evaluations of one or two parameters leave
a sampler nothing to learn.
"""

from dataclasses import dataclass, replace

from transformers import PreTrainedModel

from trsp.pruner.auto_order import (
    choose_stable,
    losses_without,
    noise_warning,
    rank_correlation,
)
from trsp.pruner.auto_plan import (
    MIN_RANKED_LAYERS,
    lambda1_values,
    plan_search,
    rate_factors,
    section_of,
    steps_factors,
)
from trsp.pruner.auto_record import (
    AutoRecord,
    Decision,
    DepthPoint,
    OrderStability,
    StabilityTrial,
    percent,
)
from trsp.pruner.auto_trials import Notes, Trial, Trials
from trsp.pruner.calibration import CalibrationSet
from trsp.pruner.errors import RunError
from trsp.pruner.families import text_config
from trsp.pruner.gated_model import GatedModel
from trsp.pruner.held_out import HeldOutLoss, held_out_loss, hold_out
from trsp.pruner.layer_map import LayerMap
from trsp.pruner.recipe import Recipe
from trsp.pruner.run import Run, free_memory
from trsp.pruner.selection import select_layers
from trsp.pruner.transfer import learning_rate


@dataclass(frozen=True)
class SearchResult:
    """What the run goes on with: its recipe, the layers that go, and what it may train on."""

    recipe: Recipe
    layer_map: LayerMap
    training: CalibrationSet
    record: AutoRecord


def search(run: Run, calibration: CalibrationSet) -> SearchResult:
    """Choose lambda1, the layers, the learning rate and the steps of `run.recipe`.

    Its `auto` is set. The weights of the best transfer are in the run folder afterwards, as if the
    run had made them, and `run.recipe` is the resolved one.

    Raises:
        UserError: too few sequences to hold some out.
        RunError: no depth meets `auto.max_increase`, with what was measured.
    """
    return _Search(run, calibration).result()


class _Search:
    """One search, from the text to the settings."""

    def __init__(self, run: Run, calibration: CalibrationSet) -> None:
        self.run, self.asked, self.auto = run, run.recipe, section_of(run.recipe)
        self.num_layers = run.checkpoint.num_hidden_layers
        self.deepest = run.recipe.deepest_to_remove(self.num_layers, run.needed_layers())
        self.split = hold_out(calibration, self.auto.held_out, run.recipe.seed)
        self.notes = Notes(run)
        self.model: PreTrainedModel | None = None
        self.stability: list[StabilityTrial] = []
        self.order: OrderStability | None = None
        self.decisions: list[Decision] = []
        self.warnings: list[str] = []
        self.raw: list[HeldOutLoss] = []
        self.trials: Trials

    def result(self) -> SearchResult:
        recipe = self.asked
        chosen = self._choose_lambda1()
        self._compare_orders()
        self._release()
        selection = recipe.selection.model_copy(update={"lambda1": chosen})
        update = {"selection": selection, "layers": self.deepest, "ratio": None}
        self.run.recipe = recipe.model_copy(update=update)
        layer_map = self.run.select(self.split.training)
        order = self.notes.once("removal order", lambda: list(layer_map.removal_order))
        self.raw = [self._raw_loss(tuple(order[:depth])) for depth in range(self.deepest + 1)]
        peak_rate = self.notes.once("learning rate", self._peak_rate)
        self._release()
        self.trials = Trials(
            self.run,
            self.notes,
            self.split,
            layer_map,
            peak_rate=peak_rate,
            max_transfers=self.auto.max_transfers,
        )
        best = self._best_transfer() if recipe.transfer.enabled else None
        depth = self._depth_by_raw_curve() if best is None else best.layers
        self._decide("lambda2", f"{recipe.transfer.lambda2:g}", _why_lambda2(recipe))
        settings, transfer = [f"layers={depth}", f"selection.lambda1={chosen!r}"], recipe.transfer
        if best is not None and best.factor != 1:
            transfer = transfer.model_copy(update={"learning_rate": best.learning_rate})
            settings.append(f"transfer.learning_rate={best.learning_rate!r}")
        if best is not None and best.steps_factor != 1:
            transfer = transfer.model_copy(update={"steps": self._steps(best)})
            settings.append(f"transfer.steps={self._steps(best)}")
        self.run.recipe = self.run.recipe.model_copy(update={"layers": depth, "transfer": transfer})
        method = self.run.method(recipe.selection.method)
        record = self._record(depth, tuple(order), tuple(settings))
        if best is not None:
            self.trials.adopt(best)
        return SearchResult(
            self.run.recipe,
            replace(layer_map.prefix(depth), method=method),
            self.split.training,
            record,
        )

    def _choose_lambda1(self) -> float:
        """The value under which two halves of the text order the layers most alike."""
        own = self.asked.selection.lambda1
        for value in lambda1_values(self.asked, self.num_layers, self.run.needed_layers()):
            correlation = rank_correlation(*(self._gates(value, half) for half in (0, 1)))
            self.stability.append(StabilityTrial(lambda1=value, correlation=correlation))
        if not self.stability:
            self._decide("lambda1", f"{own:g}", "not searched: gates rank no or too few layers")
            return own
        chosen = choose_stable(self.stability, own)
        shown = ", ".join(f"{t.lambda1:g}: {t.correlation:.2f}" for t in self.stability)
        best = max(trial.correlation for trial in self.stability)
        why = "agree best" if chosen.correlation == best else "tie with the best at the default"
        self._decide(
            "lambda1",
            f"{chosen.lambda1:g}",
            f"the orders from two halves of the text {why} (rank correlation at {shown})",
        )
        self.warnings += noise_warning(chosen.correlation, "selection.first_round_steps")
        return chosen.lambda1

    def _gates(self, lambda1: float, half: int) -> list[float]:
        """|gate| of the removable layers after a first round on every second sequence."""
        protected = self.run.protected_layers()
        update = {"lambda1": lambda1, "num_candidates": 1}

        def train() -> list[float]:
            state = select_layers(
                self._dense(),
                self.split.training.input_ids[half::2],
                self.asked.selection.model_copy(update=update),
                num_to_remove=1,
                protected=protected,
                seed=self.asked.seed,
                progress=lambda task, done, total: self.run.progress(
                    f"lambda1 {lambda1:g}, half {half + 1}/2", done, total
                ),
            )
            return list(state.gates)

        gates = self.notes.once(f"gates at {lambda1!r}, half {half + 1}", train)
        return [abs(gate) for layer, gate in enumerate(gates) if layer not in protected]

    def _compare_orders(self) -> None:
        """How alike two halves of the text order the layers, where losses do and not gates."""
        selection, protected = self.asked.selection, self.run.protected_layers()
        layers = [layer for layer in range(self.num_layers) if layer not in protected]
        if selection.method == "gates" or len(layers) < MIN_RANKED_LAYERS:
            return
        training, most = self.split.training.input_ids, selection.verification_sequences
        num_sequences = min(most, len(training) // 2)

        def losses(half: int) -> list[float]:
            return losses_without(
                self._dense(),
                training[half::2][:num_sequences],
                layers,
                selection.batch_size,
                lambda task, done, total: self.run.progress(
                    f"{task}, half {half + 1}/2", done, total
                ),
            )

        first = self.notes.once("losses without, half 1", lambda: losses(0))
        second = self.notes.once("losses without, half 2", lambda: losses(1))
        correlation = rank_correlation(first, second)
        self.order = OrderStability(num_sequences=num_sequences, correlation=correlation)
        self.warnings += noise_warning(correlation, "selection.verification_sequences")

    def _raw_loss(self, removed: tuple[int, ...]) -> HeldOutLoss:
        def measure() -> list[float]:
            with GatedModel(self._dense(), fuse_norms="off") as gated:
                batch = self.asked.selection.batch_size
                loss = held_out_loss(gated, self.split.held_out, removed, batch)
            self.run.progress("quality by depth", len(removed), self.deepest)
            return list(loss.each)

        return HeldOutLoss(tuple(self.notes.once(f"raw at {len(removed)}", measure)))

    def _peak_rate(self) -> float:
        # Without warm-up the first step's rate is the peak, whoever set it.
        transfer = self.asked.transfer.model_copy(update={"warmup_fraction": 0.0})
        return learning_rate(transfer, text_config(self._dense()).hidden_size, 0)

    def _depth_by_raw_curve(self) -> int:
        """Without transfer: what was asked, or the deepest prefix within the quality budget."""
        if self.auto.max_increase is None:
            self._decide("layers", str(self.deepest), "as asked")
            return self.deepest
        limit = 1 + self.auto.max_increase
        depths = range(1, self.deepest + 1)
        within = [depth for depth in depths if self.raw[depth].ratio(self.raw[0]) <= limit]
        if not within:
            raise self._impossible()
        self._decide(
            "layers",
            str(within[-1]),
            f"the deepest of {self.deepest} within {percent(limit)}, without transfer, which is "
            f"off: {self._measured(self.raw[within[-1]])}",
        )
        return within[-1]

    def _best_transfer(self) -> Trial:
        """The transfer that the run takes its weights from."""
        if self.auto.max_increase is None:
            first = self.trials.make(self.deepest)
            assert first is not None, "max_transfers is at least 1"
            self._decide("layers", str(self.deepest), "as asked")
            best = self._by_steps(self._by_learning_rate(first))
        else:
            best = self._by_steps(self._by_learning_rate(self._by_depth()))
            while (best.factor != 1 or best.steps_factor != 1) and best.layers < self.deepest:
                deeper = self.trials.make(
                    best.layers + 1, best.factor, steps_factor=best.steps_factor
                )
                if deeper is None:
                    break
                if not self._meets(deeper):
                    self.trials.drop(deeper)
                    break
                self.trials.drop(best)
                best = deeper
            self._explain_depth(best)
        assert best.loss is not None, "the best transfer is one that finished"
        worse, error = best.loss.above(self.raw[best.layers])
        if worse > error:
            self.warnings.append(
                f"the transfer made the model worse than plain removal of {best.layers} layers "
                f"({self._measured(best.loss)} against {self._measured(self.raw[best.layers])}): "
                "more text or more transfer.steps, or --set transfer.enabled=false"
            )
        if self.trials.stopped_at_budget:
            self._decide(
                "transfers",
                str(self.trials.spent),
                "the search budget (auto.max_transfers) has no room for the next: this is the best "
                "so far",
            )
        return best

    def _by_depth(self) -> Trial:
        """Bisection, one transfer each, for the deepest that meets the quality budget."""
        good, bad = 0, self.deepest + 1
        best: Trial | None = None
        while bad - good > 1:
            trial = self.trials.make((good + bad) // 2)
            if trial is None:
                break
            if self._meets(trial):
                self.trials.drop(best)
                good, best = trial.layers, trial
            else:
                self.trials.drop(trial)
                bad = trial.layers
        if best is None:
            raise self._impossible()
        return best

    def _by_learning_rate(self, default: Trial) -> Trial:
        """Other rates at the same depth; one wins by more than the standard error or not at all."""
        assert default.loss is not None, "the default rate's transfer finished or the run failed"
        best, best_loss, told = default, default.loss, [f"x1 {default.loss.mean:.4f}"]
        for factor in rate_factors(self.asked):
            trial = self.trials.make(default.layers, factor, best=best)
            if trial is None:
                break
            if trial.loss is None:
                told.append(f"x{factor:.2g} {trial.outcome}")
                continue
            better, numbers = _beside(best_loss, trial.loss)
            told.append(f"x{factor:.2g} {numbers}")
            self.trials.drop(best if better else trial)
            if better:
                best, best_loss = trial, trial.loss
        self._decide(
            "learning rate",
            f"{best.learning_rate:.3g} (x{best.factor:.2g})",
            f"held-out loss with {default.layers} layers less: {', '.join(told)}",
        )
        return best

    def _by_steps(self, shorter: Trial) -> Trial:
        """Twice the steps at the same depth and rate, and again while that is no tie."""
        factors = steps_factors(self.asked)
        if not factors:
            why = (
                "auto.max_steps_factor is 1" if self.asked.transfer.steps else "transfer.steps is 0"
            )
            self._decide("steps", str(self._steps(shorter)), f"not searched: {why}")
            return shorter
        assert shorter.loss is not None, "the best rate's transfer finished"
        best, best_loss = shorter, shorter.loss
        told = [f"{self._steps(shorter)} steps {best_loss.mean:.4f}"]
        for factor in factors:
            trial = self.trials.make(best.layers, best.factor, steps_factor=factor)
            if trial is None:
                told.append("more not tried: the search budget (auto.max_transfers) has no room")
                break
            if trial.loss is None:
                told.append(f"{self._steps(trial)} steps {trial.outcome}")
                break
            better, numbers = _beside(best_loss, trial.loss)
            told.append(f"{self._steps(trial)} steps {numbers}")
            self.trials.drop(best if better else trial)
            if not better:
                break
            best, best_loss = trial, trial.loss
        else:
            told.append(f"more not tried (auto.max_steps_factor {self.auto.max_steps_factor})")
        self._decide(
            "steps",
            f"{self._steps(best)} (x{best.steps_factor})",
            f"held-out loss with {best.layers} layers less: {', '.join(told)}",
        )
        return best

    def _steps(self, trial: Trial) -> int:
        return trial.steps_factor * self.asked.transfer.steps

    def _measured(self, loss: HeldOutLoss) -> str:
        ratio, error = loss.ratio(self.raw[0]), loss.above(self.raw[0])[1]
        return f"{percent(ratio)} (standard error {100 * ratio * error:.2g} %)"

    def _meets(self, trial: Trial) -> bool:
        assert self.auto.max_increase is not None, "asked only with a quality budget"
        return (
            trial.loss is not None and trial.loss.ratio(self.raw[0]) <= 1 + self.auto.max_increase
        )

    def _explain_depth(self, best: Trial) -> None:
        assert self.auto.max_increase is not None, "asked only with a quality budget"
        told = [
            f"{trial.layers} at x{trial.factor:.2g} in {self._steps(trial)} steps: "
            f"{self._measured(trial.loss)}"
            for trial in sorted(self.trials.made, key=lambda trial: trial.layers)
            if trial.loss is not None and (trial.factor == 1 or trial.factor == best.factor)
        ]
        self._decide(
            "layers",
            str(best.layers),
            f"the deepest tried within {percent(1 + self.auto.max_increase)} after transfer, of "
            f"at most {self.deepest}: {', '.join(told)}",
        )

    def _impossible(self) -> RunError:
        """No depth that was tried meets the quality budget: what was measured, what helps."""
        assert self.auto.max_increase is not None, "asked only with a quality budget"
        told = [f"1 layer less: {self._measured(self.raw[1])} without recovery"]
        told += [
            f"{trial.layers} less: {self._measured(trial.loss)} after transfer"
            for trial in sorted(self.trials.made, key=lambda trial: trial.layers)
            if trial.loss is not None
        ]
        found, remedy = "not even 1 layer less stays within", "raise --max-increase"
        if self.trials.stopped_at_budget:
            found, remedy = "no depth tried is within", "raise auto.max_transfers, --max-increase"
        return RunError(
            f"{found} {percent(1 + self.auto.max_increase)} perplexity on "
            f"{len(self.split.held_out)} held-out sequences; {'; '.join(told)}; {remedy} or give "
            "more text (calibration.num_sequences), and start anew with --overwrite"
        )

    def _record(self, depth: int, order: tuple[int, ...], settings: tuple[str, ...]) -> AutoRecord:
        after: dict[int, float] = {}
        for trial in self.trials.made:
            if trial.loss is not None:
                ratio = trial.loss.ratio(self.raw[0])
                after[trial.layers] = min(ratio, after.get(trial.layers, ratio))
        curve = tuple(
            DepthPoint(
                layers=layers,
                removed=order[layers - 1] if layers else None,
                loss=loss.mean,
                raw_ratio=loss.ratio(self.raw[0]),
                standard_error=loss.above(self.raw[0])[1],
                ratio=after.get(layers),
            )
            for layers, loss in enumerate(self.raw)
        )
        limit = 1 + self.auto.raw_limit
        rounds = len(order) if self.asked.selection.method == "gates" else 0
        self.run.costs["search"] = self.notes.cost()
        return AutoRecord(
            held_out_sequences=len(self.split.held_out),
            training_sequences=len(self.split.training.input_ids),
            sequence_length=self.split.held_out.shape[1],
            max_increase=self.auto.max_increase,
            raw_limit=self.auto.raw_limit,
            dense_loss=self.raw[0].mean,
            stability=tuple(self.stability),
            order=self.order,
            removal_order=order,
            curve=curve,
            knee=max(point.layers for point in curve if point.raw_ratio <= limit),
            transfers=tuple(trial.as_record(self.raw[0]) for trial in self.trials.made),
            decisions=tuple(self.decisions),
            layers=depth,
            settings=settings,
            plan=plan_search(self.asked, self.num_layers, self.run.needed_layers()),
            gate_trainings=2 * len(self.stability) + rounds,
            max_transfers=self.auto.max_transfers,
            stopped_at_budget=self.trials.stopped_at_budget,
            warnings=tuple(self.warnings),
            seconds=self.run.costs["search"]["seconds"],
        )

    def _decide(self, setting: str, value: str, reason: str) -> None:
        self.decisions.append(Decision(setting=setting, value=value, reason=reason))

    def _dense(self) -> PreTrainedModel:
        """The model as it came, loaded when it is first needed."""
        if self.model is None:
            self.model = self.run.load()
        return self.model

    def _release(self) -> None:
        self.model = None
        free_memory()


def _beside(best: HeldOutLoss, other: HeldOutLoss) -> tuple[bool, str]:
    """Whether `other` is lower by more than the standard error, and the numbers."""
    lower, error = best.above(other)
    how = "better" if lower > error else "worse" if -lower > error else "a tie"
    return lower > error, (f"{other.mean:.4f} ({how}: {-lower:+.4f}, standard error {error:.4f})")


def _why_lambda2(recipe: Recipe) -> str:
    if not recipe.transfer.enabled:
        return "not searched: there is no transfer"
    if recipe.transfer.closing in ("local", "refit", "at_once"):
        return "not in use: the layers are closed from the first step on"
    return "not searched: the recipe's own"

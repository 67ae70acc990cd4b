"""The work of a search that a resumed search does not repeat: named results, and transfers.

Results are kept in the run folder's auto.json, under a name each, with what they cost. A transfer
is a whole stage 2 in a folder of its own, OUT.run/search/NAME, resumable like any other; the one
that wins becomes the run's.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from trsp.pruner.auto_record import Outcome, TransferTrial
from trsp.pruner.checkpoint import load_model, open_checkpoint
from trsp.pruner.errors import RunError
from trsp.pruner.gated_model import GatedModel
from trsp.pruner.held_out import HeldOutLoss, SplitCalibration, held_out_loss
from trsp.pruner.layer_map import LayerMap
from trsp.pruner.recipe import TransferRecipe
from trsp.pruner.run import Run, free_memory
from trsp.pruner.transfer import autocast


class Notes:
    """Named results of finished work."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._notes = run.folder.read_record("auto") or {"schema_version": 1, "done": {}}

    def once(self, name: str, work: Callable[[], Any]) -> Any:
        """The result of `work`, which JSON can hold, from this leg of the run or an earlier one."""
        done: dict[str, Any] = self._notes["done"]
        if name not in done:
            with self._run.stage("search"):
                value = work()
            done[name] = {"value": value, "cost": self._run.costs.pop("search")}
            self._run.folder.write_record("auto", self._notes)
        return done[name]["value"]

    def cost(self) -> dict[str, Any]:
        """Of everything done, in all legs: seconds, and the highest peak of memory."""
        costs = [entry["cost"] for entry in self._notes["done"].values()]
        peaks = [cost["peak_bytes"] for cost in costs if cost["peak_bytes"] is not None]
        return {
            "device": self._run.device,
            "seconds": sum(cost["seconds"] for cost in costs),
            "peak_bytes": max(peaks, default=None),
            "start_bytes": None,
        }


@dataclass(frozen=True)
class Trial:
    """One transfer without the first `layers` of the removal order, at `factor` times the rate.

    Attributes:
        steps_factor: times the recipe's steps; so many transfers it counts as.
        halfway: the held-out loss after half of the steps, where there are two at least.
        loss: of the weights as they were written; None where it was stopped.
    """

    layers: int
    factor: float
    learning_rate: float
    outcome: Outcome
    halfway: HeldOutLoss | None
    loss: HeldOutLoss | None
    steps_factor: int = 1

    @property
    def name(self) -> str:
        return _name(self.layers, self.factor, self.steps_factor)

    def as_record(self, dense: HeldOutLoss) -> TransferTrial:
        """What the report says of it."""
        loss = self.loss
        return TransferTrial(
            layers=self.layers,
            factor=self.factor,
            steps_factor=self.steps_factor,
            learning_rate=self.learning_rate,
            outcome=self.outcome,
            halfway_loss=None if self.halfway is None else self.halfway.mean,
            loss=None if loss is None else loss.mean,
            ratio=None if loss is None else loss.ratio(dense),
            standard_error=None if loss is None else loss.above(dense)[1],
        )


def _name(layers: int, factor: float, steps_factor: int) -> str:
    return f"transfer-{layers}-x{factor:.6g}{_longer('-steps-x{}', steps_factor)}"


def _longer(text: str, steps_factor: int) -> str:
    return "" if steps_factor == 1 else text.format(steps_factor)


class _BehindHalfwayError(Exception):
    """A transfer is worse than the best one was at the same step."""


class Trials:
    """All transfers of one search in the order they were asked for.

    They take at most `max_transfers` times the recipe's steps.
    """

    def __init__(
        self,
        run: Run,
        notes: Notes,
        split: SplitCalibration,
        layer_map: LayerMap,
        *,
        peak_rate: float,
        max_transfers: int,
    ) -> None:
        self.made: list[Trial] = []
        self.stopped_at_budget = False
        self._run, self._notes, self._split = run, notes, split
        self._layer_map, self._peak_rate, self._max = layer_map, peak_rate, max_transfers

    @property
    def spent(self) -> int:
        """What the transfers made count as."""
        return sum(trial.steps_factor for trial in self.made)

    def make(
        self,
        layers: int,
        factor: float = 1.0,
        *,
        steps_factor: int = 1,
        best: Trial | None = None,
    ) -> Trial | None:
        """One transfer, stopped halfway where `best` was ahead there; None: none may be made.

        A transfer that diverges at another rate or with more steps than the recipe's is an answer;
        the recipe's own is the run's failure.

        Raises:
            RunError: out of memory, or the transfer of the recipe's own settings failed.
        """
        if self.spent + steps_factor > self._max:
            self.stopped_at_budget = True
            return None
        name, rate = _name(layers, factor, steps_factor), factor * self._peak_rate
        found = self._notes.once(
            name, lambda: self._transfer(layers, factor, steps_factor, rate, best)
        )
        halfway, loss = (
            None if found[key] is None else HeldOutLoss(tuple(found[key]))
            for key in ("halfway", "loss")
        )
        trial = Trial(layers, factor, rate, found["outcome"], halfway, loss, steps_factor)
        self.made.append(trial)
        if loss is None:
            self.drop(trial)
        return trial

    def drop(self, trial: Trial | None) -> None:
        """Free the disk space of a transfer that will not be the run's."""
        if trial is not None:
            shutil.rmtree(self._run.folder.search(trial.name).path)

    def adopt(self, trial: Trial) -> None:
        """Make this transfer the run's own, as if the run had made it; free the others' space."""
        folder = self._run.folder
        if not folder.is_transferred():
            child = folder.search(trial.name)
            record = child.read_record("transfer_record")
            assert record is not None, "the record is written before the weights are published"
            folder.write_record("transfer_record", record)
            child.transferred.rename(folder.transferred)
        folder.drop_searches()

    def _transfer(
        self, layers: int, factor: float, steps_factor: int, rate: float, best: Trial | None
    ) -> dict[str, Any]:
        recipe = self._run.recipe.transfer
        if factor != 1:
            recipe = recipe.model_copy(update={"learning_rate": rate})
        recipe = recipe.model_copy(update={"steps": steps_factor * recipe.steps})
        number, longer = len(self.made) + 1, _longer(", steps x{}", steps_factor)
        child = replace(
            self._run,
            recipe=self._run.recipe.model_copy(update={"transfer": recipe}),
            folder=self._run.folder.search(_name(layers, factor, steps_factor)),
            progress=lambda task, done, total: self._run.progress(
                f"try {number}, {layers} layers, x{factor:.2g}{longer}: {task}", done, total
            ),
            costs={},
        )
        layer_map = self._layer_map.prefix(layers)
        outcome: Outcome = "finished"
        loss = None
        try:
            child.transfer(
                layer_map,
                self._split.training,
                on_step=self._at_half(child, recipe, layer_map, best),
            )
            free_memory()
            loss = self._written_loss(child, layer_map)
        except _BehindHalfwayError:
            outcome = "stopped halfway"
        except RunError as error:
            if factor == steps_factor == 1 or isinstance(error.__cause__, torch.OutOfMemoryError):
                raise
            outcome = "diverged"
        free_memory()
        halfway = child.folder.read_record("halfway")
        return {
            "outcome": outcome,
            "halfway": None if halfway is None else halfway["each"],
            "loss": None if loss is None else list(loss.each),
        }

    def _at_half(
        self, child: Run, recipe: TransferRecipe, layer_map: LayerMap, best: Trial | None
    ) -> Callable[[int, PreTrainedModel], None]:
        """What a transfer calls after each step: measure at half of them, and give up if behind."""

        def check(step: int, model: PreTrainedModel) -> None:
            if step != recipe.steps // 2:
                return
            with autocast(model, recipe), GatedModel(model, fuse_norms="off") as gated:
                loss = self._measure(gated, layer_map)
            child.folder.write_record("halfway", {"each": list(loss.each)})
            if best is not None and best.halfway is not None:
                worse, error = loss.above(best.halfway)
                if worse > error:
                    raise _BehindHalfwayError

        return check

    def _written_loss(self, child: Run, layer_map: LayerMap) -> HeldOutLoss:
        """Of the weights as they were written, in the checkpoint's own dtype."""
        trust = child.trust_remote_code
        checkpoint = open_checkpoint(child.folder.transferred, trust_remote_code=trust)
        model = load_model(checkpoint, device=child.device, trust_remote_code=trust)
        with GatedModel(model, fuse_norms="off") as gated:
            return self._measure(gated, layer_map)

    def _measure(self, gated: GatedModel, layer_map: LayerMap) -> HeldOutLoss:
        recipe = self._run.recipe.transfer
        batch = recipe.micro_batch_size or recipe.batch_size
        return held_out_loss(gated, self._split.held_out, layer_map.removal_order, batch)

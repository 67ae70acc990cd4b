"""Choose layers by every method under one meter, once for all depths where its picks are nested.

L layers, N calibration sequences of T tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from trsp.bench.baseline_joint import joint_gates
from trsp.bench.baseline_merge import laco_merge, replace_me
from trsp.bench.baseline_orders import NESTED, SELECTORS
from trsp.bench.baseline_streamline import streamline
from trsp.bench.compare_methods import FOLDS, LAYER_CHOICES, ONE_SHOT, Method
from trsp.bench.compare_record import Cost
from trsp.bench.compute_meter import ComputeMeter
from trsp.pruner.config_surgery import layers_that_must_stay
from trsp.pruner.errors import UserError
from trsp.pruner.gated_model import GatedModel
from trsp.pruner.progress import Progress
from trsp.pruner.recipe import Recipe, SelectionRecipe
from trsp.pruner.selection import SelectionState, select_layers


@dataclass(frozen=True)
class Choice:
    """Layers in order of removal, and what finding them cost."""

    removal_order: tuple[int, ...]
    cost: Cost


@dataclass(frozen=True)
class Chooser:
    """What every method chooses with: the dense model, calibration tokens [N, T], the recipe."""

    model: PreTrainedModel
    input_ids: Tensor
    recipe: Recipe
    seed: int
    progress: Progress

    @property
    def device(self) -> str:
        """Where the model is."""
        return str(self.model.device)

    @property
    def num_layers(self) -> int:
        """L."""
        return int(self.model.config.get_text_config(decoder=True).num_hidden_layers)

    def choose(self, method: Method, count: int) -> Choice:
        """The `count` layers that go, by a method that is not nested, and its cost."""
        return self._chosen(method, count)

    def choose_nested(self, method: Method, deepest: int) -> dict[int, Choice]:
        """The layers for each depth up to `deepest`, and the cost of having found just these."""
        if method.selection in LAYER_CHOICES:
            return self._nested(method, deepest)
        if method.selection == ONE_SHOT:
            return self._one_shot_gates(deepest)
        return self._gates(method.selection_recipe(self.recipe), deepest)

    def fold(self, method: Method, count: int) -> Choice:
        """Let a method of FOLDS change the kept weights in place; the layers that then go.

        LLM-Streamline's layer is trained for as many steps, of as many sequences, as TRSP.
        """
        assert method.selection in FOLDS, method.selection
        steps, batch_size = 0, self.recipe.transfer.batch_size
        words: dict[str, Any] = {
            "num_to_remove": count, "batch_size": batch_size, "progress": self.progress,
        }  # fmt: skip
        with ComputeMeter(self.device) as meter, GatedModel(self.model) as gated:
            if method.selection == "streamline":
                steps = self.recipe.transfer.steps
                order = streamline(
                    gated,
                    self.input_ids,
                    steps=steps,
                    learning_rate=self.recipe.transfer.local_learning_rate,
                    seed=self.seed,
                    **words,
                )
            elif method.selection == "laco":
                # It runs the model for every merge that it tries, as SLEB for every layer.
                sample = self.recipe.selection.verification_sequences
                order = laco_merge(gated, self.input_ids[:sample], **words)
            else:
                order = replace_me(gated, self.input_ids, **words)
        tokens = steps * batch_size * self.input_ids.shape[1]
        return Choice(order, _cost(meter).model_copy(update={"steps": steps, "tokens": tokens}))

    def _chosen(
        self,
        method: Method,
        count: int,
        on_pick: Callable[[ComputeMeter], None] = lambda meter: None,
    ) -> Choice:
        # A masked loss is taken on as many sequences as TRSP's own verification sees.
        by_loss = method.selection in ("sleb", "one_shot_loss")
        sample = self.recipe.selection.verification_sequences if by_loss else len(self.input_ids)
        # Chance would lose by the layers that every other choice avoids, and tell nothing else; the
        # joint gates stand for a way to train gates, beside those that TRSP trains with protection.
        words: dict[str, Any] = {}
        if method.selection in ("random", "joint_gates"):
            words["never"] = self._protected(self.recipe)
        with ComputeMeter(self.device) as meter, GatedModel(self.model) as gated:
            order = {**SELECTORS, "joint_gates": joint_gates}[method.selection](
                gated,
                self.input_ids[:sample],
                num_to_remove=count,
                seed=self.seed,
                batch_size=self.recipe.selection.batch_size,
                progress=self.progress,
                on_pick=lambda: on_pick(meter),
                **words,
            )
        return Choice(order, _cost(meter))

    def _nested(self, method: Method, deepest: int) -> dict[int, Choice]:
        laps: list[Cost] = []
        whole = self._chosen(method, deepest, lambda meter: laps.append(_cost(meter)))
        # A method that scores all layers at once tells of no pick: each depth costs all of it.
        return _prefixes(whole, laps or [whole.cost] * deepest)

    def _gates(self, settings: SelectionRecipe, deepest: int) -> dict[int, Choice]:
        laps: list[Cost] = []
        with ComputeMeter(self.device) as meter:
            state = self._select(settings, deepest, lambda _state: laps.append(_cost(meter)))
        return _prefixes(Choice(state.picks, _cost(meter)), laps)

    def _one_shot_gates(self, deepest: int) -> dict[int, Choice]:
        """The gates of the first round alone decide: all smallest ones at once."""
        settings = self.recipe.selection.model_copy(update={"method": "gates", "num_candidates": 1})
        with ComputeMeter(self.device) as meter:
            state = self._select(settings, 1, lambda _state: None)
        gates = state.rounds[0]["gates"]
        gated = [layer for layer in range(self.num_layers) if gates[layer] is not None]
        order = tuple(sorted(gated, key=lambda layer: abs(gates[layer])))
        if deepest > len(order):
            raise UserError(
                f"{deepest} layers are to go, {len(order)} are not protected "
                "(selection.protected); protect fewer or remove fewer"
            )
        return _prefixes(Choice(order, _cost(meter)), [_cost(meter)] * deepest)

    def _protected(self, recipe: Recipe) -> frozenset[int]:
        needed = layers_that_must_stay(self.model.config.to_dict())
        return recipe.protected_layers(self.num_layers) | needed.keys()

    def _select(
        self, settings: SelectionRecipe, count: int, on_round: Callable[[SelectionState], None]
    ) -> SelectionState:
        recipe = self.recipe.model_copy(update={"selection": settings})
        return select_layers(
            self.model,
            self.input_ids,
            settings,
            num_to_remove=count,
            protected=self._protected(recipe),
            seed=self.seed,
            on_round=on_round,
            progress=self.progress,
        )


def is_nested(method: Method) -> bool:
    """Whether its layers for k are the first k of its layers for n."""
    return method.selection in NESTED or method.selection not in (*LAYER_CHOICES, *FOLDS)


def _prefixes(whole: Choice, laps: list[Cost]) -> dict[int, Choice]:
    """A choice for each depth from the laps of one run; the peak is the whole run's."""
    peak = {"peak_bytes": whole.cost.peak_bytes}
    return {
        count: Choice(whole.removal_order[:count], lap.model_copy(update=peak))
        for count, lap in enumerate(laps, start=1)
    }


def _cost(meter: ComputeMeter) -> Cost:
    return Cost.model_validate(meter.spent().to_document())

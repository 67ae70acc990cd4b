"""One cell of a comparison: a method at a depth with a seed, chosen, trained and measured.

Methods that choose the same layers and train alike share what they trained.

N calibration sequences of T tokens, L layers.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from trsp.bench.baseline_orders import NotApplicableError
from trsp.bench.compare_bench import Bench, Measured
from trsp.bench.compare_methods import FOLDS, REFERENCE, Method, parse_method
from trsp.bench.compare_record import Cell, Cost
from trsp.bench.compare_selection import Choice, Chooser, is_nested
from trsp.bench.compute_meter import ComputeMeter
from trsp.pruner.recipe import TransferRecipe
from trsp.pruner.refit import refit_warnings
from trsp.pruner.transfer import teacher_of, transfer


@dataclass(frozen=True)
class _Trained:
    """What one training gave: shared by all methods that ask for just this one."""

    cost: Cost
    last_step_flops: int
    jump: float
    found: Measured
    note: str | None


def make_cell(bench: Bench, method: Method, count: int, seed: int) -> Cell:
    """Choose, train if the method trains, measure.

    A method that this model does not allow gives a cell without quality that says why.

    Raises:
        UserError: layers that cannot be taken. RunError: a loss is not finite.
    """
    shared: dict[str, Any] = {
        "method": method.name,
        "label": method.label,
        "num_removed": count,
        "seed": seed,
    }
    folded = None
    try:
        if method.selection in FOLDS:
            choice, folded = _fold(bench, method, count, seed)
        else:
            choice = _choice(bench, method, count, seed)
    except NotApplicableError as reason:
        nothing = Cost(flops=0, seconds=0.0)
        return Cell(**shared, removal_order=(), selection=nothing, quality=None, note=str(reason))
    shared |= {"removal_order": choice.removal_order, "selection": choice.cost}
    if method.recovery is None:
        found = _raw(bench, choice.removal_order) if folded is None else folded
        return Cell(**shared, quality=found.quality, tasks=found.tasks)
    recipe = method.transfer_recipe(bench.options.recipe)
    trained = _trained(bench, method, recipe, choice.removal_order, seed)
    if method.budget == "flops":
        budget = _reference_flops(bench, count, seed)
        spare = budget - choice.cost.flops - trained.cost.flops
        steps = recipe.steps + spare // trained.last_step_flops
        if steps < 1:
            note = f"choosing alone takes {choice.cost.flops / budget:.2f} of TRSP's operations"
            return Cell(**shared, quality=None, note=note)
        recipe = recipe.model_copy(update={"steps": int(steps)})
        trained = _trained(bench, method, recipe, choice.removal_order, seed)
    return Cell(
        **shared,
        training=trained.cost,
        quality=trained.found.quality,
        tasks=trained.found.tasks,
        jump=trained.jump,
        note=trained.note,
    )


def _choice(bench: Bench, method: Method, count: int, seed: int) -> Choice:
    """The layers a method takes; where its picks are nested, one search serves every depth."""
    options, calibration = bench.options, bench.calibrations[seed]
    selection = Method(method.selection)
    nested = is_nested(selection)
    depth = max(options.num_removed) if nested else count
    kept = bench.choices.setdefault((method.selection, seed), {})
    if count in kept:
        return kept[count]

    def make() -> dict[str, Any]:
        with bench.dense() as model:
            chooser = Chooser(model, calibration.input_ids, options.recipe, seed, bench.progress)
            found = (
                chooser.choose_nested(selection, depth)
                if nested
                else {depth: chooser.choose(selection, depth)}
            )
        return {
            str(number): {"order": list(choice.removal_order), "cost": choice.cost.model_dump()}
            for number, choice in found.items()
        }

    key = {
        "selection": method.selection,
        "settings": selection.selection_recipe(options.recipe).model_dump(mode="json"),
        "depth": depth,
        "seed": seed,
        "calibration": calibration.sha256,
    }
    for number, entry in bench.kept(key, make).items():
        kept[int(number)] = Choice(tuple(entry["order"]), Cost(**entry["cost"]))
    return kept[count]


def _fold(bench: Bench, method: Method, count: int, seed: int) -> tuple[Choice, Measured]:
    """The layers taken by a method that changes kept weights as it chooses, and its quality."""

    def make() -> dict[str, Any]:
        with bench.dense() as model:
            chooser = _chooser(bench, seed)
            choice = chooser.fold(method, count)
            found = bench.measure(model, choice.removal_order)
        return {
            "order": list(choice.removal_order),
            "cost": choice.cost.model_dump(),
            "found": found.model_dump(),
        }

    result = bench.kept(_fold_key(bench, method, count, seed), make)
    choice = Choice(tuple(result["order"]), Cost(**result["cost"]))
    return choice, Measured.model_validate(result["found"])


def _fold_key(bench: Bench, method: Method, count: int, seed: int) -> dict[str, Any]:
    recipe = bench.options.recipe.transfer
    trains = method.selection == "streamline"
    return {
        "fold": method.selection,
        "count": count,
        "seed": seed,
        "calibration": bench.calibrations[seed].sha256,
        "batch_size": recipe.batch_size,
        "steps": recipe.steps if trains else None,
        "learning_rate": recipe.local_learning_rate if trains else None,
    }


def _chooser(bench: Bench, seed: int) -> Chooser:
    input_ids = bench.calibrations[seed].input_ids
    return Chooser(bench.model, input_ids, bench.options.recipe, seed, bench.progress)


def _raw(bench: Bench, removed: tuple[int, ...]) -> Measured:
    """Quality with layers gone and nothing else done."""

    def make() -> dict[str, Any]:
        return bench.measure(bench.model, removed).model_dump()

    return Measured.model_validate(bench.kept({"removed": sorted(removed)}, make))


def _trained(
    bench: Bench,
    method: Method,
    recipe: TransferRecipe,
    removal_order: tuple[int, ...],
    seed: int,
) -> _Trained:
    """Train without these layers; the teacher, where there is one, is always the dense model."""
    calibration = bench.calibrations[seed]
    folds = method.selection in FOLDS
    # The order matters only where layers close one after the other.
    order = removal_order if recipe.closing == "progressive" else tuple(sorted(removal_order))

    def make() -> dict[str, Any]:
        laps: list[int] = []
        with bench.dense() as model:
            torch.manual_seed(seed)
            with ComputeMeter(bench.device) as teaching:
                teacher = teacher_of(model, calibration.input_ids, recipe, bench.progress)
            if folds:
                # Its cost is in that of choosing.
                _chooser(bench, seed).fold(method, len(order))
            with ComputeMeter(bench.device) as meter:
                result = transfer(
                    model,
                    calibration.input_ids,
                    recipe,
                    dropped=order,
                    seed=seed,
                    teacher=teacher,
                    on_step=lambda step, snapshot: laps.append(meter.flops),
                    progress=bench.progress,
                )
            found = bench.measure(model, order)
        parts = teaching.spent(), meter.spent()
        peaks = [part.peak_bytes for part in parts]
        cost = Cost(
            flops=sum(part.flops for part in parts),
            seconds=sum(part.seconds for part in parts),
            peak_bytes=None if None in peaks else max(peak or 0 for peak in peaks),
            steps=recipe.steps,
            tokens=recipe.steps * recipe.batch_size * calibration.input_ids.shape[1],
        )
        return {
            "cost": cost.model_dump(),
            "last_step_flops": laps[-1] - (laps[-2] if len(laps) > 1 else 0) if laps else 0,
            "jump": result.loss_after_deletion - result.loss_before_deletion,
            "note": "; ".join(refit_warnings([asdict(entry) for entry in result.refits])) or None,
            "found": found.model_dump(),
        }

    key = {
        "transfer": recipe.model_dump(mode="json"),
        "order": list(order),
        "seed": seed,
        "calibration": calibration.sha256,
    }
    if folds:
        key |= {"behind": _fold_key(bench, method, len(order), seed)}
    result = bench.kept(key, make)
    return _Trained(
        cost=Cost(**result["cost"]),
        last_step_flops=result["last_step_flops"],
        jump=result["jump"],
        note=result["note"],
        found=Measured.model_validate(result["found"]),
    )


def _reference_flops(bench: Bench, count: int, seed: int) -> int:
    """What all of TRSP spends at this depth."""
    reference = parse_method(REFERENCE)
    choice = _choice(bench, reference, count, seed)
    recipe = reference.transfer_recipe(bench.options.recipe)
    trained = _trained(bench, reference, recipe, choice.removal_order, seed)
    return choice.cost.flops + trained.cost.flops

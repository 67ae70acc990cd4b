"""`trsp compare`: many ways to make one model shallower, by one protocol, in one table.

Cells are independent and stored one by one, so an interrupted comparison goes on where it was.
Methods that choose the same layers and train alike share what they trained.

N calibration sequences of T tokens, L layers.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import torch
from transformers import PreTrainedModel

from trsp.bench.compare_bench import CELLS_VERSION, Bench, CompareOptions
from trsp.bench.compare_calibration import read_calibrations, written_calibrations
from trsp.bench.compare_methods import FOLDS, REFERENCE, Method, parse_method
from trsp.bench.compare_record import Cell, CompareRecord, Cost, DenseModel
from trsp.bench.compare_selection import Choice, Chooser, is_nested
from trsp.bench.compute_meter import ComputeMeter
from trsp.bench.domain_quality import DomainQuality, Quality
from trsp.bench.record import environment
from trsp.pruner.checkpoint import load_model, load_tokenizer, open_checkpoint, sample_weights
from trsp.pruner.errors import UserError
from trsp.pruner.gated_model import GatedModel
from trsp.pruner.progress import Progress, silent
from trsp.pruner.recipe import TransferRecipe
from trsp.pruner.refit import refit_warnings
from trsp.pruner.run import resolve_device
from trsp.pruner.self_text import is_self
from trsp.pruner.text_checks import refuse_same_files, require_no_overlap
from trsp.pruner.transfer import transfer
from trsp.pruner.windows import cut_windows

_REMEDY = "name other files with --eval-data"


@dataclass(frozen=True)
class _Trained:
    """What one training gave: shared by all methods that ask for just this one."""

    cost: Cost
    last_step_flops: int
    jump: float
    quality: dict[str, Quality]
    note: str | None


def run_compare(options: CompareOptions, progress: Progress = silent) -> Iterator[CompareRecord]:
    """Yield the record after every cell, the last one complete.

    Raises:
        UserError: a model or text that cannot be used, or layers that cannot be taken.
        RunError: a loss is not finite.
    """
    bench, dense = _prepare(options, progress)
    wanted = [
        (method, count, seed)
        for seed in options.seeds
        for count in options.num_removed
        for method in options.methods
    ]
    cells: list[Cell] = []
    here = environment()
    for number, (method, count, seed) in enumerate(wanted, start=1):
        progress(f"{method.name}, {count} layers, seed {seed}", number - 1, len(wanted))
        cells.append(_cell(bench, method, count, seed))
        yield CompareRecord(
            dense=dense,
            recipe=options.recipe.model_dump(mode="json"),
            calibrations={str(s): c.as_record() for s, c in bench.calibrations.items()},
            protocols={name: text.protocol() for name, text in bench.texts.items()},
            num_removed=options.num_removed,
            seeds=options.seeds,
            methods=tuple(method.name for method in options.methods),
            cells=tuple(cells),
            complete=number == len(wanted),
            environment=here,
        )


def _prepare(options: CompareOptions, progress: Progress) -> tuple[Bench, DenseModel]:
    """Read model and texts, run the dense model over them."""
    trust = options.trust_remote_code
    checkpoint = open_checkpoint(options.model, trust_remote_code=trust)
    num_layers = checkpoint.num_hidden_layers
    for count in options.num_removed:
        if not 0 < count < num_layers:
            raise UserError(
                f"removing {count} of {num_layers} layers is not pruning; name 1 to "
                f"{num_layers - 1}"
            )
    for method in options.methods:
        method.transfer_recipe(options.recipe)
    if not options.eval_data:
        raise UserError("no held-out text is given: --eval-data NAME=PATH")
    recipe, seeds = options.recipe, options.seeds
    writes_text = is_self(recipe.calibration.data)
    for paths in options.eval_data.values():
        texts_apart = () if writes_text else recipe.calibration.data
        refuse_same_files(texts_apart, [str(path) for path in paths], remedy=_REMEDY)
    tokenizer = load_tokenizer(checkpoint, trust_remote_code=trust)
    calibrations = (
        {} if writes_text else read_calibrations(checkpoint, tokenizer, recipe, seeds, progress)
    )
    model = load_model(
        checkpoint,
        dtype=torch.float32,
        device=resolve_device(recipe.device),
        trust_remote_code=trust,
    )
    if writes_text:
        calibrations = written_calibrations(
            options.folder / "done", checkpoint, tokenizer, model, recipe, seeds, progress
        )
    texts = {}
    for name, paths in options.eval_data.items():
        windows = cut_windows(
            model,
            tokenizer,
            [str(path) for path in paths],
            window=options.window,
            max_tokens=options.max_tokens,
            batch_size=options.batch_size,
            text_field=recipe.calibration.text_field,
            progress=progress,
        )
        for calibration in () if writes_text else calibrations.values():
            require_no_overlap(
                calibration.input_ids,
                windows.ids,
                tokenizer,
                held_out=f"the text {name}",
                remedy=_REMEDY,
            )
        texts[name] = DomainQuality(model, windows, progress)
    identity = {
        "weights": sample_weights(checkpoint),
        "protocols": {name: text.protocol() for name, text in texts.items()},
        "device": str(model.device),
        "trsp": [version("trsp"), CELLS_VERSION],
    }
    bench = Bench(options, model, texts, calibrations, identity, progress)
    dense = DenseModel(
        folder=options.model.resolve().name,
        num_hidden_layers=num_layers,
        num_parameters=model.num_parameters(),
        fingerprint=checkpoint.fingerprint,
        weights_sha256=sample_weights(checkpoint),
        quality=_measure(bench, model, ()),
    )
    return bench, dense


def _cell(bench: Bench, method: Method, count: int, seed: int) -> Cell:
    if method.selection in FOLDS:
        return _folded_cell(bench, method, count, seed)
    choice = _choice(bench, method, count, seed)
    shared: dict[str, Any] = {
        "method": method.name,
        "label": method.label,
        "num_removed": count,
        "seed": seed,
        "removal_order": choice.removal_order,
        "selection": choice.cost,
    }
    if method.recovery is None:
        return Cell(**shared, training=None, quality=_raw(bench, choice.removal_order))
    recipe = method.transfer_recipe(bench.options.recipe)
    trained = _trained(bench, recipe, choice.removal_order, seed)
    if method.budget == "flops":
        budget = _reference_flops(bench, count, seed)
        spare = budget - choice.cost.flops - trained.cost.flops
        steps = recipe.steps + spare // trained.last_step_flops
        if steps < 1:
            note = f"choosing alone takes {choice.cost.flops / budget:.2f} of TRSP's operations"
            return Cell(**shared, training=None, quality=None, note=note)
        recipe = recipe.model_copy(update={"steps": int(steps)})
        trained = _trained(bench, recipe, choice.removal_order, seed)
    return Cell(
        **shared,
        training=trained.cost,
        quality=trained.quality,
        jump=trained.jump,
        note=trained.note,
    )


def _folded_cell(bench: Bench, method: Method, count: int, seed: int) -> Cell:
    """A method that changes kept weights while it chooses; nothing is trained after it."""
    if method.recovery is not None:
        raise UserError(f"{method.name}: {method.selection} stands alone; nothing is trained on it")
    recipe, calibration = bench.options.recipe, bench.calibrations[seed]

    def make() -> dict[str, Any]:
        with bench.dense() as model:
            chooser = Chooser(model, calibration.input_ids, recipe, seed, bench.progress)
            choice = chooser.fold(method, count)
            quality = _measure(bench, model, choice.removal_order)
        return {
            "removal_order": list(choice.removal_order),
            "cost": choice.cost.model_dump(),
            "quality": {name: found.model_dump() for name, found in quality.items()},
        }

    key = {
        "fold": method.selection,
        "count": count,
        "seed": seed,
        "calibration": calibration.sha256,
        "batch_size": recipe.transfer.batch_size,
        "steps": recipe.transfer.steps if method.selection == "streamline" else None,
        "learning_rate": (
            recipe.transfer.learning_rate if method.selection == "streamline" else None
        ),
    }
    found = bench.kept(key, make)
    return Cell(
        method=method.name,
        label=method.label,
        num_removed=count,
        seed=seed,
        removal_order=tuple(found["removal_order"]),
        selection=Cost(**found["cost"]),
        training=None,
        quality={name: Quality(**quality) for name, quality in found["quality"].items()},
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


def _raw(bench: Bench, removed: tuple[int, ...]) -> dict[str, Quality]:
    """Quality with layers gone and nothing else done."""

    def make() -> dict[str, Any]:
        quality = _measure(bench, bench.model, removed)
        return {name: found.model_dump() for name, found in quality.items()}

    found = bench.kept({"removed": sorted(removed)}, make)
    return {name: Quality(**quality) for name, quality in found.items()}


def _trained(
    bench: Bench, recipe: TransferRecipe, removal_order: tuple[int, ...], seed: int
) -> _Trained:
    calibration = bench.calibrations[seed]
    # The order matters only where layers close one after the other.
    order = removal_order if recipe.closing == "progressive" else tuple(sorted(removal_order))

    def make() -> dict[str, Any]:
        laps: list[int] = []
        with bench.dense() as model:
            torch.manual_seed(seed)
            with ComputeMeter(bench.device) as meter:
                result = transfer(
                    model,
                    calibration.input_ids,
                    recipe,
                    dropped=order,
                    seed=seed,
                    on_step=lambda step, snapshot: laps.append(meter.flops),
                    progress=bench.progress,
                )
            spent = meter.spent()
            quality = _measure(bench, model, order)
        cost = Cost(
            flops=spent.flops,
            seconds=spent.seconds,
            peak_bytes=spent.peak_bytes,
            steps=recipe.steps,
            tokens=recipe.steps * recipe.batch_size * calibration.input_ids.shape[1],
        )
        return {
            "cost": cost.model_dump(),
            "last_step_flops": laps[-1] - (laps[-2] if len(laps) > 1 else 0) if laps else 0,
            "jump": result.loss_after_deletion - result.loss_before_deletion,
            "note": "; ".join(refit_warnings([asdict(entry) for entry in result.refits])) or None,
            "quality": {name: found.model_dump() for name, found in quality.items()},
        }

    key = {
        "transfer": recipe.model_dump(mode="json"),
        "order": list(order),
        "seed": seed,
        "calibration": calibration.sha256,
    }
    found = bench.kept(key, make)
    return _Trained(
        cost=Cost(**found["cost"]),
        last_step_flops=found["last_step_flops"],
        jump=found["jump"],
        note=found["note"],
        quality={name: Quality(**quality) for name, quality in found["quality"].items()},
    )


def _reference_flops(bench: Bench, count: int, seed: int) -> int:
    """What all of TRSP spends at this depth."""
    reference = parse_method(REFERENCE)
    choice = _choice(bench, reference, count, seed)
    recipe = reference.transfer_recipe(bench.options.recipe)
    return choice.cost.flops + _trained(bench, recipe, choice.removal_order, seed).cost.flops


def _measure(bench: Bench, model: PreTrainedModel, removed: tuple[int, ...]) -> dict[str, Quality]:
    with GatedModel(model) as gated, gated.masking(removed):
        return {
            name: text.measure(
                lambda ids: gated.logits(ids.to(model.device)),
                lambda task, done, total, name=name: bench.progress(f"{task}, {name}", done, total),
            )
            for name, text in bench.texts.items()
        }

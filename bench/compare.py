"""`trsp compare`: many ways to make one model shallower, by one protocol, in one table.

Cells are independent and stored one by one, so an interrupted comparison goes on where it was.
"""

from collections.abc import Iterator
from importlib.metadata import version

import torch

from trsp.bench.compare_bench import CELLS_VERSION, Bench, CompareOptions
from trsp.bench.compare_calibration import read_calibrations, written_calibrations
from trsp.bench.compare_cells import make_cell
from trsp.bench.compare_record import Cell, CompareRecord, DenseModel, TextFitness
from trsp.bench.compare_tasks import CompareTasks
from trsp.bench.compare_texts import REMEDY, TextsOfComparison
from trsp.bench.domain_quality import DomainQuality
from trsp.bench.record import environment
from trsp.pruner.checkpoint import load_model, load_tokenizer, open_checkpoint, sample_weights
from trsp.pruner.errors import UserError
from trsp.pruner.progress import Progress, silent
from trsp.pruner.run import resolve_device
from trsp.pruner.self_text import is_self
from trsp.pruner.text_checks import refuse_same_files
from trsp.pruner.windows import cut_windows


def run_compare(options: CompareOptions, progress: Progress = silent) -> Iterator[CompareRecord]:
    """Yield the record after every cell, the last one complete.

    Raises:
        UserError: a model or text that cannot be used, or layers that cannot be taken.
        RunError: a loss is not finite.
    """
    bench, dense, fitness = _prepare(options, progress)
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
        cells.append(make_cell(bench, method, count, seed))
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
            fitness=fitness,
        )


def _prepare(options: CompareOptions, progress: Progress) -> tuple[Bench, DenseModel, TextFitness]:
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
    tasks = CompareTasks.load(options.tasks, options.task_limit, options.batch_size)
    recipe, seeds = options.recipe, options.seeds
    writes_text = is_self(recipe.calibration.data)
    for paths in options.eval_data.values():
        texts_apart = () if writes_text else recipe.calibration.data
        refuse_same_files(texts_apart, [str(path) for path in paths], remedy=REMEDY)
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
    checked = TextsOfComparison(tokenizer, calibrations, own_text=writes_text)
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
        checked.add(name, windows.ids)
        texts[name] = DomainQuality(model, windows, progress)
    identity = {
        "weights": sample_weights(checkpoint),
        "protocols": {name: text.protocol() for name, text in texts.items()},
        "device": str(model.device),
        "trsp": [version("trsp"), CELLS_VERSION],
        **tasks.identity(),
    }
    bench = Bench(options, model, tokenizer, texts, tasks, calibrations, identity, progress)
    found = bench.measure(model, ())
    dense = DenseModel(
        folder=options.model.resolve().name,
        num_hidden_layers=num_layers,
        num_parameters=model.num_parameters(),
        fingerprint=checkpoint.fingerprint,
        weights_sha256=sample_weights(checkpoint),
        quality=found.quality,
        tasks=found.tasks,
    )
    losses = {name: quality.loss for name, quality in found.quality.items()}
    return bench, dense, checked.fitness(model, recipe, losses)

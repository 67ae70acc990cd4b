"""The data flow, in order and resumable: selection, transfer, compaction, proof, evaluation.

Each stage reads and writes files of the run folder (run_folder.py); this module owns only their
order, what may not be asked for, and what the run finally reports.
"""

import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from trsp.pruner.auto import search
from trsp.pruner.auto_plan import plan_search
from trsp.pruner.auto_record import AutoRecord
from trsp.pruner.calibration import CalibrationSet, sequence_length
from trsp.pruner.checkpoint import load_model, open_checkpoint, sample_weights
from trsp.pruner.compaction import check_layer_map, compact, plan_compaction
from trsp.pruner.durable import refuse_existing, run_lock, sweep_leftovers
from trsp.pruner.errors import Interrupted, UserError
from trsp.pruner.evaluation import evaluate_perplexity
from trsp.pruner.held_out import count_held_out
from trsp.pruner.layer_map import LayerMap, read_layer_map, write_layer_map
from trsp.pruner.model_card import model_card, verdict
from trsp.pruner.progress import Progress, silent
from trsp.pruner.proof import VllmCheck, prove, require
from trsp.pruner.recipe import Recipe, recipe_yaml
from trsp.pruner.refit import refit_warnings
from trsp.pruner.run import Run, base_model_of, free_memory
from trsp.pruner.run_folder import RunFolder
from trsp.pruner.signals import stopping_on_signals
from trsp.pruner.text_checks import bits_per_byte
from trsp.pruner.vllm_process import require_vllm

REPORT_NAME = "trsp_report.json"


def prune(
    model: Path,
    out: Path,
    recipe: Recipe,
    *,
    layer_map: Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    vllm: VllmCheck = "auto",
    command: str = "",
    progress: Progress = silent,
) -> dict[str, Any]:
    """Checkpoint and text in, proven shallower checkpoint out; the report of the run.

    With layers named (`recipe.keep` or `layer_map`) and no calibration text nothing is trained.

    Raises:
        UserError: what was asked cannot be done.   RunError: the run or its proof failed; `out`
        is as it was before.   Interrupted: a signal; `resume` goes on.
    """
    if vllm == "required":
        require_vllm()
    with run_lock(out), stopping_on_signals() as check:
        sweep_leftovers(out)
        refuse_existing(out, overwrite=overwrite)
        run = Run(
            model, recipe, RunFolder.of(out), trust_remote_code, _checked(progress, check), check
        )
        _keep_inputs_safe(run, out, layer_map)
        given = _given_map(run, layer_map)
        if given is None:
            run.check_target()
        run.refuse_same_files()
        _require_text(recipe, given)
        run.require_trainable()
        if recipe.auto is not None:
            count_held_out(recipe.calibration.num_sequences, recipe.auto.held_out)
        # Before the text: with `--data self` the model writes it, which takes a while.
        run.folder.require_free(resume=resume, overwrite=overwrite)
        run.require_disk(trained=bool(recipe.calibration.data) and recipe.transfer.enabled)
        calibration = run.calibration(resume=resume)
        run.check_evaluation_text(calibration)
        run.folder.begin(_identity(run, given, calibration), resume=resume, overwrite=overwrite)
        run.keep_calibration(calibration)
        try:
            return _run_stages(run, given, calibration, out, overwrite, vllm, command)
        except Interrupted as stop:
            resumable = None if calibration is None else run.folder.path
            raise Interrupted(stop.signal_number, resumable) from stop
        finally:
            if calibration is None:  # nothing was trained: nothing to resume
                run.folder.remove()


def _run_stages(
    run: Run,
    given: LayerMap | None,
    calibration: CalibrationSet | None,
    out: Path,
    overwrite: bool,
    vllm: VllmCheck,
    command: str,
) -> dict[str, Any]:
    searched = None
    if run.recipe.auto is not None:
        assert calibration is not None, "a search without text is refused"
        found = search(run, calibration)
        given, calibration, searched = found.layer_map, found.training, found.record
        run.texts.warnings += searched.warnings
    if given is None:
        assert calibration is not None, "layers are named where there is no text"
        given = run.select(calibration)
    elif calibration is not None:
        given = replace(given, calibration=calibration.as_record())
    record = None
    if calibration is not None and run.recipe.transfer.enabled:
        record = run.transfer(given, calibration)
        run.texts.warnings += refit_warnings(record["refits"])
    if calibration is not None:
        run.measure_calibration_text(calibration, record)
    return _publish(run, given, record, searched, out, overwrite, vllm, command)


def _require_text(recipe: Recipe, given: LayerMap | None) -> None:
    has_text = bool(recipe.calibration.data)
    if not has_text and recipe.auto is not None:
        raise UserError("auto searches by the loss on text: give it with --data")
    if not has_text and given is None:
        raise UserError(
            "nothing says which layers go: give text to learn from (--data), or name the "
            "layers (--keep, --map)"
        )


def _keep_inputs_safe(run: Run, out: Path, layer_map: Path | None) -> None:
    """Refuse outputs that hold an input, or lie in the model: replacing them would delete it."""
    recipe = run.recipe
    texts = (*(() if run.writes_text else recipe.calibration.data), *recipe.evaluation.data)
    inputs = [run.model, *map(Path, texts)]
    if layer_map is not None:
        inputs.append(layer_map)
    for output in (out.resolve(), run.folder.path.resolve()):
        for path in inputs:
            if path.resolve().is_relative_to(output):
                raise UserError(
                    f"{path} is or lies in {output}, which is written; choose another --out"
                )
        if output.is_relative_to(run.model.resolve()):
            raise UserError(f"{output} lies in the model {run.model}; choose another --out")


def plan(
    model: Path,
    out: Path,
    recipe: Recipe,
    *,
    resume: bool = False,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> LayerMap:
    """Stage 1 only: learn which layers go and write their layer map to the file `out`."""
    if recipe.keep is not None:
        raise UserError("keep names the layers already; there is nothing to plan")
    if recipe.auto is not None:
        raise UserError("auto searches for a whole run; leave it out to plan, or use trsp prune")
    if out.is_dir():
        raise UserError(f"{out} is a folder; name the layer map to write (--out layer_map.json)")
    if out.exists() and not overwrite:
        raise UserError(f"{out} exists; choose another file or pass --overwrite")
    if not out.parent.is_dir():
        raise UserError(f"{out.parent} is not a folder; make it first")
    with run_lock(out), stopping_on_signals() as check:
        run = Run(
            model, recipe, RunFolder.of(out), trust_remote_code, _checked(progress, check), check
        )
        _keep_inputs_safe(run, out, None)
        run.check_target()
        run.require_trainable()
        run.folder.require_free(resume=resume, overwrite=overwrite)
        calibration = run.calibration(resume=resume)
        if calibration is None:
            raise UserError("stage 1 learns from text: give it with --data")
        run.folder.begin(_identity(run, None, calibration), resume=resume, overwrite=overwrite)
        run.keep_calibration(calibration)
        try:
            layer_map = run.select(calibration)
        except Interrupted as stop:
            raise Interrupted(stop.signal_number, run.folder.path) from stop
        write_layer_map(layer_map, out)
        run.folder.remove()
        return layer_map


def describe(
    model: Path,
    recipe: Recipe,
    *,
    out: Path,
    layer_map: Path | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> list[str]:
    """What `prune` would do, one line each; reads headers and text, writes nothing.

    Raises:
        UserError: what `prune` would refuse before it begins.
    """
    refuse_existing(out, overwrite=overwrite)
    run = Run(model, recipe, RunFolder.of(out), trust_remote_code)
    _keep_inputs_safe(run, out, layer_map)
    checkpoint, num_layers = run.checkpoint, run.checkpoint.num_hidden_layers
    lines = [f"model      {model}: {num_layers} layers"]
    given = _given_map(run, layer_map)
    run.refuse_same_files()
    run.require_trainable()
    run.check_evaluation_text(None if run.writes_text else run.calibration())
    _require_text(recipe, given)
    has_text, num_sequences = bool(recipe.calibration.data), recipe.calibration.num_sequences
    if has_text:
        length = sequence_length(checkpoint, recipe.calibration.sequence_length)
        origin = ", which the model writes" if run.writes_text else ""
        lines.append(f"text       {num_sequences} sequences of {length} tokens{origin}")
    if given is not None:
        lines += plan_compaction(checkpoint, given).describe().splitlines()
    else:
        run.check_target()
        count = recipe.deepest_to_remove(num_layers, run.needed_layers())
        lines.append(
            f"selection  {_up_to(recipe)}{count} of {num_layers} layers go, by "
            f"{recipe.selection.method}; "
            f"protected: {sorted(run.protected_layers())}"
        )
    if has_text and recipe.transfer.enabled:
        kind = f"LoRA rank {recipe.transfer.lora.rank}" if recipe.transfer.lora else "all weights"
        local = ""
        if recipe.transfer.closing == "local":
            local = f"{recipe.transfer.num_local_steps} steps of local distillation, then "
        lines.append(
            f"transfer   {local}{recipe.transfer.steps} steps of {recipe.transfer.batch_size} "
            f"sequences, {kind}"
        )
    if recipe.auto is not None:
        num_held_out = count_held_out(num_sequences, recipe.auto.held_out)
        lines.append(
            f"search     {num_held_out} of {num_sequences} sequences are held out; "
            f"{plan_search(recipe, num_layers, run.needed_layers()).describe()}"
        )
    return lines


def _up_to(recipe: Recipe) -> str:
    return "" if recipe.auto is None or recipe.auto.max_increase is None else "at most "


def describe_search(model: Path, recipe: Recipe, *, trust_remote_code: bool = False) -> list[str]:
    """How much a search will train at most, before any text is read."""
    if recipe.auto is None:
        return []
    checkpoint = open_checkpoint(model, trust_remote_code=trust_remote_code)
    return [f"search     {plan_search(recipe, checkpoint.num_hidden_layers).describe()}"]


def _given_map(run: Run, layer_map: Path | None) -> LayerMap | None:
    """The layer map the user names, by file or by the layers to keep."""
    recipe = run.recipe
    targets = (recipe.keep, recipe.ratio, recipe.layers)
    if layer_map is not None and any(target is not None for target in targets):
        raise UserError("--map says which layers go; leave out --keep, --ratio and --layers")
    if layer_map is not None and recipe.auto is not None:
        raise UserError("--map says which layers go; leave out --auto, which searches for them")
    if layer_map is not None:
        given = read_layer_map(layer_map)
        check_layer_map(run.checkpoint, given)
        return given
    if run.recipe.keep is None:
        return None
    run.recipe.num_to_remove(run.checkpoint.num_hidden_layers)
    return LayerMap.from_keep(run.base_model(), run.recipe.keep, method=run.method("given"))


def _identity(
    run: Run, given: LayerMap | None, calibration: CalibrationSet | None
) -> dict[str, Any]:
    """What must be the same for a run to be resumed; not how its steps are laid out in memory."""
    document = run.recipe.model_dump(mode="json")
    for name in ("micro_batch_size", "checkpoint_activations"):
        document["transfer"].pop(name)
    return {
        "schema_version": 1,
        "model": sample_weights(run.checkpoint),
        "calibration": None if calibration is None else calibration.sha256,
        "layer map": None if given is None else list(given.removal_order),
        "target": [document["ratio"], document["layers"], document["keep"]],
        "seed": document["seed"],
        "selection": document["selection"],
        "transfer": document["transfer"],
        "auto": document["auto"],
    }


def _publish(
    run: Run,
    layer_map: LayerMap,
    transfer_record: dict[str, Any] | None,
    searched: AutoRecord | None,
    out: Path,
    overwrite: bool,
    vllm: VllmCheck,
    command: str,
) -> dict[str, Any]:
    """Compaction, proof, evaluation: the folder appears under its name only when proven."""
    source = run.model if transfer_record is None else run.folder.transferred
    checkpoint = open_checkpoint(source, trust_remote_code=run.trust_remote_code)
    layer_map = layer_map.with_base_model(base_model_of(checkpoint, run.base_model().name))
    write_layer_map(layer_map, run.folder.layer_map)
    report: dict[str, Any] = {
        "schema_version": 1,
        "trsp_version": version("trsp"),
        "command": command,
        "model": str(run.model),
        "out": str(out),
        "num_hidden_layers": {
            "before": layer_map.base_model.num_hidden_layers,
            "after": len(layer_map.kept),
        },
        "kept": list(layer_map.kept),
        "dropped": list(layer_map.dropped),
        "removal_order": list(layer_map.removal_order),
        "calibration": layer_map.calibration,
        "transfer": transfer_record,
        "auto": None if searched is None else searched.model_dump(mode="json"),
        "evaluation": None,
        "costs": run.costs,
    }
    if run.recipe.evaluation.data:
        dense = _evaluate(run, run.model, "dense")
        report["evaluation"] = {"dense": dense}
        if run.texts.held_out_bytes is not None:
            run.texts.held_out_bits = bits_per_byte(dense["loss"], run.texts.held_out_bytes)
    report["texts"] = run.texts.to_document()
    report["warnings"] = report["texts"].pop("warnings")
    planned = plan_compaction(checkpoint, layer_map)
    report["warnings"] += [*planned.warnings, *planned.notes]

    compaction = ExitStack()

    def prove_and_describe(folder: Path) -> None:
        compaction.close()
        with run.stage("proof"):
            proof = prove(
                folder,
                against=source,
                trust_remote_code=run.trust_remote_code,
                device=run.device,
                vllm=vllm,
                progress=run.progress,
            )
        require(proof)
        report["proof"] = proof.to_document()
        if report["evaluation"] is not None:
            report["evaluation"]["pruned"] = _evaluate(run, folder, "pruned")
            report["verdict"] = verdict(report["evaluation"])
        (folder / "README.md").write_text(model_card(report), "utf-8")
        (folder / REPORT_NAME).write_text(json.dumps(report, indent=1) + "\n", "utf-8")

    compaction.enter_context(run.stage("compaction", device="cpu"))
    with compaction:
        compact(
            checkpoint,
            layer_map,
            out,
            overwrite=overwrite,
            extra_files={"recipe.yaml": recipe_yaml(run.asked)},
            prove=prove_and_describe,
            progress=run.progress,
        )
    return report


def _evaluate(run: Run, folder: Path, label: str) -> dict[str, Any]:
    recipe = run.recipe.evaluation
    checkpoint = open_checkpoint(folder, trust_remote_code=run.trust_remote_code)
    with run.stage(f"evaluation, {label}"):
        model = load_model(checkpoint, device=run.device, trust_remote_code=run.trust_remote_code)
        result = evaluate_perplexity(
            model,
            run.tokenizer(),
            recipe.data,
            window=recipe.window,
            stride=recipe.stride,
            max_tokens=recipe.max_tokens,
            text_field=run.recipe.calibration.text_field,
            progress=lambda task, done, total: run.progress(f"evaluating, {label}", done, total),
        )
        del model
        free_memory()
    return result.to_document()


def _checked(progress: Progress, check: Callable[[], None]) -> Progress:
    """Progress that also stops at a signal: nothing is lost but the step or round under way."""

    def report(task: str, completed: int, total: int) -> None:
        check()
        progress(task, completed, total)

    return report

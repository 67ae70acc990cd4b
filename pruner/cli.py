"""The pruner's commands: parse, call one function of api.py, show its result.

torch and transformers are imported inside commands, so `--help` is instant.
"""

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from trsp.pruner.console import ErrorsAsExitCodes, progress_bars
from trsp.pruner.errors import UserError
from trsp.pruner.interop_cli import Overwrite, Prefix, adapter, export_map
from trsp.pruner.layer_lists import parse_layer_list

app = typer.Typer(
    cls=ErrorsAsExitCodes,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Model = Annotated[Path, typer.Argument(help="checkpoint folder", show_default=False)]
RecipeFile = Annotated[Path | None, typer.Option("--recipe", help="YAML; flags override it")]
Preset = Annotated[str, typer.Option(help="trsp (the default) or paper")]
Ratio = Annotated[float | None, typer.Option(help="part of the layers to remove; 0.25")]
Layers = Annotated[int | None, typer.Option(help="number of layers to remove")]
Keep = Annotated[str | None, typer.Option(help="layers to keep, as 0-5,8,11: no stage 1")]
Data = Annotated[
    list[str] | None,
    typer.Option(help="text, jsonl, parquet, folder, or self: the model writes it; repeatable"),
]
EvalData = Annotated[list[str] | None, typer.Option(help="held-out text: dense beside pruned")]
Auto = Annotated[bool, typer.Option("--auto", help="search for the settings on held-out text")]
MaxIncrease = Annotated[
    float | None, typer.Option(help="with --auto: of perplexity, 0.05 is 5 %; chooses the depth")
]
Seed = Annotated[int | None, typer.Option(help="of sampling and training; 0")]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda")]
Setting = Annotated[list[str] | None, typer.Option("--set", help="section.name=value; repeatable")]
Resume = Annotated[bool, typer.Option("--resume", help="go on where an interrupted run stopped")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="allow the model's own code")]
AsJson = Annotated[bool, typer.Option("--json", help="one JSON document on stdout")]
Vllm = Annotated[str, typer.Option(help="auto, off or required")]


def _command_line() -> str:
    return shlex.join(["trsp", *sys.argv[1:]])


def _show(document: dict[str, Any], as_json: bool, lines: list[str]) -> None:
    if as_json:
        typer.echo(json.dumps(document, indent=1))
    else:
        for line in lines:
            typer.echo(line)


def _words(
    recipe: Path | None,
    preset: str,
    ratio: float | None,
    layers: int | None,
    keep: str | None,
    data: list[str] | None,
    eval_data: list[str] | None,
    seed: int | None,
    device: str | None,
    settings: list[str] | None,
) -> dict[str, Any]:
    """The words of api.recipe_from."""
    return {
        "recipe": recipe,
        "preset": preset,
        "ratio": ratio,
        "layers": layers,
        "keep": None if keep is None else parse_layer_list(keep),
        "data": data or (),
        "eval_data": eval_data or (),
        "seed": seed,
        "device": device,
        "settings": settings or (),
    }


@app.command()
def prune(
    model: Model,
    out: Annotated[Path, typer.Option(help="folder to write; must not exist")],
    recipe: RecipeFile = None,
    preset: Preset = "trsp",
    ratio: Ratio = None,
    layers: Layers = None,
    keep: Keep = None,
    layer_map: Annotated[Path | None, typer.Option("--map", help="layer map: no stage 1")] = None,
    data: Data = None,
    eval_data: EvalData = None,
    auto: Auto = False,
    max_increase: MaxIncrease = None,
    seed: Seed = None,
    device: Device = None,
    settings: Setting = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would be done")] = False,
    vllm: Vllm = "auto",
    trust_remote_code: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Prune a checkpoint and prove the result: select, transfer, delete, verify."""
    words = _words(recipe, preset, ratio, layers, keep, data, eval_data, seed, device, settings)
    words |= {"auto": auto, "max_increase": max_increase}
    from trsp.pruner import api

    if dry_run:
        lines = api.describe(
            model,
            out=out,
            layer_map=layer_map,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
            **words,
        )
        _show({"schema_version": 1, "plan": lines}, as_json, lines)
        return
    for line in api.describe_search(model, trust_remote_code=trust_remote_code, **words):
        typer.echo(line, err=True)
    with progress_bars() as progress:
        report = api.prune(
            model,
            out,
            layer_map=layer_map,
            resume=resume,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
            vllm=_vllm(vllm),
            command=_command_line(),
            progress=progress,
            **words,
        )
    for warning in report["warnings"]:
        typer.echo(f"warning: {warning}", err=True)
    _show(report, as_json, _report_lines(report))


def _vllm(value: str) -> Any:
    if value not in ("auto", "off", "required"):
        raise UserError(f"--vllm {value!r} is unknown; choose auto, off or required")
    return value


def _report_lines(report: dict[str, Any]) -> list[str]:
    count = report["num_hidden_layers"]
    lines = [
        f"{report['out']}: {count['after']} of {count['before']} layers, proven",
        f"kept     {', '.join(map(str, report['kept']))}",
        f"dropped  {', '.join(map(str, report['removal_order']))} (in order of removal)",
    ]
    if report["transfer"]:
        from trsp.pruner.model_card import deletion_words

        transfer = report["transfer"]
        shown = [
            f"{entry['first']} to {entry['last']}: {entry['explained']:.0%}"
            for entry in transfer["refits"]
            if entry["explained"] is not None
        ]
        if shown:
            lines.append(f"moved    of what layers {', '.join(shown)} added to the stream")
        lines.append(f"deletion {deletion_words(transfer)}")
    if report["auto"]:
        from trsp.pruner.auto_record import console_lines

        lines += console_lines(report["auto"])
    if report["evaluation"]:
        for label, result in report["evaluation"].items():
            lines.append(f"{label:<8} perplexity {result['perplexity']:.3f}")
        lines.append(report["verdict"])
    for name, cost in report["costs"].items():
        peak = cost["peak_bytes"]
        memory = "" if peak is None else f", peak {peak / 2**30:.2f} GiB ({cost['device']})"
        lines.append(f"cost     {name}: {cost['seconds']:.1f} s{memory}")
    return lines


def plan(
    model: Path,
    out: Path,
    recipe: Path | None,
    preset: str,
    ratio: float | None,
    layers: int | None,
    data: list[str] | None,
    seed: int | None,
    device: str | None,
    settings: list[str] | None,
    resume: bool,
    overwrite: bool,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Stage 1 only: learn which layers go; writes a layer map.

    The command is in trsp.bench.plan_cli, which also answers `trsp plan --slo` from measured speed.
    """
    words = _words(recipe, preset, ratio, layers, None, data, None, seed, device, settings)
    from trsp.pruner import api

    with progress_bars() as progress:
        layer_map = api.plan(
            model,
            out,
            resume=resume,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
            progress=progress,
            **words,
        )
    document = {
        "schema_version": 1,
        "layer_map": str(out),
        "kept": list(layer_map.kept),
        "removal_order": list(layer_map.removal_order),
    }
    order = ", ".join(map(str, layer_map.removal_order))
    _show(document, as_json, [f"{out}: layers to drop, in order: {order}"])


@app.command()
def compact(
    model: Model,
    layer_map: Annotated[Path, typer.Argument(metavar="MAP", help="layer map")],
    out: Annotated[Path, typer.Option(help="folder to write; must not exist")],
    prefix: Prefix = None,
    overwrite: Overwrite = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the plan only")] = False,
    trust_remote_code: Trust = False,
) -> None:
    """Delete a map's layers from a checkpoint, streaming: no model in memory, nothing trained."""
    from trsp.pruner import api

    description = api.describe_compaction(
        model, layer_map, prefix=prefix, trust_remote_code=trust_remote_code
    )
    typer.echo(description)
    if dry_run:
        return
    with progress_bars() as progress:
        api.compact(
            model,
            layer_map,
            out,
            prefix=prefix,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    typer.echo(f"{out}: written; prove it with: trsp verify {out} --against {model}")


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="pruned checkpoint folder")],
    against: Annotated[Path | None, typer.Option(help="the checkpoint it was cut from")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda")] = "auto",
    vllm: Vllm = "auto",
    trust_remote_code: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Prove that a pruned checkpoint is what its layer map says; exit 1 when it is not."""
    from trsp.pruner import api

    with progress_bars() as progress:
        proof = api.verify(
            folder,
            against=against,
            device=device,
            vllm=_vllm(vllm),
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    document = proof.to_document()
    lines = [f"{c['status']:<8} {c['name']}: {c['detail']}" for c in document["checks"]]
    _show(document, as_json, lines)
    if not proof.passed:
        raise typer.Exit(1)


@app.command("eval")
def evaluate(
    folder: Annotated[Path, typer.Argument(help="checkpoint folder")],
    data: Data = None,
    window: Annotated[int | None, typer.Option(help="tokens; min(2048, context)")] = None,
    stride: Annotated[int | None, typer.Option(help="tokens; the window")] = None,
    bos: Annotated[bool | None, typer.Option("--bos/--no-bos", help="start with BOS")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="score at most so many")] = None,
    batch_size: Annotated[int, typer.Option(help="windows at a time")] = 1,
    dtype: Annotated[str, typer.Option(help="auto, fp32, bf16 or fp16")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda")] = "auto",
    text_field: Annotated[str, typer.Option(help="of jsonl and parquet rows")] = "text",
    trust_remote_code: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Perplexity on local text, with the stamp of its protocol."""
    from trsp.pruner import api

    with progress_bars() as progress:
        document = api.evaluate(
            folder,
            data or (),
            window=window,
            stride=stride,
            add_bos=bos,
            max_tokens=max_tokens,
            batch_size=batch_size,
            dtype=dtype,
            device=device,
            text_field=text_field,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    lines = [f"perplexity {document['perplexity']:.4f}"]
    lines += [f"  {name}: {value}" for name, value in document["protocol"].items()]
    _show(document, as_json, lines)


app.command("map")(export_map)
app.command()(adapter)

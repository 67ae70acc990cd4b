"""`trsp plan`: which layers go (stage 1), or how many must go for a speed target (`--slo`)."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from trsp.pruner import cli as pruner_cli
from trsp.pruner.errors import UserError
from trsp.pruner.interop_cli import Overwrite


def plan(
    model: pruner_cli.Model,
    out: Annotated[Path | None, typer.Option(help="layer_map.json; with --slo slo.json")] = None,
    recipe: pruner_cli.RecipeFile = None,
    preset: pruner_cli.Preset = "trsp",
    ratio: pruner_cli.Ratio = None,
    layers: pruner_cli.Layers = None,
    data: pruner_cli.Data = None,
    seed: pruner_cli.Seed = None,
    device: pruner_cli.Device = None,
    settings: pruner_cli.Setting = None,
    resume: pruner_cli.Resume = False,
    overwrite: Overwrite = False,
    trust_remote_code: pruner_cli.Trust = False,
    slo: Annotated[
        str | None,
        typer.Option(
            help="how many layers must go for a speed target, such as 'median_tpot_ms<=20' or "
            "'output_throughput>=500'"
        ),
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option(help="with --slo: requests in flight; 1")
    ] = None,
    record: Annotated[
        list[Path] | None,
        typer.Option(
            help="with --slo: what trsp bench serve measured of this model; repeatable; without "
            "it three depths are measured"
        ),
    ] = None,
    no_verify: Annotated[
        bool, typer.Option("--no-verify", help="with --slo: do not measure the named depth")
    ] = False,
    num_blocks: Annotated[
        int | None, typer.Option(help="with --slo: blocks of each measurement; 5")
    ] = None,
    num_requests: Annotated[
        int | None,
        typer.Option(help="with --slo: of each measurement; max(10 x concurrency, 200)"),
    ] = None,
    input_len: Annotated[
        int | None, typer.Option(help="with --slo: tokens of a prompt; 256")
    ] = None,
    output_len: Annotated[
        int | None, typer.Option(help="with --slo: tokens of an answer; 128")
    ] = None,
    work: Annotated[
        Path | None,
        typer.Option(
            help="with --slo: folder of the measurements, where the same question goes on; trsp-slo"
        ),
    ] = None,
    as_json: pruner_cli.AsJson = False,
) -> None:
    """Stage 1 only: learn which layers go; writes a layer map. Or with --slo: how many must go.

    --slo fits cost = a + b x layers through measured depths and measures the depth that the line
    names, with random weights, because speed does not depend on them. It ends with 0 when a depth
    meets the target, 1 when none does or the named one misses it.
    """
    stage_one = {
        "--recipe": recipe, "--ratio": ratio, "--layers": layers, "--data": data, "--seed": seed,
        "--device": device, "--set": settings, "--resume": resume, "--overwrite": overwrite,
        "--trust-remote-code": trust_remote_code, "--preset": preset if preset != "trsp" else None,
    }  # fmt: skip
    load = {"--num-requests": num_requests, "--input-len": input_len, "--output-len": output_len}
    measuring = {
        "--record": record, "--no-verify": no_verify, "--concurrency": concurrency,
        "--num-blocks": num_blocks, "--work": work, **load,
    }  # fmt: skip
    if slo is None:
        _refuse(measuring, "means nothing without --slo")
        pruner_cli.plan(
            model,
            out or Path("layer_map.json"),
            recipe,
            preset,
            ratio,
            layers,
            data,
            seed,
            device,
            settings,
            resume,
            overwrite,
            trust_remote_code,
            as_json,
        )
        return
    _refuse(stage_one, "means nothing with --slo, which asks how many layers and not which")
    if record:
        _refuse(load, "means nothing with --record: the load is the record's")
    from trsp.bench.serve_design import ServeOptions
    from trsp.bench.slo import plan_for_slo
    from trsp.bench.slo_answer import refuse_foreign_out, write_slo_plan
    from trsp.bench.slo_target import parse_target

    out = out or Path("slo.json")
    refuse_foreign_out(out)
    answer = plan_for_slo(
        model,
        parse_target(slo),
        concurrency=1 if concurrency is None else concurrency,
        records=record or (),
        options=ServeOptions(
            out=work or Path("trsp-slo"),
            num_blocks=5 if num_blocks is None else num_blocks,
            num_requests=num_requests,
            input_len=256 if input_len is None else input_len,
            output_len=128 if output_len is None else output_len,
        ),
        verify=not no_verify,
        tell=lambda line: typer.echo(line, err=True),
    )
    write_slo_plan(out, answer)
    if as_json:
        typer.echo(json.dumps(answer.model_dump(), indent=1))
    else:
        for line in answer.lines():
            typer.echo(line)
    if answer.num_to_remove is None or answer.verified is False:
        raise typer.Exit(1)


def _refuse(given: Mapping[str, object], why: str) -> None:
    for name, value in given.items():
        if not (value is None or value is False or value == []):
            raise UserError(f"{name} {why}; leave it out")

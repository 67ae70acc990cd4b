"""`trsp plan`: which layers go (stage 1), or how many must go for a speed target (`--slo`)."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from trsp.pruner import cli as pruner_cli
from trsp.pruner.errors import UserError


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
    overwrite: pruner_cli.Overwrite = False,
    trust_remote_code: pruner_cli.Trust = False,
    slo: Annotated[
        str | None, typer.Option(help="speed target, such as 'median_tpot_ms<=20': how many layers")
    ] = None,
    concurrency: Annotated[int, typer.Option(help="with --slo: requests in flight")] = 1,
    record: Annotated[
        list[Path] | None,
        typer.Option(help="with --slo: of trsp bench serve; repeatable; none: measure"),
    ] = None,
    no_verify: Annotated[
        bool, typer.Option("--no-verify", help="with --slo: do not measure the answer")
    ] = False,
    num_blocks: Annotated[int, typer.Option(help="with --slo: blocks of each measurement")] = 5,
    num_requests: Annotated[int | None, typer.Option(help="with --slo: of each load")] = None,
    input_len: Annotated[int, typer.Option(help="with --slo: tokens")] = 256,
    output_len: Annotated[int, typer.Option(help="with --slo: tokens")] = 128,
    work: Annotated[Path, typer.Option(help="with --slo: folder of the measurements")] = Path(
        "trsp-slo"
    ),
    as_json: pruner_cli.AsJson = False,
) -> None:
    """Stage 1 only: learn which layers go; writes a layer map. Or with --slo: how many must go."""
    stage_one = {
        "--recipe": recipe, "--ratio": ratio, "--layers": layers, "--data": data, "--seed": seed,
        "--device": device, "--set": settings, "--resume": resume, "--overwrite": overwrite,
    }  # fmt: skip
    measuring = {"--record": record, "--num-requests": num_requests, "--no-verify": no_verify}
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
    from trsp.bench.serve_design import ServeOptions
    from trsp.bench.slo import parse_target, plan_for_slo, write_slo_plan

    answer = plan_for_slo(
        model,
        parse_target(slo),
        concurrency=concurrency,
        records=record or (),
        options=ServeOptions(
            out=work,
            num_blocks=num_blocks,
            num_requests=num_requests,
            input_len=input_len,
            output_len=output_len,
        ),
        verify=not no_verify,
        tell=lambda line: typer.echo(line, err=True),
    )
    write_slo_plan(out or Path("slo.json"), answer)
    if as_json:
        typer.echo(json.dumps(answer.model_dump(), indent=1))
    else:
        for line in answer.lines():
            typer.echo(line)
    if answer.num_to_remove is None or answer.verified is False:
        raise typer.Exit(1)


def _refuse(given: Mapping[str, object], why: str) -> None:
    for name, value in given.items():
        if value not in (None, False, []):
            raise UserError(f"{name} {why}; leave it out")

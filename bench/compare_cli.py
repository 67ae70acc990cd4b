"""`trsp compare`: parse, call one function, show its record."""

from pathlib import Path
from typing import Annotated

import typer

from trsp.pruner.errors import UserError

RECORD_NAME = "compare.json"


def _list_methods(asked: bool) -> None:
    """`--list` needs no model and no folder."""
    if not asked:
        return
    from trsp.bench.compare_methods import ALL_METHODS, DEFAULT_METHODS, RECOVERIES, SELECTIONS

    typer.echo(f"selections  {', '.join(SELECTIONS)}")
    typer.echo(f"recoveries  {', '.join(RECOVERIES)}")
    typer.echo(f"by default  {', '.join(DEFAULT_METHODS)}")
    typer.echo(f"all         {', '.join(ALL_METHODS)}")
    raise typer.Exit


def compare(
    model: Annotated[Path, typer.Argument(help="checkpoint folder", show_default=False)],
    out: Annotated[Path, typer.Option(help="folder for the record and what is done")],
    data: Annotated[
        list[str] | None,
        typer.Option(help="calibration text, or self: the model writes it; repeatable"),
    ] = None,
    eval_data: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=PATH", help="held-out text; repeatable"),
    ] = None,
    ratio: Annotated[
        list[float] | None, typer.Option(help="part of the layers that goes; repeatable; 0.25")
    ] = None,
    layers: Annotated[list[int] | None, typer.Option(help="how many go; repeatable")] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(help="SELECTION[+RECOVERY[@flops]], or all; repeatable; see --list"),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME|FILE.jsonl",
            help="zero-shot task of choices, by lm-eval's name, or your own file; repeatable",
        ),
    ] = None,
    task_limit: Annotated[int | None, typer.Option(help="first documents of each task")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="repeatable; 0 1 2")] = None,
    recipe: Annotated[Path | None, typer.Option("--recipe", help="YAML; flags override")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="section.name=value; repeatable")
    ] = None,
    window: Annotated[int | None, typer.Option(help="of evaluation, in tokens")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="of each text at most so many")] = None,
    batch_size: Annotated[int, typer.Option(help="windows at a time")] = 4,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="keep what --out holds")] = False,
    list_methods: Annotated[
        bool,
        typer.Option(
            "--list",
            is_eager=True,
            callback=_list_methods,
            help="name selections and recoveries, do nothing",
        ),
    ] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="run the checkpoint's own code")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON document on stdout")] = False,
) -> None:
    """TRSP beside every baseline on your model and text: one protocol, one table."""
    from trsp.bench.compare_methods import ALL_METHODS, DEFAULT_METHODS, parse_method

    names = ALL_METHODS if method == ["all"] else method or DEFAULT_METHODS
    methods = tuple(parse_method(text) for text in names)
    if len(set(methods)) != len(methods):
        raise UserError("a --method is named twice")
    from trsp.bench.compare_settings import check_seeds, check_settings
    from trsp.pruner.recipe import build_recipe

    seeds = check_seeds(seed or (0, 1, 2))
    flags: dict[str, object] = {}
    if data:
        flags["calibration"] = {"data": tuple(data)}
    if device is not None:
        flags["device"] = device
    built = build_recipe(file=recipe, flags=flags, settings=tuple(settings or ()))
    options_of = {
        "--seed": seed,
        "--ratio": ratio,
        "--layers": layers,
        "--eval-data": eval_data,
        "--window": window,
        "--max-tokens": max_tokens,
    }
    given = [name for name, value in options_of.items() if value not in (None, [])]
    for line in check_settings(built, settings or (), given):
        typer.echo(f"note: {line}", err=True)
    _require_folder(out, resume=resume)
    from trsp.bench.compare import run_compare
    from trsp.bench.compare_bench import CompareOptions
    from trsp.bench.compare_record import CompareRecord, write_compare_record
    from trsp.bench.compare_show import show_compare
    from trsp.pruner.checkpoint import open_checkpoint
    from trsp.pruner.console import progress_bars
    from trsp.pruner.durable import run_lock

    options = CompareOptions(
        model=model,
        recipe=built,
        eval_data=named_texts(eval_data or []),
        num_removed=_counts(
            open_checkpoint(model, trust_remote_code=trust_remote_code).num_hidden_layers,
            ratio,
            layers,
        ),
        seeds=seeds,
        methods=methods,
        folder=out,
        window=window,
        max_tokens=max_tokens,
        batch_size=batch_size,
        trust_remote_code=trust_remote_code,
        tasks=tuple(task or ()),
        task_limit=task_limit,
    )
    record: CompareRecord | None = None
    with run_lock(out), progress_bars() as progress:
        for record in run_compare(options, progress):
            write_compare_record(out / RECORD_NAME, record)
    assert record is not None, "there is at least one method, depth and seed"
    for warning in record.warnings:
        typer.echo(f"warning: {warning}", err=True)
    if as_json:
        typer.echo(record.model_dump_json(indent=1))
    else:
        show_compare(record)
        typer.echo(f"record: {out / RECORD_NAME}")


def _require_folder(out: Path, *, resume: bool) -> None:
    """A new folder, or with --resume an older comparison's."""
    if out.is_file():
        raise UserError(f"--out {out}: is a file; name a folder")
    if out.is_dir() and any(out.iterdir()):
        if not resume:
            raise UserError(f"--out {out}: is not empty; --resume goes on with what it holds")
        if not (out / "done").is_dir():
            raise UserError(f"--out {out}: holds no comparison to go on with")
    out.mkdir(parents=True, exist_ok=True)


def _counts(
    num_layers: int, ratios: list[float] | None, layers: list[int] | None
) -> tuple[int, ...]:
    if ratios and layers:
        raise UserError("--ratio and --layers are given; choose one")
    for ratio in ratios or ():
        if not 0 < ratio < 1:
            raise UserError(f"--ratio {ratio} is not within 0 and 1")
    counts = layers or [max(1, round(ratio * num_layers)) for ratio in ratios or [0.25]]
    if len(set(counts)) != len(counts):
        raise UserError(f"two of the depths remove the same number of layers: {sorted(counts)}")
    return tuple(sorted(counts))


def named_texts(words: list[str]) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for word in words:
        name, equals, path = word.partition("=")
        if not (name and equals and path):
            raise UserError(f"--eval-data {word!r}: expected NAME=PATH, such as books=test.txt")
        found.setdefault(name, []).append(Path(path))
    return found

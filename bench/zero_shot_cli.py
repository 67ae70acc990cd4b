"""`trsp tasks`: parse, run tasks on one checkpoint or two, show and keep what came out."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trsp.pruner.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trsp.bench.zero_shot import LoadedTask
    from trsp.bench.zero_shot_record import Metric, ModelRun, ZeroShotRecord
    from trsp.pruner.checkpoint import Checkpoint
    from trsp.pruner.progress import Progress


def tasks(
    folder: Annotated[Path, typer.Argument(help="checkpoint folder")],
    task: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME|FILE.jsonl",
            help="a task of lm-eval, whose data may be downloaded, or your own file; repeatable",
        ),
    ] = None,
    against: Annotated[
        Path | None, typer.Option(help="checkpoint folder of the dense model, to compare with")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="first documents of each task; all")] = None,
    batch_size: Annotated[int, typer.Option(help="requests at a time")] = 1,
    seed: Annotated[int, typer.Option(help="for tasks that sample")] = 0,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda")] = "auto",
    out: Annotated[Path | None, typer.Option(help="record to write, JSON")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="run the checkpoint's own code")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON document on stdout")] = False,
) -> None:
    """Zero-shot accuracy through lm-eval: piqa, winogrande, hellaswag, arc_easy, ... or your file.

    A file has one JSON object a line: {"context": "...", "choices": ["...", "..."], "label": 0} or
    {"prompt": "...", "answer": "..."}; it needs no network.
    """
    from trsp.bench.record import environment
    from trsp.bench.task_file import read_task_file
    from trsp.bench.zero_shot import load_tasks
    from trsp.bench.zero_shot_record import ZeroShotRecord, paired_differences
    from trsp.pruner.checkpoint import open_checkpoint
    from trsp.pruner.console import progress_bars
    from trsp.pruner.durable import atomic_write
    from trsp.pruner.run import resolve_device

    for name, number in (("--limit", limit), ("--batch-size", batch_size)):
        if number is not None and number < 1:
            raise UserError(f"{name} {number}: expected at least 1")
    if out is not None:
        _refuse_foreign(out)
    # Mistakes in files and folders first: they are found in an instant, lm-eval's in seconds.
    words = task or []
    files = [read_task_file(word) for word in words if word.endswith(".jsonl")]
    folders = [folder] if against is None else [folder, against]
    checkpoints = [open_checkpoint(one, trust_remote_code=trust_remote_code) for one in folders]
    loaded = load_tasks([word for word in words if not word.endswith(".jsonl")], files)
    target = resolve_device(device)
    runs = []
    with progress_bars() as progress:
        for checkpoint, label in zip(checkpoints, ("", "against: "), strict=False):
            runs.append(
                _run(
                    checkpoint,
                    loaded,
                    limit=limit,
                    batch_size=batch_size,
                    seed=seed,
                    dtype=dtype,
                    device=target,
                    trust_remote_code=trust_remote_code,
                    progress=_labelled(progress, label),
                )
            )
    record = ZeroShotRecord(
        model=runs[0],
        against=runs[1] if against is not None else None,
        differences=[] if against is None else paired_differences(runs[0].results, runs[1].results),
        limit=limit,
        batch_size=batch_size,
        environment=environment(),
    )
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(out, record.model_dump_json(indent=1) + "\n")
    if as_json:
        typer.echo(record.model_dump_json(indent=1))
    else:
        show_tasks(record)


def _run(
    checkpoint: "Checkpoint",
    loaded: "Sequence[LoadedTask]",
    *,
    limit: int | None,
    batch_size: int,
    seed: int,
    dtype: str,
    device: str,
    trust_remote_code: bool,
    progress: "Progress",
) -> "ModelRun":
    """Load one model and run every task; it is freed before the next one is loaded."""
    from trsp.bench.zero_shot import zero_shot
    from trsp.bench.zero_shot_record import ModelRun
    from trsp.pruner.checkpoint import check_tokenizer, load_model, load_tokenizer, sample_weights

    tokenizer = load_tokenizer(checkpoint, trust_remote_code=trust_remote_code)
    check_tokenizer(checkpoint, tokenizer)
    model = load_model(checkpoint, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    results = zero_shot(
        model,
        tokenizer,
        loaded,
        limit=limit,
        batch_size=batch_size,
        seed=seed,
        progress=progress,
    )
    return ModelRun(
        folder=checkpoint.path.name,
        num_hidden_layers=checkpoint.num_hidden_layers,
        fingerprint=checkpoint.fingerprint,
        weights_sha256=sample_weights(checkpoint),
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(model.device),
        results=results,
    )


def _labelled(progress: "Progress", label: str) -> "Progress":
    def labelled(task: str, completed: int, total: int) -> None:
        progress(label + task, completed, total)

    return labelled


def _refuse_foreign(out: Path) -> None:
    """An older record of tasks is replaced; nothing else is."""
    from trsp.bench.zero_shot_record import read_zero_shot_record

    if out.is_dir():
        raise UserError(f"--out {out}: is a folder; name a file")
    if out.exists():
        try:
            read_zero_shot_record(out)
        except UserError as error:
            raise UserError(
                f"--out {out}: is there and is no record of tasks; give another name"
            ) from error


def show_tasks(record: "ZeroShotRecord") -> None:
    """Print one row a metric, and what is beyond chance."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    title = record.model.folder
    columns = ["task", "metric", "samples", "value"]
    if record.against is not None:
        title += f" beside {record.against.folder}"
        columns[3:] = ["against", "value", "difference", "gained", "lost"]
    table = Table(title=title)
    for column in columns:
        left = column in ("task", "metric")
        table.add_column(column, justify="left" if left else "right", overflow="fold")
    differences = {(one.task, one.metric, one.filter): one for one in record.differences}
    for name, result in record.model.results.items():
        for metric in result.metrics:
            label = metric.name if metric.filter == "none" else f"{metric.name}, {metric.filter}"
            row = [name, label, f"{result.num_samples:,}", _with_error(metric)]
            if record.against is not None:
                row.insert(3, _other(record.against, name, metric))
                found = differences.get((name, metric.name, metric.filter))
                if found is None:
                    row += ["-", "-", "-"]
                else:
                    error = "" if found.stderr is None else f" ± {found.stderr:.4f}"
                    row += [f"{found.difference:+.4f}{error}", f"{found.gained}", f"{found.lost}"]
            table.add_row(*row)
    console.print(table)
    console.print("Zero-shot; ± is one standard error.", markup=False)
    for run in filter(None, (record.model, record.against)):
        for name, result in run.results.items():
            if result.num_truncated:
                console.print(
                    f"{run.folder}, {name}: {result.num_truncated} requests were longer than the "
                    "model's context and lost their beginning",
                    style="yellow",
                    markup=False,
                )
    if record.against is None:
        return
    beyond = [one for one in record.differences if one.beyond]
    for one in beyond:
        console.print(
            f"{one.task} {one.metric}: {one.difference:+.4f} is beyond chance ({one.lost} lost, "
            f"{one.gained} gained; exact test, 5 %)",
            markup=False,
        )
    if not beyond:
        console.print("no difference is beyond chance (exact test, 5 %)", markup=False)


def _with_error(metric: "Metric") -> str:
    return f"{metric.value:.4f}" + ("" if metric.stderr is None else f" ± {metric.stderr:.4f}")


def _other(run: "ModelRun", task: str, metric: "Metric") -> str:
    for one in run.results[task].metrics:
        if (one.name, one.filter) == (metric.name, metric.filter):
            return _with_error(one)
    return "-"

"""The `trsp` command: mounts every package's commands."""

from pathlib import Path
from typing import Annotated, Any

import typer

from trsp.bench.audit_cli import audit
from trsp.bench.compare_cli import compare
from trsp.bench.plan_cli import plan
from trsp.bench.report_cli import report
from trsp.bench.serve_cli import serve as bench_serve
from trsp.bench.zero_shot_cli import tasks
from trsp.pruner.cli import app
from trsp.pruner.errors import UserError
from trsp.serving.cli import mount as mount_serve

bench = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Measure: kernels, serving.")
app.add_typer(bench, name="bench")
app.command()(audit)
app.command()(compare)
app.command()(report)
app.command()(tasks)
bench.command("serve")(bench_serve)
app.command()(plan)
mount_serve(app)


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="show tracebacks of errors")] = False,
) -> None:
    """Make a large language model shallower, prove it, and serve it faster."""


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="folder for everything")] = Path("trsp-demo"),
    seed: Annotated[int, typer.Option(help="the same seed gives the same quality table")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace what is there")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON document on stdout")] = False,
) -> None:
    """Train a small model on the spot, prune it, prove it, compare it. No network, no GPU."""
    from trsp.bench.demo import run_demo, show
    from trsp.pruner.console import progress_bars

    with progress_bars() as progress:
        record = run_demo(out, seed=seed, overwrite=overwrite, progress=progress)
    show(record, as_json=as_json)


@bench.command()
def kernels(
    static: Annotated[bool, typer.Option("--static", help="machine code; no GPU")] = False,
    full: Annotated[bool, typer.Option("--full", help="with --static: every variant")] = False,
    update_baseline: Annotated[
        bool, typer.Option("--update-baseline", help="with --static: accept what is found")
    ] = False,
    traffic: Annotated[bool, typer.Option("--traffic", help="bytes moved; no GPU")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="every arm once on the CPU, no times")
    ] = False,
    compare: Annotated[
        str | None, typer.Option(help="a record's path or a commit", metavar="RECORD|COMMIT")
    ] = None,
    hidden_size: Annotated[list[int] | None, typer.Option(help="repeatable; the sweep")] = None,
    tokens: Annotated[list[int] | None, typer.Option(help="repeatable; the sweep")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="bf16, fp16, fp32, mixed (no gated_difference); bf16")
    ] = None,
    op: Annotated[list[str] | None, typer.Option(help="repeatable; all three")] = None,
    minutes: Annotated[float | None, typer.Option(help="start no case after this; 8")] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="record to write. A measurement always writes one: by default kernels-GPU.json, "
            "in the checkout's bench/records, or in the current folder where trsp is installed"
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON document on stdout")] = False,
    no_bars: Annotated[bool, typer.Option("--no-bars", help="missed bars fail nothing")] = False,
) -> None:
    """Time the fused ops on a GPU against eager, compiled and Liger; or check them without one."""
    given: dict[str, Any] = {
        "--full": full,
        "--update-baseline": update_baseline,
        "--dry-run": dry_run,
        "--hidden-size": hidden_size,
        "--tokens": tokens,
        "--dtype": dtype,
        "--op": op,
        "--minutes": minutes,
        "--out": out,
        "--no-bars": no_bars,
    }
    mode, takes = _kernel_mode(static, traffic, dry_run, compare)
    for name, value in given.items():
        if value not in (None, False, []) and name not in takes:
            raise UserError(f"{name} means nothing to {mode}; leave it out")
    _check_record_file(out)
    failed = _run_kernel_mode(mode, given, compare, as_json)
    if failed:
        raise typer.Exit(1)


def _check_record_file(out: Path | None) -> None:
    """Refuse, before any work, a path that no file can be written to."""
    if out is not None and out.is_dir():
        raise UserError(f"--out {out}: is a folder, expected the path of a file")
    for folder in () if out is None else out.parents:
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--out {out}: {folder} is no folder; choose another path")


def _kernel_mode(
    static: bool, traffic: bool, dry_run: bool, compare: str | None
) -> tuple[str, set[str]]:
    """The mode that was asked for, and the settings it reads."""
    if static + traffic + (dry_run or compare is not None) > 1:
        raise UserError("--static, --traffic and --dry-run or --compare exclude each other")
    if static:
        return "--static", {"--full", "--update-baseline", "--out"}
    if traffic:
        return "--traffic", {"--out"}
    if compare is not None and Path(compare).suffix == ".json":
        return "--compare RECORD", {"--minutes", "--out", "--dry-run"}
    if compare is not None:
        return "--compare COMMIT", {"--op", "--dtype", "--out", "--dry-run"}
    if dry_run:
        return "--dry-run", {"--op", "--dtype", "--out", "--dry-run"}
    return "a measurement", {
        "--hidden-size", "--tokens", "--dtype", "--op", "--minutes", "--out", "--no-bars",
    }  # fmt: skip


def _run_kernel_mode(
    mode: str, given: dict[str, Any], compare: str | None, as_json: bool
) -> list[str]:
    """Do it, show it, and return what failed."""
    out, dry_run = given["--out"], given["--dry-run"]
    if mode == "--static":
        from trsp.bench.static_cost import run_static, show_static

        record = run_static(
            full=given["--full"], out=out, update_baseline=given["--update-baseline"]
        )
        show_static(record, as_json=as_json)
    elif mode == "--traffic":
        from trsp.bench.traffic import run_traffic, show_traffic

        record = run_traffic(out=out)
        show_traffic(record, as_json=as_json)
    elif compare is not None:
        from trsp.bench.kernel_compare import run_comparison, show_comparison

        record = run_comparison(
            compare,
            ops=given["--op"],
            dtype=given["--dtype"],
            minutes=given["--minutes"],
            dry_run=dry_run,
            out=out,
            progress=_tell,
        )
        show_comparison(record, as_json=as_json)
    else:
        from trsp.bench.kernel_run import run_kernels, show_kernels

        record = run_kernels(
            dry_run=dry_run,
            ops=given["--op"],
            hidden_sizes=given["--hidden-size"],
            tokens=given["--tokens"],
            dtype=given["--dtype"],
            minutes=given["--minutes"],
            bars=not given["--no-bars"],
            out=out,
            progress=_tell,
        )
        show_kernels(record, as_json=as_json)
    failed: list[str] = record["failed"]
    return failed


def _tell(line: str) -> None:
    typer.echo(line, err=True)


def main() -> None:
    """Entry point of the console script."""
    app()

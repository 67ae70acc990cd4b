"""The `trsp` command: mounts every package's commands."""

from pathlib import Path
from typing import Annotated

import typer

from trsp.pruner.cli import app


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


def main() -> None:
    """Entry point of the console script."""
    app()

"""The command `trsp report`."""

from pathlib import Path
from typing import Annotated

import typer

from trsp.pruner.errors import UserError


def report(
    paths: Annotated[
        list[Path], typer.Argument(help="records, or folders that hold them", show_default=False)
    ],
    out: Annotated[Path | None, typer.Option(help="the page to write, HTML")] = None,
    png: Annotated[Path | None, typer.Option(help="folder for the figures as PNG")] = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="print the tables for a README on stdout")
    ] = False,
) -> None:
    """One page from records: results, figures, tables, what was not measured.

    Records are of `trsp bench serve`, `trsp compare` and `trsp audit`, in any mixture. The page
    holds everything it needs: no network, no script.
    """
    if out is None and png is None and not markdown:
        raise UserError("nothing to make: give --out PAGE.html, --png FOLDER or --markdown")
    from trsp.bench.report import markdown_of, write_report

    inputs, written = write_report(paths, out=out, png=png)
    for line in inputs.ignored:
        typer.echo(f"ignored: {line}", err=True)
    for path in written:
        typer.echo(f"wrote {path}", err=True)
    if markdown:
        typer.echo(markdown_of(inputs), nl=False)

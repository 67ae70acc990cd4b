"""What a person at a terminal sees: progress bars and one-line errors on stderr.

stdout belongs to results: one JSON document with `--json`, else a short text.
"""

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperGroup

from trsp.pruner.errors import Interrupted, RunError, UserError
from trsp.pruner.progress import Progress


class ErrorsAsExitCodes(TyperGroup):
    """Every command: a user's mistake exits 2, a failed run or file 1, a signal 128 + n."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (UserError, RunError, Interrupted, OSError) as error:
            if ctx.params.get("debug"):
                traceback.print_exc()
            print(f"error: {error}", file=sys.stderr)  # noqa: T201
            code = 2 if isinstance(error, UserError) else 1
            if isinstance(error, Interrupted):
                code = 128 + error.signal_number
            raise typer.Exit(code) from error


@contextmanager
def progress_bars() -> Iterator[Progress]:
    """One bar per task on stderr, in the order the tasks begin."""
    # transformers reads this when it is imported; its bars would break into these.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as RichProgress

    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    tasks: dict[str, Any] = {}
    with RichProgress(*columns, console=Console(stderr=True)) as bars:

        def report(task: str, completed: int, total: int) -> None:
            if task not in tasks:
                tasks[task] = bars.add_task(task, total=total)
            bars.update(tasks[task], completed=completed, total=total)

        yield report

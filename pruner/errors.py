"""The ways a command ends early: the user's mistake, a failure of the run, a signal."""

from typing import Any


class UserError(ValueError):
    """What was asked cannot be done as asked; the text is one line: value, expectation, remedy.

    The command line prints it and exits 2.
    """


class RunError(RuntimeError):
    """The run failed although what was asked is sound; nothing half-done was published.

    The command line prints it and exits 1.
    """


class Interrupted(Exception):  # noqa: N818 - the field's word for it
    """A signal asked the run to stop; `run_folder` is what `--resume` goes on from, if anything."""

    def __init__(self, signal_number: int, run_folder: object = None) -> None:
        rest = "nothing is kept" if run_folder is None else f"{run_folder} can be resumed"
        super().__init__(f"stopped by signal {signal_number}; {rest}")
        self.signal_number = signal_number


def first_problem(error: Any) -> str:
    """The first thing that a pydantic ValidationError names, in one line: its place, then what."""
    first = error.errors(include_url=False)[0]
    place = ".".join(str(part) for part in first["loc"]) or "document"
    return f"{place}: {first['msg']}"

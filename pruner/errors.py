"""The two ways a command ends badly: the user's mistake, and a failure of the run."""


class UserError(ValueError):
    """What was asked cannot be done as asked; the text is one line: value, expectation, remedy.

    The command line prints it and exits 2.
    """


class RunError(RuntimeError):
    """The run failed although what was asked is sound; nothing half-done was published.

    The command line prints it and exits 1.
    """


class Interrupted(Exception):  # noqa: N818 - the field's word for it
    """A signal asked the run to stop; its state is saved and `--resume` goes on from there."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by signal {signal_number}; the run can be resumed")
        self.signal_number = signal_number

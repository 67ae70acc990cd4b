"""How long work reports where it is, without knowing who is watching."""

from typing import Protocol


class Progress(Protocol):
    """Called as work advances; `completed` counts up to `total` within one named task."""

    def __call__(self, task: str, completed: int, total: int) -> None: ...


def silent(task: str, completed: int, total: int) -> None:
    """Report to nobody: the default of every function that takes a Progress."""

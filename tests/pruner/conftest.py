"""The faults that the tests of writing share."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

RunKilled = Callable[[Callable[[], object], int], bool]

_CHANGING_EVENTS = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "fcntl.flock"}
_WRITING_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@pytest.fixture
def run_killed() -> RunKilled:
    """Give run_killed(action, nth): fork, run `action`, kill -9 it before its n-th file operation.

    Opening for writing, write, fsync, rename, mkdir, unlink, rmdir and flock are counted. Returns
    whether the child was killed: False when the action ended with fewer operations.
    """

    def run(action: Callable[[], object], nth: int) -> bool:
        child = os.fork()
        if child == 0:
            _kill_self_at(nth)
            try:
                action()
            except BaseException:
                os._exit(1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            assert os.WTERMSIG(status) == signal.SIGKILL
            return True
        assert os.WEXITSTATUS(status) == 0, "the action failed without being killed"
        return False

    return run


def _kill_self_at(nth: int) -> None:
    count = 0

    def step() -> None:
        nonlocal count
        count += 1
        if count == nth:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            step()
            return function(*args, **kwargs)

        return call

    def on_event(event: str, args: tuple[Any, ...]) -> None:
        if event in _CHANGING_EVENTS or (event == "open" and args[2] & _WRITING_FLAGS):
            step()

    # A kill loses nothing that the kernel has been given: the slow part of a sync is left out.
    os.fsync = counted(lambda descriptor: None)
    os.write = counted(os.write)
    sys.addaudithook(on_event)


@pytest.fixture
def file_operations(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Record ("fsync", path) and ("rename", new path) in the order in which they happen."""
    operations: list[tuple[str, str]] = []
    fsync, rename = os.fsync, os.rename

    def recorded_fsync(descriptor: int) -> None:
        operations.append(("fsync", str(Path(f"/proc/self/fd/{descriptor}").readlink())))
        fsync(descriptor)

    def recorded_rename(source: Any, target: Any) -> None:
        operations.append(("rename", os.fspath(target)))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "rename", recorded_rename)
    return operations

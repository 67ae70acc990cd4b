"""One server in a process group of its own: signals go in, its exit code comes out."""

import ctypes
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from trsp.serving.server_command import ServerCommand
from trsp.serving.server_flags import expand_config_file, flag_number

# vLLM can swallow a signal that comes while its engine starts, and would then wait ten minutes.
GRACE_SECONDS = 30
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
# In the environment of the server and of all that it starts.
_MARK = "TRSP_SERVER"


def run_server(command: ServerCommand) -> int:
    """Run the server to its end and return its exit code; 128 + n where signal n ended it.

    The first SIGINT or SIGTERM is passed on, and the server finishes as it does; the second kills
    it, and so does time: GRACE_SECONDS, on top of vLLM's own --shutdown-timeout. Whatever it
    started is ended with it; outside Linux this leaves out what made a process group of its own,
    as the servers of vLLM's data-parallel supervisor do.
    """
    patience = grace_seconds(command)
    mark = secrets.token_hex(16)
    with _signals_held() as received, _orphans_ended(mark):
        process = subprocess.Popen(
            command.arguments,
            env={**command.environment(), _MARK: mark},
            start_new_session=True,
            preexec_fn=end_with_parent if sys.platform == "linux" else None,
        )
        try:
            with _signals_passed_on(process.pid, received, patience):
                _wait(process)
        finally:
            _kill_group(process.pid)
            process.wait()
    code = process.returncode
    return code if code >= 0 else 128 - code


def _wait(process: "subprocess.Popen[bytes]") -> None:
    """Wait until the server ended; where the system can, without reaping it."""
    if hasattr(os, "waitid"):
        # Not reaped yet: its pid still names its group.
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    else:
        # Python on macOS. The number stays the group's while anything is left in it.
        process.wait()


def _kill_group(pid: int) -> None:
    # Nobody is left in it, or, as macOS has it, only processes that ended.
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


@contextmanager
def _orphans_ended(mark: str) -> Iterator[None]:
    """On Linux: in the end, kill what the server left behind in process groups of their own.

    They become our children when their parent ends, and theirs when we end them. Other orphans
    come to us too; only those that carry the server's mark in their environment are ended.
    """
    if sys.platform != "linux":
        yield
        return
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)
    try:
        yield
    finally:
        while orphans := {pid for pid in _children() if _carries(pid, mark)}:
            for pid in orphans:
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
                with suppress(ChildProcessError):
                    os.waitpid(pid, 0)
        libc.prctl(_PR_SET_CHILD_SUBREAPER, 0)


def _children() -> set[int]:
    """Our child processes; none where the kernel does not list them."""
    found: set[int] = set()
    for task in Path("/proc/self/task").glob("*/children"):
        with suppress(OSError):
            found.update(map(int, task.read_text().split()))
    return found


def _carries(pid: int, mark: str) -> bool:
    """Whether a process was started with the mark; a process that has ended carries none."""
    try:
        return f"{_MARK}={mark}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False


@contextmanager
def _signals_held() -> Iterator[list[int]]:
    """Collect signals while the server has no pid yet; restore their handlers in the end."""
    received: list[int] = []
    previous = {
        number: signal.signal(number, lambda number, frame: received.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def _signals_passed_on(pid: int, received: list[int], grace_seconds: int) -> Iterator[None]:
    """Pass the first signal on to the process `pid`; the second, or time, kills its group."""
    sent: list[int] = []

    def send(number: int, frame: FrameType | None = None) -> None:
        sent.append(number)
        if len(sent) == 1:
            with suppress(ProcessLookupError):
                os.kill(pid, number)
            signal.alarm(grace_seconds)
        else:
            _kill_group(pid)

    before = signal.signal(signal.SIGALRM, send)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, send)
    for early in received:
        send(early)
    try:
        yield
    finally:
        # From here on the pid may be another's.
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, frame: None)


def grace_seconds(command: ServerCommand) -> int:
    """How long a server that was asked to end may take."""
    flags = expand_config_file(command.arguments)
    return GRACE_SECONDS + flag_number(flags, "--shutdown-timeout", default=0)


def end_with_parent() -> None:
    """In a child, before it runs: Linux ends it should its parent be killed outright."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

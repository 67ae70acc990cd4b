"""One server in a process group of its own: signals go in, its exit code comes out."""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from trsp.serving.server_command import ServerCommand

# vLLM can swallow a signal that comes while its engine starts, and would then wait ten minutes.
GRACE_SECONDS = 30
_PR_SET_PDEATHSIG = 1


def run_server(command: ServerCommand) -> int:
    """Run the server to its end and return its exit code; 128 + n where signal n ended it.

    The first SIGINT or SIGTERM is passed on, and the server finishes as it does; the second kills
    it, and so does time: GRACE_SECONDS, on top of vLLM's own --shutdown-timeout. Whatever it
    started is ended with it.
    """
    with _signals_held() as received:
        process = subprocess.Popen(
            command.arguments,
            env=command.environment(),
            start_new_session=True,
            preexec_fn=end_with_parent if sys.platform == "linux" else None,
        )
        try:
            with _signals_passed_on(process.pid, received, grace_seconds(command)):
                # Not reaped yet: its pid still names its group.
                os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    code = process.returncode
    return code if code >= 0 else 128 - code


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
            os.kill(pid, number)
            signal.alarm(grace_seconds)
        else:
            os.killpg(pid, signal.SIGKILL)

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
    words = (
        " ".join(command.arguments).replace("--shutdown-timeout=", "--shutdown-timeout ").split()
    )
    place = words.index("--shutdown-timeout") + 1 if "--shutdown-timeout" in words else len(words)
    value = words[place] if place < len(words) else ""
    return GRACE_SECONDS + (int(value) if value.isdecimal() else 0)


def end_with_parent() -> None:
    """In a child, before it runs: Linux ends it should its parent be killed outright."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

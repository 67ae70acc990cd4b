"""A child process that leads a group of its own, logs into a file, and never outlives us."""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trsp.serving.server_process import end_with_parent

_GRACE_SECONDS = 20.0
_POLL_SECONDS = 0.1
# A killed process takes a moment to give its memory back; one that nobody reaps, as in a container
# without an init, keeps its group for ever.
_DYING_SECONDS = 5.0
_LOG_TAIL_BYTES = 65536
_MAX_LINE = 300
# A log's last lines are often a shutdown's; what went wrong stands in a line such as these.
_TELLING = ("Error", "error:", "out of memory", "Killed", "CANCELLED", "not supported")


class ProcessGroup:
    """A started command. `log`: where its stdout and stderr go, appended."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        log: Path,
        environment: Mapping[str, str],
        stdin: Any = subprocess.DEVNULL,
        stdout: Any = None,
    ) -> None:
        self.command = list(command)
        self._stopped = False
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                self.command,
                stdin=stdin,
                stdout=file if stdout is None else stdout,
                stderr=file,
                env={**os.environ, **environment},
                start_new_session=True,
                preexec_fn=end_with_parent if sys.platform == "linux" else None,
            )

    def is_alive(self) -> bool:
        """Whether the leader still runs; it is not reaped, so its group keeps its number."""
        if self.process.returncode is not None:
            return False
        if not hasattr(os, "waitid"):
            # Python on macOS; there a group's number stays its own while anything is left in it.
            return self.process.poll() is None
        state = os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        return state is None

    def last_lines(self, count: int = 3) -> str:
        """What the log tells of its end: its last error lines, else its last lines; one line."""
        with self.log.open("rb") as file:
            file.seek(max(0, self.log.stat().st_size - _LOG_TAIL_BYTES))
            text = file.read().decode(errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        telling = [line for line in lines if any(word in line for word in _TELLING)]
        chosen = (telling or lines or ["no output"])[-count:]
        return " | ".join(line[-_MAX_LINE:] for line in chosen)

    def stop(self) -> int:
        """End the whole group, politely first, and return the leader's exit code.

        It waits until nobody is left in the group, as the next engine needs this one's memory;
        for 5 seconds at most, as ended processes that nobody reaps would keep it for ever.
        """
        try:
            self._signal(signal.SIGTERM)
            deadline = time.monotonic() + _GRACE_SECONDS
            while self.is_alive() and time.monotonic() < deadline:
                time.sleep(_POLL_SECONDS)
        finally:
            # Also when Ctrl-C ends the grace. The leader is not reaped yet, so this number is
            # still its group's.
            self._signal(signal.SIGKILL)
            self._stopped = True
        code = self.process.wait()
        deadline = time.monotonic() + _DYING_SECONDS
        while self._is_anyone_left() and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS / 10)
        return code

    def _is_anyone_left(self) -> bool:
        """Whether the group of a reaped leader has members; those not reaped yet count on Linux."""
        try:
            os.killpg(self.process.pid, 0)
        except (ProcessLookupError, PermissionError):
            return False
        return True

    def _signal(self, number: signal.Signals) -> None:
        # Without waitid the leader is reaped as soon as it is seen to have ended, its group is not.
        if self.process.returncode is None or not (hasattr(os, "waitid") or self._stopped):
            # macOS has no group any more once all of its processes wait to be reaped.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, number)


def shown_command(command: Sequence[str]) -> str:
    """A command line to type, without the place that its Python is installed in."""
    return shlex.join([Path(command[0]).name, *command[1:]])

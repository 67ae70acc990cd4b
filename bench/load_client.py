"""Our side of vLLM's serving client (`trsp.bench.load_client_program`), which runs beside us."""

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from trsp.bench.process_group import ProcessGroup
from trsp.pruner.errors import RunError

# vLLM's client asks the environment for a proxy, and this machine's traffic is not for it.
_NO_PROXY = {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
# -P: the working folder, which may hold a `vllm`, stays off the import path.
COMMAND = (sys.executable, "-P", "-m", "trsp.bench.load_client_program")
_START_SECONDS = 600.0
_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class ClientResult:
    """One run of vLLM's client.

    Attributes:
        document: vLLM's own JSON, per-request lists included.
        prompts_sha256: over the prompts and lengths that were sent.
        cpu_share: processor time over wall time of the client's run, warm-up included.
    """

    document: dict[str, Any]
    prompts_sha256: str
    cpu_share: float


class LoadClient:
    """A running client. Use as a context: leaving it ends the client's process group."""

    def __init__(self, *, log: Path, environment: Mapping[str, str]) -> None:
        self._read, write = os.pipe()
        try:
            self.group = ProcessGroup(
                COMMAND,
                log=log,
                environment={**environment, **_NO_PROXY},
                stdin=subprocess.PIPE,
                stdout=write,
            )
        finally:
            os.close(write)
        self._pending = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.group.stop()
        os.close(self._read)
        if self.group.process.stdin is not None:
            self.group.process.stdin.close()

    def wait_until_ready(self, waiting: Callable[[], None]) -> None:
        """Return when vLLM is imported.   RunError: it cannot be, or takes over ten minutes."""
        self._answer(waiting, _START_SECONDS)

    def measure(
        self, arguments: Sequence[str], *, timeout_seconds: float, waiting: Callable[[], None]
    ) -> ClientResult:
        """Run `vllm bench serve` with these arguments.

        Args:
            waiting: called twice a second; what it raises is passed on.
        Raises:
            RunError: the client fails, ends or takes too long; with its last lines.
        """
        stdin = self.group.process.stdin
        if stdin is None:
            raise RunError("the client was started without a stdin")
        # A client that has gone closes its answers too, and its end is told where they are read.
        # Nothing may be left in a buffer, whose flush would fail at the end.
        with contextlib.suppress(BrokenPipeError):
            os.write(stdin.fileno(), json.dumps({"arguments": list(arguments)}).encode() + b"\n")
        answer = self._answer(waiting, timeout_seconds)
        return ClientResult(
            document=answer["result"],
            prompts_sha256=answer["prompts_sha256"],
            cpu_share=answer["cpu_seconds"] / max(answer["wall_seconds"], 1e-9),
        )

    def _answer(self, waiting: Callable[[], None], timeout_seconds: float) -> dict[str, Any]:
        deadline = time.monotonic() + timeout_seconds
        while b"\n" not in self._pending:
            waiting()
            if time.monotonic() > deadline:
                raise RunError(
                    f"vLLM's client gave no answer within {timeout_seconds:.0f} s; its last lines: "
                    f"{self.group.last_lines()} (whole log: {self.group.log})"
                )
            if select.select([self._read], [], [], _POLL_SECONDS)[0]:
                piece = os.read(self._read, 1 << 20)
                if not piece:
                    raise RunError(
                        f"vLLM's client ended: {self.group.last_lines()} "
                        f"(whole log: {self.group.log})"
                    )
                self._pending += piece
        line, _, self._pending = self._pending.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise RunError(f"vLLM's client: {answer['error']} (whole log: {self.group.log})")
        return answer

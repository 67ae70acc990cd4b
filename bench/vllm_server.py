"""One vLLM OpenAI server of ours: started on 127.0.0.1, waited for, asked, and ended."""

import http.client
import json
import re
import socket
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from trsp.bench.process_group import ProcessGroup, shown_command
from trsp.pruner.errors import RunError, UserError

HOST = "127.0.0.1"
# `/server_info` (the engine's whole configuration) exists in this mode only.
ENVIRONMENT = {"VLLM_SERVER_DEV_MODE": "1"}
_POLL_SECONDS = 0.5
_REQUEST_SECONDS = 30.0
_HEALTH_SECONDS = 2.0
_DYING_POLLS = 4
COMPILES = re.compile(
    r"Starting torch\.compile|Capturing|Compiling a graph|recompil|JIT compilation|autotuning", re.I
)
_WEIGHTS = re.compile(r"Model loading took ([0-9.]+) GiB")
_SAMPLE = re.compile(r"^(?P<name>vllm:\w+)\{(?P<labels>.*)\} (?P<value>\S+)$")
# A proxy of the user's must not see requests to this machine.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class VllmServer:
    """A running server. Use as a context: leaving it ends the server's whole process group.

    Args:
        command: the server's command line without its port; it binds 127.0.0.1 by itself.
        port: None takes a free one.
    Raises:
        UserError: the port is taken.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        log: Path,
        environment: Mapping[str, str],
        port: int | None = None,
    ) -> None:
        self.port = free_port() if port is None else _require_free(port)
        self.command = [*command, "--port", str(self.port)]
        self.load_seconds = 0.0
        self._started = time.monotonic()
        self.group = ProcessGroup(self.command, log=log, environment={**environment, **ENVIRONMENT})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.group.stop()

    @property
    def command_line(self) -> str:
        """As typed into a shell."""
        return shown_command(self.command)

    @property
    def base_url(self) -> str:
        """Of the OpenAI server, without a trailing slash."""
        return f"http://{HOST}:{self.port}"

    def wait_until_healthy(self, timeout_seconds: float, waiting: Callable[[], None]) -> None:
        """Return when the server answers.

        Args:
            waiting: called twice a second; what it raises is passed on.
        Raises:
            RunError: the server ends, or is not healthy in time; with its last lines.
        """
        while not self._is_healthy():
            waiting()
            self.require_alive()
            if time.monotonic() - self._started > timeout_seconds:
                raise RunError(
                    f"the server was not healthy after {timeout_seconds:.0f} s and was ended; "
                    f"its last lines: {self.group.last_lines()} (whole log: {self.group.log})"
                )
            time.sleep(_POLL_SECONDS)
        # Another server may have taken the port after we saw that it was free.
        self.require_alive()
        self.load_seconds = time.monotonic() - self._started

    def require_alive(self) -> None:
        """Raises RunError with the server's last lines when it has ended."""
        if not self.group.is_alive():
            code = self.group.stop()
            raise RunError(
                f"the server ended with exit code {code}: {self.group.last_lines()} "
                f"(whole log: {self.group.log})"
            )

    def engine_config(self) -> dict[str, str]:
        """The engine's configuration, flattened: dotted name to text."""
        document = json.loads(self._get("/server_info?config_format=json"))
        return flattened(document["vllm_config"])

    def counters(self) -> dict[str, float]:
        """The server's Prometheus counters and gauges, summed over labels, by name."""
        totals: dict[str, float] = {}
        for line in self._get("/metrics").splitlines():
            if match := _SAMPLE.match(line):
                totals[match["name"]] = totals.get(match["name"], 0.0) + float(match["value"])
        return totals

    def kv_cache(self) -> tuple[int, int] | None:
        """(tokens, blocks) of the KV cache, as the engine counts them; None if it tells nothing."""
        for line in self._get("/metrics").splitlines():
            match = _SAMPLE.match(line)
            if match and match["name"] == "vllm:cache_config_info":
                labels = dict(re.findall(r'(\w+)="([^"]*)"', match["labels"]))
                blocks, size = labels.get("num_gpu_blocks", ""), labels.get("block_size", "")
                if blocks.isdecimal() and size.isdecimal():
                    return int(blocks) * int(size), int(blocks)
        return None

    def weights_gib(self) -> float | None:
        """GiB that the weights take by the engine's own log; None where it says nothing."""
        found = _WEIGHTS.findall(self.group.log.read_text(errors="replace"))
        return sum(map(float, found)) if found else None

    def log_size(self) -> int:
        """Bytes logged so far; see `compiled_since`."""
        return self.group.log.stat().st_size

    def compiled_since(self, size: int) -> bool:
        """Whether the log speaks of compilation or graph capture after its first `size` bytes."""
        with self.group.log.open("rb") as file:
            file.seek(size)
            return COMPILES.search(file.read().decode(errors="replace")) is not None

    def _is_healthy(self) -> bool:
        try:
            self._fetch("/health", _HEALTH_SECONDS)
        except (OSError, http.client.HTTPException):
            return False
        return True

    def _get(self, path: str) -> str:
        """The server's answer.   RunError: it has died, or does not answer that."""
        try:
            return self._fetch(path, _REQUEST_SECONDS)
        except (OSError, http.client.HTTPException) as error:
            # A server that falls over drops its connections before it is gone.
            for _ in range(_DYING_POLLS):
                self.require_alive()
                time.sleep(_POLL_SECONDS)
            raise RunError(
                f"the server does not answer {path}: {error} (whole log: {self.group.log})"
            ) from error

    def _fetch(self, path: str, seconds: float) -> str:
        with _OPENER.open(self.base_url + path, timeout=seconds) as response:
            content: bytes = response.read()
        return content.decode()


def free_port() -> int:
    """A port on 127.0.0.1 that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
    return port


def flattened(value: Any, prefix: str = "") -> dict[str, str]:
    """Nested objects and lists as one level: dotted name to text."""
    if isinstance(value, dict):
        items = {str(key): item for key, item in value.items()}
    elif isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        items = {str(n): item for n, item in enumerate(value)}
    else:
        return {prefix: json.dumps(value) if not isinstance(value, str) else value}
    flat: dict[str, str] = {}
    for key, item in items.items():
        flat |= flattened(item, f"{prefix}.{key}" if prefix else key)
    return flat


def _require_free(port: int) -> int:
    with socket.socket() as probe:
        # As the server itself does: a port in TIME_WAIT is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise UserError(
                f"port {port} of {HOST} is taken ({error.strerror}); give another with --port, or "
                "none to take a free one"
            ) from error
    return port

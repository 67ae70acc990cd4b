"""What the experiment asks of whatever runs a model: start it, measure it under a load, end it."""

import shlex
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from trsp.bench.serve_record import Arm, Load, Memory, Start


@dataclass(frozen=True)
class ArmModel:
    """An arm and the folder that its engine loads.

    Attributes:
        kv_cache_bytes: room for the KV cache in each memory arm.
    """

    arm: Arm
    folder: Path
    kv_cache_bytes: dict[Memory, int]


@dataclass(frozen=True)
class Measured:
    """One measurement, as `serve_record.Cell` has it; `raw`: the engine's or client's own JSON."""

    metrics: dict[str, float]
    completed: int
    failed: int
    total_input_tokens: int
    total_output_tokens: int
    raw: dict[str, Any]
    prompts_sha256: str | None = None
    client_cpu_share: float | None = None
    prefix_cache_hits: int | None = None
    num_preemptions: int | None = None
    notes: list[str] = field(default_factory=list)
    invalid: list[str] = field(default_factory=list)


class Session(Protocol):
    """A started engine."""

    @property
    def start(self) -> Start:
        """What the start told; complete once the engine has been measured."""

    def measure(self, load: Load) -> Measured:
        """Measure once. RunError when the engine or its client fails."""


class SpeedBackend(Protocol):
    """Starts engines."""

    @property
    def engine(self) -> str:
        """Name and version of what runs the models."""

    @property
    def environment(self) -> Mapping[str, str]:
        """Variables that its processes get beside this one's."""

    def session(
        self, model: ArmModel, memory: Memory, block: int, waiting: Callable[[], None]
    ) -> AbstractContextManager[Session]:
        """Start an engine for one arm; leaving the context ends everything that it started.

        Args:
            waiting: called while we wait; what it raises ends the wait and is passed on.
        """


def with_variables(variables: Mapping[str, str], command: str) -> str:
    """A command line as typed into a shell that has none of these variables set."""
    return " ".join(
        [*(f"{name}={shlex.quote(value)}" for name, value in sorted(variables.items())), command]
    )

"""What a stage cost: wall time and peak memory.

On CUDA the peak is the allocator's; on the CPU it is the resident set's high-water mark, reset at
the start of the stage where the kernel allows it (Linux) and left out elsewhere.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


@dataclass
class StageCost:
    """A context manager; `seconds`, `peak_bytes` and `start_bytes` are set when it ends.

    Attributes:
        peak_bytes: highest memory in use, None where it cannot be read.
        start_bytes: memory in use when the stage began, likewise.
    """

    device: str = "cpu"
    seconds: float = 0.0
    peak_bytes: int | None = None
    start_bytes: int | None = None

    def __enter__(self) -> Self:
        if self.device.startswith("cuda"):
            import torch

            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.start_bytes = torch.cuda.memory_allocated()
        else:
            self.start_bytes = _reset_high_water_mark()
        self._started = time.perf_counter()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.seconds = time.perf_counter() - self._started
        if self.device.startswith("cuda"):
            import torch

            torch.cuda.synchronize()
            self.seconds = time.perf_counter() - self._started
            self.peak_bytes = torch.cuda.max_memory_allocated()
        elif self.start_bytes is not None:
            self.peak_bytes = _status_bytes("VmHWM")

    def elapsed(self) -> float:
        """Seconds since the stage began, while it runs."""
        return time.perf_counter() - self._started

    def to_document(self) -> dict[str, Any]:
        return {
            "device": self.device,
            "seconds": self.seconds,
            "peak_bytes": self.peak_bytes,
            "start_bytes": self.start_bytes,
        }


def _reset_high_water_mark() -> int | None:
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:
        return None
    return _status_bytes("VmRSS")


def _status_bytes(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{_STATUS} has no {field}")

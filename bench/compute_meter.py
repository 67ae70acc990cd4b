"""What a stage spent: floating point operations as they were run, wall time, peak memory.

Operations are counted where they happen (torch.utils.flop_counter: matrix products and attention,
two operations a multiply-add), so teachers, candidates and skipped layers are in the count as they
are. Elementwise work is not.
"""

from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from trsp.pruner.cost import StageCost


@dataclass(frozen=True)
class Spent:
    """Operations, seconds, and the highest memory in bytes (None where it cannot be read)."""

    flops: int
    seconds: float
    peak_bytes: int | None

    def to_document(self) -> dict[str, Any]:
        """Return the fields as a JSON-ready mapping."""
        return asdict(self)


def _cpu_attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _cpu_attention_backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(grad, query, key, value))


class ComputeMeter:
    """A context manager; `spent` may be read inside and after the block."""

    def __init__(self, device: str) -> None:
        aten = torch.ops.aten
        self._cost = StageCost(device)
        # torch counts CUDA's attention and not the CPU's.
        self._counter = FlopCounterMode(
            display=False,
            custom_mapping={
                aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention,
                aten._scaled_dot_product_flash_attention_for_cpu_backward: _cpu_attention_backward,
            },
        )

    def __enter__(self) -> Self:
        self._cost.__enter__()
        self._counter.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._counter.__exit__(kind, error, trace)
        self._cost.__exit__(kind, error, trace)

    @property
    def flops(self) -> int:
        """Operations so far."""
        return int(self._counter.get_total_flops())

    def spent(self) -> Spent:
        """All of it; inside the block, so far and without the peak."""
        seconds = self._cost.seconds or self._cost.elapsed()
        return Spent(self.flops, seconds, self._cost.peak_bytes)

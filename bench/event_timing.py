"""Times of short device work: cache-cold, in turns, without the host's part.

Actions of one comparison take turns, in an order that turns and reverses every round, so that drift
of the machine falls on all of them. Before each the L2 cache is overwritten, and the GPU is kept
busy until the host has queued the whole of it: no gap between two launches is measured.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

_MIN_FLUSH_BYTES = 256 * 2**20
_SPIN_PROBE_CYCLES = 10_000_000
_MIN_SPIN_US = 20.0
_MAX_ATTEMPTS = 4


@dataclass(frozen=True)
class Action:
    """Work to time: `run` is called with what `prepare` returned, which is not timed."""

    name: str
    prepare: Callable[[], Any]
    run: Callable[[Any], Any]


@dataclass(frozen=True)
class Timing:
    """Microseconds of one action. `num_late` samples were thrown away: the host was too slow."""

    median_us: float
    p20_us: float
    p80_us: float
    num_samples: int
    num_late: int


class Clock(Protocol):
    """Runs an action once and tells its microseconds, or None where the sample is no good."""

    def measure(self, action: Action) -> float | None: ...


class HostClock:
    """The host's time of synchronous work: for dry runs, whose figures are not reported."""

    def measure(self, action: Action) -> float | None:
        prepared = action.prepare()
        started = time.perf_counter()
        action.run(prepared)
        return (time.perf_counter() - started) * 1e6


class EventClock:
    """CUDA events around cold work that was queued while the GPU was kept busy."""

    def __init__(self, device: torch.device) -> None:
        properties = torch.cuda.get_device_properties(device)
        self.l2_bytes: int = properties.L2_cache_size
        self.flush_bytes = max(_MIN_FLUSH_BYTES, 2 * self.l2_bytes)
        self._flush = torch.empty(self.flush_bytes, dtype=torch.int8, device=device)
        self._cycles_per_us = _spin_rate()
        self._spin_us: dict[str, float] = {}

    def forget(self) -> None:
        """Forget how long actions take to queue: the next ones may share their names."""
        self._spin_us.clear()

    def measure(self, action: Action) -> float | None:
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        prepared = action.prepare()
        # What prepare queued must not eat the time that the spin buys.
        torch.cuda.synchronize()
        spin_us = self._spin_us.setdefault(action.name, _MIN_SPIN_US)
        began = time.perf_counter()
        torch.cuda._sleep(int(spin_us * self._cycles_per_us))
        self._flush.zero_()
        start.record()
        result = action.run(prepared)
        end.record()
        # The region has begun while the host still queued it: gaps may have been measured.
        late = start.query()
        queued_us = (time.perf_counter() - began) * 1e6
        torch.cuda.synchronize()
        # Freed only now: memory given back earlier could be flushed or reused within the region.
        del result, prepared
        if late:
            self._spin_us[action.name] = 2 * max(spin_us, queued_us)
            return None
        taken_us: float = start.elapsed_time(end) * 1e3
        return taken_us


def interleave(
    actions: Sequence[Action], clock: Clock, *, rounds: int, warmup_rounds: int
) -> dict[str, Timing]:
    """Time every action `rounds` times, after `warmup_rounds` that are thrown away.

    A sample that the clock refuses is taken again at once, a few times.

    Raises:
        ValueError: no rounds, or two actions of one name.
        RuntimeError: the clock refused every sample of an action.
    """
    names = [action.name for action in actions]
    if rounds < 1 or len(set(names)) != len(names):
        raise ValueError(f"rounds={rounds} of {names}; expected at least 1, and distinct names")
    samples: dict[str, list[float]] = {name: [] for name in names}
    num_late = dict.fromkeys(names, 0)
    for turn in range(warmup_rounds + rounds):
        for action in turn_order(actions, turn):
            for _ in range(_MAX_ATTEMPTS):
                taken_us = clock.measure(action)
                if taken_us is not None:
                    break
                num_late[action.name] += turn >= warmup_rounds
            if taken_us is not None and turn >= warmup_rounds:
                samples[action.name].append(taken_us)
    for name, values in samples.items():
        if not values:
            raise RuntimeError(
                f"{name}: the host never queued it before the GPU was through; the host is too "
                "slow or too busy for this measurement"
            )
    return {name: summarize(values, num_late[name]) for name, values in samples.items()}


def turn_order(actions: Sequence[Action], turn: int) -> list[Action]:
    """The order of one round: a different action first every two rounds, every other reversed."""
    first = (turn // 2) % len(actions)
    order = [*actions[first:], *actions[:first]]
    return order[::-1] if turn % 2 else order


def summarize(samples: Sequence[float], num_late: int = 0) -> Timing:
    """Median and the 20th and 80th percentile (nearest rank) of samples in microseconds."""
    ranked = sorted(samples)

    def percentile(share: float) -> float:
        return ranked[max(0, math.ceil(share * len(ranked)) - 1)]

    median = statistics.median(ranked)
    return Timing(median, percentile(0.2), percentile(0.8), len(ranked), num_late)


def _spin_rate() -> float:
    """Cycles of `torch.cuda._sleep` in a microsecond; the second of two, on a warm clock."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
    for event in events:
        event.record()
        torch.cuda._sleep(_SPIN_PROBE_CYCLES)
    torch.cuda.synchronize()
    spun_us: float = events[1].elapsed_time(events[2]) * 1e3
    return _SPIN_PROBE_CYCLES / spun_us

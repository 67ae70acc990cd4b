"""The design of a speed experiment: which arm is measured when, under which load, with what memory.

Every block runs the arms forwards and backwards (A B B A; with more arms A B C C B A), so a drift
that is linear in time moves every arm alike. Every second block begins from the other end, so no
arm is always measured first or always twice in a row. The dense model is there twice: the second
is the control, whose ratio to the first is the noise floor, found in the same blocks.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from trsp.bench.serve_record import Load, Memory
from trsp.pruner.errors import UserError

DENSE = "dense"
CONTROL = "dense again"
SHARES = (0.3, 0.5, 0.7, 0.9)
# Fewer requests than these tell too little; the plan says so where the user asks for fewer.
REQUESTS_PER_SLOT = 10
MIN_REQUESTS = 200


@dataclass(frozen=True)
class Step:
    """One engine of one arm measured once under each of `loads`; `position` within the block."""

    memory: Memory
    block: int
    position: int
    arm: str
    loads: tuple[Load, ...]


def palindrome(arms: Sequence[str]) -> tuple[str, ...]:
    """The order of one block: forwards, then backwards; each arm twice, same mean position."""
    return (*arms, *reversed(arms))


def steps(
    arms: Sequence[str],
    loads: Sequence[Load],
    saturating: Load,
    memories: Sequence[Memory],
    num_blocks: int,
) -> Iterator[Step]:
    """Everything to be measured, in order. At equal memory only the saturating load is."""
    for memory in memories:
        chosen = tuple(loads) if memory == "equal-kv" else (saturating,)
        for block in range(num_blocks):
            order = palindrome(list(reversed(arms)) if block % 2 else arms)
            for position, arm in enumerate(order):
                yield Step(memory, block, position, arm, chosen)


def saturating_load(num_requests: int) -> Load:
    """Every request at once, as many in flight as the engine takes."""
    return Load(name="all at once", kind="closed", num_requests=num_requests)


def closed_loads(concurrencies: Sequence[int], num_requests: int | None) -> list[Load]:
    """A closed loop for each concurrency; at least max(10 x concurrency, 200) requests by default.

    Raises:
        UserError: none, one twice, or fewer than one request in flight or at all.
    """
    if not concurrencies or min(concurrencies) < 1 or len(set(concurrencies)) < len(concurrencies):
        raise UserError(
            f"--concurrency {list(concurrencies)}: give one or more different positive numbers"
        )
    if num_requests is not None and num_requests < max(concurrencies):
        raise UserError(
            f"--num-requests {num_requests} is less than --concurrency {max(concurrencies)}: "
            "not every slot would get a request"
        )
    return [
        Load(
            name=f"closed {concurrency}",
            kind="closed",
            concurrency=concurrency,
            num_requests=num_requests or enough_requests(concurrency),
        )
        for concurrency in sorted(concurrencies)
    ]


def open_loads(shares: Sequence[float], capacity: float, num_requests: int | None) -> list[Load]:
    """Poisson arrivals at shares of the dense model's capacity (requests/s).

    Raises:
        UserError: a share is not between 0 and 1, or named twice.
    """
    if len(set(shares)) < len(shares) or not all(0 < share < 1 for share in shares):
        raise UserError(f"--rate {list(shares)}: give different shares of the capacity, 0 to 1")
    return [
        Load(
            name=f"open {share:g}",
            kind="open",
            share=share,
            request_rate=share * capacity,
            num_requests=num_requests or MIN_REQUESTS,
        )
        for share in sorted(shares)
    ]


def enough_requests(concurrency: int) -> int:
    """Requests that steady the figures of one measurement."""
    return max(REQUESTS_PER_SLOT * concurrency, MIN_REQUESTS)


def arm_names(folders: Sequence[str]) -> list[str]:
    """A short, distinct name for each pruned model: the end of its path.

    Raises:
        UserError: two have the same name, or one is that of the dense arm.
    """
    names = [re.sub(r"[^\w.+-]", "_", folder.rstrip("/").rpartition("/")[2]) for folder in folders]
    for name in names:
        if names.count(name) > 1 or name in (DENSE, CONTROL):
            raise UserError(
                f"two models are called {name!r}: the last part of each path is its name in the "
                "tables; rename one of the folders"
            )
    return names

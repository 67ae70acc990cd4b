"""Ctrl-C and SIGTERM as a request to stop at the next safe point, not in the middle of a write."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from trsp.pruner.errors import Interrupted


@contextmanager
def stopping_on_signals() -> Iterator[Callable[[], None]]:
    """Yield a check that raises Interrupted once a signal has come.

    A second Ctrl-C stops at once, with KeyboardInterrupt. Only the main thread can take signals;
    elsewhere the check never raises and whoever runs the thread decides.
    """
    received: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    def check() -> None:
        if received:
            raise Interrupted(received[0])

    previous = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, remember)
    except ValueError:  # not the main thread
        previous.clear()
    try:
        yield check
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)

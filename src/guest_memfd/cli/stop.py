"""Signals that end a process: each is an exception here, so that what was begun is taken away before the end."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = tuple(getattr(signal, name) for name in ("SIGHUP", "SIGINT", "SIGQUIT", "SIGTERM") if hasattr(signal, name))


class Stopped(KeyboardInterrupt):
    """Signal *number* has come."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextmanager
def stoppable() -> Iterator[None]:
    """Within the block each of SIGNALS raises Stopped; what the caller has handled or ignored stays as it is.

    In a thread that is not the main one nothing is changed: Python delivers no signal there.
    """
    before = {}
    try:
        for number in SIGNALS:
            # Under nohup(1) SIGHUP is ignored, and has to stay so.
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                before[number] = signal.signal(number, _stop)
    except ValueError:
        pass
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(number: int, frame: FrameType | None) -> None:
    raise Stopped(number)


def raises(number: int) -> bool:
    """Whether signal *number* raises Stopped now."""
    return signal.getsignal(number) is _stop


def deafen() -> None:
    """From here on no further signal interrupts: what has been stopped is cleaning up."""
    for number in SIGNALS:
        if raises(number):
            signal.signal(number, signal.SIG_IGN)

"""Watches a child from within: when its time is over, and when it goes round in the mutant for ever."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

TICK = 1.0
"""Seconds of CPU time. Nothing that is mutated takes a thousandth of it when it is right."""


class TimeOver(BaseException):
    """The CPU time is used up."""


class Endless(BaseException):
    """One and the same call has been running from one tick to the next."""


class Watch:
    """A context manager. *files*: the code that is mutated."""

    def __init__(self, seconds: float, files: frozenset[str]) -> None:
        self.left, self.files = seconds, files
        self.last: FrameType | None = None

    def __enter__(self) -> Watch:
        signal.signal(signal.SIGPROF, self._tick)
        signal.setitimer(signal.ITIMER_PROF, TICK, TICK)
        return self

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_PROF, 0)

    def _tick(self, _number: int, frame: Any) -> None:
        self.left -= TICK
        if self.left <= 0:
            raise TimeOver
        while frame is not None and frame.f_code.co_filename not in self.files:
            frame = frame.f_back
        if frame is not None and frame is self.last:
            raise Endless
        self.last = frame

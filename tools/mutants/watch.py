"""Watches a child from within: when its time or memory is over, and when it goes round in the mutant without end."""

from __future__ import annotations

import resource
import signal
from types import FrameType
from typing import Any

TICK = 1.0
"""Seconds of CPU time. Nothing that is mutated takes a thousandth of it when it is right."""


MEMORY = 4 << 30
"""Bytes that may be resident. (Address space is no measure: an emulated CPU reserves a GiB of it.)"""


class Over(KeyboardInterrupt):
    """The CPU time is used up. (pytest takes any other exception for a test that fails.)"""


class Endless(KeyboardInterrupt):
    """One and the same call has been running from one tick to the next, or memory is taken that nothing else needs."""


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
            raise Over("the time is over")
        with open("/proc/self/statm") as file:
            resident = int(file.read().split()[1]) * resource.getpagesize()
        if resident > MEMORY:
            raise Endless("memory is taken without end")
        while frame is not None and frame.f_code.co_filename not in self.files:
            frame = frame.f_back
        if frame is not None and frame is self.last:
            raise Endless("a step never ends")
        self.last = frame

"""The first ^C, or SIGTERM, asks what explores to end: what was seen so far is told. The second ends at once."""

from __future__ import annotations

import signal
import time
from types import FrameType, TracebackType
from typing import Any, Self

from guest_memfd.cli.stop import Stopped, raises
from guest_memfd.compat import override
from guest_memfd.explore.suite.stop import Stop

GENTLE = signal.SIGINT, signal.SIGTERM
"""Who hangs up (SIGHUP) will not read what was seen, and who quits (SIGQUIT) does not want to."""

AT_ONCE = 1.0
"""Seconds in which a signal is one, however often it comes: timeout(1) sends it to the process, and to its group."""


class Gently(Stop):
    """Asked for by a signal that comes within its block."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0
        self._came = 0.0
        self._before: dict[int, Any] = {}

    @property
    def code(self) -> int:
        """The exit code: 128 and the number of the signal; 0 where none has come."""
        return 128 + self.number if self.number else 0

    @override
    def __enter__(self) -> Self:
        for number in GENTLE:
            if raises(number):
                self._before[number] = signal.signal(number, self._note)
        return self

    @override
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._before:
            signal.signal(*self._before.popitem())

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.number:
            self.number, self._came = number, time.monotonic()
            self.ask()
        elif time.monotonic() - self._came > AT_ONCE:
            raise Stopped(number)

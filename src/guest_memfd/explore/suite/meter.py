"""How far the scenarios are that are being explored now: noted by who explores them, in memory that all processes share."""

from __future__ import annotations

import mmap
import struct
from typing import NamedTuple

_LINE = struct.Struct("<4Q")


class Now(NamedTuple):
    """Task number *order* has come to so many levels and states; the process has so many bytes of *memory*."""

    order: int
    level: int
    states: int
    memory: int


class Meter:
    """A line for each of *processes*, which are forked after it is made."""

    def __init__(self, processes: int) -> None:
        self._lines = mmap.mmap(-1, _LINE.size * processes)

    def note(self, line: int, now: Now) -> None:
        """Process number *line* is that far. Who reads at the same time may see half of a new line, and shows it."""
        _LINE.pack_into(self._lines, line * _LINE.size, *now)

    def clear(self, line: int) -> None:
        """Process number *line* has done its task."""
        _LINE.pack_into(self._lines, line * _LINE.size, 0, 0, 0, 0)

    def running(self) -> list[Now]:
        """What is being explored, the scenario of most states first."""
        lines = (Now(*line) for line in _LINE.iter_unpack(self._lines[:]))
        return sorted((now for now in lines if now.states), key=lambda now: -now.states)

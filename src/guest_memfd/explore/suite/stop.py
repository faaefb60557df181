"""Asking for the end before the end: what was seen so far is told, and no more is looked at."""

from __future__ import annotations

import mmap
from types import TracebackType
from typing import Self


class Stop:
    """A wish to end. Processes that are forked after it is made see it, too.

    A context manager, for those who hear of the wish from outside: within the block they listen (cli/gently.py).
    """

    def __init__(self) -> None:
        self._asked = mmap.mmap(-1, 1)                  # shared memory

    def ask(self) -> None:
        """Wish to end: all processes see it at their next look."""
        self._asked[0] = 1

    def asked(self) -> bool:
        """Whether somebody wishes to end."""
        return self._asked[0] != 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

"""Memory for rows and for the table that finds them, kept from scenario to scenario.

New memory takes time: the kernel finds and zeroes each page when it is first written to, and where Linux is a guest itself,
its host may have to find one as well. Of a scenario of ten million states that was a fifth.
"""

from __future__ import annotations

import numpy as np

from guest_memfd.explore.engine.compiled.flat import Array

WORD = 8
"""Bytes of one."""


class Space:
    """What one scenario has used and another one may use again, but not two at a time."""

    def __init__(self) -> None:
        self._words = np.zeros(0, np.uint64)
        self._entries = np.zeros(0, np.uint64)
        self._written = 0                               # words that have been, by scenarios before this one
        self.last = 0                                   # entries of the table that the last one came to

    def rows(self, n: int, words: int) -> Array:
        """Room for *n* rows of *words* words. What is at its beginning stays; what follows is anything.

        Arrays that were handed out before are of no use any more. Raises MemoryError.
        """
        if n * words > len(self._words):
            # In place, where realloc() can: a copy would need the memory of all states twice.
            self._words.resize(n * words, refcheck=False)
        return self._words[:n * words].reshape(n, words)

    def table(self, size: int) -> Array:
        """An empty table of *size* entries. Whoever has the one before must have let it go."""
        if size > len(self._entries):
            self._entries = np.zeros(0, np.uint64)      # the old one goes before the new one comes
            self._entries = np.zeros(size, np.uint64)
        else:
            self._entries[:size] = 0
        return self._entries[:size]

    def missing(self, words: int, used: int) -> int:
        """Bytes that *words* words for rows, *used* of which are in use, take of memory that nobody has written to."""
        return max(0, words - max(used, self._written)) * WORD

    def missing_of_table(self, size: int) -> int:
        """The same of a table of *size* entries."""
        return max(0, size - len(self._entries)) * WORD

    def leave(self, words: int, entries: int) -> None:
        """The scenario is over, has written *words* words of rows, and came to a table of *entries* entries."""
        self._written, self.last = max(self._written, words), entries

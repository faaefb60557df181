"""The rows of one scenario: which part of a state lies where, the table that finds a row again, and how both grow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from guest_memfd.errors import InternalError
from guest_memfd.explore.engine.compiled.encoding import (
    COUNTERS,
    FULL,
    MASK_SHIFT,
    PLACE_BITS,
    ROWS,
    SHIFT_MASK,
    SHIFT_SHIFT,
    WORD_MASK,
)
from guest_memfd.explore.engine.compiled.flat import Array, Flat, TooWide
from guest_memfd.explore.engine.compiled.space import Space
from guest_memfd.explore.engine.memory import Full, used

WORD = 64
FEW = 1 << 15
"""Rows at the beginning."""

MANY = 1 << 22
"""Rows from which on the table grows by less at a time."""

MOST = 1 << 32
"""Rows that the table has numbers for."""


class Rows:
    """Rows of *parties* parties. A part gets room when it first changes; until then it is zero in every row."""

    def __init__(self, flat: Flat, parties: int, loops: Any, space: Space | None = None) -> None:
        self.flat, self.loops, self.space = flat, loops, space or Space()
        self.max_bytes: int | None = None               # memory that the process may have
        self.used = [0]                                 # bits of each word
        self.rows = self.space.rows(FEW, -(-parties * PLACE_BITS // WORD))
        self.rows[0] = 0
        self.placed: list[int] = []                     # the parts of bytes that have room
        self.room = np.zeros(1 << 8, np.uint64)
        self.places = np.zeros((parties, 2), np.uint64)
        for p in range(parties):
            self.places[p, 0] = self._take(PLACE_BITS)
        self.ready = np.zeros(1 << 8, np.uint8)
        # Scenarios that follow one another are of a size, and a table that is long enough need not be made again.
        self.table = self.space.table(max(2 * FEW, self.space.last))
        self.count = np.zeros(COUNTERS, np.int64)
        self.count[ROWS] = 1                            # the first is all zeros
        self.rehash = loops.rehash                      # threads have another way
        self.rehash(self.rows, 1, self.table)

    def __len__(self) -> int:
        """How many states there are."""
        return int(self.count[ROWS])

    @property
    def bits(self) -> int:
        """Bits of a row that are in use."""
        return sum(self.used)

    # First fit: narrow parts fill the gaps that wide ones leave.
    def _take(self, width: int) -> int:
        word = next((word for word, used in enumerate(self.used) if used + width <= WORD), len(self.used))
        if word > WORD_MASK:
            raise TooWide("the states of a scenario do not fit into rows")
        if word == len(self.used):
            if word == self.rows.shape[1]:
                self._widen()                           # or raises Full, when nothing has been changed yet
            self.used.append(0)
        shift = self.used[word]
        self.used[word] += width
        return word | shift << SHIFT_SHIFT | (1 << width) - 1 << MASK_SHIFT

    def make_room(self, way: int, parties: Sequence[int]) -> None:
        """For all that changes on the leaf whose first way is *way*, a step of *parties*."""
        trees = self.flat.trees
        for each in range(way, way + self.flat.leaf_of[way]):
            for number in trees.part[trees.first[each]:trees.first[each + 1]].tolist():
                if not self.room[number]:
                    self.room[number] = self._take(self.flat.of_part[number][1].width)
                    self.placed.append(number)
            for p in parties:
                if trees.place[each] >> PLACE_BITS and not self.places[p, 1]:
                    self.places[p, 1] = self._take(PLACE_BITS)
            self.ready[each] = 1

    # One word more for each row. In place, as a copy would need the memory of all states twice: what is there lies close
    # together at the beginning of the memory, and is moved apart from the end.
    def _widen(self) -> None:
        n, words = self.rows.shape
        self.must_fit(self.space.missing(n * (words + 1), n * words))
        self.rows = self.space.rows(n, words + 1)
        self.loops.move_apart(self.rows, len(self), words)

    def widened(self, rows: Array) -> Array:
        """A copy of *rows* that has as many words as there are now, if they have fewer."""
        missing = len(self.used) - rows.shape[1]
        return rows if missing <= 0 else np.concatenate([rows, np.zeros((len(rows), missing), np.uint64)], axis=1)

    def keep_up(self) -> None:
        """With the ways and parts of the trees."""
        self.room = _as_long(self.room, len(self.flat.of_part))
        self.ready = _as_long(self.ready, len(self.flat.payload))

    def grow(self, spare: int) -> None:
        """Have room for *spare* more rows; raises Full where there may be none."""
        n = len(self) + spare
        if n >= MOST:
            raise InternalError(f"more than {MOST} states")
        if n > len(self.rows):
            # What is mapped is moved by the kernel without being copied, so small steps cost nothing where there is much.
            more = n + n // (2 if n < MANY else 8)
            words = self.rows.shape[1]
            self.must_fit(self.space.missing(more * words, len(self) * words))
            self.rows = self.space.rows(more, words)
        if n > len(self.table) * FULL:
            size = _entries(n)
            self.must_fit(self.space.missing_of_table(size))
            self.table = np.zeros(0, np.uint64)         # lets the old one go
            self.table = self.space.table(size)
            self.rehash(self.rows, len(self), self.table)

    def leave(self) -> Space:
        """The space, for another scenario; when that begins, these rows are gone."""
        self.space.leave(len(self) * self.rows.shape[1], _entries(len(self)))
        return self.space

    def must_fit(self, more: int) -> None:
        """Raises Full where *more* bytes are more than there may be."""
        if self.max_bytes is not None and used() + more > self.max_bytes:
            raise Full

    def states(self, rows: Array) -> Array:
        """The bytes of the host's state of each of *rows*."""
        flat = self.flat
        states = np.tile(np.frombuffer(flat.initial, np.uint8), (len(rows), 1))
        self.loops.unpack(rows, np.array(self.placed, np.int64), self.room, flat.fields, flat.values, states)
        return states

    def place(self, rows: Array, p: int) -> Array:
        """Where party *p* stands in each of *rows*."""
        low, high = (_read(rows, int(where)) for where in self.places[p])
        return (low | high << np.uint64(PLACE_BITS)).astype(np.int64)

    def standing(self, parties: Sequence[int]) -> Array:
        """A row that has all bits in which these parties stand."""
        bits = np.zeros(len(self.used), np.uint64)
        for p in parties:
            for where in self.places[p].tolist():
                bits[where & WORD_MASK] |= np.uint64((where >> MASK_SHIFT) << (where >> SHIFT_SHIFT & SHIFT_MASK))
        return bits


# Of a table for *n* rows.
def _entries(n: int) -> int:
    size = 2 * FEW
    while n > size * FULL:
        size *= 2
    return size


def _read(rows: Array, where: int) -> Array:
    shift, mask = np.uint64(where >> SHIFT_SHIFT & SHIFT_MASK), np.uint64(where >> MASK_SHIFT)
    bits: Array = rows[:, where & WORD_MASK] >> shift & mask
    return bits


def _as_long(array: Array, length: int) -> Array:
    if length <= len(array):
        return array
    return np.concatenate([array, np.zeros(2 * length - len(array), array.dtype)])

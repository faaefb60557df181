"""Threads that explore one scenario together: which part of a level each takes, and how what they have made becomes rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from guest_memfd.explore.engine.compiled.encoding import (
    ASIDE,
    BATCH,
    COUNTERS,
    EVENTS,
    MET,
    ROWS,
    TRANSITIONS,
    Level,
    LoopNotes,
    Made,
    Scratch,
    StepTables,
)
from guest_memfd.explore.engine.compiled.flat import Array
from guest_memfd.explore.engine.compiled.load import threaded
from guest_memfd.explore.engine.compiled.memo import Memo

if TYPE_CHECKING:
    from guest_memfd.explore.engine.compiled.search import CompiledExplorer

T = TypeVar("T")

LEFT = 1 << 12
"""Rows whose probing may run over the end of a part of the table when it is made anew. A handful is what there is."""

MADE = 1 << 15
"""Rows that a thread makes before all enter theirs."""


class Threads:
    """*number* of them, at *explorer*. A context manager: they end with it."""

    def __init__(self, explorer: CompiledExplorer, number: int) -> None:
        self.explorer, self.number, self.loops = explorer, number, threaded()
        self._pool = ThreadPoolExecutor(number - 1)
        self._memos = [Memo(explorer.loops.MEMO, len(explorer.programs)) for _ in range(number)]
        self._count = np.zeros((number, COUNTERS), np.int64)
        self._events = [np.zeros(0, np.int64)] * number
        # Of all threads, one after the other.
        self._rows, self._hashes, self._by = np.zeros((0, 0), np.uint64), np.zeros(0, np.uint64), np.zeros((0, 2), np.int64)
        self._slots, self._met, self._aside = (np.zeros(0, np.int64),) * 3
        self._scratch: list[Scratch] = []
        explorer.rows.rehash = self.rehash

    def __enter__(self) -> Threads:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()
        # No cycle is left behind.
        self.explorer.rows.rehash, self.explorer.threads = self.explorer.loops.rehash, None

    def all(self, work: Callable[[int], T]) -> list[T]:
        """What *work* returns for the number of each thread. The last one is this one."""
        others = [self._pool.submit(work, thread) for thread in range(self.number - 1)]
        mine = work(self.number - 1)
        return [*(other.result() for other in others), mine]

    def share(self, lo: int, hi: int, work: Callable[[int, int, Memo], T]) -> list[T]:
        """What *work* returns for the part of [lo, hi) that each thread has, with its memo."""
        # The last levels may have been taken by one thread, with a memo of its own.
        self.explorer.keep_up(self._memos)
        parts = self._parts(lo, hi)
        return self.all(lambda t: work(parts[t], parts[t + 1], self._memos[t]))

    def expand(self, queue: Array, base: int, moved: Array) -> tuple[Array, Array, Array]:
        """Take every step that *queue* asks for: what was put aside, what was told, and the entries that have to wait.

        base, moved: as `encoding.Level` has them.
        """
        explorer, rows = self.explorer, self.explorer.rows
        each = self._make_ready()
        parts, level, most = self._parts(0, len(queue)), explorer.level(base, moved), explorer.known.flat.most
        lookups = [explorer.lookup(memo) for memo in self._memos]
        told = [LoopNotes(explorer.seen, *lists) for lists in zip(self._aside, self._events, self._count, strict=True)]

        def spread(t: int) -> int:
            mine = slice(t * each, (t + 1) * each)
            made = Made(self._hashes[mine], self._by[mine], self._met[t])
            # What is put aside when new rows are judged has room as well.
            return int(explorer.loops.spread(
                rows.rows, self._rows[mine], MADE, False, made, self._scratch[t], rows.table, lookups[t], rows.ready, queue,
                parts[t], parts[t + 1], level, told[t], len(self._aside[t]) - each, most))

        come = self.all(spread)
        for met, n in zip(self._met, self._count[:, MET].tolist(), strict=True):
            self.loops.wake(level, met, n)
        self._enter(self._count[:, ROWS].copy(), each, lookups, level, told)
        rows.count[TRANSITIONS] += self._count[:, TRANSITIONS].sum()
        aside = np.concatenate([self._aside[t][:n] for t, n in enumerate(self._count[:, ASIDE])])
        events = np.concatenate([self._events[t][:n] for t, n in enumerate(self._count[:, EVENTS])])
        self._count[:] = 0
        return aside, events, np.concatenate([queue[k:hi] for k, hi in zip(come, parts[1:], strict=True)])

    def rehash(self, rows: Array, n: int, table: Array) -> None:
        """Enter the first *n* rows into the empty *table*, as `loops_numba.rehash` does."""
        parts, left = self._parts(0, len(table)), np.zeros((self.number, LEFT), np.int64)
        many: list[int] = self.all(lambda t: self.explorer.loops.rehash_part(
            rows, n, table, parts[t], parts[t + 1], left[t], np.zeros(BATCH, np.uint64)))
        if max(many) > LEFT:
            table[:] = 0
            self.explorer.loops.rehash(rows, n, table)
        else:
            for some, k in zip(left, many, strict=True):
                for i in some[:k]:
                    self.explorer.loops.enter_again(rows, i, table)

    # Enters the rows that were made, *many* of each thread, and lets them be rows.
    def _enter(
        self, many: Array, each: int, lookups: Sequence[StepTables], level: Level, told: Sequence[LoopNotes]
    ) -> None:
        rows, start = self.explorer.rows, len(self.explorer.rows)
        parts = self._parts(0, len(rows.table))
        left = np.zeros((self.number, int(many.sum())), np.int64)

        def enter(t: int) -> Array:
            n = self.loops.enter(self._rows, self._hashes, self._by, many, each, start, rows.table, parts[t], parts[t + 1],
                                 self._slots, left[t], np.zeros(BATCH, np.int64))
            return left[t, :n]

        self.loops.enter_left(self._rows, self._hashes, self._by, np.concatenate(self.all(enter)), start, rows.table,
                              self._slots)
        mine = [slice(t * each, t * each + n) for t, n in enumerate(many.tolist())]
        fresh = [int(np.count_nonzero(self._slots[made] >= 0)) for made in mine]
        first = np.cumsum([start, *fresh])
        self.all(lambda t: self.loops.settle(
            self._rows, self._by, self._slots, mine[t].start, mine[t].stop, first[t], rows.rows, rows.table, lookups[t],
            level, told[t]))
        rows.count[ROWS] = first[-1]

    # Where in [lo, hi) the part of each thread begins, and the end.
    def _parts(self, lo: int, hi: int) -> Array:
        return np.linspace(lo, hi, self.number + 1).astype(np.int64)

    # Room for all that the threads may write; how many rows each can make.
    def _make_ready(self) -> int:
        explorer, rows, flat = self.explorer, self.explorer.rows, self.explorer.known.flat
        batch = BATCH + len(explorer.programs) * flat.most
        each = MADE + 2 * batch
        rows.grow(self.number * each + 1)
        explorer.keep_up(self._memos)
        shape = self.number * each, rows.rows.shape[1]
        if self._rows.shape != shape:
            self._rows, self._slots = np.zeros(shape, np.uint64), np.zeros(shape[0], np.int64)
            self._hashes, self._by = np.zeros(shape[0], np.uint64), np.zeros((shape[0], 2), np.int64)
            self._met = np.zeros((self.number, each, 2), np.int64)
            self._aside = np.zeros((self.number, 8 * each, 3), np.int64)
            self._scratch = [Scratch(np.zeros(batch + 1, np.uint64), np.zeros((batch, 2), np.int64),
                                     np.zeros((len(explorer.programs), 2), np.int64)) for _ in range(self.number)]
        if len(self._events[0]) < len(explorer.seen):
            self._events = [np.zeros(len(explorer.seen), np.int64) for _ in range(self.number)]
        return each

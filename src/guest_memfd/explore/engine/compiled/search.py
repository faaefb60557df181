"""The search, level by level, in compiled loops; Python is asked for what no one has met yet.

`CompiledExplorer` is an `Explorer` that visits in another way: same arguments, same `Result`. States are numbers of rows,
in the order in which they were found. Which of equally short runs is told is chosen as there (backwards.py), from the same
steps.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np

from guest_memfd.compat import override
from guest_memfd.errors import BadInput, EngineNotice, describe
from guest_memfd.explore.engine.backwards import Arrival
from guest_memfd.explore.engine.compiled.encoding import (
    ASIDE,
    ASKS,
    BATCH,
    BREAKS,
    EVENTS,
    HALTED,
    HALTS,
    MISSING,
    TRANSITIONS,
    Level,
    LoopNotes,
    StepTables,
)
from guest_memfd.explore.engine.compiled.flat import Array, TooWide
from guest_memfd.explore.engine.compiled.known import Broken, Known, changes
from guest_memfd.explore.engine.compiled.memo import Memo
from guest_memfd.explore.engine.compiled.rows import Rows
from guest_memfd.explore.engine.compiled.teardown import Teardown
from guest_memfd.explore.engine.explorer import Explorer, Least, never
from guest_memfd.explore.engine.finding import INTERRUPTED, Interrupted, Result, Sight, Step
from guest_memfd.explore.engine.footprint import Watched
from guest_memfd.explore.engine.memory import Full
from guest_memfd.explore.engine.program import Program
from guest_memfd.explore.engine.tables import NEVER_ENDS, Tables, Way
from guest_memfd.words.primitives import SILENT

if TYPE_CHECKING:
    from guest_memfd.explore.engine.compiled.threads import Threads

FEW = 1 << 11
"""Entries of a queue that are not worth waiting for one another."""

STRETCH = 1 << 16
"""Rows that are looked at together once the search is over."""


class CompiledExplorer(Explorer):
    """One scenario. *loops*: loops_numba or loops_numpy. *threads*: how many explore it together; numpy has one.

    The machine must keep footprints.
    """

    def __init__(
        self, tables: Tables, programs: Sequence[Program], initial: bytes, teardown: Program | None = None,
        broken_before: Sequence[Broken] = (), *, loops: Any, threads: int = 1,
    ) -> None:
        super().__init__(tables, programs, initial, teardown, broken_before)
        self.loops, self.number_of_threads = loops, threads
        self.threads: Threads | None = None
        self.known: Known = tables.flat.get(initial) or Known(tables, initial, loops)
        self.of = np.array([self.known.tree(program) for program in programs], np.int64)
        space, self.known.spare = self.known.spare, None        # of two explorers at a time each has its own
        self.rows = Rows(self.known.flat, len(programs), loops, space)
        self.memo = Memo(loops.MEMO, len(programs))
        self.first = 0                                  # row of this level
        self.asleep = np.zeros(1, np.uint16)            # of the rows from there on: who of SLEEPERS need not move
        self.bounds = [0]                               # of the levels: the first row of each, and one past the last
        self.idle: list[Array] = []                     # per level: the rows in which no one moves
        self.stopped = 0                                # and rows in which the machine has stopped
        self.stuck: Array | None = None                 # rows from which no end is reached
        self.torn_down: list[Sight] = []                # what breaks after the end
        self.seen = np.zeros(0, np.uint8)               # payloads that were told
        self._aside = np.zeros((0, 3), np.int64)
        self._events = np.zeros(0, np.int64)

    @override
    def run(
        self, max_states: int = 1 << 40, max_seconds: float = 1e9, max_steps: int = 1 << 40, max_bytes: int | None = None,
        stopped: Callable[[], bool] = never,
    ) -> Result:
        """Explore all of it, or up to a limit, as `Explorer.run` does."""
        began = time.perf_counter()
        # What is asked for and never answered must not be waited for in the next scenario.
        self.tables.flat.pop(self.initial, None)
        try:
            self.rows.max_bytes = max_bytes
            with self._threads() as self.threads:
                result = super().run(max_states, max_seconds, max_steps, max_bytes, stopped)
            self.tables.flat[self.initial], self.known.spare = self.known, self.rows.leave()
            return result
        except (BadInput, TooWide) as error:
            # Of several states that raise, the other engine comes to its own first. So it tells, on tables of its own.
            if isinstance(error, TooWide):
                warnings.warn(f"Python explores what the compiled engine cannot: {error}", EngineNotice, stacklevel=2)
            plain = Explorer(self.tables.empty(), self.programs, self.initial, self.teardown, self.broken_before)
            plain.told = self.told
            return plain.run(max_states, max_seconds - (time.perf_counter() - began), max_steps, max_bytes, stopped)

    # Their loops are compiled, or loaded, for those who use them.
    def _threads(self) -> AbstractContextManager[Threads | None]:
        if self.number_of_threads == 1:
            return nullcontext()
        from guest_memfd.explore.engine.compiled.threads import Threads

        try:
            return Threads(self, self.number_of_threads)
        except Exception as error:
            warnings.warn(f"several threads do not work here, one explores: {describe(error)}", EngineNotice, stacklevel=3)
            return nullcontext()

    @property
    @override
    def finals(self) -> int:
        """States in which no one moves."""
        return sum(map(len, self.idle)) + self.stopped

    @property
    @override
    def depth(self) -> int:
        """Steps to the last level."""
        return len(self.bounds) - 2

    # -- the search ------------------------------------------------------------------------------------------------------

    @override
    def _visit(self, reached: Callable[[int], str | None]) -> tuple[int, int, str | None]:
        rows, known = self.rows, self.known
        # What laws look at in the initial state; later only what changes that is judged.
        if known.flat.trees.root[BREAKS, 0] == MISSING:
            known.learn(BREAKS, self.initial)
            known.flatten()
        lo, hi, limit = 0, 1, None
        while lo < hi:
            self.asleep, self.first = self.asleep[lo - self.first:hi - self.first], lo
            self.bounds.append(hi)
            try:
                self.idle.append(self._next_level(lo, hi))
            except (Full, Interrupted) as cut:
                # What was found of the next level counts; who cannot move on this one is not known of all.
                self.idle.append(np.zeros(0, np.int64))
                limit = self.out_of_memory() if isinstance(cut, Full) else INTERRUPTED
                break
            lo, hi = hi, len(rows)
            self.levels.append([])                      # they are counted to see whether a limit is reached
            if (limit := reached(hi)) is not None:
                break
        try:
            if limit is None and any(automaton.cyclic() for automaton in self.automata):
                self.stuck = self._cannot_end()
                limit = INTERRUPTED if self.stuck is None else None
            self.torn_down = Teardown(self).sights()
        except Full:
            limit = limit or self.out_of_memory()
        return len(rows), int(rows.count[TRANSITIONS]), limit

    # Makes the next level out of rows [lo, hi); those of them in which no one moves.
    def _next_level(self, lo: int, hi: int) -> Array:
        idle, parties = [np.zeros(0, np.int64)], len(self.programs)
        for base in range(lo, hi, self.loops.CHUNK):
            if self.ending():
                raise Interrupted
            some = np.arange(base, min(base + self.loops.CHUNK, hi))
            queue = np.stack([some, np.full(len(some), parties)], axis=1)
            moved = np.zeros(len(some), np.uint8)
            while len(queue):
                queue = self._through(queue, base, moved)
            idle.append(some[moved == 0])
            self.stopped += int(np.count_nonzero(moved == HALTED))
        return np.concatenate(idle)

    # Once through a queue: what was put aside.
    def _through(self, queue: Array, base: int, moved: Array) -> Array:
        rows, flat, at, left = self.rows, self.known.flat, 0, [np.zeros((0, 2), np.int64)]
        while at < len(queue):
            self._make_ready()
            if self.threads is not None and len(queue) >= FEW:
                aside, events, not_yet = self.threads.expand(queue, base, moved)
                at = len(queue)
                left.append(not_yet)
            else:
                told = LoopNotes(self.seen, self._aside, self._events, rows.count)
                at = self.loops.expand(rows.rows, rows.table, self.lookup(self.memo), rows.ready, queue, at,
                                       self.level(base, moved), told, flat.most)
                aside, events = self._aside[:rows.count[ASIDE]].copy(), self._events[:rows.count[EVENTS]]
                rows.count[ASIDE] = rows.count[EVENTS] = 0
            left.append(aside[:, :2])
            self._answer(aside, events)
        return np.concatenate(left)

    # Room for all that a loop may write.
    def _make_ready(self) -> None:
        rows, known = self.rows, self.known.flat
        rows.keep_up()
        most = BATCH + len(self.programs) * known.most
        rows.grow(most + self.loops.SPARE)
        self.keep_up([self.memo])
        if len(self._aside) < 4 * most + self.loops.SPARE:
            self._aside = np.zeros((8 * most + self.loops.SPARE, 3), np.int64)
        if len(self.seen) < len(known.payload):
            more = np.zeros(2 * len(known.payload) - len(self.seen), np.uint8)
            self.seen = np.concatenate([self.seen, more])
            self._events = np.zeros(len(self.seen), np.int64)      # each payload is told once

    def lookup(self, memo: Memo) -> StepTables:
        """What the loops look steps up in, one of them with *memo*."""
        return StepTables(self.known.flat.trees, self.rows.room, self.rows.places, self.of, memo.looks, memo.entries)

    def level(self, base: int, moved: Array) -> Level:
        """The level that is explored now; *moved*: of rows from *base* on."""
        return Level(self.first, self.bounds[-1], self.asleep, base, moved)

    def keep_up(self, memos: Sequence[Memo]) -> None:
        """Have room in `asleep` for as many rows as there may be, and *memos* that are right."""
        missing = len(self.rows.rows) - self.first - len(self.asleep)
        if missing > 0:
            self.asleep = np.concatenate([self.asleep, np.zeros(missing, self.asleep.dtype)])
        for memo in memos:
            memo.keep_up(self.rows)

    # What the loop has told, and what it has asked for.
    def _answer(self, aside: Array, events: Array) -> None:
        rows, known = self.rows, self.known
        for what in events.tolist():
            for broken in known.flat.payload[what].broken:
                self.findings.setdefault(broken, self.depth)
        asks, narrow = aside[aside[:, 2] == ASKS], aside[aside[:, 2] >= 0]
        for p in np.unique(asks[:, 1]).tolist():
            some = rows.rows[asks[asks[:, 1] == p, 0]]
            places = rows.place(some, p).tolist() if p < len(self.programs) else [0] * len(some)
            for state, place in zip(rows.states(some), places, strict=True):
                self._learn(p, place, state.tobytes())
        if len(asks):
            known.flatten()
            rows.keep_up()
        for p, way in dict.fromkeys(map(tuple, narrow[:, 1:].tolist())):
            rows.make_room(way, [p])

    def _learn(self, p: int, place: int, state: bytes) -> None:
        if p < len(self.programs):
            self.known.learn_step(self.programs[p], place, state)
        else:
            self.known.learn(HALTS if p == len(self.programs) else BREAKS, state)

    # Clears rows from which an end is reached until no more can be; the others, or None if there was no time for it.
    def _cannot_end(self) -> Array | None:
        rows = self.rows
        rows.must_fit(len(rows))
        ends = np.zeros(len(rows), np.uint8)

        def alone(lo: int, hi: int, work: Callable[[int, int, Memo], int]) -> list[int]:
            self.keep_up([self.memo])
            return [work(lo, hi, self.memo)]

        share = alone if self.threads is None else self.threads.share

        def through(loop: Any) -> int | None:
            cleared = 0
            for hi in range(len(rows), 0, -STRETCH):
                if self.ending():
                    return None
                lo = max(0, hi - STRETCH)
                cleared += sum(share(lo, hi, lambda lo, hi, memo: int(
                    loop(rows.rows, rows.table, self.lookup(memo), lo, hi, ends))))
            return cleared

        cleared = through(self.loops.walk_to_ends)
        while cleared:
            cleared = through(self.loops.clear)
        return None if cleared is None else np.flatnonzero(ends != 1)

    # -- what was found --------------------------------------------------------------------------------------------------

    @override
    def _sights(self, *, complete: bool) -> list[Sight]:
        sights = [*self._moves_that_break(), *self._deadlocks(), *self.torn_down]
        if complete and self.stuck is not None and len(self.stuck):
            level = self.level_of(int(self.stuck[0]))
            best = Least[list[Step]]()
            self._add_least(best, self.stuck[self.stuck < self.bounds[level + 1]], ())
            sights.append(Sight("progress", NEVER_ENDS, level, best.tails))
        return sights

    def level_of(self, row: int) -> int:
        """The level that *row* lies on."""
        return int(np.searchsorted(self.bounds, row, "right")) - 1

    # Adds those of rows *which* that have most failures left, and the least host states.
    def _add_least(self, best: Least[list[Step]], which: Array, before: tuple[int, ...]) -> None:
        for at in range(0, len(which), STRETCH):
            some = which[at:at + STRETCH]
            states = self.rows.states(self.rows.rows[some])
            spared = self.spared(states)
            for i in np.flatnonzero(spared == spared.max()).tolist():
                best.add((*before, -int(spared[i]), states[i].tobytes()), int(some[i]), [])

    def spared(self, states: Array) -> Array:
        """How many failures each of *states* has left; the machine is asked once for all that agree where it looks."""
        looked: dict[int, int] = {}
        columns: list[int] = []
        while True:
            _, first, which = np.unique(states[:, columns], axis=0, return_index=True, return_inverse=True)
            watched: list[Any] = [Watched(states[i].tobytes(), looked) for i in first.tolist()]
            said = [self.tables.spared(state) for state in watched]
            if len(looked) == len(columns):
                return np.array(said, np.int64)[which.reshape(-1)]
            columns = sorted(looked)

    @override
    def _moves_that_break(self) -> Iterator[Sight]:
        levels: dict[int, list[Broken]] = {}
        for broken, level in self.findings.items():
            levels.setdefault(level, []).append(broken)
        for level, wanted in sorted(levels.items()):
            best = {broken: Least[tuple[int, int, int]]() for broken in wanted}
            for i, p, way, what, spared, saved in self._breaking(level, wanted):
                for broken in self.known.flat.payload[what].broken:
                    if broken in best:
                        best[broken].add((-spared, saved), i, (p, way, what))
            for broken, least in best.items():
                tails = {i: [self._tail(broken, i, *tail)] for i, tail in least.tails.items()}
                yield Sight(*broken, level, tails)

    # The moves from *level* by which something *wanted* breaks: row, party, way, payload, failures left, state before.
    def _breaking(self, level: int, wanted: Sequence[Broken]) -> Iterator[tuple[int, int, int, int, int, bytes]]:
        rows, flat = self.rows, self.known.flat
        marks = np.zeros(len(flat.payload), np.uint8)
        for broken in wanted:
            marks[self.known.payloads[broken]] = 1
        each = 2 * len(self.programs) * flat.most
        few = max(1, STRETCH // each)
        found = np.zeros((few * each, 4), np.int64)
        for lo in range(self.bounds[level], self.bounds[level + 1], few):
            n = self.loops.breaking(rows.rows, flat.trees, rows.room, rows.places, self.of, marks, lo,
                                    min(lo + few, self.bounds[level + 1]), found)
            if n:
                some = found[:n]
                # In the order in which the other engine comes to them, as the first of a state is told.
                some = some[np.lexsort((some[:, 2], some[:, 1], some[:, 0]))]
                before = rows.states(rows.rows[some[:, 0]])
                spared = self.spared(self._made(before, some[:, 2]))
                for entry, left, state in zip(some.tolist(), spared.tolist(), before, strict=True):
                    yield (*entry, left, state.tobytes())

    def _made(self, before: Array, ways: Array) -> Array:
        after = before.copy()
        for i, way in enumerate(ways.tolist()):
            for at, value in changes(self._end_of(way)):
                after[i, at] = value
        return after

    def _end_of(self, way: int) -> Way:
        ends: Sequence[Way] = self.known.flat.payload[way].ends
        return ends[0]

    # The step by which *broken* breaks: of ends that lead to one state, the first that has it.
    def _tail(self, broken: Broken, i: int, p: int, way: int, what: int) -> Step:
        ends = self.known.flat.payload[way].ends
        end = ends[0] if what != way else next(end for end in ends if broken in end.broken)
        return self._taken(p, end, self.state(i))

    def _taken(self, p: int, end: Way, before: bytes) -> Step:
        after = bytearray(before)
        for at, value in changes(end):
            after[at] = value
        return Step(self.programs[p].name, end.choices, end.primitive, end.result, end.failed, bytes(after), end.notes)

    def state(self, i: int) -> bytes:
        """The host's state of row *i*."""
        return bytes(self.rows.states(self.rows.rows[i:i + 1])[0])

    @override
    def _before(self, level: int, targets: set[int]) -> dict[int, list[Arrival]]:
        rows, trees = self.rows, self.known.flat.trees
        everyone = range(len(self.programs))
        others = np.stack([rows.standing([q for q in everyone if q != p]) for p in everyone])
        found: dict[int, list[Arrival]] = {}
        for target in targets:
            into = self.loops.before(rows.rows, trees, rows.room, rows.places, self.of, others, self.bounds[level],
                                     self.bounds[level + 1], target)
            found[target] = [
                Arrival(i, saved, p, way, self._taken(p, self._end_of(way), saved))
                for i, p, way in into[1:] for saved in [self.state(i)]
            ]
        return found

    # Rows in which someone waits, and no one moves. What is waited for follows from where the parties stand, but for one
    # that has choices or tracepoints before it.
    def _deadlocks(self) -> Iterator[Sight]:
        best: dict[Broken, Least[list[Step]]] = {}
        for level, idle in enumerate(self.idle):
            some = idle[~self.are_done(idle)]
            places = np.stack([self.rows.place(self.rows.rows[some], p) for p in range(len(self.programs))], axis=1)
            kinds, which = np.unique(places, axis=0, return_inverse=True)
            for number, kind in enumerate(kinds.tolist()):
                alike = some[which.reshape(-1) == number]
                waits = [a.waits_on[place] for a, place in zip(self.automata, kind, strict=True)]
                same = all(w is None or (w.name != "choose" and w.name not in SILENT) for w in waits)
                for rows in [alike] if same else alike.reshape(-1, 1):
                    for law, evidence, _ in self._at_end(level, self.code(int(rows[0])), set()):
                        self._add_least(best.setdefault((law, evidence), Least()), rows, (level,))
        for broken, least in best.items():
            yield Sight(*broken, self.level_of(next(iter(least.tails))), least.tails)

    def are_done(self, which: Array) -> Array:
        """Which of these rows have all parties at their ends."""
        done = np.ones(len(which), bool)
        for p, automaton in enumerate(self.automata):
            done &= self.rows.place(self.rows.rows[which], p) == automaton.done
        return done

    def code(self, i: int) -> int:
        """Row *i* as the other engine writes it."""
        code = self.tables.intern(self.state(i))
        for p, shift in enumerate(self.shifts):
            code |= int(self.rows.place(self.rows.rows[i:i + 1], p)[0]) << shift
        return code

"""The ends of the world, all at once: from each state in which everybody is done one party tears it down, and laws judge.

What comes out is what `Explorer._at_ends` says of these states.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from guest_memfd.explore.engine.compiled.encoding import (
    BREAKS,
    BREAKS_AT_END,
    END,
    HALT,
    HALTS,
    LAW,
    ODD,
    ROOM,
    STEP,
    WAITS,
)
from guest_memfd.explore.engine.compiled.flat import Array
from guest_memfd.explore.engine.compiled.known import Broken
from guest_memfd.explore.engine.finding import Sight, Step

if TYPE_CHECKING:
    from guest_memfd.explore.engine.compiled.search import CompiledExplorer

FAR = np.iinfo(np.int64).max
COPIES = 4
"""Of the rows in which all are done: they are picked, sorted, and torn down."""

ASKED = {LAW: BREAKS, HALT: HALTS, END: BREAKS_AT_END}


class Teardown:
    """The ends that *explorer* has come to."""

    def __init__(self, explorer: CompiledExplorer) -> None:
        self.explorer, self.known, self.rows = explorer, explorer.known, explorer.rows
        ends = np.concatenate([idle[explorer.are_done(idle)] for idle in explorer.idle])
        # Who has come to the same host state in fewer steps speaks for all.
        everyone = self.rows.standing(range(len(explorer.programs)))
        self.rows.must_fit(COPIES * len(ends) * everyone.nbytes)
        _, first = np.unique(self.rows.rows[ends] & ~everyone, axis=0, return_index=True) if len(ends) else (0, [])
        self.ends = ends[np.sort(np.array(first, np.int64))]
        self.level = np.searchsorted(explorer.bounds, self.ends, "right") - 1
        self.odd: dict[Broken, tuple[int, int]] = {}

    def sights(self) -> list[Sight]:
        """What breaks, or never comes to an end: the shortest runs, and of these the one that the other engine tells."""
        if not len(self.ends) or not (self._run() or self.odd):
            return []
        # Rows are in no order that means something. With what is least first, the first of all shortest runs is the one.
        states = self.rows.states(self.rows.rows[self.ends])
        spared = self.explorer.spared(states)
        order = sorted(range(len(self.ends)), key=lambda j: (-spared[j], self.level[j], states[j].tobytes()))
        self.ends, self.level, self.odd = self.ends[order], self.level[order], {}
        shortest = self._run() | self.odd
        for broken, found in self.odd.items():
            shortest[broken] = min(shortest[broken], found)
        return [Sight(*broken, int(self.level[j]), {int(self.ends[j]): self._more(broken, j)})
                for broken, (_, j) in shortest.items()]

    # Lets them all come to their ends: per (law, evidence) the steps in all of the shortest run, and its number.
    def _run(self) -> dict[Broken, tuple[int, int]]:
        explorer, rows, last = self.explorer, self.rows, self.explorer.teardown
        down = rows.rows[self.ends]
        down &= ~rows.standing(range(len(explorer.programs)))
        tree = -1 if last is None else self.known.tree(last)
        done = -1 if last is None else explorer.tables.automaton(last).done
        steps, unjudged = np.zeros(len(down), np.int64), np.zeros(len(down), np.uint8)
        best, best_at = np.zeros(0, np.int64), np.zeros(0, np.int64)
        todo, asks = np.arange(len(down)), np.zeros((len(down), 3), np.int64)
        while len(todo):
            rows.keep_up()
            more = len(rows.ready) - len(best)
            best, best_at = np.append(best, np.full(more, FAR)), np.append(best_at, np.zeros(more, np.int64))
            n = explorer.loops.run_down(
                down, self.known.flat.trees, rows.room, rows.places, tree, done, rows.ready, steps, self.level, unjudged,
                todo, best, best_at, asks)
            self._answer(down, asks[:n])
            # It may be done for the first time now.
            done = -1 if last is None else explorer.tables.automaton(last).done
            down = rows.widened(down)
            todo = np.sort(asks[:n, 0][asks[:n, 1] != ODD])
        shortest: dict[Broken, tuple[int, int]] = {}
        for what in np.flatnonzero(best < FAR).tolist():
            for broken in self.known.flat.payload[what].broken:
                found = int(best[what]), int(best_at[what])
                shortest[broken] = min(shortest.get(broken, found), found)
        return shortest

    def _answer(self, down: Array, asks: Array) -> None:
        last = self.explorer.teardown
        some = down[asks[:, 0]]
        for (j, what, way), state, place in zip(
            asks.tolist(), self.rows.states(some), self.rows.place(some, 0).tolist(), strict=True
        ):
            if way == WAITS:
                continue
            if what in ASKED:
                self.known.learn(ASKED[what], state.tobytes())
            elif what == STEP and last is not None:
                self.known.learn_step(last, place, state.tobytes())
            elif what == ROOM:
                self.rows.make_room(way, [0])
            else:
                self._as_it_is_told(j)
        self.known.flatten()

    # State by state: a teardown that waits, or does not end.
    def _as_it_is_told(self, j: int) -> None:
        for law, evidence, more in self._torn_down(j):
            found = int(self.level[j]) + len(more), j
            self.odd[law, evidence] = min(self.odd.get((law, evidence), found), found)

    def _torn_down(self, j: int) -> list[tuple[str, str, list[Step]]]:
        explorer = self.explorer
        return explorer._tear_down(explorer.tables.intern(explorer.state(int(self.ends[j]))))

    def _more(self, broken: Broken, j: int) -> list[Step]:
        return next(more for law, evidence, more in self._torn_down(j) if (law, evidence) == broken)

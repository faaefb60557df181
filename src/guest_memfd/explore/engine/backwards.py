"""Traces, found backwards: of all shortest runs to a state one that does not depend on how states were numbered.

Rule of this file: both engines choose here, so that they tell the same run, byte for byte.

Breadth first, a state of level n has all predecessors of its shortest runs on level n - 1. Of these the ones are kept whose
host state is the least, as bytes. As a rule that is one; those that differ only in where parties stand are all followed. On
the first level there is one state, and from there each state that was kept is ranked: by the rank of where it comes from,
the party that moves, and which of its moves it is. Nothing in this order is a number that an engine has given out, nor does
it depend on what was explored afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from guest_memfd.explore.engine.finding import Step


class Arrival(NamedTuple):
    """One step into a state: from state *source* whose host is *saved*, as the engine numbers states."""

    source: int
    saved: bytes
    party: int
    move: int
    step: Step


class Backwards:
    """The runs to all *wanted* states: level -> states. *before*: what leads from a level to states of the next."""

    def __init__(
        self, wanted: Mapping[int, Iterable[int]], before: Callable[[int, set[int]], Mapping[int, list[Arrival]]]
    ) -> None:
        arrivals: dict[int, dict[int, list[Arrival]]] = {}
        needed: dict[int, set[int]] = {level: set(states) for level, states in wanted.items()}
        for level in range(max(needed, default=0), 0, -1):
            found = before(level - 1, needed.setdefault(level, set()))
            arrivals[level] = {state: _least(found[state]) for state in needed[level]}
            needed.setdefault(level - 1, set()).update(
                arrival.source for kept in arrivals[level].values() for arrival in kept)
        self.rank: dict[tuple[int, int], int] = {(0, state): 0 for state in needed.get(0, ())}
        self._chosen: dict[tuple[int, int], Arrival] = {}
        for level in sorted(arrivals):
            def order(arrival: Arrival, below: int = level - 1) -> tuple[int, int, int]:
                return self.rank[below, arrival.source], arrival.party, arrival.move

            best = {state: min(kept, key=order) for state, kept in arrivals[level].items()}
            for rank, state in enumerate(sorted(best, key=lambda state: order(best[state]))):
                self.rank[level, state] = rank
                self._chosen[level, state] = best[state]

    def trace(self, level: int, state: int) -> list[Step]:
        """The run to *state*, which was wanted on *level*."""
        steps = []
        while level:
            arrival = self._chosen[level, state]
            steps.append(arrival.step)
            level, state = level - 1, arrival.source
        steps.reverse()
        return steps


def _least(arrivals: list[Arrival]) -> list[Arrival]:
    least = min(arrival.saved for arrival in arrivals)
    return [arrival for arrival in arrivals if arrival.saved == least]

"""What one step passes before others can see it: choices, tracepoints and loads, each at a place of the party.

A place is where the party stands, and the state of the host. It is passed once for each set of facts that were noted on
the way to it, so a loop of such primitives comes to an end here, and what it notes is kept.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from typing import Generic, TypeVar

Place = Hashable
W = TypeVar("W")


class Passed(Generic[W]):
    """The places that one step passes, which leads to which, and which lead out: to a step, a wait, or the end."""

    def __init__(self) -> None:
        self._known: set[tuple[Place, frozenset[Hashable]]] = set()
        self._first: dict[Place, W] = {}
        self._leads: set[tuple[Place | None, Place]] = set()
        self._out: set[Place | None] = set()
        self._again = False

    def enter(self, before: Place | None, place: Place, way: W, facts: Iterable[Hashable]) -> bool:
        """Come from *before* (None: the step starts here) to *place* by *way*; False if nothing is new about that."""
        self._first.setdefault(place, way)
        self._leads.add((before, place))
        # With other facts the same place is another visit: a law may break by a fact that the second way round
        # leaves.
        visit = (place, frozenset(facts))
        if visit in self._known:
            self._again = True
            return False
        self._known.add(visit)
        return True

    def leaves(self, place: Place | None) -> None:
        """From *place* the party can come to something else than another such place."""
        self._out.add(place)

    def traps(self) -> Iterator[W]:
        """The ways to the places from which nothing leads out, each as far as the first of them."""
        if not self._again:                             # without a loop everything leads out
            return
        out = self._out | self._first.keys() - {before for before, _ in self._leads}
        # Backwards from what leads out, until nothing is added: what is then left can only go round.
        while more := {before for before, place in self._leads if place in out} - out:
            out |= more
        entered = {place for before, place in self._leads if before is None or before in out}
        yield from (way for place, way in self._first.items() if place in entered and place not in out)

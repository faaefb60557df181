"""What a primitive does to a host, for whoever asks: worked out once for all states that agree where it looks.

The table of steps (tables.py) is by places, and many places ask for one primitive: ten VMMs that call one library. Only who
asks matters to the host, and parties that are one task are one to it. So a primitive is carried out on states that it does
not know yet, whoever stands where, and the step that is being worked out gets the footprint: it looks at the same bytes in
the same order, and makes the same changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from guest_memfd.explore.engine.footprint import Watched, grow
from guest_memfd.explore.engine.program import ExploredHost, perform
from guest_memfd.words.primitives import Primitive


class Done(NamedTuple):
    """One outcome: as `Outcome`, but for the bytes that have changed in place of the host afterwards."""

    result: Any
    change: tuple[tuple[int, int], ...]
    failed: bool
    notes: tuple[Any, ...]


class Performed:
    """The outcomes of primitives on *machine*, which keeps footprints."""

    def __init__(self, machine: ExploredHost) -> None:
        self.machine = machine
        self._trees: dict[Any, Any] = {}

    def __call__(self, state: Watched, party: int, primitive: Primitive, key: Any) -> Sequence[Done]:
        """All ways *primitive*, asked for by *party*, can end in *state*. key: what tells it from all others."""
        node = self._trees.get((party, key))
        # Each look is noted in the footprint of the step, as if the primitive had been carried out.
        while type(node) is tuple:
            at, below = node
            node = below.get(state[at])
        if node is None:
            node = self._carry_out(state, party, primitive, key)
        known: Sequence[Done] = node
        return known

    def _carry_out(self, state: Watched, party: int, primitive: Primitive, key: Any) -> list[Done]:
        seen: dict[int, int] = {}
        watched: Any = Watched(bytes(state), seen)
        outcomes = perform(self.machine, watched, party, primitive)
        done = []
        for outcome in outcomes:
            after = bytes(outcome.shared)
            change = tuple((at, after[at]) for at, old in seen.items() if after[at] != old)
            done.append(Done(outcome.result, change, outcome.failed, outcome.notes))
        for at in seen:
            state[at]
        self._trees[party, key] = grow(self._trees.get((party, key)), seen, done)
        return done

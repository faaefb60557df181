"""The abstract host with a memory: what a primitive does is a function of the bytes it reads, so it is done once.

Rule of this file: nothing here knows what a byte means. A primitive is carried out by `AbstractHost` on a state that
notes which bytes were looked at; its ends are kept as (result, bytes to change) under the values seen. Most states
differ in bytes that a primitive never looks at, so a few hundred runs answer for millions of states.
"""

from __future__ import annotations

from typing import Any, NamedTuple, SupportsIndex

from guest_memfd.check.outcome import Outcome
from guest_memfd.hosts.abstract import state as st
from guest_memfd.hosts.abstract.machine import AbstractHost
from guest_memfd.hosts.host import Primitive


class _Watched(bytearray):
    # The bytes of a state; `seen` learns the value of each as it was before anybody touched it.
    seen: dict[int, int]

    def __getitem__(self, at: Any) -> Any:
        value = super().__getitem__(at)
        self.seen.setdefault(at, value)
        return value

    # A byte that is written counts as read: then what changes is a function of what was seen, too.
    def __setitem__(self, at: SupportsIndex | slice, value: Any) -> None:
        self.seen.setdefault(at, super().__getitem__(at))     # type: ignore[arg-type, call-overload]
        super().__setitem__(at, value)


class _End(NamedTuple):
    result: Any
    change: tuple[tuple[int, int], ...]
    notes: tuple[Any, ...]
    failed: bool


# A decision tree: look at byte `at`, go on below its value; leaves are the ends there are.
class _Look:
    __slots__ = ("at", "below")

    def __init__(self, at: int) -> None:
        self.at = at
        self.below: dict[int, _Look | tuple[_End, ...]] = {}


class Remembering(AbstractHost):
    """An `AbstractHost` that carries out each primitive once per footprint. Same outcomes, in the same order.

    What raises is not remembered.
    """

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self._trees: dict[tuple[int, Primitive], _Look | tuple[_End, ...]] = {}
        self._seen: dict[int, int] = {}

    def outcomes(self, shared: bytes, party: int, primitive: Primitive) -> list[Outcome]:
        """As `AbstractHost.outcomes`."""
        tree = self._trees.get((party, primitive))
        while type(tree) is _Look:
            tree = tree.below.get(shared[tree.at])
        if tree is None:
            return self._learn(shared, party, primitive)
        ends = []
        for result, change, notes, failed in tree:      # type: ignore[misc]
            after = shared
            if change:
                raw = bytearray(shared)
                for at, value in change:
                    raw[at] = value
                after = bytes(raw)
            ends.append(Outcome(result, after, notes, failed))
        return ends

    def open(self, shared: bytes) -> st.State:
        """A state that is watched."""
        state = st.State()
        raw = state.raw = _Watched(shared)
        raw.seen = self._seen
        return state

    def _learn(self, shared: bytes, party: int, primitive: Primitive) -> list[Outcome]:
        self._seen = {}
        outcomes = super().outcomes(shared, party, primitive)
        ends = tuple(
            _End(o.result, tuple((at, o.shared[at]) for at, old in self._seen.items() if o.shared[at] != old),
                 o.notes, o.failed)
            for o in outcomes
        )
        self._keep((party, primitive), ends)
        return outcomes

    # The code is deterministic: as long as the values agree with an earlier run, so does the byte it looks at next.
    def _keep(self, key: tuple[int, Primitive], ends: tuple[_End, ...]) -> None:
        path = list(self._seen.items())
        if not path:
            self._trees[key] = ends
            return
        node = self._trees.setdefault(key, _Look(path[0][0]))
        for (_, value), (following, _) in zip(path, path[1:], strict=False):
            node = node.below.setdefault(value, _Look(following))   # type: ignore[union-attr]
        node.below[path[-1][1]] = ends                              # type: ignore[union-attr]

"""Aborts that the kernel took and survived: what a verdict of `kept` on host-survives rests on, and why.

The explorer keeps only what breaks a law; these facts break none, so they are read off its tables afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from guest_memfd.compat import override
from guest_memfd.explore.world.scenario import world
from guest_memfd.words.facts import Abort

STATES = 100_000
"""States per scenario after which the search for survived aborts is given up: it illustrates, it proves nothing."""


class Survived(NamedTuple):
    """An abort of one kind that the kernel survives in some reachable state."""

    party: str
    what: str
    stage: int
    kind: str
    why: str

    @override
    def __str__(self) -> str:
        return f"{self.party}: {self.what} takes a {self.kind} (stage {self.stage}) and goes on: {self.why}"


def survived(design: str, hypervisor: str, scenarios: Sequence[Sequence[str]]) -> list[Survived]:
    """The distinct aborts survived in *scenarios* (lists of parties) when nothing fails; raises as exploring does."""
    built = world(design, hypervisor, failures=0, laws=())
    for parties in scenarios:
        if all(name in built.programs for name in parties):
            built.explorer(parties).run(max_states=STATES)
    return sorted({
        Survived(party, note.what, note.stage, note.kind, note.why)
        for party, note in built.tables.facts if isinstance(note, Abort) and note.survived
    })

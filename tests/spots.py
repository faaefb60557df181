"""A mistake, where it shows, and what is seen there: law, evidence, and the steps of the shortest trace."""

from __future__ import annotations

from typing import NamedTuple

from guest_memfd.explore.engine.explorer import Explorer
from guest_memfd.explore.engine.finding import Finding


class Spot(NamedTuple):
    """*mistake*: a name; two of them, joined by +, are made together."""

    mistake: str
    hypervisor: str
    scene: str
    parties: str
    law: str
    steps: int
    evidence: str


def seen(explorer: Explorer, spot: Spot, stages: tuple[int, ...]) -> list[Finding]:
    """What breaks: in so many states, and in more if *spot* is not seen. What shows soon needs no look at all the rest."""
    found: list[Finding] = []
    for most in stages:
        found = explorer.run(max_states=most).findings
        if any(f.law == spot.law and f.evidence.startswith(spot.evidence) for f in found):
            break
    return found


def shortest(found: list[Finding], law: str, evidence: str) -> int:
    """Steps of the shortest of *found* that breaks *law* by this evidence."""
    lengths = [len(f.steps) for f in found if f.law == law and f.evidence.startswith(evidence)]
    assert lengths, [(f.law, f.evidence, len(f.steps)) for f in found]
    return min(lengths)

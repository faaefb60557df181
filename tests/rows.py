"""A bug as a row of docs/bugs.md: a design, where it shows, which law sees it, in how many steps; and a repaired twin.

The twin is explored in the same scenario, as far as it goes, and is not refuted by this evidence.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

from guest_memfd.designs import DESIGNS, Design
from guest_memfd.explore.engine.finding import Finding
from guest_memfd.explore.world.scenario import World
from guest_memfd.hypervisors import HYPERVISORS
from guest_memfd.scenarios import PARTIES, SCENES
from guest_memfd.scenarios.party import Party
from guest_memfd.words.scene import Scene

MOST, ALL = 60_000, 1 << 40
"""States that are explored at most, and steps: as many as there are."""


class Row(NamedTuple):
    """*design* breaks *law* in *steps*, and *twin* does not by this evidence. number: of docs/bugs.md, or none.

    fails: whether something may be made to fail.
    """

    number: str
    design: str
    twin: str
    hypervisor: str
    scene: str
    parties: str
    law: str
    steps: int
    evidence: str
    fails: bool = True


class Bench:
    """Explores rows whose designs are known, or lie in *mistakes*, up to *most* states.

    *parties*, *scenes*: a test's own, by name.
    """

    def __init__(self, mistakes: ModuleType, parties: Mapping[str, Party] | None = None,
                 scenes: Mapping[str, Scene] | None = None, most: int = MOST) -> None:
        self.mistakes, self.most = mistakes, most
        self.parties, self.scenes = parties or {}, scenes or {}
        self.explored = cache(self._explore)

    def lengths(self, row: Any, name: str, steps: int = ALL) -> list[int]:
        """Of all ways in which the design called *name* breaks the law of *row*, by its evidence, in *steps* at most."""
        found = self.explored(name, row.hypervisor, row.scene, row.parties, row.fails, steps)
        return [len(f.steps) for f in found if f.law == row.law and f.evidence.startswith(row.evidence)]

    def _explore(self, name: str, hypervisor: str, scene: str, parties: str, fails: bool, steps: int) -> list[Finding]:
        names = parties.split()
        known = [self.parties.get(party) or PARTIES[party] for party in names]
        there = World(self.design(name), HYPERVISORS[hypervisor], known, scene=self.scenes.get(scene) or SCENES[scene],
                      failures=None if fails else 0)
        result = there.explorer(names).run(max_states=self.most, max_steps=steps)
        assert steps < ALL or result.limit is None
        return result.findings

    def design(self, name: str) -> type[Design]:
        """The design called *name*."""
        made: Any = DESIGNS[name] if name in DESIGNS else getattr(self.mistakes, name)
        return made


def made_in(module: ModuleType) -> set[str]:
    """The names of the classes that *module* has made."""
    return {name for name, thing in vars(module).items() if isinstance(thing, type) and thing.__module__ == module.__name__}


def line_of(row: Any) -> tuple[str, str]:
    """How the line of *row* in docs/bugs.md begins, and how it ends."""
    where = row.hypervisor if row.scene == "two-pages" else f"{row.hypervisor}, {row.scene}"
    return f"| {row.number} |", f"| {where}, {row.parties.replace(' ', ' + ')} | {row.law} | {row.steps} |"

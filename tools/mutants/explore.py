"""The explorer's scenarios. The only file that knows how the suite is asked, and what the explorer is made of.

Most mutants that live do nothing else than the code does, as far as the scenarios go. That can be seen without exploring:
a party is told results and answers with primitives. If the mutated one answers as before whatever it was ever told, in
all orders in which it can have been told so, it is the same party, and so are all scenarios of such parties.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from mutants.killer import Killer, Member, Scenario, Seen, Tried

if TYPE_CHECKING:
    from guest_memfd.explore.engine.automaton import Automaton
    from guest_memfd.explore.engine.program import Program
    from guest_memfd.explore.engine.tables import Tables
    from guest_memfd.explore.world.scenario import World
    from mutants.mutant import Mutant, Place

HYPERVISORS = ("kvm", "pkvm", "gunyah")
BY_LARGE_FOLIOS = ("tdx", "snp", "cca")
"""Explored in scenes with large folios alone: with single pages they differ little from plain KVM."""
TEARDOWN = "teardown"
SLOW = "vmm"

JUDGED = ("shared_ids", "shared", "broken", "halted")
"""Tables of host states and what the laws say of each: they depend on the laws and the host, on no code that is mutated."""


@dataclass
class Told:
    """One party: what it asked for at each of its places, and where what it was told has led it."""

    asked: list[str]
    told: list[list[tuple[Any, int]]]


class Explored(Killer):
    """The suite for a first look, under every hypervisor, but for the slowest: the VMM of two changes, in company.

    most: how many parties a scenario has at most. scenes: names, None for all.
    """

    name = "suite"

    def __init__(self, most: int = 3, scenes: tuple[str, ...] | None = None) -> None:
        self.most, self.scenes = most, scenes
        self.worlds: dict[str, World] = {}              # as they are after all scenarios were explored in them
        self.told: dict[Member, Told] = {}

    def names(self) -> dict[str, tuple[str, str]]:
        """World -> hypervisor and scene."""
        from guest_memfd.scenarios import SCENES

        return {f"{hypervisor}, {scene}": (hypervisor, scene)
                for hypervisor, scene in itertools.product((*HYPERVISORS, *BY_LARGE_FOLIOS), self.scenes or SCENES)
                if SCENES[scene].order or hypervisor in HYPERVISORS}

    def scenarios(self) -> Iterator[Scenario]:
        """In new worlds."""
        self.worlds = {}
        for name, (hypervisor, scene) in self.names().items():
            self.worlds[name] = built = _world(hypervisor, scene)
            for parties in self.plan(built):
                yield _scenario(name, parties, partial(_explore, built, parties))

    def plan(self, built: World) -> Iterator[tuple[str, ...]]:
        """The parties of each scenario."""
        from guest_memfd.explore.suite.plan import plan

        for parties in plan(built, full=False):
            if len(parties) <= self.most and (len(parties) == 1 or SLOW not in parties):
                yield parties

    @contextmanager
    def watching(self, seen: set[Place]) -> Iterator[dict[Member, set[Place]]]:
        """A party is at work while the explorer resumes it."""
        from guest_memfd.explore.engine import automaton

        kept: defaultdict[Member, set[Place]] = defaultdict(set)

        def noting(run: Callable[..., Any]) -> Callable[..., Any]:
            def noted(program: Program, *rest: Any) -> Any:
                others = seen.copy()
                seen.clear()
                try:
                    return run(program, *rest)
                finally:
                    world = next(name for name, built in self.worlds.items() if _has(built, program))
                    kept[world, program.name] |= seen
                    seen.clear()
                    seen.update(others)

            return noted

        resume, send = automaton.resume, automaton.send
        automaton.resume, automaton.send = noting(resume), noting(send)
        try:
            yield kept
        finally:
            automaton.resume, automaton.send = resume, send

    def prepare(self) -> None:
        """Fill the tables, and note all that a party is told."""
        from guest_memfd.explore.engine.automaton import Automaton

        after = Automaton.after
        told: dict[int, dict[Any, tuple[Any, int]]] = {}

        def noting(automaton: Automaton, local: int, result: Any) -> int:
            to = after(automaton, local, result)
            told.setdefault(id(automaton), {})[local, repr(result)] = (result, to)
            return to

        Automaton.after = noting  # type: ignore[assignment,method-assign]
        try:
            for scenario in self.scenarios():
                scenario.run()
        finally:
            Automaton.after = after  # type: ignore[method-assign]
        for name, built in self.worlds.items():
            for automaton in built.tables.automata.values():
                self.told[name, automaton.program.name] = _told(automaton, told.get(id(automaton), {}))

    def against(self, mutant: Mutant, seen: Seen) -> Tried:
        """In the worlds as they were left, with what the mutant may have changed taken out of their tables."""
        return _Against(self, mutant, seen)


class _Against(Tried):
    # The parties that reach the mutant begin anew; all others are where they were, and so is what they do.
    def __init__(self, killer: Explored, mutant: Mutant, seen: Seen) -> None:
        self.killer, self.mutant, self.seen = killer, mutant, seen
        self.anew = mutant.site.function is None or mutant.site.is_hypercall
        self.worlds: dict[str, World] = {}
        self.differing: dict[Member, bool] = {}
        super().__init__(_scenario(name, parties, partial(self._run, name, parties))
                         for name, built in killer.worlds.items() for parties in killer.plan(built))

    def _run(self, name: str, parties: tuple[str, ...]) -> str | None:
        return _explore(self._world(name), parties)

    def _world(self, name: str) -> World:
        if name not in self.worlds:
            self.worlds[name] = self._changed(name)
        return self.worlds[name]

    def _changed(self, name: str) -> World:
        kept, (hypervisor, scene) = self.killer.worlds[name], self.killer.names()[name]
        built = _world(hypervisor, scene)
        if self.anew or built.initial != kept.initial or built.broken_before:
            vars(built.tables).update({table: getattr(kept.tables, table) for table in JUDGED})
            return built
        for program in (*kept.programs.values(), kept.teardown):
            if self._reaches(name, program.name):
                _forget(kept.tables, program)
        return kept

    def _reaches(self, world: str, party: str) -> bool:
        return not self.mutant.places().isdisjoint(self.seen.get((world, party), ()))

    def changed(self, scenario: Scenario) -> bool:
        """Whether a party of it answers otherwise, or the host: the hypervisor's own half is code of the host."""
        built = self._world(scenario.world)
        if built is not self.killer.worlds[scenario.world]:
            return True
        return any(self._differs(built, (scenario.world, party)) for party in scenario.parties)

    def _differs(self, built: World, member: Member) -> bool:
        if member not in self.differing:
            name = member[1]
            program = built.teardown if name == TEARDOWN else built.programs[name]
            self.differing[member] = self._reaches(*member) and _differs(self.killer.told[member], program, built.tables)
        return self.differing[member]


# Each party is run by itself: which code it comes to is asked, and that may be changed.
def _world(hypervisor: str, scene: str) -> World:
    from guest_memfd.explore.world.scenario import world

    built = world("library", hypervisor, scene=scene, engine="python")
    built.tables.share = False
    return built


def _scenario(world: str, parties: tuple[str, ...], run: Callable[[], str | None]) -> Scenario:
    return Scenario(world, f"{world}: {', '.join(parties)}", run, (*parties, TEARDOWN))


def _has(built: World, program: Program) -> bool:
    return built.programs.get(program.name) is program or built.teardown is program


def _forget(tables: Tables, program: Program) -> None:
    tables.automata.pop(program, None)
    for key in [key for key in tables.steps if key[0] is program]:
        del tables.steps[key]
    for end in [end for end in tables.ends if end[0] is program]:
        del tables.ends[end]


def _told(automaton: Automaton, moves: Mapping[Any, tuple[Any, int]]) -> Told:
    told: list[list[tuple[Any, int]]] = [[] for _ in automaton.waits_on]
    for (local, _), move in moves.items():
        told[local].append(move)
    return Told([repr(primitive) for primitive in automaton.waits_on], told)


# Whether the program, told all that the other was told, ever asks for something else. Two histories that were one place
# before need not be one now, so pairs of places are followed. What is found out about the program stays in *tables*.
def _differs(before: Told, program: Program, tables: Tables) -> bool:
    from guest_memfd.errors import BadInput

    try:
        now = tables.automaton(program)
        level = seen = {(0, 0)}
        while level:
            if any(repr(now.waits_on[here]) != before.asked[was] for was, here in level):
                return True
            level = {(to, now.after(here, result)) for was, here in level for result, to in before.told[was]} - seen
            seen = seen | level
    except BadInput:
        return True
    return False


def _explore(built: World, names: tuple[str, ...]) -> str | None:
    explorer = built.explorer(names)
    explorer.findings = _First()
    try:
        findings = explorer.run().findings
    except Found as found:
        return str(found)
    return _words(findings[0].law, findings[0].evidence) if findings else None


class Found(Exception):  # noqa: N818 - a signal, not an error
    """A law is broken, and that is all we want to know."""


class _First(dict[Any, Any]):
    def __setitem__(self, broken: tuple[str, str], where: object) -> None:
        raise Found(_words(*broken))


def _words(law: str, evidence: str) -> str:
    return f"{law}: {evidence}"

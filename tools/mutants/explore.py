"""The explorer's scenarios. The only file that knows how the suite is asked, and what the explorer is made of.

Most mutants that live do nothing else than the code does, as far as the scenarios go. That can be seen without exploring:
a party is told results and answers with primitives. If the mutated one answers as before whatever it was ever told, in
all orders in which it can have been told so, it is the same party, and so are all scenarios of such parties.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from mutants.killer import Killer, Scenario

if TYPE_CHECKING:
    from guest_memfd.check.explorer import Automaton, Program, Tables
    from guest_memfd.check.scenario import World
    from mutants.mutant import Mutant

HYPERVISORS = ("kvm", "pkvm", "gunyah")
TEARDOWN = "teardown"

JUDGED = ("shared_ids", "shared", "broken", "halted")
"""Tables of host states and what the laws say of each: they depend on the laws and the host, on no code that is mutated."""


@dataclass
class Told:
    """One party: what it asked for at each of its places, and where what it was told has led it."""

    asked: list[str]
    told: list[list[tuple[Any, int]]]


@dataclass
class Record:
    """What was done in the scenarios: by world the scene and the judged states, by (world, party) what it was told."""

    scenes: dict[str, bytes] = field(default_factory=dict)
    judged: dict[str, dict[str, Any]] = field(default_factory=dict)
    parties: dict[tuple[str, str], Told] = field(default_factory=dict)

    def keep(self, world: str, built: World, told: Mapping[int, Mapping[Any, tuple[Any, int]]]) -> None:
        """Add a world. *told*: by automaton (its id), (place, result in words) -> result and the next place."""
        self.scenes[world] = built.initial
        self.judged[world] = {name: getattr(built.tables, name) for name in JUDGED}
        for automaton in built.tables.automata.values():
            self.parties[world, automaton.program.name] = _told(automaton, told.get(id(automaton), {}))


class Explored(Killer):
    """The suite for a first look, under every hypervisor.

    most: how many parties a scenario has at most. scenes: names, None for all.
    """

    def __init__(self, most: int = 2, scenes: tuple[str, ...] | None = None) -> None:
        self.most, self.scenes = most, scenes
        self.worlds: dict[str, World] = {}

    def scenarios(self, record: Record | None = None) -> Iterator[Scenario]:
        """From new worlds; how the laws judge a state of the host is known from before."""
        from guest_memfd.check.plan import plan
        from guest_memfd.check.scenario import world
        from guest_memfd.scenarios import SCENES

        for hypervisor, scene in itertools.product(HYPERVISORS, self.scenes or SCENES):
            name = f"{hypervisor}, {scene}"
            built = self.worlds[name] = world("library", hypervisor, scene=scene)
            if record is not None:
                vars(built.tables).update(record.judged[name])
            for parties in plan(built, full=False):
                if len(parties) <= self.most:
                    run = partial(_explore, built, parties)
                    yield Scenario(name, f"{name}: {', '.join(parties)}", run, (*parties, TEARDOWN))

    @contextmanager
    def recording(self) -> Iterator[Record]:
        """Note all that a party is told."""
        from guest_memfd.check.explorer import Automaton

        record, after = Record(), Automaton.after
        told: dict[int, dict[Any, tuple[Any, int]]] = {}

        def noting(automaton: Automaton, local: int, result: Any) -> int:
            to = after(automaton, local, result)
            told.setdefault(id(automaton), {})[local, repr(result)] = (result, to)
            return to

        Automaton.after = noting  # type: ignore[assignment,method-assign]
        try:
            yield record
        finally:
            Automaton.after = after  # type: ignore[method-assign]
        for name, built in self.worlds.items():
            record.keep(name, built, told)

    def changed(self, record: Record, mutant: Mutant) -> Callable[[Scenario], bool]:
        """Whether a party of it answers otherwise, or the host: the hypervisor's own half is code of the host."""
        if mutant.site.function is None or _is_host(mutant):
            return lambda _scenario: True
        return partial(self._may_differ, record, {})

    def _may_differ(self, record: Record, known: dict[tuple[str, str], bool], scenario: Scenario) -> bool:
        built = self.worlds[scenario.world]
        if built.initial != record.scenes[scenario.world] or built.broken_before:
            return True
        for party in scenario.parties:
            key = scenario.world, party
            if key not in known:
                program = built.teardown if party == TEARDOWN else built.programs[party]
                known[key] = _differs(record.parties[key], program, built.tables)
            if known[key]:
                return True
        return False


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


def _is_host(mutant: Mutant) -> bool:
    function = mutant.site.function
    return function is not None and bool(function.args.args) and function.args.args[0].arg.strip("_") == "stage2"


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

"""A random walk: all parties of a scene at once, far more than can be explored, one schedule after the other.

It proves nothing, and nothing that it finds is dropped. It takes the same steps as the explorer, from the same tables, so a
step that was taken before costs a look-up, and what is new is counted: the footprints (engine/footprint.py). As long as a
walk meets new ones it sees what it has not seen; when it has met none for long, more of it is not worth much.

Every step is judged by every law. What breaks comes with the seed of its schedule, and is made shorter (shorten.py).
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from guest_memfd.explore.engine.explorer import Explorer
from guest_memfd.explore.engine.finding import Finding, Step
from guest_memfd.explore.engine.footprint import Remembered
from guest_memfd.explore.engine.program import Program
from guest_memfd.explore.engine.tables import Way
from guest_memfd.explore.world.scenario import World

FAILS = 0.1
"""How often what can fail does, while the scene has failures left."""

CHANGES, WITHIN = 3, 300
"""How often a schedule by priorities changes them, and within how many steps (Burckhardt et al., ASPLOS 2010)."""

SOME = 0.5
"""How often only some of the parties are there."""

PATIENCE = 100
"""Steps in a row after which whoever takes them has to let others go: he may be trying again and again."""

Broken = tuple[str, str]
"""(law, evidence)."""


@dataclass(frozen=True)
class Stumble:
    """What a schedule came across: the seed of the schedule, who took part, and the run to it."""

    seed: int
    parties: tuple[str, ...]
    finding: Finding


@dataclass
class Walked:
    """What a walk came to: steps and schedules, footprints met, after how many steps the last new one, and what broke."""

    steps: int = 0
    schedules: int = 0
    footprints: int = 0
    last_new: int = 0
    found: list[Stumble] = field(default_factory=list)


class Walks:
    """The schedules of one world, on tables of their own."""

    def __init__(self, world: World) -> None:
        self.world, self.tables = world, world.tables.empty()
        self._judge = Remembered(lambda state: [
            (law.name, said) for law in self.tables.state_laws if (said := law.in_state(state)) is not None])

    def judge(self, state: bytes) -> Sequence[Broken]:
        """(law, evidence) of each law that *state* breaks."""
        broken: Sequence[Broken] = self._judge(state)
        return broken

    def start(self, programs: Iterable[Program]) -> Standing:
        """All of *programs* at their starts."""
        return Standing(self, list(programs))


class Standing:
    """Where the parties stand, how they have come there, and what has broken by the last step."""

    def __init__(self, walks: Walks, programs: list[Program]) -> None:
        self.walks, self.programs, self.state = walks, programs, walks.world.initial
        self.automata = [walks.tables.automaton(program) for program in programs]
        self.places = [0] * len(programs)
        self.steps: list[Step] = []
        self.broken: list[Broken] = [*walks.world.broken_before, *walks.judge(self.state)]

    def ways(self, i: int) -> Sequence[Way]:
        """All that party *i* can do."""
        tables, place = self.walks.tables, self.places[i]
        if self.automata[i].waits_on[place] is None or tables.machine.halted(self.state):
            return ()
        return tables.known(self.automata[i], place, self.state)

    def take(self, i: int, way: Way) -> None:
        """Let party *i* go this *way*."""
        assert isinstance(way.change, tuple)            # the abstract host keeps footprints
        self.broken = list(way.broken)
        if way.change:
            after = bytearray(self.state)
            for at, value in way.change:
                after[at] = value
            self.state = bytes(after)
            self.broken += self.walks.judge(self.state)
        self.places[i] = way.local
        self.steps.append(Step(
            self.programs[i].name, way.choices, way.primitive, way.result, way.failed, self.state, way.notes))

    def at_end(self) -> list[tuple[str, str, list[Step]]]:
        """Where no one can move: (law, evidence, steps of the teardown) of what breaks by that."""
        world = self.walks.world
        explorer = Explorer(self.walks.tables, self.programs, world.initial, world.teardown, world.broken_before)
        paths = [automaton.paths[place] for automaton, place in zip(self.automata, self.places, strict=True)]
        return explorer.breaks_at(paths, self.state)


class _Schedule:
    # One run of all parties from the initial state to the end of the world.

    def __init__(self, walks: Walks, seed: int) -> None:
        self.rng = random.Random(seed)
        self.at = walks.start(self._parties(walks.world))
        everyone = range(len(self.at.programs))
        # Each party has a pace of its own over two orders of magnitude: with equal paces the short ones would always
        # be over before the long ones have begun. Every other schedule is by priorities.
        self.paces = [10 ** self.rng.uniform(-2, 0) for _ in everyone]
        self.order = self.rng.sample(everyone, len(everyone)) if seed % 2 else None
        self.changes = {*self.rng.sample(range(WITHIN), CHANGES)}
        self.running, self.since = -1, 0

    # Of parties that are one task, one; of the tasks all, or every other time some. What all do at once, none does for long
    # undisturbed (Groce et al., ISSTA 2012).
    def _parties(self, world: World) -> list[Program]:
        roles: dict[int, list[Program]] = {}
        for program in world.programs.values():
            roles.setdefault(program.number, []).append(program)
        chosen = [self.rng.choice(programs) for programs in roles.values()]
        if self.rng.random() < SOME:
            chosen = self.rng.sample(chosen, self.rng.randint(min(2, len(chosen)), len(chosen)))
        return chosen

    def run(self) -> list[Finding]:
        # What breaks first, and no more: from there on nothing is worth knowing.
        at, moved = self.at, True
        while moved and not at.broken:
            moved = False
            for i in self._next():
                ways = at.ways(i)
                if ways:
                    at.take(i, self._chosen(ways))
                    self.since = self.since + 1 if i == self.running else 0
                    self.running, moved = i, True
                    break
        ends = [(*broken, list[Step]()) for broken in at.broken] or at.at_end()
        return [Finding(law, evidence, at.steps + more, at.walks.world.initial) for law, evidence, more in ends]

    def _next(self) -> list[int]:
        if self.order is None:
            # As if each had a clock with exponential waits: the first that can move does.
            return sorted(range(len(self.paces)), key=lambda i: self.rng.expovariate(self.paces[i]))
        if (len(self.at.steps) in self.changes or self.since > PATIENCE) and self.running in self.order:
            self.order.remove(self.running)
            self.order.append(self.running)
        return self.order

    def _chosen(self, ways: Sequence[Way]) -> Way:
        failing, others = ([way for way in ways if way.failed == failed] for failed in (True, False))
        # Rarely, or no run would come far.
        if failing and (not others or self.rng.random() < FAILS):
            return self.rng.choice(failing)
        return self.rng.choice(others)


def walk(world: World, steps: int, seed: int, *, quiet: int | None = None) -> Walked:
    """Take at least *steps* steps of all parties of *world*, schedule by schedule, the first with *seed*.

    quiet: end when for so many steps no footprint was new. What breaks is told once for each (law, evidence), by the
    shortest schedule that broke it. Raises what exploring raises.
    """
    walks, walked = Walks(world), Walked()
    found: dict[Broken, Stumble] = {}
    while walked.steps < steps and (quiet is None or walked.steps - walked.last_new < quiet):
        schedule = _Schedule(walks, seed + walked.schedules)
        for finding in schedule.run():
            known = found.get((finding.law, finding.evidence))
            if known is None or len(finding.steps) < len(known.finding.steps):
                names = tuple(program.name for program in schedule.at.programs)
                found[finding.law, finding.evidence] = Stumble(seed + walked.schedules, names, finding)
        walked.steps += len(schedule.at.steps)
        walked.schedules += 1
        if walks.tables.worked_out > walked.footprints:
            walked.footprints, walked.last_new = walks.tables.worked_out, walked.steps
    walked.found = list(found.values())
    return walked

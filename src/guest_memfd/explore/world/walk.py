"""A random walk: all parties of a scene at once, far more than can be explored, one schedule after the other.

It proves nothing, and nothing that it finds is dropped. Every step is judged by every law, and what breaks comes with the
seed that breaks it again.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from guest_memfd.explore.engine.footprint import Remembered
from guest_memfd.explore.engine.program import Program, send
from guest_memfd.explore.world.scenario import World
from guest_memfd.words.outcome import STAY, Outcome
from guest_memfd.words.primitives import Primitive, Steps

FAILS = 0.1
"""How often what can fail does, while the scene has failures left."""


@dataclass
class Walked:
    """What a walk came to: steps and schedules taken, and what broke (seed of the schedule, law, evidence)."""

    steps: int = 0
    schedules: int = 0
    broken: list[tuple[int, str, str]] = field(default_factory=list)


class _Walker:
    # One party on its way. *pace*: without differences short parties would always be over early.

    def __init__(self, program: Program, pace: float) -> None:
        self.program, self.pace = program, pace
        self.procedure: Steps[Any] = program.start()
        self.pending: Primitive | None = None
        self.go_on(None)

    def go_on(self, result: Any) -> None:
        try:
            self.pending = send(self.program, self.procedure, result)
        except StopIteration:
            self.pending = None


class _Schedule:
    # One run of all parties from the initial state to the end of the world.

    def __init__(self, world: World, judges: dict[str, Remembered], seed: int) -> None:
        self.world, self.judges = world, judges
        self.rng = random.Random(seed)
        self.shared = world.initial
        self.steps = 0

    def run(self) -> Iterator[tuple[str, str]]:
        """(law, evidence) of what breaks first, and no more: from there on nothing is worth knowing."""
        # Each party has a pace of its own over two orders of magnitude: with equal paces the short ones would always
        # be over before the long ones have begun.
        walkers = [_Walker(program, 10 ** self.rng.uniform(-2, 0)) for program in self._parties()]
        for broken in self._all(walkers):
            yield broken
            return
        waiting = [str(w.pending) for w in walkers if w.pending is not None]
        if waiting:
            yield "progress", f"deadlock: {', '.join(waiting)}"
            return
        for broken in self._tear_down():
            yield broken
            return

    # Of parties that are one task, one.
    def _parties(self) -> list[Program]:
        roles: dict[int, list[Program]] = {}
        for program in self.world.programs.values():
            roles.setdefault(program.number, []).append(program)
        return [self.rng.choice(programs) for programs in roles.values()]

    def _all(self, walkers: list[_Walker]) -> Iterator[tuple[str, str]]:
        moved = True
        while moved:
            moved = False
            # As if each had a clock with exponential waits: the first that can move does.
            for walker in sorted(walkers, key=lambda w: self.rng.expovariate(w.pace)):
                if walker.pending is not None and (outcomes := self._outcomes(walker)):
                    yield from self._take(walker, self._chosen(outcomes))
                    moved = True
                    break

    def _outcomes(self, walker: _Walker) -> list[Outcome]:
        primitive = walker.pending
        assert primitive is not None
        if primitive.name == "choose":
            return [Outcome(option, self.shared) for option in primitive.args[1:]]
        return list(self.world.machine.outcomes(self.shared, walker.program.number, primitive))

    def _chosen(self, outcomes: list[Outcome]) -> Outcome:
        failing = [outcome for outcome in outcomes if outcome.failed]
        # Rarely, or no run would come far.
        if failing and self.rng.random() < FAILS:
            return self.rng.choice(failing)
        return self.rng.choice([outcome for outcome in outcomes if not outcome.failed])

    def _take(self, walker: _Walker, outcome: Outcome) -> Iterator[tuple[str, str]]:
        self.steps += 1
        self.shared = outcome.shared
        for law in self.world.laws:
            yield from ((law.name, words) for note in outcome.notes if (words := law.on_note(note)) is not None)
        yield from ((law, words) for law, judge in self.judges.items() if (words := judge(self.shared)) is not None)
        if self.world.machine.halted(self.shared):
            walker.pending = None
        elif outcome.result is not STAY:
            walker.go_on(outcome.result)

    def _tear_down(self) -> Iterator[tuple[str, str]]:
        last = _Walker(self.world.teardown, 1)
        while last.pending is not None:
            outcomes = [outcome for outcome in self._outcomes(last) if not outcome.failed]
            if not outcomes:
                yield "progress", f"teardown waits for ever in {last.pending}"
                return
            yield from self._take(last, outcomes[0])
        yield from ((law.name, words) for law in self.world.laws if (words := law.at_end(self.shared)) is not None)


def walk(world: World, steps: int, seed: int) -> Walked:
    """Take at least *steps* steps of all parties of *world*, schedule by schedule, the first with *seed*."""
    judges = {law.name: Remembered(law.in_state) for law in world.laws if law.state}
    walked = Walked()
    while walked.steps < steps:
        schedule = _Schedule(world, judges, seed + walked.schedules)
        walked.broken += [(seed + walked.schedules, law, evidence) for law, evidence in schedule.run()]
        walked.steps += schedule.steps
        walked.schedules += 1
    return walked

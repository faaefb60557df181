"""One mutant against the scenarios that can notice it."""

from __future__ import annotations

import itertools
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from mutants.apply import apply
from mutants.baseline import Baseline, Ran, reached
from mutants.children import Died
from mutants.killer import Killer, Scenario
from mutants.mutant import Mutant
from mutants.targets import SOURCES
from mutants.watch import Endless, Over, Watch

AT_ONCE = 0.3
"""Seconds for which scenarios are just run. After them it is worth the time to ask which can come out otherwise."""

SCENE = "setting the scene"

KILLED, SURVIVED, SAME, UNREACHED, TIMEOUT = "killed", "survived", "same steps", "not reached", "timeout"


class Fate(NamedTuple):
    """What became of a mutant: killed by which scenario, why, and whose it is; or no time was left.

    It lives if it survived, or takes the same steps in all scenarios, or none reaches it.
    """

    fate: str
    by: str = ""
    why: str = ""
    seconds: float = 0.0
    killer: str = ""


Known = Sequence[tuple[Killer, Baseline]]
"""Killers in the order in which they try, and what each does without a mutant."""


def attempt(mutant: Mutant, known: Known, seconds: float, first: Sequence[str] = ()) -> Fate:
    """Put *mutant* to the test for at most *seconds* of CPU time, in a child. *first*: labels of likely scenarios."""
    began = time.process_time()
    trial = _Trial(mutant, known, first)
    try:
        with Watch(seconds, frozenset({str(SOURCES / mutant.site.file)})):
            fate = trial.run()
    except Endless as endless:
        fate = Fate(KILLED, trial.label, str(endless))
    except Over as limit:
        fate = Fate(TIMEOUT, trial.label, str(limit))
    except Exception as error:
        fate = Fate(KILLED, trial.label, f"{type(error).__name__}: {str(error).splitlines()[0]}")
    return fate._replace(seconds=time.process_time() - began, killer=trial.killer)


def fate_of(answer: Fate | Died) -> Fate:
    """The fate of a mutant whose child has answered, or died."""
    return Fate(TIMEOUT, why=answer.how) if isinstance(answer, Died) else answer


class _Trial:
    def __init__(self, mutant: Mutant, known: Known, first: Sequence[str]) -> None:
        self.mutant, self.known, self.first = mutant, known, first
        self.label, self.killer = SCENE, ""

    # What each killer has that is cheap comes before what the first has that is not: a procedure that is called by a test
    # takes a millisecond, a scenario that is explored anew takes seconds.
    def run(self) -> Fate:
        reaching = [(killer, base, [*reached(self.mutant, base.ran, killer)]) for killer, base in self.known]
        if not any(runs for _, _, runs in reaching):
            return Fate(UNREACHED)
        apply(self.mutant)
        stages = []
        for killer, base, runs in reaching:
            self.killer = killer.name
            stages.append(_Stage(self.mutant, killer, base, sorted(runs, key=lambda run: run.label not in self.first)))
        for part in (_Stage.at_once, _Stage.rest):
            for stage in stages:
                self.killer = stage.killer.name
                for scenario in part(stage):
                    self.label = scenario.label
                    why = scenario.run()
                    if why is not None:
                        return Fate(KILLED, self.label, why)
        differed = sum(stage.differed for stage in stages)
        return Fate(SURVIVED, f"{differed} scenarios") if differed else Fate(SAME)


class _Stage:
    # The scenarios of one killer that reach the mutant, in the order in which they are worth their time.

    def __init__(self, mutant: Mutant, killer: Killer, base: Baseline, runs: Sequence[Ran]) -> None:
        self.killer, self.there = killer, killer.against(mutant, base.parties)
        self.scenarios = [self.there.scenarios[run.label] for run in runs if run.label in self.there.scenarios]
        self.differed = self.done = 0
        if not self.scenarios and mutant.site.function is None:         # anew, under labels of their own
            costs: defaultdict[str, float] = defaultdict(float)
            for run in runs:
                costs[run.world] += run.seconds
            named = [scenario for scenario in self.there.scenarios.values() if scenario.world in costs]
            self.scenarios = sorted(named, key=lambda scenario: costs[scenario.world])

    # The cheap ones, whatever they are.
    def at_once(self) -> Iterator[Scenario]:
        began = time.process_time()
        for scenario in itertools.takewhile(lambda _: time.process_time() - began < AT_ONCE, self.scenarios):
            yield scenario
            self.done += 1

    # Those that can come out otherwise than without the mutant.
    def rest(self) -> Iterator[Scenario]:
        for at, scenario in enumerate(self.scenarios):
            if self.there.changed(scenario):
                self.differed += 1
                if at >= self.done:
                    yield scenario

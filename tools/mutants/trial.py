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
        self.differed = 0

    def run(self) -> Fate:
        stages = [(killer, base, [*reached(self.mutant, base.ran, killer)]) for killer, base in self.known]
        if not any(runs for _, _, runs in stages):
            return Fate(UNREACHED)
        apply(self.mutant)
        for killer, base, runs in stages:
            self.killer = killer.name
            for scenario in self._worth(killer, base, sorted(runs, key=lambda run: run.label not in self.first)):
                self.label = scenario.label
                why = scenario.run()
                if why is not None:
                    return Fate(KILLED, self.label, why)
        return Fate(SURVIVED, f"{self.differed} scenarios") if self.differed else Fate(SAME)

    # First the cheap ones, whatever they are; then those that can come out otherwise than without the mutant.
    def _worth(self, killer: Killer, base: Baseline, runs: Sequence[Ran]) -> Iterator[Scenario]:
        there = killer.against(self.mutant, base.parties)
        scenarios = [there.scenarios[run.label] for run in runs if run.label in there.scenarios]
        if not scenarios and self.mutant.site.function is None:         # anew, under labels of their own
            costs: defaultdict[str, float] = defaultdict(float)
            for run in runs:
                costs[run.world] += run.seconds
            named = [scenario for scenario in there.scenarios.values() if scenario.world in costs]
            scenarios = sorted(named, key=lambda scenario: costs[scenario.world])
        began = time.process_time()
        done: list[Scenario] = []
        for scenario in itertools.takewhile(lambda _: time.process_time() - began < AT_ONCE, scenarios):
            yield scenario
            done.append(scenario)
        for at, scenario in enumerate(scenarios):
            if there.changed(scenario):
                self.differed += 1
                if at >= len(done):
                    yield scenario

"""One question of a suite: the answers of its scenarios in all its scenes, and what they come to together.

Answers may come in any order. Of each way to break a law the shortest trace over all scenarios wins, where two are as
short the one with fewer injected failures, then the earlier scenario.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import or_

from guest_memfd.explore.engine.finding import INTERRUPTED
from guest_memfd.explore.suite.coverage import Coverage
from guest_memfd.explore.suite.verdict import Found, LawReport, Limits, Report, Unfinished
from guest_memfd.explore.suite.work import Answer, Task
from guest_memfd.explore.world.scenario import World
from guest_memfd.laws import LAWS


@dataclass(frozen=True)
class Winner:
    """The scenario with the shortest trace so far, how long that is, and how many injected failures it has."""

    steps: int
    injected: int
    task: Task


@dataclass
class Case:
    """One question: its worlds by their numbers, and what has been answered. suite: it is not about one scenario."""

    judged: Sequence[str]
    suite: bool = True
    worlds: dict[int, World] = field(default_factory=dict)
    scenarios: int = 0
    answers: dict[Task, Answer] = field(default_factory=dict)
    winners: dict[tuple[str, str], Winner] = field(default_factory=dict)
    found: list[tuple[int, Found]] = field(default_factory=list)

    def add(self, number: int, world: World, scenarios: int) -> None:
        """Put the question to *scenarios* scenarios in world *number*, too."""
        self.worlds[number] = world
        self.scenarios += scenarios

    def take(self, task: Task, answer: Answer) -> None:
        """Add what a scenario came to."""
        self.answers[task] = answer
        for law, evidence, steps, injected in answer.broken:
            if law not in self.judged:
                continue
            best = self.winners.get((law, evidence))
            # The order of the scenarios breaks ties. Answers come from several processes in any order, and the report
            # must not depend on it.
            if best is None or (steps, injected, task.order) < (best.steps, best.injected, best.task.order):
                self.winners[law, evidence] = Winner(steps, injected, task)

    def to_trace(self) -> dict[Task, list[tuple[str, str, int]]]:
        """Scenario -> the ways to break a law of which it has the shortest trace."""
        wanted: dict[Task, list[tuple[str, str, int]]] = {}
        for (law, evidence), winner in self.winners.items():
            wanted.setdefault(winner.task, []).append((law, evidence, winner.steps))
        return wanted

    def take_traces(self, task: Task, wanted: Iterable[tuple[str, str, int]], answer: Answer) -> None:
        """Add the traces of a scenario; raises InternalError when they are not what was found before.

        DesignRaised where that may be the doing of a third party.
        """
        traces = {(f.law, f.evidence): f for f in answer.traces or ()}
        world = self.worlds[task.world]
        for law, evidence, steps in wanted:
            finding = traces.get((law, evidence))
            # The trace is searched again on new tables. A difference means that the first answer cannot be trusted,
            # so it is no finding.
            if finding is None or len(finding.steps) != steps:
                raise world.blame(f"{', '.join(task.parties)}: {law} ({evidence}) breaks in {steps} steps on the tables of "
                                  "the suite, and not on new ones")
            found = Found(law, evidence, task.parties, finding, world.scene)
            self.found.append((task.order, found))

    def report(self, limits: Limits, seconds: float) -> Report:
        """All of it together."""
        rank = {law: n for n, law in enumerate(LAWS)}
        self.found.sort(key=lambda f: (len(f[1].finding.steps), f[1].finding.injected, rank[f[1].law], f[0],
                                       f[1].evidence))
        found = tuple(each for _, each in self.found)
        untold = self._untold()
        reached = (*self._reached(limits), *(("interrupted before all traces were made",) if untold else ()))
        coverage = reduce(or_, (answer.coverage for answer in self.answers.values()), Coverage())
        no_file = all(world.refused for world in self.worlds.values())
        # A law that nothing has put to the test is not proved. A design that refuses to create a file has nothing to
        # cover.
        missing = () if no_file else coverage.missing(suite=self.suite)
        proved = not reached and not missing
        first = next(iter(self.worlds.values()))
        return Report(
            first.design.name, first.hypervisor.name,
            "refuted" if self.winners else "holds" if proved else "undetermined",
            {law: _law(law, (*found, *untold), proved=proved) for law in self.judged}, found,
            sum(a.states for a in self.answers.values()), sum(a.transitions for a in self.answers.values()),
            seconds, self.scenarios, reached, limits.failures, tuple(world.scene.name for world in self.worlds.values()),
            tuple(world.scene.name for world in self.worlds.values() if world.refused),
            missing, coverage.never(), first.tables.reductions, self._unfinished(),
        )

    # What is known to break, and has no trace.
    def _untold(self) -> tuple[LawReport, ...]:
        told = {(found.law, found.evidence) for _, found in self.found}
        return tuple(LawReport(law, "refuted", winner.steps, winner.task.parties, evidence, None,
                               self.worlds[winner.task.world].scene, winner.injected)
                     for (law, evidence), winner in sorted(self.winners.items()) if (law, evidence) not in told)

    def _unfinished(self) -> tuple[Unfinished, ...]:
        cut = sorted(((task, answer.limit) for task, answer in self.answers.items()), key=lambda each: each[0].order)
        return tuple(Unfinished(self.worlds[task.world].scene.name, task.parties, limit) for task, limit in cut if limit)

    def _reached(self, limits: Limits) -> tuple[str, ...]:
        words = {"states": f"more than {limits.states} states", "seconds": f"more than {limits.seconds} seconds in all",
                 "memory": "more memory than there is" if limits.memory is None else
                 f"more than {limits.memory} bytes of memory in all", INTERRUPTED: INTERRUPTED}
        reached = []
        for limit, what in words.items():
            cut = sorted((task for task, answer in self.answers.items() if answer.limit == limit), key=lambda t: t.order)
            if cut:
                scene = self.worlds[cut[0].world].scene.name
                reached.append(f"{what} ({len(cut)} of {len(self.answers)} scenarios, first: {', '.join(cut[0].parties)} "
                               f"in {scene})")
        return tuple(reached)


# The shortest way to break it; of ways as short, one that has a trace.
def _law(law: str, found: Sequence[Found | LawReport], *, proved: bool) -> LawReport:
    ways = [each if isinstance(each, LawReport) else _told(each) for each in found if each.law == law]
    return min(ways, key=lambda way: way.steps or 0, default=LawReport(law, "holds" if proved else "undetermined"))


def _told(found: Found) -> LawReport:
    finding = found.finding
    return LawReport(found.law, "refuted", len(finding.steps), found.parties, found.evidence, finding, found.scene,
                     finding.injected)

"""One question of a suite: the answers of its scenarios, and what they come to together.

Rule of this file: answers may come in any order. Of each way to break a law the shortest trace over all scenarios wins,
the earlier scenario where two are as short.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from guest_memfd.check.scenario import World
from guest_memfd.check.verdict import Found, LawReport, Limits, Report
from guest_memfd.check.work import Answer, Task
from guest_memfd.errors import InternalError
from guest_memfd.laws import LAWS

REPORTED = "bounded-cost"
"""The law that is counted (check/cost.py) and not judged."""


@dataclass(frozen=True)
class Winner:
    """The scenario with the shortest trace so far, and how long that is."""

    steps: int
    task: Task


@dataclass
class Case:
    """One question: its world, its scenarios, and what has been answered."""

    world: World
    scenarios: list[tuple[str, ...]]
    judged: Sequence[str]
    answers: dict[Task, Answer] = field(default_factory=dict)
    winners: dict[tuple[str, str], Winner] = field(default_factory=dict)
    found: list[Found] = field(default_factory=list)

    def take(self, task: Task, answer: Answer) -> None:
        """Add what a scenario came to."""
        self.answers[task] = answer
        for law, evidence, steps in answer.broken:
            if law not in self.judged:
                continue
            best = self.winners.get((law, evidence))
            if best is None or (steps, task.order) < (best.steps, best.task.order):
                self.winners[law, evidence] = Winner(steps, task)

    def to_trace(self) -> dict[Task, list[tuple[str, str, int]]]:
        """Scenario -> the ways to break a law of which it has the shortest trace."""
        wanted: dict[Task, list[tuple[str, str, int]]] = {}
        for (law, evidence), winner in self.winners.items():
            wanted.setdefault(winner.task, []).append((law, evidence, winner.steps))
        return wanted

    def take_traces(self, task: Task, wanted: Iterable[tuple[str, str, int]], answer: Answer) -> None:
        """Add the traces of a scenario; raises InternalError when they are not what was found before."""
        traces = {(f.law, f.evidence): f for f in answer.traces or ()}
        for law, evidence, steps in wanted:
            finding = traces.get((law, evidence))
            if finding is None or len(finding.steps) != steps:
                raise InternalError(f"{', '.join(task.parties)}: {law} ({evidence}) breaks in {steps} steps on the "
                                    f"tables of the suite, and not on new ones")
            self.found.append(Found(law, evidence, task.parties, finding))

    def report(self, limits: Limits, seconds: float) -> Report:
        """All of it together."""
        place = {scenario: n for n, scenario in enumerate(self.scenarios)}
        rank = {law: n for n, law in enumerate(LAWS)}
        found = tuple(sorted(
            self.found, key=lambda f: (len(f.finding.steps), rank[f.law], place[f.parties], f.evidence)
        ))
        reached = _reached(self.answers, limits)
        return Report(
            self.world.design.name, self.world.hypervisor.name,
            "refuted" if found else "undetermined" if reached else "holds",
            {law: _law(law, found, reached) for law in self.judged}, found,
            sum(a.states for a in self.answers.values()), sum(a.transitions for a in self.answers.values()),
            seconds, len(self.scenarios), reached, limits.failures,
        )


def _law(law: str, found: Sequence[Found], reached: Sequence[str]) -> LawReport:
    if law == REPORTED:
        return LawReport(law, "reported")
    first = next((f for f in found if f.law == law), None)
    if first is None:
        return LawReport(law, "undetermined" if reached else "holds")
    return LawReport(law, "refuted", len(first.finding.steps), first.parties, first.evidence, first.finding)


def _reached(answers: Mapping[Task, Answer], limits: Limits) -> tuple[str, ...]:
    words = {"states": f"more than {limits.states} states", "seconds": f"more than {limits.seconds} seconds in all"}
    reached = []
    for limit, what in words.items():
        cut = sorted((task for task, answer in answers.items() if answer.limit == limit), key=lambda task: task.order)
        if cut:
            reached.append(f"{what} ({len(cut)} of {len(answers)} scenarios, first: {', '.join(cut[0].parties)})")
    return tuple(reached)

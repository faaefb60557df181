"""The suite: which scenarios a question is put to, and what their answers come to together.

Rule of this file: a report depends on the question alone, not on how the work was split or what was explored before.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from guest_memfd.check.case import REPORTED, Case
from guest_memfd.check.pool import Pool, Schedule, jobs_for
from guest_memfd.check.scenario import World, world
from guest_memfd.check.verdict import Found, LawReport, Limits, Report
from guest_memfd.check.work import Answer, Bench, Task
from guest_memfd.designs import Design
from guest_memfd.errors import BadInput, UnknownName
from guest_memfd.hypervisors.hypervisor import Hypervisor
from guest_memfd.laws import LAWS

__all__ = ["NAMED", "Found", "LawReport", "Limits", "Report", "check", "check_many", "suite"]

Scenario = tuple[str, ...]
Progress = Callable[[int, int, str], None]
Question = tuple[str | type[Design], str | Hypervisor]
"""A design and a hypervisor: names, or the things themselves."""

NAMED: dict[str, Scenario] = {
    "zero-padding-load": ("vcpu", "zeropad"),
    "two-vcpus": ("vcpu", "vcpu2", "vmm"),
    "pin-and-convert": ("vcpu", "vmm", "device"),
    "kcore-scan": ("vcpu", "vmm", "kcore"),
    "memory-failure": ("vcpu", "vmm", "memory-failure"),
    "pfn-cache": ("vcpu", "vmm", "pfn-cache"),
    "hibernate": ("vcpu", "vmm", "power"),
    "unload": ("vcpu", "vmm", "unloader"),
    "unload-while-stopping": ("vcpu", "unloader", "stop"),
    "stop-and-reclaim": ("vcpu", "vmm", "stop"),
}
"""Hazards people ask for by name."""

QUICK = ("kcore-scan", "memory-failure", "hibernate", "unload-while-stopping", "stop-and-reclaim")
"""Named triples for a first look: they take a tenth of the time of all triples."""

PERCENT = 100
NO_LIMITS = Limits()


def suite(names: Sequence[str], *, full: bool = True) -> list[Scenario]:
    """Each of *names* alone, every pair, and every triple, in their order; only the QUICK triples if not *full*."""
    quick = [set(NAMED[name]) for name in QUICK]
    triples = (parties for parties in itertools.combinations(names, 3) if full or set(parties) in quick)
    return [*((name,) for name in names), *itertools.combinations(names, 2), *triples]


def check(
    design: str | type[Design], hypervisor: str | Hypervisor, *, parties: Sequence[str] | None = None,
    scenario: str | None = None, laws: Sequence[str] | None = None, limits: Limits = NO_LIMITS,
    jobs: int | None = None, progress: Progress | None = None,
) -> Report:
    """Judge *design* under *hypervisor* on one scenario (*parties*, or a *scenario* of NAMED) or on the whole suite.

    laws: names of those to judge by, None for all. jobs: processes, None for one per CPU. progress is called with
    (done, 100, what was done last), done in per cent of the estimated work. Raises BadInput (unknown names, parties
    that do not exist there, impossible limits), and what a design that misbehaves raises.
    """
    question: Question = (design, hypervisor)
    return check_many([question], parties=parties, scenario=scenario, laws=laws, limits=limits, jobs=jobs,
                      progress=progress)[0]


def check_many(
    pairs: Sequence[Question], *, parties: Sequence[str] | None = None, scenario: str | None = None,
    laws: Sequence[str] | None = None, limits: Limits = NO_LIMITS, full: bool = True,
    jobs: int | None = None, progress: Progress | None = None,
) -> list[Report]:
    """`check` for many designs and hypervisors at once, which share the processes; reports in the order of *pairs*.

    full: the whole suite; else every pair and the QUICK triples, which is enough for a first look.
    """
    jobs = jobs_for(jobs)
    judged = _judged(laws)
    parties = _parties(parties, scenario)
    cases = []
    for design, hypervisor in pairs:
        built = world(design, hypervisor, failures=limits.failures, laws=judged)
        cases.append(Case(built, _scenarios(built, parties, full=full), judged))
    put = [(number, asked) for number, case in enumerate(cases) for asked in case.scenarios]
    tasks = [Task(order, *where) for order, where in enumerate(put)]
    deadline = None if limits.seconds is None else time.monotonic() + limits.seconds
    bench = Bench([case.world for case in cases], limits.states, deadline)
    with Pool(bench, min(jobs, len(tasks))) as pool:
        weights = _weigh(pool, tasks) if len(tasks) > 1 else dict.fromkeys(tasks, 1.0)
        clock = _Clock(cases, weights, progress)
        for task, answer in pool.run(Schedule(tasks, weights), clock.done).items():
            cases[task.world].take(task, answer)
        _trace(pool, cases, clock)
    return [case.report(limits, clock.seconds(number)) for number, case in enumerate(cases)]


def _judged(laws: Sequence[str] | None) -> list[str]:
    for law in laws or ():
        if law not in LAWS:
            raise UnknownName("law", law, LAWS)
    judged = [law for law in LAWS if laws is None or law in laws]
    if judged in ([], [REPORTED]):
        raise BadInput(f"no law to judge by: {REPORTED!r} is counted, not judged" if judged else "no law to judge by")
    return judged


def _parties(parties: Sequence[str] | None, scenario: str | None) -> Sequence[str] | None:
    if scenario is None:
        return parties
    if parties is not None:
        raise BadInput(f"either parties or a scenario, not both ({', '.join(parties)} and {scenario!r})")
    if scenario not in NAMED:
        raise UnknownName("scenario", scenario, NAMED)
    return NAMED[scenario]


def _scenarios(built: World, parties: Sequence[str] | None, *, full: bool) -> list[Scenario]:
    if parties is None:
        return suite(list(built.programs), full=full)
    built.must_have(parties)
    return [tuple(name for name in built.programs if name in parties)]


# How many states a scenario has is near the product of what its parties have alone (correlation of the logarithms:
# 0.96), and those cost next to nothing to count. A party that fails alone fails in a scenario, too, and is told then.
def _weigh(pool: Pool, tasks: Sequence[Task]) -> dict[Task, float]:
    parties = sorted({(task.world, party) for task in tasks for party in task.parties})
    alone = [Task(order, number, (party,), apart=True) for order, (number, party) in enumerate(parties)]
    states = {
        (task.world, *task.parties): answer.states
        for task, answer in pool.attempt(Schedule(alone, dict.fromkeys(alone, 1.0))) if isinstance(answer, Answer)
    }
    return {task: float(math.prod(states.get((task.world, p)) or 1 for p in task.parties)) for task in tasks}


# The traces that no new tables have told yet.
def _trace(pool: Pool, cases: Sequence[Case], clock: _Clock) -> None:
    again: dict[Task, Task] = {}
    for case in cases:
        for task, wanted in case.to_trace().items():
            if case.answers[task].traces is None:
                again[replace(task, trace=tuple(wanted))] = task
    told = pool.run(Schedule(list(again), {new: clock.weights[task] for new, task in again.items()}), clock.done)
    answers = {again[new]: answer for new, answer in told.items()}
    for case in cases:
        for task, wanted in case.to_trace().items():
            case.take_traces(task, wanted, answers.get(task, case.answers[task]))


class _Clock:
    """Says how far the work is, and keeps the time of each case, from the start of its first task to its last's end."""

    def __init__(self, cases: Sequence[Case], weights: Mapping[Task, float], progress: Progress | None) -> None:
        self.cases, self.weights, self.progress = cases, weights, progress
        self.total = sum(weights.values())
        self.finished = 0.0
        self.began = [math.inf] * len(cases)
        self.ended = [0.0] * len(cases)

    def done(self, task: Task, answer: Answer) -> None:
        """One more task is done."""
        now = time.monotonic()
        self.began[task.world] = min(self.began[task.world], now - answer.seconds)
        self.ended[task.world] = now
        self.finished += self.weights.get(task, 0)
        if self.progress is not None:
            world = self.cases[task.world].world
            self.progress(int(PERCENT * self.finished / self.total), PERCENT,
                          f"{world.design.name} on {world.hypervisor.name}: {', '.join(task.parties)}")

    def seconds(self, number: int) -> float:
        """Wall seconds of case *number*."""
        return max(self.ended[number] - self.began[number], 0.0)

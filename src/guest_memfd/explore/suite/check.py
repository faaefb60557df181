"""The suite: which scenes and scenarios a question is put to, and what their answers come to together.

Rule of this file: a report depends on the question alone, not on how the work was split or what was explored before
(tests/test_suite.py holds it).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace

from guest_memfd.core.hypervisor import Hypervisor
from guest_memfd.designs import DESIGNS, Design
from guest_memfd.errors import BadInput, UnknownName
from guest_memfd.explore.engine.finding import INTERRUPTED
from guest_memfd.explore.engine.memory import share
from guest_memfd.explore.suite.case import Case
from guest_memfd.explore.suite.crew import Crew, OnDone, Schedule
from guest_memfd.explore.suite.identity import head_of
from guest_memfd.explore.suite.journal import Journal
from guest_memfd.explore.suite.meter import Meter, Now
from guest_memfd.explore.suite.plan import NAMED, plan
from guest_memfd.explore.suite.pool import Pool, jobs_for
from guest_memfd.explore.suite.stop import Stop
from guest_memfd.explore.suite.verdict import Found, LawReport, Limits, Report
from guest_memfd.explore.suite.work import Answer, Bench, Task
from guest_memfd.explore.world import choice
from guest_memfd.explore.world.scenario import World, scene_of, world
from guest_memfd.laws import LAWS, judging
from guest_memfd.scenarios import SCENES
from guest_memfd.words.scene import Scene

__all__ = ["NAMED", "Found", "LawReport", "Limits", "Report", "check", "compare"]

Progress = Callable[[int, int, str], None]
Seen = Callable[[str, str, Mapping[str, int]], None]
Question = tuple[str | type[Design], str | Hypervisor]
"""A design and a hypervisor: names, or the things themselves."""

MANY = 100
"""Scenarios for which it is worth a second to load an engine."""

LARGE = 4
"""Parties of a scenario that may take minutes."""

LOOK = 0.5
"""Seconds between two looks at how far the scenarios are."""

ALMOST = 0.99
"""The part of what a scenario is thought to be that it may have come to before it is done."""

PERCENT, MOMENT, GB = 100, 0.001, 1e9
NO_LIMITS = Limits()
UNSEEN = Answer(0, 0, 0.0, INTERRUPTED)
"""Of a scenario that had not been begun, or of which nothing was heard, when the end was asked for."""


def check(
    design: str | type[Design], hypervisor: str | Hypervisor, *, scenes: Sequence[str | Scene] | None = None,
    parties: Sequence[str] | None = None, scenario: str | None = None, laws: Sequence[str] | None = None,
    limits: Limits = NO_LIMITS, full: bool = True, jobs: int | None = None, progress: Progress | None = None,
    engine: str | None = None, reduce: bool = True,
) -> Report:
    """Judge *design* under *hypervisor*: in *scenes* (None: all), on one scenario of parties or on the suite.

    parties: those of one scenario, or a *scenario* of NAMED; without scenes it is put into the plainest one. laws: names of
    those to judge by, None for all. full: the whole suite, or what is enough for a first look. jobs: processes, None for
    one per CPU. engine: one of `choice.ENGINES`, None for the fastest; all say the same. reduce: leave out states that make
    no difference, which changes their number alone (docs/explorer.md). progress is called with (done, 100, what was done
    last), done in per cent of the estimated work. Raises HostUnavailable where the engine is not here,
    BadInput (unknown names, parties that do not exist there, impossible limits), and what a design that misbehaves raises.
    """
    question: Question = (design, hypervisor)
    return compare([question], scenes=scenes, parties=parties, scenario=scenario, laws=laws, limits=limits, full=full,
                      jobs=jobs, progress=progress, engine=engine, reduce=reduce)[0]


def compare(
    pairs: Sequence[Question], *, scenes: Sequence[str | Scene] | None = None, parties: Sequence[str] | None = None,
    scenario: str | None = None, laws: Sequence[str] | None = None, limits: Limits = NO_LIMITS, full: bool = True,
    jobs: int | None = None, progress: Progress | None = None, engine: str | None = None, reduce: bool = True,
    seen: Seen | None = None, stop: Stop | None = None, resume: str | None = None,
    cluster: str | None = None, size: int | None = None,
) -> list[Report]:
    """`check` for many designs and hypervisors at once, which share the processes; reports in the order of *pairs*.

    *seen* is called before *progress* with what a scenario has broken: design, hypervisor, and law -> steps. When *stop* is
    asked for, the reports are about what was seen by then; without that there are none. *resume* is a file: what it has of
    the scenarios is taken from there, and the others are added. *cluster*: the address of a dask scheduler, or ``local:N``,
    whose workers take the place of the processes; HostUnavailable where it is not there, or has gone.
    *size*: in place of the suite, every so many parties together; without scenes in the plainest one.
    """
    if cluster is not None and jobs is not None:
        raise BadInput("either a number of jobs or a cluster, whose workers do the work")
    jobs = jobs_for(jobs)
    judged = _judged(laws)
    parties = _parties(parties, scenario)
    _must_be_one_question(parties, size)
    places = _scenes(scenes, alone=parties is not None or size is not None)
    cases, worlds, tasks = [], list[World](), list[Task]()
    for design, hypervisor in pairs:
        case = Case(_of(design, judged), suite=parties is None)
        for place in places:
            built = world(design, hypervisor, scene=place, failures=limits.failures, laws=judged, engine=engine,
                          reduce=reduce)
            scenarios = plan(built, full=full, size=size) if parties is None else [_one(built, parties)]
            built.rehearsal.walk(party for names in scenarios for party in names)
            case.add(len(worlds), built, len(scenarios))
            tasks += [Task(len(tasks) + at, len(worlds), names) for at, names in enumerate(scenarios)]
            worlds.append(built)
        cases.append(case)
    if not tasks:
        raise BadInput(f"there are no {size} different parties in {', '.join(place.name for place in places)}")
    of = {number: case for case in cases for number in case.worlds}
    deadline = None if limits.seconds is None else time.monotonic() + limits.seconds
    # Where there are fewer scenarios than processes, several threads explore one.
    jobs, threads = min(jobs, len(tasks)), max(1, min(jobs, jobs_for(None)) // len(tasks))
    stop = stop or Stop()
    bench = Bench(worlds, limits.states, deadline, share(limits.memory, jobs), stop.asked, threads, jobs)
    with ExitStack() as stack:
        stack.enter_context(stop)
        asked = {"parties": parties, "parties-per-scenario": size, "quick": not full, "failures": limits.failures,
                 "max-states": limits.states, "laws": judged, "reduction": reduce, "scenarios": len(tasks)}
        journal = None if resume is None else stack.enter_context(Journal(resume, head_of(worlds, asked), tasks))
        known = {} if journal is None else journal.known
        left = [task for task in tasks if task not in known]
        if len(left) >= MANY:
            choice.prepare(engine)
        crew = stack.enter_context(Pool(bench, jobs, limits.memory) if cluster is None else
                                   _workers_of(cluster, bench, limits, judged, reduce=reduce))
        # Who waits for one large scenario wants to know for how long, too.
        worth = len(left) > 1 or (progress is not None and any(len(task.parties) >= LARGE for task in left))
        weights = _weigh(crew, left, of, known) if worth else dict.fromkeys(left, 1.0)
        clock = _Clock(worlds, of, weights, progress, seen, bench.meter)
        bench.waiting = clock.look
        for task, answer in known.items():
            clock.show(task, answer)
        answers = {**known, **crew.run(Schedule(left, weights), _noted(journal, clock.done))}
        if stop.asked() and not answers:
            return []
        for task in tasks:
            of[task.world].take(task, answers.get(task, UNSEEN))
        _trace(crew, cases, clock)
    return [case.report(limits, clock.seconds(case)) for case in cases]


# Who asks for no cluster need not wait for what talks to one.
def _workers_of(address: str, bench: Bench, limits: Limits, judged: Sequence[str], *, reduce: bool) -> Crew:
    from guest_memfd.explore.suite.cluster import Cluster, local_workers, named

    here = local_workers(address)
    memory = limits.memory if here is None else share(limits.memory, here)
    return Cluster(bench, address, [named(world, limits, judged, memory, reduce=reduce) for world in bench.worlds])


def _noted(journal: Journal | None, done: OnDone) -> OnDone:
    if journal is None:
        return done

    def noted(task: Task, answer: Answer) -> None:
        journal.add(task, answer)
        done(task, answer)

    return noted


def _judged(laws: Sequence[str] | None) -> list[str]:
    for law in laws or ():
        LAWS[law]                                       # says why, if there is no such law, or it does not load
    judged = [law for law in LAWS if laws is None or law in laws]
    if not judged:
        raise BadInput("no law to judge by")
    return judged


# A design is judged by what holds for everybody, and by what it promises.
def _of(design: str | type[Design], judged: Sequence[str]) -> list[str]:
    made = DESIGNS[design] if isinstance(design, str) else design
    laws = [law.name for law in judging(made, (LAWS[name] for name in judged))]
    if not laws:
        raise BadInput(f"design {made.name!r} does not promise {', '.join(judged)}, and is not judged by it")
    return laws


def _parties(parties: Sequence[str] | None, scenario: str | None) -> Sequence[str] | None:
    if scenario is None:
        return parties
    if parties is not None:
        raise BadInput(f"either parties or a scenario, not both ({', '.join(parties)} and {scenario!r})")
    if scenario not in NAMED:
        raise UnknownName("scenario", scenario, NAMED)
    return NAMED[scenario]


def _must_be_one_question(parties: Sequence[str] | None, size: int | None) -> None:
    if size is not None and size < 1:
        raise BadInput(f"a scenario needs at least one party, not {size}")
    if size is not None and parties is not None:
        raise BadInput(f"either {', '.join(parties)} or every {size} parties, not both")


def _scenes(scenes: Sequence[str | Scene] | None, *, alone: bool) -> list[Scene]:
    if scenes is None:
        return list(SCENES.values())[:1] if alone else list(SCENES.values())
    if not scenes:
        raise BadInput(f"no scene to explore; known: {', '.join(SCENES)}")
    return [scene_of(scene) if isinstance(scene, str) else scene for scene in scenes]


def _one(built: World, parties: Sequence[str]) -> tuple[str, ...]:
    built.must_have(parties)
    return tuple(name for name in built.programs if name in parties)


# How many states a scenario has is near the product of what its parties have alone (correlation of the logarithms: 0.96),
# and those cost little to count: in the first of the scenes, for the others are like it. A party that fails alone fails in
# a scenario, too, and is told then.
def _weigh(
    crew: Crew, tasks: Sequence[Task], of: Mapping[int, Case], known: Mapping[Task, Answer]
) -> dict[Task, float]:
    first = {number: min(case.worlds) for number, case in of.items()}
    parties = sorted({(task.world, party) for task in tasks for party in task.parties if task.world == first[task.world]})
    states = {(task.world, *task.parties): answer.states for task, answer in known.items()}
    alone = [Task(order, number, (party,), apart=True) for order, (number, party) in enumerate(parties)
             if (number, party) not in states]
    states |= {
        (task.world, *task.parties): answer.states
        for task, answer in crew.attempt(Schedule(alone, dict.fromkeys(alone, 1.0))) if isinstance(answer, Answer)
    }
    return {task: float(math.prod(states.get((first[task.world], p)) or 1 for p in task.parties)) for task in tasks}


# The traces that no new tables have told yet.
def _trace(crew: Crew, cases: Sequence[Case], clock: _Clock) -> None:
    again: dict[Task, Task] = {}
    for case in cases:
        for task, wanted in case.to_trace().items():
            if case.answers[task].traces is None:
                again[replace(task, trace=tuple(wanted))] = task
    weights = {new: clock.weights.get(task, 1.0) for new, task in again.items()}
    told = crew.run(Schedule(list(again), weights), clock.done)
    answers = {again[new]: answer for new, answer in told.items()}
    for case in cases:
        for task, wanted in case.to_trace().items():
            answer = answers.get(task, case.answers[task])
            if answer.traces is not None or not crew.bench.stopped():
                case.take_traces(task, wanted, answer)


class _Clock:
    """Says how far the work is, and keeps the time of each case, from the start of its first task to its last's end."""

    def __init__(
        self, worlds: Sequence[World], of: Mapping[int, Case], weights: Mapping[Task, float], progress: Progress | None,
        seen: Seen | None, meter: Meter,
    ) -> None:
        self.worlds, self.of, self.weights, self.progress, self.seen = worlds, of, weights, progress, seen
        self.meter = meter
        self.total = sum(weights.values())
        self.finished = 0.0
        self.started, self.states = time.monotonic(), 0
        self.tasks = {task.order: task for task in weights}
        self.looked = self.started
        self.began: dict[int, float] = {}
        self.ended: dict[int, float] = {}

    def done(self, task: Task, answer: Answer) -> None:
        """One more task is done."""
        now, case = time.monotonic(), id(self.of[task.world])
        self.began[case] = min(self.began.get(case, math.inf), now - answer.seconds)
        self.ended[case] = now
        self.finished += self.weights.get(task, 0)
        self.states += answer.states
        self.show(task, answer)
        self._tell(task, self._running(), now)

    def look(self) -> None:
        """Say how far the largest of the scenarios is that are being explored."""
        now, running = time.monotonic(), self._running()
        if running and now - self.looked >= LOOK:
            self.looked = now
            self._tell(self.tasks[running[0].order], running, now, f"level {running[0].level}, ",
                       f", {sum(each.memory for each in running) / GB:.1f} GB")

    # Not those that are explored before anything is told, to weigh the others.
    def _running(self) -> list[Now]:
        return [each for each in self.meter.running() if each.order in self.tasks]

    def _tell(self, task: Task, running: Sequence[Now], now: float, before: str = "", after: str = "") -> None:
        if self.progress is None:
            return
        # More states than were expected do not make it done.
        part = sum(min(each.states, ALMOST * self.weights[self.tasks[each.order]]) for each in running)
        states, world = self.states + sum(each.states for each in running), self.worlds[task.world]
        self.progress(int(PERCENT * (self.finished + part) / max(self.total, MOMENT)), PERCENT,
                      f"{world.design.name} on {world.hypervisor.name}, {world.scene.name}: {', '.join(task.parties)}; "
                      f"{before}{states:,} states, {states / max(now - self.started, MOMENT):,.0f} a second{after}")

    def show(self, task: Task, answer: Answer) -> None:
        """Tell what a task has broken, whoever did it."""
        if self.seen is not None:
            world, judged = self.worlds[task.world], self.of[task.world].judged
            shortest = sorted(((law, steps) for law, _, steps, _ in answer.broken if law in judged), key=lambda b: -b[1])
            self.seen(world.design.name, world.hypervisor.name, dict(shortest))

    def seconds(self, case: Case) -> float:
        """Wall seconds of *case*."""
        return max(self.ended.get(id(case), 0.0) - self.began.get(id(case), 0.0), 0.0)

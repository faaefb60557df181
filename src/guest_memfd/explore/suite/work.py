"""One piece of a suite, in whichever process it is done: explore one scenario, on tables that are kept or on new ones.

What is answered depends on the task alone. Traces leave here only if they were found on tables that nothing had been
explored on before: what is printed has been seen to break on its own, whatever ran in the process earlier.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

from guest_memfd.explore.engine.explorer import never
from guest_memfd.explore.engine.finding import INTERRUPTED, Finding, Result
from guest_memfd.explore.engine.memory import used
from guest_memfd.explore.engine.tables import NEVER_ENDS, Tables
from guest_memfd.explore.suite.coverage import Coverage, covered
from guest_memfd.explore.suite.meter import Meter, Now
from guest_memfd.explore.world.scenario import World

ROOMY = 200_000
"""Host states after which kept tables are given up: some 500 MB, and what they save is a third of the time at most."""

MANY = 20_000
"""States of a scenario from which on it is noted how far it is."""

EVER = 1 << 60
NOTHING = Coverage()


@dataclass(frozen=True)
class Task:
    """Explore *parties* in world number *world*; *order* is its place among all tasks of the run.

    trace: (law, evidence, steps) that are wanted with their traces, None for a first look.
    apart: do not keep the tables.
    """

    order: int
    world: int
    parties: tuple[str, ...]
    trace: tuple[tuple[str, str, int], ...] | None = None
    apart: bool = False


@dataclass(frozen=True)
class Answer:
    """What exploring saw. broken: (law, evidence, steps, injected failures among them).

    traces: the findings, if these tables could tell.
    limit: ``states``, ``seconds``, ``memory`` or ``interrupted``, if one was reached. coverage: what has
    happened on the tables it was explored on.
    """

    states: int
    transitions: int
    seconds: float
    limit: str | None
    broken: tuple[tuple[str, str, int, int], ...] = ()
    traces: tuple[Finding, ...] | None = None
    coverage: Coverage = NOTHING


def nothing() -> None:
    """Nobody waits to be told."""


class Bench:
    """Where tasks are done: the worlds, and the tables of the one that was worked on last.

    meter, line: where it is noted how far a task is. waiting: called now and then by who waits for a task that is being
    done, here or elsewhere.
    """

    def __init__(
        self, worlds: Sequence[World], max_states: int | None, deadline: float | None, max_bytes: int | None = None,
        stopped: Callable[[], bool] = never, threads: int = 1, processes: int = 1,
    ) -> None:
        self.worlds, self.max_states, self.deadline, self.max_bytes = worlds, max_states or EVER, deadline, max_bytes
        self.stopped, self.threads = stopped, threads
        self.meter, self.line, self.waiting = Meter(processes), 0, nothing
        self._tables: Tables | None = None
        self._world = -1
        self._seen, self._coverage = 0, NOTHING      # facts of these tables that have been looked at

    def do(self, task: Task) -> Answer:
        """Explore; raises what a design, party or hypervisor raises."""
        world = self.worlds[task.world]
        # In every process: code of third parties that depends on the process is told before its answers are mixed
        # with others.
        world.rehearsal.repeat(task.parties)
        if task.trace is not None:
            return self._trace(world, task.parties, task.trace)
        left = EVER if self.deadline is None else self.deadline - time.monotonic()
        if left <= 0:
            return Answer(0, 0, 0.0, "seconds")
        tables = world.tables.empty() if task.apart else self._kept(task.world)
        untouched = not tables.shared
        result = self._explored(world, task, tables, left)
        # What is kept of earlier scenarios may be what takes the room.
        if result.limited_by == "memory" and not untouched:
            del tables
            self.forget()
            return self.do(task)
        broken = tuple((f.law, f.evidence, len(f.steps), f.injected) for f in result.findings)
        traces = tuple(result.findings) if untouched else None
        coverage = NOTHING if task.apart else self._covered(tables)
        return Answer(result.states, result.transitions, result.seconds, result.limited_by, broken, traces, coverage)

    # What explores goes with its states when it has: they may be what takes the room.
    def _explored(self, world: World, task: Task, tables: Tables, left: float) -> Result:
        explorer = world.explorer(task.parties, tables, self.threads)
        explorer.told = partial(self._note, task.order)
        try:
            return explorer.run(self.max_states, left, max_bytes=self.max_bytes, stopped=self.stopped)
        finally:
            self.meter.clear(self.line)

    def _note(self, order: int, states: int, level: int) -> None:
        if states < MANY:
            return
        self.meter.note(self.line, Now(order, level, states, used()))
        self.waiting()

    def forget(self) -> None:
        """Give the kept tables up."""
        self._tables = None

    def _kept(self, number: int) -> Tables:
        if self._tables is None or self._world != number or len(self._tables.shared) > ROOMY:
            self.forget()                               # first let the old ones go
            self._tables, self._world = self.worlds[number].tables.empty(), number
            self._seen, self._coverage = 0, NOTHING
        return self._tables

    def _covered(self, kept: Tables) -> Coverage:
        self._coverage |= covered(islice(kept.facts, self._seen, None))
        self._seen = len(kept.facts)
        return self._coverage

    # No deadline here: it has been that deep before.
    def _trace(self, world: World, parties: tuple[str, ...], wanted: tuple[tuple[str, str, int], ...]) -> Answer:
        self.forget()
        endless = any(evidence == NEVER_ENDS for _, evidence, _ in wanted)
        # The lengths are known from the first look. A livelock needs all of the graph.
        deepest = EVER if endless else max(steps for _, _, steps in wanted)
        result: Result = world.explorer(parties, world.tables.empty(), self.threads).run(
            self.max_states, EVER, deepest, stopped=self.stopped)
        cut = result.limited_by == INTERRUPTED
        return Answer(result.states, result.transitions, result.seconds, INTERRUPTED if cut else None,
                      traces=None if cut else tuple(result.findings))

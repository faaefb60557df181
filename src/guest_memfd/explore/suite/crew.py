"""Who does the tasks of a suite, in which order: processes of this machine (pool.py) or workers of a cluster (cluster.py).

Rule of these files: they decide who does what when, and nothing else; what comes out is the same for any crew
(tests/test_suite.py, tests/test_cluster.py hold it). Who does tasks stays with one world as long as there is work in it,
because the world's tables are kept there; then it opens the world with most work left, and at the end helps where most is
left. Within a world the biggest scenario comes first.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import NamedTuple, Self

from guest_memfd.errors import DesignRaised, HostUnavailable
from guest_memfd.explore.suite.work import Answer, Bench, Task

OnDone = Callable[[Task, Answer], None]

LESS = "fewer processes (-j 1) or a limit (--max-states N) need less"


class Failed(NamedTuple):
    """A task raised; in words. *for_memory*: because there was none left, which says nothing about the task."""

    what: str
    for_memory: bool = False


class Schedule:
    """What is still to be done. *weights* says how much work a task is thought to be."""

    def __init__(self, tasks: Sequence[Task], weights: Mapping[Task, float]) -> None:
        self.waiting: dict[int, list[Task]] = {}
        self.left: dict[int, float] = {}
        self.opened: set[int] = set()
        self.weights = weights
        self._dropped = math.inf                        # the number from which on tasks are not to be done any more
        for task in sorted(tasks, key=lambda t: (weights[t], -t.order)):
            self.waiting.setdefault(task.world, []).append(task)
            self.left[task.world] = self.left.get(task.world, 0) + weights[task]

    def next(self, last: int | None) -> Task | None:
        """A task for a process that has worked on world *last*; None when there is none."""
        world = last if last is not None and self.waiting.get(last) else self._heaviest()
        if world is None:
            return None
        self.opened.add(world)
        task = self.waiting[world].pop()
        self.left[world] -= self.weights[task]
        return task

    def _heaviest(self) -> int | None:
        open_ = [world for world, tasks in self.waiting.items() if tasks]
        # A world that no one has opened comes first: each has tables of its own to fill, and two processes in one
        # world fill the same entries twice.
        untouched = [world for world in open_ if world not in self.opened]
        return max(untouched or open_, key=lambda world: (self.left[world], -world), default=None)

    def put_back(self, task: Task) -> None:
        """*task* has been taken, and could not be done."""
        if task.order < self._dropped:
            self.waiting[task.world].append(task)
            self.left[task.world] += self.weights[task]

    def drop_after(self, order: int) -> None:
        """Forget the tasks that come after number *order*: one before them has failed."""
        self._dropped = min(self._dropped, order)
        for world, tasks in self.waiting.items():
            self.waiting[world] = [task for task in tasks if task.order < order]


class Crew(ABC):
    """Who does tasks at *bench*; a context manager: whoever is called in goes with it, whatever happens."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench

    @abstractmethod
    def __enter__(self) -> Self:
        ...

    @abstractmethod
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        ...

    @abstractmethod
    def attempt(self, schedule: Schedule) -> Iterator[tuple[Task, Answer | Failed]]:
        """Do all tasks, whatever fails, until the bench is stopped; in the order in which they end."""

    def run(self, schedule: Schedule, on_done: OnDone) -> dict[Task, Answer]:
        """Do all tasks, until the bench is stopped; raises what the first of them (in their order, not in time) raises.

        HostUnavailable when there is no memory left. InternalError when a process dies, or when what failed there does not
        fail here.
        """
        answers: dict[Task, Answer] = {}
        failed: dict[Task, Failed] = {}
        for task, answer in self._all(schedule):
            if isinstance(answer, Failed):
                if answer.for_memory:
                    raise HostUnavailable(f"there was no memory left to explore {', '.join(task.parties)}; {LESS}")
                failed[task] = answer
                # The first error in the order of the tasks is what is told, so nothing after it matters; what comes
                # before may still fail.
                schedule.drop_after(task.order)
            else:
                answers[task] = answer
                on_done(task, answer)
        if failed:
            first = min(failed, key=lambda task: task.order)
            self._again(first, failed[first])
        return answers

    # All tasks, and once more those that somebody with more memory can do.
    def _all(self, schedule: Schedule) -> Iterator[tuple[Task, Answer | Failed]]:
        large: dict[Task, Answer] = {}
        for task, answer in self.attempt(schedule):
            if isinstance(answer, Answer) and answer.limit == "memory":
                large[task] = answer
            else:
                yield task, answer
        yield from self.with_more_memory(large)

    def with_more_memory(self, large: Mapping[Task, Answer]) -> Iterator[tuple[Task, Answer | Failed]]:
        """Do the tasks again that there was too little memory for, where more can be had; the others are as they were."""
        yield from large.items()

    # On new tables and in this process, so that the error has its class and cause, and the trace in it is the same
    # however the work was split.
    def _again(self, task: Task, failed: Failed) -> None:
        self.bench.deadline = None
        self.bench.do(Task(task.order, task.world, task.parties, apart=True))
        raise self.bench.worlds[task.world].blame(
            f"exploring {', '.join(task.parties)} raised {failed.what}, and does not when repeated")


def tried(bench: Bench, task: Task) -> Answer | Failed:
    """Do *task*, or say what it raised."""
    try:
        return bench.do(task)
    except Exception as error:
        cause = None if isinstance(error, DesignRaised) else error.__cause__        # whose doing it is has been told
        if isinstance(error, MemoryError) or isinstance(cause, MemoryError):
            bench.forget()
            return Failed("MemoryError", for_memory=True)
        return Failed(f"{type(error).__name__}: {error}")

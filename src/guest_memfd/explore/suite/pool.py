"""Doing the tasks of a suite in several processes of this machine, all of them busy until the end.

Processes are forked, so that they inherit the worlds (procedures are closures, and cannot be sent). Where there is no
fork everything is done here.
"""

from __future__ import annotations

import ctypes
import gc
import math
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any

from guest_memfd.compat import override
from guest_memfd.errors import BadInput, HostUnavailable, InternalError
from guest_memfd.explore.engine.memory import share
from guest_memfd.explore.suite.crew import LESS, Crew, Failed, Schedule, tried
from guest_memfd.explore.suite.work import Answer, Bench, Task, nothing

MOST_JOBS = 1024
LOOK, PATIENCE = 0.1, 5.0
"""Seconds between two looks whether to end early; and for all to say what they have seen by then."""

_PDEATHSIG = 1
"""prctl(2): the signal that a process gets when its parent ends (include/uapi/linux/prctl.h)."""


_TERMINALS = signal.SIGINT, signal.SIGQUIT, signal.SIGHUP
_ENDING = (*_TERMINALS, signal.SIGTERM)


class Pool(Crew):
    """*jobs* processes at *bench*; one: this one. A context manager: the processes end with it, whatever happens.

    memory: bytes that all of them may have together, None for nearly all that there is.
    """

    def __init__(self, bench: Bench, jobs: int, memory: int | None = None) -> None:
        super().__init__(bench)
        self.memory = memory
        self.jobs = jobs if "fork" in multiprocessing.get_all_start_methods() else 1
        self._workers: dict[Connection, BaseProcess] = {}

    @override
    def __enter__(self) -> Pool:
        if self.jobs > 1:
            fork = multiprocessing.get_context("fork")
            for line in range(self.jobs):
                # Where there is no room for one more process or pipe, those that there are do all of it, or this one.
                with suppress(OSError):
                    self._start(*fork.Pipe(), fork, line)
        return self

    def _start(self, ours: Connection, theirs: Connection, fork: Any, line: int) -> None:
        args = (theirs, [*self._workers, ours], self.bench, os.getpid(), line)
        # A child is born with our handlers, and must not run one; and a signal that came to us before the child is on the
        # list would leave it behind. The child lets signals in when it has handlers of its own.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
        try:
            process = fork.Process(target=_serve, args=args, daemon=True)
            process.start()
            self._workers[ours] = process
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    @override
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _end(self) -> None:
        for process in self._workers.values():
            # All of them first, and only then wait: they end at the same time.
            process.terminate()
        for ours, process in self._workers.items():
            process.join()
            ours.close()
        self._workers.clear()

    @override
    def attempt(self, schedule: Schedule) -> Iterator[tuple[Task, Answer | Failed]]:
        """Do all tasks, whatever fails, until the bench is stopped; in the order in which they end."""
        if self._workers:
            yield from self._spread(schedule)
            return
        last = None
        with _without_gc():
            while not self.bench.stopped() and (task := schedule.next(last)) is not None:
                last = task.world
                yield task, tried(self.bench, task)

    @override
    def with_more_memory(self, large: Mapping[Task, Answer]) -> Iterator[tuple[Task, Answer | Failed]]:
        """Do these tasks again when all others are done, here: with the memory of all processes, and as many threads."""
        left = dict(large)
        if large and self._workers:
            threads = len(self._workers)
            self._end()
            # Without workers `attempt` does them here.
            self.bench.max_bytes, self.bench.threads = share(self.memory, 1), threads
            for task, answer in self.attempt(Schedule([*large], dict.fromkeys(large, 1.0))):
                del left[task]
                yield task, answer
        yield from super().with_more_memory(left)

    def _spread(self, schedule: Schedule) -> Iterator[tuple[Task, Answer | Failed]]:
        busy: dict[Connection, Task] = {}
        last: dict[Connection, int | None] = dict.fromkeys(self._workers)
        idle = list(self._workers)
        patience = math.inf
        while time.monotonic() < patience:
            for ours in idle:
                task = None if self.bench.stopped() else schedule.next(last[ours])
                if task is not None:
                    busy[ours], last[ours] = task, task.world
                    with suppress(BrokenPipeError, ConnectionResetError):   # it has died: said when it is waited for
                        ours.send(task)
            if not busy:
                return
            if patience == math.inf and self.bench.stopped():
                patience = time.monotonic() + PATIENCE
            idle = [ours for ours in connection.wait(list(busy), LOOK) if isinstance(ours, Connection)]
            self.bench.waiting()
            for ours in idle:
                task = busy.pop(ours)
                yield task, self._receive(ours, task)

    def _receive(self, ours: Connection, task: Task) -> Answer | Failed:
        try:
            answer: Answer | Failed = ours.recv()
        except (EOFError, ConnectionResetError):
            process = self._workers[ours]
            process.join()
            words = f"the process that explored {', '.join(task.parties)} has died ({_ending(process)}); {LESS}"
            # No one else kills with that signal as a rule: the kernel does when memory is short.
            raise (HostUnavailable if process.exitcode == -signal.SIGKILL else InternalError)(words) from None
        return answer


def _serve(theirs: Connection, others: Sequence[Connection], bench: Bench, parent: int, line: int) -> None:
    bench.line, bench.waiting = line, nothing
    for number in _TERMINALS:                           # the parent's to handle
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDING)
    end_with(parent)
    # Inherited by fork. As long as a child has the other end of a sibling's pipe, that sibling never sees it closed.
    for other in others:
        other.close()
    gc.disable()
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            answer = tried(bench, theirs.recv())
            try:
                theirs.send(answer)
            except MemoryError:
                del answer
                bench.forget()
                theirs.send(Failed("MemoryError", for_memory=True))


def end_with(parent: int) -> None:
    """Let this process end when *parent*, which started it, does: however it ends, and whatever is done then."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:                          # it has ended already
        os._exit(1)


def _ending(process: BaseProcess) -> str:
    code = process.exitcode or 0
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"


# Tables hold millions of small tuples and no cycles: looking for cycles costs a quarter of the time and finds none.
@contextmanager
def _without_gc() -> Iterator[None]:
    enabled = gc.isenabled()
    # The tables have no cycles; a collection would walk millions of tuples, and copy every page that the processes
    # share.
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def jobs_for(jobs: int | None) -> int:
    """How many processes to use: *jobs*, or (None) one for each CPU this process may run on; BadInput if too many."""
    if jobs is None:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not 1 <= jobs <= MOST_JOBS:
        raise BadInput(f"the number of jobs must be at least 1, not {jobs}" if jobs < 1 else
                       f"the number of jobs must be {MOST_JOBS} at most, not {jobs}")
    return jobs

"""Doing the tasks of a suite on the workers of a dask cluster: other machines, which come and go.

Each worker is asked for one scenario at a time, by name (remote.py). One whose code is another is not used. What a worker
was at when it died is done again by others; a scenario at which three have died is given up. A scheduler that has gone ends
the run: nothing is said then, but what has been journaled.
"""

from __future__ import annotations

import logging
import math
import queue
import signal
import time
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, Self

from guest_memfd.compat import override
from guest_memfd.designs import DESIGNS
from guest_memfd.errors import BadInput, ClusterNotice, HostUnavailable
from guest_memfd.explore.suite.crew import Crew, Failed, Schedule
from guest_memfd.explore.suite.identity import code_of
from guest_memfd.explore.suite.remote import NamedWorld, Unusable, do, leave
from guest_memfd.explore.suite.verdict import Limits
from guest_memfd.explore.suite.work import Answer, Bench, Task
from guest_memfd.explore.world.scenario import World
from guest_memfd.hypervisors import HYPERVISORS

LOCAL = "local:"
_TERMINALS = signal.SIGINT, signal.SIGQUIT, signal.SIGHUP
MOST_LOCAL, MOST_DEATHS = 256, 3
CONNECT, LOOK, SCHEDULER, ANSWER = 10.0, 0.3, 10.0, 30.0
"""Seconds: for a scheduler to answer at first; between two looks at the workers; for it to answer such a look; and for an
answer to come from a worker that has one."""
WORKERS, PATIENCE = 30.0, 5.0
"""Seconds to wait for workers where there are none; and for all to say what they have seen when the end is asked for."""


class Cluster(Crew):
    """Workers of the scheduler at *address*, or as many of this machine as ``local:N`` says; *places*: the bench's worlds.

    Raises BadInput for what is no address; HostUnavailable where no scheduler answers, dask is not installed, no worker can
    be used, or one scenario has ended three workers.
    """

    def __init__(self, bench: Bench, address: str, places: Sequence[NamedWorld]) -> None:
        super().__init__(bench)
        self.address, self.places = address, places
        self.run_id = uuid.uuid4().hex
        self._client: Any = None
        self._local: Any = None
        self._unfit: dict[str, str] = {}
        self._died: dict[Task, int] = {}
        self._busy: dict[str, tuple[Task, Any]] = {}
        self._done: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()

    @override
    def __enter__(self) -> Self:
        number = local_workers(self.address)
        try:
            import distributed
        except ImportError as error:
            raise HostUnavailable(
                f"--cluster needs dask: {error}; pip install 'guest-memfd[cluster]' installs it") from error
        try:
            if number is not None:
                with _ours_alone():
                    self._local = distributed.LocalCluster(
                        n_workers=number, threads_per_worker=1, processes=True, dashboard_address="127.0.0.1:0",
                        memory_limit=None, silence_logs=logging.CRITICAL)
            self._client = distributed.Client(self._local or self.address, timeout=CONNECT, set_as_default=False)
        except BaseException as error:
            self._end()
            if isinstance(error, ValueError):
                raise BadInput(f"--cluster wants the address of a scheduler, as tcp://host:8786, or local:N, "
                               f"not {self.address!r}") from error
            if isinstance(error, Exception):
                raise HostUnavailable(f"no scheduler answers at {self.address!r}: {_first_line(error)}") from error
            raise
        # What it logs about workers that die, and a scheduler that goes, is said here, in one line each.
        for name in [*logging.root.manager.loggerDict]:
            if name.partition(".")[0] == "distributed":
                logging.getLogger(name).setLevel(logging.CRITICAL + 1)
        return self

    @override
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._busy:
            self._leave()
        self._end()

    def _end(self) -> None:
        for each in (self._client, self._local):
            if each is not None:
                with suppress(Exception):
                    each.close(timeout=PATIENCE)
        self._client = self._local = None

    @override
    def attempt(self, schedule: Schedule) -> Iterator[tuple[Task, Answer | Failed]]:
        """Do all tasks, whatever fails, until the bench is stopped; in the order in which they end."""
        last: dict[str, int] = {}
        workers, looked, alone, patience = set[str](), -math.inf, time.monotonic(), math.inf
        while time.monotonic() < patience:
            if time.monotonic() - looked > LOOK:
                workers, looked = self._workers(), time.monotonic()
                self._bury(self._busy.keys() - workers, schedule)
            for address in workers - self._busy.keys() - self._unfit.keys():
                task = None if self.bench.stopped() else schedule.next(last.get(address))
                if task is not None:
                    last[address] = task.world
                    self._ask(address, task)
            if not self._busy and (self.bench.stopped() or not any(schedule.waiting.values())):
                return
            alone = time.monotonic() if self._busy else alone
            self._must_have_some(workers, time.monotonic() - alone)
            if patience == math.inf and self.bench.stopped():
                patience = time.monotonic() + PATIENCE
                self._leave()
            with suppress(queue.Empty):
                address, future = self._done.get(timeout=LOOK)
                if self._busy.get(address, (None, None))[1] is future:
                    yield from self._take(address, schedule)

    # The addresses of all workers that there are.
    def _workers(self) -> set[str]:
        try:
            if self._client.status != "running":
                raise OSError(f"the connection is {self._client.status}")
            there: Mapping[str, int] = self._client.sync(self._client.scheduler.ncores, callback_timeout=SCHEDULER)
        except Exception as error:
            raise HostUnavailable(f"the scheduler at {self.address!r} has gone: {_first_line(error)}") from error
        return {*there}

    def _ask(self, address: str, task: Task) -> None:
        left = None if self.bench.deadline is None else max(self.bench.deadline - time.monotonic(), 0.0)
        future = self._client.submit(do, self.run_id, self.places[task.world], task, left, workers=[address], pure=False,
                                     key=f"gmem-{uuid.uuid4().hex}")
        self._busy[address] = task, future
        future.add_done_callback(lambda future: self._done.put((address, future)))

    # What the workers *gone* were at is done again.
    def _bury(self, gone: set[str], schedule: Schedule) -> None:
        for address in gone:
            task, future = self._busy.pop(address)
            with suppress(Exception):
                future.cancel()
            self._bury_one(address, task, schedule)

    def _bury_one(self, address: str, task: Task, schedule: Schedule) -> None:
        schedule.put_back(task)
        if self.bench.stopped():
            return
        self._died[task] = self._died.get(task, 0) + 1
        parties = ", ".join(task.parties)
        if self._died[task] >= MOST_DEATHS:
            raise HostUnavailable(f"{MOST_DEATHS} workers have died that explored {parties}; a limit (--max-states N, "
                                  "--memory SIZE) needs less")
        warnings.warn(f"worker {address} has died, and {parties} is explored again", ClusterNotice, stacklevel=2)

    def _take(self, address: str, schedule: Schedule) -> Iterator[tuple[Task, Answer | Failed]]:
        task, future = self._busy.pop(address)
        try:
            answer: Answer | Failed | Unusable = future.result(timeout=ANSWER)
        except (ImportError, AttributeError, TypeError, ValueError) as error:
            answer = Unusable(_first_line(error))                  # what is asked for is not there
        except (Exception, CancelledError):                     # it has died when it had answered, or often
            self._workers()                             # or the scheduler has gone, which this says
            self._bury_one(address, task, schedule)
            return
        finally:
            with suppress(Exception):
                future.release()
        if isinstance(answer, Unusable):
            self._unfit[address] = answer.why
            warnings.warn(f"worker {address} is not used: {answer.why}", ClusterNotice, stacklevel=2)
            schedule.put_back(task)
        else:
            yield task, answer

    def _must_have_some(self, workers: set[str], alone: float) -> None:
        if self._busy:
            return
        if workers and workers <= self._unfit.keys():
            raise HostUnavailable(f"no worker at {self.address!r} can be used: {self._unfit[min(workers)]}")
        if not workers and alone > WORKERS:
            raise HostUnavailable(f"there is no worker at {self.address!r}")

    # Nothing of this run is to be gone on with.
    def _leave(self) -> None:
        with suppress(Exception):
            self._client.run(leave, self.run_id, workers=[*self._busy], wait=False)


def named(built: World, limits: Limits, laws: Sequence[str], memory: int | None, *, reduce: bool) -> NamedWorld:
    """The world *built* by name; *memory*: bytes of a worker. Raises BadInput where it is not made of what is registered."""
    design, hypervisor = built.design, built.hypervisor
    if DESIGNS.get(design.name) is not design or HYPERVISORS.get(hypervisor.name) is not hypervisor:
        raise BadInput(f"a cluster explores what is registered, and {design.name} on {hypervisor.name} is not")
    return NamedWorld(code_of([built]), design.name, hypervisor.name, built.scene, limits.failures, tuple(laws),
                      built.engine, reduce, limits.states, memory)


def local_workers(address: str) -> int | None:
    """How many workers of this machine *address* asks for, None if it is that of a scheduler; raises BadInput."""
    if not address.startswith(LOCAL):
        return None
    number = address.removeprefix(LOCAL)
    if not number.isdecimal() or not 1 <= int(number) <= MOST_LOCAL:
        raise BadInput(f"--cluster local:N wants a number of workers from 1 to {MOST_LOCAL}, not {number!r}")
    return int(number)


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


# Processes that are started within do not get ^C and the like, which is ours to handle: what is ignored is so for them, too.
@contextmanager
def _ours_alone() -> Iterator[None]:
    before = {}
    with suppress(ValueError):                                  # not in the main thread
        before = {number: signal.signal(number, signal.SIG_IGN) for number in _TERMINALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

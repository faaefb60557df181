"""What runs on a worker of a cluster: one scenario of a world that is named, for it cannot be sent.

A worker answers only if its code is that of who asks. It keeps one world, with its tables.
"""

from __future__ import annotations

import threading
import time
import warnings
from dataclasses import dataclass, replace

from guest_memfd.errors import BadInput, EngineNotice
from guest_memfd.explore.engine.memory import share
from guest_memfd.explore.suite.crew import Failed, tried
from guest_memfd.explore.suite.identity import code_of
from guest_memfd.explore.suite.work import Answer, Bench, Task
from guest_memfd.explore.world import choice
from guest_memfd.explore.world.scenario import world
from guest_memfd.words.scene import Scene

PART = 0.6
"""Of the memory that dask lets a worker have: above 0.8 of it, it is given no more to do."""


@dataclass(frozen=True)
class NamedWorld:
    """A world, by name; the digest of its code; and how far to go there: states of a scenario, bytes of a worker."""

    code: str
    design: str
    hypervisor: str
    scene: Scene
    failures: int | None
    laws: tuple[str, ...]
    engine: str | None
    reduce: bool
    states: int | None
    memory: int | None


@dataclass(frozen=True)
class Unusable:
    """Why a worker cannot answer."""

    why: str


class _Kept:
    # What this process has of the last place. dask may let it have several threads.

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.place: NamedWorld | None = None
        self.bench = Bench([], None, None)
        self.ended = set[str]()                         # runs that want no more


_kept = _Kept()


def do(run: str, place: NamedWorld, task: Task, seconds: float | None) -> Answer | Failed | Unusable:
    """Do *task* of *run* in *place*, if the code is the same; *seconds*: how long it may take."""
    with _kept.lock, warnings.catch_warnings():
        warnings.simplefilter("ignore", EngineNotice)
        try:
            if _kept.place != place:
                _kept.place, _kept.bench = None, _bench(place)
            _kept.bench.worlds[0].rehearsal.walk(task.parties)
        except BadInput as error:
            return Unusable(str(error))
        if (code := code_of(_kept.bench.worlds)) != place.code:
            return Unusable(f"its code is another ({code}, and here {place.code})")
        _kept.place, bench = place, _kept.bench
        bench.deadline = None if seconds is None else time.monotonic() + seconds
        bench.stopped = lambda: run in _kept.ended
        return tried(bench, replace(task, world=0))


def leave(run: str) -> None:
    """Let the scenario of *run* that is explored now be the last."""
    _kept.ended.add(run)


def _bench(place: NamedWorld) -> Bench:
    built = world(place.design, place.hypervisor, scene=place.scene, failures=place.failures, laws=place.laws,
                  engine=place.engine, reduce=place.reduce)
    choice.prepare(place.engine)
    return Bench([built], place.states, None, place.memory or _memory())


# What dask lets a worker have is a part of the machine's memory, if nobody says otherwise.
def _memory() -> int | None:
    from distributed import get_worker

    limit = get_worker().memory_manager.memory_limit
    return int(PART * limit) if limit else share(None, 1)

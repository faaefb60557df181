"""Work in processes of its own: forked, limited, told apart when they die.

A child is a copy of this process, modules and all, so it starts at once and what it breaks is broken nowhere else.
"""

from __future__ import annotations

import gc
import itertools
import os
import pickle
import resource
import selectors
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

GRACE = 10
"""Seconds after which a child is killed that has not ended by itself."""


class Died(NamedTuple):
    """A child that ended without an answer: how."""

    how: str


@dataclass
class _Child:
    key: Any
    pid: int
    said: bytes = b""


def each(tasks: Iterable[tuple[Any, Callable[[], Any]]], *, jobs: int, seconds: float) -> Iterator[tuple[Any, Any]]:
    """Do every task in a child, *jobs* at a time, each for at most *seconds* of CPU time: (key, answer or Died).

    In the order in which they end.
    """
    waiting = iter(tasks)
    gc.collect()
    gc.freeze()                                         # so that a child need not copy what it only looks at
    with selectors.DefaultSelector() as busy:
        while True:
            for key, work in itertools.islice(waiting, jobs - len(busy.get_map())):
                ours, pid = _start(work, seconds)
                busy.register(ours, selectors.EVENT_READ, _Child(key, pid))
            if not busy.get_map():
                return
            for ready, _ in busy.select():
                child: _Child = ready.data
                said = os.read(ready.fd, 1 << 20)
                child.said += said
                if not said:
                    busy.unregister(ready.fd)
                    os.close(ready.fd)
                    yield child.key, _answer(child)


def _start(work: Callable[[], Any], seconds: float) -> tuple[int, int]:
    ours, theirs = os.pipe()
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        os.close(theirs)
        return ours, pid
    status = 1
    try:
        os.close(ours)
        gc.disable()
        _limit(seconds)
        with os.fdopen(theirs, "wb") as pipe:
            pipe.write(pickle.dumps(work()))
        status = 0
    except BaseException:
        traceback.print_exc()                           # no one else would ever see it
    finally:
        sys.stderr.flush()
        os._exit(status)


def _limit(seconds: float) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    hard = int(seconds) + GRACE
    resource.setrlimit(resource.RLIMIT_CPU, (hard, hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _answer(child: _Child) -> Any:
    _, status = os.waitpid(child.pid, 0)
    if os.WIFSIGNALED(status):
        return Died(signal.Signals(os.WTERMSIG(status)).name)
    return pickle.loads(child.said) if os.WEXITSTATUS(status) == 0 else Died(f"exit status {os.WEXITSTATUS(status)}")

"""One call into a machine at a time. First come, first served; a thread that holds it may take it again.

The machine's CPUs execute one instruction stream at a time, and its kernel runs every procedure to its end: two threads
inside would see each other's half. A vCPU gives way between two of its guest's slices (dev/kvm/vcpu.py and
dev/gunyah/vcpu.py), so that a punch gets in while a guest loops. Python's own locks are not fair: a thread that lets go of
one only to take it again nearly always gets it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType


class Turns:
    """A reentrant lock that goes from thread to thread in the order in which they came.

    abandoned: something that is no error of the call - a signal, memory that ran out - ended one in the middle, so that what
    the lock protects is half done, with locks held and folios between two owners. No one shall touch it any more.
    """

    def __init__(self) -> None:
        self.abandoned = False
        self._books = threading.Lock()
        self._owner: int | None = None
        self._depth = 0
        self._queue: deque[tuple[int, threading.Lock]] = deque()

    @property
    def wanted(self) -> bool:
        """Whether another thread waits for it."""
        return bool(self._queue)

    def __enter__(self) -> None:
        if self._owner == threading.get_ident():
            self._depth += 1
        else:
            self._acquire(1)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._depth -= 1
        if not self._depth:
            with self._books:
                self._hand_over()

    @contextmanager
    def released(self) -> Iterator[None]:
        """Let go of it, however often it was taken, while the block runs."""
        depth, self._depth = self._depth, 0
        with self._books:
            self._hand_over()
        try:
            yield
        finally:
            self._take_back(depth)

    @contextmanager
    def behind(self, other: Turns) -> Iterator[None]:
        """Hold *other* as well while the block runs; a thread that waits for that is in no one's way here."""
        with ExitStack() as stack:
            with self.released():
                stack.enter_context(other)
            yield

    def give_way(self) -> None:
        """Let those in who wait now."""
        if self.wanted:
            with self.released():
                pass

    def _acquire(self, depth: int) -> None:
        me, turn = threading.get_ident(), threading.Lock()
        turn.acquire()
        try:
            with self._books:
                if self._owner is None:
                    self._owner, self._depth = me, depth
                    return
                self._queue.append((me, turn))
            turn.acquire()
            self._depth = depth
        except BaseException:                               # a signal: it may have become ours all the same
            with self._books:
                if (me, turn) in self._queue:
                    self._queue.remove((me, turn))
                elif self._owner == me:
                    self._hand_over()
            raise

    # A thread that let go of it inside of a call must have it again before it leaves: what a signal raises meanwhile
    # comes later.
    def _take_back(self, depth: int) -> None:
        raised: BaseException | None = None
        while True:
            try:
                self._acquire(depth)
                break
            except BaseException as error:
                raised = raised or error
        if raised is not None:
            raise raised

    # To the first who waits; the caller has the books.
    def _hand_over(self) -> None:
        if self._queue:
            self._owner, turn = self._queue.popleft()
            turn.release()
        else:
            self._owner = None

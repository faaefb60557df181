"""struct rw_semaphore with its queued writer (kernel/locking/rwsem.c). A queued writer stops readers."""

from __future__ import annotations


class Rwsem:
    """`writer` and `queued` are task numbers or None, `readers` a count."""

    __slots__ = ("queued", "readers", "writer")

    def __init__(self) -> None:
        self.writer: int | None = None
        self.queued: int | None = None
        self.readers = 0

    def down_read(self) -> bool:
        """Take it shared if no one holds it exclusively or waits to."""
        if self.writer is not None or self.queued is not None:
            return False
        self.readers += 1
        return True

    def up_read(self) -> bool:
        """Drop a shared hold; False when there is none."""
        if not self.readers:
            return False
        self.readers -= 1
        return True

    def down_write(self, task: int) -> bool | None:
        """Take it exclusively: True; None: *task* has just queued; False: it goes on waiting."""
        if self.queued not in (None, task):
            return False
        if self.writer is not None or self.readers:
            if self.queued == task:
                return False
            self.queued = task
            return None
        self.queued, self.writer = None, task
        return True

    def up_write(self, task: int) -> bool:
        """Drop the exclusive hold; False when *task* does not have it."""
        if self.writer != task:
            return False
        self.writer = None
        return True

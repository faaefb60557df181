"""Locks of the abstract host: the rw-semaphores with their queued writer, and the folio lock."""

from __future__ import annotations

from guest_memfd.abstract.base import AbstractBase
from guest_memfd.words.outcome import STAY
from guest_memfd.words.pagestate import CONTENTION, POISON
from guest_memfd.words.primitives import Folio, Locked


class AbstractLocks(AbstractBase):
    """The lock primitives, down_read to unlock_folio: they wait, and a release without a hold is a bug."""

    def _sem(self, sem: str) -> tuple[int, int, int]:
        file = self.file
        return getattr(file, f"{sem}_w"), getattr(file, f"{sem}_r"), getattr(file, f"{sem}_q")

    def down_read(self, sem: str) -> None:
        """Readers wait for a writer, and for a queued one, too (kernel/locking/rwsem.c)."""
        writer, readers, queued = self._sem(sem)
        # A queued writer keeps readers out, as in the kernel. Without that, readers that come one after the other
        # would starve it, and a deadlock that needs the queue could not be found.
        if writer or queued:
            self.wait()
        setattr(self.file, f"{sem}_r", readers + 1)

    def down_read_trylock(self, sem: str) -> bool:
        """Now or not at all."""
        writer, readers, queued = self._sem(sem)
        if writer or queued:
            self.against(CONTENTION)
            return False
        setattr(self.file, f"{sem}_r", readers + 1)
        return True

    def up_read(self, sem: str) -> None:
        """Drop a shared hold."""
        _, readers, _ = self._sem(sem)
        if not readers:
            self.die(f"up_read of {sem}_lock, which nobody holds shared")
        setattr(self.file, f"{sem}_r", readers - 1)

    def down_write(self, sem: str) -> object:
        """A writer that cannot have the lock queues first: from then on new readers wait."""
        writer, readers, queued = self._sem(sem)
        me = self.who + 1
        # One place in the queue is enough here: a second writer waits, and is the next to queue.
        if queued not in (0, me):
            self.wait()
        if writer or readers:
            if queued:
                self.wait()
            # To queue is a step of its own that others can see. STAY: the primitive is not over, and is asked for
            # again.
            setattr(self.file, f"{sem}_q", me)
            return STAY
        setattr(self.file, f"{sem}_q", 0)
        setattr(self.file, f"{sem}_w", me)
        if sem == "invalidate":
            self.count("stalls")
        return None

    def up_write(self, sem: str) -> None:
        """Drop the exclusive hold."""
        writer, _, _ = self._sem(sem)
        if writer != self.who + 1:
            self.die(f"up_write of {sem}_lock, which this task does not hold")
        setattr(self.file, f"{sem}_w", 0)

    def lock_folio(self, folio: Folio) -> Locked:
        """Wait for the folio lock."""
        head = self.head_of(folio)
        # Without a reference the frame may have been freed and allocated anew: the lock would be that of another
        # folio.
        if not head.refs():
            self.die(f"folio_lock of {folio} without a reference")
        if head.lock:
            self.wait()
        head.lock = self.who + 1
        # A reason to refuse, for the laws: the design may not know it before it has the lock.
        poisoned = [frame for frame in self.state.parts(head) if frame.poison]
        for frame in poisoned:
            self.against(POISON, frame)
        return Locked(self.ours(head), bool(head.uptodate), bool(head.no_direct_map), bool(poisoned))

    def unlock_folio(self, folio: Folio) -> None:
        """Unlocking an unlocked folio is a VM_BUG_ON."""
        head = self.head_of(folio)
        if head.lock != self.who + 1:
            self.die(f"folio_unlock of {folio}, which this task has not locked")
        head.lock = 0

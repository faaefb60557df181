"""Locks of the emulated host: the inode's rw-semaphores with their queued writer, and the folio lock."""

from __future__ import annotations

from guest_memfd.machine.linux.rwsem import Rwsem
from guest_memfd.machine.primitives.base import Base
from guest_memfd.words.outcome import STAY
from guest_memfd.words.pagestate import CONTENTION, POISON
from guest_memfd.words.primitives import Folio, Locked, Sem


class Locks(Base):
    """The lock primitives, down_read to unlock_folio, on the emulated kernel's semaphores and folio locks."""

    def _sem(self, sem: Sem) -> Rwsem:
        return self.inode.invalidate if sem == "invalidate" else self.inode.bindings

    def down_read(self, sem: Sem) -> None:
        """Readers wait for a writer, and for a queued one, too (kernel/locking/rwsem.c)."""
        if not self._sem(sem).down_read():
            self.wait()

    def down_read_trylock(self, sem: Sem) -> bool:
        """Now or not at all."""
        taken = self._sem(sem).down_read()
        if not taken:
            self.against(CONTENTION)
        return taken

    def up_read(self, sem: Sem) -> None:
        """Drop a shared hold."""
        if not self._sem(sem).up_read():
            self.die(f"up_read of {sem}_lock, which nobody holds shared")

    def down_write(self, sem: Sem) -> object:
        """A writer that cannot have the lock queues first: from then on new readers wait."""
        taken = self._sem(sem).down_write(self.who)
        # Queued: a step that others can see, after which new readers wait.
        if taken is None:
            return STAY
        if not taken:
            self.wait()
        if sem == "invalidate":
            self.machine.tracer.counts(self.who, "stalls")
        return None

    def up_write(self, sem: Sem) -> None:
        """Drop the exclusive hold."""
        if not self._sem(sem).up_write(self.who):
            self.die(f"up_write of {sem}_lock, which this task does not hold")

    def lock_folio(self, folio: Folio) -> Locked:
        """Wait for the folio lock."""
        page = self.page(folio)
        if not page.refcount:
            self.die(f"folio_lock of {folio} without a reference")
        if page.lock is not None:
            self.wait()
        page.lock = self.who
        if page.hwpoison:
            self.against(POISON, page)
        return Locked(page.index if page.inode is self.inode else None, page.uptodate, page.private, page.hwpoison)

    def unlock_folio(self, folio: Folio) -> None:
        """Unlocking an unlocked folio is a VM_BUG_ON."""
        page = self.page(folio)
        if page.lock != self.who:
            self.die(f"folio_unlock of {folio}, which this task has not locked")
        page.lock = None

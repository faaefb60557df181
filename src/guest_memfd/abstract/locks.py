"""Locks of the abstract host: the rw-semaphores with their queued writer, and the folio lock."""

from __future__ import annotations

from guest_memfd.abstract import state as st
from guest_memfd.abstract.base import AbstractBase
from guest_memfd.words.outcome import STAY
from guest_memfd.words.pagestate import CONTENTION, POISON
from guest_memfd.words.primitives import Folio, Locked


class AbstractLocks(AbstractBase):
    """The lock primitives, down_read to unlock_folio: they wait, and a release without a hold is a bug."""

    def _of(self, sem: str) -> st.FileRecord | st.VmRecord:
        return self.vm if sem == "mmu" else self.file

    def _sem(self, sem: str) -> tuple[int, int, int]:
        of = self._of(sem)
        return getattr(of, f"{sem}_w"), getattr(of, f"{sem}_r"), getattr(of, f"{sem}_q")

    def down_read(self, sem: str) -> None:
        """Readers wait for a writer, and for a queued one, too (kernel/locking/rwsem.c)."""
        writer, readers, queued = self._sem(sem)
        # A queued writer keeps readers out, as in the kernel. Without that, readers that come one after the other
        # would starve it, and a deadlock that needs the queue could not be found.
        if writer or queued:
            self.wait()
        setattr(self._of(sem), f"{sem}_r", readers + 1)

    def down_read_trylock(self, sem: str) -> bool:
        """Now or not at all."""
        writer, readers, queued = self._sem(sem)
        if writer or queued:
            self.against(CONTENTION)
            return False
        setattr(self._of(sem), f"{sem}_r", readers + 1)
        return True

    def up_read(self, sem: str) -> None:
        """Drop a shared hold."""
        _, readers, _ = self._sem(sem)
        if not readers:
            self.die(f"up_read of {sem}_lock, which nobody holds shared")
        setattr(self._of(sem), f"{sem}_r", readers - 1)

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
            setattr(self._of(sem), f"{sem}_q", me)
            return STAY
        setattr(self._of(sem), f"{sem}_q", 0)
        setattr(self._of(sem), f"{sem}_w", me)
        if sem == "invalidate":
            self.count("stalls")
        return None

    def up_write(self, sem: str) -> None:
        """Drop the exclusive hold."""
        writer, _, _ = self._sem(sem)
        if writer != self.who + 1:
            self.die(f"up_write of {sem}_lock, which this task does not hold")
        setattr(self._of(sem), f"{sem}_w", 0)

    def mutex_lock(self, mutex: str) -> None:
        """Who waits for it is not seen: it has no readers to keep out."""
        if self.vm.slots_lock:
            self.wait()
        self.vm.slots_lock = self.who + 1

    def mutex_unlock(self, mutex: str) -> None:
        """By who holds it."""
        if self.vm.slots_lock != self.who + 1:
            self.die(f"mutex_unlock of {mutex}_lock, which this task does not hold")
        self.vm.slots_lock = 0

    def srcu_read_lock(self) -> None:
        """One more reader of memslots."""
        self.vm.srcu += 1

    def srcu_read_unlock(self) -> None:
        """One less; the last takes along how far the sequence has moved on, as there is nobody left who has sampled it."""
        if not self.vm.srcu:
            self.die("srcu_read_unlock without a reader")
        self.vm.srcu -= 1
        if not self.vm.srcu:
            self.vm.seq = self.vm.sampled = 0

    def synchronize_srcu(self) -> None:
        """Waits for readers that come later, too: they find what the caller has stored, as those do that come afterwards."""
        if self.vm.srcu:
            self.wait()

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

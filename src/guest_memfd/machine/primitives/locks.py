"""Locks of the emulated host: the inode's rw-semaphores with their queued writer, and the folio lock."""

from __future__ import annotations

from guest_memfd.machine.linux.rwsem import Rwsem
from guest_memfd.machine.primitives.base import Base
from guest_memfd.words.outcome import STAY
from guest_memfd.words.pagestate import CONTENTION, POISON
from guest_memfd.words.primitives import Folio, Locked, Mutex, Sem


def _sem(host: Base, sem: Sem) -> Rwsem:
    if sem == "mmu":
        return host.vm.mmu_lock
    return host.inode.invalidate if sem == "invalidate" else host.inode.bindings


def down_read(host: Base, sem: Sem) -> None:
    """Readers wait for a writer, and for a queued one, too (kernel/locking/rwsem.c)."""
    if not _sem(host, sem).down_read():
        host.wait()


def down_read_trylock(host: Base, sem: Sem) -> bool:
    """Now or not at all."""
    taken = _sem(host, sem).down_read()
    if not taken:
        host.against(CONTENTION)
    return taken


def up_read(host: Base, sem: Sem) -> None:
    """Drop a shared hold."""
    if not _sem(host, sem).up_read():
        host.die(f"up_read of {sem}_lock, which nobody holds shared")


def down_write(host: Base, sem: Sem) -> object:
    """A writer that cannot have the lock queues first: from then on new readers wait."""
    taken = _sem(host, sem).down_write(host.who)
    # Queued: a step that others can see, after which new readers wait.
    if taken is None:
        return STAY
    if not taken:
        host.wait()
    if sem == "invalidate":
        host.machine.tracer.counts(host.who, "stalls")
    return None


def up_write(host: Base, sem: Sem) -> None:
    """Drop the exclusive hold."""
    if not _sem(host, sem).up_write(host.who):
        host.die(f"up_write of {sem}_lock, which this task does not hold")


def mutex_lock(host: Base, mutex: Mutex) -> None:
    """KVM's slots_lock, of the VM."""
    if host.vm.slots_lock is not None:
        host.wait()
    host.vm.slots_lock = host.who


def mutex_unlock(host: Base, mutex: Mutex) -> None:
    """By who holds it."""
    if host.vm.slots_lock != host.who:
        host.die(f"mutex_unlock of {mutex}_lock, which this task does not hold")
    host.vm.slots_lock = None


def srcu_read_lock(host: Base) -> None:
    """One more reader of memslots."""
    host.vm.srcu += 1


def srcu_read_unlock(host: Base) -> None:
    """One less; the last leaves nobody who has sampled the sequence."""
    if not host.vm.srcu:
        host.die("srcu_read_unlock without a reader")
    host.vm.srcu -= 1
    if not host.vm.srcu:
        host.vm.seq, host.vm.sampled = 0, False


def synchronize_srcu(host: Base) -> None:
    """Wait for the readers that there are."""
    if host.vm.srcu:
        host.wait()


def lock_folio(host: Base, folio: Folio) -> Locked:
    """Wait for the folio lock."""
    page = host.page(folio)
    if not page.refcount:
        host.die(f"folio_lock of {folio} without a reference")
    if page.lock is not None:
        host.wait()
    page.lock = host.who
    if page.hwpoison:
        host.against(POISON, page)
    return Locked(page.index if page.inode is host.inode else None, page.uptodate,
                  page.no_direct_map or page.unmapped, page.hwpoison)


def unlock_folio(host: Base, folio: Folio) -> None:
    """Unlocking an unlocked folio is a VM_BUG_ON."""
    page = host.page(folio)
    if page.lock != host.who:
        host.die(f"folio_unlock of {folio}, which this task has not locked")
    page.lock = None

"""Around the pages on the emulated host: trees, files, inodes, the module, the VM, and the laws' tracepoints."""

from __future__ import annotations

from collections.abc import Sequence
from errno import EBUSY, ENOMEM

from guest_memfd.machine.linux.folio import LinuxFolio
from guest_memfd.machine.linux.inode import OF_VM
from guest_memfd.machine.linux.maple import MapleTree
from guest_memfd.machine.primitives import guest, user
from guest_memfd.machine.primitives.base import Base
from guest_memfd.words import facts
from guest_memfd.words.pagestate import (
    ALIVE,
    CONTENTION,
    DYING,
    EVICTED,
    FAILURE,
    GONE_BEFORE,
    PRIVATE_PAGE,
    RUNNING,
    SLOT_INVALID,
    VM_STATES,
)
from guest_memfd.words.primitives import Entries, Tree
from guest_memfd.words.units import Gfn, Index, Pa


def begin_op(host: Base, op: str, start: Index, nr: int, gfn: Gfn | None) -> None:
    """Tell the tracer that an operation begins, on pages [start, start+nr); takes no step of its own."""
    host.machine.tracer.begin(host, op, start, nr, gfn)


def end_op(host: Base, ret: int, error_index: Index | None) -> None:
    """Tracepoint, in the state the operation is about to unlock."""
    host.machine.tracer.end(host, ret, error_index)


def ops_released(host: Base) -> None:
    """Tracepoint; of a file that is gone nothing is left to be called about."""
    if host.inode.released and host.inode.life in (ALIVE, EVICTED):
        host.gone("what the hypervisor keeps of the file, in ops_released")
    host.inode.released = True


def op_returned(
    host: Base, op: str, start: Index, nr: int, ret: int, error_index: Index | None, gfn: Gfn | None = None,
) -> None:
    """Tracepoint, where the caller is told."""
    host.machine.tracer.returned(host, op, start, nr, ret, error_index, gfn)


# -- trees ---------------------------------------------------------------------------------------------------


def tree_load(host: Base, tree: Tree, start: int, nr: int) -> Sequence[int]:
    """Entries past the end of the file are holes."""
    # Who looks for all memslots asks for more than there are; in a scene it is known how many gfns there can be.
    if tree == "memslots" and host.scene is not None:
        nr = min(nr, host.scene.guest_frames)
    entries = host.inode.trees[tree].load(start, nr)
    if tree in ("memslots", "gmem_files") and nr == 1:
        _looked_up(host, tree, Gfn(start), entries[0])
    return entries


# Who looks for a memslot, or for its file, and finds none, or one on its way out, has that against him.
def _looked_up(host: Base, tree: Tree, gfn: Gfn, entry: int) -> None:
    if tree == "gmem_files" and not host.inode.entry("memslots", gfn):
        host.gone("the memslot, in tree_load")
    if not entry:
        host.against(GONE_BEFORE)
    if tree == "memslots" and entry & SLOT_INVALID:
        host.against(CONTENTION)


def tree_store(host: Base, tree: Tree, start: Index, values: Entries) -> int:
    """A maple node may have to be allocated."""
    if host.machine.slab_fails():
        host.against(FAILURE)
        return -ENOMEM
    _store(host, tree, start, values)
    return 0


# Stores past the end of the file go nowhere. What is of the VM is kept by gfn.
def _store(host: Base, tree: Tree, start: Index, values: Entries) -> None:
    if tree == "gmem_files" and not values.first and host.inode.trees["memslots"].load(start, len(values)).count(0):
        host.gone("the memslot, in tree_store_reserved")
    nr = len(values) if tree in OF_VM else min(len(values), host.inode.size - start)
    if nr <= 0:
        return
    values = Entries(values.first, nr, values.step)
    if tree == "attributes":
        changed = host.machine.tracer.attributes(host, start, values)
        host.inode.trees[tree].store(start, values)
        for folio in changed:
            for pa in host.machine.named(folio.pa, folio.size):
                # Of a folio that is private in part, those pages; where none is watched the first stands for all.
                if start <= folio.index_of(pa) < start + nr or not host.machine.watched:
                    _converted(host, folio, pa, values.first)
        return
    if tree == "bindings":
        host.machine.tracer.bindings(host, start, values)
        host.inode.released = host.inode.released and not values.first
    host.inode.trees[tree].store(start, values)


def _converted(host: Base, page: LinuxFolio, pa: Pa, attribute: int) -> None:
    if attribute != PRIVATE_PAGE:
        host.machine.tracer.declassify(page, pa)
        return
    guest.note_private(host, page, pa, "converted")
    if host.machine.driver.owner(pa) == "borrowed":
        host.machine.tracer.withdrawn.add(pa)


def tree_store_reserved(host: Base, tree: Tree, start: Index, values: Entries) -> None:
    """A store that changes the attribute tree needs its reservation."""
    if tree == "attributes":
        there = host.inode.reserved
        if not there.start <= start <= start + len(values) <= there.stop:
            host.die("store into the attribute tree without preallocated nodes")
        host.inode.reserved = range(0)
    _store(host, tree, start, values)


def tree_reserve(host: Base, tree: Tree, start: Index, nr: int) -> int:
    """The nodes are there until they are used or given back."""
    if host.machine.slab_fails():
        host.against(FAILURE)
        return -ENOMEM
    if tree == "attributes":
        host.inode.reserved = range(start, start + nr)
    return 0


def tree_release(host: Base, tree: Tree) -> None:
    """Give the nodes back that `tree_reserve` has allocated, unused."""
    if tree == "attributes":
        host.inode.reserved = range(0)


# -- files and inodes ----------------------------------------------------------------------------------------


def alloc_inode(host: Base) -> int:
    """One file, one inode."""
    if host.machine.slab_fails():
        host.against(FAILURE)
        return -ENOMEM
    host.inode.files = host.inode.references = 1
    host.inode.life = ALIVE
    host.machine.inodes[host.inode] = None
    return 0


def fd_install(host: Base) -> None:
    """User space sees it."""
    host.inode.fd = True


def fd_close(host: Base) -> bool:
    """The descriptor goes; its file reference is the caller's to drop."""
    was_open, host.inode.fd = host.inode.fd, False
    return was_open


def get_file(host: Base) -> bool:
    """Not from a file whose last reference has gone."""
    if not host.inode.files:
        host.against(GONE_BEFORE)
        return False
    host.inode.files += 1
    return True


def fd_open(host: Base) -> bool:
    """Whether the VMM's descriptor is open."""
    return host.inode.fd


def fdget(host: Base) -> bool:
    """Not from a descriptor that is closed."""
    if not host.inode.fd:
        return False
    host.inode.files += 1
    return True


def igrab(host: Base) -> bool:
    """Not while it is being evicted."""
    if host.inode.life != ALIVE:
        host.against(GONE_BEFORE)
        return False
    host.inode.references += 1
    return True


def fput(host: Base) -> bool:
    """True: the last one."""
    if not host.inode.files:
        host.die("fput of a file without references")
    host.inode.files -= 1
    return not host.inode.files


def iput(host: Base) -> bool:
    """True: the last one."""
    return user.put_inode(host)


def destroy_inode(host: Base) -> None:
    """No one finds it any more; BUG_ON()s of clear_inode() and of destroy_inode() come first (fs/inode.c).

    A lock in it that is still held is for lockdep to find (debug_check_no_locks_freed(), kernel/locking/lockdep.c).
    """
    inode = host.inode
    if inode.life != EVICTED:
        host.die("destroy_inode of an inode that is in use")
    if inode.pages:
        host.die("destroy_inode of an inode whose page cache is not empty")
    if inode.reserved:
        host.die("destroy_inode of an inode with preallocated nodes")
    if inode.invalidate.writer is not None or inode.invalidate.readers:
        host.die("destroy_inode of an inode whose invalidate_lock is held")
    inode.destroy()
    host.machine.tracer.destroyed(inode)
    del host.machine.inodes[inode]


# -- module and VM -------------------------------------------------------------------------------------------


def try_module_get(host: Base) -> bool:
    """Not once it is being unloaded."""
    held = host.machine.module.try_get()
    if not held:
        host.against(GONE_BEFORE)
    return held


def module_put(host: Base) -> None:
    """A reference too many is a bug."""
    try:
        host.machine.module.put()
    except ValueError:
        host.die("module_put without a reference")


def delete_module(host: Base) -> int:
    """Only when no one holds it; its exit code gives back nothing by itself."""
    # The loader refuses while anybody holds the module; its exit function takes nothing back from a VM.
    return -EBUSY if host.machine.modules.delete(host.machine.module.name) else 0


def vm_state(host: Base) -> str:
    """``running``, ``dying`` or ``gone``; the last two are noted as a reason why an operation may refuse."""
    if host.vm.state != RUNNING:
        host.against(GONE_BEFORE)
    return VM_STATES[host.vm.state]


def vm_kill(host: Base) -> bool:
    """The vCPUs leave the guest and do not come back."""
    if host.vm.state != RUNNING:
        return False
    host.vm.state = DYING
    host.machine.driver.vm_kill(host.vm)
    return True


def vm_destroyed(host: Base) -> None:
    """Stage-2 tables and their TLB entries go with the VM; memory it still owns does not come back by itself.

    A user of a kernel mapping of a guest page holds the VM, so this waits for it; so does a system call in it.
    """
    if host.vm.gpc_readers or host.vm.srcu or host.vm.slots_lock is not None:
        host.wait()
    # First the tables and TLB entries, then the caches that refer to them, then the hold on the module whose code
    # did it.
    host.machine.driver.vm_destroyed(host.vm)
    host.machine.forget_vm(host.vm)
    host.vm.gpc, host.vm.gpc_fresh = None, False
    host.inode.trees |= {name: MapleTree() for name in ("memslots", "gmem_files")}
    module_put(host)


# -- saying so -----------------------------------------------------------------------------------------------


def warn(host: Base, what: str) -> None:
    """WARN_ON(): a line on the console, and a fact for the laws."""
    host.machine.log(f"WARNING: {what}")
    host.notes.append(facts.Warned(what))


def bug(host: Base, what: str) -> None:
    """BUG_ON(): the kernel stops here, which breaks the law host-survives."""
    host.die(what)

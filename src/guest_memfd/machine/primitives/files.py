"""Around the pages on the emulated host: trees, files, inodes, the module, the VM, and the laws' tracepoints."""

from __future__ import annotations

from collections.abc import Sequence

from guest_memfd.machine.primitives.guest import GuestSide
from guest_memfd.words import facts
from guest_memfd.words.pagestate import ALIVE, DYING, EVICTED, FAILURE, GONE_BEFORE, PRIVATE_PAGE, RUNNING, VM_STATES
from guest_memfd.words.primitives import EBUSY, ENOMEM, Entries, Tree


class FilePrimitives(GuestSide):
    """The primitives on files, trees, the module and the VM, begin_op to vm_destroyed."""

    def begin_op(self, op: str, start: int, nr: int, gfn: int | None) -> None:
        """Tell the tracer that an operation begins, on pages [start, start+nr); takes no step of its own."""
        self.machine.tracer.begin(self, op, start, nr, gfn)

    def end_op(self, ret: int, error_index: int | None) -> None:
        """Tracepoint, in the state the operation is about to unlock."""
        self.machine.tracer.end(self, ret, error_index)

    def ops_released(self) -> None:
        """Tracepoint; of a file that is gone nothing is left to be called about."""
        if self.inode.released and self.inode.life in (ALIVE, EVICTED):
            self.gone("what the hypervisor keeps of the file, in ops_released")
        self.inode.released = True

    def op_returned(self, op: str, start: int, nr: int, ret: int, error_index: int | None) -> None:
        """Tracepoint, where the caller is told."""
        self.machine.tracer.returned(self, op, start, nr, ret, error_index)

    # -- trees ---------------------------------------------------------------------------------------------------

    def xa_load(self, tree: Tree, start: int, nr: int) -> Sequence[int]:
        """Entries past the end of the file are holes."""
        return self.inode.trees[tree].load(start, nr)

    def xa_store(self, tree: Tree, start: int, values: Entries) -> int:
        """A maple node may have to be allocated."""
        if self.machine.slab_fails():
            self.against(FAILURE)
            return -ENOMEM
        self._store(tree, start, values)
        return 0

    # Stores past the end of the file go nowhere. What is provided is kept by gfn.
    def _store(self, tree: Tree, start: int, values: Entries) -> None:
        nr = len(values) if tree == "provided" else min(len(values), self.inode.size - start)
        if nr <= 0:
            return
        values = Entries(values.first, nr, values.step)
        if tree == "attributes":
            changed = self.machine.tracer.attributes(self, start, values)
            self.inode.trees[tree].store(start, values)
            for page in changed:
                if values.first == PRIVATE_PAGE:
                    self.note_private(page, "converted")
                    if self.machine.driver.owner(page.pa) == "borrowed":
                        self.machine.tracer.withdrawn.add(page.pa)
                else:
                    self.machine.tracer.declassify(page)
            return
        if tree == "bindings":
            self.machine.tracer.bindings(self, start, values)
            self.inode.released = self.inode.released and not values.first
        self.inode.trees[tree].store(start, values)

    def xa_store_reserved(self, tree: Tree, start: int, values: Entries) -> None:
        """A store that changes the attribute tree needs its reservation."""
        if tree == "attributes":
            there = self.inode.reserved
            if not there.start <= start <= start + len(values) <= there.stop:
                self.die("store into the attribute tree without preallocated nodes")
            self.inode.reserved = range(0)
        self._store(tree, start, values)

    def xa_reserve(self, tree: Tree, start: int, nr: int) -> int:
        """The nodes are there until they are used or given back."""
        if self.machine.slab_fails():
            self.against(FAILURE)
            return -ENOMEM
        if tree == "attributes":
            self.inode.reserved = range(start, start + nr)
        return 0

    def xa_release(self, tree: Tree) -> None:
        """Give the nodes back that `xa_reserve` has allocated, unused."""
        if tree == "attributes":
            self.inode.reserved = range(0)

    # -- files and inodes ----------------------------------------------------------------------------------------

    def alloc_inode(self) -> int:
        """One file, one inode."""
        if self.machine.slab_fails():
            self.against(FAILURE)
            return -ENOMEM
        self.inode.files = self.inode.references = 1
        self.inode.life = ALIVE
        self.machine.inodes[self.inode] = None
        return 0

    def fd_install(self) -> None:
        """User space sees it."""
        self.inode.fd = True

    def fd_close(self) -> bool:
        """The descriptor goes; its file reference is the caller's to drop."""
        was_open, self.inode.fd = self.inode.fd, False
        return was_open

    def get_file(self) -> bool:
        """Not from a file whose last reference has gone."""
        if not self.inode.files:
            self.against(GONE_BEFORE)
            return False
        self.inode.files += 1
        return True

    def fd_open(self) -> bool:
        """Whether the VMM's descriptor is open."""
        return self.inode.fd

    def fdget(self) -> bool:
        """Not from a descriptor that is closed."""
        if not self.inode.fd:
            return False
        self.inode.files += 1
        return True

    def igrab(self) -> bool:
        """Not while it is being evicted."""
        if self.inode.life != ALIVE:
            self.against(GONE_BEFORE)
            return False
        self.inode.references += 1
        return True

    def fput(self) -> bool:
        """True: the last one."""
        if not self.inode.files:
            self.die("fput of a file without references")
        self.inode.files -= 1
        return not self.inode.files

    def iput(self) -> bool:
        """True: the last one."""
        return self.put_inode()

    def destroy_inode(self) -> None:
        """No one finds it any more; BUG_ON()s of clear_inode() and of destroy_inode() come first (fs/inode.c).

        A lock in it that is still held is for lockdep to find (debug_check_no_locks_freed(), kernel/locking/lockdep.c).
        """
        inode = self.inode
        if inode.life != EVICTED:
            self.die("destroy_inode of an inode that is in use")
        if inode.pages:
            self.die("destroy_inode of an inode whose page cache is not empty")
        if inode.reserved:
            self.die("destroy_inode of an inode with preallocated nodes")
        if inode.invalidate.writer is not None or inode.invalidate.readers:
            self.die("destroy_inode of an inode whose invalidate_lock is held")
        inode.destroy()
        self.machine.tracer.destroyed(inode)
        del self.machine.inodes[inode]

    # -- module and VM -------------------------------------------------------------------------------------------

    def try_module_get(self) -> bool:
        """Not once it is being unloaded."""
        held = self.machine.module.try_get()
        if not held:
            self.against(GONE_BEFORE)
        return held

    def module_put(self) -> None:
        """A reference too many is a bug."""
        try:
            self.machine.module.put()
        except ValueError:
            self.die("module_put without a reference")

    def delete_module(self) -> int:
        """Only when no one holds it; its exit code gives back nothing by itself."""
        # The loader refuses while anybody holds the module; its exit function takes nothing back from a VM.
        return -EBUSY if self.machine.modules.delete(self.machine.module.name) else 0

    def vm_state(self) -> str:
        """``running``, ``dying`` or ``gone``; the last two are noted as a reason why an operation may refuse."""
        if self.vm.state != RUNNING:
            self.against(GONE_BEFORE)
        return VM_STATES[self.vm.state]

    def vm_kill(self) -> bool:
        """The vCPUs leave the guest and do not come back."""
        if self.vm.state != RUNNING:
            return False
        self.vm.state = DYING
        self.machine.driver.vm_kill(self.vm)
        return True

    def vm_destroyed(self) -> None:
        """Stage-2 tables and their TLB entries go with the VM; memory it still owns does not come back by itself.

        A user of a kernel mapping of a guest page holds the VM, so this waits for it.
        """
        if self.vm.gpc_readers:
            self.wait()
        # First the tables and TLB entries, then the caches that refer to them, then the hold on the module whose code
        # did it.
        self.machine.driver.vm_destroyed(self.vm)
        self.machine.forget_vm(self.vm)
        self.vm.gpc, self.vm.gpc_fresh = None, False
        self.module_put()

    # -- saying so -----------------------------------------------------------------------------------------------

    def warn(self, what: str) -> None:
        """WARN_ON(): a line on the console, and a fact for the laws."""
        self.machine.log(f"WARNING: {what}")
        self.notes.append(facts.Warned(what))

    def bug(self, what: str) -> None:
        """BUG_ON(): the kernel stops here, which breaks the law host-survives."""
        self.die(what)

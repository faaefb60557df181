"""Around the pages on the abstract host: trees, files, inodes, the module, the VM, power, and the laws' ghosts."""

from __future__ import annotations

from collections.abc import Mapping
from errno import EAGAIN, EBUSY, EPERM

from guest_memfd.abstract import state as st
from guest_memfd.abstract.access import AbstractAccess
from guest_memfd.abstract.operations import AbstractOperations
from guest_memfd.words import facts
from guest_memfd.words.pagestate import (
    ALIVE,
    BORROWED,
    CONTENTION,
    DESTROYED,
    DYING,
    EVICTED,
    GONE,
    GONE_BEFORE,
    HIBERNATION,
    HOST,
    MANY,
    PRIVATE_PAGE,
    REASONS,
    RUNNING,
    SHARED_PAGE,
    SLOT_INVALID,
    VM_STATES,
    ZERO,
)
from guest_memfd.words.primitives import OPS, UNREPORTED, Bound, Cost, Entries, Folio, MfResult
from guest_memfd.words.units import Gfn, Index, span

TREES = {"attributes": "attr", "bindings": "binding"}
"""Trees of the file, and where a page record has their entry."""

OF_VM = {"provided": "provided", "memslots": "memslot", "gmem_files": "gmem_file"}
"""Trees of the VM, and where the record of a guest frame has their entry."""


class AbstractWorld(AbstractAccess, AbstractOperations):
    """tree_load ... vm_destroyed, begin_op, end_op."""

    bounds: Mapping[str, Bound]
    errnos: Mapping[str, tuple[int, ...]]
    resumes: tuple[str, ...]

    # -- tracepoints ---------------------------------------------------------------------------------------------

    def begin_op(self, op: str, start: Index, nr: int, gfn: Gfn | None) -> None:
        """Remember what the operation is about."""
        ghost = self.state.ghost(self.who)
        self.clear(ghost)
        ghost.op = OPS.index(op) + 1
        ghost.gfn = 0 if gfn is None else gfn + 1
        ghost.scope = self._mask(start, nr)

    def end_op(self, ret: int, error_index: Index | None) -> None:
        """Report how it ended, in the state it is about to unlock."""
        ghost = self.state.ghost(self.who)
        if not ghost.op:
            return
        scope = self.members(ghost.scope)
        pages = [self.page(i) for i in scope]
        op = OPS[ghost.op - 1]
        maps = self._vmm_has if op == "user_fault" else self._guest_has
        self.notes.append(facts.Ended(
            op, ret, error_index, scope, self.members(ghost.toggled), self.members(ghost.removed),
            tuple(i for i, p in zip(scope, pages, strict=True) if p.cached), tuple(p.attr for p in pages),
            tuple(p.binding for p in pages),
            tuple(i for i, p in zip(scope, pages, strict=True) if p.cached and self._head(p).lru),
            tuple(i for i, p in zip(scope, pages, strict=True) if maps(p)),
            tuple(why for bit, why in enumerate(REASONS) if ghost.reasons >> bit & 1),
            self.members(ghost.places),
            ghost.gfn - 1 if ghost.gfn else None,
            Cost(ghost.writes, ghost.flushes, ghost.calls, ghost.stalls, ghost.splits),
            (*self.hypervisor.errnos.get(op, ()), *self.errnos.get(op, ())), self.bounds.get(op),
            self.scene.attributes if op == "create" else (), *self._around(scope),
            op in self.resumes))
        about, gfn = ghost.scope, ghost.gfn if op == "bind" else 0
        self.clear(ghost)
        # Its caller will say what it was told; the law compares that with what the operation ended with.
        if op not in UNREPORTED:
            ghost.ended, ghost.ended_op, ghost.scope, ghost.gfn = 1 - ret, OPS.index(op) + 1, about, gfn
            ghost.ended_at = 0 if error_index is None else min(max(error_index, -1) + 1, MANY)

    def _head(self, page: st.PageRecord) -> st.Frame:
        return self.state.head(self.state.frame(page.cached - 1))

    # How many pages there are in the largest folios over *scope*, and how many leaves: one of the largest size, under it two
    # of the next, and so on.
    def _around(self, scope: tuple[Index, ...]) -> tuple[int, int]:
        if not self.sizes.order:
            return 0, 0
        folios = len({index >> self.sizes.order for index in scope})
        return folios << self.sizes.order, (folios << self.sizes.order) - folios

    # Where it is bound the guest maps it - or cannot, and its next access says so: it is stopped, or memory is broken. An
    # access of the host may have had it exported since; to import it takes another fault.
    def _guest_has(self, page: st.PageRecord) -> bool:
        if self.vm.vm != RUNNING:
            return True
        if not page.binding or not page.cached:
            return False
        entry, frame = self.gfn(page.binding - 1), self.state.frame(page.cached - 1)
        exported = self.is_exported(frame) and self.state.ghost(self.who).reasons & CONTENTION
        return frame.gmap == entry.number + 1 or bool(entry.gpoison or self._broken(frame) or exported)

    # Unless the mapping has gone meanwhile, or memory is broken: who faulted is told so when he goes on.
    def _vmm_has(self, page: st.PageRecord) -> bool:
        if not self.file.vma or (page.cached and self._broken(self.state.frame(page.cached - 1))):
            return True
        return any(frame.user == page.number + 1 for frame in self.state.frames())

    # Its memory, or that of another page of its folio, which is withheld as a whole.
    def _broken(self, frame: st.Frame) -> bool:
        return any(part.poison for part in self.state.parts(self.state.head(frame)))

    def ops_released(self) -> None:
        """Once; but of a file that is gone nothing is left to be called about, and it may be said again."""
        if self.file.released and self.file.inode in (ALIVE, EVICTED):
            self.gone("what the hypervisor keeps of the file, in ops_released")
        self.file.released = 1

    def op_returned(
        self, op: str, start: Index, nr: int, ret: int, error_index: Index | None, gfn: Gfn | None = None,
    ) -> None:
        """What the caller is told, beside what the operation had said."""
        ghost = self.state.ghost(self.who)
        shared = tuple(i for i in span(start, nr) if self.page(i).attr == SHARED_PAGE) if op == "lend" else ()
        self.notes.append(facts.Returned(op, start, nr, ret, error_index, self.sizes.pages, self.how_ended(ghost),
                                         bool(ghost.begun), gfn, shared, self.errnos.get(op, ())))
        if ghost.op or ghost.ended:
            self.clear(ghost)

    # Of the pages of [start, start+nr) that there are.
    def _mask(self, start: Index, nr: int) -> int:
        return sum(1 << i for i in range(max(start, 0), min(start + nr, self.sizes.pages)))

    # -- trees ---------------------------------------------------------------------------------------------------

    def tree_load(self, tree: str, start: int, nr: int) -> tuple[int, ...]:
        """Entries past the end of the file, or of the VM's gfns, are holes."""
        if tree in OF_VM:
            if tree != "provided" and nr == 1 and 0 <= start < self.sizes.gfns:
                return (self._looked_up(tree, Gfn(start)),)
            # Who looks for all memslots asks for more than there are.
            gfns = span(Gfn(start), min(nr, self.sizes.gfns) if tree == "memslots" else nr)
            return tuple(getattr(self.gfn(gfn), OF_VM[tree]) if 0 <= gfn < self.sizes.gfns else 0 for gfn in gfns)
        field, indexes = TREES[tree], span(Index(start), nr)
        return tuple(getattr(self.page(i), field) if 0 <= i < self.sizes.pages else 0 for i in indexes)

    def tree_store(self, tree: str, start: int, values: Entries) -> int:
        """Stores past the end go nowhere on this host of few pages."""
        for i, value in enumerate(values, start):
            if tree in OF_VM:
                if 0 <= i < self.sizes.gfns:
                    self._set_entry(tree, Gfn(i), value)
            elif 0 <= i < self.sizes.pages:
                self._store(TREES[tree], Index(i), value)
        return 0

    # One that looks for a memslot, or for its file, and finds none, or one on its way out, has that against it.
    def _looked_up(self, tree: str, gfn: Gfn) -> int:
        record = self.gfn(gfn)
        value = int(getattr(record, OF_VM[tree]))
        if tree == "gmem_files" and not record.memslot:
            self.gone("the memslot, in tree_load")
        if not value:
            self.against(GONE_BEFORE)
        if tree == "memslots" and value & SLOT_INVALID:
            self.against(CONTENTION)
        return value

    # What is stored into a memslot is stored before it can be found, or while it is there.
    def _set_entry(self, tree: str, gfn: Gfn, value: int) -> None:
        record = self.gfn(gfn)
        if tree == "gmem_files" and not value and not record.memslot:
            self.gone("the memslot, in tree_store_reserved")
        setattr(record, OF_VM[tree], value)

    def _store(self, field: str, index: Index, value: int) -> None:
        page = self.page(index)
        if field == "attr" and page.attr != value:
            ghost = self.state.ghost(self.who)
            if ghost.op:
                ghost.toggled ^= 1 << index
            self.done_to("changes the attribute", index, always=bool(page.binding))
            setattr(page, field, value)
            if page.cached:
                self._attribute_changed(self.state.frame(page.cached - 1), page)
        elif field == "binding":
            self._bind(page, index, value)
        setattr(page, field, value)

    def _bind(self, page: st.PageRecord, index: Index, value: int) -> None:
        op = self.under_way()
        if page.binding != value:
            if op in ("bind", "unbind"):
                self.state.ghost(self.who).toggled ^= 1 << index
            # Of a binding that goes a kernel mapping has to be told, or no one will be able to tell it any more.
            self.done_to("changes the binding", index, always=bool(page.binding and self.hypervisor.pfn_cache))
        if op == "bind" and page.binding and value:
            self.notes.append(facts.Rebound(index))
        if value:
            self.file.released = 0

    # A page that becomes shared is given to the host as it is; one that becomes private is the guest's.
    def _attribute_changed(self, frame: st.Frame, page: st.PageRecord) -> None:
        if page.attr == PRIVATE_PAGE:
            self.note_private(frame, "converted")
            frame.withdrawn = int(frame.owner == BORROWED)
        else:
            self.declassify(frame.number)

    def tree_store_reserved(self, tree: str, start: int, values: Entries) -> None:
        """A store that changes the attribute tree needs its reservation."""
        if tree == "attributes":
            # Such a store must not fail, because nothing can be undone any more: so the nodes have to be there.
            if self._mask(Index(start), len(values)) & ~self.file.reserved:
                self.die("store into the attribute tree without preallocated nodes")
            self.file.reserved = 0
        self.tree_store(tree, start, values)

    def tree_reserve(self, tree: str, start: Index, nr: int) -> int:
        """The nodes are there until they are used or given back."""
        if tree == "attributes":
            self.file.reserved = self._mask(start, nr)
        return 0

    def tree_release(self, tree: str) -> None:
        """Give the reservation of `tree_reserve` back unused, as an operation does that fails after it."""
        if tree == "attributes":
            self.file.reserved = 0

    # -- files and inodes ----------------------------------------------------------------------------------------

    def alloc_inode(self) -> int:
        """A file and its inode."""
        self.file.files = self.file.inodes = 1
        self.file.inode = ALIVE
        self.file.refuses_readers = 0
        return 0

    def fd_install(self) -> None:
        """User space sees it."""
        self.file.fd = 1

    def fd_close(self) -> bool:
        """The descriptor goes; its file reference is the caller's to drop."""
        open_before, self.file.fd = bool(self.file.fd), 0
        return open_before

    def fdget(self) -> bool:
        """Not from a descriptor that is closed."""
        if not self.file.fd:
            return False
        self.file.files += 1
        return True

    def fd_open(self) -> bool:
        """Whether the VMM's descriptor is open."""
        return bool(self.file.fd)

    def get_file(self) -> bool:
        """Not from a file whose last reference has gone."""
        if not self.file.files:
            self.against(GONE_BEFORE)
            return False
        self.file.files += 1
        return True

    def fput(self) -> bool:
        """True: the last one."""
        if not self.file.files:
            self.die("fput of a file without references")
        self.file.files -= 1
        return not self.file.files

    def igrab(self) -> bool:
        """Not while it is being evicted."""
        if self.file.inode != ALIVE:
            self.against(GONE_BEFORE)
            return False
        self.file.inodes += 1
        return True

    def iput(self) -> bool:
        """True: the last one."""
        return self.drop_inode()

    def destroy_inode(self) -> None:
        """Its memory goes, and what its page cache still has with it."""
        # Only after eviction: earlier someone could still look the inode up.
        if self.file.inode != EVICTED:
            self.die("destroy_inode of an inode that is in use")
        # BUG_ON(inode->i_data.nrpages) of clear_inode() (fs/inode.c).
        if any(self.page(i).cached for i in self.indexes):
            self.die("destroy_inode of an inode whose page cache is not empty")
        if self.file.reserved:
            self.die("destroy_inode of an inode with preallocated nodes")
        if self.file.invalidate_w or self.file.invalidate_r:        # lockdep: "held lock freed!"
            self.die("destroy_inode of an inode whose invalidate_lock is held")
        self.file.inode, self.file.evictor = DESTROYED, 0
        for index in self.indexes:
            page = self.page(index)
            page.attr = page.binding = 0
            page.expect = ZERO
        self.file.refuses_readers = 0

    # -- module and VM -------------------------------------------------------------------------------------------

    def try_module_get(self) -> bool:
        """Not once it is gone."""
        if self.state.unloaded:
            self.against(GONE_BEFORE)
            return False
        self.state.module += 1
        return True

    def module_put(self) -> None:
        """A reference too many is a bug."""
        if not self.state.module:
            self.die("module_put without a reference")
        self.state.module -= 1

    def delete_module(self) -> int:
        """Only when no one holds it; its exit code gives back nothing by itself."""
        # The exit code of the module runs only when the count is zero; it takes nothing back from any VM.
        if self.state.module:
            return -EBUSY
        self.state.unloaded = 1
        return 0

    def vm_state(self) -> str:
        """``running``, ``dying`` or ``gone``; the last two are noted as a reason why an operation may refuse."""
        if self.vm.vm != RUNNING:
            self.against(GONE_BEFORE)
        return VM_STATES[self.vm.vm]

    def vm_kill(self) -> bool:
        """The vCPUs leave the guest and do not come back."""
        if self.vm.vm != RUNNING:
            return False
        self.vm.vm = DYING
        return True

    def vm_destroyed(self) -> None:
        """Stage-2 tables and their TLB entries go with the VM; memory it still owns does not come back by itself.

        A user of a kernel mapping of a guest page holds the VM, so this waits for it; so does a system call in it.
        """
        if self.vm.gpc_readers or self.vm.srcu or self.vm.slots_lock:
            self.wait()
        self.vm.vm = GONE
        first = self.vm.number * self.sizes.gfns
        for frame in self.state.frames():
            if first < frame.gmap <= first + self.sizes.gfns:
                frame.gmap = frame.asked = 0
            # The VM's lock on the page ends with the VM, but its ownership does not: what has not been reclaimed
            # stays withheld.
            if frame.owner != HOST and frame.of == self.vm.number:
                frame.locked_in = 0
            if first < frame.gstale <= first + self.sizes.gfns:
                frame.gstale = 0
        for gfn in span(Gfn(0), self.sizes.gfns):
            record = self.gfn(gfn)
            record.gpoison = record.memslot = record.gmem_file = 0
        self.vm.gpc = self.vm.gpc_fresh = 0
        self.module_put()

    # -- power ---------------------------------------------------------------------------------------------------

    def pm_account(self, pages: int) -> int:
        """Counted and refused atomically."""
        # Only leaving is refused. Pages may come back at any time, and the image is better for it.
        if pages > 0 and self.state.preparing:
            self.against(HIBERNATION)
            return -EAGAIN
        if self.state.away + pages < 0:
            self.die("more pages come back to the host than had left it")
        self.state.away += pages
        return 0

    def pm_prepare(self, what: str) -> int:
        """-EBUSY while pages are away from the host, else 0: from now on none may leave until `pm_post`."""
        if self.state.away:
            self.refused("hibernate", EBUSY)
            return -EBUSY
        self.state.preparing = 1
        return 0

    def pm_post(self) -> None:
        """End the hibernation that `pm_prepare` began: pages may leave the host again."""
        self.state.preparing = 0

    def open_files(self) -> int:
        """How many files have a reference left, as secretmem_users counts; hibernation asks for it."""
        count = sum(file.files > 0 for file in self.state.all_files())
        if count:
            self.refused("hibernate", EPERM)
        return count

    def freeze_processes(self) -> None:
        """Tasks stop where they can: outside of every memory operation."""
        held = any(f.invalidate_w or f.invalidate_r or f.invalidate_q or f.bindings_w or f.bindings_r or f.bindings_q
                   for f in self.state.all_files())
        # A task inside a memory operation is waited for: the freezer stops tasks at the border to user space.
        if (held or any(f.lock or f.lookup or f.spec for f in self.state.frames())
                or any(vm.gpc_readers or vm.slots_lock or vm.srcu or vm.mmu_w or vm.mmu_r for vm in self.state.vms())):
            self.wait()
        self.state.frozen = 1

    def thaw_processes(self) -> None:
        """Let the tasks run that `freeze_processes` has stopped."""
        self.state.frozen = 0

    def hwpoison(self, index: Index) -> Folio | None:
        """Hardware reports the frame at *index*; memory_failure() holds a reference while it works."""
        page = self.page(index)
        if not page.cached:
            return None
        frame = self.state.frame(page.cached - 1)
        # Reported once; a second report of the same frame finds the flag set.
        if frame.poison:
            return None
        frame.poison = 1
        head = self.state.head(frame)
        head.lookup += 1
        return self.folio(head)

    def memory_failure_done(self, folio: Folio, result: MfResult) -> None:
        """Who still reaches the page now, and what the handler makes of it."""
        ghost = self.state.ghost(self.who)
        # The end of the file is an excuse while it ends, and no other's.
        mask = ghost.reasons & ~(GONE_BEFORE if self.file.inode == ALIVE else 0)
        reasons = tuple(why for bit, why in enumerate(REASONS) if mask >> bit & 1)
        for frame in self.frames_of(folio):
            if frame.poison:
                reached = {"the guest": (frame.gmap or frame.gstale) and self.vm.vm == RUNNING, "the VMM": frame.user,
                           "the kernel": any(vm.gpc == frame.number + 1 for vm in self.state.vms())}
                self.notes.append(facts.Contained(
                    frame.number, result, tuple(who for who, how in reached.items() if how), reasons))
                frame.handled = int(result == "delayed")
        self.clear(ghost)

    # -- saying so -----------------------------------------------------------------------------------------------

    def warn(self, what: str) -> None:
        """WARN_ON(): leave a fact for the laws and go on."""
        self.notes.append(facts.Warned(what))

    def bug(self, what: str) -> None:
        """BUG_ON(): the kernel stops here, which breaks the law host-survives."""
        self.die(what)

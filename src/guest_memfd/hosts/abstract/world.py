"""Around the pages on the abstract host: trees, files, inodes, the module, the VM, power, and the laws' ghosts."""

from __future__ import annotations

from guest_memfd.hosts.abstract import notes
from guest_memfd.hosts.abstract import state as st
from guest_memfd.hosts.abstract.guest import GuestSide
from guest_memfd.hosts.abstract.pagecache import PageCache
from guest_memfd.hosts.host import EAGAIN, EBUSY, Entries, Folio

TREES = {"attributes": "attr", "bindings": "binding", "provided": "provided"}


class World(PageCache, GuestSide):
    """xa_load ... vm_destroyed, begin_op, end_op."""

    # -- ghosts --------------------------------------------------------------------------------------------------

    def begin_op(self, op: str, start: int, nr: int) -> None:
        """Remember what the operation is about."""
        ghost = self.state.ghost(self.who)
        ghost.op = st.OPS.index(op) + 1
        ghost.scope = sum(1 << i for i in range(start, min(start + nr, st.PAGES)))
        ghost.toggled = ghost.removed = 0

    def end_op(self, ret: int, error_index: int | None) -> None:
        """Report how it ended, in the state it is about to unlock."""
        ghost = self.state.ghost(self.who)
        if not ghost.op:
            return
        scope = _members(ghost.scope)
        pages = [self.state.page(i) for i in scope]
        self.notes.append(notes.Ended(
            st.OPS[ghost.op - 1], ret, error_index, scope, _members(ghost.toggled), _members(ghost.removed),
            tuple(p.number for p in pages if p.cached), tuple(p.attr for p in pages),
            tuple(p.number for p in pages if p.binding),
            tuple(p.number for p in pages if p.cached and self.state.frame(p.cached - 1).lru)))
        ghost.op = ghost.scope = ghost.toggled = ghost.removed = 0

    # -- trees ---------------------------------------------------------------------------------------------------

    def xa_load(self, tree: str, start: int, nr: int) -> tuple[int, ...]:
        """Entries past the end of the file are holes."""
        field = TREES[tree]
        return tuple(getattr(self.state.page(i), field) if i < st.PAGES else 0 for i in range(start, start + nr))

    def xa_store(self, tree: str, start: int, values: Entries) -> int:
        """Stores past the end of the file go nowhere on this host of two pages."""
        field = TREES[tree]
        for i, value in enumerate(values, start):
            if i < st.PAGES:
                self._store(field, i, value)
        return 0

    def _store(self, field: str, index: int, value: int) -> None:
        page = self.state.page(index)
        if field == "attr" and page.attr != value:
            ghost = self.state.ghost(self.who)
            if ghost.op:
                ghost.toggled ^= 1 << index
            self.out_of_scope("changes the attribute", index)
            setattr(page, field, value)
            if page.cached:
                self._attribute_changed(self.state.frame(page.cached - 1), page)
        setattr(page, field, value)

    # A page that becomes shared is given to the host as it is; one that becomes private is the guest's.
    def _attribute_changed(self, frame: st.Frame, page: st.Page) -> None:
        if page.attr == st.PRIVATE_PAGE:
            self.note_private(frame, "converted")
        else:
            self.declassify(frame.number)

    def xa_store_reserved(self, tree: str, start: int, values: Entries) -> None:
        """A store that changes the attribute tree needs its reservation."""
        if tree == "attributes":
            if not self.state.reserved:
                self.die("store into the attribute tree without preallocated nodes")
            self.state.reserved = 0
        self.xa_store(tree, start, values)

    def xa_reserve(self, tree: str, start: int, nr: int) -> int:
        """The nodes are there until they are used or given back."""
        self.state.reserved = 1
        return 0

    def xa_release(self, tree: str) -> None:
        """Given back unused."""
        self.state.reserved = 0

    # -- files and inodes ----------------------------------------------------------------------------------------

    def alloc_inode(self) -> int:
        """One file, one inode."""
        self.state.files = self.state.inodes = 1
        return 0

    def fd_install(self) -> None:
        """User space sees it."""
        self.state.fd = 1

    def fd_close(self) -> bool:
        """The descriptor goes; its file reference is the caller's to drop."""
        open_before, self.state.fd = bool(self.state.fd), 0
        return open_before

    def get_file(self) -> bool:
        """Not from a file whose last reference has gone."""
        if not self.state.files:
            return False
        self.state.files += 1
        return True

    def fput(self) -> bool:
        """True: the last one."""
        if not self.state.files:
            self.die("fput of a file without references")
        self.state.files -= 1
        return not self.state.files

    def iput(self) -> bool:
        """True: the last one."""
        if not self.state.inodes:
            self.die("iput of an inode without references")
        self.state.inodes -= 1
        return not self.state.inodes

    # -- module and VM -------------------------------------------------------------------------------------------

    def try_module_get(self) -> bool:
        """Not once it is gone."""
        if self.state.unloaded:
            return False
        self.state.module += 1
        return True

    def module_put(self) -> None:
        """A reference too many is a bug."""
        if not self.state.module:
            self.die("module_put without a reference")
        self.state.module -= 1

    def delete_module(self) -> int:
        """Only when nobody holds it; its exit code gives back nothing by itself."""
        if self.state.module:
            return -EBUSY
        self.state.unloaded = 1
        return 0

    def vm_state(self) -> str:
        """running, dying, gone."""
        return st.VM_STATES[self.state.vm]

    def vm_kill(self) -> bool:
        """The vCPUs leave the guest and do not come back."""
        if self.state.vm != st.RUNNING:
            return False
        self.state.vm = st.DYING
        return True

    def vm_destroyed(self) -> None:
        """Stage-2 tables and their TLB entries go with the VM; memory it still owns does not come back by itself.

        Whoever uses a kernel mapping of a guest page holds the VM, so this waits for him.
        """
        if self.state.gpc_readers:
            self.wait()
        self.state.vm = st.GONE
        for frame in self.state.frames():
            frame.gmap = frame.gstale = frame.locked_in = 0
        for page in self.state.pages():
            page.gpoison = 0
        self.state.gpc = self.state.gpc_fresh = 0
        self.module_put()

    # -- power ---------------------------------------------------------------------------------------------------

    def pm_account(self, pages: int) -> int:
        """Counted and refused atomically."""
        if pages > 0 and self.state.preparing:
            return -EAGAIN
        if self.state.away + pages < 0:
            self.die("more pages come back to the host than had left it")
        self.state.away += pages
        return 0

    def pm_prepare(self, what: str) -> int:
        """Veto, or close the door."""
        if self.state.away:
            return -EBUSY
        self.state.preparing = 1
        return 0

    def pm_post(self) -> None:
        """The door opens."""
        self.state.preparing = 0

    def open_files(self) -> int:
        """secretmem_users."""
        return int(self.state.files > 0)

    def freeze_processes(self) -> None:
        """Tasks stop where they can: outside of every memory operation."""
        state = self.state
        busy = (state.invalidate_w or state.invalidate_r or state.invalidate_q or state.bindings_w or state.bindings_r
                or state.bindings_q or any(f.lock or f.lookup or f.spec for f in state.frames()) or state.gpc_readers)
        if busy:
            self.wait()
        state.frozen = 1

    def thaw_processes(self) -> None:
        """They run again."""
        self.state.frozen = 0

    def hwpoison(self, index: int) -> Folio | None:
        """Hardware reports the frame at *index*; memory_failure() holds a reference while it works."""
        page = self.state.page(index)
        if not page.cached:
            return None
        frame = self.state.frame(page.cached - 1)
        if frame.poison:
            return None
        frame.poison = 1
        frame.lookup += 1
        return Folio(frame.number)

    # -- saying so -----------------------------------------------------------------------------------------------

    def warn(self, what: str) -> None:
        """WARN_ON()."""
        self.notes.append(notes.Warned(what))

    def bug(self, what: str) -> None:
        """BUG_ON()."""
        self.die(what)


def _members(mask: int) -> tuple[int, ...]:
    return tuple(i for i in range(st.PAGES) if mask >> i & 1)

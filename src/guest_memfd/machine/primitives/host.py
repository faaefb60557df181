"""The emulated host as procedures see it: a primitive comes in, the machine moves, a result goes out.

Primitives are called from here only. Frozen tasks and the end of the kernel are dealt with here, as on the abstract host.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from guest_memfd.errors import DesignRaised
from guest_memfd.machine.linux.inode import Inode
from guest_memfd.machine.linux.panic import KernelPanic
from guest_memfd.machine.primitives import contents, directmap, files, guest, locks, pagecache, power, user
from guest_memfd.machine.primitives.base import Base
from guest_memfd.machine.primitives.lifetime import must_be_there
from guest_memfd.plugins.guard import Guard, where
from guest_memfd.words.outcome import STAY, Blocked
from guest_memfd.words.primitives import Bound, Caller, Primitive, Steps
from guest_memfd.words.scene import Scene

if TYPE_CHECKING:
    from guest_memfd.machine.board.board import Board, Judge
    from guest_memfd.machine.hypcalls.vm import Vm


MOST, MOST_PER_FOLIO = 100_000, 100
"""Primitives that a procedure of a third party's may ask for: these, and so many more for each folio in the file."""


class EmulatedHost(Base):
    """One guest_memfd file of *size* pages on *machine*, bound to *vm*.

    tasks: numbers of the parties that freezing stops. judge: told of every primitive and the facts it left;
    default: the machine's. scene: whose memslots vCPUs go by; default: whatever is bound. bounds, errnos, resumes: what
    the design says that operations cost at most, and may return, and which can be resumed.
    """

    theirs = ""
    """Whose procedures it runs, in words, if any of their code is a third party's."""

    def __init__(
        self, machine: Board, vm: Vm, size: int, *, tasks: frozenset[int] = frozenset(), judge: Judge | None = None,
        scene: Scene | None = None, bounds: Mapping[str, Bound] | None = None,
        errnos: Mapping[str, tuple[int, ...]] | None = None, resumes: tuple[str, ...] = (),
    ) -> None:
        self.machine, self.vm, self.tasks, self.judge = machine, vm, tasks, judge
        self.scene, self.bounds, self.errnos, self.resumes = scene, bounds or {}, errnos or {}, resumes
        self.inode = Inode(size, machine.module.name)
        self.counts_splits = False                      # whether a primitive's cost has the leaves that it splits
        self.who, self.caller, self.notes = 0, "library", []

    def perform(self, primitive: Primitive, who: int) -> Any:
        """Carry *primitive* out for task *who*; raises Blocked when it has to wait, KernelPanic when Linux stops.

        What the laws should know is in `notes` afterwards.
        """
        self.notes = []
        # A frozen task runs nothing, not even what it had begun.
        if who in self.tasks and self.machine.power.frozen:
            raise Blocked
        self.who, self.caller = who, primitive.caller
        before = self.machine.splits if self.counts_splits else None
        self.machine.account(self.inode, by_guest=True)
        try:
            must_be_there(self, primitive)
            return getattr(self, primitive.name)(*primitive.args)
        except KernelPanic as panic:
            self.machine.panicked(panic)
            raise
        finally:
            if before is not None:
                self.machine.tracer.counts(who, "splits", sum(self.machine.splits.more_than(before)))
            self.machine.account(self.inode, by_guest=False)
            judge = self.judge or self.machine.judge
            if judge is not None:
                judge(primitive, self.notes)

    def perform_by_name(self, name: str, *args: Any, caller: Caller = "user") -> Any:
        """Carry out one primitive that belongs to no procedure, such as a system call's own."""
        return self.perform(Primitive(name, args, caller), 0)

    def run(self, procedure: Steps[Any], who: int = 0) -> Any:
        """Drive *procedure* to its end with no one else around: what it returns.

        Raises Blocked when it would wait without end, KernelPanic when Linux stops, DesignRaised for what a third party does
        wrong.
        """
        result: Any = None
        asked = 0
        while True:
            with Guard(self.theirs or "a procedure of the library", timed=bool(self.theirs)):
                try:
                    primitive = procedure.send(result)
                except StopIteration as stop:
                    return stop.value
            asked += 1
            if self.theirs and asked > MOST + MOST_PER_FOLIO * len(self.inode.pages):
                raise DesignRaised(f"{self.theirs} does not come back: after {asked:,} primitives it is still at "
                                   f"{where(procedure)}")
            result = self.perform(primitive, who)
            if result is STAY:                          # queued for a lock: no one is there who would let go of it
                raise Blocked

    # -- the primitives, each a function of the module that is named ---------------------------------------------------

    # files.py
    begin_op = files.begin_op
    end_op = files.end_op
    ops_released = files.ops_released
    op_returned = files.op_returned
    tree_load = files.tree_load
    tree_store = files.tree_store
    tree_store_reserved = files.tree_store_reserved
    tree_reserve = files.tree_reserve
    tree_release = files.tree_release
    alloc_inode = files.alloc_inode
    fd_install = files.fd_install
    fd_close = files.fd_close
    get_file = files.get_file
    fd_open = files.fd_open
    fdget = files.fdget
    igrab = files.igrab
    fput = files.fput
    iput = files.iput
    destroy_inode = files.destroy_inode
    try_module_get = files.try_module_get
    module_put = files.module_put
    delete_module = files.delete_module
    vm_state = files.vm_state
    vm_kill = files.vm_kill
    vm_destroyed = files.vm_destroyed
    warn = files.warn
    bug = files.bug

    # locks.py
    down_read = locks.down_read
    down_read_trylock = locks.down_read_trylock
    up_read = locks.up_read
    down_write = locks.down_write
    up_write = locks.up_write
    mutex_lock = locks.mutex_lock
    mutex_unlock = locks.mutex_unlock
    srcu_read_lock = locks.srcu_read_lock
    srcu_read_unlock = locks.srcu_read_unlock
    synchronize_srcu = locks.synchronize_srcu
    lock_folio = locks.lock_folio
    unlock_folio = locks.unlock_folio

    # pagecache.py
    filemap_get_folio = pagecache.filemap_get_folio
    filemap_find_folio = pagecache.filemap_find_folio
    filemap_add_folio = pagecache.filemap_add_folio
    filemap_add_pages = pagecache.filemap_add_pages
    filemap_alloc_folio = pagecache.filemap_alloc_folio
    filemap_insert_folio = pagecache.filemap_insert_folio
    filemap_remove_folio = pagecache.filemap_remove_folio
    split_folio = pagecache.split_folio
    merge_folio = pagecache.merge_folio
    page_hwpoison = pagecache.page_hwpoison
    folio_put = pagecache.folio_put
    folio_get = pagecache.folio_get
    leak_folio = pagecache.leak_folio
    mapping_set_no_direct_map = pagecache.mapping_set_no_direct_map
    mapping_no_direct_map = pagecache.mapping_no_direct_map
    folio_ref_count = pagecache.folio_ref_count
    folio_maybe_dma_pinned = pagecache.folio_maybe_dma_pinned
    folio_mapped = pagecache.folio_mapped
    lru_add_drain_all = pagecache.lru_add_drain_all
    folio_mark_uptodate = pagecache.folio_mark_uptodate
    folio_set_no_direct_map = pagecache.folio_set_no_direct_map

    # contents.py; the last is in no procedure, and a reader of all RAM is carried out by it (vmm/readers.py)
    load_unaligned_zeropad = contents.load_unaligned_zeropad
    copy_from_kernel_nofault = contents.copy_from_kernel_nofault
    read_folio = contents.read_folio
    clear_folio = contents.clear_folio
    clear_folio_local = contents.clear_folio_local
    write_folio = contents.write_folio
    image_copy = contents.image_copy
    kernel_access = contents.kernel_access

    # directmap.py
    can_set_direct_map = directmap.can_set_direct_map
    set_direct_map_invalid_noflush = directmap.set_direct_map_invalid_noflush
    set_direct_map_default_noflush = directmap.set_direct_map_default_noflush
    split_direct_map = directmap.split_direct_map
    flush_tlb_kernel_range = directmap.flush_tlb_kernel_range

    # user.py
    mmap = user.mmap
    munmap = user.munmap
    user_access = user.user_access
    vmf_insert_folio = user.vmf_insert_folio
    vma_covers = user.vma_covers
    unmap_mapping_pages = user.unmap_mapping_pages
    gup_read_pte = user.gup_read_pte
    gup_try_get = user.gup_try_get
    gup_recheck = user.gup_recheck
    pin_access = user.pin_access
    unpin = user.unpin

    # guest.py
    hyp_call = guest.hyp_call
    guest_access = guest.guest_access
    guest_consents = guest.guest_consents
    gmem_invalidate_begin = guest.gmem_invalidate_begin
    gmem_invalidate_end = guest.gmem_invalidate_end
    mmu_invalidate_seq = guest.mmu_invalidate_seq
    mmu_invalidate_retry = guest.mmu_invalidate_retry
    gpc_begin = guest.gpc_begin
    gpc_commit = guest.gpc_commit
    gpc_read_lock = guest.gpc_read_lock
    gpc_access = guest.gpc_access
    gpc_access_vmap = guest.gpc_access_vmap
    gpc_read_unlock = guest.gpc_read_unlock
    gpc_drop = guest.gpc_drop

    # power.py
    pm_account = power.pm_account
    pm_prepare = power.pm_prepare
    pm_post = power.pm_post
    open_files = power.open_files
    freeze_processes = power.freeze_processes
    thaw_processes = power.thaw_processes
    hwpoison = power.hwpoison
    memory_failure_done = power.memory_failure_done

"""What a host offers to the library: the primitives, and nothing that only a model could do.

Every method is one atomic step of a real machine (a lock operation, one page-table write, one hypercall, one access),
named after the kernel function it stands for. Procedures call them with ``yield from``; the step is taken by the code that
drives the procedure - the explorer, the emulated machine - when the primitive *yields*, so between two primitives any
other CPU may run.

Some primitives take no step of their own but act together with the one that follows: ``choose`` (a party's free
will), ``fd_open`` (what a task knows of itself) and the tracepoints that only the laws read (``begin_op``, ``end_op``,
``op_returned``). A load, ``tree_load``, may do either: both are explored, so traces are short where the lock is held and
"read, then lock" is seen where it is not.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar, overload

from guest_memfd.compat import override
from guest_memfd.words import former
from guest_memfd.words.units import Gfn, Index, Pfn, span

T = TypeVar("T")

MAX_ERRNO = 4095

Caller = str
"""Whose code runs: ``library`` (built in), ``mm`` (core kernel), ``user``, ``guest``, or the name of a module."""


class Primitive(NamedTuple):
    """One request to the host: what to do, with what, whose code asks, and about which file (and its VM)."""

    name: str
    args: tuple[Any, ...]
    caller: Caller
    file: int = 0

    @override
    def __str__(self) -> str:
        return f"{f'file{self.file}.' if self.file else ''}{self.name}({', '.join(map(_show, self.args))})"


def _show(arg: object) -> str:
    return arg if isinstance(arg, str) else str(arg)


Steps = Generator[Primitive, Any, T]
"""A procedure: yields primitives, is sent their results, returns a `T`."""


class Folio(NamedTuple):
    """``struct folio *``: first page frame number and order; opaque to the library but for its size."""

    pfn: Pfn
    order: int = 0

    @property
    def nr(self) -> int:
        """Size in pages: 1 << order."""
        return 1 << self.order

    @property
    def pfns(self) -> Sequence[Pfn]:
        """Its page frames, in order."""
        return span(self.pfn, self.nr)

    @override
    def __str__(self) -> str:
        return f"pfn{self.pfn}" if not self.order else f"pfn{self.pfn}/o{self.order}"


class Locked(NamedTuple):
    """What the folio lock protects, as read by the one who has just taken it.

    pgoff is the folio's page index in the file, None once it has left the page cache (truncated). hwpoison: that the memory
    of one of its pages is broken.
    """

    pgoff: Index | None
    uptodate: bool
    no_direct_map: bool
    hwpoison: bool


class Lookup(NamedTuple):
    """A page-cache hit: the folio (with a reference) and the page index of its head."""

    folio: Folio
    pgoff: Index


class Cost(NamedTuple):
    """What an operation asks the host for: direct-map entries written, kernel TLB flushes, hypercalls.

    stalls: how often it makes others wait, by taking the invalidate lock exclusively or draining the lru_add batches.
    splits: leaves that it makes smaller ones of, in the direct map and in both tables of stage 2.
    """

    writes: int = 0
    flushes: int = 0
    calls: int = 0
    stalls: int = 0
    splits: int = 0


class Splits(NamedTuple):
    """Leaves of 2 MiB and more that have been made smaller: of the direct map, of the host's stage 2, of the guest's."""

    direct_map: int = 0
    host: int = 0
    guest: int = 0

    @property
    def table_pages(self) -> int:
        """One in the place of each leaf."""
        return sum(self)

    def more_than(self, before: Splits) -> Splits:
        """What has been added since *before*; nothing where it is less, as tables go with their VM."""
        return Splits(*(max(now - then, 0) for now, then in zip(self, before, strict=True)))

    def plus(self, more: Splits) -> Splits:
        """What both have split, added up."""
        return Splits(*(one + other for one, other in zip(self, more, strict=True)))


class Bound(NamedTuple):
    """What an operation may ask for at most: per folio of its range; flushes *once*, and stalls, for all of it.

    splits: the number of tables in which it may split each leaf, larger than a page, that its range has a part of.
    """

    writes: int = 0
    flushes: int = 0
    calls: int = 0
    once: int = 0
    stalls: int = 1
    splits: int = 0


@dataclass(frozen=True, slots=True)
class Entries:
    """nr entries of a tree: first, first + step, ...; costs the same for one page and for a file of 2^28."""

    first: int
    nr: int
    step: int = 0

    def __len__(self) -> int:
        return self.nr

    def __iter__(self) -> Iterator[int]:
        return (self.first + self.step * at for at in range(self.nr))

    def __getitem__(self, at: int) -> int:
        if not -self.nr <= at < self.nr:
            raise IndexError(f"entry {at} of {self.nr}")
        return self.first + self.step * (at % self.nr)

    @override
    def __str__(self) -> str:
        if self.nr > 1 and not self.step:
            return f"{self.first} x {self.nr}"
        shown = [str(self[at]) for at in range(min(self.nr, 2))]
        return ",".join(shown) if self.nr <= 2 else f"{','.join(shown)}..{self[-1]}"


VmFault = Literal["ok", "retry", "SIGBUS"]
"""vm_fault_t, what the handler of a VMM's fault answers: the entry is there; VM_FAULT_RETRY; there is no page."""

MfResult = Literal["delayed", "failed"]
"""enum mf_result, what memory_failure() is told: MF_DELAYED, the next to ask for the page learns of it; or MF_FAILED."""

RefKind = Literal["lookup", "provided"]
"""lookup: transient; provided: v17's, one per page given to the guest."""

Sem = Literal["invalidate", "bindings", "mmu"]
"""The locks there are that can be shared: the inode's invalidate_lock, the one that a driver of Gunyah adds, and KVM's
mmu_lock of a VM. That is a rwlock, which spins where the others sleep; nothing that it keeps out can tell."""

Mutex = Literal["slots"]
"""KVM's slots_lock of a VM: who holds it changes memslots."""

FileTree = Literal["attributes", "bindings"]
"""The library's maple trees and xarrays of a file, page index -> small integer, 0 for none."""

GuestTree = Literal["provided", "memslots", "gmem_files"]
"""Trees of a VM, gfn -> small integer, 0 for none: v17's; and KVM's memslots of a page each, page index + 1, doubled, and
perhaps SLOT_INVALID, with a 1 for each in which slot->gmem.file is set. What is in the last goes with its memslot."""

Tree = Literal[FileTree, GuestTree]
"""All there are."""

OPS = ("fault", "user_fault", "mmap", "allocate", "punch", "to_private", "to_shared", "unbind", "teardown", "create", "bind",
       "error", "hibernate", "lend", "write", "populate", "copy")
"""Operations that begin_op and op_returned name. ``lend`` is a driver's: convert, and let the guest fault the page in.
``write`` is write(2) of the file, ``populate`` the copy of a guest's first contents, ``copy`` userfaultfd's."""

UNREPORTED = frozenset({"mmap", "teardown"})
"""Those of which no caller says what it was told."""


class Host:
    """The primitives, as seen by code that runs as *caller*.

    Arguments: ``index`` is a page index in the guest_memfd file, ``gfn`` a guest frame number, ``pfn`` a host frame.
    Results that are negative are ``-errno`` as in the kernel.
    """

    def __init__(self, caller: Caller) -> None:
        self.caller = caller

    def _do(self, name: str, *args: object) -> Steps[Any]:
        return (yield Primitive(name, args, self.caller))

    if not TYPE_CHECKING:                               # for which there would be every name then

        def __getattr__(self, name: str) -> Any:
            now = former.PRIMITIVES.get(name)
            moved = "" if now is None else f": it is called {now!r} now ({former.GUIDE})"
            raise AttributeError(f"no host has the primitive {name!r}{moved}")

    # -- free will and ghosts ------------------------------------------------------------------------------------

    def choose(self, what: str, *options: T) -> Steps[T]:
        """Return any of *options*; every one is explored. For parties, never for the library."""
        chosen: T = yield Primitive("choose", (what, *options), self.caller)
        return chosen

    def begin_op(self, op: str, start: Index, nr: int, gfn: Gfn | None = None) -> Steps[None]:
        """Tracepoint: this party starts *op* on pages [start, start+nr); a guest's fault says at which *gfn*."""
        return self._do("begin_op", op, start, nr, gfn)

    def end_op(self, ret: int, error_index: Index | None = None) -> Steps[None]:
        """Tracepoint: the operation is about to return *ret* (the failing page index beside it, if it names one)."""
        return self._do("end_op", ret, error_index)

    def op_returned(
        self, op: str, start: Index, nr: int, ret: int, error_index: Index | None = None, gfn: Gfn | None = None,
    ) -> Steps[None]:
        """Tracepoint: *op* on [start, start+nr), a bind at *gfn*, has returned to who asked for it.

        For parties; a driver says ``lend`` itself, under the lock that keeps the page lent.
        """
        return self._do("op_returned", op, start, nr, ret, error_index, gfn)

    def ops_released(self) -> Steps[None]:
        """Tracepoint: the hypervisor's half will not be called again for what the file is to its VM."""
        return self._do("ops_released")

    # -- locks ---------------------------------------------------------------------------------------------------

    def down_read(self, sem: Sem) -> Steps[None]:
        """Take *sem* shared; waits while a writer holds it or is queued (include/linux/rwsem.h)."""
        return self._do("down_read", sem)

    def down_read_trylock(self, sem: Sem) -> Steps[bool]:
        """Take *sem* shared if that needs no waiting."""
        return self._do("down_read_trylock", sem)

    def up_read(self, sem: Sem) -> Steps[None]:
        """Drop a shared hold."""
        return self._do("up_read", sem)

    def down_write(self, sem: Sem) -> Steps[None]:
        """Take *sem* exclusively; waits for readers and writers."""
        return self._do("down_write", sem)

    def up_write(self, sem: Sem) -> Steps[None]:
        """Drop the exclusive hold."""
        return self._do("up_write", sem)

    def mutex_lock(self, mutex: Mutex) -> Steps[None]:
        """Take *mutex*; waits while another task holds it (kernel/locking/mutex.c)."""
        return self._do("mutex_lock", mutex)

    def mutex_unlock(self, mutex: Mutex) -> Steps[None]:
        """Let the next task have *mutex*."""
        return self._do("mutex_unlock", mutex)

    def srcu_read_lock(self) -> Steps[None]:
        """srcu_read_lock(&kvm->srcu): memslots that are found from here on stay until `srcu_read_unlock`."""
        return self._do("srcu_read_lock")

    def srcu_read_unlock(self) -> Steps[None]:
        """srcu_read_unlock(&kvm->srcu): what was found may go."""
        return self._do("srcu_read_unlock")

    def synchronize_srcu(self) -> Steps[None]:
        """Wait until all who read memslots, when this is called, are done (kernel/rcu/srcutree.c)."""
        return self._do("synchronize_srcu")

    def lock_folio(self, folio: Folio) -> Steps[Locked]:
        """folio_lock(): wait for the folio lock; returns what it protects."""
        return self._do("lock_folio", folio)

    def unlock_folio(self, folio: Folio) -> Steps[None]:
        """folio_unlock(): another lock_folio() may get the folio from here on."""
        return self._do("unlock_folio", folio)

    # -- page cache and references -------------------------------------------------------------------------------

    def filemap_get_folio(self, index: Index) -> Steps[Lookup | None]:
        """Look *index* up in the page cache and take a reference; None when there is no folio (mm/filemap.c)."""
        return self._do("filemap_get_folio", index)

    def filemap_find_folio(self, index: Index, nr: int) -> Steps[Index]:
        """Page index of the first folio in [index, index+nr), index+nr when there is none; takes no reference (xas_find)."""
        return self._do("filemap_find_folio", index, nr)

    def filemap_add_folio(self, index: Index, order: int) -> Steps[Lookup | int]:
        """Allocate a folio and insert it: returned locked, referenced, not up to date, in this CPU's lru_add batch.

        -EEXIST when someone was faster, -ENOMEM when there is no memory.
        """
        return self._do("filemap_add_folio", index, order)

    def filemap_add_pages(self, index: Index, order: int) -> Steps[Lookup | int]:
        """Allocate 2^order pages that lie side by side and insert each as a folio of its own, at the index rounded down.

        What is returned is the folio at *index*, as by `filemap_add_folio`; the others are neither locked nor up to date.
        Source: split_page() (mm/page_alloc.c) of what was allocated as one.
        """
        return self._do("filemap_add_pages", index, order)

    def filemap_alloc_folio(self, unmapped: bool) -> Steps[Folio | int]:
        """Allocate a page that nobody else can find: locked, referenced, not up to date; or -ENOMEM (mm/filemap.c).

        *unmapped*: from memory that is in no direct map and in no kernel TLB. The allocator puts it back when it is freed:
        Brendan Jackman, "mm: page_alloc: ALLOC_UNMAPPED" v2 (20 Mar 2026).
        """
        return self._do("filemap_alloc_folio", unmapped)

    def filemap_insert_folio(self, index: Index, folio: Folio) -> Steps[int]:
        """Insert the locked page at *index*; page cache and lru_add batch refer to it: 0, -EEXIST or -ENOMEM.

        `filemap_alloc_folio` and this, one after the other, are `filemap_add_folio`, which is one step here.
        """
        return self._do("filemap_insert_folio", index, folio)

    def filemap_remove_folio(self, folio: Folio) -> Steps[None]:
        """Take the locked *folio* out of the page cache and drop the cache's reference."""
        return self._do("filemap_remove_folio", folio)

    def split_folio(self, folio: Folio) -> Steps[int]:
        """Make single pages of the locked *folio*, which no page table maps: the first stays locked and referenced.

        0, or -EBUSY while anybody but the page cache and the caller refers to it; -ENOMEM (mm/huge_memory.c).
        """
        return self._do("split_folio", folio)

    def merge_folio(self, index: Index, order: int) -> Steps[bool]:
        """Make one folio of the single pages at [index, index + 2^order), which nobody refers to but the page cache.

        False, and nothing is changed, where one is missing, locked, referred to or broken, where they do not lie side by
        side in memory, aligned, or where their flags differ (collapse_file(), mm/khugepaged.c, without the copy).
        """
        return self._do("merge_folio", index, order)

    def folio_put(self, folio: Folio, kind: RefKind = "lookup") -> Steps[None]:
        """Drop a reference; the last one frees the folio, and the allocator may write to it (init_on_free).

        The kernel has one count; *kind* says which reference it is, for the laws and for people who read traces.
        """
        return self._do("folio_put", folio, kind)

    def folio_get(self, folio: Folio, kind: RefKind) -> Steps[None]:
        """Take a lasting reference on a folio one already holds."""
        return self._do("folio_get", folio, kind)

    def leak_folio(self, folio: Folio) -> Steps[None]:
        """Take a folio out of use permanently, and count it (snp_leak_pages()): it will never come back to the host."""
        return self._do("leak_folio", folio)

    def mapping_set_no_direct_map(self) -> Steps[None]:
        """Set AS_NO_DIRECT_MAP: readers of page-cache folios are to keep out of this mapping."""
        return self._do("mapping_set_no_direct_map")

    def folio_ref_count(self, folio: Folio) -> Steps[int]:
        """folio_ref_count(): all references, no matter who holds them."""
        return self._do("folio_ref_count", folio)

    def page_hwpoison(self, folio: Folio) -> Steps[tuple[bool, ...]]:
        """PageHWPoison() of each page of the locked *folio*."""
        return self._do("page_hwpoison", folio)

    def folio_maybe_dma_pinned(self, folio: Folio) -> Steps[bool]:
        """folio_maybe_dma_pinned(): sees FOLL_PIN references only."""
        return self._do("folio_maybe_dma_pinned", folio)

    def folio_mapped(self, folio: Folio) -> Steps[bool]:
        """folio_mapped(): whether a user page table maps it."""
        return self._do("folio_mapped", folio)

    def lru_add_drain_all(self) -> Steps[None]:
        """Empty the per-CPU lru_add batches of all CPUs, and drop the reference each holds (mm/swap.c)."""
        return self._do("lru_add_drain_all")

    def folio_mark_uptodate(self, folio: Folio) -> Steps[None]:
        """folio_mark_uptodate(), under the folio lock."""
        return self._do("folio_mark_uptodate", folio)

    def folio_set_no_direct_map(self, folio: Folio, marked: bool) -> Steps[None]:
        """Set or clear the library's mark on the locked folio: it may be out of the direct map (folio->private bit 0)."""
        return self._do("folio_set_no_direct_map", folio, marked)

    # -- contents ------------------------------------------------------------------------------------------------

    def clear_folio(self, folio: Folio) -> Steps[None]:
        """folio_zero_range() through the direct map: a plain kernel write, with no exception-table entry."""
        return self._do("clear_folio", folio)

    def clear_folio_local(self, folio: Folio) -> Steps[None]:
        """Zero through a mapping that this CPU alone has for the moment, as text_poke() writes; no direct map needed."""
        return self._do("clear_folio_local", folio)

    def write_folio(self, folio: Folio, local: bool) -> Steps[None]:
        """Copy what user space has given into the folio: through the direct map, plainly, as kmap_local_folio() has it.

        *local*: through a mapping that this CPU alone has for the moment, and flushes for itself (mermap).
        """
        return self._do("write_folio", folio, local)

    def load_unaligned_zeropad(self, pfn: Pfn) -> Steps[str]:
        """A word load that starts in the page before *pfn* and runs into it; has an exception-table entry."""
        return self._do("load_unaligned_zeropad", pfn)

    def copy_from_kernel_nofault(self, pfn: Pfn) -> Steps[str]:
        """/proc/kcore reads frame *pfn* through the direct map; has an exception-table entry."""
        return self._do("copy_from_kernel_nofault", pfn)

    # -- the direct map ------------------------------------------------------------------------------------------

    def can_set_direct_map(self) -> Steps[bool]:
        """Whether single pages of the direct map can be changed; where not, the setters do nothing and return 0."""
        return self._do("can_set_direct_map")

    def set_direct_map_invalid_noflush(self, folio: Folio) -> Steps[int]:
        """Make the kernel's mapping of *folio* not present; 0 or -ENOMEM (a large leaf must be split). No flush."""
        return self._do("set_direct_map_invalid_noflush", folio)

    def split_direct_map(self, folio: Folio) -> Steps[int]:
        """Have each page of *folio* be an entry of its own, present or not as it was; 0 or -ENOMEM.

        Source: split_kernel_leaf_mapping() (arch/arm64/mm/mmu.c), set_memory_4k() (arch/x86/mm/pat/set_memory.c).
        """
        return self._do("split_direct_map", folio)

    def set_direct_map_default_noflush(self, folio: Folio) -> Steps[int]:
        """Make the kernel's mapping of *folio* present again; 0 or -ENOMEM. Invalid to valid needs no flush."""
        return self._do("set_direct_map_default_noflush", folio)

    def flush_tlb_kernel_range(self, folios: tuple[Folio, ...]) -> Steps[None]:
        """Drop every CPU's kernel TLB entries of *folios*."""
        return self._do("flush_tlb_kernel_range", folios)

    # -- user mappings -------------------------------------------------------------------------------------------

    def mmap(self) -> Steps[int]:
        """Create a VMA over the whole file; it holds a reference on the inode. 0, -EBADF (closed) or -ENOMEM."""
        return self._do("mmap")

    def munmap(self) -> Steps[bool]:
        """Remove the VMA and its page-table entries; True when that was the inode's last reference."""
        return self._do("munmap")

    def user_access(self, index: Index, write: bool) -> Steps[str]:
        """The VMM touches its mapping: ``ok``, ``fault`` (no entry: call the fault handler), or a signal's name."""
        return self._do("user_access", index, write)

    def vmf_insert_folio(self, index: Index, folio: Folio) -> Steps[bool]:
        """Install the user page-table entry; False when the VMA has gone meanwhile (include/linux/mm.h)."""
        return self._do("vmf_insert_folio", index, folio)

    def vma_covers(self, start: Index, nr: int) -> Steps[bool]:
        """Whether any VMA of any process covers part of [start, start+nr) (v17's folio_mmapped)."""
        return self._do("vma_covers", start, nr)

    def unmap_mapping_pages(self, start: Index, nr: int) -> Steps[None]:
        """Remove all user page-table entries of [start, start+nr), TLBs included (mm/memory.c).

        Never for no pages: the kernel takes a length of 0 for everything up to the end, so hosts stop there.
        """
        return self._do("unmap_mapping_pages", start, nr)

    # -- guest side ----------------------------------------------------------------------------------------------

    def hyp_call(self, name: str, *args: object) -> Steps[int]:
        """Ask the hypervisor (EL2, or KVM's MMU code) for *name*; 0 or -errno as its client maps it."""
        return self._do("hyp_call", name, *args)

    def guest_access(self, gfn: Gfn, write: bool) -> Steps[str]:
        """The vCPU touches *gfn*: ``ok``, ``fault`` (stage-2 fault exit), ``poisoned``, ``stopped``."""
        return self._do("guest_access", gfn, write)

    def guest_consents(self, gfn: Gfn) -> Steps[str]:
        """The guest gives *gfn* up to the host: relinquish under Gunyah, MEM_SHARE under pKVM; ``ok`` or ``fault``."""
        return self._do("guest_consents", gfn)

    def gmem_invalidate_begin(self, start: Index, nr: int) -> Steps[None]:
        """kvm_gmem_invalidate_begin(): of what is bound there kernel mappings (gfn_to_pfn_cache) end; waits for a user."""
        return self._do("gmem_invalidate_begin", start, nr)

    def gmem_invalidate_end(self) -> Steps[None]:
        """kvm_gmem_invalidate_end(): bump the sequence, in_progress--."""
        return self._do("gmem_invalidate_end")

    def mmu_invalidate_seq(self) -> Steps[int]:
        """Sample mmu_invalidate_seq, inside of an SRCU read section, for `mmu_invalidate_retry`."""
        return self._do("mmu_invalidate_seq")

    def mmu_invalidate_retry(self, seq: int, gfn: Gfn) -> Steps[bool]:
        """mmu_invalidate_retry_gfn(): whether *gfn* is being invalidated, or anything has been since *seq* was sampled.

        Its answer is good for as long as mmu_lock is held (include/linux/kvm_host.h).
        """
        return self._do("mmu_invalidate_retry", seq, gfn)

    # -- the library's own memory --------------------------------------------------------------------------------

    @overload
    def tree_load(self, tree: FileTree, start: Index, nr: int) -> Steps[Sequence[int]]: ...
    @overload
    def tree_load(self, tree: GuestTree, start: Gfn, nr: int) -> Steps[Sequence[int]]: ...
    def tree_load(self, tree: Tree, start: int, nr: int) -> Steps[Sequence[int]]:
        """Read the entries of [start, start+nr): count(), an index and a slice are cheap, going through all may not be."""
        return self._do("tree_load", tree, start, nr)

    @overload
    def tree_store(self, tree: FileTree, start: Index, values: Entries) -> Steps[int]: ...
    @overload
    def tree_store(self, tree: GuestTree, start: Gfn, values: Entries) -> Steps[int]: ...
    def tree_store(self, tree: Tree, start: int, values: Entries) -> Steps[int]:
        """Write entries from *start* on; 0, or -ENOMEM with nothing written."""
        return self._do("tree_store", tree, start, values)

    @overload
    def tree_store_reserved(self, tree: FileTree, start: Index, values: Entries) -> Steps[None]: ...
    @overload
    def tree_store_reserved(self, tree: GuestTree, start: Gfn, values: Entries) -> Steps[None]: ...
    def tree_store_reserved(self, tree: Tree, start: int, values: Entries) -> Steps[None]:
        """Write entries for which `tree_reserve` has the memory (or erase: writing 0 needs none)."""
        return self._do("tree_store_reserved", tree, start, values)

    def tree_reserve(self, tree: FileTree, start: Index, nr: int) -> Steps[int]:
        """Preallocate the nodes for a store of nr entries; 0 or -ENOMEM."""
        return self._do("tree_reserve", tree, start, nr)

    def tree_release(self, tree: Tree) -> Steps[None]:
        """Give preallocated nodes back unused."""
        return self._do("tree_release", tree)

    # -- files, modules, VMs, power ------------------------------------------------------------------------------

    def try_module_get(self) -> Steps[bool]:
        """Hold the hypervisor's module; False once it is being unloaded (kernel/module/main.c)."""
        return self._do("try_module_get")

    def module_put(self) -> Steps[None]:
        """Drop a hold on the hypervisor's module."""
        return self._do("module_put")

    def alloc_inode(self) -> Steps[int]:
        """Allocate the guest_memfd inode and its file; 0 or -ENOMEM."""
        return self._do("alloc_inode")

    def fd_install(self) -> Steps[None]:
        """Put the file into the VMM's descriptor table: from here on user space sees it."""
        return self._do("fd_install")

    def fd_close(self) -> Steps[bool]:
        """close(2), or exit(2): take the file out of the descriptor table; False when it was not there."""
        return self._do("fd_close")

    def get_file(self) -> Steps[bool]:
        """get_file_active(): hold the file unless its last reference has gone."""
        return self._do("get_file")

    def fput(self) -> Steps[bool]:
        """Drop a file reference; True when it was the last: the caller runs the file's release."""
        return self._do("fput")

    def fd_open(self) -> Steps[bool]:
        """Whether the VMM's descriptor is open: its only thread that opens and closes knows."""
        return self._do("fd_open")

    def fdget(self) -> Steps[bool]:
        """fdget(): hold the file of the VMM's descriptor for a system call; False when it is closed."""
        return self._do("fdget")

    def igrab(self) -> Steps[bool]:
        """Hold the inode unless it is being evicted (fs/inode.c); the caller must know that its memory is there."""
        return self._do("igrab")

    def destroy_inode(self) -> Steps[None]:
        """The evicted inode's memory goes (fs/inode.c)."""
        return self._do("destroy_inode")

    def iput(self) -> Steps[bool]:
        """Drop an inode reference; True when it was the last: the caller evicts the inode."""
        return self._do("iput")

    def vm_state(self) -> Steps[str]:
        """``running``, ``dying`` (stopped, its memory not yet taken back) or ``gone``."""
        return self._do("vm_state")

    def pm_account(self, pages: int) -> Steps[int]:
        """Count pages that left (+) or came back to (-) the host; +: -EAGAIN once hibernation has begun to prepare."""
        return self._do("pm_account", pages)

    def pm_prepare(self, what: str) -> Steps[int]:
        """PM_HIBERNATION_PREPARE seen by the library: -EBUSY while pages are counted, else later counts wait."""
        return self._do("pm_prepare", what)

    def pm_post(self) -> Steps[None]:
        """PM_POST_HIBERNATION: pages may leave the host again."""
        return self._do("pm_post")

    def open_files(self) -> Steps[int]:
        """How many inaccessible-memory files are open (secretmem_users)."""
        return self._do("open_files")

    def warn(self, what: str) -> Steps[None]:
        """WARN_ON(): say that something has gone wrong which cannot be undone here."""
        return self._do("warn", what)

    def bug(self, what: str) -> Steps[None]:
        """BUG_ON(), or the dereference of an error pointer: the kernel stops."""
        return self._do("bug", what)

    # -- what the other parties do ---------------------------------------------------------------------------------

    def gup_read_pte(self, index: Index) -> Steps[Folio | None]:
        """GUP-fast, first half: read the user's entry; nothing is held yet (mm/gup.c)."""
        return self._do("gup_read_pte", index)

    def gup_try_get(self, folio: Folio) -> Steps[bool]:
        """try_get_folio(): take a reference without having looked again (speculative)."""
        return self._do("gup_try_get", folio)

    def gup_recheck(self, index: Index, folio: Folio, foll_pin: bool) -> Steps[bool]:
        """GUP-fast, second half: keep the reference if the entry is still there, else drop it."""
        return self._do("gup_recheck", index, folio, foll_pin)

    def pin_access(self, folio: Folio, write: bool, dma: bool) -> Steps[str]:
        """Use a held reference: by DMA (no page table of ours in the way) or by the CPU through the direct map."""
        return self._do("pin_access", folio, write, dma)

    def unpin(self, folio: Folio, foll_pin: bool) -> Steps[None]:
        """unpin_user_page() or folio_put() of a GUP reference."""
        return self._do("unpin", folio, foll_pin)

    def gpc_begin(self, index: Index) -> Steps[bool]:
        """gfn_to_pfn_cache refresh: find the memslot of page *index* and sample the mmu sequence; False without one.

        A cache that is filled where nothing is bound is told of no invalidation (__kvm_gpc_refresh(), virt/kvm/pfncache.c).
        """
        return self._do("gpc_begin", index)

    def gpc_commit(self, folio: Folio) -> Steps[bool]:
        """Make the cache valid for *folio* unless an invalidation was or is in progress; keeps no reference."""
        return self._do("gpc_commit", folio)

    def gpc_read_lock(self) -> Steps[bool]:
        """read_lock(&gpc->lock) and gpc_check(): False (and unlocked) when the cache is not valid."""
        return self._do("gpc_read_lock")

    def gpc_access(self, write: bool) -> Steps[str]:
        """The kernel uses its mapping of the guest page, plainly."""
        return self._do("gpc_access", write)

    def gpc_access_vmap(self, write: bool) -> Steps[str]:
        """The same where the cache has made a mapping of its own, vmap(): the direct map has no say.

        Source: Takahiro Itazuri, "KVM: pfncache: guest_memfd without a direct map" RFC v2 (26 Feb 2026).
        """
        return self._do("gpc_access_vmap", write)

    def gpc_read_unlock(self) -> Steps[None]:
        """read_unlock(&gpc->lock): an invalidation that waits for this user may go on."""
        return self._do("gpc_read_unlock")

    def gpc_drop(self) -> Steps[None]:
        """kvm_gpc_deactivate(): give the cache up; later invalidations do not concern it."""
        return self._do("gpc_drop")

    def hwpoison(self, index: Index) -> Steps[Folio | None]:
        """An uncorrectable error is reported for the page at *index*: marks it; None when there is none."""
        return self._do("hwpoison", index)

    def memory_failure_done(self, folio: Folio, result: MfResult) -> Steps[None]:
        """memory_failure() has done with *folio*; *result* is what the file's owner has said: ``delayed`` or ``failed``."""
        return self._do("memory_failure_done", folio, result)

    def mapping_no_direct_map(self) -> Steps[bool]:
        """What lib/buildid.c and uprobes ask before they read a page-cache folio; False on a kernel that does not ask."""
        return self._do("mapping_no_direct_map")

    def read_folio(self, folio: Folio) -> Steps[str]:
        """Read a referenced folio through the direct map, plainly (memcpy_from_folio())."""
        return self._do("read_folio", folio)

    def freeze_processes(self) -> Steps[None]:
        """Wait until no task is inside a memory operation, and stop them all there (kernel/power/process.c)."""
        return self._do("freeze_processes")

    def thaw_processes(self) -> Steps[None]:
        """Let the tasks run again."""
        return self._do("thaw_processes")

    def image_copy(self, pfn: Pfn) -> Steps[str]:
        """safe_copy_page(): copy one allocated frame into the hibernation image, mapping it for that if need be."""
        return self._do("image_copy", pfn)

    def delete_module(self) -> Steps[int]:
        """Unload the hypervisor's module; -EBUSY while someone holds it."""
        return self._do("delete_module")

    def vm_kill(self) -> Steps[bool]:
        """Stop the VM for good, vCPUs out of the guest; False when it has been stopped before."""
        return self._do("vm_kill")

    def vm_destroyed(self) -> Steps[None]:
        """The VM object goes, its hold on the module with it."""
        return self._do("vm_destroyed")


LOADS = frozenset({"tree_load"})
"""Primitives that act together with the one that follows, or take a step of their own."""

SILENT = frozenset({"choose", "begin_op", "end_op", "op_returned", "ops_released", "fd_open"}) | LOADS
"""Primitives that need not take a step of their own."""

PRIMITIVES = frozenset(
    name for name in vars(Host) if not name.startswith("_")
)
"""The names a procedure may yield."""

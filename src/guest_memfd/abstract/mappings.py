"""Who maps a frame on the abstract host: the direct map and its stale copies, user page tables, pins."""

from __future__ import annotations

from errno import EBADF

from guest_memfd.abstract import state as st
from guest_memfd.abstract.access import AbstractAccess
from guest_memfd.abstract.operations import AbstractOperations
from guest_memfd.core.hypervisor import DATA_ABORT
from guest_memfd.words import facts
from guest_memfd.words.pagestate import CONTENTION
from guest_memfd.words.primitives import OPS, Folio
from guest_memfd.words.units import FIRST_PAGE, Index, Pfn, span


class AbstractMappings(AbstractAccess, AbstractOperations):
    """The direct map, mmap and what user space does with it, GUP."""

    # -- direct map ----------------------------------------------------------------------------------------------

    def can_set_direct_map(self) -> bool:
        """Whether this kernel can change single pages of it."""
        return self.kernel.changes_direct_map

    def set_direct_map_invalid_noflush(self, folio: Folio) -> int:
        """The entries go, TLBs keep them. Where they cannot be changed nothing is done, and that is no error."""
        return self._set_direct_map(folio, 0)

    def set_direct_map_default_noflush(self, folio: Folio) -> int:
        """Invalid to valid: nothing stale can be left."""
        return self._set_direct_map(folio, 1)

    def _set_direct_map(self, folio: Folio, valid: int) -> int:
        self.count("writes")
        if self.kernel.changes_direct_map:
            self.cut_leaf("s1_leaf", folio)
        for frame in self.frames_of(folio):
            self.notes.append(facts.DirectMapChange(self.caller, frame.number, not valid, bool(frame.handled)))
            if self.kernel.changes_direct_map and frame.s1 != valid:
                frame.s1, frame.stale = valid, 1 - valid
        if valid and self.kernel.merges_leaves:
            self._merge_leaves(folio.pfn)
        return 0

    # Small leaves become a large one again where all of it is mapped (cpa_collapse_large_pages()).
    def _merge_leaves(self, pfn: Pfn) -> None:
        for order in range(1, self.sizes.order + 1):
            first = Pfn(pfn >> order << order)
            if all(self.state.frame(part).s1 for part in span(first, 1 << order)):
                self.set_leaf("s1_leaf", first, order)

    def split_direct_map(self, folio: Folio) -> int:
        """Of each page a leaf of its own, present or not as before."""
        self.split_leaves("s1_leaf", folio)
        return 0

    def may_fail(self, folio: Folio, order: int) -> bool:
        """Whether a leaf of the direct map has to be split for *folio* to be in leaves of *order*, which takes memory."""
        return not self.sizes.order or self.leaf("s1_leaf", folio.pfn) > order

    def flush_tlb_kernel_range(self, folios: tuple[Folio, ...]) -> None:
        """Drop the stale kernel TLB entries of *folios*, on all CPUs; the law on cost counts it as one flush."""
        self.count("flushes")
        for folio in folios:
            for frame in self.frames_of(folio):
                frame.stale = 0

    # -- user mappings -------------------------------------------------------------------------------------------

    def mmap(self) -> int:
        """Over the whole file, through the VMM's descriptor."""
        if not self.file.fd:
            return -EBADF
        self.file.vma += 1
        self.file.inodes += 1
        return 0

    def munmap(self) -> bool:
        """The VMA's inode reference goes with it; entries are shared by all VMAs and go with the last."""
        self.file.vma -= 1
        if not self.file.vma:
            self.unmap_mapping_pages(FIRST_PAGE, self.sizes.pages)
        return self.drop_inode()

    # The VMM's page table: what it maps at page *index* of the file, if anything.
    def _pte(self, index: Index) -> st.Frame | None:
        number = self.page(index).number
        return next((f for f in self.state.frames() if f.user == number + 1), None)

    def user_access(self, index: Index, write: bool) -> str:
        """Through the VMM's page table; at EL0 an abort of stage 2 is a signal (arch/arm64/mm/fault.c)."""
        if not self.file.vma:
            return "SIGSEGV"
        self.faulted_in(index)
        frame = self._pte(index)
        if frame is None:
            return "fault"
        if self.withheld(frame, write, alone=True) and not self.exported(frame, "user access"):
            return "SIGSEGV" if self.hypervisor.abort == DATA_ABORT else "SIGBUS"
        self.note_access(frame, "VMM", "user access", "user mapping", write)
        self.spoilt(frame, write)
        if write:
            self.written(frame)
        return "ok"

    def vmf_insert_folio(self, index: Index, folio: Folio) -> bool:
        """Under the page-table lock: only while the VMA is there; an entry that is there stays."""
        if not self.file.vma:
            return False
        if self._pte(index) is None:
            frame = self._page_of(folio, index)
            if frame.handled:
                self.notes.append(facts.Given("the VMM", frame.number))
            frame.user = self.page(index).number + 1
        return True

    # The frame of *folio* that is page *index*, by where the folio begins in the file.
    def _page_of(self, folio: Folio, index: Index) -> st.Frame:
        head = self.head_of(folio)
        begins = self.ours(head)
        at = 0 if begins is None else index - begins
        return self.state.frame(Pfn(head.number + at)) if 0 <= at < folio.nr else head

    def vma_covers(self, start: Index, nr: int) -> bool:
        """A VMA covers every page."""
        return bool(self.file.vma) and start < self.sizes.pages and nr > 0

    def unmap_mapping_pages(self, start: Index, nr: int) -> None:
        """Entries and user TLBs together."""
        if nr <= 0:
            self.die("unmap_mapping_pages of no pages, which means all up to the end of the file")
        first = self.file.number * self.sizes.pages
        for frame in self.state.frames():
            if frame.user and start < frame.user - first <= min(start + nr, self.sizes.pages):
                self.out_of_scope("takes the page from the VMM", self.index(frame.user - 1))
                frame.user = 0
                self._overtaken(self.state.head(frame).lock)

    # A fault of the VMM that has made the entry, and has not returned yet, was right about it, and who goes on faults again.
    def _overtaken(self, lock: int) -> None:
        if lock and lock != self.who + 1 and (ghost := self.state.ghost(lock - 1)).op == OPS.index("user_fault") + 1:
            ghost.reasons |= CONTENTION

    # -- GUP -----------------------------------------------------------------------------------------------------

    def gup_read_pte(self, index: Index) -> Folio | None:
        """GUP-fast, first half: the page that the VMM's page table maps at *index*, or None; no reference is taken."""
        self.faulted_in(index)
        frame = self._pte(index)
        return Folio(frame.number) if frame else None

    def gup_try_get(self, folio: Folio) -> bool:
        """Fails only when the count is zero: the frame may be another folio by now."""
        head = self.head_of(folio)
        if not head.refs():
            return False
        head.spec += 1
        return True

    def gup_recheck(self, index: Index, folio: Folio, foll_pin: bool) -> bool:
        """Keep or drop the speculative reference."""
        frame, head = self.state.frame(folio.pfn), self.head_of(folio)
        head.spec -= 1
        if frame.user != self.page(index).number + 1:
            self.free_if_unused(head)
            return False
        if foll_pin:
            head.pin += 1
        else:
            head.get += 1
        return True

    def pin_access(self, folio: Folio, write: bool, dma: bool) -> str:
        """A device reaches the frame whatever the tables say (no IOMMU in between); the kernel uses the direct map."""
        frame = self.state.frame(folio.pfn)
        if dma:
            self.note_access(frame, "device", "DMA", "DMA", write)
        elif self.kernel_access(frame, "kernel", "copy through a GUP reference", write=write, fixup=False) != "ok":
            return "fault"
        if write:
            self.written(frame)
        return "ok"

    def unpin(self, folio: Folio, foll_pin: bool) -> None:
        """The reference goes; perhaps the last."""
        head = self.head_of(folio)
        if foll_pin:
            head.pin -= 1
        else:
            head.get -= 1
        self.free_if_unused(head)

"""Who can reach a frame on the abstract host: the direct map and its stale copies, user mappings, pins - and aborts.

An access of the kernel passes two gates, stage 1 and stage 2, as arch/arm64/mm/fault.c has it: a stage-1
translation fault goes through the exception table; a stage-2 abort is injected by the hypervisor as the kind it
chooses, and only some kinds consult the table.
"""

from __future__ import annotations

from errno import EBADF

from guest_memfd.abstract import state as st
from guest_memfd.abstract.folios import AbstractFolios
from guest_memfd.core.hypervisor import DATA_ABORT, SEA
from guest_memfd.errors import shown
from guest_memfd.words import facts
from guest_memfd.words.pagestate import (
    ALLOCATED,
    ANY,
    CONTENTS,
    DATA,
    EVICTED,
    FREE,
    GUEST,
    JUNK,
    KEPT,
    OWNERS,
    UNMAPPED,
    ZERO,
)
from guest_memfd.words.primitives import Folio
from guest_memfd.words.units import FIRST_PAGE, Index, Pfn, span


class AbstractMappings(AbstractFolios):
    """clear_folio ... unpin, and `kernel_access`, the one way the kernel touches memory."""

    # -- accesses ------------------------------------------------------------------------------------------------

    def note_access(self, frame: st.Frame, who: str, what: str, via: str, write: bool) -> None:
        """Record that *who* reached the contents."""
        # What the reader should find is known only of a page that a file holds.
        number = frame.slot - 1 if frame.slot else None
        expect = self.state.page(number).expect if number is not None else ANY
        self.notes.append(facts.Access(
            who, what, via, frame.number, write, self._seen_by(who, frame), self.guests(frame),
            bool(frame.gmap) or frame.owner == GUEST, None if number is None else self.index(number),
            None if expect == ANY else CONTENTS[expect], frame.allocated == FREE, bool(frame.handled)))

    # Memory that is encrypted for its guest is something else for everybody else.
    def _seen_by(self, who: str, frame: st.Frame) -> str:
        if self.hypervisor.encrypts and who != "guest" and frame.owner == GUEST:
            return "ciphertext"
        return CONTENTS[frame.content]

    def kernel_access(self, frame: st.Frame, who: str, what: str, *, write: bool, fixup: bool) -> str:
        """One access through the direct map: ``ok``, ``fixed`` (the exception table), or the end of the kernel."""
        # A stale TLB entry lets an access through that the table no longer allows: a hit comes before a walk.
        if not frame.s1 and not frame.stale:
            self.notes.append(facts.Abort(
                what, 1, frame.number, "translation fault", fixup,
                "a stage-1 fault goes through the exception table" if fixup else "no exception-table entry: oops"))
            return "fixed" if fixup else self.panic()
        # Stage 2 is asked after stage 1, so a hole in stage 1 keeps stage 2's abort from happening at all: this is
        # what a hole is for.
        if self._withheld(frame, write):
            return self._stage2_abort(frame, who, what, write=write, fixup=fixup)
        self.note_access(frame, who, what, "direct map" if frame.s1 else "stale TLB entry", write)
        return "ok"

    # By the hypervisor. Where only writes are checked, that is done at the size of the entry that they go through.
    def _withheld(self, frame: st.Frame, write: bool, *, alone: bool = False) -> bool:
        if self.hypervisor.guards == "accesses":
            return not frame.s2
        order = 0 if alone else self.leaf("s1_leaf", frame.number)
        first = Pfn(frame.number >> order << order)
        return write and any(not part.s2 for part in self.frames_of(Folio(first, order)))

    def _stage2_abort(self, frame: st.Frame, who: str, what: str, *, write: bool, fixup: bool) -> str:
        kind = self.hypervisor.abort or DATA_ABORT
        if kind == SEA:
            # Two conditions: the access has an entry in the exception table, and this kernel's do_sea() looks there.
            survived = fixup and self.sea_fixup
            why = ("do_sea() consults the exception table in this design" if survived else
                   "do_sea() does not look at exception tables" if not self.sea_fixup else
                   "this access has no exception-table entry")
            self.notes.append(facts.Abort(what, 2, frame.number, SEA, survived, why))
            return "fixed" if survived else self.panic()
        # The exception table comes before force reclaim (is_spurious_el1_translation_fault() is called only without a
        # fixup), so the guest keeps its page.
        if fixup:
            fault = "translation fault" if kind == DATA_ABORT else kind
            self.notes.append(facts.Abort(what, 2, frame.number, kind, True, f"a {fault} goes through the exception table"))
            return "fixed"
        # The kernel must read or die, so under pKVM the guest loses the page. The access is then repeated, and reads
        # zeros.
        reclaimed = self.hypervisor.force_reclaim(self, frame.number)
        if type(reclaimed) is not bool:
            raise TypeError(f"force_reclaim of {self.hypervisor.name!r} returned {shown(reclaimed)}, not True or False")
        if not reclaimed:
            self.notes.append(facts.Abort(what, 2, frame.number, kind, False, "no exception-table entry: oops"))
            self.panic()
        self.notes.append(facts.Abort(what, 2, frame.number, kind, True, "the page is reclaimed by force"))
        self.note_access(frame, who, what, "direct map", write)
        return "ok"

    def load_unaligned_zeropad(self, pfn: Pfn) -> str:
        """A word load that runs into *pfn*: it has an exception-table entry."""
        return self.kernel_access(self.state.frame(pfn), "kernel", "load_unaligned_zeropad", write=False, fixup=True)

    def copy_from_kernel_nofault(self, pfn: Pfn) -> str:
        """/proc/kcore: it has an exception-table entry; poisoned pages are skipped."""
        frame = self.state.frame(pfn)
        if frame.poison:
            return "skipped"
        return self.kernel_access(frame, "kernel", "copy_from_kernel_nofault", write=False, fixup=True)

    def read_folio(self, folio: Folio) -> str:
        """A plain read through the direct map, of a folio that the reader found in the page cache."""
        for frame in self.frames_of(folio):
            self.kernel_access(frame, "kernel", "read_folio", write=False, fixup=False)
        return "ok"

    def clear_folio(self, folio: Folio) -> None:
        """A plain write through the direct map."""
        for frame in self.frames_of(folio):
            self.kernel_access(frame, "library", "clear_folio", write=True, fixup=False)
            frame.content = ZERO

    def clear_folio_local(self, folio: Folio) -> None:
        """A write through a private mapping of this CPU: stage 2 still has a say."""
        for frame in self.frames_of(folio):
            self._write_local(frame, "clear_folio_local")
            frame.content = ZERO

    def _write_local(self, frame: st.Frame, what: str) -> None:
        if self._withheld(frame, True, alone=True):
            self._stage2_abort(frame, "library", what, write=True, fixup=False)
        self.note_access(frame, "library", what, "local mapping", True)

    def write_folio(self, folio: Folio, local: bool) -> None:
        """What user space gives is known to it, and is there from now on."""
        for frame in self.frames_of(folio):
            if local:
                self._write_local(frame, "write_folio")
            else:
                self.kernel_access(frame, "library", "write_folio", write=True, fixup=False)
            self._written(frame)

    def image_copy(self, pfn: Pfn) -> str:
        """safe_copy_page() (kernel/power/snapshot.c): map a hole for the moment, copy plainly, make it again and flush."""
        frame = self.state.frame(pfn)
        if not frame.allocated or frame.poison:
            return "skipped"
        # As safe_copy_page(): the mapping of one page is made for the copy. It is what lets guest memory get into an
        # image.
        hole = not frame.s1
        if hole:
            self.cut_leaf("s1_leaf", Folio(pfn))
            frame.s1 = 1
        self.kernel_access(frame, "image", "safe_copy_page", write=False, fixup=False)
        if hole:
            frame.s1 = frame.stale = 0
        return "copied"

    def _expect(self, frame: st.Frame, content: int) -> None:
        if frame.slot:
            self.state.page(frame.slot - 1).expect = content

    def _written(self, frame: st.Frame) -> None:
        frame.content = DATA
        self._expect(frame, DATA)

    # -- the last reference --------------------------------------------------------------------------------

    def free_if_unused(self, head: st.Frame) -> None:
        """free_pages_prepare(): debug options write to the pages, and their next owner finds what they hold.

        *head* is the first frame of a folio. A page whose memory is broken is kept, and the others are freed.
        """
        if head.refs() or head.allocated != ALLOCATED:
            return
        parts = self.state.parts(head)
        for frame in parts:
            if not frame.poison:
                self.notes.append(facts.Freed(
                    frame.number, OWNERS[frame.owner], CONTENTS[frame.content], bool(frame.gmap or frame.gstale)))
        if head.lock and not head.poison:
            self.die(f"pfn{head.number} is freed while locked")
        for frame in parts:
            self._free(frame)

    def _free(self, frame: st.Frame) -> None:
        if frame.poison:
            frame.allocated = KEPT
        else:
            # It came without a direct map: the allocator gives it one again when it needs the page as another.
            if frame.no_direct_map == UNMAPPED:
                frame.s1 = 1
            if self.kernel.init_on_free:
                self.kernel_access(frame, "allocator", "free-time poisoning", write=True, fixup=False)
                frame.content = JUNK
            frame.allocated = FREE
            frame.uptodate = frame.no_direct_map = 0
        self.make_folio(frame, 0)

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

    def drop_inode(self) -> bool:
        """One reference on the inode less; True: the last one, and the caller evicts it."""
        if not self.file.inodes:
            self.die("iput of an inode without references")
        self.file.inodes -= 1
        if self.file.inodes:
            return False
        self.file.inode, self.file.evictor = EVICTED, self.who + 1
        return True

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
        if self._withheld(frame, write, alone=True):
            return "SIGSEGV" if self.hypervisor.abort == DATA_ABORT else "SIGBUS"
        self.note_access(frame, "VMM", "user access", "user mapping", write)
        if write:
            self._written(frame)
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
            self._written(frame)
        return "ok"

    def unpin(self, folio: Folio, foll_pin: bool) -> None:
        """The reference goes; perhaps the last."""
        head = self.head_of(folio)
        if foll_pin:
            head.pin -= 1
        else:
            head.get -= 1
        self.free_if_unused(head)

"""User mappings of the emulated host: VMAs and their page table, accesses at EL0, GUP, and what references reach."""

from __future__ import annotations

from guest_memfd.machine.board.tracer import DEVICE_TOKEN, USER_TOKEN
from guest_memfd.machine.hw.buddy import OutOfMemory
from guest_memfd.machine.hw.ram import PAGE
from guest_memfd.machine.linux.page import Page
from guest_memfd.machine.primitives.pagecache import PageCache
from guest_memfd.words import facts
from guest_memfd.words.pagestate import FAILURE
from guest_memfd.words.primitives import EBADF, ENOMEM, Folio


class UserMappings(PageCache):
    """The VMM's mapping and GUP, mmap to unpin: user page tables, and references that others hold."""

    def mmap(self) -> int:
        """Over the whole file, through the VMM's descriptor."""
        if not self.inode.fd:
            return -EBADF
        if self.machine.slab_fails():
            self.against(FAILURE)
            return -ENOMEM
        self.machine.vmm.mmap(self.inode)
        self.inode.references += 1
        return 0

    def munmap(self) -> bool:
        """The VMA's inode reference goes with it; its page-table entries go with the last VMA."""
        self.machine.vmm.munmap(self.inode)
        return self.put_inode()

    def put_inode(self) -> bool:
        """A reference on the inode less; True: the last one, and its dropper evicts it."""
        if not self.inode.references:
            self.die("iput of an inode without references")
        return self.inode.put(self.who)

    def user_access(self, index: int, write: bool) -> str:
        """One instruction at EL0; what stage 1 refuses is the fault handler's, what stage 2 refuses a signal."""
        machine = self.machine
        mapping = self.inode.mapping
        vma = mapping.covering(index) if mapping is not None else None
        if vma is None:
            return "SIGSEGV"
        before = machine.tracer.contents()
        ran = machine.cpu.user(vma.va(index), write)
        if ran.signal is not None:
            return ran.signal
        page = machine.page_at(ran.reached[-1])
        self.note_access(page, "VMM", "user access", "user mapping", write, before(page))
        if write:
            self.written(page, USER_TOKEN)
        return "ok"

    def vmf_insert_folio(self, index: int, folio: Folio) -> bool:
        """Under the page-table lock: only while the VMA is there, and there is memory for a table.

        False in both cases: VM_FAULT_OOM is to the caller what a VMA that went is, and the access is tried again.
        """
        mapping, page = self.inode.mapping, self.page(folio)
        if mapping is None or not mapping.vmas:
            return False
        # Given anew, after memory_failure() had taken it: that is what the law asks about.
        if page.handled and mapping.lookup(index) is None:
            self.notes.append(facts.Given("the VMM", self.machine.number(page.pa)))
        try:
            mapping.insert(index, page.pa + (index - page.index) * PAGE)
        except OutOfMemory:
            self.against(FAILURE)
            return False
        return True

    def vma_covers(self, start: int, nr: int) -> bool:
        """A VMA covers every page of the file."""
        mapping = self.inode.mapping
        return mapping is not None and bool(mapping.vmas) and start < self.inode.size and nr > 0

    def unmap_mapping_pages(self, start: int, nr: int) -> None:
        """Entries and user TLBs together."""
        if nr <= 0:
            self.die("unmap_mapping_pages of no pages, which means all up to the end of the file")
        if self.inode.mapping is not None:
            for index in self.inode.mapping.zap(start, nr):
                self.machine.tracer.out_of_scope(self, "takes the page from the VMM", index)

    # -- GUP -----------------------------------------------------------------------------------------------------

    def gup_read_pte(self, index: int) -> Folio | None:
        """Read the entry as GUP-fast does, without a lock (mm/gup.c)."""
        mapping = self.inode.mapping
        pa = mapping.lookup(index) if mapping is not None and mapping.vmas else None
        return None if pa is None else self.folio(self.machine.page_at(pa))

    def gup_try_get(self, folio: Folio) -> bool:
        """Fails only when the count is zero: the frame may be another folio by now."""
        page = self.machine.pages.get(folio.pfn)
        if page is None or not page.refcount:
            return False
        page.take("spec")
        return True

    def gup_recheck(self, index: int, folio: Folio, foll_pin: bool) -> bool:
        """Keep or drop the speculative reference."""
        page = self.page(folio)
        # Dropped first, and taken again as a real one: the speculative reference is never used to touch the page.
        self.drop(page, "spec")
        # The entry has gone, or leads elsewhere. The frame may even be another folio by now, and this reference may
        # have been its last.
        if self.gup_read_pte(index) != folio:
            self.free_if_unused(page)
            return False
        page.take("pin" if foll_pin else "get")
        return True

    def pin_access(self, folio: Folio, write: bool, dma: bool) -> str:
        """A device reaches the frame whatever the tables say (no IOMMU in between); the kernel uses the direct map."""
        page = self.page(folio)
        if dma:
            self.note_access(page, "device", "DMA", "DMA", write, self.machine.tracer.content(page))
        elif self._copy(page, write) != "ok":
            return "fault"
        if write:
            self.written(page, DEVICE_TOKEN)
        return "ok"

    def _copy(self, page: Page, write: bool) -> str:
        return self.kernel_access(page, "kernel", "copy through a GUP reference",
                                  "plain_write" if write else "plain_read", self.machine.linear_map.va(page.pa))

    def unpin(self, folio: Folio, foll_pin: bool) -> None:
        """The reference goes; perhaps the last."""
        page = self.page(folio)
        self.drop(page, "pin" if foll_pin else "get")
        self.free_if_unused(page)

"""User mappings of the emulated host: VMAs and their page table, accesses at EL0, GUP, and what references reach."""

from __future__ import annotations

from errno import EBADF, ENOMEM

from guest_memfd.machine.board.tracer import DEVICE_TOKEN, USER_TOKEN
from guest_memfd.machine.hw.buddy import OutOfMemory
from guest_memfd.machine.linux.folio import LinuxFolio
from guest_memfd.machine.primitives import contents, pagecache
from guest_memfd.machine.primitives.base import Base
from guest_memfd.words import facts
from guest_memfd.words.pagestate import FAILURE
from guest_memfd.words.primitives import Folio
from guest_memfd.words.units import PAGE, Index, Pa, pfn_to_pa


def mmap(host: Base) -> int:
    """Over the whole file, through the VMM's descriptor."""
    if not host.inode.fd:
        return -EBADF
    if host.machine.slab_fails():
        host.against(FAILURE)
        return -ENOMEM
    host.machine.vmm.mmap(host.inode)
    host.inode.references += 1
    return 0


def munmap(host: Base) -> bool:
    """The VMA's inode reference goes with it; its page-table entries go with the last VMA."""
    host.machine.vmm.munmap(host.inode)
    return put_inode(host)


def put_inode(host: Base) -> bool:
    """A reference on the inode less; True: the last one, and its dropper evicts it."""
    if not host.inode.references:
        host.die("iput of an inode without references")
    return host.inode.put(host.who)


def user_access(host: Base, index: Index, write: bool) -> str:
    """One instruction at EL0; what stage 1 refuses is the fault handler's, what stage 2 refuses a signal."""
    machine = host.machine
    mapping = host.inode.mapping
    vma = mapping.covering(index) if mapping is not None else None
    if vma is None:
        return "SIGSEGV"
    machine.tracer.faulted_in(host, index)
    before = machine.tracer.contents()
    ran = machine.cpu.user(vma.va(index), write)
    if ran.signal is not None:
        return ran.signal
    page = machine.page_at(ran.reached[-1])
    pa = machine.spot(page, ran.reached[-1])
    contents.note_access(host, page, pa, "VMM", "user access", "user mapping", write, before(pa))
    if write:
        contents.written(host, page, pa, USER_TOKEN)
    return "ok"


def vmf_insert_folio(host: Base, index: Index, folio: Folio) -> bool:
    """Under the page-table lock: only while the VMA is there, and there is memory for a table.

    False in both cases: VM_FAULT_OOM is to the caller what a VMA that went is, and the access is tried again.
    """
    mapping, page = host.inode.mapping, host.page(folio)
    if mapping is None or not mapping.vmas:
        return False
    # Given anew, after memory_failure() had taken it: that is what the law asks about.
    pa = page.pa + (index - page.index) * PAGE
    if pa in page.handled and mapping.lookup(index) is None:
        host.notes.append(facts.Given("the VMM", host.machine.number(pa)))
    try:
        mapping.insert(index, pa)
    except OutOfMemory:
        host.against(FAILURE)
        return False
    return True


def vma_covers(host: Base, start: Index, nr: int) -> bool:
    """A VMA covers every page of the file."""
    mapping = host.inode.mapping
    return mapping is not None and bool(mapping.vmas) and start < host.inode.size and nr > 0


def unmap_mapping_pages(host: Base, start: Index, nr: int) -> None:
    """Entries and user TLBs together."""
    if nr <= 0:
        host.die("unmap_mapping_pages of no pages, which means all up to the end of the file")
    if host.inode.mapping is not None:
        for index in host.inode.mapping.zap(start, nr):
            host.machine.tracer.out_of_scope(host, "takes the page from the VMM", index)
            # A fault of the VMM that has made the entry, and has not returned yet, was right about it.
            page = host.inode.find(index)
            if page is not None and page.lock not in (None, host.who):
                host.machine.tracer.overtaken(page.lock)


# -- GUP -----------------------------------------------------------------------------------------------------


def gup_read_pte(host: Base, index: Index) -> Folio | None:
    """Read the entry as GUP-fast does, without a lock (mm/gup.c)."""
    host.machine.tracer.faulted_in(host, index)
    mapping = host.inode.mapping
    pa = mapping.lookup(index) if mapping is not None and mapping.vmas else None
    return None if pa is None else host.folio(host.machine.page_at(pa))


def gup_try_get(host: Base, folio: Folio) -> bool:
    """Fails only when the count is zero: the frame may be another folio by now."""
    page = host.machine.page_at(pfn_to_pa(folio.pfn))           # or one of a stand-in, which no one refers to
    if not page.refcount:
        return False
    page.take("spec")
    return True


def gup_recheck(host: Base, index: Index, folio: Folio, foll_pin: bool) -> bool:
    """Keep or drop the speculative reference."""
    page = host.page(folio)
    # Dropped first, and taken again as a real one: the speculative reference is never used to touch the page.
    host.drop(page, "spec")
    # The entry has gone, or leads elsewhere. The frame may even be another folio by now, and this reference may
    # have been its last.
    if gup_read_pte(host, index) != folio:
        pagecache.free_if_unused(host, page)
        return False
    page.take("pin" if foll_pin else "get")
    return True


def pin_access(host: Base, folio: Folio, write: bool, dma: bool) -> str:
    """A device reaches the frame whatever the tables say (no IOMMU in between); the kernel uses the direct map."""
    page = host.page(folio)
    pa = host.machine.spot(page, pfn_to_pa(folio.pfn))
    if dma:
        contents.note_access(host, page, pa, "device", "DMA", "DMA", write, host.machine.tracer.content(pa))
    elif _copy(host, page, pa, write) != "ok":
        return "fault"
    if write:
        contents.written(host, page, pa, DEVICE_TOKEN)
    return "ok"


def _copy(host: Base, page: LinuxFolio, pa: Pa, write: bool) -> str:
    return contents.kernel_access(host, page, "kernel", "copy through a GUP reference",
                                  "plain_write" if write else "plain_read", host.machine.linear_map.va(pa), at=pa)


def unpin(host: Base, folio: Folio, foll_pin: bool) -> None:
    """The reference goes; perhaps the last."""
    page = host.page(folio)
    host.drop(page, "pin" if foll_pin else "get")
    pagecache.free_if_unused(host, page)

"""Hazard: the kernel reads memory it was never given: a word load that runs over a page's end, a scan of all RAM."""

from __future__ import annotations

from guest_memfd.core.hypervisor import Hypervisor
from guest_memfd.designs.design import Design
from guest_memfd.scenarios.party import Party
from guest_memfd.scenarios.vmm import map_pages
from guest_memfd.words.primitives import Host, Steps
from guest_memfd.words.units import FIRST_FRAME, FIRST_PAGE, span

MM = Host("mm")


def zeropad(design: Design, hypervisor: Hypervisor) -> Steps[None]:
    """One load_unaligned_zeropad() from the end of the page before; dentry names do this all day."""
    pfn = yield from MM.choose("next to", *span(FIRST_FRAME, design.scene.frames))
    yield from MM.load_unaligned_zeropad(pfn)


def kcore(design: Design, hypervisor: Hypervisor) -> Steps[None]:
    """A reader of /proc/kcore, page after page."""
    for pfn in span(FIRST_FRAME, design.scene.frames):
        yield from MM.copy_from_kernel_nofault(pfn)


def page_cache_reader(design: Design, hypervisor: Hypervisor) -> Steps[None]:
    """Read a page of the file as lib/buildid.c and uprobes do: look it up, ask no one else, map it and read."""
    if (yield from map_pages(design, FIRST_PAGE, design.scene.pages)):
        return
    index = yield from MM.choose("page", *span(FIRST_PAGE, design.scene.pages))
    if not (yield from MM.mapping_no_direct_map()):
        hit = yield from MM.filemap_get_folio(index)
        if hit is not None:
            yield from MM.read_folio(hit.folio)
            yield from MM.folio_put(hit.folio)
    yield from design.munmap()


def drainer(design: Design, hypervisor: Hypervisor) -> Steps[None]:
    """Memory pressure, or any lru_add_drain_all(): the batches let go of their references."""
    yield from MM.lru_add_drain_all()


PAGE_CACHE_READER = Party("page-cache-reader", "a reader of page-cache folios that is no GUP (buildid, uprobes)",
                          page_cache_reader, fd=False)
DRAINER = Party("drainer", "somebody who drains the lru_add batches", drainer, task=False, fd=False)
ZEROPAD = Party("zeropad", "a zero-padding load from the page before", zeropad, task=False, fd=False)
KCORE = Party("kcore", "a scan of physical memory through /proc/kcore", kcore, task=False, fd=False)

"""Hazard: the hypervisor's driver keeps a kernel mapping of a guest page and no reference (gfn_to_pfn_cache)."""

from __future__ import annotations

from guest_memfd.core.hypervisor import Hypervisor
from guest_memfd.designs.design import Design
from guest_memfd.scenarios.gup import gup_fast
from guest_memfd.scenarios.party import Party
from guest_memfd.scenarios.vmm import map_pages
from guest_memfd.words.primitives import Host, Steps
from guest_memfd.words.units import FIRST_PAGE

MM = Host("mm")


def pfn_cache(design: Design, hypervisor: Hypervisor) -> Steps[None]:
    """Refresh the cache through the VMM's mapping, use it under its lock, drop it."""
    if (yield from map_pages(design, FIRST_PAGE, design.scene.pages)):
        return
    last = FIRST_PAGE + design.scene.pages - 1
    if (yield from MM.gpc_begin(last)) and (yield from design.user_fault(last)) == "ok":
        folio = yield from gup_fast(design, last, False)
        if folio is not None:
            valid = yield from MM.gpc_commit(folio)
            # No reference is kept (hva_to_pfn_retry() in virt/kvm/pfncache.c):
            # from here on invalidations are all that guards the page.
            yield from MM.unpin(folio, False)
            if valid:
                yield from use()
    yield from design.munmap()


def use() -> Steps[None]:
    """read_lock, gpc_check, write, read_unlock."""
    if (yield from MM.gpc_read_lock()):
        yield from MM.gpc_access(True)
        yield from MM.gpc_read_unlock()
    yield from MM.gpc_drop()


PFN_CACHE = Party("pfn-cache", "a user of a kernel mapping of a guest page (gfn_to_pfn_cache)", pfn_cache,
                  exists=lambda design, hypervisor: hypervisor.pfn_cache, fd=False)

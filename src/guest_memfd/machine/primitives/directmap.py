"""The direct map on the emulated host: linear-map entries, split as the kernel splits them, and the flush."""

from __future__ import annotations

from guest_memfd.machine.primitives import contents
from guest_memfd.machine.primitives.base import Base
from guest_memfd.words import facts
from guest_memfd.words.pagestate import FAILURE
from guest_memfd.words.primitives import Folio
from guest_memfd.words.units import pfn_to_pa


def can_set_direct_map(host: Base) -> bool:
    """By the kernel's command line: rodata=full, or debug_pagealloc (arch/arm64/mm/pageattr.c)."""
    return host.machine.linear_map.can_set_direct_map()


def set_direct_map_invalid_noflush(host: Base, folio: Folio) -> int:
    """The entries go, TLBs keep them (arch/arm64/mm/pageattr.c)."""
    ret = host.machine.linear_map.set_direct_map_invalid_noflush(pfn_to_pa(folio.pfn), folio.nr)
    return _changed(host, folio, ret, invalid=True)


def _changed(host: Base, folio: Folio, ret: int, *, invalid: bool) -> int:
    handled = host.page(folio).handled
    if not ret:
        host.notes += (facts.DirectMapChange(host.caller, host.machine.number(pa), invalid, pa in handled)
                       for pa in host.machine.named(*contents.area(folio)))
        # A change that failed has written nothing, so it does not count.
        host.machine.tracer.counts(host.who, "writes")
    else:
        host.against(FAILURE)
    return ret


def set_direct_map_default_noflush(host: Base, folio: Folio) -> int:
    """Invalid to valid: nothing stale can be left."""
    ret = host.machine.linear_map.set_direct_map_default_noflush(pfn_to_pa(folio.pfn), folio.nr)
    return _changed(host, folio, ret, invalid=False)


def split_direct_map(host: Base, folio: Folio) -> int:
    """Live, as the kernel splits them; a hole of one leaf becomes holes of single pages."""
    ret = host.machine.linear_map.split_to_pages(pfn_to_pa(folio.pfn), folio.nr)
    if ret:
        host.against(FAILURE)
    return ret


def flush_tlb_kernel_range(host: Base, folios: tuple[Folio, ...]) -> None:
    """All CPUs, a range for each folio."""
    lm = host.machine.linear_map
    host.machine.tracer.counts(host.who, "flushes")
    for folio in folios:
        pa, size = contents.area(folio)
        lm.flush_tlb_kernel_range(lm.va(pa), lm.va(pa) + size)

"""The direct map on the emulated host: linear-map entries, split as the kernel splits them, and the flush."""

from __future__ import annotations

from guest_memfd.machine.linux.page import Page
from guest_memfd.machine.primitives.base import Base
from guest_memfd.words import facts
from guest_memfd.words.pagestate import FAILURE
from guest_memfd.words.primitives import Folio


class DirectMap(Base):
    """The direct-map primitives, can_set_direct_map to flush_tlb_kernel_range: real entries and real TLBs."""

    def can_set_direct_map(self) -> bool:
        """By the kernel's command line: rodata=full, or debug_pagealloc (arch/arm64/mm/pageattr.c)."""
        return self.machine.linear_map.can_set_direct_map()

    def set_direct_map_invalid_noflush(self, folio: Folio) -> int:
        """The entries go, TLBs keep them (arch/arm64/mm/pageattr.c)."""
        page = self.page(folio)
        ret = self.machine.linear_map.set_direct_map_invalid_noflush(page.pa, page.nr)
        return self._changed(page, ret, invalid=True)

    def _changed(self, page: Page, ret: int, *, invalid: bool) -> int:
        if not ret:
            self.notes.append(facts.DirectMapChange(self.caller, self.machine.number(page.pa), invalid, page.handled))
            # A change that failed has written nothing, so it does not count.
            self.machine.tracer.counts(self.who, "writes")
        else:
            self.against(FAILURE)
        return ret

    def set_direct_map_default_noflush(self, folio: Folio) -> int:
        """Invalid to valid: nothing stale can be left."""
        page = self.page(folio)
        ret = self.machine.linear_map.set_direct_map_default_noflush(page.pa, page.nr)
        return self._changed(page, ret, invalid=False)

    def flush_tlb_kernel_range(self, folios: tuple[Folio, ...]) -> None:
        """All CPUs, a range for each folio."""
        lm = self.machine.linear_map
        self.machine.tracer.counts(self.who, "flushes")
        for folio in folios:
            page = self.page(folio)
            lm.flush_tlb_kernel_range(lm.va(page.pa), lm.va(page.pa) + page.size)

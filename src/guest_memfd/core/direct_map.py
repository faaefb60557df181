"""Host mapping: the only code that takes pages out of the kernel's direct map and puts them back, flush included.

The mark on the folio (folio->private, under the folio lock) says "not in the direct map". It is set before the entry
is cleared and cleared after the entry is back, so a marked folio is never trusted to be reachable. A marked folio that
is shared is legal: the next host access restores it. That is why no error path here has anything to undo.

Source of the shape: mm/secretmem.c; folio_zap_direct_map()/folio_restore_direct_map() of "Direct Map Removal Support
for guest_memfd" v12; the flush belongs to removal (Mike Rapoport on the first library, 19 Aug 2024).
"""

from __future__ import annotations

from guest_memfd.core.power import Power
from guest_memfd.words.primitives import Folio, Steps

ATTEMPTS = 2
"""How often an entry is put back before the page is given up: the failure is want of memory, which passes."""


class HostMapping(Power):
    """Take folios out of the direct map and put them back; each change is counted for hibernation."""

    def zap(self, folio: Folio) -> Steps[int]:
        """Take the locked *folio* out of the direct map and out of every CPU's TLB; 0, -ENOMEM or -EAGAIN (power)."""
        ret = yield from self.zap_noflush(folio)
        if not ret:
            yield from self.flush((folio,))
        return ret

    def zap_noflush(self, folio: Folio) -> Steps[int]:
        """As `zap`, for a batch: the caller calls `flush` before anybody may rely on it."""
        host = self.host
        ret = yield from self.account(folio.nr)
        if ret:
            return ret
        yield from host.folio_set_private(folio, True)
        ret = yield from host.set_direct_map_invalid_noflush(folio)
        if ret:
            yield from host.folio_set_private(folio, False)
            yield from self.account(-folio.nr)
        return ret

    def flush(self, folios: tuple[Folio, ...]) -> Steps[None]:
        """One flush for a batch of zapped folios."""
        yield from self.host.flush_tlb_kernel_range(folios)

    def restore(self, folio: Folio) -> Steps[int]:
        """Put the locked, marked *folio* back into the direct map; 0, or -ENOMEM and it stays marked."""
        host = self.host
        for _attempt in range(ATTEMPTS):
            ret = yield from host.set_direct_map_default_noflush(folio)
            if not ret:
                yield from host.folio_set_private(folio, False)
                yield from self.account(-folio.nr)
                return 0
        return ret

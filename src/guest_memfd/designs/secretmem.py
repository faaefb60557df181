"""`secretmem`: memfd_secret's discipline for guest memory - zap at allocation, restore at free, veto hibernation by count.

Differs from our library: a page is out of the direct map for its whole life, shared or not; GUP is refused (as for every
secretmem VMA); the page is restored first and zeroed then, and the result of restoring is not looked at. Conversion and
the hypervisor's part are our library's, because memfd_secret has neither. Source: mm/secretmem.c (7.3).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from guest_memfd.compat import override
from guest_memfd.core.gmem import Grabbed, Held
from guest_memfd.designs.design import OPERATIONS, Design
from guest_memfd.words.primitives import Bound, Steps
from guest_memfd.words.units import Index


class Secretmem(Design):
    """Never in the direct map while allocated."""

    name = "secretmem"
    title = "zap at allocation, restore at free (memfd_secret)"
    source = "mm/secretmem.c secretmem_fault(), secretmem_free_folio()"
    power = "count"
    gup = False
    keeps: ClassVar[Mapping[str, str]] = dict.fromkeys(
        OPERATIONS, "memfd_secret has no guest: its steps at allocation, first use and free take the place of ours")
    bounds: ClassVar[Mapping[str, Bound]] = {
        **Design.bounds, "allocate": Bound(writes=1, flushes=1, splits=1),
        "user_fault": Bound(writes=1, flushes=1, splits=1), "punch": Bound(writes=1, calls=4, splits=3),
    }

    @override
    def grab_folio(self, index: Index) -> Steps[Grabbed | int]:
        """A new page leaves the direct map at once; if that fails it is given up again."""
        grabbed = yield from super().grab_folio(index)
        if isinstance(grabbed, int) or grabbed.no_direct_map:
            return grabbed
        # At allocation and not at the first guest fault: a shared page of this design is out of the direct map, too.
        ret = yield from self.zap(grabbed.folio)
        if ret:
            # A page that could not be zapped must not stay in the file, where the next fault would take it for one
            # that has been.
            yield from self.host.filemap_remove_folio(grabbed.folio)
            yield from self.unlock_and_put(grabbed.folio)
            return ret
        return grabbed._replace(no_direct_map=True)

    @override
    def make_accessible(self, grabbed: Grabbed) -> Steps[int]:
        """The VMM uses its own mapping; the kernel's stays away."""
        yield from ()
        return 0

    @override
    def return_to_kernel(self, held: Held, marked: bool) -> Steps[None]:
        """Put the page back into the direct map, then zero it through there (secretmem_free_folio(), mm/secretmem.c)."""
        yield from self.host.set_direct_map_default_noflush(held.folio)
        yield from self.host.folio_set_no_direct_map(held.folio, False)
        # Restored first, zeroed then: for a moment the kernel's mapping shows what was in the page.
        yield from self.host.clear_folio(held.folio)

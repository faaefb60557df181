"""`alloc-unmapped`: pages come from the allocator without a direct map (ALLOC_UNMAPPED, 20 Mar and 15 Jul 2026).

Differs from `filemap-hook`: no entry of the direct map is changed for a page. The allocator keeps whole blocks of memory
that is not mapped, for who asks for such (alloc_flags of __folio_alloc(), so that mm/filemap.c can), and maps a block again
when it needs one for others. So nothing can fail when a page is freed, and nothing is flushed for it but by the CPU that
has had a mapping of the moment.

Left out: how blocks change sides, and what that costs. A page that is freed is back in the direct map at once here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from guest_memfd.compat import override
from guest_memfd.designs.design import Design
from guest_memfd.designs.filemap_hook import FilemapHook
from guest_memfd.words.primitives import Bound, Folio, Steps

NOTHING = Bound(stalls=0)


class AllocUnmapped(FilemapHook):
    """Never in the direct map at all."""

    name = "alloc-unmapped"
    title = "pages come without a direct map, and are written to through mappings of one CPU, of the moment"
    source = "Brendan Jackman, 20260320-page_alloc-unmapped-v2, and 15 Jul 2026"
    bounds: ClassVar[Mapping[str, Bound]] = {
        **Design.bounds, "fault": Bound(calls=2, stalls=0, splits=2), "user_fault": NOTHING, "allocate": NOTHING,
        "write": NOTHING, "copy": NOTHING, "populate": Bound(), "to_private": Bound(calls=4, stalls=2, splits=2),
        "punch": Bound(calls=4, splits=2),
    }

    @override
    def new_page(self) -> Steps[Folio | int]:
        """A page of a block that is not mapped."""
        return (yield from self.host.filemap_alloc_folio(True))

    @override
    def clear_new(self, folio: Folio) -> Steps[None]:
        """Zeros, through a mapping of this CPU."""
        yield from self.host.clear_folio_local(folio)

    @override
    def write_new(self, folio: Folio) -> Steps[None]:
        """What user space gives, through a mapping of this CPU."""
        yield from self.host.write_folio(folio, True)

    @override
    def take_out(self, folio: Folio) -> Steps[int]:
        """0: it was never in."""
        yield from ()
        return 0

    @override
    def put_back(self, folio: Folio) -> Steps[None]:
        """The allocator's to do, when it has the page again."""
        yield from ()

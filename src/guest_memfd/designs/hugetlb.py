"""What the designs with hugetlb folios have alike: RFC v2 of May 2025, and its rework of 2026.

Differs from our library: a file is whole huge pages, and a huge page or none is allocated; there is no smaller one to fall
back on. The direct map is left alone, nothing of what a guest has written is scrubbed, and nothing keeps hibernation away,
as in KVM's guest_memfd below the series. A folio is split or merged when its leaves have been zapped. While someone refers
to it for a moment, the split waits in a loop, with the invalidate lock held (folio_ref_freeze()).

Left out: the pool and its reservations; the vmemmap, whose pages may be missing at a split (-ENOMEM of `split_folio` stands
for that, and for the entries of the page cache); the deferred merge when a file is closed; KVM's retry by sequence, which
`kvm-7.4` has: here a fault holds the invalidate lock, as ours does. A folio that a memslot cuts consists of single pages,
where KVM would map parts of it. Pages that a scene has shared from the start stand for those that were converted before.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from errno import EBUSY, EINVAL, ENOMEM
from typing import ClassVar

from guest_memfd.compat import override
from guest_memfd.core.gmem import Held
from guest_memfd.designs.none import NoDesign
from guest_memfd.words.primitives import Folio, Lookup, Steps
from guest_memfd.words.units import FIRST_PAGE, Index, Pfn


class HugetlbFile(NoDesign):
    """A file of huge pages, none of which can be had in part."""

    large = True
    keeps: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("bind", "unbind"), "a folio that a memslot cuts is mapped by pages there; ours splits it"),
        "vm_teardown": "KVM zaps all, and the firmware gives up what it has, or keeps it",
        "guest_fault": "KVM retries by sequence where ours holds the lock; what it maps is the same",
        "user_fault": "shared pages are single folios here as there",
        **dict.fromkeys(("mmap", "munmap", "close"), "a mapping and a reference go as every file's do"),
        "evict": "every folio leaves the file; the merge of what is in parts is the pool's",
        "error_folio": "all of the folio is zapped, as one flag stands for it",
        **dict.fromkeys(("hibernate_prepare", "hibernate_post"), "the series has nothing of it: power is 'none'"),
    }

    @override
    def create(self, size: int, shared: tuple[int, ...] = ()) -> Steps[int]:
        """-EINVAL also for a size that is no multiple of the huge page: the VMM rounds up."""
        if not self.whole(size):
            return -EINVAL
        return (yield from super().create(size, shared))

    @override
    def add_folio(self, index: Index, small: bool) -> Steps[Lookup | int]:
        """A huge page of the pool, or -ENOMEM, and nothing *small* in its place; split where some of it is shared."""
        if small:
            return -ENOMEM
        if (yield from self.order_at(index)):
            return (yield from self.host.filemap_add_folio(index, self.order))
        return (yield from self.host.filemap_add_pages(index, self.order))

    @override
    def return_to_kernel(self, held: Held, marked: bool) -> Steps[None]:
        """The page goes back to the pool as the guest has left it; who gets it next clears it."""
        yield from ()

    # -- what conversions are made of ----------------------------------------------------------------------------

    def huge_pages(self, start: Index, nr: int) -> Iterator[tuple[Index, Index, int]]:
        """Of each huge page that [start, start+nr) has a part of: its first page, the part's, and how many the part has.

        A file of single pages has none, and its ranges are one part.
        """
        if not self.order:
            yield start, start, nr
            return
        size, end, at = 1 << self.order, start + nr, start
        while at < end:
            head = Index(at & -size)
            stop = min(end, head + size)
            yield head, at, stop - at
            at = stop

    def zap_exactly(self, start: Index, nr: int, folios: tuple[Held, ...]) -> Steps[tuple[int, Index]]:
        """The guest loses the pages of [start, start+nr) that *folios* have, and no others; (0, 0), or who refused."""
        for held in folios:
            first, end = max(start - held.pgoff, 0), min(start + nr - held.pgoff, held.folio.nr)
            whole = end - first == held.folio.nr
            for at in (0,) if whole else range(first, end):
                part = held.folio if whole else Folio(Pfn(held.folio.pfn + at))
                ret = (yield from self.zap_part(held, at, part)) if held.gfn is not None else 0
                if ret:
                    return ret, held.pgoff + at
        return 0, FIRST_PAGE

    def zap_part(self, held: Held, at: int, part: Folio) -> Steps[int]:
        """Page *at* of *held* and so on: out of the guest's tables, and, where that is all one (TDX), out of the guest."""
        assert held.gfn is not None
        if not held.private:
            return (yield from self.ops.invalidate(held.gfn + at, part, False, "to_private"))
        return (yield from self.ops.invalidate(held.gfn + at, part, True, "to_shared")) or (
            yield from self.ops.make_shared(held.gfn + at, part))

    def split_waiting(self, folios: tuple[Held, ...]) -> Steps[tuple[int, Index]]:
        """Single pages of *folios*, all of whose references are the page cache's and ours; (0, 0), or -ENOMEM and the page.

        The leaves in the guest's tables are no matter of it. A reference that passes is waited for.
        """
        for held in folios:
            ret = -EBUSY if held.folio.order else 0
            while ret == -EBUSY:
                ret, _ = yield from self.split((held._replace(gfn=None),))
            if ret:
                return ret, held.pgoff
        return 0, FIRST_PAGE

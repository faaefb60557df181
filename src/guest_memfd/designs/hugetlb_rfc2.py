"""`hugetlb-rfc2`: hugetlb folios in guest_memfd as posted with conversion, RFC v2 (14 May 2025), mistakes included.

Differs from our library, beside what hugetlb.py says: a conversion is a list of items, one for each run of pages that
changes. For each the new shareability is stored, and then every huge page that it touches is split or merged by what is
stored. When one fails, those before it are undone, which takes memory, too, and may fail; then only the kernel's log is
told. The index of the loop that undoes is unsigned, and goes down past 0. A punch of a part of a huge page zeroes it,
whoever refers to it, and frees nothing.

Left out: the reference check of a punch of a whole huge page that is in parts; TDX and SNP, whose patches came on top.
"""

from __future__ import annotations

from collections.abc import Mapping
from errno import EAGAIN
from typing import ClassVar

from guest_memfd.compat import override
from guest_memfd.core.gmem import Conversion
from guest_memfd.core.large import is_cut
from guest_memfd.core.ops import Reason
from guest_memfd.designs.hugetlb import HugetlbFile
from guest_memfd.words.pagestate import PRIVATE_PAGE, SHARED_PAGE
from guest_memfd.words.primitives import Entries, Folio, Steps
from guest_memfd.words.units import Index, Pfn

Item = tuple[Index, int]
"""A run of pages that changes: the first, and how many."""


class HugetlbRfc2(HugetlbFile):
    """virt/kvm/guest_memfd.c and mm/guestmem_hugetlb.c of the series."""

    name = "hugetlb-rfc2"
    title = "guest_memfd with hugetlb folios as first posted: convert item by item, undo what was done"
    source = "cover.1747264138.git.ackerleytng@google.com, 51 patches, 14 May 2025"
    hypervisors = ("kvm",)
    keeps: ClassVar[Mapping[str, str]] = {
        **HugetlbFile.keeps,
        **dict.fromkeys(("make_private", "make_shared", "punch_hole"),
                        "range, lock and result are alike; what is under the lock is not"),
        "allocate": "page by page, and a huge page is there when its first is",
    }

    # -- conversion ----------------------------------------------------------------------------------------------

    @override
    def make_private_locked(self, start: Index, nr: int) -> Steps[Conversion]:
        """User mappings go and references are counted, then the items; -EAGAIN with the first page referred to, -ENOMEM."""
        host = self.host
        items = yield from self.items(start, nr, PRIVATE_PAGE)
        if not items:
            return Conversion(0)
        yield from self.begin_huge(start, nr)
        yield from host.unmap_mapping_pages(start, nr)
        folios = yield from self.present(start, nr)
        busy = yield from self.unexpected_refs(folios)
        if busy is None:
            yield from self.zap_exactly(start, nr, tuple(held for held in folios if not held.private))
        yield from self.put_all(folios)
        result = Conversion(-EAGAIN, busy) if busy is not None else (yield from self.convert(items, PRIVATE_PAGE))
        yield from host.gmem_invalidate_end()
        return result

    @override
    def make_shared_locked(self, start: Index, nr: int) -> Steps[Conversion]:
        """The guest's mappings of the exact range go, then the items; -ENOMEM."""
        items = yield from self.items(start, nr, SHARED_PAGE)
        if not items:
            return Conversion(0)
        yield from self.begin_huge(start, nr)
        folios = yield from self.present(start, nr)
        yield from self.zap_exactly(start, nr, tuple(held for held in folios if held.private))
        yield from self.put_all(folios)
        result = yield from self.convert(items, SHARED_PAGE)
        yield from self.host.gmem_invalidate_end()
        return result

    def items(self, start: Index, nr: int, to: int) -> Steps[tuple[Item, ...]]:
        """One for each run of pages of the range that are not so yet."""
        attributes = yield from self.host.tree_load("attributes", start, nr)
        found: list[Item] = []
        parts = [(0, nr)]
        # By halves, and not page by page: a file can be 2^50 pages.
        while parts:
            at, length = parts.pop()
            already = attributes[at:at + length].count(to)
            if 0 < already < length:
                parts += [(at + length // 2, length - length // 2), (at, length // 2)]
            elif not already and found and sum(found[-1]) == start + at:
                found[-1] = found[-1][0], found[-1][1] + length
            elif not already:
                found.append((start + at, length))
        return tuple(found)

    def begin_huge(self, start: Index, nr: int) -> Steps[None]:
        """The invalidation begins, of all huge pages that the range has a part of."""
        size = 1 << self.order
        first = Index(start & -size)
        yield from self.host.gmem_invalidate_begin(first, -(-(start + nr - first) // size) * size)

    def convert(self, items: tuple[Item, ...], to: int) -> Steps[Conversion]:
        """Every item, or an error and those before it undone."""
        for at, item in enumerate(items):
            ret = yield from self.execute(item, to)
            if ret:
                yield from self.undo(items[:at], SHARED_PAGE if to == PRIVATE_PAGE else PRIVATE_PAGE)
                return Conversion(ret)
        return Conversion(0)

    def execute(self, item: Item, to: int) -> Steps[int]:
        """Store what the item's pages become, then split or merge the huge pages around them; 0 or -ENOMEM.

        When that fails the store is undone here, as far as there is memory.
        """
        start, nr = item
        ret = yield from self.host.tree_store("attributes", start, Entries(to, nr))
        if ret:
            return ret
        ret = yield from self.restructure(start, nr)
        if ret:
            before = SHARED_PAGE if to == PRIVATE_PAGE else PRIVATE_PAGE
            if (yield from self.host.tree_store("attributes", start, Entries(before, nr))):
                yield from self.host.warn(f"page {start} stays converted")
        return ret

    def undo(self, done: tuple[Item, ...], to: int) -> Steps[None]:
        """The inverse of what has been done, the last first; then the index is 0, and goes down by one."""
        for item in reversed(done):
            if (yield from self.execute(item, to)):
                yield from self.host.warn(f"page {item[0]} stays converted")
        yield from self.host.bug("the loop that undoes counts an unsigned index down past 0, and reads what is no item")

    def restructure(self, start: Index, nr: int) -> Steps[int]:
        """Any page of a huge page shared: all of it is split. None: it is merged. 0, or -ENOMEM."""
        if not self.order:
            return 0
        for head, _, _ in self.huge_pages(start, nr):
            if not (yield from self.host.tree_load("attributes", head, 1 << self.order)).count(SHARED_PAGE):
                yield from self.host.merge_folio(head, self.order)
                continue
            folios = yield from self.present(head, 1 << self.order)
            ret, _ = yield from self.split_waiting(folios)
            yield from self.put_all(folios)
            if ret:
                return ret
        return 0

    # -- punch ---------------------------------------------------------------------------------------------------

    @override
    def remove_range(self, start: Index, nr: int, reason: Reason) -> Steps[Conversion]:
        """Huge pages of the range go; of those that it cuts the part is zeroed, through the direct map."""
        folios = yield from self.present(start, nr)
        cut = tuple(held for held in folios if is_cut(held, start, nr))
        for held in cut:
            for at in range(max(start - held.pgoff, 0), min(start + nr - held.pgoff, held.folio.nr)):
                yield from self.host.clear_folio(Folio(Pfn(held.folio.pfn + at)))
        yield from self.put_all(folios)
        for _, at, pages in self.huge_pages(start, nr) if cut else ():
            if pages == 1 << self.order:
                yield from super().remove_range(at, pages, reason)
        return Conversion(0) if cut else (yield from super().remove_range(start, nr, reason))

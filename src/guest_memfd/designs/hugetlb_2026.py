"""`hugetlb-2026`: KVM's guest_memfd with hugetlb folios, as it was reworked in 2026, mistakes included.

Differs from our library, beside what hugetlb.py says: a punch or an allocation of a part of a huge page is -EINVAL. A
conversion goes huge page by huge page and stops at the first error. Those before it stay converted, and the page that it
names is the first that has not been converted: there the same request may go on. In each huge page the guest's leaf is
split first and then the exact range zapped, so that a want of memory there costs nothing. But the folio itself is split
after the zap, which has destroyed what a TD had in that range. The attribute is stored last, when the invalidation is over.
-ENOMEM names a page as well.

The letters in the code: a reservation; b user mappings and references; c the invalidation, of all of the huge page, begins;
d the leaves that the range cuts are split; e zap; f the invalidation ends; g the folio is split or merged; h the attribute.

Left out: SNP, whose patches came on top.
"""

from __future__ import annotations

from collections.abc import Mapping
from errno import EAGAIN, EINVAL
from typing import ClassVar

from guest_memfd.compat import override
from guest_memfd.core.gmem import Conversion, Held
from guest_memfd.core.large import is_cut
from guest_memfd.designs.hugetlb import HugetlbFile
from guest_memfd.words.pagestate import PRIVATE_PAGE, SHARED_PAGE
from guest_memfd.words.primitives import Bound, Entries, Steps
from guest_memfd.words.units import Index


class Hugetlb2026(HugetlbFile):
    """What guest_memfd_hugetlb.c and mm/hugetlb_restructuring.c of the tree do."""

    name = "hugetlb-2026"
    title = "guest_memfd with hugetlb folios, converted huge page by huge page"
    source = "reworked from cover.1747264138.git.ackerleytng@google.com: AMDESE/linux-kvm, guest_memfd_hugetlb.c, 2026"
    hypervisors = ("kvm", "tdx")
    resumes = ("to_private", "to_shared")
    errnos: ClassVar[Mapping[str, tuple[int, ...]]] = dict.fromkeys(("allocate", "punch"), (EINVAL,))
    # The CPUs' batches are drained once for each huge page, and ours once for a request: a scene has a few of them.
    bounds: ClassVar[Mapping[str, Bound]] = {
        **HugetlbFile.bounds, "to_private": HugetlbFile.bounds["to_private"]._replace(stalls=8)}
    keeps: ClassVar[Mapping[str, str]] = {
        **HugetlbFile.keeps,
        **dict.fromkeys(("make_private", "make_shared"), "range, lock and result are alike; what is under the lock is not"),
    }

    @override
    def allocate(self, start: Index, nr: int) -> Steps[int]:
        """-EINVAL for a part of a huge page."""
        if not self.whole(start, nr):
            return -EINVAL
        return (yield from super().allocate(start, nr))

    @override
    def punch_hole(self, start: Index, nr: int) -> Steps[Conversion]:
        """-EINVAL for a part of a huge page."""
        if not self.whole(start, nr):
            return Conversion(-EINVAL)
        return (yield from super().punch_hole(start, nr))

    # -- to private ----------------------------------------------------------------------------------------------

    @override
    def make_private_locked(self, start: Index, nr: int) -> Steps[Conversion]:
        """Huge page by huge page; -EAGAIN with the first page that someone refers to, -ENOMEM with where it has stopped."""
        for head, at, pages in self.huge_pages(start, nr):
            if (yield from self.host.tree_load("attributes", at, pages)).count(PRIVATE_PAGE) < pages:
                result = yield from self.take(head, at, pages)
                if result.ret:
                    return result
        return Conversion(0)

    def take(self, head: Index, start: Index, nr: int) -> Steps[Conversion]:
        """[start, start+nr), in the huge page that begins at *head*, goes to the guest."""
        host = self.host
        ret = yield from host.tree_reserve("attributes", start, nr)                                         # a
        if ret:
            return Conversion(ret, start)
        yield from host.unmap_mapping_pages(start, nr)                                                      # b
        folios = yield from self.present(start, nr)
        busy = yield from self.unexpected_refs(folios)
        if busy is not None:
            yield from self.put_all(folios)
            yield from host.tree_release("attributes")
            return Conversion(-EAGAIN, busy)
        yield from host.gmem_invalidate_begin(head, max(1 << self.order, nr))                               # c
        ret, index = yield from self.zap_exactly(start, nr, tuple(held for held in folios if not held.private))     # e
        yield from host.gmem_invalidate_end()                                                               # f
        yield from self.put_all(folios)
        if ret:
            yield from host.tree_release("attributes")
            return Conversion(ret, index)
        attributes = yield from host.tree_load("attributes", head, 1 << self.order)
        if self.order and attributes.count(SHARED_PAGE) == attributes[start - head:start - head + nr].count(SHARED_PAGE):
            yield from host.merge_folio(head, self.order)                                                   # g
        yield from host.tree_store_reserved("attributes", start, Entries(PRIVATE_PAGE, nr))                 # h
        return Conversion(0)

    # -- to shared -----------------------------------------------------------------------------------------------

    @override
    def make_shared_locked(self, start: Index, nr: int) -> Steps[Conversion]:
        """Huge page by huge page; -ENOMEM with where it has stopped, or what the firmware says, and the page."""
        for head, at, pages in self.huge_pages(start, nr):
            if (yield from self.host.tree_load("attributes", at, pages)).count(SHARED_PAGE) < pages:
                result = yield from self.give(head, at, pages)
                if result.ret:
                    return result
        return Conversion(0)

    def give(self, head: Index, start: Index, nr: int) -> Steps[Conversion]:
        """[start, start+nr), in the huge page that begins at *head*, goes to the host."""
        host = self.host
        ret = yield from host.tree_reserve("attributes", start, nr)                                         # a
        if ret:
            return Conversion(ret, start)
        yield from host.gmem_invalidate_begin(head, max(1 << self.order, nr))                               # c
        folios = yield from self.present(start, nr)
        private = tuple(held for held in folios if held.private)
        ret, index = yield from self.split_leaves(start, nr, private)                                       # d
        if not ret:
            ret, index = yield from self.zap_exactly(start, nr, private)                                    # e
        yield from host.gmem_invalidate_end()                                                               # f
        if not ret:
            ret, index = yield from self.split_waiting(folios)                                              # g
        yield from self.put_all(folios)
        if ret:
            yield from host.tree_release("attributes")
            return Conversion(ret, max(index, start))
        yield from host.tree_store_reserved("attributes", start, Entries(SHARED_PAGE, nr))                  # h
        return Conversion(0)

    def split_leaves(self, start: Index, nr: int, folios: tuple[Held, ...]) -> Steps[tuple[int, Index]]:
        """The guest's leaves that an end of [start, start+nr) cuts, with what they map: before anything is zapped."""
        for held in folios:
            if held.gfn is not None and is_cut(held, start, nr):
                ret = yield from self.ops.split(held.gfn, held.folio)
                if ret:
                    return ret, start
        return 0, start

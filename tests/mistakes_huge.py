"""The designs with huge folios, with one of their mistakes repaired; and with one more.

tests/test_huge_designs.py says which law sees each, where, and in how many steps.
"""

from __future__ import annotations

from errno import EAGAIN, EBUSY
from typing import Any

from guest_memfd.core import invalidate
from guest_memfd.core.gmem import Conversion, Held
from guest_memfd.designs.gmem_2m import Gmem2m
from guest_memfd.designs.hugetlb import HugetlbFile
from guest_memfd.designs.hugetlb_2026 import Hugetlb2026
from guest_memfd.designs.hugetlb_rfc2 import HugetlbRfc2, Item
from guest_memfd.words.primitives import Folio, Steps
from guest_memfd.words.units import Gfn, Index


def ended_last(procedure: Steps[Any]) -> Steps[Any]:
    """*procedure*, whose invalidation ends when all else is done."""
    late, result = None, None
    while True:
        try:
            primitive = procedure.send(result)
        except StopIteration as stop:
            if late is not None:
                yield late
            return stop.value
        if primitive.name == "gmem_invalidate_end":
            late, result = primitive, None
        else:
            result = yield primitive


class SplitsOrRefuses(HugetlbFile):
    """A reference is not waited for: -EAGAIN, and the page."""

    def split_waiting(self, folios: tuple[Held, ...]) -> Steps[tuple[int, Index]]:
        for held in folios:
            if held.folio.order:
                ret, _ = yield from self.split((held._replace(gfn=None),))
                if ret:
                    return -EAGAIN if ret == -EBUSY else ret, held.pgoff
        return 0, Index(0)


class StoresInTime(SplitsOrRefuses, Hugetlb2026):
    """The attribute is stored before the invalidation ends."""

    def take(self, head: Index, start: Index, nr: int) -> Steps[Conversion]:
        return (yield from ended_last(super().take(head, start, nr)))

    def give(self, head: Index, start: Index, nr: int) -> Steps[Conversion]:
        return (yield from ended_last(super().give(head, start, nr)))


class NamesTheRequest(StoresInTime):
    """An error is told as of the page where the request begins, whatever has been done."""

    def make_shared_locked(self, start: Index, nr: int) -> Steps[Conversion]:
        result = yield from super().make_shared_locked(start, nr)
        return result._replace(error_index=start) if result.ret else result


class NamesNothing(StoresInTime):
    """An error is told without a page."""

    def make_shared_locked(self, start: Index, nr: int) -> Steps[Conversion]:
        return Conversion((yield from super().make_shared_locked(start, nr)).ret)


class NamesTheNext(StoresInTime):
    """The page that is told is the one after that which has not been converted."""

    def make_shared_locked(self, start: Index, nr: int) -> Steps[Conversion]:
        result = yield from super().make_shared_locked(start, nr)
        if result.error_index is None or result.error_index + 1 == start + nr:
            return result
        return result._replace(error_index=result.error_index + 1)


class CountsToZero(HugetlbRfc2):
    """The loop that undoes ends when all is undone."""

    def undo(self, done: tuple[Item, ...], to: int) -> Steps[None]:
        for item in reversed(done):
            if (yield from self.execute(item, to)):
                yield from self.host.warn(f"page {item[0]} stays converted")


class FreesItsPart(HugetlbRfc2):
    """What a punch cuts is split, and the part goes."""

    remove_range = invalidate.remove_range


class FillsEveryGap(Gmem2m):
    """19 repaired: of a folio of which a part is assigned the other pages are assigned, too."""

    def assign(self, gfn: Gfn, folio: Folio, at: int) -> Steps[int]:
        return (yield from self.ops.prepare_private(gfn, folio))


class RefusesThePart(Gmem2m):
    """23 repaired: what cannot be split is not zeroed, and the punch is refused."""

    remove_range = invalidate.remove_range


class NotesTheFolio(Gmem2m):
    """12: populate copies a page, and notes all of its folio."""

    def populate_bound(self, gfn: Gfn, index: Index) -> Steps[int]:
        ret = yield from super().populate_bound(gfn, index)
        if not ret:
            size = 1 << self.order
            yield from self.note_prepared(Gfn(gfn & -size), size)
        return ret


class SplitsOrRefusesRfc2(SplitsOrRefuses, CountsToZero):
    """The same of the first posting."""

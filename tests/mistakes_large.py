"""Mistakes with large folios: the library, a driver, or the kernel with one of them each.

tests/test_large_folios.py says which law sees each, where, and in how many steps. A number is that of the bug in
docs/bugs.md, of a series that has been posted; the others are mistakes that our own steps invite.
"""

from __future__ import annotations

from dataclasses import replace
from errno import EAGAIN, EINVAL, EPERM

from leave_out import without
from named import name_all

from guest_memfd.abstract import AbstractHost
from guest_memfd.core.convert import CACHE_AND_LOOKUP
from guest_memfd.core.gmem import Conversion, Grabbed, Held
from guest_memfd.core.hypervisor import Stage2
from guest_memfd.core.large import is_cut
from guest_memfd.core.ops import GuestMemfdOps
from guest_memfd.designs.ours import OurLibrary
from guest_memfd.hypervisors.gunyah import client, el2
from guest_memfd.hypervisors.kvm import default, pkvm, snp, tdx
from guest_memfd.words.pagestate import PRIVATE_PAGE, SHARED_PAGE
from guest_memfd.words.primitives import Entries, Folio, Lookup, Steps

# -- zeroing, and what is up to date ------------------------------------------------------------------------------------


class ZeroesTheFirstPage(OurLibrary):
    """11: the first page of a folio is zeroed, and all of it marked up to date."""

    def zero(self, folio: Folio) -> Steps[None]:
        yield from self.host.clear_folio(folio._replace(order=0))
        yield from self.host.folio_mark_uptodate(folio)


class ZapsUnzeroed(OurLibrary):
    """A page that nobody has used yet leaves the direct map as it is, and is zeroed when it is used."""

    def make_private_locked(self, start: int, nr: int) -> Steps[Conversion]:
        return (yield from without(super().make_private_locked(start, nr), "clear_folio", "folio_mark_uptodate"))


class TakesAnySize(OurLibrary):
    """5: a file may end inside of a folio, and the folio goes on."""

    def add_folio(self, index: int, small: bool) -> Steps[Lookup | int]:
        return (yield from self.host.filemap_add_folio(index, 0 if small else self.order))


class ScrubsTheFirstPage(OurLibrary):
    """A folio goes back to the kernel, and only its first page is scrubbed."""

    def return_to_kernel(self, held: Held, marked: bool) -> Steps[None]:
        if held.private and not self.ops.scrubs:
            yield from self.host.clear_folio_local(held.folio._replace(order=0))
        if marked and (yield from self.restore(held.folio)):
            yield from self.host.leak_folio(held.folio)


class ZeroesWhatIsCut(OurLibrary):
    """23: what a punch cannot split it zeroes instead."""

    def split(self, folios: tuple[Held, ...]) -> Steps[tuple[int, int]]:
        ret, index = yield from super().split(folios)
        if ret:
            yield from self.host.clear_folio(folios[0].folio)
        return ret, index


class PunchZeroes(OurLibrary):
    """6: a punch of a part of a folio zeroes it and frees nothing."""

    def punch_hole(self, start: int, nr: int) -> Steps[Conversion]:
        nr = min(nr, self.size - start)
        if nr <= 0:
            return Conversion(-EINVAL)
        yield from self.host.begin_op("punch", start, nr)
        yield from self.host.down_write("invalidate")
        folios = yield from self.present(start, nr)
        if any(is_cut(held, start, nr) for held in folios):
            for held in folios:
                for at, pfn in enumerate(held.folio.pfns):
                    if start <= held.pgoff + at < start + nr:
                        yield from self.host.clear_folio(Folio(pfn))
            yield from self.put_all(folios)
            result = Conversion(0)
        else:
            yield from self.put_all(folios)
            result = yield from self.remove_range(start, nr, "punch")
        yield from self.host.end_op(result.ret, result.error_index)
        yield from self.host.up_write("invalidate")
        return result


# -- ranges, and what is told -------------------------------------------------------------------------------------------


class TellsTheHead(OurLibrary):
    """15: the page that refused is the first of its folio, wherever the request begins."""

    def single_pages(
        self, start: int, nr: int, folios: tuple[Held, ...], cut: tuple[Held, ...],
    ) -> Steps[tuple[int, int, tuple[Held, ...]]]:
        ret, index, folios = yield from super().single_pages(start, nr, folios, cut)
        return ret, next((held.pgoff for held in cut), index) if ret else index, folios


class AnnouncesLate(OurLibrary):
    """13: the attribute is stored after the invalidation has ended."""

    def make_shared_locked(self, start: int, nr: int) -> Steps[Conversion]:
        ret = yield from self.host.tree_reserve("attributes", start, nr)
        if ret:
            return Conversion(ret)
        yield from self.host.gmem_invalidate_begin(start, nr)
        folios = yield from self.present(start, nr)
        ret, index, folios = yield from self.single_pages(start, nr, folios, tuple(h for h in folios if h.folio.order))
        result = Conversion(ret, index) if ret else (yield from self.give_to_host(tuple(h for h in folios if h.private)))
        yield from self.put_all(folios)
        yield from self.host.gmem_invalidate_end()
        if result.ret:
            yield from self.host.tree_release("attributes")
        else:
            yield from self.host.tree_store_reserved("attributes", start, Entries(SHARED_PAGE, nr))
        return result


class ConvertsTheFolio(OurLibrary):
    """A conversion of one page converts all of the folio that it is part of."""

    def make_shared_locked(self, start: int, nr: int) -> Steps[Conversion]:
        hit = yield from self.host.filemap_get_folio(start)
        if hit is not None:
            yield from self.host.folio_put(hit.folio)
            start, nr = min(start, hit.pgoff), max(start + nr, hit.pgoff + hit.folio.nr) - min(start, hit.pgoff)
        return (yield from super().make_shared_locked(start, nr))


# -- order of a split ---------------------------------------------------------------------------------------------------


class SplitsAfterTheStore(OurLibrary):
    """The attributes are stored, and then folios are split; that fails, and the conversion is refused."""

    def make_shared_locked(self, start: int, nr: int) -> Steps[Conversion]:
        ret = yield from self.host.tree_reserve("attributes", start, nr)
        if ret:
            return Conversion(ret)
        yield from self.host.gmem_invalidate_begin(start, nr)
        yield from self.host.tree_store_reserved("attributes", start, Entries(SHARED_PAGE, nr))
        folios = yield from self.present(start, nr)
        ret, index, folios = yield from self.single_pages(start, nr, folios, tuple(h for h in folios if h.folio.order))
        result = Conversion(ret, index) if ret else (yield from self.give_to_host(folios))
        yield from self.put_all(folios)
        yield from self.host.gmem_invalidate_end()
        return result


class TakesBackFirst(OurLibrary):
    """3: what is cut is taken back from the guest as a whole, and then split."""

    def split_locked(self, held: Held, marked: bool) -> Steps[int]:
        ret, _ = yield from self.invalidate_guest((held,), "punch")
        ret = ret or (yield from self.take_back(held))
        return ret or (yield from super().split_locked(held, marked))


class NeverSplits(OurLibrary):
    """A conversion of a part leaves the folio as it is."""

    def single_pages(
        self, start: int, nr: int, folios: tuple[Held, ...], cut: tuple[Held, ...],
    ) -> Steps[tuple[int, int, tuple[Held, ...]]]:
        yield from ()
        return 0, 0, folios


class SplitsTheFirst(OurLibrary):
    """Of the folios that a request has to split the first is split."""

    def split(self, folios: tuple[Held, ...]) -> Steps[tuple[int, int]]:
        return (yield from super().split(folios[:1]))


class CountsAll(OurLibrary):
    """References are counted of all folios of a range, private ones, too, and as of single pages."""

    def check_and_commit_private(self, start: int, nr: int, folios: tuple[Held, ...]) -> Steps[Conversion]:
        busy = None
        everything = yield from self.present(start, nr)
        for held in everything:
            refs = yield from self.host.folio_ref_count(held.folio)
            if refs > CACHE_AND_LOOKUP + 1 and held.folio.order:
                busy = held.pgoff
        yield from self.put_all(everything)
        if busy is not None:
            return Conversion(-EAGAIN, busy)
        return (yield from super().check_and_commit_private(start, nr, folios))


class LeaksTheFolio(OurLibrary):
    """What does not come back as a whole is given up as a whole."""

    def take_parts_back(self, held: Held) -> Steps[int]:
        yield from self.host.lock_folio(held.folio)
        yield from self.leak(held)
        yield from self.host.unlock_folio(held.folio)
        return 0


class SplitsPinned(OurLibrary):
    """A reference on a part does not keep a folio from being taken apart: the request goes on with what it is."""

    def split(self, folios: tuple[Held, ...]) -> Steps[tuple[int, int]]:
        yield from super().split(folios)
        return 0, 0


class LeavesTheHole(OurLibrary):
    """A folio is split, and the hole in the direct map stays one leaf: to put a page back is to split it."""

    def split_locked(self, held: Held, marked: bool) -> Steps[int]:
        return (yield from super().split_locked(held, False))


class LeavesTheGuestsLeaf(OurLibrary):
    """17: a folio is split, and the guest's leaf is not."""

    def split_locked(self, held: Held, marked: bool) -> Steps[int]:
        return (yield from super().split_locked(held._replace(gfn=None), marked))


# -- bindings -----------------------------------------------------------------------------------------------------------


class BindsWhatIsCut(OurLibrary):
    """A binding may cut a folio that is there, or put it at a gfn that is no multiple of its size."""

    def split_to_bind(self, gfn: int, start: int, nr: int) -> Steps[int]:
        yield from ()
        return 0


class AnyGfn(OurLibrary):
    """24: a large folio for pages that are bound anywhere."""

    def order_at(self, index: int) -> Steps[int]:
        order = yield from super().order_at(index)
        if order or not self.order:
            return order
        size = 1 << self.order
        attributes = yield from self.host.tree_load("attributes", index & -size, size)
        return self.order if attributes.count(PRIVATE_PAGE) == size else 0


class MixedFolios(OurLibrary):
    """A large folio also where some of its pages are shared."""

    def order_at(self, index: int) -> Steps[int]:
        yield from ()
        return self.order


class HeadsGfn(OurLibrary):
    """The guest is given the folio at the gfn where it has faulted, which need not be that of the first page."""

    def give_private(self, gfn: int, grabbed: Grabbed) -> Steps[int]:
        return (yield from super().give_private(gfn + (grabbed.folio.nr > 1), grabbed))


# -- one page after the other -------------------------------------------------------------------------------------------


class PageByPage(OurLibrary):
    """2: a conversion goes page by page, and what has been done is undone when one is refused - if that can be done."""

    first = 0

    def make_shared_locked(self, start: int, nr: int) -> Steps[Conversion]:
        for index in range(start, start + nr):
            result = yield from super().make_shared_locked(index, 1)
            if result.ret:
                for done in range(start - self.first, index):
                    yield from self.make_private_locked(done, 1)
                return result
        return Conversion(0)


class UndoesOneMore(PageByPage):
    """1: of nothing that has been done the page before is undone."""

    first = 1


# -- drivers ------------------------------------------------------------------------------------------------------------


class GoesByTheFirst(pkvm.PkvmOps):
    """19: the first page of a block is the guest's already: so is all of it, it is thought."""

    def by_page(self, already: int, name: str, gfn: int | None, folio: Folio, *args: object) -> Steps[int]:
        return (yield from GuestMemfdOps._call(self, name, gfn, folio, args))


class AsksForAll(client.GunyahOps):
    """What is not so of all of a folio is so of no page of it, it is thought."""

    def by_page(self, already: int, name: str, gfn: int | None, folio: Folio, *args: object) -> Steps[int]:
        return (yield from GuestMemfdOps._call(self, name, gfn, folio, args))


class PreparedIsInverted(pkvm.PkvmOps):
    """21: a block is prepared page by page, and those that are the guest's already are the ones that are prepared."""

    def prepare_private(self, gfn: int, folio: Folio) -> Steps[int]:
        ret = yield from self.host.hyp_call("donate_guest", gfn, folio)
        if ret == -EPERM and folio.order:
            for at, pfn in enumerate(folio.pfns):
                if (yield from self.host.hyp_call("check_consent", gfn + at, Folio(pfn), True)):
                    ret = yield from self.host.hyp_call("donate_guest", gfn + at, Folio(pfn))
        return 0 if ret == -EPERM else ret


def _donates_the_first(stage2: Stage2, gfn: int, folio: Folio) -> int:
    return pkvm.donate_guest(stage2, gfn, folio._replace(order=0))


def _rounds_down(stage2: Stage2, gfn: int, folio: Folio) -> int:
    stage2.guest_map(gfn & -folio.nr, folio.pfn, folio.order)
    return 0


def _keeps_the_leaf(stage2: Stage2, gfn: int, folio: Folio) -> int:
    return 0


def _unlocks_all(stage2: Stage2, gfn: int, folio: Folio, sync: bool) -> int:
    if not all(stage2.locked_in(pfn) for pfn in folio.pfns):
        for pfn in folio.pfns:
            stage2.set_locked_in(pfn, False)
    return el2.unmap_private(stage2, gfn, folio, sync)


class GoesOn(tdx.TdxOps):
    """10: what the module will not remove is shared all the same."""

    def make_shared(self, gfn: int, folio: Folio) -> Steps[int]:
        yield from super().make_shared(gfn, folio)
        return 0


class SplitsNothing(snp.SnpOps):
    """A page is assigned while an entry of the direct map covers its neighbours, too."""

    def prepare_private(self, gfn: int, folio: Folio) -> Steps[int]:
        return (yield from self.by_page(-EPERM, "rmp_assign", gfn, folio))


def _smashes_nothing(stage2: Stage2, gfn: int, folio: Folio) -> int:
    stage2.guest_split(gfn, folio.order)
    return 0


def _splits_around_the_first(stage2: Stage2, gfn: int, folio: Folio) -> int:
    stage2.guest_split(gfn, 0)
    return 0


ASKS_FOR_ALL = replace(client.GUNYAH, ops=AsksForAll)
SPLITS_AROUND_THE_FIRST = replace(
    pkvm.PKVM, hypercalls={**pkvm.PKVM.hypercalls, "split_guest": _splits_around_the_first})
GOES_ON = replace(tdx.TDX, ops=GoesOn)
SPLITS_NOTHING = replace(snp.SNP, ops=SplitsNothing)
SMASHES_NOTHING = replace(snp.SNP, hypercalls={**snp.SNP.hypercalls, "psmash": _smashes_nothing})
GOES_BY_THE_FIRST = replace(pkvm.PKVM, ops=GoesByTheFirst)
PREPARED_IS_INVERTED = replace(pkvm.PKVM, ops=PreparedIsInverted)
DONATES_THE_FIRST = replace(pkvm.PKVM, hypercalls={**pkvm.PKVM.hypercalls, "donate_guest": _donates_the_first})
KEEPS_THE_LEAF = replace(pkvm.PKVM, hypercalls={**pkvm.PKVM.hypercalls, "split_guest": _keeps_the_leaf})
ROUNDS_DOWN = replace(default.KVM, hypercalls={**default.KVM.hypercalls, "mmu_map": _rounds_down})
UNLOCKS_ALL = replace(client.GUNYAH, hypercalls={**client.GUNYAH.hypercalls, "unmap_private": _unlocks_all})


# -- the kernel ---------------------------------------------------------------------------------------------------------


class OneFlag(AbstractHost):
    """26: a kernel that merges pages of which one is broken, and keeps one flag for all of them: the first page's."""

    def merge_folio(self, index: int, order: int) -> bool:
        pages = [self.page(i) for i in range(index, index + (1 << order))]
        frames = [self.state.frame(page.cached - 1) for page in pages if page.cached]
        broken = [frame for frame in frames if frame.poison]
        for frame in broken:
            frame.poison = 0
        merged = super().merge_folio(index, order)
        for frame in frames[:1] if merged and broken else broken:
            frame.poison = 1
        return merged


name_all(globals())

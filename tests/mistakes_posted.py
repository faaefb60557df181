"""Mistakes of the posted libraries, and of what was proposed beside them, one at a time; and repaired twins.

tests/test_posted_designs.py says which law sees each, where, and in how many steps.
"""

from __future__ import annotations

from leave_out import without
from named import name_all

from guest_memfd.core.gmem import Conversion, Grabbed, Held
from guest_memfd.core.library import Library
from guest_memfd.core.ops import Reason
from guest_memfd.designs.filemap import filemap_grab_folio
from guest_memfd.designs.filemap_hook import FilemapHook
from guest_memfd.designs.guestmem_rfc2 import GuestmemRfc2
from guest_memfd.designs.guestmem_v5 import GuestmemV5
from guest_memfd.designs.guestmem_v6 import GuestmemV6
from guest_memfd.designs.kvm_gmem import Kvm74
from guest_memfd.designs.ours import OurLibrary
from guest_memfd.words.primitives import Folio, Locked, MfResult, Steps
from guest_memfd.words.units import FIRST_PAGE, Index

# -- RFC v2, with one of its mistakes repaired -----------------------------------------------------------------------


class Flushes(GuestmemRfc2):
    """R25: removal ends with a flush."""

    bounds = {**GuestmemRfc2.bounds, "fault": GuestmemRfc2.bounds["fault"]._replace(flushes=1),
              "allocate": GuestmemRfc2.bounds["allocate"]._replace(flushes=1)}

    def take_out(self, folio: Folio) -> Steps[int]:
        ret = yield from super().take_out(folio)
        if not ret:
            yield from self.host.flush_tlb_kernel_range((folio,))
        return ret


class DrainsFirst(GuestmemRfc2):
    """R30: the batches of new pages are drained before references are counted."""

    bounds = {name: bound._replace(stalls=bound.stalls + 1) for name, bound in GuestmemRfc2.bounds.items()}

    def is_quiet(self, folio: Folio) -> Steps[bool]:
        yield from self.host.lru_add_drain_all()
        return (yield from super().is_quiet(folio))


class PunchTells(GuestmemRfc2):
    """S40: what the client says is told."""

    punch_hole = Library.punch_hole


class AllocateTells(GuestmemRfc2):
    """S41: fallocate() knows an error pointer."""

    def allocate(self, start: Index, nr: int) -> Steps[int]:
        steps, result, error = super().allocate(start, nr), None, 0
        while True:
            try:
                primitive = steps.send(result)
            except StopIteration as stop:
                yield from self.host.end_op(error) if error else ()
                yield from self.host.up_read("invalidate") if error else ()
                return stop.value
            error = error or (-12 if primitive.name == "bug" else 0)
            result = None if primitive.name == "bug" else (yield primitive)


class AsksBeforeItMaps(DrainsFirst):
    """N6: the client gives the page back, and then it is put back into the direct map."""

    def make_accessible_at(self, index: Index, folio: Folio) -> Steps[int]:
        ret = yield from (self.take_back_at(index, folio) if (yield from self.is_quiet(folio)) else self.refuse())
        if not ret:
            yield from self.put_back(folio)
            yield from self.host.folio_set_no_direct_map(folio, False)
        return ret

    def refuse(self) -> Steps[int]:
        yield from ()
        return -16


class LeavesBrokenMemoryAlone(GuestmemRfc2):
    """S45: a broken page is taken from its users, and stays out of the direct map, as it does in the library."""

    def error_folio(self, folio: Folio, locked: Locked) -> Steps[MfResult]:
        return (yield from Library.error_folio(self, folio, locked))

    def return_to_kernel(self, held: Held, marked: bool) -> Steps[None]:
        if marked:
            yield from super().return_to_kernel(held, marked)


# -- v4 to v6 --------------------------------------------------------------------------------------------------------


class OnSnp(GuestmemV5):
    """v5 where a page that is freed has to be taken back from the hypervisor, and not before."""

    hypervisors = None

    def unmap_gfn(self, gfn: int, held: Held, reason: Reason) -> Steps[None]:
        yield from self.ops.invalidate(gfn, held.folio, held.private, reason)


class DetachesFirst(OnSnp):
    """v4: when the inode's pages go, its operations are empty_aops, and nobody is told."""

    def evict(self) -> Steps[None]:
        for held in (yield from self.present(FIRST_PAGE, self.size)):
            yield from self.host.lock_folio(held.folio)
            yield from self.host.filemap_remove_folio(held.folio)
            yield from self.unlock_and_put(held.folio)
        yield from self.host.destroy_inode()
        yield from self.host.module_put()


class FreesSilently(OnSnp):
    """R29d (v2, its conversion of KVM): the hook for pages that are freed is gone."""

    def free_folio(self, held: Held) -> Steps[None]:
        yield from ()


class TellsTheOutcome(GuestmemV5):
    """S49: what was dealt with is MF_DELAYED."""

    def error_folio(self, folio: Folio, locked: Locked) -> Steps[MfResult]:
        return (yield from Kvm74.error_folio(self, folio, locked))


class TellsTheOutcomeToo(GuestmemV6):
    """S50: the same of v6."""

    def error_folio(self, folio: Folio, locked: Locked) -> Steps[MfResult]:
        return (yield from Kvm74.error_folio(self, folio, locked))


class LooksAtTheZap(GuestmemV6):
    """S50: a page that cannot be taken out of the direct map is not up to date, and the next to ask tries again."""

    def mark_prepared(self, folio: Folio) -> Steps[None]:
        for _attempt in range(2):
            if not (yield from self.host.set_direct_map_invalid_noflush(folio)):
                break
        yield from self.host.folio_mark_uptodate(folio)


class FlushesAfterTheZap(LooksAtTheZap):
    """And it is flushed."""

    def mark_prepared(self, folio: Folio) -> Steps[None]:
        yield from super().mark_prepared(folio)
        yield from self.host.flush_tlb_kernel_range((folio,))


class PopulatesAgain(Kvm74):
    """R29e (v2): populate has lost its check for a page that has been prepared."""

    def populate_locked(self, index: Index, folio: Folio, locked: Locked) -> Steps[int]:
        return (yield from super().populate_locked(index, folio, locked._replace(uptodate=False)))


# -- what reviewers warned of, in the library ------------------------------------------------------------------------


class UnmappedIsUnused(OurLibrary):
    """R13: a page that is not mapped is taken for one that nobody has: a reference outlives the mapping."""

    def unexpected_refs(self, folios: tuple[Held, ...]) -> Steps[Index | None]:
        for held in folios:
            if (yield from self.host.folio_mapped(held.folio)):
                return held.pgoff
        return None


class CountsBeforeItUnmaps(OurLibrary):
    """R17: references are counted while user space still maps the page, and GUP-fast takes another."""

    def make_private_locked(self, start: Index, nr: int) -> Steps[Conversion]:
        folios = yield from self.present(start, nr)
        busy = yield from super().unexpected_refs(folios)
        yield from self.put_all(folios)
        return Conversion(-11, busy) if busy is not None else (yield from super().make_private_locked(start, nr))

    def unexpected_refs(self, folios: tuple[Held, ...]) -> Steps[Index | None]:
        yield from ()
        return None


class PunchAsksNobody(OurLibrary):
    """R18: a page is freed whose mapping in the guest survives what user space does to it."""

    def invalidate_guest(self, folios: tuple[Held, ...], reason: Reason) -> Steps[tuple[int, Index]]:
        if reason == "punch":
            return 0, FIRST_PAGE
        return (yield from super().invalidate_guest(folios, reason))


class CacheIsNoReference(OurLibrary):
    """R21: a gfn_to_pfn_cache has no reference on its page, and a conversion asks for references only."""

    def make_private_locked(self, start: Index, nr: int) -> Steps[Conversion]:
        return (yield from without(super().make_private_locked(start, nr), "gmem_invalidate_begin", "gmem_invalidate_end"))


class UptodateIsPrepared(OurLibrary):
    """R23: up to date means zeroed, and is read as prepared for the guest."""

    def fault_bound(self, gfn: int, index: Index) -> Steps[int]:
        found = yield from filemap_grab_folio(self.host, index)
        if isinstance(found, int):
            return found
        yield from self.unlock_and_put(found[0])
        return 0 if found[1].uptodate else (yield from super().fault_bound(gfn, index))


class OneHookForBoth(OurLibrary):
    """R39: who gives a page back with its contents calls the hook that scrubs what is freed."""

    def give_to_host(self, folios: tuple[Held, ...]) -> Steps[Conversion]:
        ret, index = yield from self.invalidate_guest(folios, "to_shared")
        for held in () if ret else folios:
            ret = yield from self.take_back(held)
            yield from self.host.clear_folio_local(held.folio)
        return Conversion(ret, index)


class ZapsWhatIsThere(FilemapHook):
    """R19: who writes has put the page back for the moment, unlocked, and everybody who grabs it takes it out."""

    def write_locked(self, index: Index) -> Steps[int]:
        grabbed = yield from super().grab_folio(index)
        if isinstance(grabbed, int):
            return grabbed
        yield from self.host.set_direct_map_default_noflush(grabbed.folio)
        yield from self.host.unlock_folio(grabbed.folio)
        yield from self.host.write_folio(grabbed.folio, False)
        yield from self.host.lock_folio(grabbed.folio)
        yield from self.take_out(grabbed.folio)
        yield from self.unlock_and_put(grabbed.folio)
        return 0

    def grab_folio(self, index: Index) -> Steps[Grabbed | int]:
        grabbed = yield from super().grab_folio(index)
        if not isinstance(grabbed, int):
            yield from self.take_out(grabbed.folio)
        return grabbed


class ZapsNewPagesOnly(ZapsWhatIsThere):
    """The rule that came of it: a folio leaves when it is new."""

    def grab_folio(self, index: Index) -> Steps[Grabbed | int]:
        return (yield from FilemapHook.grab_folio(self, index))


name_all(globals())

"""Mistakes in KVM's guest_memfd: `kvm-7.4` with one thing wrong, most of them as an earlier kernel or posting had it.

tests/test_kvm_design.py says which law sees each, where, and in how many steps; docs/bugs.md has those with a number.
"""

from __future__ import annotations

from errno import EAGAIN, EEXIST, EINVAL, ENOMEM
from typing import Any

from leave_out import answered, without
from named import name_all

from guest_memfd.core.gmem import Conversion, Held
from guest_memfd.core.ops import Reason
from guest_memfd.designs.kvm_gmem import Kvm74
from guest_memfd.designs.kvm_memslots import Slots
from guest_memfd.designs.kvm_mmu import ALL, KVM_FILTER_PRIVATE
from guest_memfd.errors import EHWPOISON
from guest_memfd.words.pagestate import PRIVATE_PAGE
from guest_memfd.words.primitives import Entries, Folio, Locked, MfResult, Primitive, Steps, VmFault
from guest_memfd.words.units import Index


def postponed(procedure: Steps[Any], name: str) -> Steps[Any]:
    """*procedure*, in which primitives of this name are carried out when all the others have been."""
    result, later = None, list[Primitive]()
    while True:
        try:
            primitive = procedure.send(result)
        except StopIteration as stop:
            yield from later
            return stop.value
        result = later.append(primitive) if primitive.name == name else (yield primitive)


class UnlocksTheFolio(Kvm74):
    """What `kvm-7.4` would have to do about a broken page: let go of the folio while it waits for the invalidate lock."""

    def error_folio(self, folio: Folio, locked: Locked) -> Steps[MfResult]:
        if locked.pgoff is None or not (yield from self.host.igrab()):
            return "failed"
        yield from self.host.unlock_folio(folio)
        answer = yield from super().error_folio(folio, locked)
        if (yield from self.host.iput()):
            yield from self.evict()
        yield from self.host.lock_folio(folio)
        return answer


class AsksOfWhatChanges(Kvm74):
    """What `kvm-7.4` would have to do about references to a page that is private already: not ask for them."""

    def unexpected_refs(self, folios: tuple[Held, ...]) -> Steps[Index | None]:
        return (yield from super().unexpected_refs(tuple(held for held in folios if not held.private)))


# -- the fault of a vCPU ---------------------------------------------------------------------------------------------


class MapsBlindly(Kvm74):
    """What was found is mapped, whatever has happened since."""

    def map_pfn(self, seq: int, gfn: int, folio: Folio, *, private: bool) -> Steps[int]:
        return (yield from without(super().map_pfn(seq, gfn, folio, private=private), "mmu_invalidate_retry"))


class LooksBeforeTheLock(Kvm74):
    """mmu_invalidate_retry_gfn_unsafe() is all that is asked."""

    def map_pfn(self, seq: int, gfn: int, folio: Folio, *, private: bool) -> Steps[int]:
        if (yield from self.host.mmu_invalidate_retry(seq, gfn)):
            yield from self.host.end_op(-EAGAIN)
            return -EAGAIN
        return (yield from without(super().map_pfn(seq, gfn, folio, private=private), "mmu_invalidate_retry"))


class ComparesTheSequenceAlone(Kvm74):
    """An invalidation that is under way has not moved the sequence yet."""

    def map_pfn(self, seq: int, gfn: int, folio: Folio, *, private: bool) -> Steps[int]:
        yield from self.host.down_read("mmu")
        now = yield from self.host.mmu_invalidate_seq()
        yield from self.host.up_read("mmu")
        steps = super().map_pfn(seq, gfn, folio, private=private)
        return (yield from answered(steps, {"mmu_invalidate_retry": now != seq}))


class SamplesTooLate(Kvm74):
    """The sequence is sampled when the page has been found."""

    def map_pfn(self, seq: int, gfn: int, folio: Folio, *, private: bool) -> Steps[int]:
        late = yield from self.host.mmu_invalidate_seq()
        return (yield from super().map_pfn(late, gfn, folio, private=private))


class OnTdx(Kvm74):
    """7.4 where who maps a page says to whom it belongs."""

    hypervisors = None


class BelievesWhatItHasRead(OnTdx):
    """26: whether a page is private is read without a lock, and used without looking at the sequence."""

    def map_pfn(self, seq: int, gfn: int, folio: Folio, *, private: bool) -> Steps[int]:
        return (yield from without(super().map_pfn(seq, gfn, folio, private=private), "mmu_invalidate_retry"))


class LeaksPoisoned(UnlocksTheFolio):
    """4 (6.8 to 6.10): a page whose memory is broken is refused, and stays referenced."""

    def get_pfn_locked(self, gfn: int, index: int) -> Steps[Folio | int]:
        found = yield from self.get_folio(index)
        if not isinstance(found, int) and found[1].hwpoison:
            yield from self.host.folio_get(found[0], "provided")
        if not isinstance(found, int):
            yield from self.unlock_and_put(found[0])
        return (yield from super().get_pfn_locked(gfn, index))


class ErrorIsNoNull(Kvm74):
    """5 (SNP series, 2024): what the page cache returns is tested for NULL."""

    def get_pfn_locked(self, gfn: int, index: int) -> Steps[Folio | int]:
        found = yield from super().get_pfn_locked(gfn, index)
        if found == -ENOMEM:
            yield from self.host.bug("an error pointer from kvm_gmem_get_folio() is dereferenced")
        return found


class FileIsNotHeld(Kvm74):
    """The pointer of the memslot is taken for a reference."""

    def hold_file(self, gfn: int) -> Steps[bool]:
        (there,) = yield from self.host.tree_load("gmem_files", gfn, 1)
        return bool(there)

    def get_pfn(self, gfn: int, index: int) -> Steps[tuple[Folio | int, bool]]:
        return (yield from without(super().get_pfn(gfn, index), "fput"))

    def is_private(self, gfn: int, index: int) -> Steps[tuple[bool, bool]]:
        return (yield from without(super().is_private(gfn, index), "fput"))


class EndsTheFileInTheFault(Kvm74):
    """The last reference is dropped, and the file ended, inside of the SRCU read section."""

    def fault_in_slot(self, gfn: int) -> Steps[tuple[int, bool]]:
        ret, last = yield from super().fault_in_slot(gfn)
        if last:
            yield from self.file_released()
        return ret, False


# -- memslots --------------------------------------------------------------------------------------------------------


class SumIsSigned(Kvm74):
    """2 (6.8 to 7.1): offset and size are added as signed numbers, and what is negative is below the end of the file."""

    def fits(self, start: int, nr: int) -> bool:
        return start >= 0 and nr > 0


class OverlapIsInvalid(Kvm74):
    """3 (6.8 to 7.1): a range that is bound already is -EINVAL."""

    def bind(self, gfn: int, start: int, nr: int) -> Steps[int]:
        steps, result = super().bind(gfn, start, nr), None
        while True:
            try:
                primitive = steps.send(result)
            except StopIteration as stop:
                return -EINVAL if stop.value == -EEXIST else int(stop.value)
            if primitive.name == "end_op" and primitive.args[0] == -EEXIST:
                primitive = primitive._replace(args=(-EINVAL, None))
            result = yield primitive


class StoreIsNotLookedAt(Kvm74):
    """17 (6.8 to 7.3): xa_store_range() may have failed, and nobody asks."""

    def commit(self, gfn: int, start: int, nr: int) -> Steps[int]:
        ret = yield from super().commit(gfn, start, nr)
        return 0 if ret == -ENOMEM else ret


class MoveLeavesTheBinding(Kvm74):
    """16 (to 6.19): a memslot that is moved is not unbound."""

    def unbind_slots(self, slots: Slots, reason: Reason) -> Steps[None]:
        if reason != "unbind":
            yield from super().unbind_slots(slots, reason)


class DyingIsDead(Kvm74):
    """K1 (6.8 to 6.17): a file that is being closed is taken for one that has been: its bindings stay."""

    def unbind_slots(self, slots: Slots, reason: Reason) -> Steps[None]:
        if (yield from self.host.get_file()):
            yield from super().unbind_slots(slots, reason)
            yield from self.host.fput()                 # which may be the last: that is left out


class DyingNeedsNoLock(UnlocksTheFolio):
    """28 (6.18 to 7.3): the bindings of a file that is being closed are taken away without the invalidate lock."""

    def unbind_slots(self, slots: Slots, reason: Reason) -> Steps[None]:
        if (yield from self.host.get_file()):
            yield from super().unbind_slots(slots, reason)
            yield from self.host.fput()
        else:
            yield from without(super().unbind_slots(slots, reason), "down_write", "up_write")


class DeletesAtOnce(Kvm74):
    """Nobody waits for vCPUs that have found the memslot."""

    def delete(self, slots: Slots, reason: Reason) -> Steps[None]:
        yield from without(super().delete(slots, reason), "synchronize_srcu")


class InstallsFirst(Kvm74):
    """vCPUs find the memslot before it is bound."""

    def commit(self, gfn: int, start: int, nr: int) -> Steps[int]:
        yield from self.install(gfn, start, nr)
        return (yield from super().commit(gfn, start, nr))


# -- conversion ------------------------------------------------------------------------------------------------------


class DrainsNothing(Kvm74):
    """19 (RFC v1 and v2): the lru_add batches' references count as anybody's."""

    def unexpected_refs(self, folios: tuple[Held, ...]) -> Steps[int | None]:
        return (yield from without(super().unexpected_refs(folios), "lru_add_drain_all"))


class CursorIsTheStart(Kvm74):
    """21 (v7): filemap_get_folios() moves the start of the range on, to which the error is clamped."""

    def make_private_locked(self, start: int, nr: int) -> Steps[Conversion]:
        result = yield from super().make_private_locked(start, nr)
        return Conversion(-EAGAIN, start + nr) if result.ret == -EAGAIN else result


class FaultsWithoutTheLock(Kvm74):
    """A fault of the VMM as 6.18 has it, where no page changes sides: it looks, and maps, without the invalidate lock."""

    def user_fault(self, index: int) -> Steps[VmFault]:
        return (yield from without(super().user_fault(index), "down_read", "up_read"))


class MappedIsNotAsked(Kvm74):
    """A fault of the VMM that has ended after the unmap is not seen: its page is mapped, and has no other reference."""

    def unexpected_refs(self, folios: tuple[Held, ...]) -> Steps[int | None]:
        return (yield from without(super().unexpected_refs(folios), "folio_mapped"))


class StoresAfterTheEnd(Kvm74):
    """The attribute changes when the invalidation is over."""

    def make_shared_locked(self, start: int, nr: int) -> Steps[Conversion]:
        return (yield from postponed(super().make_shared_locked(start, nr), "tree_store_reserved"))


class HoleIsShared(Kvm74):
    """24 (v8): a page that the attribute tree does not have reads as 0, which is shared."""

    def init_attributes(self, size: int, shared: tuple[int, ...]) -> Steps[int]:
        ret = 0
        for index in range(size):
            if index not in shared and not ret:
                ret = yield from self.host.tree_store("attributes", index, Entries(PRIVATE_PAGE, 1))
        return ret


# -- how pages come and go -------------------------------------------------------------------------------------------


class PopulatesWhatIsThere(Kvm74):
    """23 (v8): without a source a page is populated as it is, and counts as up to date."""

    def populate_locked(self, index: int, folio: Folio, locked: Locked) -> Steps[int]:
        if not locked.uptodate:
            yield from self.host.folio_mark_uptodate(folio)
        yield from self.unlock_and_put(folio)
        return 0


class FaultsBeforeTheLock(Kvm74):
    """What is populated comes from a page of the VMM's that is in no page table yet, of the same file."""

    def populate(self, index: int) -> Steps[int]:
        yield from self.fault_source_in()
        return (yield from super().populate(index))

    def fault_source_in(self) -> Steps[None]:
        last = self.size - 1
        if (yield from self.host.user_access(last, False)) == "fault":
            yield from self.user_fault(last)


class FaultsUnderTheLock(FaultsBeforeTheLock):
    """14 (to 6.19): that page is faulted in under the invalidate lock, which its fault waits for."""

    def populate(self, index: int) -> Steps[int]:
        return (yield from Kvm74.populate(self, index))

    def populate_locked(self, index: int, folio: Folio, locked: Locked) -> Steps[int]:
        yield from self.fault_source_in()
        return (yield from super().populate_locked(index, folio, locked))


class PunchIsForPrivatePages(Kvm74):
    """8 (6.18-rc): an invalidation is about private mappings, whatever the file has."""

    def invalidate_start(self, start: int, nr: int, folios: tuple[Held, ...], of: frozenset[bool],
                         reason: Reason) -> Steps[None]:
        yield from super().invalidate_start(start, nr, folios, KVM_FILTER_PRIVATE if of == ALL else of, reason)


class BrokenIsNotFound(Kvm74):
    """A page whose memory is broken is nobody's to be had, and so not fallocate()'s."""

    def get_folio(self, index: int) -> Steps[tuple[Folio, Locked] | int]:
        found = yield from super().get_folio(index)
        if isinstance(found, int) or not found[1].hwpoison:
            return found
        yield from self.unlock_and_put(found[0])
        return -EHWPOISON


class ScrubsWhatGoes(Kvm74):
    """A page is zeroed before it leaves the file."""

    def truncate(self, folios: tuple[Held, ...]) -> Steps[None]:
        steps, result = super().truncate(folios), None
        while True:
            try:
                primitive = steps.send(result)
            except StopIteration:
                return
            if primitive.name == "filemap_remove_folio":
                yield from self.host.clear_folio_local(primitive.args[0])
            result = yield primitive


name_all(globals())

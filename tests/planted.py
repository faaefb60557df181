"""Mistakes planted in the library, a few lines each; tests/test_planted.py says which law catches each, and where.

Every class is the library with one thing wrong, the kind of thing a patch gets wrong: a call left out, two calls
swapped, an error path forgotten, a count off by one, a lock not taken.
"""

from __future__ import annotations

from errno import EAGAIN

from guest_memfd.core.convert import CACHE_AND_LOOKUP
from guest_memfd.core.gmem import Conversion, Grabbed, Held
from guest_memfd.core.ops import Reason
from guest_memfd.designs.ours import OurLibrary
from guest_memfd.hypervisors.gunyah.client import GunyahOps
from guest_memfd.hypervisors.kvm.default import KvmOps
from guest_memfd.words.primitives import Entries, Folio, Locked, Steps


def nothing() -> Steps[int]:
    yield from ()
    return 0


class NoFlush(OurLibrary):
    def flush(self, folios: tuple[Folio, ...]) -> Steps[None]:
        yield from nothing()


class FlushFirst(OurLibrary):
    def zap(self, folio: Folio) -> Steps[int]:
        yield from self.flush((folio,))
        return (yield from self.zap_noflush(folio))


class ZapFailureIgnored(OurLibrary):
    def zap(self, folio: Folio) -> Steps[int]:
        yield from super().zap(folio)
        return 0


class ZapFailureLeavesMark(OurLibrary):
    def zap_noflush(self, folio: Folio) -> Steps[int]:
        ret = yield from self.account(folio.nr)
        if not ret:
            yield from self.host.folio_set_no_direct_map(folio, True)
            ret = yield from self.host.set_direct_map_invalid_noflush(folio)
        return ret


class ZapFailureLeavesCount(OurLibrary):
    def zap_noflush(self, folio: Folio) -> Steps[int]:
        ret = yield from self.account(folio.nr)
        if not ret:
            ret = yield from self.host.set_direct_map_invalid_noflush(folio)
            if not ret:
                yield from self.host.folio_set_no_direct_map(folio, True)
        return ret


class GivenBeforeZapped(OurLibrary):
    def give_private(self, gfn: int, grabbed: Grabbed) -> Steps[int]:
        ret = yield from self.ops.prepare_private(gfn, grabbed.folio)
        if not ret and not grabbed.no_direct_map:
            ret = yield from self.zap(grabbed.folio)
        return ret


class NotZeroed(OurLibrary):
    def zero(self, folio: Folio) -> Steps[None]:
        yield from self.host.folio_mark_uptodate(folio)


class ZeroedTwice(OurLibrary):
    def zero(self, folio: Folio) -> Steps[None]:
        yield from self.host.clear_folio(folio)


class UserMappingStays(OurLibrary):
    def make_private_locked(self, start: int, nr: int) -> Steps[Conversion]:
        yield from self.host.gmem_invalidate_begin(start, nr)
        folios = yield from self.present(start, nr)
        result = yield from self.check_and_commit_private(start, nr, folios)
        yield from self.put_all(folios)
        yield from self.host.gmem_invalidate_end()
        return result


class KernelMappingStays(OurLibrary):
    def make_private_locked(self, start: int, nr: int) -> Steps[Conversion]:
        yield from self.host.unmap_mapping_pages(start, nr)
        folios = yield from self.present(start, nr)
        result = yield from self.check_and_commit_private(start, nr, folios)
        yield from self.put_all(folios)
        return result


class ReferencesIgnored(OurLibrary):
    def unexpected_refs(self, folios: tuple[Held, ...]) -> Steps[int | None]:
        yield from nothing()
        return None


class OnlyPinsCounted(OurLibrary):
    def unexpected_refs(self, folios: tuple[Held, ...]) -> Steps[int | None]:
        for held in folios:
            if (yield from self.host.folio_maybe_dma_pinned(held.folio)):
                return held.pgoff
        return None


class OneReferenceTooMany(OurLibrary):
    def unexpected_refs(self, folios: tuple[Held, ...]) -> Steps[int | None]:
        yield from self.host.lru_add_drain_all()
        for held in folios:
            if (yield from self.host.folio_ref_count(held.folio)) > CACHE_AND_LOOKUP + 1:
                return held.pgoff
        return None


class NoDrain(OurLibrary):
    def unexpected_refs(self, folios: tuple[Held, ...]) -> Steps[int | None]:
        for held in folios:
            if (yield from self.host.folio_ref_count(held.folio)) > CACHE_AND_LOOKUP:
                return held.pgoff
        return None


class WrongPageNamed(OurLibrary):
    def make_private_locked(self, start: int, nr: int) -> Steps[Conversion]:
        result = yield from super().make_private_locked(start, nr)
        return result if result.error_index is None else Conversion(result.ret, result.error_index + nr)


class CheckedBeforeUnmap(OurLibrary):
    def make_private_locked(self, start: int, nr: int) -> Steps[Conversion]:
        folios = yield from self.present(start, nr)
        busy = yield from self.unexpected_refs(folios)
        yield from self.put_all(folios)
        if busy is not None:
            return Conversion(-EAGAIN, busy)
        return (yield from ReferencesIgnored(self.ops, self.size).make_private_locked(start, nr))


class InvalidationNotEnded(OurLibrary):
    def remove_range(self, start: int, nr: int, reason: Reason) -> Steps[Conversion]:
        host = self.host
        yield from host.gmem_invalidate_begin(start, nr)
        yield from host.unmap_mapping_pages(start, nr)
        folios = yield from self.present(start, nr)
        ret, index = yield from self.invalidate_guest(folios, reason)
        if ret:
            yield from self.put_all(folios)
            return Conversion(ret, index)
        for held in folios:
            yield from self.remove_folio(held)
        yield from host.gmem_invalidate_end()
        return Conversion(0)


class ReferencesKeptOnRefusal(OurLibrary):
    def put_all(self, folios: tuple[Held, ...]) -> Steps[None]:
        if len(folios) > 1:
            yield from super().put_all(folios[1:])


class SharedWithoutAsking(OurLibrary):
    def give_to_host(self, folios: tuple[Held, ...]) -> Steps[Conversion]:
        yield from nothing()
        return Conversion(0)


class ConvertedInName(OurLibrary):
    def make_private_locked(self, start: int, nr: int) -> Steps[Conversion]:
        yield from self.host.unmap_mapping_pages(start, nr)
        return Conversion(0)


class AttributeFirst(OurLibrary):
    def check_and_commit_private(self, start: int, nr: int, folios: tuple[Held, ...]) -> Steps[Conversion]:
        ret = yield from self.host.tree_store("attributes", start, Entries(2, nr))
        if ret:
            return Conversion(ret)
        return (yield from super().check_and_commit_private(start, nr, folios))


class StoredWithoutReserve(OurLibrary):
    def make_shared_locked(self, start: int, nr: int) -> Steps[Conversion]:
        yield from self.host.gmem_invalidate_begin(start, nr)
        folios = yield from self.present(start, nr)
        result = yield from self.give_to_host(folios)
        yield from self.put_all(folios)
        if not result.ret:
            yield from self.host.tree_store_reserved("attributes", start, Entries(1, nr))
        yield from self.host.gmem_invalidate_end()
        return result


class FaultWithoutLock(OurLibrary):
    def guest_fault(self, gfn: int, index: int) -> Steps[int]:
        (bound,) = yield from self.host.tree_load("bindings", index, 1)
        return (yield from self.fault_bound(gfn, index)) if bound == gfn + 1 else -14


class UserFaultWithoutLock(OurLibrary):
    def user_fault(self, index: int) -> Steps[str]:
        return (yield from self.fault_shared(index))


class PunchWithoutLock(OurLibrary):
    def punch_hole(self, start: int, nr: int) -> Steps[Conversion]:
        return (yield from self.remove_range(start, nr, "punch"))


class ConvertsUnderSharedLock(OurLibrary):
    def make_private(self, start: int, nr: int) -> Steps[Conversion]:
        yield from self.host.down_read("invalidate")
        result = yield from self.make_private_locked(start, nr)
        yield from self.host.up_read("invalidate")
        return result


class LockKeptOnError(OurLibrary):
    def make_private(self, start: int, nr: int) -> Steps[Conversion]:
        yield from self.host.down_write("invalidate")
        result = yield from self.make_private_locked(start, nr)
        if not result.ret:
            yield from self.host.up_write("invalidate")
        return result


class AttributeNotAsked(OurLibrary):
    def fault_shared(self, index: int) -> Steps[str]:
        grabbed = yield from self.grab_folio(index)
        if isinstance(grabbed, int):
            return "SIGBUS"
        mapped = yield from self.host.vmf_insert_folio(index, grabbed.folio)
        yield from self.unlock_and_put(grabbed.folio)
        return "ok" if mapped else "retry"


class NotRestoredForHost(OurLibrary):
    def make_accessible(self, grabbed: Grabbed) -> Steps[int]:
        return (yield from nothing())


class FreedWithHole(OurLibrary):
    def return_to_kernel(self, held: Held, marked: bool) -> Steps[None]:
        if held.private and not self.ops.scrubs:
            yield from self.host.clear_folio_local(held.folio)


class FreedWithSecrets(OurLibrary):
    def return_to_kernel(self, held: Held, marked: bool) -> Steps[None]:
        if marked:
            yield from self.restore(held.folio)


class RestoredBeforeScrub(OurLibrary):
    def return_to_kernel(self, held: Held, marked: bool) -> Steps[None]:
        if marked:
            yield from self.restore(held.folio)
        yield from self.host.clear_folio(held.folio)


class RestoredOnce(OurLibrary):
    def restore(self, folio: Folio) -> Steps[int]:
        ret = yield from self.host.set_direct_map_default_noflush(folio)
        yield from self.host.folio_set_no_direct_map(folio, False)
        yield from self.account(-folio.nr)
        return ret


class NotTakenBack(OurLibrary):
    def take_back(self, held: Held) -> Steps[int]:
        return (yield from nothing())


class TakenBackOnce(OurLibrary):
    def take_back(self, held: Held) -> Steps[int]:
        if held.gfn is None or not held.private:
            return 0
        yield from self.ops.reclaim(held.gfn, held.folio)
        return 0


class LookupLeaked(OurLibrary):
    def remove_folio(self, held: Held) -> Steps[int]:
        yield from self.host.folio_get(held.folio, "provided")
        return (yield from super().remove_folio(held))


class PutTwice(OurLibrary):
    def remove_folio(self, held: Held) -> Steps[int]:
        ret = yield from super().remove_folio(held)
        yield from self.host.folio_put(held.folio)
        return ret


class ModuleNotHeld(OurLibrary):
    def create(self, size: int, shared: tuple[int, ...] = ()) -> Steps[int]:
        ret = yield from super().create(size, shared)
        yield from self.host.module_put()
        return ret

    def evict(self) -> Steps[None]:
        yield from self.host.try_module_get()
        yield from super().evict()


class ModuleNotPut(OurLibrary):
    def evict(self) -> Steps[None]:
        yield from self.host.try_module_get()
        yield from super().evict()


class NoVeto(OurLibrary):
    power = "none"


class DoorLeftOpen(OurLibrary):
    def hibernate_prepare(self) -> Steps[int]:
        ret = yield from super().hibernate_prepare()
        if not ret:
            yield from self.host.pm_post()
        return ret


class RefusalIgnored(OurLibrary):
    def punch_hole(self, start: int, nr: int) -> Steps[Conversion]:
        yield from self.host.begin_op("punch", start, nr)
        yield from self.host.down_write("invalidate")
        yield from self.remove_range(start, nr, "punch")
        yield from self.host.end_op(0)
        yield from self.host.up_write("invalidate")
        return Conversion(0)


class OnePageTooMany(OurLibrary):
    def remove_range(self, start: int, nr: int, reason: Reason) -> Steps[Conversion]:
        return (yield from super().remove_range(start, min(nr + 1, self.size - start), reason))


class BindingKeptAtTeardown(OurLibrary):
    def vm_teardown(self) -> Steps[int]:
        yield from self.host.down_write("invalidate")
        yield from self.unbind_locked(0, self.size, "teardown")
        yield from self.host.up_write("invalidate")
        return 0


class UnmapWithoutSync(GunyahOps):
    def invalidate(self, gfn: int, folio: Folio, private: bool, reason: Reason) -> Steps[int]:
        kind = "unmap_private" if private else "unmap_vmmio"
        ret = yield from self.host.hyp_call(kind, gfn, folio, False)
        if private or ret not in (0, -22):
            return 0 if ret == -22 else ret
        ret = yield from self.host.hyp_call("donate_from_sibling", folio)
        return 0 if ret == -22 else ret


class NotUnmapped(KvmOps):
    def invalidate(self, gfn: int, folio: Folio, private: bool, reason: Reason) -> Steps[int]:
        return (yield from nothing())


class ReadThenLocked(OurLibrary):
    def user_fault(self, index: int) -> Steps[str]:
        (attribute,) = yield from self.host.tree_load("attributes", index, 1)
        yield from self.host.down_read("invalidate")
        answer = "SIGBUS" if attribute == 2 else (yield from AttributeNotAsked(self.ops, self.size).fault_shared(index))
        yield from self.host.up_read("invalidate")
        return answer


class WaitsUnderFolioLock(OurLibrary):
    def error_folio(self, folio: Folio, locked: Locked) -> Steps[str]:
        yield from self.host.down_read("invalidate")
        yield from self.host.up_read("invalidate")
        return (yield from super().error_folio(folio, locked))


class PostForgotten(OurLibrary):
    def hibernate_post(self) -> Steps[None]:
        yield from nothing()


class WipesOnTheWayBack(OurLibrary):
    def make_accessible(self, grabbed: Grabbed) -> Steps[int]:
        ret = yield from super().make_accessible(grabbed)
        yield from self.host.clear_folio(grabbed.folio)
        return ret


class ReferencePerBinding(OurLibrary):
    def bind(self, gfn: int, start: int, nr: int) -> Steps[int]:
        yield from self.host.get_file()
        return (yield from super().bind(gfn, start, nr))

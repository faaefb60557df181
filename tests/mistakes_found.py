"""Mistakes that somebody found who looked for what no law sees: each held in the whole suite once.

Rule of this file: each is a `Spot` of tests/test_blind_spots.py, with the law that sees it now.
"""

from __future__ import annotations

from dataclasses import replace
from errno import EAGAIN, EBUSY, EFAULT, ENOMEM

from leave_out import without

from guest_memfd.core.gmem import Conversion, Held, filled
from guest_memfd.core.ops import Reason
from guest_memfd.designs.ours import OurLibrary
from guest_memfd.hypervisors.gunyah import client
from guest_memfd.words.primitives import Entries, Folio, Locked, Steps

# -- contents that nobody asked to lose --------------------------------------------------------------------------------


class Truncates(OurLibrary):
    """What an operation has done with is taken out of the file."""

    bounds = {op: bound for op, bound in OurLibrary.bounds.items() if op in ("fault", "user_fault", "punch")}

    def drop(self, folios: tuple[Held, ...]) -> Steps[None]:
        for held in folios:
            yield from self.host.unmap_mapping_pages(held.pgoff, held.folio.nr)
            locked = yield from self.host.lock_folio(held.folio)
            if locked.no_direct_map:
                yield from self.return_to_kernel(held, True)
            yield from self.host.filemap_remove_folio(held.folio)
            yield from self.host.unlock_folio(held.folio)


class ToSharedTruncates(Truncates):
    """A page that becomes shared is a new one."""

    def give_to_host(self, folios: tuple[Held, ...]) -> Steps[Conversion]:
        result = yield from super().give_to_host(folios)
        if not result.ret:
            yield from self.drop(folios)
        return result


class ToPrivateTruncates(Truncates):
    """So is one that becomes private."""

    def check_and_commit_private(self, start: int, nr: int, folios: tuple[Held, ...]) -> Steps[Conversion]:
        result = yield from super().check_and_commit_private(start, nr, folios)
        if not result.ret:
            yield from self.drop(folios)
        return result


class FailureTruncates(OurLibrary):
    """A conversion that fails throws its range away."""

    bounds = Truncates.bounds

    def make_private_locked(self, start: int, nr: int) -> Steps[Conversion]:
        result = yield from super().make_private_locked(start, nr)
        if result.ret == -ENOMEM:
            yield from self.remove_range(start, nr, "punch")
        return result


class UnbindTruncates(Truncates):
    """Deleting a memslot empties its part of the file."""

    def take_all_back(self, folios: tuple[Held, ...], *, leaks: bool) -> Steps[tuple[int, int]]:
        ret, index = yield from super().take_all_back(folios, leaks=leaks)
        if not ret and not leaks:
            yield from self.drop(folios)
        return ret, index


class TeardownTruncates(Truncates):
    """The death of a VM empties a file that the VMM still has open."""

    def take_all_back(self, folios: tuple[Held, ...], *, leaks: bool) -> Steps[tuple[int, int]]:
        ret, index = yield from super().take_all_back(folios, leaks=leaks)
        if not ret and leaks:
            yield from self.drop(folios)
        return ret, index


class UnbindScrubs(OurLibrary):
    """Deleting a memslot zeroes the guest's pages, which stay in the file."""

    def take_all_back(self, folios: tuple[Held, ...], *, leaks: bool) -> Steps[tuple[int, int]]:
        ret, index = yield from super().take_all_back(folios, leaks=leaks)
        if not ret and not leaks:
            for held in folios:
                yield from self.host.clear_folio_local(held.folio)
        return ret, index


class PoisonTruncates(OurLibrary):
    """memory_failure() takes the page out of the file: the next fault finds zeros, and not that the memory is broken."""

    def take_from_users(self, folio: Folio) -> Steps[int]:
        ret = yield from super().take_from_users(folio)
        locked = yield from self.host.lock_folio(folio)
        if not ret and locked.pgoff is not None:
            if locked.no_direct_map:
                yield from self.account(-folio.nr)
            yield from self.host.filemap_remove_folio(folio)
        yield from self.host.unlock_folio(folio)
        return ret


class PoisonScrubbed(OurLibrary):
    """Broken memory is written to when it leaves the file."""

    def remove_folio(self, held: Held) -> Steps[int]:
        yield from self.host.clear_folio_local(held.folio)
        return (yield from super().remove_folio(held))


class GunyahScrubs(client.GunyahOps):
    """A page that the guest has relinquished for a conversion loses its contents."""

    def make_shared(self, gfn: int, folio: Folio) -> Steps[int]:
        ret = yield from super().make_shared(gfn, folio)
        if not ret:
            yield from self.host.clear_folio_local(folio)
        return ret


# -- half of what was asked for ----------------------------------------------------------------------------------------


class PartlyUnbound(OurLibrary):
    """A refused unbind has taken the bindings before the page that refused."""

    def unbind_locked(self, start: int, nr: int, reason: Reason) -> Steps[tuple[Conversion, bool]]:
        bound = yield from self.host.tree_load("bindings", 0, self.size)
        result, last = yield from super().unbind_locked(start, nr, reason)
        if result.ret == -EBUSY and result.error_index is not None and result.error_index > start:
            gone = result.error_index - start
            yield from self.host.gmem_invalidate_begin(start, gone)
            yield from self.host.tree_store_reserved("bindings", start, Entries(0, gone))
            yield from self.host.gmem_invalidate_end()
            last = filled(bound) == filled(bound[start:start + gone])
        return result, last


class BindLeavesPart(OurLibrary):
    """A bind that runs out of memory leaves the pages that it has bound."""

    def bind(self, gfn: int, start: int, nr: int) -> Steps[int]:
        steps, result = super().bind(gfn, start, nr), None
        while True:
            try:
                primitive = steps.send(result)
            except StopIteration as stop:
                return int(stop.value)
            if primitive.name == "tree_store" and nr > 1:
                for at in range(nr):
                    result = yield from self.host.tree_store("bindings", start + at, Entries(gfn + 1 + at, 1, 1))
                    if result:
                        break
            else:
                result = yield primitive


class Removes(OurLibrary):
    """A punch that takes its pages one after the other, in some order."""

    def order_of(self, folios: tuple[Held, ...]) -> tuple[Held, ...]:
        return folios

    def ask_first(self, folios: tuple[Held, ...], reason: Reason) -> Steps[tuple[int, int]]:
        return (yield from self.invalidate_guest(folios, reason))

    def ask(self, held: Held, reason: Reason) -> Steps[tuple[int, int]]:
        yield from ()
        return 0, 0

    def remove_range(self, start: int, nr: int, reason: Reason) -> Steps[Conversion]:
        host = self.host
        yield from host.gmem_invalidate_begin(start, nr)
        yield from host.unmap_mapping_pages(start, nr)
        folios = self.order_of((yield from self.present(start, nr)))
        ret, index = yield from self.ask_first(folios, reason)
        removed = 0
        while not ret and removed < len(folios):
            ret, index = yield from self.ask(folios[removed], reason)
            if not ret:
                ret, index = (yield from self.remove_folio(folios[removed])), folios[removed].pgoff
            removed += not ret
        yield from self.put_all(folios[removed:])
        yield from host.gmem_invalidate_end()
        return Conversion(ret, max(index, start)) if ret else Conversion(0)


class RemovesBackwards(Removes):
    """A punch that fails has removed the pages after the one that it names."""

    def order_of(self, folios: tuple[Held, ...]) -> tuple[Held, ...]:
        return folios[::-1]


class AsksOneByOne(Removes):
    """A punch asks for a page, removes it, and asks for the next."""

    def ask_first(self, folios: tuple[Held, ...], reason: Reason) -> Steps[tuple[int, int]]:
        yield from ()
        return 0, 0

    def ask(self, held: Held, reason: Reason) -> Steps[tuple[int, int]]:
        return (yield from self.invalidate_guest((held,), reason))


# -- who is told -------------------------------------------------------------------------------------------------------


class NeverReleases(OurLibrary):
    """The hypervisor's half is never told that all is over."""

    def vm_teardown(self) -> Steps[int]:
        return (yield from without(super().vm_teardown(), "ops_released"))


class GunyahNeverReleases(client.GunyahOps):
    """A driver's `release` that leaves the base class out."""

    def release(self) -> Steps[None]:
        yield from ()


class UnbindTellsNoCache(OurLibrary):
    """A gfn_to_pfn_cache goes on through a memslot that is gone, and nothing can reach it after that."""

    def unbind_locked(self, start: int, nr: int, reason: Reason) -> Steps[tuple[Conversion, bool]]:
        steps = super().unbind_locked(start, nr, reason)
        quiet = () if reason == "teardown" else ("gmem_invalidate_begin", "gmem_invalidate_end")
        return (yield from without(steps, *quiet))


class ErrorWantsTheFile(OurLibrary):
    """memory_failure()'s handler gives up when the file has gone, though a mapping keeps its inode and shows the page."""

    def error_folio(self, folio: Folio, locked: Locked) -> Steps[str]:
        if not (yield from self.host.get_file()):
            return "failed"
        result = yield from super().error_folio(folio, locked)
        yield from self.close()
        return result


class MunmapEvictsBare(OurLibrary):
    """Where munmap() ends the file its pages are not scrubbed."""

    def munmap(self) -> Steps[None]:
        if (yield from self.host.munmap()):
            yield from without(self.evict(), "clear_folio_local")


class NeverHibernates(OurLibrary):
    """Hibernation is refused, whether a page is away from the host or not."""

    def hibernate_prepare(self) -> Steps[int]:
        if not (yield from super().hibernate_prepare()):
            yield from super().hibernate_post()
        return -EBUSY


class EnomemIsEagain(OurLibrary):
    """Want of memory is told as a page that is busy, and of no page."""

    def make_shared_locked(self, start: int, nr: int) -> Steps[Conversion]:
        result = yield from super().make_shared_locked(start, nr)
        return Conversion(-EAGAIN) if result.ret == -ENOMEM else result


# -- other than what was asked for, and other than what was done -------------------------------------------------------


class ConvertsTheFirst(OurLibrary):
    """A conversion to private of the first page of its range, whatever its length."""

    def make_private(self, start: int, nr: int) -> Steps[Conversion]:
        return (yield from super().make_private(start, min(nr, 1)))


class PunchesFromZero(OurLibrary):
    """A punch of as many pages as were asked for, from the beginning of the file on."""

    def punch_hole(self, start: int, nr: int) -> Steps[Conversion]:
        return (yield from super().punch_hole(0, nr))


class FaultsPageZero(OurLibrary):
    """A VMM's fault of any page maps the first."""

    def user_fault(self, index: int) -> Steps[str]:
        return (yield from super().user_fault(0))


class FaultLies(OurLibrary):
    """A VMM's fault maps the page, and the answer is SIGBUS."""

    def user_fault(self, index: int) -> Steps[str]:
        yield from super().user_fault(index)
        return "SIGBUS"


class FaultTriesTheLock(OurLibrary):
    """A VMM is killed because another of its threads converts a page."""

    def user_fault(self, index: int) -> Steps[str]:
        host = self.host
        yield from host.begin_op("user_fault", index, 1)
        taken = yield from host.down_read_trylock("invalidate")
        answer = (yield from self.fault_shared(index)) if taken else "SIGBUS"
        yield from host.end_op(-EFAULT if answer == "SIGBUS" else 0)
        if taken:
            yield from host.up_read("invalidate")
        return answer


class BindsBeside(OurLibrary):
    """A memslot of one page, not the first, is bound a gfn further on."""

    def bind(self, gfn: int, start: int, nr: int) -> Steps[int]:
        return (yield from super().bind(gfn + int(start > 0 and nr == 1), start, nr))


class LosesTheIndex(OurLibrary):
    """Which page refused is known in the end, and not to the caller."""

    def make_private(self, start: int, nr: int) -> Steps[Conversion]:
        result = yield from super().make_private(start, nr)
        return result._replace(error_index=start if result.ret else None)


class EnomemBlamesAPage(OurLibrary):
    """Want of memory is told as a page that is busy, and a page is named that is not."""

    def make_shared_locked(self, start: int, nr: int) -> Steps[Conversion]:
        result = yield from super().make_shared_locked(start, nr)
        return Conversion(-EAGAIN, start) if result.ret == -ENOMEM else result


class AsksForWhatIsSo(OurLibrary):
    """A conversion asks the hypervisor for pages of which it has nothing to change, and a guest that has one refuses."""

    def check_and_commit_private(self, start: int, nr: int, folios: tuple[Held, ...]) -> Steps[Conversion]:
        yield from self.put_all(folios)
        everything = yield from self.present(start, nr)
        result = yield from super().check_and_commit_private(start, nr, everything)
        yield from self.put_all(tuple(held for held in everything if held not in folios))
        return result


class PunchMindsPins(OurLibrary):
    """A page that a device has pinned cannot be punched out."""

    def remove_range(self, start: int, nr: int, reason: Reason) -> Steps[Conversion]:
        folios = yield from self.present(start, nr)
        busy = None
        for held in folios:
            if (yield from self.host.folio_ref_count(held.folio)) > 3:
                busy = held.pgoff
        yield from self.put_all(folios)
        if busy is not None:
            return Conversion(-EBUSY, busy)
        return (yield from super().remove_range(start, nr, reason))


class NestedInvalidation(OurLibrary):
    """No mistake: one invalidation inside of another, as KVM counts them."""

    def give_to_host(self, folios: tuple[Held, ...]) -> Steps[Conversion]:
        for held in folios:
            yield from self.host.gmem_invalidate_begin(held.pgoff, held.folio.nr)
            yield from self.host.gmem_invalidate_end()
        return (yield from super().give_to_host(folios))


SCRUBS = replace(client.GUNYAH, ops=GunyahScrubs)
NEVER_RELEASES = replace(client.GUNYAH, ops=GunyahNeverReleases)

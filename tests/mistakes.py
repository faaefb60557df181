"""Mistakes that every law let pass once, or that larger scenes showed: the library with one of them each.

tests/test_blind_spots.py says which law sees each now, where, and in how many steps.
"""

from __future__ import annotations

from dataclasses import replace
from errno import EBADF, EEXIST, EFAULT, EINVAL, EIO, ENODEV, ENOENT, ENOMEM, EPERM
from typing import Any

from leave_out import answered, without

from guest_memfd.core.gmem import Conversion, Grabbed, Held, filled
from guest_memfd.core.hypervisor import Stage2
from guest_memfd.core.ops import Reason
from guest_memfd.designs.ours import OurLibrary
from guest_memfd.errors import EHWPOISON
from guest_memfd.hypervisors.kvm import pkvm
from guest_memfd.words.pagestate import PRIVATE_PAGE, SHARED_PAGE
from guest_memfd.words.primitives import Bound, Entries, Folio, Locked, Steps

# -- of the library ----------------------------------------------------------------------------------------------------


class FileNotHeld(OurLibrary):
    """A vCPU on its way into the file holds nothing of it."""

    def guest_fault(self, gfn: int, index: int) -> Steps[int]:
        host = self.host
        yield from host.begin_op("fault", index, 1, gfn)
        yield from host.down_read("invalidate")
        (bound,) = yield from host.tree_load("bindings", index, 1)
        ret = (yield from self.fault_bound(gfn, index)) if bound == gfn + 1 else -EFAULT
        yield from host.end_op(ret)
        yield from host.up_read("invalidate")
        return ret


class UnbindNotHeld(OurLibrary):
    """Nor does an unbind, while it waits for the lock."""

    def unbind(self, start: int, nr: int) -> Steps[Conversion]:
        yield from self.host.begin_op("unbind", start, nr)
        yield from self.host.down_write("invalidate")
        result, last = yield from self.unbind_locked(start, nr, "unbind")
        yield from self.host.end_op(result.ret, result.error_index)
        yield from self.host.up_write("invalidate")
        if last:
            yield from self.close()
        return result


class BindsToTheDead(OurLibrary):
    """A binding to a VM that has been stopped: nobody takes it away."""

    def bind(self, gfn: int, start: int, nr: int) -> Steps[int]:
        return (yield from answered(super().bind(gfn, start, nr), {"vm_state": "running"}))


class LastBeforeTheLock(OurLibrary):
    """Whether a binding is the last one of the file is found out before the lock is taken."""

    def unbind(self, start: int, nr: int) -> Steps[Conversion]:
        bound = yield from self.host.tree_load("bindings", 0, self.size)
        yield from self.host.begin_op("unbind", start, nr)
        if not (yield from self.host.get_file()):
            yield from self.host.end_op(-ENOENT)
            return Conversion(-ENOENT)
        yield from self.host.down_write("invalidate")
        result, _ = yield from self.unbind_locked(start, nr, "unbind")
        yield from self.host.end_op(result.ret, result.error_index)
        yield from self.host.up_write("invalidate")
        if not result.ret and filled(bound) == filled(bound[start:start + nr]):
            yield from self.close()
        yield from self.close()
        return result


class Removal(OurLibrary):
    """A punch with parts that can be left out."""

    tells_user = tells_caches = True

    def remove_range(self, start: int, nr: int, reason: Reason) -> Steps[Conversion]:
        host = self.host
        if self.tells_caches:
            yield from host.gmem_invalidate_begin(start, nr)
        if self.tells_user:
            yield from host.unmap_mapping_pages(start, nr)
        folios = yield from self.present(start, nr)
        ret, index = yield from self.invalidate_guest(folios, reason)
        for held in folios:
            if ret:
                yield from host.folio_put(held.folio)
            else:
                yield from self.remove_folio(held)
        if self.tells_caches:
            yield from host.gmem_invalidate_end()
        return Conversion(ret, index) if ret else Conversion(0)


class PunchLeavesUserEntries(Removal):
    tells_user = False


class PunchTellsNoCache(Removal):
    tells_caches = False


class FaultMapsNothing(OurLibrary):
    def give_private(self, gfn: int, grabbed: Grabbed) -> Steps[int]:
        yield from ()
        return 0


class PoisonServed(OurLibrary):
    def grab_folio(self, index: int) -> Steps[Grabbed | int]:
        grabbed = yield from super().grab_folio(index)
        if grabbed != -EHWPOISON:
            return grabbed
        hit = yield from self.host.filemap_get_folio(index)
        assert hit is not None
        locked = yield from self.host.lock_folio(hit.folio)
        return Grabbed(hit.folio, hit.pgoff, locked.no_direct_map)


class PoisonStays(OurLibrary):
    def take_from_users(self, folio: Folio) -> Steps[int]:
        yield from ()
        return 0


class DelayedIsFailure(OurLibrary):
    def error_folio(self, folio: Folio, locked: Locked) -> Steps[str]:
        yield from super().error_folio(folio, locked)
        return "failed"


class OnlyTriesTheLock(OurLibrary):
    """memory_failure() leaves the page with the guest when somebody is just changing the file."""

    def error_folio(self, folio: Folio, locked: Locked) -> Steps[str]:
        host = self.host
        if locked.pgoff is None or not (yield from host.down_read_trylock("invalidate")):
            return "failed"
        yield from host.unlock_folio(folio)
        ret = yield from self.take_from_users(folio)
        yield from host.lock_folio(folio)
        yield from host.up_read("invalidate")
        return "failed" if ret else "delayed"


class PoisonRestored(OurLibrary):
    """A page whose memory is broken is put back into the direct map when it leaves the file."""

    def remove_folio(self, held: Held) -> Steps[int]:
        host, folio = self.host, held.folio
        locked = yield from host.lock_folio(folio)
        yield from self.return_to_kernel(held, locked.no_direct_map)
        yield from host.filemap_remove_folio(folio)
        yield from self.unlock_and_put(folio)
        return 0


class AllocateDonates(OurLibrary):
    """fallocate() gives pages to the guest long before it has asked for them."""

    def allocate(self, start: int, nr: int) -> Steps[int]:
        host = self.host
        yield from host.begin_op("allocate", start, nr)
        yield from host.down_read("invalidate")
        ret = 0
        for index in range(start, start + nr):
            (attribute,) = yield from host.tree_load("attributes", index, 1)
            (bound,) = yield from host.tree_load("bindings", index, 1)
            grabbed = yield from self.grab_folio(index)
            if isinstance(grabbed, int):
                ret = grabbed
                break
            if attribute == 2 and bound:
                ret = yield from self.give_private(bound - 1, grabbed)
            yield from self.unlock_and_put(grabbed.folio)
            if ret:
                break
        yield from host.end_op(ret, start if ret else None)
        yield from host.up_read("invalidate")
        return ret


class FreesWhatIsRefused(OurLibrary):
    """A page that will never come back is freed like any other."""

    def leak(self, held: Held) -> Steps[None]:
        yield from self.host.unmap_mapping_pages(held.pgoff, held.folio.nr)
        yield from self.host.filemap_remove_folio(held.folio)


class LeaksTwice(OurLibrary):
    def leak(self, held: Held) -> Steps[None]:
        yield from self.host.leak_folio(held.folio)
        yield from super().leak(held)


class LeaksAtOnce(OurLibrary):
    """A hypervisor that is only busy is taken for one that has refused for good."""

    def take_back(self, held: Held) -> Steps[int]:
        if held.gfn is None or not held.private:
            return 0
        ret = yield from self.ops.reclaim(held.gfn, held.folio)
        return -EIO if ret else 0


class AnyKernelWillDo(OurLibrary):
    """create() does not ask whether the direct map can be changed."""

    def create(self, size: int, shared: tuple[int, ...] = ()) -> Steps[int]:
        return (yield from answered(super().create(size, shared), {"can_set_direct_map": True}))


class ReadersWelcome(OurLibrary):
    """The mapping does not say that readers of page-cache folios must keep out."""

    def alloc_inode(self) -> Steps[int]:
        ret = yield from self.host.alloc_inode()
        if ret:
            yield from self.host.module_put()
        return ret


# -- of pKVM's half ----------------------------------------------------------------------------------------------------


class AsksThenActs(pkvm.PkvmOps):
    """Whether the guest has died is asked in one call, and acted upon in none: a borrowed page stays the guest's."""

    def invalidate(self, gfn: int, folio: Folio, private: bool, reason: Reason) -> Steps[int]:
        if not private:
            ret = yield from self.host.hyp_call("unshare_guest", gfn, folio)
            if ret != -ENOENT or reason == "to_private":
                return 0 if ret == -ENOENT else ret
        if reason == "teardown":
            return 0 if private else (yield from self.reclaim(gfn, folio))
        return (yield from self.host.hyp_call("check_consent", gfn, folio, reason == "to_shared"))


def _take_from_host(stage2: Stage2, gfn: int, folio: Folio) -> int:
    if stage2.owner(folio.pfn) != "host":
        return -EPERM
    stage2.set_owner(folio.pfn, "guest")
    stage2.host_maps(folio.pfn, False)
    return 0


def _map_guest(stage2: Stage2, gfn: int, folio: Folio) -> int:
    stage2.guest_map(gfn, folio.pfn)
    stage2.set_locked_in(folio.pfn, True)
    return 0


class HalfDone(pkvm.PkvmOps):
    """The host's side of a donation is done, the guest's fails, nothing is undone; the next -EPERM is called success."""

    def prepare_private(self, gfn: int, folio: Folio) -> Steps[int]:
        ret = yield from self.host.hyp_call("take_from_host", gfn, folio)
        if ret:
            return 0 if ret == -EPERM else ret
        return (yield from self.host.hyp_call("map_guest", gfn, folio))


CALLS: dict[str, Any] = {**pkvm.PKVM.hypercalls, "take_from_host": _take_from_host, "map_guest": _map_guest}
HALF_DONE = replace(pkvm.PKVM, ops=HalfDone, hypercalls=CALLS, fallible={**pkvm.PKVM.fallible, "map_guest": -ENOMEM})
ASKS_THEN_ACTS = replace(pkvm.PKVM, ops=AsksThenActs)


class KeepsConsent(pkvm.PkvmOps):
    """EL2 is not told that a page is private again: the guest's consent to the last conversion stays, for the next one."""

    def make_private(self, gfn: int, folio: Folio) -> Steps[None]:
        yield from ()


KEEPS_CONSENT = replace(pkvm.PKVM, ops=KeepsConsent)


# -- what one scene shows and the others do not (tests/test_scenes.py) ------------------------------------------------


class LooksUp(OurLibrary):
    """The library's fault, with its look at the binding in a procedure of its own."""

    def is_bound(self, gfn: int, index: int) -> Steps[bool]:
        (bound,) = yield from self.host.tree_load("bindings", index, 1)
        return bool(bound == gfn + 1)

    def guest_fault(self, gfn: int, index: int) -> Steps[int]:
        host = self.host
        yield from host.begin_op("fault", index, 1, gfn)
        if not (yield from host.get_file()):
            yield from host.end_op(-EFAULT)
            return -EFAULT
        yield from host.down_read("invalidate")
        ret = (yield from self.fault_bound(gfn, index)) if (yield from self.is_bound(gfn, index)) else -EFAULT
        yield from host.end_op(ret)
        yield from host.up_read("invalidate")
        yield from self.close()
        return ret


class GfnIsIndex(LooksUp):
    """The binding is looked up at the gfn."""

    def is_bound(self, gfn: int, index: int) -> Steps[bool]:
        (bound,) = yield from self.host.tree_load("bindings", gfn, 1)
        return bool(bound == gfn + 1)


class OnlyTheFirstComesBack(OurLibrary):
    def take_back(self, held: Held) -> Steps[int]:
        return 0 if held.pgoff else (yield from super().take_back(held))


class UnmapsTheLast(OurLibrary):
    """A conversion unmaps only the last page of its range from the VMM."""

    def make_private_locked(self, start: int, nr: int) -> Steps[Conversion]:
        host = self.host
        yield from host.unmap_mapping_pages(start + nr - 1, 1)
        yield from host.gmem_invalidate_begin(start, nr)
        folios = yield from self.present(start, nr)
        result = yield from self.check_and_commit_private(start, nr, folios)
        yield from self.put_all(folios)
        yield from host.gmem_invalidate_end()
        return result


class AsksForTheUnbound(OurLibrary):
    """The hypervisor is asked for pages that it has never been given."""

    def invalidate_guest(self, folios: tuple[Held, ...], reason: Reason) -> Steps[tuple[int, int]]:
        bound = tuple(held if held.gfn is not None else held._replace(gfn=-1) for held in folios)
        return (yield from super().invalidate_guest(bound, reason))


class CreateKeepsTheModule(OurLibrary):
    """A create() that fails does not let go of the module."""

    def alloc_inode(self) -> Steps[int]:
        ret = yield from self.host.alloc_inode()
        if not ret:
            yield from self.host.mapping_set_no_direct_map()
        return ret


class VetoesForOneFile(OurLibrary):
    """Hibernation is refused while a file is open, but not while two are."""

    power = "none"

    def hibernate_prepare(self) -> Steps[int]:
        return -EPERM if (yield from self.host.open_files()) == 1 else 0


class CountsTheFirst(OurLibrary):
    """References are counted of the first folio of a range only."""

    def unexpected_refs(self, folios: tuple[Held, ...]) -> Steps[int | None]:
        return (yield from super().unexpected_refs(folios[:1]))


class SharesUnannounced(OurLibrary):
    """Who else looks at attributes - a fault that is being handled without the lock - never hears that they change."""

    def make_shared_locked(self, start: int, nr: int) -> Steps[Conversion]:
        return (yield from without(super().make_shared_locked(start, nr), "gmem_invalidate_begin", "gmem_invalidate_end"))


class RestoresOnce(OurLibrary):
    """Where leaves are merged again, putting a page back may have to split one, and can fail."""

    def restore(self, folio: Folio) -> Steps[int]:
        ret = yield from self.host.set_direct_map_default_noflush(folio)
        if not ret:
            yield from self.host.folio_set_no_direct_map(folio, False)
            yield from self.account(-folio.nr)
        return ret


# -- of its locks, its order, and what it tells ------------------------------------------------------------------------


class BoundAnywhere(LooksUp):
    """A fault looks whether the page is bound, and not whether it is bound there."""

    def is_bound(self, gfn: int, index: int) -> Steps[bool]:
        (bound,) = yield from self.host.tree_load("bindings", index, 1)
        return bool(bound)


class BindOverwrites(OurLibrary):
    """A bind does not look whether some of its range is bound."""

    def taken(self, bound: tuple[int, ...]) -> bool:
        return False

    def bind(self, gfn: int, start: int, nr: int) -> Steps[int]:
        host = self.host
        if not self.has(start, nr):
            return -EINVAL
        yield from host.begin_op("bind", start, nr)
        if not (yield from host.get_file()):
            yield from host.end_op(-EBADF)
            return -EBADF
        yield from host.down_write("invalidate")
        bound = yield from host.tree_load("bindings", 0, self.size)
        if self.taken(bound[start:start + nr]):
            ret = -EEXIST
        elif (yield from host.vm_state()) != "running":
            ret = -ENODEV
        else:
            ret = yield from host.tree_store("bindings", start, Entries(gfn + 1, nr, 1))
        yield from host.end_op(ret)
        yield from host.up_write("invalidate")
        if ret or any(bound):
            yield from self.close()
        return ret


class BindLooksAtBothEnds(BindOverwrites):
    """A bind looks at the first and the last page of its range."""

    def taken(self, bound: tuple[int, ...]) -> bool:
        return bool(bound[0] or bound[-1])


class LooksAtBothEnds(OurLibrary):
    """Nothing is to be done when the first and the last page are private: those between them are not looked at."""

    def make_private_locked(self, start: int, nr: int) -> Steps[Conversion]:
        attributes = yield from self.host.tree_load("attributes", start, nr)
        if attributes[0] == attributes[nr - 1] == PRIVATE_PAGE:
            return Conversion(0)
        return (yield from super().make_private_locked(start, nr))


class ReleasesEarly(OurLibrary):
    """The hypervisor's half is told that all is over, and then asked to give the pages back."""

    def vm_teardown(self) -> Steps[int]:
        yield from self.ops.release()
        return (yield from super().vm_teardown())


class ReleasesTwice(OurLibrary):
    """The hypervisor's half is told that all is over, and told again."""

    def vm_teardown(self) -> Steps[int]:
        ret = yield from super().vm_teardown()
        if not ret:
            yield from self.ops.release()
        return ret


class FlagAfterInstall(OurLibrary):
    """AS_NO_DIRECT_MAP is set when others can use the file already."""

    def alloc_inode(self) -> Steps[int]:
        return (yield from without(super().alloc_inode(), "mapping_set_no_direct_map"))

    def create(self, size: int, shared: tuple[int, ...] = ()) -> Steps[int]:
        ret = yield from super().create(size, shared)
        if not ret:
            yield from self.host.mapping_set_no_direct_map()
        return ret


class TeardownRestores(OurLibrary):
    """A dying VM's pages go back into the direct map when they are taken back, and are scrubbed when they are freed."""

    bounds = {**OurLibrary.bounds, "teardown": Bound(writes=2, calls=4)}

    def take_back(self, held: Held) -> Steps[int]:
        ret = yield from super().take_back(held)
        if not ret and held.private:
            yield from self.restore(held.folio)
        return ret


class EvictRestoresFirst(OurLibrary):
    """The end of the inode puts all of its pages back into the direct map, and scrubs them afterwards."""

    def remove_range(self, start: int, nr: int, reason: Reason) -> Steps[Conversion]:
        folios = yield from self.present(start, nr)
        for held in folios:
            locked = yield from self.host.lock_folio(held.folio)
            if locked.no_direct_map and not locked.hwpoison:
                yield from self.restore(held.folio)
            yield from self.host.unlock_folio(held.folio)
        yield from self.put_all(folios)
        return (yield from super().remove_range(start, nr, reason))


class UserFaultMapsNothing(OurLibrary):
    """A fault of the VMM that says ok, and maps nothing."""

    def fault_shared(self, index: int) -> Steps[str]:
        return (yield from answered(super().fault_shared(index), {"vmf_insert_folio": True}))


class ErrorHoldsNothing(OurLibrary):
    """memory_failure()'s handler lets go of the folio, and holds nothing of the inode meanwhile."""

    def error_folio(self, folio: Folio, locked: Locked) -> Steps[str]:
        return (yield from answered(super().error_folio(folio, locked), {"igrab": True, "iput": False}))


class IgnoresRestore(OurLibrary):
    """A page that cannot be put back into the direct map is mapped for the VMM all the same."""

    def make_accessible(self, grabbed: Grabbed) -> Steps[int]:
        yield from super().make_accessible(grabbed)
        return 0


class CreateIgnoresShared(OurLibrary):
    """All pages of a new file are private, whatever was asked for."""

    def init_attributes(self, size: int, shared: tuple[int, ...]) -> Steps[int]:
        return (yield from super().init_attributes(size, ()))


class CreateSharesAll(OurLibrary):
    """All pages of a new file are shared, as soon as one is to be."""

    def init_attributes(self, size: int, shared: tuple[int, ...]) -> Steps[int]:
        return (yield from super().init_attributes(size, tuple(range(size)) if shared else ()))


class CreateLosesAnError(OurLibrary):
    """What the last store of a new file's attributes says is not looked at."""

    def init_attributes(self, size: int, shared: tuple[int, ...]) -> Steps[int]:
        ret = yield from super().init_attributes(size, ())
        if not ret:
            yield from self.host.tree_store("attributes", shared[0], Entries(SHARED_PAGE, len(shared)))
        return ret

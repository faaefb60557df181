"""Removal: punch a hole, lose a page to a memory error, empty the file. Every removal is between begin and end.

A punch is refused as a whole: every page is asked for before the first is removed. If the hypervisor then fails to
give one back, the pages before the returned index are gone and the others are as they were.

Source: kvm_gmem_punch_hole(), kvm_gmem_error_folio() (virt/kvm/guest_memfd.c).
"""

from __future__ import annotations

from guest_memfd.core.convert import Conversion, Converts
from guest_memfd.core.folio import Held
from guest_memfd.core.ops import Reason
from guest_memfd.words.pagestate import PRIVATE_PAGE
from guest_memfd.words.primitives import EINVAL, Folio, Locked, Steps


def _cut(held: Held, start: int, nr: int) -> bool:
    return held.pgoff < start or held.pgoff + held.folio.nr > start + nr


class Removes(Converts):
    """The operations that take folios out of a file: punch_hole, error_folio (memory failure) and close."""

    def punch_hole(self, start: int, nr: int) -> Steps[Conversion]:
        """Free the pages of [start, start+nr); -EBUSY with the page index if the guest holds on to one.

        What lies past the end of the file is left out, as fallocate() does; -EINVAL for a range that is none, or that
        cuts a folio where folios cannot be split.
        """
        if start < 0 or nr <= 0:
            return Conversion(-EINVAL)
        # fallocate() accepts a punch beyond the end; it must not reach pages that are not there.
        nr = min(nr, self.size - start)
        if not self.splits and not self.whole(start, nr):
            return Conversion(-EINVAL)
        yield from self.host.begin_op("punch", start, nr)
        yield from self.host.down_write("invalidate")
        result = (yield from self.remove_range(start, nr, "punch")) if nr > 0 else Conversion(0)
        yield from self.host.end_op(result.ret, result.error_index)
        yield from self.host.up_write("invalidate")
        return result

    def remove_range(self, start: int, nr: int, reason: Reason) -> Steps[Conversion]:
        """Take the folios of the range from user space, from the guest, and out of the file. Lock held exclusively."""
        host = self.host
        # First everything that could bring a page back is stopped: kernel mappings of guest pages, the user's page
        # tables, the guest's. The lock keeps faults out until the folios have gone.
        yield from host.mmu_invalidate_begin(start, nr)
        yield from host.unmap_mapping_pages(start, nr)
        folios = yield from self.present(start, nr)
        # Every folio is asked for before the first is removed: a guest that holds on to the last one refuses the
        # whole punch, and the file is as it was.
        ret, index = yield from self.invalidate_guest(folios, reason)
        if not ret and any(_cut(held, start, nr) for held in folios):
            ret, index = yield from self.split(start, nr, folios)
            yield from self.put_all(folios)
            # The folios that were cut are now single pages, and those outside of the range stay. What was held before
            # the split names folios that are no more.
            folios = () if ret else (yield from self.present(start, nr))
        removed = 0
        # From here on what has gone has gone. A hypervisor that fails to give one back ends the loop, and the index
        # says how far it came.
        while not ret and removed < len(folios):
            ret = yield from self.remove_folio(folios[removed])
            if ret:
                index = folios[removed].pgoff
            else:
                removed += 1
        # `remove_folio` has dropped the references of those it removed.
        yield from self.put_all(folios[removed:])
        yield from host.mmu_invalidate_end()
        return Conversion(ret, max(index, start)) if ret else Conversion(0)

    def split(self, start: int, nr: int, folios: tuple[Held, ...]) -> Steps[tuple[int, int]]:
        """Take the folios that [start, start+nr) cuts back from the hypervisor, and make single pages of them.

        (0, 0), or -errno and a page index: -EBUSY while someone refers to a part. The guest faults the rest in again.
        """
        host = self.host
        for held in folios:
            if _cut(held, start, nr):
                yield from host.lock_folio(held.folio)
                ret = yield from self.take_back(held)
                if not ret:
                    ret = yield from host.split_folio(held.folio)
                yield from host.unlock_folio(held.folio._replace(order=0) if not ret else held.folio)
                if ret:
                    return ret, held.pgoff
        return 0, 0

    def error_folio(self, folio: Folio, locked: Locked) -> Steps[str]:
        """memory_failure() found the locked *folio* broken: guest and VMM lose it, the file keeps it.

        ``delayed`` (MF_DELAYED: the next to ask for the page is told), or ``failed`` if the hypervisor refuses or the
        file is just going away. The folio is unlocked meanwhile: removal takes the invalidate lock and then folio locks, so
        waiting for it under one could wait without end. An inode reference keeps the file until the folio is locked again.
        """
        host = self.host
        # The caller's folio lock will be dropped below, and then only this reference keeps the inode. One that is
        # being evicted takes its broken pages along without help.
        if locked.pgoff is None or not (yield from host.igrab()):
            return "failed"
        # Lock order: the invalidate lock, then folio locks. To wait for it with the folio locked would be a deadlock
        # with a punch, which the explorer finds.
        yield from host.unlock_folio(folio)
        # Shared is enough: this takes the page from its users and changes no tree. But it has to wait; only to try
        # would leave the page with the guest while someone changes the file.
        yield from host.down_read("invalidate")
        ret = yield from self._take_from_users(folio)
        yield from host.up_read("invalidate")
        # The last reference may be this one: then the file was closed meanwhile, and its end is ours to run.
        if (yield from host.iput()):
            yield from self.evict()
        # memory_failure() unlocks the folio itself, so it must find it locked.
        yield from host.lock_folio(folio)
        return "failed" if ret else "delayed"

    # A folio that has left the file while no one looked has been taken from everybody.
    def _take_from_users(self, folio: Folio) -> Steps[int]:
        host = self.host
        locked = yield from host.lock_folio(folio)
        yield from host.unlock_folio(folio)             # under the invalidate lock it stays where it is
        if locked.pgoff is None:
            return 0
        yield from host.mmu_invalidate_begin(locked.pgoff, folio.nr)
        yield from host.unmap_mapping_pages(locked.pgoff, folio.nr)
        (bound,) = yield from host.xa_load("bindings", locked.pgoff, 1)
        (attribute,) = yield from host.xa_load("attributes", locked.pgoff, 1)
        held = Held(folio, locked.pgoff, bound - 1 if bound else None, attribute == PRIVATE_PAGE)
        ret, _ = yield from self.invalidate_guest((held,), "error")
        yield from host.mmu_invalidate_end()
        return ret

    # -- the last reference -------------------------------------------------------------------------------------

    def close(self) -> Steps[None]:
        """Drop a reference on the file: close(2), or a binding that ends."""
        if (yield from self.host.fput()) and (yield from self.host.iput()):
            yield from self.evict()

    # The inode has no reference left: no one can look a page up any more, nothing is bound.
    def evict(self) -> Steps[None]:
        """Give every page back, and let the inode and the module go."""
        yield from self.host.down_write("invalidate")
        # No one can reach the inode any more, so the lock is for lockdep only.
        yield from self.remove_range(0, self.size, "punch")
        yield from self.host.up_write("invalidate")
        yield from self.host.destroy_inode()
        # The very last step: the code that runs here may be unloaded from now on.
        yield from self.host.module_put()

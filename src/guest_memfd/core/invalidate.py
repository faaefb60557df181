"""Removal: punch a hole, lose a page to a memory error, empty the file. Every removal is between begin and end.

A punch is refused as a whole: every page is asked for before the first is removed. If the hypervisor then fails to
give one back, the pages before the returned index are gone and the others are as they were.

Source: kvm_gmem_punch_hole(), kvm_gmem_error_folio() (virt/kvm/guest_memfd.c).
"""

from __future__ import annotations

from errno import EAGAIN, EBUSY, EINVAL

from guest_memfd.core import large
from guest_memfd.core.gmem import Conversion, Gmem, Held, bound_gfn
from guest_memfd.core.ops import Reason
from guest_memfd.words.pagestate import PRIVATE_PAGE
from guest_memfd.words.primitives import Folio, Locked, MfResult, Steps
from guest_memfd.words.units import Index


def punch_hole(gmem: Gmem, start: Index, nr: int) -> Steps[Conversion]:
    """Free the pages of [start, start+nr); -EBUSY with the page index if the guest holds on to one.

    What lies past the end of the file is left out, as fallocate() does; -EINVAL for a range that is none, or that
    cuts a folio where folios cannot be split. Where they can: -EBUSY also while someone refers to one that is cut, -ENOMEM.
    """
    if start < 0 or nr <= 0:
        return Conversion(-EINVAL)
    # fallocate() accepts a punch beyond the end; it must not reach pages that are not there.
    nr = min(nr, gmem.size - start)
    if not gmem.splits and not gmem.whole(start, nr):
        return Conversion(-EINVAL)
    yield from gmem.host.begin_op("punch", start, nr)
    yield from gmem.host.down_write("invalidate")
    result = (yield from gmem.remove_range(start, nr, "punch")) if nr > 0 else Conversion(0)
    yield from gmem.host.end_op(result.ret, result.error_index)
    yield from gmem.host.up_write("invalidate")
    return result


def remove_range(gmem: Gmem, start: Index, nr: int, reason: Reason) -> Steps[Conversion]:
    """Take the folios of the range from user space, from the guest, and out of the file. Lock held exclusively."""
    host = gmem.host
    # First everything that could bring a page back is stopped: kernel mappings of guest pages, the user's page
    # tables, the guest's. The lock keeps faults out until the folios have gone.
    yield from host.gmem_invalidate_begin(start, nr)
    yield from host.unmap_mapping_pages(start, nr)
    folios = yield from gmem.present(start, nr)
    # The folios that the range cuts become single pages, before anything is asked of the hypervisor: what lies outside
    # of the range stays as it is, the guest's with its contents.
    ret, index, folios = yield from large.cut_off(gmem, start, nr, folios)
    if ret == -EAGAIN:
        ret = -EBUSY                                    # -EAGAIN would say that the pages before *index* are gone
    if not ret:
        # Every folio is asked for before the first is removed: a guest that holds on to the last one refuses the
        # whole punch, and the file is as it was.
        ret, index = yield from gmem.invalidate_guest(folios, reason)
    removed = 0
    # From here on what has gone has gone. A hypervisor that fails to give one back ends the loop, and the index
    # says how far it came.
    while not ret and removed < len(folios):
        ret = yield from gmem.remove_folio(folios[removed])
        if ret:
            index = folios[removed].pgoff
        else:
            removed += 1
    # `remove_folio` has dropped the references of those it removed.
    yield from gmem.put_all(folios[removed:])
    yield from host.gmem_invalidate_end()
    return Conversion(ret, index) if ret else Conversion(0)


def error_folio(gmem: Gmem, folio: Folio, locked: Locked) -> Steps[MfResult]:
    """memory_failure() found the locked *folio* broken: guest and VMM lose it, the file keeps it.

    ``delayed`` (MF_DELAYED: the next to ask for the page is told), or ``failed`` if the hypervisor refuses or the
    file is just going away. The folio is unlocked meanwhile: removal takes the invalidate lock and then folio locks, so
    waiting for it under one could wait without end. An inode reference keeps the file until the folio is locked again.
    """
    host = gmem.host
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
    ret = yield from gmem.take_from_users(folio)
    yield from host.up_read("invalidate")
    # The last reference may be this one: then the file was closed meanwhile, and its end is ours to run.
    if (yield from host.iput()):
        yield from gmem.evict()
    # memory_failure() unlocks the folio itself, so it must find it locked.
    yield from host.lock_folio(folio)
    return "failed" if ret else "delayed"


def take_from_users(gmem: Gmem, folio: Folio) -> Steps[int]:
    """Take *folio*, whose memory is broken, from guest and VMM, under the invalidate lock; 0 or -errno.

    0 as well for one that has left the file while no one looked: it has been taken from everybody.
    """
    host = gmem.host
    locked = yield from host.lock_folio(folio)
    yield from host.unlock_folio(folio)             # under the invalidate lock it stays where it is
    if locked.pgoff is None:
        return 0
    yield from host.gmem_invalidate_begin(locked.pgoff, folio.nr)
    yield from host.unmap_mapping_pages(locked.pgoff, folio.nr)
    (bound,) = yield from host.tree_load("bindings", locked.pgoff, 1)
    (attribute,) = yield from host.tree_load("attributes", locked.pgoff, 1)
    held = Held(folio, locked.pgoff, bound_gfn(bound) if bound else None, attribute == PRIVATE_PAGE)
    ret, _ = yield from gmem.invalidate_guest((held,), "error")
    yield from host.gmem_invalidate_end()
    return ret

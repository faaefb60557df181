"""Folios: look up or allocate, zero exactly once per life, prepare for the guest, and take out of the file for good."""

from __future__ import annotations

from collections.abc import Sequence
from errno import EAGAIN, EEXIST, EIO

from guest_memfd.core.gmem import Gmem, Grabbed, Held, bound_gfn, filled
from guest_memfd.core.ops import Reason
from guest_memfd.errors import EHWPOISON
from guest_memfd.words.pagestate import PRIVATE_PAGE
from guest_memfd.words.primitives import Folio, Locked, Lookup, Steps
from guest_memfd.words.units import FIRST_PAGE, Index

LOOKUPS = 3
"""Attempts to look a folio up while others add and remove it, before -EAGAIN."""

MISSES = 15
"""Page indexes without a folio, one after the other, before the page cache is asked for the next that has one."""


def grab_folio(gmem: Gmem, index: Index) -> Steps[Grabbed | int]:
    """Find or allocate the folio at *index*, locked and zeroed; -ENOMEM, -EHWPOISON, -EAGAIN.

    PG_uptodate means "zeroed in this life" and nothing else; whether the guest has it is the hypervisor's record.
    """
    host, small = gmem.host, False
    # A folio that was looked up can leave the file before it is locked (a punch of another page of it, memory
    # failure). Then the look-up starts again; -EAGAIN after some attempts keeps a fault from spinning without end.
    for _attempt in range(LOOKUPS):
        hit = yield from host.filemap_get_folio(index)
        if hit is None:
            new = yield from gmem.add_folio(index, small)
            if isinstance(new, int):
                # A large folio may not be had when a page can. -EEXIST means that another fault was faster: look
                # up what it has added.
                again = new == -EEXIST or (gmem.splits and gmem.order and not small)
                small = True
                if again:
                    continue
                return new
            # It comes back locked, so no other fault sees it before it is zero. The frame may hold another
            # guest's data.
            yield from gmem.zero(new.folio)
            return Grabbed(new.folio, new.pgoff, False)
        locked = yield from host.lock_folio(hit.folio)
        # Only under the lock does the answer stay true: the folio is still in the file, at this index, and not
        # broken.
        if locked.pgoff == hit.pgoff and not locked.hwpoison:
            # Zeroing again what is up to date would destroy what the guest has written, and may hit a hole in the
            # direct map.
            if not locked.uptodate:
                yield from gmem.zero(hit.folio)
            return Grabbed(hit.folio, hit.pgoff, locked.no_direct_map)
        yield from gmem.unlock_and_put(hit.folio)
        if locked.hwpoison:
            return -EHWPOISON
    return -EAGAIN


def add_folio(gmem: Gmem, index: Index, small: bool) -> Steps[Lookup | int]:
    """Allocate a folio for page *index*, *small*: a single page, if there may be one; as `filemap_add_folio`.

    Where a large folio would not be one thing throughout, its pages are allocated side by side: they may become one later.
    """
    host, order = gmem.host, gmem.order
    if not order or not gmem.splits:
        return (yield from host.filemap_add_folio(index, order))
    if small or (index | (1 << order) - 1) >= gmem.size:
        return (yield from host.filemap_add_folio(index, 0))
    if (yield from gmem.order_at(index)):
        return (yield from host.filemap_add_folio(index, order))
    return (yield from host.filemap_add_pages(index, order))


def order_at(gmem: Gmem, index: Index) -> Steps[int]:
    """The order of the folio that page *index* can be part of: `order` where that would be one thing throughout, else 0.

    One thing: private all of it, bound to nothing or to gfns that go on from a multiple of its size. Shared pages are single
    ones, so that a reference on one of them stands against the conversion of no other.
    """
    size = 1 << gmem.order
    head = Index(index & -size)
    if head + size > gmem.size:
        return 0
    attributes = yield from gmem.host.tree_load("attributes", head, size)
    bound = yield from gmem.host.tree_load("bindings", head, size)
    alike = attributes.count(PRIVATE_PAGE) == size and (filled(bound) == 0 or _goes_on(bound, size))
    return gmem.order if alike else 0


# From a gfn that is a multiple of *size*, without a gap.
def _goes_on(bound: Sequence[int], size: int) -> bool:
    first = bound[0]
    return bool(first) and not bound_gfn(first) % size and all(entry == first + at for at, entry in enumerate(bound))


def zero(gmem: Gmem, folio: Folio) -> Steps[None]:
    """First use in this life: the page is still the host's and in the direct map."""
    yield from gmem.host.clear_folio(folio)
    yield from gmem.host.folio_mark_uptodate(folio)


def unlock_and_put(gmem: Gmem, folio: Folio) -> Steps[None]:
    """Let go of a grabbed folio."""
    yield from gmem.host.unlock_folio(folio)
    yield from gmem.host.folio_put(folio)


def present(gmem: Gmem, start: Index, nr: int) -> Steps[tuple[Held, ...]]:
    """All folios of [start, start+nr) that exist, referenced; gfn is None where nothing is bound."""
    # Both trees are read once for the range. The lock is held exclusively, so they cannot change while the folios
    # are looked up.
    bound = yield from gmem.host.tree_load("bindings", start, nr)
    attributes = yield from gmem.host.tree_load("attributes", start, nr)
    found: list[Held] = []
    index, misses = start, 0
    while index < start + nr:
        hit = yield from gmem.host.filemap_get_folio(index)
        if hit is None:
            index, misses = index + 1, misses + 1
            # A file can be 2^28 pages and nearly empty. Stepping is cheap for small holes, the search for large
            # ones.
            if misses == MISSES:
                index = yield from gmem.host.filemap_find_folio(index, start + nr - index)
        else:
            misses = 0
            at = index - start
            gfn = bound_gfn(bound[at]) - (index - hit.pgoff) if bound[at] else None
            found.append(Held(hit.folio, hit.pgoff, gfn, attributes[at] == PRIVATE_PAGE))
            index = hit.pgoff + hit.folio.nr
    return tuple(found)


def put_all(gmem: Gmem, folios: tuple[Held, ...]) -> Steps[None]:
    """Drop the references that `present` took."""
    for held in folios:
        yield from gmem.host.folio_put(held.folio)


def invalidate_guest(gmem: Gmem, folios: tuple[Held, ...], reason: Reason) -> Steps[tuple[int, Index]]:
    """Ask the hypervisor for every bound folio; (0, 0), or the first refusal and its page index.

    Folios before the refused one may have left the guest's page tables: the guest faults them in again.
    """
    for held in folios:
        if held.gfn is not None:
            ret = yield from gmem.ops.invalidate(held.gfn, held.folio, held.private, reason)
            if ret:
                return ret, held.pgoff
    return 0, FIRST_PAGE


def remove_folio(gmem: Gmem, held: Held) -> Steps[int]:
    """Take an invalidated folio back from the hypervisor and out of the file; -errno if the former fails.

    The page is the host's, in the direct map and without the guest's data before anybody else can have it. One
    that cannot be put back into the direct map is kept permanently rather than freed with a hole.
    """
    host, folio = gmem.host, held.folio
    # The lock keeps memory failure out: it must not report the page while its owner is just being changed.
    locked = yield from host.lock_folio(folio)
    # The hypervisor first. Any write of ours to a page that stage 2 withholds would end in an abort.
    ret = yield from gmem.take_back(held)
    if ret:
        yield from host.unlock_folio(folio)
        return ret
    for part, broken in (yield from _parts(gmem, held, locked)):
        # A broken page must not be touched again, so it is neither scrubbed nor mapped.
        if not broken:
            yield from gmem.return_to_kernel(part, locked.no_direct_map)
        elif locked.no_direct_map:                        # broken memory is not mapped again, and no one waits for it
            yield from gmem.account(-part.folio.nr)
    # Last, when nothing can fail any more: a folio that has left the file cannot be found by anyone who would
    # repeat the attempt.
    yield from host.filemap_remove_folio(folio)
    yield from gmem.unlock_and_put(folio)
    return 0


# All of it, or page by page if some of its memory is broken; and whether that is so of each.
def _parts(gmem: Gmem, held: Held, locked: Locked) -> Steps[list[tuple[Held, bool]]]:
    if not locked.hwpoison or not held.folio.order:
        return [(held, locked.hwpoison)]
    broken = yield from gmem.host.page_hwpoison(held.folio)
    return [(Held(Folio(pfn), held.pgoff + at, None if held.gfn is None else held.gfn + at, held.private), broken[at])
            for at, pfn in enumerate(held.folio.pfns)]


def return_to_kernel(gmem: Gmem, held: Held, marked: bool) -> Steps[None]:
    """Scrub what may hold the guest's data before any mapping of the kernel shows it, then restore the mapping."""
    host, folio = gmem.host, held.folio
    # Through a mapping of this CPU alone. To restore the direct map first and to write through it would show the
    # guest's data to every reader of the kernel for that moment.
    if held.private and not gmem.ops.scrubs:
        yield from host.clear_folio_local(folio)
    # A frame that is freed with a hole in the direct map panics its next owner. To lose the page is the smaller
    # damage.
    if marked and (yield from gmem.restore(folio)):
        yield from host.warn(f"{folio} cannot be put back into the direct map and is kept")
        yield from host.leak_folio(folio)


def take_back(gmem: Gmem, held: Held) -> Steps[int]:
    """`ops.reclaim`, tried again once: what passes is want of memory, or a hypervisor that is busy. -EIO does not."""
    if held.gfn is None or not held.private:
        return 0
    ret = yield from gmem.ops.reclaim(held.gfn, held.folio)
    # Tried again once only: the caller holds the invalidate lock, and everybody who faults waits for it.
    if ret not in (0, -EIO):
        ret = yield from gmem.ops.reclaim(held.gfn, held.folio)
    return ret


def leak(gmem: Gmem, held: Held) -> Steps[None]:
    """Give up the locked folio that the hypervisor will never give back: out of the file, out of use, counted.

    The VMM may still map it, if the guest had only let the host use it. Its hole in the direct map stays, and it stays
    counted as away from the host: no one may come near it.
    Source: snp_leak_pages() (arch/x86/virt/svm/sev.c); drivers/hv, 03f5a999adba.
    """
    host, folio = gmem.host, held.folio
    yield from host.warn(f"{folio} stays with the hypervisor for ever")
    yield from host.unmap_mapping_pages(held.pgoff, folio.nr)
    # Before it leaves the file: an extra reference keeps the allocator from getting it back when the page cache
    # drops its own.
    yield from host.leak_folio(folio)
    yield from host.filemap_remove_folio(folio)

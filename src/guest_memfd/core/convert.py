"""Conversion in place: accessible to the host <-> the guest's alone, all of a range or nothing of it.

Theory of operation. A page has one attribute, private or shared, in a tree of the inode. A conversion changes it for a
range, keeps the contents, and is atomic: any holder of the invalidate lock sees the old attributes or the new ones. The
lock is held exclusively, so no fault, punch or other conversion is under way, no folio comes or goes, and no mapping is
made. What the lock does not keep out is what others already have: user page tables and the TLBs, page references
(GUP, DMA), kernel mappings of guest pages (gfn_to_pfn_cache, which hold no reference), guest mappings, the direct map.

To private, in this order:

1. Remove the user's entries, and begin the mmu invalidation, which ends kernel mappings and waits for their users.
2. Look up every folio that is present and not private yet, and count its references: the page cache has one for each
   page, and we have one. One more belongs to a user who could still write: -EAGAIN. The count has to come after 1: GUP-fast
   reads an entry, takes a reference, and reads the entry again. With the entry gone, its reference is there to be counted,
   or the second look drops it. The lru_add batches of the CPUs hold references, too; they are drained once, when a count
   is too high.
3. Ask the hypervisor to take every folio from the guest (`invalidate`). It refuses while the guest holds on to a page.
4. Allocate the tree's nodes. It can fail.
5. Take every folio out of the direct map, then flush all TLBs once. A zap can fail: a large leaf has to be split.
6. Store the attributes in the nodes of 4, which cannot fail, and tell the hypervisor.

So everything that can fail comes before 6, and 6 alone makes the pages private for later faults. The flush has to be over
before 6: as soon as a page is called private the guest may store a secret in it. A folio that is zapped when a later one
fails stays out of the direct map while shared. That is legal (direct_map.py), so there is nothing to undo.

To shared the order is the same without 1's user entries (a private page has none), 2 and 5: a reference does no harm to a
page that becomes accessible, and the direct map is restored by the first host access, so a page that goes back and forth
costs no flush. Nodes are allocated first. Contents must be the host's before the attribute says so: `make_shared`, then
the store. A refusal half way leaves pages with the host that are still private; the next guest fault gives them back.

After a refusal no attribute has changed. User, kernel and guest mappings may be gone: each faults in again. The page
index of the first folio that refused is returned beside the error.

A shared page is a single one, so a conversion to shared first splits what is large in the range, and one to private ends
with a merge (large.py). Where folios cannot be split, a range that cuts one is -EINVAL.

Left out: there is no wait for a reference to go away. User space tries again, as in the kernel.

Source: "guest_memfd: In-place conversion" v8-v13, 2026, for the order of the steps. A wrong order breaks the laws
one-owner, pins-respected and all-or-nothing (tests/test_planted.py: NoFlush, CheckedBeforeUnmap, AttributeFirst, NoDrain).
tests/test_folios.py has the calls one by one; tools/mutants/equivalent.txt says which neighbours may be exchanged, and why.
"""

from __future__ import annotations

from errno import EAGAIN, EINVAL

from guest_memfd.core.gmem import Conversion, Gmem, Held
from guest_memfd.words.pagestate import PRIVATE_PAGE, SHARED_PAGE
from guest_memfd.words.primitives import Entries, Folio, Steps
from guest_memfd.words.units import Index

CACHE_AND_LOOKUP = 2
"""References a folio of order 0 has when no one but the page cache and we know it; in general nr pages + 1."""


def make_private(gmem: Gmem, start: Index, nr: int) -> Steps[Conversion]:
    """Take [start, start+nr) from the host.

    -EAGAIN with the page index while someone holds an unexpected reference, or hibernation is being prepared;
    -ENOMEM; -EBUSY if the hypervisor refuses; -EINVAL for a range outside of the file, or that cuts a folio.
    """
    if not gmem.has(start, nr) or not (gmem.splits or gmem.whole(start, nr)):
        return Conversion(-EINVAL)
    yield from gmem.host.begin_op("to_private", start, nr)
    yield from gmem.host.down_write("invalidate")
    result = yield from gmem.make_private_locked(start, nr)
    yield from gmem.host.end_op(result.ret, result.error_index)
    yield from gmem.host.up_write("invalidate")
    return result


def make_private_locked(gmem: Gmem, start: Index, nr: int) -> Steps[Conversion]:
    """`make_private`, under the invalidate lock held exclusively; returns as it."""
    host = gmem.host
    # Where there is nothing to do nothing is touched: a call that is repeated must not cost the guest its mappings.
    attributes = yield from host.tree_load("attributes", start, nr)
    if attributes.count(PRIVATE_PAGE) == nr:
        return Conversion(0)
    # Before references are counted. GUP-fast takes its reference without a lock; with the entry gone its second
    # look fails, so that no reference can appear after the count.
    yield from host.unmap_mapping_pages(start, nr)
    # Kernel mappings of guest pages hold no reference, so counting would not find them. This call ends them and
    # waits for a user who is in the middle of one.
    yield from host.gmem_invalidate_begin(start, nr)
    folios = yield from gmem.present(start, nr)
    # The references of `present` are part of the count that is expected, so they are dropped after it.
    # Of a page that is private already there is nothing to ask anybody: its guest may well hold on to it.
    result = yield from gmem.check_and_commit_private(start, nr, tuple(held for held in folios if not held.private))
    yield from gmem.put_all(folios)
    # Now that all of it is private, and no reference is left that would stand against it.
    if not result.ret:
        yield from gmem.merge(start, nr)
    # Also after a refusal: an invalidation that is never ended keeps every later user of the range waiting.
    yield from host.gmem_invalidate_end()
    return result


def check_and_commit_private(gmem: Gmem, start: Index, nr: int, folios: tuple[Held, ...]) -> Steps[Conversion]:
    """The steps 2 to 6 of the theory, for the *folios* of the range that are present; returns as `make_private`."""
    host = gmem.host
    # The check that user space can do something about comes first: it drops its pins and tries again, and the
    # guest has lost nothing by the attempt.
    busy = yield from gmem.unexpected_refs(folios)
    if busy is not None:
        return Conversion(-EAGAIN, busy)
    ret, index = yield from gmem.invalidate_guest(folios, "to_private")
    if ret:
        return Conversion(ret, index)
    # The last allocations, and the zap, come before the store. From the store on a failure could not be undone:
    # part of the range would be private, and the caller would be told that none is.
    ret = yield from host.tree_reserve("attributes", start, nr)
    if ret:
        return Conversion(ret)
    ret = yield from _zap_all(gmem, folios)
    if ret:
        # Folios that have been zapped stay so, marked. They are shared, and the next host access puts them back;
        # to do it here could fail in turn.
        yield from host.tree_release("attributes")
        return Conversion(ret)
    yield from host.tree_store_reserved("attributes", start, Entries(PRIVATE_PAGE, nr))
    # The attribute is stored, so the hypervisor is told what is so already. pKVM completes a pending MEM_UNSHARE
    # here; a guest that is told earlier could write secrets to a page that the host still maps.
    for held in folios:
        if held.gfn is not None:
            yield from gmem.ops.make_private(held.gfn, held.folio)
    return Conversion(0)


def unexpected_refs(gmem: Gmem, folios: tuple[Held, ...]) -> Steps[Index | None]:
    """Page index of the first folio that someone else still refers to; lru_add batches are drained once."""
    drained = False
    for held in folios:
        # The page cache has one reference for each page of the folio; the look-up of `present` has one.
        expected = held.folio.nr - 1 + CACHE_AND_LOOKUP
        refs = yield from gmem.host.folio_ref_count(held.folio)
        if refs > expected and not drained:
            # A new folio waits in a batch of the CPU that added it, and the batch holds a reference that no one
            # means. Draining interrupts every CPU, so it is done once for a request, and only if a count is too
            # high.
            yield from gmem.host.lru_add_drain_all()
            drained = True
            refs = yield from gmem.host.folio_ref_count(held.folio)
        if refs > expected:
            return held.pgoff
    return None


# One flush for all, before anything becomes private.
def _zap_all(gmem: Gmem, folios: tuple[Held, ...]) -> Steps[int]:
    host = gmem.host
    zapped: list[Folio] = []
    ret = 0
    for held in folios:
        # The mark belongs to the folio lock; a fault of an earlier time may have zapped the folio already, and
        # its entry must not be counted twice.
        locked = yield from host.lock_folio(held.folio)
        # A page that nobody has used yet has not been zeroed either, and that is done through the direct map. Broken memory
        # is not written to, and no one will get it.
        if not locked.uptodate and not locked.hwpoison:
            yield from gmem.zero(held.folio)
        if not locked.no_direct_map:
            ret = yield from gmem.zap_noflush(held.folio)
            if not ret:
                zapped.append(held.folio)
        yield from host.unlock_folio(held.folio)
        if ret:
            break
    # Even if the loop ended with an error: what was zapped must not stay in a TLB, because the mark says that it
    # cannot be reached.
    if zapped:
        yield from gmem.flush(tuple(zapped))
    return ret


def make_shared(gmem: Gmem, start: Index, nr: int) -> Steps[Conversion]:
    """Give [start, start+nr) to the host with its contents.

    -EBUSY with the page index while the guest holds on to a page; -ENOMEM, -EAGAIN; -EINVAL as `make_private`.
    References never matter. The direct map is restored by the first host access, so a page that goes to and fro
    costs no flush.
    """
    if not gmem.has(start, nr) or not (gmem.splits or gmem.whole(start, nr)):
        return Conversion(-EINVAL)
    yield from gmem.host.begin_op("to_shared", start, nr)
    yield from gmem.host.down_write("invalidate")
    result = yield from gmem.make_shared_locked(start, nr)
    yield from gmem.host.end_op(result.ret, result.error_index)
    yield from gmem.host.up_write("invalidate")
    return result


def make_shared_locked(gmem: Gmem, start: Index, nr: int) -> Steps[Conversion]:
    """`make_shared`, under the invalidate lock held exclusively; returns as it."""
    host = gmem.host
    attributes = yield from host.tree_load("attributes", start, nr)
    if attributes.count(SHARED_PAGE) == nr:
        return Conversion(0)
    # Before anything is asked of the hypervisor: a page that it has given back cannot be handed out again in case
    # there are no nodes.
    ret = yield from host.tree_reserve("attributes", start, nr)
    if ret:
        return Conversion(ret)
    yield from host.gmem_invalidate_begin(start, nr)
    folios = yield from gmem.present(start, nr)
    # Before anything is asked of the hypervisor: what the split needs it may not get, and some hypervisors lose the contents
    # of what is taken from the guest.
    ret, index, folios = yield from gmem.single_pages(start, nr, folios, tuple(held for held in folios if held.folio.order))
    result = Conversion(ret, index) if ret else (
        yield from gmem.give_to_host(tuple(held for held in folios if held.private)))
    yield from gmem.put_all(folios)
    if result.ret:
        yield from host.tree_release("attributes")
    else:
        yield from host.tree_store_reserved("attributes", start, Entries(SHARED_PAGE, nr))
    yield from host.gmem_invalidate_end()
    return result


def give_to_host(gmem: Gmem, folios: tuple[Held, ...]) -> Steps[Conversion]:
    """The guest lets go of *folios*, which are private; their contents are the host's. 0, or -errno and who refused."""
    ret, index = yield from gmem.invalidate_guest(folios, "to_shared")
    if ret:
        return Conversion(ret, index)
    for held in folios:
        # One that is not bound is no guest's.
        if held.gfn is not None:
            ret = yield from gmem.ops.make_shared(held.gfn, held.folio)
            if ret:
                return Conversion(ret, held.pgoff)
    return Conversion(0)

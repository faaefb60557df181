"""Page cache and references of the emulated host: look-up, insertion, removal, and what the last put does."""

from __future__ import annotations

from errno import EBUSY, EEXIST, ENOMEM

from guest_memfd.machine.hw.buddy import OutOfMemory
from guest_memfd.machine.linux.folio import LinuxFolio
from guest_memfd.machine.linux.page_poison import PAGE_POISON
from guest_memfd.machine.primitives import contents
from guest_memfd.machine.primitives.base import Base
from guest_memfd.words import facts
from guest_memfd.words.pagestate import CONTENTION, CONTENTS, DATA, FAILURE, REFERENCE
from guest_memfd.words.primitives import Folio, Lookup
from guest_memfd.words.units import PAGE, Index, Pa, pa_to_pfn, pfn_to_pa, span


def filemap_get_folio(host: Base, index: Index) -> Lookup | None:
    """A hit comes with a transient reference."""
    host.must_have(index)
    page = host.inode.find(index)
    if page is None:
        return None
    page.take("lookup")
    return Lookup(host.folio(page), page.index)


def filemap_find_folio(host: Base, index: Index, nr: int) -> Index:
    """As xas_find() walks over holes."""
    return min(host.inode.next(index), index + nr)


def filemap_add_folio(host: Base, index: Index, order: int) -> Lookup | int:
    """Allocates from the page allocator and inserts, at the index rounded down to the folio's size."""
    pa, ret = _allocated(host, index, order)
    if ret:
        return ret
    head = Index(index & -1 << order)
    return _found(host, _insert(host, LinuxFolio(pa, order), head))


def filemap_add_pages(host: Base, index: Index, order: int) -> Lookup | int:
    """The same block, each page of it a folio of its own."""
    pa, ret = _allocated(host, index, order)
    if ret:
        return ret
    head = Index(index & -1 << order)
    pages = [_insert(host, LinuxFolio(pa + at * PAGE, 0), head + at) for at in range(1 << order)]
    return _found(host, pages[index - head])


def filemap_alloc_folio(host: Base, unmapped: bool) -> Folio | int:
    """A page of the page allocator; *unmapped*: as if it lay in a block that was taken out of the direct map before."""
    machine = host.machine
    try:
        page = LinuxFolio(machine.folios.alloc(0), 0)
    except OutOfMemory:
        host.against(FAILURE)
        return -ENOMEM
    if unmapped and not _unmap(host, page):
        machine.folios.free(page.pa, 0)
        host.against(FAILURE)
        return -ENOMEM
    machine.pages[pa_to_pfn(page.pa)] = page
    page.take("lookup")
    page.lock, page.unmapped = host.who, unmapped
    return host.folio(page)


def _unmap(host: Base, page: LinuxFolio) -> bool:
    lm = host.machine.linear_map
    if lm.set_direct_map_invalid_noflush(page.pa, 1):
        return False
    lm.flush_tlb_kernel_range(lm.va(page.pa), lm.va(page.pa) + page.size)
    return True


def filemap_insert_folio(host: Base, index: Index, folio: Folio) -> int:
    """The page that was allocated enters the page cache; -EEXIST, -ENOMEM (a node of the tree)."""
    host.must_have(index)
    page = host.locked(folio, "filemap_insert_folio")
    if _occupied(host, index, 0):
        host.against(CONTENTION)
        return -EEXIST
    if host.machine.slab_fails():
        host.against(FAILURE)
        return -ENOMEM
    _insert(host, page, index)
    # What was put there before, on purpose, is what a reader of the page must find.
    if host.machine.tracer.content(page.pa) == DATA:
        host.machine.tracer.expect(page, page.pa, DATA)
    return 0


# Memory for a folio of *order* around page *index*, where there is none yet, and 0; or -errno.
def _allocated(host: Base, index: Index, order: int) -> tuple[Pa, int]:
    host.must_have(index)
    folios = host.machine.folios
    try:
        pa = folios.alloc(order)
    except OutOfMemory:
        host.against(FAILURE)
        return Pa(0), -ENOMEM
    # After the allocation, as in the kernel: two faults allocate at the same time, and one of them gives its
    # folio back.
    if _occupied(host, Index(index & -1 << order), order):
        folios.free(pa, order)
        host.against(CONTENTION)
        return pa, -EEXIST
    return pa, 0


def _insert(host: Base, page: LinuxFolio, index: Index) -> LinuxFolio:
    host.machine.pages[pa_to_pfn(page.pa)] = page
    page.take("cache", page.nr)                     # one for each of its pages (mm/filemap.c)
    host.inode.insert(page, index)
    _lru_add(host, page)
    return page


# Locked before it can be found, so the first to see it is the one who zeroes it.
def _found(host: Base, page: LinuxFolio) -> Lookup:
    page.take("lookup")
    page.lock = host.who
    return Lookup(host.folio(page), page.index)


# Whether a folio is in the way: one that covers the head, or a smaller one further on.
def _occupied(host: Base, head: Index, order: int) -> bool:
    inode, end = host.inode, head + (1 << order)
    if inode.find(head) is not None:
        return True
    # By counts first: to go through 2^18 indexes for one folio of 1 GiB would make every fault slow.
    smaller = sum(count for o, count in inode.orders.items() if o < order)
    if smaller < 1 << order:
        return smaller > 0 and any(head <= i < end for i in inode.pages)
    return any(i in inode.pages for i in span(head, 1 << order))


# folio_add_lru(): a batch per CPU; a large folio empties it at once (mm/swap.c).
def _lru_add(host: Base, page: LinuxFolio) -> None:
    batch, room = host.machine.lru_batch, host.machine.batch
    if page.order and room is None:                     # alone in the batch of its CPU
        return
    page.take("lru")
    batch[page.pa] = page
    if room is not None and (len(batch) >= room or page.order):
        _drain(host)


def filemap_remove_folio(host: Base, folio: Folio) -> None:
    """Leaves the page cache; any other reference keeps the frames."""
    page = host.locked(folio, "filemap_remove_folio")
    if page.inode is not host.inode:
        host.die(f"{folio} is not in the page cache")
    host.inode.remove(page)
    host.drop(page, "cache", page.nr)
    host.machine.tracer.removed(host, page)


def split_folio(host: Base, folio: Folio) -> int:
    """Flags and the page cache's references are those of every page; the caller keeps the first, locked."""
    page = host.locked(folio, "split_folio")
    # No one but the page cache and the caller: a part that someone refers to cannot become a folio of its own.
    if page.refcount != page.nr + 1 or not page.order:
        host.against(REFERENCE, page)
        return -EBUSY
    inode, head = host.inode, page.index
    if page.inode is not inode:
        host.die(f"{folio} is not in the page cache")
    if host.machine.slab_fails():                       # nodes of the page cache for the entries (xas_split_alloc())
        host.against(FAILURE)
        return -ENOMEM
    host.machine.tracer.split(page)
    inode.remove(page)
    for at in range(page.nr):
        small = host.machine.pages[folio.pfn + at] = LinuxFolio(page.pa + at * PAGE, 0)
        small.take("cache")
        small.uptodate, small.no_direct_map = page.uptodate, page.no_direct_map
        small.broken, small.handled = page.broken & {small.pa}, page.handled & {small.pa}
        inode.insert(small, head + at)
    first = host.machine.pages[folio.pfn]
    first.take("lookup")
    first.lock = page.lock
    return 0


def merge_folio(host: Base, index: Index, order: int) -> bool:
    """What the pages are known by becomes the folio's; no page of it can be found while that is done."""
    inode, machine = host.inode, host.machine
    found = [inode.find(i) for i in span(index, 1 << order)]
    pages = [page for page in found if page is not None]
    if len(pages) < len(found) or not _can_be_one(pages, order):
        return False
    first = pages[0]
    large = LinuxFolio(first.pa, order)
    large.take("cache", large.nr)
    large.uptodate, large.no_direct_map = first.uptodate, first.no_direct_map
    for page in pages:
        inode.remove(page)
        del machine.pages[pa_to_pfn(page.pa)]
    machine.pages[pa_to_pfn(large.pa)] = large
    inode.insert(large, index)
    return True


def _can_be_one(pages: list[LinuxFolio], order: int) -> bool:
    first = pages[0]
    return not first.pa % (PAGE << order) and all(
        page.pa == first.pa + at * PAGE and not page.order and page.refcount == 1 and page.lock is None
        and not page.hwpoison and (page.uptodate, page.no_direct_map) == (first.uptodate, first.no_direct_map)
        for at, page in enumerate(pages))


def page_hwpoison(host: Base, folio: Folio) -> tuple[bool, ...]:
    """PG_hwpoison is each page's own."""
    broken = host.page(folio).broken
    return tuple(pfn_to_pa(pfn) in broken for pfn in folio.pfns)


def folio_put(host: Base, folio: Folio, kind: str = "lookup") -> None:
    """The last reference frees."""
    page = host.page(folio)
    host.drop(page, kind)
    free_if_unused(host, page)


def folio_get(host: Base, folio: Folio, kind: str = "provided") -> None:
    """Take a reference of *kind* that outlives the operation; the caller already has one on the folio."""
    host.page(folio).take(kind)


def leak_folio(host: Base, folio: Folio) -> None:
    """Out of use permanently: a reference that no one drops, and a count that says so."""
    host.page(folio).take("kept")
    host.machine.leaked += folio.nr


def mapping_set_no_direct_map(host: Base) -> None:
    """Set AS_NO_DIRECT_MAP on the inode: readers of page-cache folios that ask for it keep out."""
    host.inode.refuses_readers = True


def mapping_no_direct_map(host: Base) -> bool:
    """What a reader of page-cache folios asks."""
    return host.inode.refuses_readers


def folio_ref_count(host: Base, folio: Folio) -> int:
    """The reference count; more than the page cache, its LRU batch and the caller have is a reason to refuse."""
    page = host.page(folio)
    # A punch has no use for it: a page that is pinned leaves the file all the same.
    if page.refcount > page.cache + page.lru + 1 and host.machine.tracer.under_way(host.who) != "punch":
        host.against(REFERENCE, page)
    return page.refcount


def folio_maybe_dma_pinned(host: Base, folio: Folio) -> bool:
    """Whether a FOLL_PIN reference is held; a FOLL_GET reference is not seen here, as in the kernel."""
    return bool(host.page(folio).pin)


def folio_mapped(host: Base, folio: Folio) -> bool:
    """Whether a user page table maps it."""
    page = host.page(folio)
    mapped = host.machine.mapped_by_user(page.pa, page.size)
    if mapped:
        host.against(REFERENCE, page)
    return mapped


def lru_add_drain_all(host: Base) -> None:
    """The batches let go of their references."""
    host.machine.tracer.counts(host.who, "stalls")
    _drain(host)


def _drain(host: Base) -> None:
    batch, host.machine.lru_batch = host.machine.lru_batch, {}
    for page in sorted(batch.values(), key=lambda p: p.pa):
        page.drop("lru")
        free_if_unused(host, page)


def folio_mark_uptodate(host: Base, folio: Folio) -> None:
    """Under the folio lock."""
    host.locked(folio, "folio_mark_uptodate").uptodate = True


def folio_set_no_direct_map(host: Base, folio: Folio, marked: bool) -> None:
    """Under the folio lock."""
    host.locked(folio, "folio_set_no_direct_map").no_direct_map = marked


def free_if_unused(host: Base, page: LinuxFolio) -> None:
    """free_pages_prepare(): a poisoned frame stays out of use, any other is written to and freed (mm/page_alloc.c)."""
    if page.refcount or page.retired:
        return
    machine = host.machine
    # Never back to the allocator: its next owner would meet the same error.
    if page.hwpoison and not page.order:
        page.retired = True
        return
    host.notes += (facts.Freed(machine.number(pa), machine.driver.owner(pa), CONTENTS[machine.tracer.content(pa)],
                               machine.guest_reaches(pa))
                   for pa in machine.named(page.pa, page.size) if pa not in page.broken)
    if page.hwpoison:
        _free_the_others(host, page)
        return
    if page.lock is not None:
        host.die(f"{host.folio(page)} is freed while locked")
    _free(host, page)


# Of a large folio the pages that are not broken (free_has_hwpoisoned(), mm/page_alloc.c).
def _free_the_others(host: Base, page: LinuxFolio) -> None:
    machine = host.machine
    for at in range(page.nr):
        part = machine.pages[pa_to_pfn(page.pa) + at] = LinuxFolio(page.pa + at * PAGE, 0)
        if part.pa in page.broken:
            part.broken, part.handled, part.retired = {part.pa}, page.handled & {part.pa}, True
        else:
            _free(host, part)


def _free(host: Base, page: LinuxFolio) -> None:
    machine = host.machine
    # It came without a direct map: the allocator gives it one again when it needs the page as another.
    if page.unmapped:
        machine.linear_map.set_direct_map_default_noflush(page.pa, page.nr)
    # Through the direct map, as the allocator writes. A hole that was not put back ends the kernel here.
    if machine.on_free != "nothing":
        contents.kernel_write(host, page, page.pa, page.size, "allocator", "free-time poisoning")
        machine.tracer.zeroed(page.pa, page.size)
    if machine.on_free == "poison":
        machine.ram.fill(page.pa, page.size, PAGE_POISON)
    elif machine.on_free == "zero":
        machine.ram.zero(page.pa, page.size)
    del machine.pages[pa_to_pfn(page.pa)]
    machine.folios.free(page.pa, page.order)

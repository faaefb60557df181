"""`gunyah-v17`: the driver that calls the exported setters itself ("Drivers for Gunyah hypervisor" v17, 22 Feb 2024).

Differs from our library in nearly everything, so this file is a driver of its own: bindings per VM, a tree of provided
pages, PG_private for what is lent, an rw-semaphore around the bindings, "launder" to take a page back. Mistakes are kept
as posted and marked with the numbers of docs/bugs.md. Patches 19, 20, 23, 24, 28/35.

Left out: platform hooks, RM calls. In scenarios page 0 is bound FORCE_LEND, page 1 FORCE_SHARE, each by a binding of its
own; files of /dev/gunyah have any bindings, and parcels (machine/dev/gunyah/posted.py). Lending and sharing
are this hypervisor's hypercalls.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from errno import EAGAIN, EBUSY, EINVAL, ENOENT, EPERM
from typing import ClassVar

from guest_memfd.compat import override
from guest_memfd.core.folio import MISSES
from guest_memfd.core.gmem import Conversion, Grabbed, PowerPolicy, bound_gfn, filled
from guest_memfd.designs.design import Design, NoAttributes
from guest_memfd.words.primitives import Bound, Entries, Folio, Host, Locked, Lookup, MfResult, Steps, VmFault
from guest_memfd.words.units import FIRST_GFN, FIRST_PAGE, PAGE, Gfn, Index, Pfn, span

LENT = 1
"""Low bit of an entry of the provided tree: this page is lent, not shared."""

ORDER_SHIFT = 56
"""Where such an entry has the folio's order."""


def entry_of(folio: Folio, lend: bool) -> int:
    """The entry of the provided tree for all gfns of *folio*."""
    return (2 * folio.pfn + 1 + (LENT if lend else 0)) | folio.order << ORDER_SHIFT


def folio_of(entry: int) -> Folio:
    """The folio of such an entry."""
    return Folio(Pfn(((entry & (1 << ORDER_SHIFT) - 1) - 1) // 2), entry >> ORDER_SHIFT)


def head_gfn(gfn: Gfn, folio: Folio) -> Gfn:
    """The gfn of the first page of *folio*, which has *gfn*: in the guest it lies at a multiple of its size."""
    return gfn & -folio.nr


def places(entries: Sequence[int], at: int = 0) -> Iterator[int]:
    """Indexes of what is no hole, in order; costs follow their number."""
    if filled(entries):
        if len(entries) == 1:
            yield at
        else:
            half = len(entries) // 2
            yield from places(entries[:half], at)
            yield from places(entries[half:], at + half)


class GunyahV17(NoAttributes, Design):
    """drivers/virt/gunyah/{guest_memfd,vm_mgr_mem}.c as posted, mistakes included; S and a number names one of them."""

    name = "gunyah-v17"
    title = "the driver unmaps lent pages itself, through exported setters"
    source = "[PATCH v17 19,20,23,24,28/35], 20240222-gunyah-v17-*-1e9da6763d38@quicinc.com"
    hypervisors = ("gunyah",)
    power: PowerPolicy = "none"
    no_direct_map = False
    keeps: ClassVar[Mapping[str, str]] = {
        "create": "a file and an inode; without attributes, as init_attributes() has it here",
        "allocate": "a folio per page of the range under the invalidate lock, shared, as gunyah_gmem_allocate()",
        **dict.fromkeys(("munmap", "close"), "a mapping and a reference go as every file's do"),
        **dict.fromkeys(("hibernate_prepare", "hibernate_post"), "the series has nothing of it: power is 'none'"),
    }
    errnos: ClassVar[Mapping[str, tuple[int, ...]]] = {"fault": (ENOENT, EPERM)}
    bounds: ClassVar[Mapping[str, Bound]] = {
        "fault": Bound(writes=2, calls=3, splits=3), "user_fault": Bound(writes=1, calls=2, splits=3),
        "punch": Bound(writes=1, calls=2, splits=3), "unbind": Bound(writes=1, calls=2, splits=3),
        "mmap": Bound(writes=1, calls=2, splits=3), "teardown": Bound(writes=1, calls=4, splits=3),
    }

    @property
    def driver(self) -> Host:
        """The host as the module sees it: what it calls, a module calls."""
        return self.ops.host

    # -- file and bindings (23, 24/35) ---------------------------------------------------------------------------

    @override
    def bind(self, gfn: Gfn, start: Index, nr: int) -> Steps[int]:
        """MAP_MEM, once per page here; each binding keeps a reference on the file."""
        host = self.driver
        yield from host.begin_op("bind", start, nr)
        for index in span(start, nr):
            yield from host.get_file()
            yield from host.tree_store("bindings", index, Entries(gfn + (index - start) + 1, 1))
        yield from host.end_op(0)
        return 0

    def lends(self, index: Index) -> bool:
        """Whether the binding of page *index* is FORCE_LEND."""
        return index not in self.born_shared

    @override
    def unbind(self, start: Index, nr: int) -> Steps[Conversion]:
        """MAP_MEM with UNMAP: invalidate_lock, then bindings_lock; the whole binding or -ENOENT."""
        host = self.driver
        if not (yield from host.get_file()):                # fget() of the ioctl's argument
            return Conversion(-EINVAL)
        yield from host.begin_op("unbind", start, nr)
        yield from host.down_write("invalidate")
        yield from host.down_write("bindings")
        (bound,) = yield from host.tree_load("bindings", start, 1)
        ret = 0 if bound and nr == 1 else -ENOENT
        if not ret:
            # A page that is still locked by the guest makes it fail, and what was reclaimed before stays reclaimed.
            ret = yield from self.reclaim_range(bound_gfn(bound), nr)
        if not ret:
            yield from host.tree_store_reserved("bindings", start, Entries(0, 1))
            yield from host.fput()                          # the binding's; the ioctl's own is forgotten (S12)
        index = start if ret not in (0, -ENOENT) else None          # the ioctl has an errno only, of the whole binding
        yield from host.end_op(ret, index)
        yield from host.up_write("bindings")
        yield from host.up_write("invalidate")
        if ret:
            yield from self.close()
        return Conversion(ret, index)

    # -- the guest faults (20, 28/35) ----------------------------------------------------------------------------

    @override
    def guest_fault(self, gfn: Gfn, index: Index) -> Steps[int]:
        """gunyah_gmem_demand_page(): bindings_lock, then folio lock, then (in provide) invalidate_lock (S14)."""
        host = self.driver
        yield from host.begin_op("fault", index, 1, gfn)
        yield from host.down_read("bindings")
        (bound,) = yield from host.tree_load("bindings", index, 1)
        ret = (yield from self._demand(gfn, index)) if bound == gfn + 1 else -ENOENT
        yield from host.end_op(ret)
        yield from host.up_read("bindings")
        return ret

    def _demand(self, gfn: Gfn, index: Index) -> Steps[int]:
        grabbed = yield from self.grab_folio(index)
        if isinstance(grabbed, int):
            return grabbed
        ret = yield from self.provide_folio(gfn - (index - grabbed.pgoff), grabbed, self.lends(index))
        yield from self.unlock_and_put(grabbed.folio)
        return ret

    def provide_folio(self, gfn: Gfn, grabbed: Grabbed, lend: bool) -> Steps[int]:
        """gunyah_vm_provide_folio(): tree entry, safe to lend?, donate, map, reference, PG_private."""
        host, folio = self.driver, grabbed.folio
        # Another vCPU is providing the same page, or has: this one goes back to the guest and tries again.
        if filled((yield from host.tree_load("provided", gfn, folio.nr))):
            return -EAGAIN
        ret = yield from host.tree_store("provided", gfn, Entries(entry_of(folio, lend), folio.nr))
        if ret:
            return ret
        ret = (yield from self.lend_safe(grabbed)) if lend else 0
        if not ret:
            ret = yield from self._donate_and_map(gfn, folio, lend)
            if ret:
                yield from host.set_direct_map_default_noflush(folio)
        if ret:
            yield from host.tree_store_reserved("provided", gfn, Entries(0, folio.nr))
            return ret
        # One reference for what the guest has been given: it is dropped by reclaim, or leaked where reclaim fails.
        yield from host.folio_get(folio, "provided")
        if lend:
            yield from host.folio_set_no_direct_map(folio, True)
        return 0

    def lend_safe(self, grabbed: Grabbed) -> Steps[int]:
        """gunyah_folio_lend_safe(): mapped or mappable is refused, references are not looked at (R5)."""
        host = self.driver
        yield from host.down_read("invalidate")
        mapped = (yield from host.folio_mapped(grabbed.folio)) or (
            yield from host.vma_covers(grabbed.pgoff, grabbed.folio.nr))
        yield from host.up_read("invalidate")
        if mapped:
            return -EPERM
        yield from host.set_direct_map_invalid_noflush(grabbed.folio)      # result ignored (S19)
        return 0

    def _donate_and_map(self, gfn: Gfn, folio: Folio, lend: bool) -> Steps[int]:
        host = self.driver
        ret = yield from host.hyp_call("donate_to_protected" if lend else "donate_to_sibling", folio)
        if ret:
            return ret
        ret = yield from host.hyp_call("map_private" if lend else "map_vmmio", gfn, folio)
        if ret:
            yield from host.hyp_call("donate_from_protected" if lend else "donate_from_sibling", folio)
        return ret

    # -- taking back (20, 24/35) ---------------------------------------------------------------------------------

    def reclaim_folio(self, gfn: Gfn, folio: Folio, marked: bool, sync: bool) -> Steps[int]:
        """gunyah_vm_reclaim_folio(), folio locked: a failure at any step leaves the entry, and what was done."""
        host = self.driver
        (entry,) = yield from host.tree_load("provided", gfn, 1)
        if not entry:
            return 0
        lent = not entry % 2
        ret = yield from host.hyp_call("unmap_private" if lent else "unmap_vmmio", gfn, folio, sync)
        if not ret:
            ret = yield from host.hyp_call("donate_from_protected" if lent else "donate_from_sibling", folio)
        if ret:
            return ret
        yield from host.tree_store_reserved("provided", gfn, Entries(0, folio.nr))
        if marked:
            yield from host.set_direct_map_default_noflush(folio)          # result ignored (S19)
            yield from host.folio_set_no_direct_map(folio, False)
        yield from host.folio_put(folio, "provided")
        return 0

    def reclaim_range(self, gfn: Gfn, nr: int) -> Steps[int]:
        """gunyah_vm_reclaim_range(): one page too many (S5), and the last unmap is not synchronised (S6)."""
        host = self.driver
        ret = done = 0
        entries = yield from host.tree_load("provided", gfn, nr + 1)          # S5: inclusive
        for at in places(entries):
            # One entry for each gfn of a folio; the folio is taken back once.
            if at < done:
                continue
            folio = folio_of(entries[at])
            head = head_gfn(gfn + at, folio)
            done = head + folio.nr - gfn
            sync = filled(entries[done:]) > 0                               # S6
            locked = yield from host.lock_folio(folio)
            failed = yield from self.reclaim_folio(head, folio, locked.no_direct_map, sync)
            yield from host.unlock_folio(folio)
            ret = failed or ret
        return ret

    def launder(self, index: Index, folio: Folio) -> Steps[int]:
        """Take the locked *folio* back from the VM that was given it."""
        (bound,) = yield from self.driver.tree_load("bindings", index, 1)
        return (yield from self.reclaim_folio(head_gfn(bound_gfn(bound), folio), folio, True, True)) if bound else 0

    # -- the host's side (24/35) ---------------------------------------------------------------------------------

    @override
    def mmap(self) -> Steps[int]:
        """mmap of lent memory takes it back first; share bindings are ignored."""
        host = self.driver
        lent = tuple(i for i in span(FIRST_PAGE, self.size) if self.lends(i))
        if not lent:
            return (yield from host.mmap())
        yield from host.begin_op("mmap", lent[0], len(lent))
        yield from host.down_read("invalidate")
        ret = 0
        for index in lent:
            (bound,) = yield from host.tree_load("bindings", index, 1)
            # Where the file's first page would be by this binding. Below 0 it wraps, and nothing is found there.
            first = bound_gfn(bound) - (index - FIRST_PAGE)
            if bound and not ret and first >= 0:
                ret = yield from self.reclaim_range(first, self.size)           # S9: up to the end of the VMA
        yield from host.end_op(0)
        yield from host.up_read("invalidate")
        return ret or (yield from host.mmap())

    @override
    def user_fault(self, index: Index) -> Steps[VmFault]:
        """gunyah_gmem_fault(): a lent page is laundered on the way; folio lock, then invalidate_lock."""
        grabbed = yield from self.grab_folio(index)
        if isinstance(grabbed, int):
            return "SIGBUS"
        answer: VmFault = "ok"
        if grabbed.no_direct_map:
            yield from self.driver.down_read("invalidate")
            if (yield from self.launder(index, grabbed.folio)):
                answer = "SIGBUS"
            yield from self.driver.up_read("invalidate")
        if answer == "ok" and not (yield from self.driver.vmf_insert_folio(index, grabbed.folio)):
            answer = "retry"
        yield from self.unlock_and_put(grabbed.folio)
        return answer

    @override
    def punch_hole(self, start: Index, nr: int) -> Steps[Conversion]:
        """invalidate_inode_pages2_range() with byte offsets where page indexes belong (S4)."""
        host = self.driver
        yield from host.begin_op("punch", start, nr)
        yield from host.down_write("invalidate")
        ret = yield from self.invalidate_pages2(Index(start * PAGE), Index((start + nr) * PAGE - 1))
        yield from host.end_op(ret, start if ret else None)
        yield from host.up_write("invalidate")
        return Conversion(ret, start if ret else None)

    def invalidate_pages2(self, first: Index, last: Index) -> Steps[int]:
        """mm/truncate.c: unmap, launder and drop each folio of page indexes [first, last]; -EBUSY for those that stay."""
        host = self.driver
        ret, index, end = 0, first, min(last + 1, self.size)
        while (found := (yield from self.cached(index, end))) is not None:
            index, hit = found
            locked = yield from host.lock_folio(hit.folio)
            yield from host.unmap_mapping_pages(hit.pgoff, hit.folio.nr)
            if (yield from self.launder_if_provided(index, hit.folio, locked.no_direct_map)):
                ret = -EBUSY
            else:
                yield from host.filemap_remove_folio(hit.folio)
            yield from self.unlock_and_put(hit.folio)
            index = hit.pgoff + hit.folio.nr
        return ret

    def cached(self, index: Index, end: int) -> Steps[tuple[Index, Lookup] | None]:
        """The first of pages [index, end) that is in the page cache, with its folio referenced; holes are walked over."""
        host, misses = self.driver, 0
        while index < end:
            hit = yield from host.filemap_get_folio(index)
            if hit is not None:
                return index, hit
            index, misses = index + 1, misses + 1
            if misses >= MISSES and index < end:
                index = yield from host.filemap_find_folio(index, end - index)
        return None

    def launder_if_provided(self, index: Index, folio: Folio, marked: bool) -> Steps[int]:
        """release_folio / launder_folio: shared pages are taken back as well, without touching the direct map."""
        (bound,) = yield from self.driver.tree_load("bindings", index, 1)
        return (yield from self.reclaim_folio(head_gfn(bound_gfn(bound), folio), folio, marked, True)) if bound else 0

    @override
    def error_folio(self, folio: Folio, locked: Locked) -> Steps[MfResult]:
        """error_remove_folio: launder; folio lock, then invalidate_lock."""
        host = self.driver
        if locked.pgoff is None:
            return "failed"
        yield from host.down_read("invalidate")
        yield from host.unmap_mapping_pages(locked.pgoff, folio.nr)
        ret = yield from self.launder_if_provided(locked.pgoff, folio, locked.no_direct_map)
        yield from host.up_read("invalidate")
        return "failed" if ret else "delayed"

    # -- the end (20/35, vm_mgr.c) -------------------------------------------------------------------------------

    @override
    def vm_teardown(self) -> Steps[int]:
        """Each binding: reclaim (a failure only warns), drop its file reference; then what is left in the tree."""
        host = self.driver
        yield from host.begin_op("teardown", FIRST_PAGE, self.size)
        for index in span(FIRST_PAGE, self.size):
            (bound,) = yield from host.tree_load("bindings", index, 1)
            if bound:
                yield from host.down_write("bindings")
                if (yield from self.reclaim_range(bound_gfn(bound), 1)):
                    yield from host.warn(f"page {index} is not reclaimed")
                yield from host.tree_store_reserved("bindings", index, Entries(0, 1))
                yield from host.up_write("bindings")
                yield from self.close()
        # One less, as it takes one too many (S5).
        if (yield from self.reclaim_range(FIRST_GFN, self.scene.guest_frames - 1)):
            yield from host.warn("guest memory is lost")
        yield from host.end_op(0)
        yield from self.ops.release()
        return 0

    @override
    def evict(self) -> Steps[None]:
        """The inode goes: truncate_inode_pages() drops what is cached, no matter who owns it."""
        host, index = self.driver, FIRST_PAGE
        while (found := (yield from self.cached(index, self.size))) is not None:
            index, hit = found
            yield from host.lock_folio(hit.folio)
            yield from host.filemap_remove_folio(hit.folio)
            yield from self.unlock_and_put(hit.folio)
            index += 1
        yield from host.destroy_inode()
        yield from host.module_put()

"""`guestmem-rfc1`: "mm: Introduce guest_memfd library" (RFC, 5 Aug 2024), the first one posted, with NO_DIRECT_MAP.

Differs from our library: there is no conversion between attributes; a folio is accessible or not, tracked in the folio;
`grab` zaps, the flush comes with restoring (R25); make_inaccessible looks at pins only (R12); a failing direct-map call
is a BUG_ON (R26); callers of grab test for NULL (S41); punch ignores a refusal (S40); nothing looks after gfn_to_pfn
caches (R21) or hibernation (R4).

Clients: KVM, pKVM with it, as converted in the series (no ->accessible: private from birth, no mmap). For any other
hypervisor the client is the Gunyah one of the CLO tree (@a36302d6, never posted), with its mistakes (S51).
"""

from __future__ import annotations

from collections.abc import Mapping
from errno import EBUSY, EFAULT, EINVAL, EPERM
from typing import ClassVar

from guest_memfd.compat import override
from guest_memfd.core.gmem import Conversion, Grabbed, Held, PowerPolicy, bound_gfn
from guest_memfd.designs.design import Design, NoAttributes
from guest_memfd.errors import EHWPOISON
from guest_memfd.words.primitives import Bound, Folio, Steps, VmFault
from guest_memfd.words.units import Gfn, Index, span


class GuestmemRfc1(NoAttributes, Design):
    """mm/guest_memfd.c of the RFC."""

    name = "guestmem-rfc1"
    title = "the first posted guest_memfd library, with NO_DIRECT_MAP"
    source = "20240805-guest-memfd-lib-v1-*-e5a29a4ff5d7@quicinc.com; CodeLinaro guest_memfd.c @a36302d6"
    power: PowerPolicy = "none"
    no_direct_map = False
    keeps: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("bind", "unbind", "vm_teardown"), "the client's: the series gives it no say in bindings"),
        "create": "a file and an inode; without attributes, as init_attributes() has it here",
        **dict.fromkeys(("munmap", "close"), "a mapping and a reference go as every file's do"),
        "evict": "the end of the inode removes every page of it, as truncation does",
        "error_folio": "the callback that the series took over from virt/kvm/guest_memfd.c",
        **dict.fromkeys(("hibernate_prepare", "hibernate_post"), "the series has nothing of it: power is 'none'"),
    }
    bounds: ClassVar[Mapping[str, Bound]] = {
        **Design.bounds, "allocate": Bound(writes=1, splits=1),
        "user_fault": Bound(writes=2, flushes=1, calls=2, splits=1), "punch": Bound(writes=1, flushes=1, calls=4, splits=3),
    }

    @property
    def has_accessible(self) -> bool:
        """Whether the client supplies ->accessible; the KVM of the series does not."""
        return self.ops.module != "kvm"

    def lends(self, index: Index) -> bool:
        """Whether the page's binding lends (the client's flag)."""
        return not self.has_accessible or index not in self.born_shared

    @override
    def present(self, start: Index, nr: int) -> Steps[tuple[Held, ...]]:
        """What is private is what the binding lends."""
        folios = yield from super().present(start, nr)
        return tuple(held._replace(private=self.lends(held.pgoff)) for held in folios)

    # -- grab ----------------------------------------------------------------------------------------------------

    def grab(self, index: Index, uptodate: bool) -> Steps[Grabbed | int]:
        """guest_memfd_grab_folio(): zero only if asked; without ->accessible leave the direct map every time (R19)."""
        host = self.host
        hit = yield from host.filemap_get_folio(index)
        if hit is None:
            new = yield from host.filemap_add_folio(index, 0)
            if isinstance(new, int):
                return new
            hit, zeroed, marked = new, False, False
        else:
            locked = yield from host.lock_folio(hit.folio)
            if locked.hwpoison:
                yield from self.unlock_and_put(hit.folio)
                return -EHWPOISON
            zeroed, marked = locked.uptodate, locked.no_direct_map
        # The caller decides. Who asks without gets whatever the frame held before.
        if uptodate and not zeroed:
            yield from self.zero(hit.folio)
        if not self.has_accessible:
            yield from self.unmap_direct(hit.folio)
            marked = True
        return Grabbed(hit.folio, index, marked)

    def unmap_direct(self, folio: Folio) -> Steps[None]:
        """set_direct_map_invalid_noflush() and BUG_ON (R26); no flush (R25)."""
        # Splitting a leaf needs memory, so this fails on a machine that is short of it, and the whole machine goes.
        if (yield from self.host.set_direct_map_invalid_noflush(folio)):
            yield from self.host.bug("BUG_ON(set_direct_map_invalid_noflush())")
        yield from self.host.folio_set_no_direct_map(folio, True)

    def map_direct(self, folio: Folio) -> Steps[None]:
        """set_direct_map_default_noflush(), BUG_ON, and the flush."""
        if (yield from self.host.set_direct_map_default_noflush(folio)):
            yield from self.host.bug("BUG_ON(set_direct_map_default_noflush())")
        # On the way back, where no stale entry can exist; the way out, where one can, has none (R25).
        yield from self.host.flush_tlb_kernel_range((folio,))
        yield from self.host.folio_set_no_direct_map(folio, False)

    # -- the guest's side ----------------------------------------------------------------------------------------

    @override
    def guest_fault(self, gfn: Gfn, index: Index) -> Steps[int]:
        """The client's demand paging."""
        host = self.host
        yield from host.begin_op("fault", index, 1, gfn)
        yield from host.down_read("invalidate")
        (bound,) = yield from host.tree_load("bindings", index, 1)
        if bound != gfn + 1:
            ret, tidy = -EFAULT, True
        elif self.has_accessible:
            ret, tidy = yield from self._demand_page(gfn, index)
        else:
            ret, tidy = yield from self._get_pfn(gfn, index)
        yield from host.end_op(ret)
        if tidy:
            yield from host.up_read("invalidate")
        return ret

    # KVM of the series: grab(UPTODATE | PREPARE), then map.
    def _get_pfn(self, gfn: Gfn, index: Index) -> Steps[tuple[int, bool]]:
        grabbed = yield from self.grab(index, True)
        if isinstance(grabbed, int):
            return grabbed, True
        ret = yield from self.ops.prepare_private(gfn, grabbed.folio)
        yield from self.unlock_and_put(grabbed.folio)
        return ret, True

    # CLO: not zeroed; error paths leave the invalidate lock, and once the folio, as they are (S51).
    def _demand_page(self, gfn: Gfn, index: Index) -> Steps[tuple[int, bool]]:
        grabbed = yield from self.grab(index, False)
        if isinstance(grabbed, int):
            return grabbed, False
        if not self.lends(index):
            ret = yield from self.ops.prepare_shared(gfn, grabbed.folio)
        else:
            if not grabbed.no_direct_map and (yield from self.make_inaccessible(index, grabbed.folio)):
                return -EPERM, False
            ret = yield from self.ops.prepare_private(gfn, grabbed.folio)
        yield from self.unlock_and_put(grabbed.folio)
        return ret, not ret

    def make_inaccessible(self, index: Index, folio: Folio) -> Steps[int]:
        """guest_memfd_make_inaccessible(): unmap from user space, look for DMA pins, leave the direct map."""
        yield from self.host.unmap_mapping_pages(index, folio.nr)
        # References without FOLL_PIN are not seen: vmsplice, /proc/pid/mem (R12).
        if (yield from self.host.folio_maybe_dma_pinned(folio)):
            return -EBUSY
        yield from self.unmap_direct(folio)
        return 0

    # -- the host's side -----------------------------------------------------------------------------------------

    @override
    def mmap(self) -> Steps[int]:
        """Map the file, where the driver has ->accessible; -EPERM where it has not."""
        return (yield from self.host.mmap()) if self.has_accessible else -EPERM

    @override
    def user_fault(self, index: Index) -> Steps[VmFault]:
        """guest_memfd_fault(): grab, zeroed, before ->accessible is asked (R22); an error pointer is not NULL (S41)."""
        host = self.host
        yield from host.down_read("invalidate")
        grabbed = yield from self.grab(index, True)
        if isinstance(grabbed, int):
            yield from host.bug("an error pointer from guest_memfd_grab_folio() is dereferenced in the fault handler")
            return "SIGBUS"
        yield from host.begin_op("user_fault", index, 1)
        answer: VmFault = "SIGBUS"
        if not (yield from self.accessible(grabbed)):
            if grabbed.no_direct_map:
                yield from self.map_direct(grabbed.folio)
            mapped = yield from host.vmf_insert_folio(index, grabbed.folio)
            answer = "ok" if mapped else "retry"
        yield from host.end_op(-EFAULT if answer == "SIGBUS" else 0)
        yield from self.unlock_and_put(grabbed.folio)
        yield from host.up_read("invalidate")
        return answer

    def accessible(self, grabbed: Grabbed) -> Steps[int]:
        """CLO ->accessible: take the folio back if it is lent; the offset inside the folio serves as file offset (S51)."""
        return (yield from self.take_back_at(Index(0), grabbed.folio)) if grabbed.no_direct_map else 0

    def take_back_at(self, index: Index, folio: Folio) -> Steps[int]:
        """Unmap and reclaim *folio* from the binding that covers page *index*."""
        (bound,) = yield from self.host.tree_load("bindings", index, 1)
        if not bound:
            return 0
        private = self.lends(index)
        ret = yield from self.ops.invalidate(bound_gfn(bound), folio, private, "punch")
        if not ret and private:
            ret = yield from self.ops.reclaim(bound_gfn(bound), folio)
        return ret

    @override
    def allocate(self, start: Index, nr: int) -> Steps[int]:
        """fallocate: tests for NULL, gets an error pointer (S41)."""
        host = self.host
        if not self.has(start, nr):
            return -EINVAL
        yield from host.begin_op("allocate", start, nr)
        yield from host.down_read("invalidate")
        for index in span(start, nr):
            grabbed = yield from self.grab(index, True)
            if isinstance(grabbed, int):
                yield from host.bug("an error pointer from guest_memfd_grab_folio() is dereferenced in fallocate")
                return grabbed
            yield from self.unlock_and_put(grabbed.folio)
        yield from host.end_op(0)
        yield from host.up_read("invalidate")
        return 0

    @override
    def punch_hole(self, start: Index, nr: int) -> Steps[Conversion]:
        """Whatever invalidate_begin says, the answer is 0 (S40)."""
        nr = min(nr, self.size - start)
        yield from self.host.begin_op("punch", start, nr)
        yield from self.host.down_write("invalidate")
        if nr > 0:
            # The result is dropped: a page that the guest keeps is still there, and user space is told that it is
            # gone.
            yield from self.remove_range(start, nr, "punch")
        yield from self.host.end_op(0)
        yield from self.host.up_write("invalidate")
        return Conversion(0)

    @override
    def return_to_kernel(self, held: Held, marked: bool) -> Steps[None]:
        """free_folio: restore the direct map; no one scrubs."""
        if marked:
            yield from self.map_direct(held.folio)

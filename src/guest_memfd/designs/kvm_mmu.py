"""KVM's MMU as guest_memfd sees it: how a vCPU gets a page mapped, and how mappings are taken away.

Theory of operation. Nothing is held from finding a page to mapping it, and the page is not referenced. What makes that
safe is a sequence. Who takes pages from a guest begins an invalidation under mmu_lock, zaps there what is mapped, does
what it has to do to the pages, and ends the invalidation under mmu_lock, which moves the sequence on. A vCPU samples
the sequence before it looks at anything else, and compares under mmu_lock before it maps: if its gfn is being
invalidated, or anything has been since, what it has found is worth nothing, and it faults again.

The memslot is found under SRCU, which keeps it; whether the page is private is read without any lock, before the page is
looked up, and is as good as the sequence says. The file is held over each look into it. That reference may be the file's
last. Its end then waits for the end of the fault, as a task's work does that goes back to user space: it takes
slots_lock, whose holder may be waiting for this reader of SRCU.

Left out: the guest's own idea of what is private, which the hardware tells, and the exit where KVM's is another; huge
mappings, shadow paging; that mmu_lock spins. What is zapped are the pages that the file has, where KVM goes by gfn.

Sources: virt/kvm/guest_memfd.c (7.4): __kvm_gmem_invalidate_start(), kvm_gmem_get_pfn(), kvm_gmem_is_private_gfn();
arch/x86/kvm/mmu/mmu.c: kvm_mmu_faultin_pfn(), is_page_fault_stale(); include/linux/kvm_host.h: mmu_invalidate_retry_gfn().
"""

from __future__ import annotations

from errno import EAGAIN, EFAULT, EIO
from typing import Final

from guest_memfd.compat import override
from guest_memfd.core.gmem import Held, filled
from guest_memfd.core.library import Library
from guest_memfd.core.ops import Reason
from guest_memfd.designs.filemap import filemap_grab_folio
from guest_memfd.errors import EHWPOISON
from guest_memfd.words.pagestate import PRIVATE_PAGE, SLOT_INVALID
from guest_memfd.words.primitives import Folio, Locked, Steps
from guest_memfd.words.units import Gfn, Index

KVM_FILTER_PRIVATE: Final = frozenset({True})
KVM_FILTER_SHARED: Final = frozenset({False})
ALL: Final = KVM_FILTER_PRIVATE | KVM_FILTER_SHARED
"""Which mappings an invalidation zaps: those of pages that are private, or are not."""


class KvmMmu(Library):
    """Invalidation, and the fault of a vCPU."""

    # -- taking pages away ---------------------------------------------------------------------------------------

    def invalidate_start(
        self, start: Index, nr: int, folios: tuple[Held, ...], of: frozenset[bool], reason: Reason,
    ) -> Steps[None]:
        """Begin, and zap those of *folios*, all that are present in [start, start+nr), that filter *of* has.

        Nothing where no page of the range is bound. Bindings must stay as they are until `invalidate_end`.
        """
        host = self.host
        if not filled((yield from host.tree_load("bindings", start, nr))):
            return
        yield from host.down_write("mmu")
        yield from host.gmem_invalidate_begin(start, nr)
        for held in folios:
            if held.gfn is not None and held.private in of:
                yield from self.unmap_gfn(held.gfn, held, reason)
        yield from host.up_write("mmu")

    def unmap_gfn(self, gfn: Gfn, held: Held, reason: Reason) -> Steps[None]:
        """kvm_mmu_unmap_gfn_range(): the guest's mapping goes, and under TDX what the guest has of a private page with it.

        It returns nothing: what the TDX module does not give back, asked twice, KVM_BUG_ON() is said about.
        """
        yield from self.ops.invalidate(gfn, held.folio, held.private, reason)
        yield from self.take_back(held)

    def invalidate_end(self, start: Index, nr: int) -> Steps[None]:
        """End it: vCPUs that have looked since it began look again."""
        if filled((yield from self.host.tree_load("bindings", start, nr))):
            yield from self.host.down_write("mmu")
            yield from self.host.gmem_invalidate_end()
            yield from self.host.up_write("mmu")

    # -- the fault of a vCPU -------------------------------------------------------------------------------------

    @override
    def guest_fault(self, gfn: Gfn, index: Index) -> Steps[int]:
        """kvm_mmu_do_page_fault(): 0, -EAGAIN (the vCPU faults again), -EFAULT, or as `get_pfn`."""
        host = self.host
        yield from host.begin_op("fault", index, 1, gfn)
        yield from host.srcu_read_lock()
        ret, last = yield from self.fault_in_slot(gfn)
        yield from host.srcu_read_unlock()
        if last:
            yield from self.file_released()
        return ret

    def fault_in_slot(self, gfn: Gfn) -> Steps[tuple[int, bool]]:
        """The fault inside of the SRCU read section; and whether the file's last reference has gone with it."""
        host = self.host
        (slot,) = yield from host.tree_load("memslots", gfn, 1)
        if not slot:                                                    # no memory there: MMIO, for user space to emulate
            return (yield from self.refused(-EFAULT, last=False))
        seq = yield from host.mmu_invalidate_seq()
        # On its way out. Once it has gone the next fault says so.
        if slot & SLOT_INVALID:
            return (yield from self.refused(-EAGAIN, last=False))
        index = Index((slot >> 1) - 1)
        private, last = yield from self.is_private(gfn, index)
        found, gone = yield from self.get_pfn(gfn, index)
        if isinstance(found, int):
            return (yield from self.refused(found, last=last or gone))
        return (yield from self.map_pfn(seq, gfn, found, private=private)), last or gone

    def refused(self, ret: int, *, last: bool) -> Steps[tuple[int, bool]]:
        """The fault ends with *ret*, and maps nothing."""
        yield from self.host.end_op(ret)
        return ret, last

    def map_pfn(self, seq: int, gfn: Gfn, folio: Folio, *, private: bool) -> Steps[int]:
        """Map *folio*, which nobody holds, if nothing has happened to *gfn* since *seq*; -EAGAIN otherwise; -ENOMEM."""
        host = self.host
        yield from host.down_read("mmu")
        if (yield from host.mmu_invalidate_retry(seq, gfn)):
            ret = -EAGAIN
        else:
            ret = yield from (self.ops.prepare_private if private else self.ops.prepare_shared)(gfn, folio)
        yield from host.end_op(ret)
        yield from host.up_read("mmu")
        return ret

    # -- what the file says --------------------------------------------------------------------------------------

    def hold_file(self, gfn: Gfn) -> Steps[bool]:
        """kvm_gmem_get_file(): hold the file that the memslot at *gfn* points to, unless its last reference has gone."""
        (there,) = yield from self.host.tree_load("gmem_files", gfn, 1)
        return bool(there) and (yield from self.host.get_file())

    def is_private(self, gfn: Gfn, index: Index) -> Steps[tuple[bool, bool]]:
        """kvm_gmem_is_private_gfn(): without a lock; and whether the file's last reference has gone with it."""
        if not (yield from self.hold_file(gfn)):
            return False, False
        (attribute,) = yield from self.host.tree_load("attributes", index, 1)
        return attribute == PRIVATE_PAGE, (yield from self.host.fput())

    def get_pfn(self, gfn: Gfn, index: Index) -> Steps[tuple[Folio | int, bool]]:
        """kvm_gmem_get_pfn(): the page, zeroed, without a reference; and whether the file's last reference has gone.

        -EFAULT for a file that is gone or going, -EIO where the page is not bound there, -EHWPOISON, -ENOMEM.
        """
        host = self.host
        if not (yield from self.hold_file(gfn)):
            return -EFAULT, False
        yield from host.down_read("invalidate")
        found = yield from self.get_pfn_locked(gfn, index)
        yield from host.up_read("invalidate")
        return found, (yield from host.fput())

    def get_pfn_locked(self, gfn: Gfn, index: Index) -> Steps[Folio | int]:
        """`get_pfn`, under the invalidate lock."""
        host = self.host
        (there,) = yield from host.tree_load("gmem_files", gfn, 1)
        (bound,) = yield from host.tree_load("bindings", index, 1)
        if not there or bound != gfn + 1:
            return -EIO if there else -EFAULT
        found = yield from self.get_folio(index)
        if isinstance(found, int):
            return found
        folio, locked = found
        if locked.hwpoison:
            yield from self.unlock_and_put(folio)
            return -EHWPOISON
        if not locked.uptodate:
            yield from self.zero(folio)
        (attribute,) = yield from host.tree_load("attributes", index, 1)
        # kvm_arch_gmem_make_private(): at every fault of a private page, so it has to bear being repeated.
        if attribute == PRIVATE_PAGE:
            yield from self.ops.make_private(gfn, folio)
        yield from self.unlock_and_put(folio)
        return folio

    def get_folio(self, index: Index) -> Steps[tuple[Folio, Locked] | int]:
        """kvm_gmem_get_folio(): find or allocate, locked, not zeroed; -ENOMEM, -EAGAIN."""
        return (yield from filemap_grab_folio(self.host, index))

    def file_released(self) -> Steps[None]:
        """The file's last reference has gone (kvm_memslots.py)."""
        yield from ()

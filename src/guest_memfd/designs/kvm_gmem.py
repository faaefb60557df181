"""`kvm-7.4`: KVM's guest_memfd as merged for 7.4, with conversion in place (v13, 10 Sep 2026).

Differs from our library in its protocol (kvm_mmu.py, kvm_memslots.py), and: the direct map is left alone; nothing of what
a guest has written is scrubbed when its page is freed, as for all memory of user space; nothing keeps hibernation away. A
page is zeroed at its first use, and not when fallocate() brings it. A fault of the VMM drops the invalidate lock before
the page is zeroed and mapped, and keeps the folio locked instead. memory_failure() has a folio locked and waits for the
invalidate lock.

A guest of `kvm` here is a KVM_X86_SW_PROTECTED_VM: private memory without hardware that guards it, so the hooks
make_private, make_shared, reclaim and invalidate_range have nothing to do, and contents survive a conversion.

Left out: SNP and TDX, whose hooks do something; NUMA policies; -EINTR; two files of one inode.
Source: virt/kvm/guest_memfd.c of linux-next, 23 Sep 2026 (1ae5be958ff7, 799c9fadc639, dcde2f853ff4, 2e646bcfcf90,
e088c7f86bef, cb0544296a33, edcc3f42981e, 83411f32b8ad, e6ecb88711d9, 53c34396c19e, 1f3359c873db, 89fbe3de01cc).
"""

from __future__ import annotations

from collections.abc import Mapping
from errno import EAGAIN, EEXIST, EFAULT, EINVAL, EIO
from typing import ClassVar

from guest_memfd.compat import override
from guest_memfd.core.convert import CACHE_AND_LOOKUP
from guest_memfd.core.gmem import Conversion, Held, PowerPolicy, bound_gfn
from guest_memfd.core.ops import Reason
from guest_memfd.designs.design import Design
from guest_memfd.designs.kvm_memslots import KvmMemslots
from guest_memfd.designs.kvm_mmu import ALL, KVM_FILTER_PRIVATE, KVM_FILTER_SHARED
from guest_memfd.errors import EHWPOISON
from guest_memfd.words.pagestate import PRIVATE_PAGE, SHARED_PAGE
from guest_memfd.words.primitives import Bound, Entries, Folio, Locked, MfResult, Steps, VmFault
from guest_memfd.words.units import FIRST_PAGE, Index


class Kvm74(KvmMemslots, Design):
    """The file: conversions, faults of the VMM, and how pages go."""

    name = "kvm-7.4"
    title = "KVM's guest_memfd with conversion in place, as merged for 7.4"
    source = "virt/kvm/guest_memfd.c of linux-next, 23 Sep 2026"
    hypervisors: ClassVar[tuple[str, ...] | None] = ("kvm",)
    power: PowerPolicy = "none"
    no_direct_map = False
    offers: ClassVar[tuple[str, ...]] = ("populate",)
    errnos: ClassVar[Mapping[str, tuple[int, ...]]] = {"fault": (EIO,)}
    keeps: ClassVar[Mapping[str, str]] = {
        "create": "inode, attributes of every page, file, descriptor, in this order",
        **dict.fromkeys(("make_private", "make_shared", "punch_hole"),
                        "range, lock and result are alike; their steps under the lock take the place of ours"),
        **dict.fromkeys(("mmap", "munmap"), "a VMA over the whole file, which holds the inode"),
        **dict.fromkeys(("hibernate_prepare", "hibernate_post"), "KVM has nothing of it: power is 'none'"),
    }
    bounds: ClassVar[Mapping[str, Bound]] = {**Design.bounds, "populate": Bound()}

    # -- conversion ----------------------------------------------------------------------------------------------

    @override
    def make_private_locked(self, start: Index, nr: int) -> Steps[Conversion]:
        """__kvm_gmem_set_attributes(): nodes, user mappings, references, and from there on nothing fails.

        -ENOMEM is about all of the range, so no page is named; KVM's error_offset is where it begins.
        """
        host = self.host
        attributes = yield from host.tree_load("attributes", start, nr)
        if attributes.count(PRIVATE_PAGE) == nr:
            return Conversion(0)
        ret = yield from host.tree_reserve("attributes", start, nr)
        if ret:
            return Conversion(ret)
        yield from host.unmap_mapping_pages(start, nr)
        folios = yield from self.present(start, nr)
        busy = yield from self.unexpected_refs(folios)
        if busy is not None:
            yield from host.tree_release("attributes")
            yield from self.put_all(folios)
            return Conversion(-EAGAIN, busy)
        yield from self.invalidate_start(start, nr, folios, KVM_FILTER_SHARED, "to_private")
        yield from host.tree_store_reserved("attributes", start, Entries(PRIVATE_PAGE, nr))
        yield from self.invalidate_end(start, nr)
        yield from self.put_all(folios)
        return Conversion(0)

    @override
    def unexpected_refs(self, folios: tuple[Held, ...]) -> Steps[Index | None]:
        """Pinned, mapped, or referenced by somebody else: a fault of the VMM maps its page without the invalidate lock.

        The kernel's count has a reference for each entry of a user page table, and ours has none. To ask for entries
        between two counts comes to the same: after the first no fault is under way, and so no entry comes any more.
        """
        busy = yield from super().unexpected_refs(folios)
        for held in folios:
            if busy is not None and busy <= held.pgoff:
                break
            if (yield from self.host.folio_mapped(held.folio)) or (
                    yield from self.host.folio_ref_count(held.folio)) > CACHE_AND_LOOKUP:
                return held.pgoff
        return busy

    @override
    def make_shared_locked(self, start: Index, nr: int) -> Steps[Conversion]:
        """The same without the check: references do no harm to what becomes shared."""
        host = self.host
        attributes = yield from host.tree_load("attributes", start, nr)
        if attributes.count(SHARED_PAGE) == nr:
            return Conversion(0)
        ret = yield from host.tree_reserve("attributes", start, nr)
        if ret:
            return Conversion(ret)
        folios = yield from self.present(start, nr)
        yield from self.invalidate_start(start, nr, folios, KVM_FILTER_PRIVATE, "to_shared")
        for held in folios:
            if held.gfn is not None:
                yield from self.ops.make_shared(held.gfn, held.folio)
        yield from host.tree_store_reserved("attributes", start, Entries(SHARED_PAGE, nr))
        yield from self.invalidate_end(start, nr)
        yield from self.put_all(folios)
        return Conversion(0)

    # -- the VMM -------------------------------------------------------------------------------------------------

    @override
    def user_fault(self, index: Index) -> Steps[VmFault]:
        """kvm_gmem_fault_user_mapping(), and the entry that mm makes with the folio locked."""
        host = self.host
        if index >= self.size:
            return "SIGBUS"
        yield from host.begin_op("user_fault", index, 1)
        yield from host.down_read("invalidate")
        (attribute,) = yield from host.tree_load("attributes", index, 1)
        found = (yield from self.get_folio(index)) if attribute == SHARED_PAGE else -EFAULT
        if isinstance(found, int):
            again = found == -EAGAIN
            yield from host.end_op(0 if again else -EFAULT)
            yield from host.up_read("invalidate")
            return "retry" if again else "SIGBUS"
        yield from host.up_read("invalidate")
        return (yield from self.map_for_user(index, *found))

    def map_for_user(self, index: Index, folio: Folio, locked: Locked) -> Steps[VmFault]:
        """Zero and map the locked folio, and let go of it; ``SIGBUS`` for memory that is broken (__do_fault())."""
        host = self.host
        answer: VmFault = "SIGBUS"
        if not locked.hwpoison:
            if not locked.uptodate:
                yield from self.zero(folio)
            answer = "ok" if (yield from host.vmf_insert_folio(index, folio)) else "retry"
        yield from host.end_op(-EFAULT if answer == "SIGBUS" else 0)
        yield from self.unlock_and_put(folio)
        return answer

    @override
    def allocate(self, start: Index, nr: int) -> Steps[int]:
        """kvm_gmem_allocate(): pages, and nothing in them yet; those that were allocated before an error stay."""
        host = self.host
        if not self.has(start, nr):
            return -EINVAL
        yield from host.begin_op("allocate", start, nr)
        yield from host.down_read("invalidate")
        ret, index = 0, start
        while not ret and index < start + nr:
            found = yield from self.get_folio(index)
            if isinstance(found, int):
                ret = found
            else:
                yield from self.unlock_and_put(found[0])
                index = index + 1
        yield from host.end_op(ret, index if ret else None)
        yield from host.up_read("invalidate")
        return ret

    def populate(self, index: Index) -> Steps[int]:
        """kvm_gmem_populate() of one page, whose source has been pinned before: 0, -EINVAL (shared), -EHWPOISON, -ENOMEM.

        -EEXIST for a page that has been used: what the guest has, the hardware refuses there.
        """
        host = self.host
        yield from host.begin_op("populate", index, 1)
        yield from host.mutex_lock("slots")
        yield from host.down_write("invalidate")
        found = yield from self.get_folio(index)
        ret = found if isinstance(found, int) else (yield from self.populate_locked(index, *found))
        yield from host.end_op(ret)
        yield from host.up_write("invalidate")
        yield from host.mutex_unlock("slots")
        return ret

    def populate_locked(self, index: Index, folio: Folio, locked: Locked) -> Steps[int]:
        """Zero the page, whatever the source is, and copy to it if it is private; then let go of it."""
        host = self.host
        (attribute,) = yield from host.tree_load("attributes", index, 1)
        ret = -EHWPOISON if locked.hwpoison else -EEXIST if locked.uptodate else 0
        if not ret:
            yield from self.zero(folio)
        if attribute != PRIVATE_PAGE and not locked.hwpoison:
            ret = -EINVAL
        elif not ret:
            yield from host.write_folio(folio, False)
        yield from self.unlock_and_put(folio)
        return ret

    # -- how pages go --------------------------------------------------------------------------------------------

    @override
    def remove_range(self, start: Index, nr: int, reason: Reason) -> Steps[Conversion]:
        """kvm_gmem_punch_hole() under the lock; attributes stay as they are."""
        folios = yield from self.present(start, nr)
        yield from self.invalidate_start(start, nr, folios, ALL, reason)
        yield from self.truncate(folios)
        yield from self.invalidate_end(start, nr)
        return Conversion(0)

    def truncate(self, folios: tuple[Held, ...]) -> Steps[None]:
        """truncate_inode_pages_range(), and free_folio() of each."""
        host = self.host
        for held in folios:
            yield from host.lock_folio(held.folio)
            yield from host.unmap_mapping_pages(held.pgoff, held.folio.nr)
            yield from host.filemap_remove_folio(held.folio)
            yield from self.free_folio(held)
            yield from self.unlock_and_put(held.folio)

    def free_folio(self, held: Held) -> Steps[None]:
        """kvm_gmem_free_folio(), of a page that has left the file: what the hypervisor has of it comes back."""
        if held.gfn is not None and held.private:
            yield from self.ops.reclaim(held.gfn, held.folio)

    @override
    def evict(self) -> Steps[None]:
        """truncate_inode_pages_final(), which takes no lock but those of folios."""
        yield from self.truncate((yield from self.present(FIRST_PAGE, self.size)))
        yield from self.host.destroy_inode()
        yield from self.host.module_put()

    @override
    def error_folio(self, folio: Folio, locked: Locked) -> Steps[MfResult]:
        """kvm_gmem_error_folio(), called with the folio locked, which keeps it in the file: ``delayed``, always."""
        host = self.host
        if locked.pgoff is None:
            return "failed"
        yield from host.unmap_mapping_pages(locked.pgoff, folio.nr)                 # hwpoison_user_mappings()
        yield from host.down_read("invalidate")
        (bound,) = yield from host.tree_load("bindings", locked.pgoff, 1)
        (attribute,) = yield from host.tree_load("attributes", locked.pgoff, 1)
        held = Held(folio, locked.pgoff, bound_gfn(bound) if bound else None, attribute == PRIVATE_PAGE)
        yield from self.invalidate_start(locked.pgoff, folio.nr, (held,), ALL, "error")
        yield from self.invalidate_end(locked.pgoff, folio.nr)
        yield from host.up_read("invalidate")
        return "delayed"

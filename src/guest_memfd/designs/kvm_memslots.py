"""KVM's memslots, and what they are to a guest_memfd: bindings in two steps, deletion, and the end of the file.

A memslot points to the file without holding it, and the file has its bindings, page index -> memslot; the file holds the VM,
not the other way round. Memslots change under slots_lock, and the end of a file takes it, too. So a memslot that is deleted
while its file is on its way out finds the bindings still there, and takes them away; and what the end of the file finds in
its bindings are memslots that are still there. Lock order: slots_lock, invalidate_lock, mmu_lock.

A memslot is bound before vCPUs can find it, in two steps: `prepare` looks the file up and sees what is wrong with the
request, `commit` stores the bindings, when nothing else of the memslot can fail. One that goes is marked, vCPUs that have
found it are waited for, its pages are zapped, its bindings go, and then it does.

Here a memslot has one page, since VMMs are made to give up parts of what they have bound. A VM that is destroyed has its
memslots deleted first; in KVM it lives on until its file is closed. A deletion moves the generation of memslots on, and with
that ends kernel mappings (kvm_gpc_check()): gmem_invalidate_begin() stands for it here.

Sources: virt/kvm/guest_memfd.c (7.4): kvm_gmem_prepare_memory_region(), kvm_gmem_commit_memory_region(), kvm_gmem_unbind(),
kvm_gmem_release(); virt/kvm/kvm_main.c: kvm_set_memslot(), kvm_invalidate_memslot().
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from errno import EBADF, EEXIST, EINVAL, ENODEV, ENOENT

from guest_memfd.compat import override
from guest_memfd.core.gmem import Conversion, bound_gfn, filled
from guest_memfd.core.ops import Reason
from guest_memfd.designs.kvm_mmu import ALL, KvmMmu
from guest_memfd.words.pagestate import SLOT_INVALID
from guest_memfd.words.primitives import Entries, Steps
from guest_memfd.words.units import FIRST_GFN, FIRST_PAGE, Gfn, Index

Slots = Mapping[Gfn, Index]
"""Memslots of a page each: where they are in the guest, and in the file."""

EVERY_GFN = 1 << 40
"""More gfns than a VM has."""


def present_in(entries: Sequence[int], first: int = 0) -> list[tuple[int, int]]:
    """Those of *entries* that are no holes, and where: at the price of what is there, whatever the tree could have."""
    if not filled(entries):
        return []
    if filled(entries) == len(entries):
        return [*enumerate(entries, first)]
    half = len(entries) // 2
    return present_in(entries[:half], first) + present_in(entries[half:], first + half)


class KvmMemslots(KvmMmu):
    """KVM_SET_USER_MEMORY_REGION2, as far as it is about guest_memfd, and the file's release()."""

    # -- a memslot is made ---------------------------------------------------------------------------------------

    @override
    def bind(self, gfn: Gfn, start: Index, nr: int) -> Steps[int]:
        """A memslot for each page; -EINVAL, -EEXIST (of gfns, or of pages), -EBADF, -ENOMEM, -ENODEV (the VM is stopped)."""
        host = self.host
        if not self.fits(start, nr):
            return -EINVAL
        yield from host.begin_op("bind", start, nr, gfn)
        yield from host.mutex_lock("slots")
        slots = yield from host.tree_load("memslots", gfn, nr)
        held = False
        if filled(slots):
            ret = -EEXIST
        elif (yield from host.vm_state()) != "running":
            ret = -ENODEV
        else:
            ret = yield from self.prepare(start, nr)
            held = not ret
            ret = ret or (yield from self.commit(gfn, start, nr))
        if not ret:
            yield from self.install(gfn, start, nr)
        yield from host.end_op(ret)
        yield from host.mutex_unlock("slots")
        if held:
            yield from self.close()
        return ret

    def fits(self, start: Index, nr: int) -> bool:
        """Whether the file has what the memslot asks for: with offset and size unsigned."""
        return self.has(start, nr)

    def prepare(self, start: Index, nr: int) -> Steps[int]:
        """The file is held until the memslot is bound, or given up: 0, or -EBADF for one that has gone."""
        return 0 if (yield from self.host.get_file()) else -EBADF

    def commit(self, gfn: Gfn, start: Index, nr: int) -> Steps[int]:
        """Store the bindings; -EEXIST where there are some already, -ENOMEM, and there are none."""
        host = self.host
        yield from host.down_write("invalidate")
        bound = yield from host.tree_load("bindings", start, nr)
        ret = -EEXIST if filled(bound) else (yield from host.tree_store("bindings", start, Entries(gfn + 1, nr, 1)))
        yield from host.up_write("invalidate")
        return ret

    def install(self, gfn: Gfn, start: Index, nr: int) -> Steps[None]:
        """From here on vCPUs find the memslot, and its file in it."""
        yield from self.host.tree_store_reserved("gmem_files", gfn, Entries(1, nr))
        yield from self.host.tree_store_reserved("memslots", gfn, Entries(start + 1 << 1, nr, 2))

    # -- a memslot goes ------------------------------------------------------------------------------------------

    @override
    def unbind(self, start: Index, nr: int) -> Steps[Conversion]:
        """Delete the memslots of [start, start+nr); -EINVAL outside of the file, -ENOENT where there is none."""
        if not self.has(start, nr):
            return Conversion(-EINVAL)
        yield from self.host.begin_op("unbind", start, nr)
        yield from self.host.mutex_lock("slots")
        slots = yield from self.slots_of(start, nr)
        ret = 0 if slots else -ENOENT
        yield from self.delete(slots, "unbind")
        yield from self.host.end_op(ret)
        yield from self.host.mutex_unlock("slots")
        return Conversion(ret)

    @override
    def vm_teardown(self) -> Steps[int]:
        """kvm_destroy_vm() for its memslots: 0."""
        yield from self.host.begin_op("teardown", FIRST_PAGE, self.size)
        yield from self.host.mutex_lock("slots")
        yield from self.delete((yield from self.slots_of(FIRST_PAGE, self.size)), "teardown")
        yield from self.host.end_op(0)
        yield from self.host.mutex_unlock("slots")
        yield from self.ops.release()
        return 0

    def slots_of(self, start: Index, nr: int) -> Steps[Slots]:
        """The memslots of [start, start+nr), whatever has become of their file, under slots_lock."""
        slots = yield from self.host.tree_load("memslots", FIRST_GFN, EVERY_GFN)
        return {FIRST_GFN + at: Index((slot >> 1) - 1) for at, slot in present_in(slots) if start < slot >> 1 <= start + nr}

    def delete(self, slots: Slots, reason: Reason) -> Steps[None]:
        """kvm_set_memslot(), KVM_MR_DELETE: marked, waited for, zapped and unbound, gone."""
        host = self.host
        for gfn, index in slots.items():
            yield from host.tree_store_reserved("memslots", gfn, Entries(index + 1 << 1 | SLOT_INVALID, 1))
        if slots:
            yield from host.synchronize_srcu()
        yield from self.unbind_slots(slots, reason)
        for gfn in slots:
            yield from host.tree_store_reserved("memslots", gfn, Entries(0, 1))

    def unbind_slots(self, slots: Slots, reason: Reason) -> Steps[None]:
        """kvm_gmem_unbind(): nothing where the file has ended; under the invalidate lock, be the file alive or dying."""
        host = self.host
        there = []
        for gfn, index in slots.items():
            if (yield from host.tree_load("gmem_files", gfn, 1))[0]:
                there.append((gfn, index))
        if there:
            yield from host.down_write("invalidate")
            for gfn, index in there:
                yield from self.zap_and_unbind(gfn, index, reason)
            yield from host.up_write("invalidate")

    def zap_and_unbind(self, gfn: Gfn, index: Index, reason: Reason) -> Steps[None]:
        """What the memslot has mapped goes, and then the binding and the pointer to the file."""
        host = self.host
        folios = yield from self.present(index, 1)
        yield from host.down_write("mmu")
        yield from host.gmem_invalidate_begin(index, 1)
        for held in folios:
            yield from self.unmap_gfn(gfn, held, reason)
        yield from host.tree_store_reserved("bindings", index, Entries(0, 1))
        yield from host.gmem_invalidate_end()
        yield from host.up_write("mmu")
        yield from host.tree_store_reserved("gmem_files", gfn, Entries(0, 1))
        yield from self.put_all(folios)

    # -- the file ends -------------------------------------------------------------------------------------------

    @override
    def close(self) -> Steps[None]:
        """Drop a reference on the file, and end it with the last."""
        if (yield from self.host.fput()):
            yield from self.file_released()

    @override
    def file_released(self) -> Steps[None]:
        """kvm_gmem_release(), and then the file's reference on the inode goes."""
        host = self.host
        yield from host.mutex_lock("slots")
        yield from host.down_write("invalidate")
        bound = yield from host.tree_load("bindings", FIRST_PAGE, self.size)
        for _, entry in present_in(bound):
            yield from host.tree_store_reserved("gmem_files", bound_gfn(entry), Entries(0, 1))
        folios = yield from self.present(FIRST_PAGE, self.size)
        yield from self.invalidate_start(FIRST_PAGE, self.size, folios, ALL, "unbind")
        yield from self.invalidate_end(FIRST_PAGE, self.size)
        yield from self.put_all(folios)
        if filled(bound):                                   # list_del(): nobody finds them by the inode any more
            yield from host.tree_store_reserved("bindings", FIRST_PAGE, Entries(0, self.size))
        yield from host.up_write("invalidate")
        yield from host.mutex_unlock("slots")
        if (yield from host.iput()):
            yield from self.evict()

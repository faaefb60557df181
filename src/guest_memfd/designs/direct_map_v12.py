"""`direct-map-v12`: "Direct Map Removal Support for guest_memfd" v12 (10 Apr 2026), with write(2) of its companion series.

Differs from our library: a page leaves the direct map at the first fault, the guest's or the VMM's, private or shared, and
comes back when it is freed. So one that was allocated and never touched stays there. Removal flushes whether it has
failed or not, and marks the folio if it has not. The result of restoring is a warning. No one scrubs a page that is
freed: KVM zeroes at the first use, as for all memory of user space. GUP is refused, write(2) is refused for a page that
has left ("userspace can write exactly once", Sean Christopherson, 21 Apr 2026), and populate there is none.

It is a series for KVM before conversion in place: which pages are private is what the file was made with. Nothing of it
is about hibernation. Left out: FEAT_S2FWB, without which arm64 refuses the flag; TDX and SNP, which it refuses. The errno
of a refused write is ours (-EEXIST), as is the lock around it.
"""

from __future__ import annotations

from collections.abc import Mapping
from errno import EEXIST
from typing import ClassVar

from guest_memfd.compat import override
from guest_memfd.core.gmem import Grabbed, Held, PowerPolicy
from guest_memfd.designs.design import Design, NoConversion
from guest_memfd.designs.filled import on_shared
from guest_memfd.words.pagestate import PRIVATE_PAGE
from guest_memfd.words.primitives import Bound, Folio, Steps
from guest_memfd.words.units import Gfn, Index


class DirectMapV12(NoConversion, Design):
    """A file of KVM's with GUEST_MEMFD_FLAG_NO_DIRECT_MAP: zap before the first mapping, restore in free_folio."""

    name = "direct-map-v12"
    title = "out of the direct map at the first fault, and back when it is freed"
    source = "20260410151746.61150-1-kalyazin@amazon.com; Sean Christopherson, 21 Apr 2026"
    hypervisors = ("kvm",)
    power: PowerPolicy = "none"
    gup = False
    promises = ("no-direct-map",)
    offers: ClassVar[tuple[str, ...]] = ("write",)
    keeps: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("create", "mmap", "munmap", "close", "evict", "bind", "unbind", "vm_teardown"),
                        "the series has a flag at creation, and leaves the life of file and bindings alone"),
        **dict.fromkeys(("guest_fault", "user_fault", "allocate", "punch_hole"),
                        "its steps at the first fault and at the free take the place of ours"),
        "error_folio": "a broken page is taken from its users, and stays out",
        **dict.fromkeys(("hibernate_prepare", "hibernate_post"), "the series has nothing of it: power is 'none'"),
    }
    bounds: ClassVar[Mapping[str, Bound]] = {
        **Design.bounds, "user_fault": Bound(writes=1, flushes=1, stalls=0, splits=1),
        "write": Bound(writes=1, flushes=1, stalls=0, splits=1),
    }

    # -- out, and back -------------------------------------------------------------------------------------------

    @override
    def zap(self, folio: Folio) -> Steps[int]:
        """folio_zap_direct_map(): the flush comes after a failure, too, and the mark after a success only."""
        ret = yield from self.host.set_direct_map_invalid_noflush(folio)
        yield from self.flush((folio,))
        if not ret:
            yield from self.host.folio_set_no_direct_map(folio, True)
        return ret

    def zap_once(self, grabbed: Grabbed) -> Steps[int]:
        """0 for a folio that has left; else `zap`."""
        return 0 if grabbed.no_direct_map else (yield from self.zap(grabbed.folio))

    @override
    def return_to_kernel(self, held: Held, marked: bool) -> Steps[None]:
        """kvm_gmem_free_folio(): folio_restore_direct_map(), with a WARN_ON() where it fails; nothing is scrubbed."""
        if marked:
            if (yield from self.host.set_direct_map_default_noflush(held.folio)):
                yield from self.host.warn(f"{held.folio} is freed with a hole in the direct map")
            yield from self.host.folio_set_no_direct_map(held.folio, False)

    # -- faults --------------------------------------------------------------------------------------------------

    @override
    def fault_bound(self, gfn: Gfn, index: Index) -> Steps[int]:
        """kvm_gmem_get_pfn(): zero, zap, prepare. One that cannot be prepared stays in the file, out of the direct map."""
        (attribute,) = yield from self.host.tree_load("attributes", index, 1)
        grabbed = yield from self.grab_folio(index)
        if isinstance(grabbed, int):
            return grabbed
        ret = yield from self.zap_once(grabbed)
        if not ret:
            prepare = self.ops.prepare_private if attribute == PRIVATE_PAGE else self.ops.prepare_shared
            ret = yield from prepare(gfn, grabbed.folio)
        yield from self.unlock_and_put(grabbed.folio)
        return ret

    @override
    def make_accessible(self, grabbed: Grabbed) -> Steps[int]:
        """The VMM has its own mapping. One that cannot be zapped stays in the file, unmarked, and in the direct map."""
        return (yield from self.zap_once(grabbed))

    # -- write(2) ------------------------------------------------------------------------------------------------

    def write(self, index: Index) -> Steps[int]:
        """Copy a page into the file: 0; -EEXIST when it has left the direct map, -EFAULT when it is private."""
        return (yield from on_shared(self, "write", index, self.write_locked))

    def write_locked(self, index: Index) -> Steps[int]:
        """write_begin() refuses what has left, write_end() takes out what was written."""
        grabbed = yield from self.grab_folio(index)
        if isinstance(grabbed, int):
            return grabbed
        ret = -EEXIST
        if not grabbed.no_direct_map:
            yield from self.host.write_folio(grabbed.folio, False)
            ret = yield from self.write_end(grabbed)
        yield from self.unlock_and_put(grabbed.folio)
        return ret

    def write_end(self, grabbed: Grabbed) -> Steps[int]:
        """The page leaves the direct map; -ENOMEM if it cannot, and what was written is there."""
        return (yield from self.zap_once(grabbed))

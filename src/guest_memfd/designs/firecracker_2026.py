"""`firecracker-2026`: v12 as a branch ships it (firecracker-microvm/firecracker feature/secret-hiding, 14 Aug 2026).

Differs from `direct-map-v12`: nothing is flushed unless the module parameter guest_memfd_tlb_flush says so, and it does
not (patch 0039); write_end() takes a page out if it is out already, which write_begin() has refused (0062); UFFDIO_COPY has
the same test, of a page that is new (0083), and would leave a page in the file that it cannot take out; gfn_to_pfn_cache
goes by pages and not by user addresses. Its VMM fills memory by both, flags 15.

Left out: patch 0032 prepares a page for the guest before it zaps it. On KVM as it is here there is nothing to prepare, and
the guest is given the page after both; under a hypervisor that takes the page from the host it is wrong (docs/bugs.md).
KVM_MEM_USERFAULT, asynchronous page faults.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from guest_memfd.compat import override
from guest_memfd.core.gmem import Grabbed
from guest_memfd.designs.direct_map_v12 import DirectMapV12
from guest_memfd.designs.filled import on_shared, pfn_of_shared
from guest_memfd.words.primitives import Bound, Folio, Steps
from guest_memfd.words.units import Index


class Firecracker2026(DirectMapV12):
    """The 94 patches on Amazon Linux 6.18, where they differ from what was posted."""

    name = "firecracker-2026"
    title = "v12 as a branch ships it: no flush, and write() and UFFDIO_COPY that take nothing out"
    source = "firecracker-microvm/firecracker c695671fa (14 Aug 2026), patches 0025, 0039, 0060, 0062, 0083"
    offers = ("write", "copy", "cached_pfn")
    bounds: ClassVar[Mapping[str, Bound]] = {**DirectMapV12.bounds, "copy": Bound(writes=1, stalls=0, splits=1)}

    @override
    def flush(self, folios: tuple[Folio, ...]) -> Steps[None]:
        """guest_memfd_tlb_flush is off (0039)."""
        yield from ()

    def is_due(self, grabbed: Grabbed) -> bool:
        """Whether a page that was filled is taken out: the test is the wrong way round (0062, 0083)."""
        return grabbed.no_direct_map

    @override
    def write_end(self, grabbed: Grabbed) -> Steps[int]:
        """`if (folio_test_no_direct_map(folio)) folio_zap_direct_map(folio)` (0062)."""
        return (yield from self.zap(grabbed.folio)) if self.is_due(grabbed) else 0

    def copy(self, index: Index) -> Steps[int]:
        """UFFDIO_COPY: allocate, copy, insert, and map it (mfill_atomic_pte_copy())."""
        return (yield from on_shared(self, "copy", index, self.copy_locked))

    def copy_locked(self, index: Index) -> Steps[int]:
        """0, -EEXIST, or -ENOMEM: of the zap it would leave the page in the file (0083)."""
        host = self.host
        folio = yield from host.filemap_alloc_folio(False)
        if isinstance(folio, int):
            return folio
        yield from host.write_folio(folio, False)
        yield from host.folio_mark_uptodate(folio)
        ret = yield from host.filemap_insert_folio(index, folio)
        if not ret:
            grabbed = Grabbed(folio, index, False)
            ret = (yield from self.zap(folio)) if self.is_due(grabbed) else 0
            # Where the VMA has gone meanwhile, the page is there for who maps it next.
            if ret:
                yield from self.cannot_be_zapped(folio)
            else:
                yield from host.vmf_insert_folio(index, folio)
        yield from self.unlock_and_put(folio)
        return ret

    def cannot_be_zapped(self, folio: Folio) -> Steps[None]:
        """A page of UFFDIO_COPY's that stays in the direct map stays in the file as well (0083)."""
        yield from ()

    def cached_pfn(self, index: Index) -> Steps[Folio | int]:
        """By the file and not by a user address; -EFAULT for a private page."""
        return (yield from pfn_of_shared(self, index))

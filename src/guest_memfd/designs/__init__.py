"""The designs: what was posted, one file per series, and ours. Third parties: entry points in ``guest_memfd.designs``."""

from __future__ import annotations

from collections.abc import Mapping

from guest_memfd.designs.alloc_unmapped import AllocUnmapped
from guest_memfd.designs.design import Design
from guest_memfd.designs.direct_map_v12 import DirectMapV12
from guest_memfd.designs.filemap_hook import FilemapHook
from guest_memfd.designs.firecracker_2026 import Firecracker2026
from guest_memfd.designs.gmem_2m import Gmem2m
from guest_memfd.designs.guestmem_rfc1 import GuestmemRfc1
from guest_memfd.designs.guestmem_rfc2 import GuestmemRfc2
from guest_memfd.designs.guestmem_v5 import GuestmemV5
from guest_memfd.designs.guestmem_v6 import GuestmemV6
from guest_memfd.designs.gunyah_v17 import GunyahV17
from guest_memfd.designs.hugetlb_2026 import Hugetlb2026
from guest_memfd.designs.hugetlb_rfc2 import HugetlbRfc2
from guest_memfd.designs.kvm_gmem import Kvm74
from guest_memfd.designs.names import lacks, misspelt
from guest_memfd.designs.none import Fixup, NoDesign
from guest_memfd.designs.ours import OurLibrary
from guest_memfd.designs.secretmem import Secretmem
from guest_memfd.plugins.registry import Registry

DESIGNS: Registry[type[Design]] = Registry("design", "guest_memfd.designs", {
    d.name: d for d in (NoDesign, GunyahV17, Fixup, Secretmem, GuestmemRfc1, OurLibrary,
                         Kvm74, DirectMapV12, Firecracker2026, FilemapHook, AllocUnmapped,
                         GuestmemRfc2, GuestmemV5, GuestmemV6, Gmem2m, HugetlbRfc2, Hugetlb2026)
}, lacks)

SETS: Mapping[str, tuple[str, ...]] = {
    "2026": tuple(d.name for d in (Kvm74, DirectMapV12, Firecracker2026, FilemapHook, AllocUnmapped)),
    "posted": tuple(d.name for d in (GuestmemRfc2, GuestmemV5, GuestmemV6)),
    "huge": tuple(d.name for d in (Gmem2m, HugetlbRfc2, Hugetlb2026)),
}
"""Designs that are compared together: those that are argued about in a year, how the library was posted after the first
time, and those with huge folios. Those in none are compared by default."""

__all__ = ["DESIGNS", "SETS", "Design", "misspelt"]

"""The designs: what was posted, one file per series, and ours. Third parties: entry points in ``guest_memfd.designs``."""

from __future__ import annotations

from collections.abc import Mapping

from guest_memfd.designs.alloc_unmapped import AllocUnmapped
from guest_memfd.designs.design import Design
from guest_memfd.designs.direct_map_v12 import DirectMapV12
from guest_memfd.designs.filemap_hook import FilemapHook
from guest_memfd.designs.firecracker_2026 import Firecracker2026
from guest_memfd.designs.guestmem_rfc1 import GuestmemRfc1
from guest_memfd.designs.gunyah_v17 import GunyahV17
from guest_memfd.designs.kvm_gmem import Kvm74
from guest_memfd.designs.names import lacks, misspelt
from guest_memfd.designs.none import Fixup, NoDesign
from guest_memfd.designs.ours import OurLibrary
from guest_memfd.designs.secretmem import Secretmem
from guest_memfd.plugins.registry import Registry

DESIGNS: Registry[type[Design]] = Registry("design", "guest_memfd.designs", {
    d.name: d for d in (NoDesign, GunyahV17, Fixup, Secretmem, GuestmemRfc1, OurLibrary,
                         Kvm74, DirectMapV12, Firecracker2026, FilemapHook, AllocUnmapped)
}, lacks)

SETS: Mapping[str, tuple[str, ...]] = {
    "2026": tuple(d.name for d in (Kvm74, DirectMapV12, Firecracker2026, FilemapHook, AllocUnmapped)),
}
"""Designs that are compared together, by the year in which they are argued about; those in none are compared by default."""

__all__ = ["DESIGNS", "SETS", "Design", "misspelt"]

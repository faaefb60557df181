"""The designs: what was posted, one file per series, and ours. Third parties: entry points in ``guest_memfd.designs``."""

from __future__ import annotations

from guest_memfd.designs.design import Design
from guest_memfd.designs.guestmem_rfc1 import GuestmemRfc1
from guest_memfd.designs.gunyah_v17 import GunyahV17
from guest_memfd.designs.names import lacks, misspelt
from guest_memfd.designs.none import Fixup, NoDesign
from guest_memfd.designs.ours import OurLibrary
from guest_memfd.designs.secretmem import Secretmem
from guest_memfd.plugins.registry import Registry

DESIGNS: Registry[type[Design]] = Registry("design", "guest_memfd.designs", {
    d.name: d for d in (NoDesign, GunyahV17, Fixup, Secretmem, GuestmemRfc1, OurLibrary)
}, lacks)

__all__ = ["DESIGNS", "Design", "misspelt"]

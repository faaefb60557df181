"""Gunyah's own half: memory extents and address spaces, as far as the library's driver uses them.

One host extent and two guest extents are collapsed into the owner record: `host`, `guest` (lent: private, protected)
and `shared`. Source: docs/api/gunyah_api.md of the Gunyah hypervisor (2024), errors as the Linux driver maps them.
"""

from __future__ import annotations

from errno import EBUSY, EINVAL

from guest_memfd.core.hypervisor import Stage2
from guest_memfd.words.primitives import Folio
from guest_memfd.words.units import Gfn, Pfn


def donate_to_protected(stage2: Stage2, folio: Folio) -> int:
    """MEMEXTENT_DONATE TO_PROTECTED: host extent -> guest extent; the host's mapping goes. -EINVAL: not the owner."""
    if stage2.owner(folio.pfn) != "host":
        return -EINVAL
    stage2.set_owner(folio.pfn, "guest")
    stage2.host_maps(folio.pfn, False)
    return 0


def donate_from_protected(stage2: Stage2, folio: Folio) -> int:
    """MEMEXTENT_DONATE FROM_PROTECTED: -EBUSY while anything maps the page, -EINVAL: not the owner. Never unmaps."""
    if stage2.owner(folio.pfn) != "guest":
        return -EINVAL
    # The order is the driver's duty: unmap, then donate. Gunyah never unmaps without being asked to, so it refuses.
    if stage2.gfn_of(folio.pfn) is not None:
        return stage2.refuse("donate_from_protected", EBUSY)
    stage2.set_owner(folio.pfn, "host")
    stage2.host_maps(folio.pfn, True)
    return 0


def donate_to_sibling(stage2: Stage2, folio: Folio) -> int:
    """MEMEXTENT_DONATE TO_SIBLING, host_shared -> guest_shared: both may map it. -EINVAL: not the owner."""
    if stage2.owner(folio.pfn) != "host":
        return -EINVAL
    stage2.set_owner(folio.pfn, "shared")
    return 0


def donate_from_sibling(stage2: Stage2, folio: Folio) -> int:
    """TO_SIBLING back: what maps the page by way of the guest's extent maps it no longer. -EINVAL: not the owner."""
    if stage2.owner(folio.pfn) != "shared":
        return -EINVAL
    # Extents that are shared have recorded mappings: a page that leaves the extent leaves every place where the
    # extent is mapped.
    gfn = stage2.gfn_of(folio.pfn)
    if gfn is not None:
        stage2.guest_unmap(gfn, folio.pfn)
    stage2.set_owner(folio.pfn, "host")
    return 0


def map_private(stage2: Stage2, gfn: Gfn, folio: Folio) -> int:
    """ADDRSPACE_MAP PARTIAL|PRIVATE: the page becomes private and locked; -EACCES (here -EINVAL) if not the guest's."""
    if stage2.owner(folio.pfn) != "guest":
        return -EINVAL
    stage2.guest_map(gfn, folio.pfn)
    # A new private page is locked: from here on only the guest, or its end, lets it go.
    stage2.set_locked_in(folio.pfn, True)
    return 0


def map_vmmio(stage2: Stage2, gfn: Gfn, folio: Folio) -> int:
    """ADDRSPACE_MAP PARTIAL|VMMIO: existing mappings are silently replaced."""
    if stage2.owner(folio.pfn) != "shared":
        return -EINVAL
    stage2.guest_map(gfn, folio.pfn)
    return 0


def unmap_private(stage2: Stage2, gfn: Gfn, folio: Folio, sync: bool) -> int:
    """ADDRSPACE_UNMAP PRIVATE: -EBUSY while locked in a living VM; zeroes what the guest has not relinquished.

    A stopped VM holds on to nothing (its address space can no longer run; taken to follow from the driver, where
    memory is reclaimed after VM_STOP and before VM_RESET). Without *sync* (NOSYNC) TLBs may keep the entry.
    """
    if stage2.gfn_of(folio.pfn) != gfn or stage2.owner(folio.pfn) != "guest":
        return -EINVAL
    if stage2.locked_in(folio.pfn):
        # A living guest must have given the page up itself. A stopped one cannot run again, so nothing that it relied
        # on can be missed.
        if stage2.vm_alive():
            return stage2.refuse("unmap_private", EBUSY)
        stage2.scrub(folio.pfn)
        stage2.forget(folio.pfn)
        stage2.set_locked_in(folio.pfn, False)
    stage2.guest_unmap(gfn, folio.pfn, flush=sync)
    return 0


def unmap_vmmio(stage2: Stage2, gfn: Gfn, folio: Folio, sync: bool) -> int:
    """ADDRSPACE_UNMAP VMMIO: -EINVAL when there is no such mapping."""
    if stage2.owner(folio.pfn) != "shared" or not stage2.guest_unmap(gfn, folio.pfn, flush=sync):
        return -EINVAL
    return 0


def unlock_pages(stage2: Stage2, pfn: Pfn) -> None:
    """MODIFY_PAGES unlock with do_not_sanitise: the guest relinquishes a page, and what it holds is kept."""
    if stage2.owner(pfn) == "guest":
        stage2.set_locked_in(pfn, False)
        # do_not_sanitise is the guest's word that the contents may be seen.
        stage2.declassify(pfn)


def guest_touches(stage2: Stage2, pfn: Pfn) -> None:
    """A guest access to an unlocked page locks it again."""
    if stage2.owner(pfn) == "guest":
        stage2.set_locked_in(pfn, True)

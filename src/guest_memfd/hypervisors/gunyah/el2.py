"""Gunyah's own half: memory extents and address spaces, as far as the library's driver uses them.

One host extent and two guest extents are collapsed into the owner record: `host`, `guest` (lent: private, protected)
and `shared`. Source: docs/api/gunyah_api.md of the Gunyah hypervisor (2024), errors as the Linux driver maps them.
"""

from __future__ import annotations

from errno import EBUSY, EINVAL

from guest_memfd.core.hypervisor import Stage2, all_owned
from guest_memfd.words.primitives import Folio
from guest_memfd.words.units import Gfn, Pfn


def donate_to_protected(stage2: Stage2, folio: Folio) -> int:
    """MEMEXTENT_DONATE TO_PROTECTED: host extent -> guest extent; the host's mapping goes. -EINVAL: not the owner."""
    if not all_owned(stage2, folio, "host"):
        return -EINVAL
    for pfn in folio.pfns:
        stage2.set_owner(pfn, "guest")
    stage2.host_maps(folio.pfn, False, folio.order)
    return 0


def donate_from_protected(stage2: Stage2, folio: Folio) -> int:
    """MEMEXTENT_DONATE FROM_PROTECTED: -EBUSY while anything maps the page, -EINVAL: not the owner. Never unmaps."""
    if not all_owned(stage2, folio, "guest"):
        return -EINVAL
    # The order is the driver's duty: unmap, then donate. Gunyah never unmaps without being asked to, so it refuses.
    if any(stage2.gfn_of(pfn) is not None for pfn in folio.pfns):
        return stage2.refuse("donate_from_protected", EBUSY)
    for pfn in folio.pfns:
        stage2.set_owner(pfn, "host")
    stage2.host_maps(folio.pfn, True, folio.order)
    return 0


def donate_to_sibling(stage2: Stage2, folio: Folio) -> int:
    """MEMEXTENT_DONATE TO_SIBLING, host_shared -> guest_shared: both may map it. -EINVAL: not the owner."""
    if not all_owned(stage2, folio, "host"):
        return -EINVAL
    for pfn in folio.pfns:
        stage2.set_owner(pfn, "shared")
    return 0


def donate_from_sibling(stage2: Stage2, folio: Folio) -> int:
    """TO_SIBLING back: what maps the page by way of the guest's extent maps it no longer. -EINVAL: not the owner."""
    if not all_owned(stage2, folio, "shared"):
        return -EINVAL
    # Extents that are shared have recorded mappings: a page that leaves the extent leaves every place where the
    # extent is mapped.
    for pfn in folio.pfns:
        gfn = stage2.gfn_of(pfn)
        if gfn is not None:
            _unmap(stage2, gfn, Folio(pfn), sync=True)
        stage2.set_owner(pfn, "host")
    return 0


def map_private(stage2: Stage2, gfn: Gfn, folio: Folio) -> int:
    """ADDRSPACE_MAP PARTIAL|PRIVATE: the page becomes private and locked; -EACCES (here -EINVAL) if not the guest's."""
    if not all_owned(stage2, folio, "guest"):
        return -EINVAL
    stage2.guest_map(gfn, folio.pfn, folio.order)
    # A new private page is locked: from here on only the guest, or its end, lets it go.
    for pfn in folio.pfns:
        stage2.set_locked_in(pfn, True)
    return 0


def map_vmmio(stage2: Stage2, gfn: Gfn, folio: Folio) -> int:
    """ADDRSPACE_MAP PARTIAL|VMMIO: existing mappings are silently replaced."""
    if not all_owned(stage2, folio, "shared"):
        return -EINVAL
    stage2.guest_map(gfn, folio.pfn, folio.order)
    return 0


def unmap_private(stage2: Stage2, gfn: Gfn, folio: Folio, sync: bool) -> int:
    """ADDRSPACE_UNMAP PRIVATE: -EBUSY while locked in a living VM; zeroes what the guest has not relinquished.

    A stopped VM holds on to nothing (its address space can no longer run; taken to follow from the driver, where
    memory is reclaimed after VM_STOP and before VM_RESET). Without *sync* (NOSYNC) TLBs may keep the entry.
    """
    if not _mapped(stage2, gfn, folio) or not all_owned(stage2, folio, "guest"):
        return -EINVAL
    locked = [pfn for pfn in folio.pfns if stage2.locked_in(pfn)]
    # A living guest must have given the page up itself. A stopped one cannot run again, so nothing that it relied on can
    # be missed.
    if locked and stage2.vm_alive():
        return stage2.refuse("unmap_private", EBUSY)
    for pfn in locked:
        stage2.scrub(pfn)
        stage2.forget(pfn)
        stage2.set_locked_in(pfn, False)
    _unmap(stage2, gfn, folio, sync=sync)
    return 0


def unmap_vmmio(stage2: Stage2, gfn: Gfn, folio: Folio, sync: bool) -> int:
    """ADDRSPACE_UNMAP VMMIO: -EINVAL when there is no such mapping."""
    if not all_owned(stage2, folio, "shared"):
        return -EINVAL
    mapped = _mapped(stage2, gfn, folio)
    _unmap(stage2, gfn, folio, sync=sync)               # it flushes, whatever it finds
    return 0 if mapped else -EINVAL


# A block that is unmapped in part is cut first, and what is left of it stays mapped.
def _unmap(stage2: Stage2, gfn: Gfn, folio: Folio, *, sync: bool) -> None:
    if stage2.guest_leaf(gfn) > folio.order:
        stage2.guest_split(gfn, folio.order)
    for at, pfn in enumerate(folio.pfns):
        stage2.guest_unmap(gfn + at, pfn, flush=sync)


def _mapped(stage2: Stage2, gfn: Gfn, folio: Folio) -> bool:
    return all(stage2.gfn_of(pfn) == gfn + at for at, pfn in enumerate(folio.pfns))


def unlock_pages(stage2: Stage2, pfn: Pfn) -> None:
    """MODIFY_PAGES unlock with do_not_sanitise: the guest relinquishes a page, and what it holds is kept."""
    gfn = stage2.gfn_of(pfn)
    if stage2.owner(pfn) == "guest":
        # That it is unlocked is noted in its entry, so it gets one of its own.
        if gfn is not None:
            stage2.guest_split(gfn, 0)
        stage2.set_locked_in(pfn, False)
        # do_not_sanitise is the guest's word that the contents may be seen.
        stage2.declassify(pfn)


def guest_touches(stage2: Stage2, pfn: Pfn) -> None:
    """A guest access to an unlocked page locks it again."""
    if stage2.owner(pfn) == "guest":
        stage2.set_locked_in(pfn, True)

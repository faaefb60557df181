"""KVM on Arm CCA: the RMM keeps the granules that are delegated to it, and a host that touches one takes a protection fault.

A page that is given to a realm is delegated and mapped in one step here, as in KVM's map path; one that is taken from it is
unmapped by the RMM, which wipes it, and then given back by an undelegation. That can fail, and then the granule stays
with the RMM for good: KVM warns, and the page is lost. There is no way to block a page and to unblock it again: what is
unmapped has lost its contents, so a large entry is split before anything is changed, as under TDX.

The fault of the host (GPF) goes to the exception table, then to user space as SIGBUS, and else ends the kernel; one on a
table walk does so at once. Tables never lie in a file here, so that end is not seen.

Assumed: what a realm is given it finds zeroed; nothing but the RMM makes an undelegation fail.
Sources: "arm64: Support for Arm CCA in KVM" v15 (15 Jul 2026), its patch 03 for the fault; Realm Management Monitor
specification, RMI_GRANULE_DELEGATE and UNDELEGATE, RMI_RTT_DATA_MAP and DATA_UNMAP; Arm ARM D9, granule protection checks.
"""

from __future__ import annotations

from errno import EIO, ENOMEM, EPERM

from guest_memfd.compat import override
from guest_memfd.core.hypervisor import GPF, Hypervisor, Stage2
from guest_memfd.core.ops import Reason
from guest_memfd.hypervisors.kvm.coco import CocoOps, map_shared, unmap_shared
from guest_memfd.words.primitives import Folio, Steps
from guest_memfd.words.units import Gfn

# -- the RMM --------------------------------------------------------------------------------------------------------------


def data_map(stage2: Stage2, gfn: Gfn, folio: Folio) -> int:
    """Delegate the granules that are the host's, and map all of them; -EPERM if one is shared, or another realm's."""
    if any(stage2.owner(pfn) not in ("host", "guest") for pfn in folio.pfns):
        return -EPERM
    for pfn in folio.pfns:
        # Delegated already: another vCPU was faster, or the page was unmapped and not given back.
        if stage2.owner(pfn) == "host":
            stage2.set_owner(pfn, "guest")
            stage2.zeroed(pfn)
            stage2.host_maps(pfn, False)
    stage2.guest_map(gfn, folio.pfn, folio.order)
    return 0


def data_unmap(stage2: Stage2, gfn: Gfn, folio: Folio) -> int:
    """The realm loses the pages, with their contents; -EIO for a part of a larger entry, which has to be split first."""
    if stage2.guest_leaf(gfn) > folio.order:
        return -EIO
    for at, pfn in enumerate(folio.pfns):
        if stage2.owner(pfn) == "guest":
            stage2.guest_unmap(gfn + at, pfn)
            stage2.lose(pfn, "unmapped from the realm")
    return 0


def undelegate(stage2: Stage2, folio: Folio) -> int:
    """The host has the granules again; -EPERM for one that a realm still maps."""
    if any(stage2.gfn_of(pfn) is not None for pfn in folio.pfns):
        return -EPERM
    for pfn in folio.pfns:
        if stage2.owner(pfn) == "guest":
            stage2.set_owner(pfn, "host")
            stage2.host_maps(pfn, True)
    return 0


def rtt_split(stage2: Stage2, gfn: Gfn, folio: Folio) -> int:
    """RMI_RTT_CREATE over a block: an entry of each page, with its contents."""
    stage2.guest_split(gfn, folio.order)
    return 0


# -- the driver's half ----------------------------------------------------------------------------------------------------


class CcaOps(CocoOps):
    """Delegates and maps, unmaps and undelegates; what the RMM keeps is leaked."""

    @override
    def prepare_private(self, gfn: Gfn, folio: Folio) -> Steps[int]:
        """Delegate and map; -ENOMEM (tables of the realm)."""
        return (yield from self.host.hyp_call("data_map", gfn, folio))

    @override
    def split(self, gfn: Gfn, folio: Folio) -> Steps[int]:
        """A table in place of the block; -ENOMEM. Posted, that is done in the zap, which has no way to fail."""
        return (yield from self.host.hyp_call("rtt_split", gfn, folio))

    @override
    def invalidate(self, gfn: Gfn, folio: Folio, private: bool, reason: Reason) -> Steps[int]:
        """Unmap; a realm cannot refuse, and has lost what was there."""
        return (yield from self.host.hyp_call("data_unmap" if private else "unmap_shared", gfn, folio))

    @override
    def reclaim(self, gfn: Gfn, folio: Folio) -> Steps[int]:
        """Undelegate; -EIO if the RMM keeps the granule: the page is leaked."""
        return (yield from self.host.hyp_call("undelegate", folio))


CCA = Hypervisor(
    name="cca",
    title="KVM on Arm CCA: a page that is delegated faults in the host, which the kernel can fix up, and comes back empty",
    module="kvm",
    ops=CcaOps,
    hypercalls={
        "data_map": data_map, "data_unmap": data_unmap, "undelegate": undelegate, "rtt_split": rtt_split,
        "map_shared": map_shared, "unmap_shared": unmap_shared,
    },
    fallible={"data_map": -ENOMEM, "map_shared": -ENOMEM, "rtt_split": -ENOMEM},
    final={"undelegate": -EIO},
    abort=GPF,
    tracks_owner=True,
    pfn_cache=True,
    large=True,
)

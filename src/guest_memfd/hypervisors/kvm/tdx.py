"""KVM on Intel TDX: the TDX module owns the TD's private pages and its secure EPT; the host reaches them, and finds nothing.

The host's tables withhold nothing: what the host reads of a TD's page is not what the TD has written, and what it writes is
lost to the TD. A page that leaves the TD leaves its contents behind, and one that comes to it comes as zeros (the guest
accepts it). So what is not meant to go must not be touched: a block of which a part is to go is demoted first.

Two steps where KVM has one: `range_block` takes a page from the guest and can be undone, `page_remove` gives it to the host
and cannot. KVM does both in the zap. Collapsed here: AUG and the guest's ACCEPT; BLOCK, TRACK and the kick of vCPUs.

Sources: arch/x86/kvm/vmx/tdx.c; Intel TDX Module, TDH.MEM.PAGE.AUG, TDH.MEM.RANGE.BLOCK and UNBLOCK, TDH.MEM.PAGE.REMOVE
and DEMOTE; "KVM: TDX huge page support", v3 (6 Jan 2026), for the demotion before the zap.
"""

from __future__ import annotations

from errno import EAGAIN, EIO, ENOMEM, EPERM

from guest_memfd.compat import override
from guest_memfd.core.hypervisor import Hypervisor, Stage2, all_owned
from guest_memfd.core.ops import Reason
from guest_memfd.hypervisors.kvm.coco import CocoOps, map_shared, unmap_shared
from guest_memfd.words.primitives import Folio, Steps
from guest_memfd.words.units import Gfn

# -- the TDX module -------------------------------------------------------------------------------------------------------


def page_aug(stage2: Stage2, gfn: Gfn, folio: Folio) -> int:
    """TDH.MEM.PAGE.AUG and the guest's ACCEPT; of pages that are the TD's, blocked or not, TDH.MEM.RANGE.UNBLOCK.

    -EPERM if some are the TD's and some are not, or if another guest has them.
    """
    if all_owned(stage2, folio, "host"):
        for pfn in folio.pfns:
            stage2.set_owner(pfn, "guest")
            stage2.zeroed(pfn)
    elif not all_owned(stage2, folio, "guest"):
        return -EPERM
    stage2.guest_map(gfn, folio.pfn, folio.order)
    return 0


def range_block(stage2: Stage2, gfn: Gfn, folio: Folio) -> int:
    """TDH.MEM.RANGE.BLOCK and TRACK, all vCPUs out: the TD cannot reach the pages; -EIO for a part of a larger leaf."""
    if stage2.guest_leaf(gfn) > folio.order:
        return -EIO
    for at, pfn in enumerate(folio.pfns):
        stage2.guest_unmap(gfn + at, pfn)
    return 0


def page_remove(stage2: Stage2, gfn: Gfn, folio: Folio) -> int:
    """TDH.MEM.PAGE.REMOVE of what is the TD's, blocked: it is the host's, without its contents."""
    for at, pfn in enumerate(folio.pfns):
        if stage2.owner(pfn) == "guest":
            stage2.guest_unmap(gfn + at, pfn)
            stage2.lose(pfn, "removed from the TD")
            stage2.set_owner(pfn, "host")
    return 0


def page_demote(stage2: Stage2, gfn: Gfn, folio: Folio) -> int:
    """TDH.MEM.PAGE.DEMOTE: the leaf becomes leaves of single pages, with their contents."""
    stage2.guest_split(gfn, folio.order)
    return 0


# -- the driver's half ----------------------------------------------------------------------------------------------------


class TdxOps(CocoOps):
    """Blocks before anything is decided, removes when it is; what the module says no to for good is leaked."""

    @override
    def prepare_private(self, gfn: Gfn, folio: Folio) -> Steps[int]:
        """Add the pages, or unblock them; -ENOMEM."""
        return (yield from self.by_page(-EPERM, "page_aug", gfn, folio))

    @override
    def split(self, gfn: Gfn, folio: Folio) -> Steps[int]:
        """Demote; -ENOMEM (pages for the table, and for what the module keeps of each page)."""
        return (yield from self.host.hyp_call("page_demote", gfn, folio))

    @override
    def invalidate(self, gfn: Gfn, folio: Folio, private: bool, reason: Reason) -> Steps[int]:
        """Block, or unmap; a TD cannot refuse."""
        call = "range_block" if private else "unmap_shared"
        ret = yield from self.host.hyp_call(call, gfn, folio)
        # TDX_OPERAND_BUSY passes when no vCPU is inside.
        return (yield from self.host.hyp_call(call, gfn, folio)) if ret == -EAGAIN else ret

    @override
    def reclaim(self, gfn: Gfn, folio: Folio) -> Steps[int]:
        """Remove; -EIO if the module will not: the page is leaked."""
        return (yield from self.host.hyp_call("page_remove", gfn, folio))


TDX = Hypervisor(
    name="tdx",
    title="KVM on Intel TDX: what leaves the guest leaves its contents; the host reads nothing there, and hits no abort",
    lending="TDX adds the page to the TD (page_aug), and removes it (page_remove)",
    module="kvm",
    ops=TdxOps,
    hypercalls={
        "page_aug": page_aug, "range_block": range_block, "page_remove": page_remove, "page_demote": page_demote,
        "map_shared": map_shared, "unmap_shared": unmap_shared,
    },
    fallible={"page_aug": -ENOMEM, "map_shared": -ENOMEM, "page_demote": -ENOMEM, "range_block": -EAGAIN,
              "page_remove": -EAGAIN},
    final={"page_remove": -EIO},
    abort=None,
    tracks_owner=True,
    encrypts=True,
    pfn_cache=True,
    large=True,
)

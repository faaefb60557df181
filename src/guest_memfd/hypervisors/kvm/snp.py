"""KVM on AMD SEV-SNP: the reverse map table (RMP) says whose each page is; the host may read all, and write its own only.

What the host reads of a guest's page is ciphertext. A write of the host is checked at the size of its own mapping: through a
large entry of the direct map all pages below it must be the host's, or the write faults (bit 31 of the error code),
whichever page it means. An RMP entry has a size of its own; a part of a large one cannot be given back before it is
smashed (PSMASH).

Collapsed here: RMPUPDATE and the guest's PVALIDATE; the nested tables follow the RMP's size.

Sources: AMD64 Architecture Programmer's Manual, volume 2, 15.36; arch/x86/virt/svm/sev.c (rmp_make_private,
rmp_make_shared, psmash, snp_leak_pages); arch/x86/kvm/svm/sev.c (sev_gmem_prepare, sev_gmem_invalidate).
"""

from __future__ import annotations

from errno import EAGAIN, EIO, ENOMEM, EPERM

from guest_memfd.compat import override
from guest_memfd.core.hypervisor import RMP_FAULT, Hypervisor, Stage2, all_owned
from guest_memfd.core.ops import Reason
from guest_memfd.hypervisors.kvm.coco import CocoOps, map_shared, unmap_shared
from guest_memfd.hypervisors.kvm.default import mmu_unmap
from guest_memfd.words.primitives import Folio, Host, Steps
from guest_memfd.words.units import Gfn

# -- the RMP --------------------------------------------------------------------------------------------------------------


def rmp_assign(stage2: Stage2, gfn: Gfn, folio: Folio) -> int:
    """RMPUPDATE to the guest and its PVALIDATE, then the nested entry; -EPERM if only some of the pages are the guest's."""
    if all_owned(stage2, folio, "host"):
        for pfn in folio.pfns:
            stage2.set_owner(pfn, "guest")
            stage2.zeroed(pfn)
        stage2.host_maps(folio.pfn, False, folio.order)
    elif not all_owned(stage2, folio, "guest"):
        return -EPERM
    stage2.guest_map(gfn, folio.pfn, folio.order)
    return 0


def npt_map(stage2: Stage2, gfn: Gfn, folio: Folio) -> int:
    """The nested entry of what has been assigned before, and no look at the RMP.

    Of a page that is not the guest's there it faults at every access, so that it may as well be missing.
    """
    if all_owned(stage2, folio, "guest"):
        stage2.guest_map(gfn, folio.pfn, folio.order)
        return 0
    for at, pfn in enumerate(folio.pfns):
        if stage2.owner(pfn) == "guest":
            stage2.guest_map(gfn + at, pfn)
    return 0


def rmp_unassign(stage2: Stage2, folio: Folio) -> int:
    """RMPUPDATE to the host of what is the guest's; -EIO (FAIL_OVERLAP) for a part of a larger entry."""
    if stage2.host_leaf(folio.pfn) > folio.order and stage2.owner(folio.pfn) == "guest":
        return -EIO
    for pfn in folio.pfns:
        if stage2.owner(pfn) == "guest":
            stage2.lose(pfn, "unassigned in the RMP")
            stage2.set_owner(pfn, "host")
            stage2.host_maps(pfn, True)
    return 0


def psmash(stage2: Stage2, gfn: Gfn, folio: Folio) -> int:
    """PSMASH, and the nested entry with it: an entry of each page, validated as the large one was."""
    stage2.host_split(folio.pfn, folio.order)
    stage2.guest_split(gfn, folio.order)
    return 0


# -- the driver's half ----------------------------------------------------------------------------------------------------


class SnpOps(CocoOps):
    """What cannot be unassigned is leaked; what is assigned in part has the direct map split around it first."""

    def __init__(self) -> None:
        super().__init__()
        self.mm = Host("mm")

    @override
    def prepare_private(self, gfn: Gfn, folio: Folio) -> Steps[int]:
        """Split the direct map, if its entry maps more, and assign; -ENOMEM, -EAGAIN."""
        # adjust_direct_map(): a write to a neighbour through a large entry would fault. Of a block that is assigned as
        # such there is no neighbour below the same entry.
        if not folio.order:
            ret = yield from self.mm.split_direct_map(folio)
            if ret:
                return ret
        return (yield from self.by_page(-EPERM, "rmp_assign", gfn, folio))

    @override
    def split(self, gfn: Gfn, folio: Folio) -> Steps[int]:
        """PSMASH; -EAGAIN (FAIL_INUSE) twice in a row."""
        ret = yield from self.host.hyp_call("psmash", gfn, folio)
        return (yield from self.host.hyp_call("psmash", gfn, folio)) if ret == -EAGAIN else ret

    @override
    def invalidate(self, gfn: Gfn, folio: Folio, private: bool, reason: Reason) -> Steps[int]:
        """Zap; the guest cannot refuse."""
        return (yield from self.host.hyp_call("npt_zap" if private else "unmap_shared", gfn, folio))

    @override
    def reclaim(self, gfn: Gfn, folio: Folio) -> Steps[int]:
        """Unassign; -EIO if that is refused: snp_leak_pages()."""
        return (yield from self.host.hyp_call("rmp_unassign", folio))


SNP = Hypervisor(
    name="snp",
    title="KVM on AMD SEV-SNP: the host reads ciphertext, and a write through a large entry over one guest page faults",
    lending="SNP assigns the page to the guest in the RMP (rmp_assign), and unassigns it (rmp_unassign)",
    module="kvm",
    ops=SnpOps,
    hypercalls={
        "rmp_assign": rmp_assign, "rmp_unassign": rmp_unassign, "psmash": psmash, "npt_map": npt_map,
        "npt_zap": mmu_unmap,
        "map_shared": map_shared, "unmap_shared": unmap_shared,
    },
    fallible={"rmp_assign": -ENOMEM, "map_shared": -ENOMEM, "psmash": -EAGAIN, "rmp_unassign": -EAGAIN},
    final={"rmp_unassign": -EIO},
    abort=RMP_FAULT,
    guards="writes",
    tracks_owner=True,
    encrypts=True,
    pfn_cache=True,
    large=True,
)

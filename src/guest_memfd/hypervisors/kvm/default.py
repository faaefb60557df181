"""KVM without a host stage 2: a default VM. No one withholds pages from the host but the library.

Private here means: the library's word, and a hole in the direct map (hardening against stray and speculative reads).
Sources: virt/kvm/guest_memfd.c, arch/x86/kvm/mmu.
"""

from __future__ import annotations

from errno import ENOMEM

from guest_memfd.compat import override
from guest_memfd.core.hypervisor import Hypervisor, Stage2
from guest_memfd.core.ops import GuestMemfdOps, Reason
from guest_memfd.words.primitives import Folio, Steps
from guest_memfd.words.units import Gfn


def mmu_map(stage2: Stage2, gfn: Gfn, folio: Folio) -> int:
    """kvm_mmu_map_tdp_page() under mmu_lock: map the folio at *gfn*; 0, it cannot fail but by injection."""
    # No check of an owner: plain KVM keeps none, and nothing but the library stands between guest and host.
    stage2.guest_map(gfn, folio.pfn, folio.order)
    return 0


def mmu_unmap(stage2: Stage2, gfn: Gfn, folio: Folio) -> int:
    """kvm_mmu_unmap_gfn_range() and the remote TLB flush."""
    # With the flush: the library goes on to free or convert the page as soon as this returns. Of a large entry all goes,
    # also what is no part of the folio: the guest faults that in again.
    for at, pfn in enumerate(folio.pfns):
        stage2.guest_unmap(gfn + at, pfn)
    return 0


class KvmOps(GuestMemfdOps):
    """The driver's half: a map, an unmap, and no ownership to change."""

    module = "kvm"

    @override
    def prepare_private(self, gfn: Gfn, folio: Folio) -> Steps[int]:
        """Map the folio at *gfn*; 0 or -ENOMEM. There is no owner to record."""
        return (yield from self.host.hyp_call("mmu_map", gfn, folio))

    @override
    def prepare_shared(self, gfn: Gfn, folio: Folio) -> Steps[int]:
        """Map the folio at *gfn*; 0 or -ENOMEM. The guest reaches private and shared pages the same way."""
        return (yield from self.host.hyp_call("mmu_map", gfn, folio))

    @override
    def invalidate(self, gfn: Gfn, folio: Folio, private: bool, reason: Reason) -> Steps[int]:
        """Unmap it; never refuses."""
        return (yield from self.host.hyp_call("mmu_unmap", gfn, folio))

    @override
    def make_shared(self, gfn: Gfn, folio: Folio) -> Steps[int]:
        """0 at once: `invalidate` has unmapped the page, and there is no owner to change."""
        yield from ()
        return 0

    @override
    def make_private(self, gfn: Gfn, folio: Folio) -> Steps[None]:
        """No hypercall: there is no owner to change, and the next guest access maps the page."""
        yield from ()

    @override
    def reclaim(self, gfn: Gfn, folio: Folio) -> Steps[int]:
        """Nothing to change; the library scrubs."""
        yield from ()
        return 0


KVM = Hypervisor(
    name="kvm",
    title="KVM, default VM: no stage 2 guards a page, so private is what the library and the direct map make it",
    lending="KVM keeps no owner of a page, so it is lent when the file says that it is private",
    module="kvm",
    ops=KvmOps,
    hypercalls={"mmu_map": mmu_map, "mmu_unmap": mmu_unmap},
    fallible={"mmu_map": -ENOMEM},
    abort=None,
    tracks_owner=False,
    pfn_cache=True,
    large=True,
)

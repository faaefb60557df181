"""What KVM does alike for guests that the processor keeps apart: memory that is shared, and what comes back empty."""

from __future__ import annotations

from errno import EPERM

from guest_memfd.compat import override
from guest_memfd.core.hypervisor import Stage2, all_owned
from guest_memfd.core.ops import GuestMemfdOps
from guest_memfd.words.primitives import Folio, Steps
from guest_memfd.words.units import Gfn


def map_shared(stage2: Stage2, gfn: Gfn, folio: Folio) -> int:
    """KVM's own tables, at the shared alias of *gfn*; -EPERM for what the guest has."""
    if not all_owned(stage2, folio, "host") and not all_owned(stage2, folio, "shared"):
        return -EPERM
    for pfn in folio.pfns:
        stage2.set_owner(pfn, "shared")
    stage2.guest_map(gfn, folio.pfn, folio.order)
    return 0


def unmap_shared(stage2: Stage2, gfn: Gfn, folio: Folio) -> int:
    """As any zap of KVM: a large entry goes as a whole."""
    for at, pfn in enumerate(folio.pfns):
        stage2.guest_unmap(gfn + at, pfn)
        if stage2.owner(pfn) == "shared":
            stage2.set_owner(pfn, "host")
    return 0


class CocoOps(GuestMemfdOps):
    """The part of the driver's half that does not depend on the processor."""

    module = "kvm"
    scrubs = True

    @override
    def prepare_shared(self, gfn: Gfn, folio: Folio) -> Steps[int]:
        """Map it at the shared alias; -ENOMEM."""
        return (yield from self.host.hyp_call("map_shared", gfn, folio))

    @override
    def make_shared(self, gfn: Gfn, folio: Folio) -> Steps[int]:
        """As for good: the contents are gone, as the guest knows that asked for the conversion."""
        return (yield from self.reclaim(gfn, folio))

    @override
    def make_private(self, gfn: Gfn, folio: Folio) -> Steps[None]:
        """Nothing: the next fault gives the page to the guest."""
        yield from ()

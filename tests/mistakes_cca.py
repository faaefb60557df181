"""Mistakes under Arm CCA: the driver's half, or the RMM, with one of them each (tests/test_cca.py)."""

from __future__ import annotations

from dataclasses import replace
from errno import ENOMEM

from guest_memfd.core.hypervisor import Stage2
from guest_memfd.core.ops import Reason
from guest_memfd.hypervisors.kvm import cca
from guest_memfd.words.primitives import Folio, Steps


class WarnsOnly(cca.CcaOps):
    """An undelegation that fails is a WARN_ON(): the page goes on as the host's."""

    def reclaim(self, gfn: int, folio: Folio) -> Steps[int]:
        if (yield from super().reclaim(gfn, folio)):
            yield from self.host.warn(f"{folio} cannot be undelegated")
        return 0


class GivesUpInTheZap(cca.CcaOps):
    """The table over a block is made when a part of it is zapped; where there is no memory for it, nothing is zapped."""

    def split(self, gfn: int, folio: Folio) -> Steps[int]:
        yield from ()
        return 0

    def invalidate(self, gfn: int, folio: Folio, private: bool, reason: Reason) -> Steps[int]:
        ret = yield from super().invalidate(gfn, folio, private, reason)
        if ret and private:
            yield from self.host.warn(f"{folio} is still mapped")
        return ret if not private else 0


class ForgetsTheUndelegation(cca.CcaOps):
    """What is unmapped is the host's again, says the driver."""

    def reclaim(self, gfn: int, folio: Folio) -> Steps[int]:
        yield from ()
        return 0


def _splits_and_unmaps(stage2: Stage2, gfn: int, folio: Folio) -> int:
    stage2.guest_split(gfn, folio.order)
    return cca.data_unmap(stage2, gfn, folio)


def _without_a_wipe(stage2: Stage2, gfn: int, folio: Folio) -> int:
    for at, pfn in enumerate(folio.pfns):
        stage2.guest_unmap(gfn + at, pfn)
    return 0


WARNS_ONLY = replace(cca.CCA, ops=WarnsOnly)
GIVES_UP_IN_THE_ZAP = replace(
    cca.CCA, ops=GivesUpInTheZap, hypercalls={**cca.CCA.hypercalls, "data_unmap": _splits_and_unmaps},
    fallible={**cca.CCA.fallible, "data_unmap": -ENOMEM})
FORGETS_THE_UNDELEGATION = replace(cca.CCA, ops=ForgetsTheUndelegation)
WITHOUT_A_WIPE = replace(cca.CCA, hypercalls={**cca.CCA.hypercalls, "data_unmap": _without_a_wipe})

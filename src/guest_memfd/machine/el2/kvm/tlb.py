"""TLB maintenance after a change of stage 2. Here is what KVM flushes, in which order, for which VMID.

arch/arm64/kvm/hyp/nvhe/tlb.c: DSB; TLBI IPAS2E1IS, which stage-2-only entries obey; DSB; TLBI VMALLE1IS, since
combined entries and what stage-1 walks have cached obey only that; DSB; ISB, all in the context of the VMID.
"""

from __future__ import annotations

from collections.abc import Sequence

from guest_memfd.machine.hw.arm64 import tlbi
from guest_memfd.machine.hw.arm64.tlb import Tlb
from guest_memfd.words.units import Ipa, span

# What one range operation covers at most with 4 KiB pages: 32 << 16 of them.
_RANGE = 1 << 33


class Maintenance:
    """The TLBs of all CPUs, as one VMID's stage 2 flushes them."""

    def __init__(self, tlbs: Sequence[Tlb], vmid: int) -> None:
        self.tlbs, self.vmid = list(tlbs), vmid

    def flush_ipa(self, ipa: Ipa, level: int) -> None:
        """__kvm_tlb_flush_vmid_ipa(): one leaf at *level*."""
        # First the stage-2 entries: as long as one is there, a stage-1 walk could make a combined entry from it
        # again.
        tlbi.ipas2e1is(self.tlbs, ipa, self.vmid, level)
        # Then everything that has stage-1 information. By IPA it cannot be found, so all of the VMID goes.
        tlbi.vmalle1is(self.tlbs, self.vmid)

    def flush_range(self, ipa: Ipa, size: int) -> None:
        """__kvm_tlb_flush_vmid_range(): *size* bytes, whatever their level."""
        for at in span(ipa, -(-size // _RANGE), _RANGE):
            tlbi.ripas2e1is(self.tlbs, at, min(_RANGE, ipa + size - at), self.vmid)
        tlbi.vmalle1is(self.tlbs, self.vmid)

    def flush_all(self) -> None:
        """__kvm_tlb_flush_vmid(): drop all entries of the VMID, of both stages."""
        tlbi.vmalls12e1is(self.tlbs, self.vmid)

    def holds(self, ipa: Ipa, size: int) -> bool:
        """Whether some TLB still translates *ipa*, for `PageTable.live_check`."""
        return any(tlb.holds_stage2(ipa, self.vmid) for tlb in self.tlbs)

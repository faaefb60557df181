"""A host's stage 2 that is filled by faults: an identity map, in which a page that is given away is a note.

The largest block is mapped that fits. When a page is given away its block comes apart, and the rest is faulted in again
(arch/arm64/kvm/hyp/nvhe/mem_protect.c). Who may fill what, and what a note says, is the hypervisor's own.
"""

from __future__ import annotations

from collections.abc import Sequence

from guest_memfd.machine.el2.kvm.pgtable import KvmStage2Table
from guest_memfd.machine.el2.kvm.tlb import Maintenance
from guest_memfd.machine.hw.arm64.pages import PageSource
from guest_memfd.machine.hw.arm64.registers import PA_BITS, Vtcr
from guest_memfd.machine.hw.arm64.tables import PageTable
from guest_memfd.machine.hw.arm64.tlb import Tlb
from guest_memfd.machine.hw.arm64.walk import Stage2
from guest_memfd.machine.hw.ram import Ram
from guest_memfd.words.units import Pa, Pfn, identity_ipa, pfn_to_pa

VMID = 0
_SHIFT = 12


class HostIdmap:
    """The stage 2 of a host with *pa_bits* of addresses, empty; *source* gives its pages, *tlbs* are those of all CPUs.

    *locked* is what an entry says in the middle of break-before-make.
    """

    def __init__(self, ram: Ram, source: PageSource, tlbs: Sequence[Tlb], pa_bits: int, locked: int) -> None:
        self.vtcr = Vtcr.for_ipa(pa_bits, ps=PA_BITS.index(pa_bits))
        start = self.vtcr.start_level
        assert start is not None
        self.page_table = PageTable(ram, source, 2, ia_bits=pa_bits, start_level=start,
                                    concatenated=1 << max(0, pa_bits - _SHIFT - 9 * (4 - start)))
        self.pgt = KvmStage2Table(ram, self.page_table, source, Maintenance(tlbs, VMID), locked)
        self._registers = Stage2(self.vtcr, self.pgt.root | VMID << 48)

    def registers(self) -> Stage2:
        """VTCR_EL2 and VTTBR_EL2 while the host runs."""
        return self._registers

    def may(self, pa: Pa) -> bool:
        """Whether the host's access to *pa* would succeed, at once or after a fault that maps it."""
        entry = self.pgt.leaf(identity_ipa(pa))
        return entry.valid or not entry.value

    def annotate(self, pfn: Pfn, order: int, note: int) -> None:
        """Leave *note* for an aligned range of 1 << *order* pages; no TLB keeps it then. Raises OutOfMemory.

        Nothing has changed then. The host's stage-1 entries go, too: TLBI VMALLE1IS runs even if the host never touched
        the range.
        """
        ipa = identity_ipa(pfn_to_pa(pfn))
        before = self.pgt.leaf(ipa)
        self.pgt.annotate(ipa, order, note)
        # The annotation has flushed nothing, as nothing was mapped. The host's stage-1 entries have to go all the
        # same: the abstract host says so of every donation.
        if not before.valid:
            self.pgt.tlbs.flush_ipa(ipa, before.level)

"""A guest's stage 2, under plain KVM and pKVM. Here is how wide it is, and where each page of RAM is mapped in it.

KVM picks as few levels as 16 concatenated first tables allow: 40 bits of IPA start at level 1 with two of them
(asm/stage2_pgtable.h).
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from itertools import chain

from guest_memfd.machine.el2.kvm.pgtable import KvmStage2Table
from guest_memfd.machine.el2.kvm.tlb import Maintenance
from guest_memfd.machine.hw.arm64.descriptor import Entry
from guest_memfd.machine.hw.arm64.pages import PageSource
from guest_memfd.machine.hw.arm64.registers import Vtcr
from guest_memfd.machine.hw.arm64.tables import PageTable
from guest_memfd.machine.hw.arm64.tlb import Tlb
from guest_memfd.machine.hw.arm64.walk import Stage2
from guest_memfd.machine.hw.ram import Ram
from guest_memfd.words.units import PAGE, Gfn, Ipa, Pa, Pfn, gfn_to_gpa, pa_to_pfn, pfn_to_pa

IPA_BITS = 40
_ORDERS = (0, 9, 18)


LAST_VMID = (1 << 16) - 1
"""VTTBR_EL2 has 16 bits for it (FEAT_VMID16); 0 is the host's."""


def next_vmid(last: int, used: Container[int]) -> int:
    """The first VMID after *last*, from 1 on again after `LAST_VMID`, that is not *used*."""
    return next(vmid for vmid in chain(range(last + 1, LAST_VMID + 1), range(1, last + 1)) if vmid not in used)


def first_tables(ipa_bits: int = IPA_BITS) -> int:
    """Pages of the first level, contiguous and aligned to their size: 2 for 40 bits of IPA."""
    start = Vtcr.for_ipa(ipa_bits).start_level
    assert start is not None
    return 1 << max(0, ipa_bits - 12 - 9 * (4 - start))


class GuestStage2:
    """The stage 2 of one VM, with *vmid*, for IPAs of *ipa_bits*; table pages come from *source*."""

    def __init__(self, ram: Ram, source: PageSource, tlbs: Sequence[Tlb], vmid: int, ipa_bits: int = IPA_BITS,
                 ps: int = 5) -> None:
        self.ram, self.vmid, self.ipa_bits = ram, vmid, ipa_bits
        vtcr = Vtcr.for_ipa(ipa_bits, ps=ps)
        assert vtcr.start_level is not None
        self.page_table = PageTable(ram, source, 2, ia_bits=ipa_bits, start_level=vtcr.start_level,
                                    concatenated=first_tables(ipa_bits))
        self.pgt = KvmStage2Table(ram, self.page_table, source, Maintenance(tlbs, vmid))
        self._registers = Stage2(vtcr, self.pgt.root | vmid << 48)
        # First pfn of a leaf -> the gfns that map it. A hint where to look: what the tables say counts.
        self._gfns: dict[Pfn, list[Gfn]] = {}

    def registers(self) -> Stage2:
        """VTCR_EL2 and VTTBR_EL2 while the guest runs."""
        return self._registers

    def in_range(self, gfn: Gfn, nr: int) -> bool:
        """Whether the guest has these page frames at all."""
        return gfn >= 0 and (gfn + nr) * PAGE <= 1 << self.ipa_bits

    def leaves(self, gfn: Gfn, nr: int) -> Iterator[tuple[Gfn, Entry]]:
        """What decides the *nr* guest frames from *gfn* on, in order, each with the first of them that it decides.

        The table may change meanwhile: each is looked up when its turn comes.
        """
        at = gfn
        while at < gfn + nr:
            entry = self.pgt.leaf(gfn_to_gpa(at))
            yield at, entry
            at = (at & -1 << entry.order) + (1 << entry.order)

    def mapped(self, gfn: Gfn, pfn: Pfn) -> None:
        """Note that the leaf at *gfn* maps *pfn*, the first of its pages."""
        gfns = self._gfns.setdefault(pfn, [])
        if gfn not in gfns:
            gfns.append(gfn)

    def unmapped(self, gfn: Gfn, pfn: Pfn) -> None:
        """Note that it does no more."""
        gfns = self._gfns.get(pfn, [])
        if gfn in gfns:
            gfns.remove(gfn)
        if not gfns:
            self._gfns.pop(pfn, None)

    def ipa_of(self, pa: Pa) -> Ipa | None:
        """The lowest IPA that maps the byte at physical address *pa*, if any."""
        for order in _ORDERS:
            head = pa_to_pfn(pa) & -1 << order
            for gfn in sorted(self._gfns.get(head, ())):
                ipa = gfn_to_gpa(gfn) + (pa - pfn_to_pa(head))
                entry = self.pgt.leaf(ipa)
                # The table decides. What the hint says may be out of date after a block has been dropped.
                if entry.valid and entry.oa + ipa % (PAGE << entry.order) == pa:
                    return ipa
        return None

"""The host's stage 2 under a hypervisor that is given by its model: an identity map of RAM, without what was withheld.

It is filled by faults, as pKVM's is: the largest block that fits into the empty entry and into RAM. A page that is withheld
is an entry with a note; the rest of its block is faulted in again.
"""

from __future__ import annotations

from collections.abc import Sequence

from guest_memfd.machine.el2.kvm.pgtable import LOCKED, KvmStage2Table, TableSource, leaf_attributes
from guest_memfd.machine.el2.kvm.tlb import Maintenance
from guest_memfd.machine.hw.arm64.registers import PA_BITS, Vtcr
from guest_memfd.machine.hw.arm64.tables import PageTable
from guest_memfd.machine.hw.arm64.tlb import Tlb
from guest_memfd.machine.hw.arm64.walk import Stage2
from guest_memfd.machine.hw.ram import PAGE, Ram

VMID = 0
_BITS = 48
_WITHHELD = 1 << 2
"""Software's note in an invalid entry."""
_MEMORY = leaf_attributes("rwx")


class HostMap:
    """The host's table; *source* gives its pages, *tlbs* are those of all CPUs."""

    def __init__(self, ram: Ram, source: TableSource, tlbs: Sequence[Tlb]) -> None:
        self.ram = ram
        vtcr = Vtcr.for_ipa(_BITS, ps=PA_BITS.index(_BITS))
        assert vtcr.start_level is not None
        table = PageTable(ram, source, 2, ia_bits=_BITS, start_level=vtcr.start_level)
        self.table = KvmStage2Table(ram, table, source, Maintenance(tlbs, VMID), LOCKED)
        self._registers = Stage2(vtcr, self.table.root | VMID << 48)

    def registers(self) -> Stage2:
        """VTCR_EL2 and VTTBR_EL2 while the host runs."""
        return self._registers

    def may(self, pa: int) -> bool:
        """Whether the host's access to *pa* would succeed, at once or after a fault that maps it."""
        entry = self.table.leaf(pa)
        return entry.valid or not entry.value

    def withhold(self, pfn: int) -> None:
        """Take the page from the host; no TLB has it then, of either stage. Raises OutOfMemory, nothing changed."""
        pa = pfn * PAGE
        before = self.table.leaf(pa)
        self.table.annotate(pa, 0, _WITHHELD)
        # Where nothing was mapped nothing has been flushed, and stage-1 entries of the page may be there all the same.
        if not before.valid:
            self.table.tlbs.flush_ipa(pa, before.level)

    def give_back(self, pfn: int) -> None:
        """Map the page for the host again; its entry is there."""
        self.table.map(pfn * PAGE, 0, pfn * PAGE, _MEMORY)

    def fill(self, pa: int) -> bool:
        """A fault of the host at *pa*: map it; False when the page is withheld. Raises OutOfMemory."""
        entry = self.table.leaf(pa)
        if not entry.valid and not entry.value:
            order = next(order for order in (18, 9, 0) if order <= entry.order and self._in_ram(pa, order))
            at = pa & -(PAGE << order)
            self.table.map(at, order, at, _MEMORY)
        return entry.valid or not entry.value

    def _in_ram(self, pa: int, order: int) -> bool:
        size = PAGE << order
        return not order or self.ram.contains(pa & -size, size)

"""The host's stage 2 under a hypervisor that is given by its model: an identity map of RAM, without what was withheld.

A fault maps the largest block that fits into the empty entry and into RAM.
"""

from __future__ import annotations

from collections.abc import Sequence

from guest_memfd.machine.el2.kvm.idmap import HostIdmap
from guest_memfd.machine.el2.kvm.pgtable import LOCKED, leaf_attributes
from guest_memfd.machine.hw.arm64.pages import PageSource
from guest_memfd.machine.hw.arm64.tlb import Tlb
from guest_memfd.machine.hw.ram import Ram
from guest_memfd.words.units import PAGE, Pa, Pfn, identity_ipa, pfn_to_pa

_BITS = 48
_WITHHELD = 1 << 2
"""Software's note in an invalid entry."""
_MEMORY = leaf_attributes("rwx")


class HostMap(HostIdmap):
    """The host's table; *source* gives its pages, *tlbs* are those of all CPUs."""

    def __init__(self, ram: Ram, source: PageSource, tlbs: Sequence[Tlb]) -> None:
        super().__init__(ram, source, tlbs, _BITS, LOCKED)
        self.ram = ram

    def withhold(self, pfn: Pfn) -> None:
        """Take the page from the host; no TLB has it then, of either stage. Raises OutOfMemory, nothing changed."""
        self.annotate(pfn, 0, _WITHHELD)

    def give_back(self, pfn: Pfn) -> None:
        """Map the page for the host again; its entry is there."""
        pa = pfn_to_pa(pfn)
        self.pgt.map(identity_ipa(pa), 0, pa, _MEMORY)

    def fill(self, pa: Pa) -> bool:
        """A fault of the host at *pa*: map it; False when the page is withheld. Raises OutOfMemory."""
        entry = self.pgt.leaf(identity_ipa(pa))
        if not entry.valid and not entry.value:
            order = next(order for order in (18, 9, 0) if order <= entry.order and self._in_ram(pa, order))
            at = pa & -(PAGE << order)
            self.pgt.map(identity_ipa(at), order, at, _MEMORY)
        return entry.valid or not entry.value

    def _in_ram(self, pa: Pa, order: int) -> bool:
        size = PAGE << order
        return not order or self.ram.contains(pa & -size, size)

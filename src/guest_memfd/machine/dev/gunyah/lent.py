"""Memory files that a library serves: lent pages are private, all others shared.

What v17 decides by who happens to map a page is a conversion here; when, the driver says (hypervisors/gunyah/driver.py).
This file knows what a procedure cannot: bindings and their flags, parcels, addresses that the hypervisor is to report.
"""

from __future__ import annotations

from errno import EINVAL
from typing import TYPE_CHECKING

from guest_memfd.compat import override
from guest_memfd.designs import Design
from guest_memfd.hypervisors.gunyah import driver
from guest_memfd.machine.dev.gunyah.binding import Binding
from guest_memfd.machine.dev.gunyah.memory import PMD_ORDER, GunyahMemoryFile, Parcelled
from guest_memfd.machine.el2.gunyah.rm.server import DEVICES_END
from guest_memfd.machine.hypcalls.gunyah import GunyahDriver
from guest_memfd.uapi.gunyah import GunyahMemFlag
from guest_memfd.words.primitives import Primitive, Steps
from guest_memfd.words.units import PAGE, Gfn, Index, gfn_to_gpa, pfn_to_pa

if TYPE_CHECKING:
    from guest_memfd.machine.board.board import Board


class LentFile(GunyahMemoryFile):
    """A file of any design that converts in place."""

    def __init__(self, machine: Board, library: Design, size: int, flags: GunyahMemFlag) -> None:
        if flags & GunyahMemFlag.ALLOW_HUGEPAGE and size and not size % (PAGE << PMD_ORDER):
            library.order, library.splits = PMD_ORDER, True
        super().__init__(machine, library, size, flags)
        self.init_shared()

    @override
    def map_range(self, start: Index, nr: int) -> Steps[int]:
        """What was lent comes back first; -EBUSY while a guest holds on to it."""
        return driver.mmap(self.library, start, nr)

    # -- bindings ------------------------------------------------------------------------------------------------

    @override
    def bind(self, binding: Binding) -> int:
        """The library's bind; the guest addresses are announced now if the VM runs already."""
        ret = int(self.run(self.library.bind(binding.gfn, binding.start, binding.nr)))
        if not ret and binding.vm.handle is not None:
            ret = self.announce(binding)
            if ret:
                self.run(self.library.unbind(binding.start, binding.nr))
        return ret

    @override
    def announce(self, binding: Binding) -> int:
        """Have the hypervisor report faults on guest addresses that no one has configured yet."""
        vm, hypcalls = binding.vm, self.machine.driver
        assert isinstance(hypcalls, GunyahDriver)
        start, end = binding.gfn * PAGE, binding.end * PAGE
        if any(r.start < end and start < r.end for r in vm.handle.space.ranges):
            return 0                                        # the driver has it reconfigured folio by folio
        return hypcalls.configure(vm, binding.gfn, binding.nr, "private" if binding.lend else "vmmio")

    @override
    def unbind(self, binding: Binding, gfn: Gfn, nr: int) -> int:
        """Pages come back with what the guest left in them, and are the VMM's to see."""
        return int(self.run(driver.unbind(self.library, binding.index(gfn), nr)))

    @override
    def abandon(self, binding: Binding) -> int:
        """As `unbind`, of a VM that is dying."""
        return int(self.run(driver.abandon(self.library, [(binding.start, binding.nr)])))

    # -- the guest -------------------------------------------------------------------------------------------------

    @override
    def demand(self, binding: Binding, gfn: Gfn) -> int:
        """The driver's demand_page(), as the binding says."""
        return int(self.run(driver.demand_page(
            self.library, gfn, binding.index(gfn), lend=binding.lend, writable=binding.writable)))

    # -- parcels ---------------------------------------------------------------------------------------------------

    @override
    def make_parcel(self, binding: Binding, gfn: Gfn, nr: int) -> int | Parcelled:
        """Folios exist, are private if they are to be lent, and stay where they are until the parcel is back."""
        start, nr = driver.around(self.library, binding.index(gfn), nr)
        if start + nr > self.pages:
            return -EINVAL
        folios = self.run(driver.take_for_parcel(self.library, start, nr, lend=binding.lend))
        if isinstance(folios, int):
            return folios
        self.parcelled |= {pfn_to_pa(folio.pfn) for folio in folios}
        return Parcelled(folios, binding.gfn + (start - binding.start))

    @override
    def parcel_is_paged(self, binding: Binding, parcel: Parcelled) -> int:
        """The Resource Manager makes them ordinary where guest addresses are configured for that."""
        if binding.lend or gfn_to_gpa(parcel.gfn) < DEVICES_END:
            return 0
        return self.announce(binding)

    @override
    def parcel_is_back(self, parcel: Parcelled, lend: bool, ret: int) -> None:
        """Nothing else to do, the library puts them back into the direct map when someone wants them."""
        self.parcel_has_started(parcel)
        if ret:
            for folio in parcel.folios:
                self.perform(Primitive("leak_folio", (folio,), "library"))

"""Memory files that a library serves: lent pages are private, all others shared. Pages are converted first, and bound
then.

What v17 decides by who happens to map a page is a conversion here: a page becomes private when the guest is to have it for
itself, and shared again when the VMM maps it or the binding ends. A page the VMM maps is not lent (-EPERM), as v17 has it;
one that someone else still refers to is not lent either (-EBUSY), which v17 does not see.
"""

from __future__ import annotations

from errno import EINVAL
from typing import TYPE_CHECKING

from guest_memfd.compat import override
from guest_memfd.designs import Design
from guest_memfd.machine.dev.gunyah.binding import Binding
from guest_memfd.machine.dev.gunyah.memory import PMD_ORDER, GunyahMemoryFile, Parcelled
from guest_memfd.machine.el2.gunyah.rm.server import DEVICES_END
from guest_memfd.machine.hw.ram import PAGE
from guest_memfd.machine.hypcalls.gunyah import GunyahDriver
from guest_memfd.uapi.gunyah import GunyahMemFlag
from guest_memfd.words.pagestate import PRIVATE_PAGE
from guest_memfd.words.primitives import EAGAIN, EBUSY, EPERM, Folio, Primitive, Steps
from guest_memfd.words.units import Gfn, Index, gfn_to_gpa, pfn_to_pa

if TYPE_CHECKING:
    from guest_memfd.machine.board.board import Board

_ATTEMPTS = 3
"""How often the pages of a dead VM are asked for: what can fail there is want of memory."""


class LentFile(GunyahMemoryFile):
    """A file of any design that converts in place."""

    def __init__(self, machine: Board, library: Design, size: int, flags: GunyahMemFlag) -> None:
        if flags & GunyahMemFlag.ALLOW_HUGEPAGE and size and not size % (PAGE << PMD_ORDER):
            library.order, library.splits = PMD_ORDER, True
        super().__init__(machine, library, size, flags)
        self.init_shared()

    # Whole folios around [start, start+nr).
    def _around(self, start: Index, nr: int) -> tuple[Index, int]:
        size = 1 << self.library.order
        first = start & -size
        return first, (-(-(start + nr) // size) * size) - first

    @override
    def map_range(self, start: Index, nr: int) -> Steps[int]:
        """What was lent comes back first; -EBUSY while a guest holds on to it."""
        first, length = self._around(start, nr)
        length = min(length, self.host.inode.size - first)
        if length > 0:
            result = yield from self.library.make_shared(first, length)
            if result.ret:
                return result.ret
        return (yield from self.library.mmap())

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
        driver, vm = self.machine.driver, binding.vm
        assert isinstance(driver, GunyahDriver)
        start, end = binding.gfn * PAGE, binding.end * PAGE
        if any(r.start < end and start < r.end for r in vm.handle.space.ranges):
            return 0                                        # the driver has it reconfigured folio by folio
        return driver.configure(vm, binding.gfn, binding.nr, "private" if binding.lend else "vmmio")

    @override
    def unbind(self, binding: Binding, gfn: Gfn, nr: int) -> int:
        """Pages come back with what the guest left in them, and are the VMM's to see.

        The binding's reference may be the file's last, so the file is held meanwhile, as the ioctl's fget() does.
        """
        start = binding.index(gfn)
        held = self.perform(Primitive("get_file", (), "library"))
        ret = int(self.run(self.library.unbind(start, nr)).ret)
        if not ret:
            self.run(self.library.make_shared(start, nr))           # if that fails, mmap() does it
        if held:
            self.run(self.library.close())
        return ret

    @override
    def abandon(self, binding: Binding) -> int:
        """As `unbind`; tried again when it fails."""
        ret = 0
        for _attempt in range(_ATTEMPTS):
            ret = self.unbind(binding, binding.gfn, binding.nr)
            if not ret:
                break
        return ret

    # -- the guest -------------------------------------------------------------------------------------------------

    @override
    def demand(self, binding: Binding, gfn: Gfn) -> int:
        """-EPERM what the VMM maps, -EBUSY what someone refers to, -EINVAL lent for reading only, -ENOMEM."""
        index = binding.index(gfn)
        if binding.lend and not binding.writable:
            return -EINVAL                                  # the hypervisor has no read-only private pages
        ret = self._make_private(index, 1) if binding.lend else 0
        if not ret:
            ret = int(self.run(self.library.guest_fault(gfn, index)))
        return -EBUSY if ret == -EAGAIN else ret            # -EAGAIN would have the vCPU try without end

    def _make_private(self, start: Index, nr: int) -> int:
        first, length = self._around(start, nr)
        attributes = self.host.inode.trees["attributes"].load(first, length)
        if attributes.count(PRIVATE_PAGE) == length:
            return 0
        # As the posted driver: lent memory is not mapped by the VMM, and must not be mappable either.
        if self.host.vma_covers(first, length):
            return -EPERM
        return int(self.run(self.library.make_private(first, length)).ret)

    # -- parcels ---------------------------------------------------------------------------------------------------

    @override
    def make_parcel(self, binding: Binding, gfn: Gfn, nr: int) -> int | Parcelled:
        """Folios exist, are private if they are to be lent, and stay where they are until the parcel is back."""
        start, nr = self._around(binding.index(gfn), nr)
        if start + nr > self.pages:
            return -EINVAL
        if binding.lend and self.host.vma_covers(start, nr):
            return -EPERM
        ret = int(self.run(self.library.allocate(start, nr)))
        if not ret and binding.lend:
            ret = self._make_private(start, nr)
        if ret:
            return -EBUSY if ret == -EAGAIN else ret
        folios: list[Folio] = []
        while sum(folio.nr for folio in folios) < nr:
            hit = self.perform(Primitive("filemap_get_folio", (start + sum(folio.nr for folio in folios),), "library"))
            self.perform(Primitive("folio_put", (hit.folio,), "library"))
            folios.append(hit.folio)
        self.parcelled |= {pfn_to_pa(folio.pfn) for folio in folios}
        return Parcelled(tuple(folios), binding.gfn + (start - binding.start))

    @override
    def parcel_is_paged(self, binding: Binding, parcel: Parcelled) -> int:
        """The Resource Manager makes them ordinary where guest addresses are configured for that."""
        driver = self.machine.driver
        assert isinstance(driver, GunyahDriver)
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

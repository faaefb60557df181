"""A guest_memfd that is lent to a guest on a machine of its own, in folios of any size; what is done for it is counted.

No guest program runs: each fault is the library's procedure for a gfn, as a vCPU's exit would call it.
"""

from __future__ import annotations

from collections import Counter

from guest_memfd.core.gmem import Conversion
from guest_memfd.designs import Design
from guest_memfd.explore.world.cost import FolioCost
from guest_memfd.hypervisors import HYPERVISORS
from guest_memfd.machine.boot import Config, Machine
from guest_memfd.machine.primitives.host import EmulatedHost
from guest_memfd.words import facts
from guest_memfd.words.primitives import Primitive
from guest_memfd.words.units import FIRST_GFN, FIRST_PAGE, PAGE, Gfn, Index, span

_MIB, _GIB = 1 << 20, 1 << 30
_WRITES = ("set_direct_map_invalid_noflush", "set_direct_map_default_noflush")


class CountedFile:
    """A file of *pages* pages in folios of *order*, all of it private and bound, gfn i to page i.

    *bbml3*: the direct map is made of blocks, which may be split while they are in use; else of pages.
    Raises HostUnavailable, AssertionError where an operation is refused.
    """

    def __init__(self, design: type[Design], hypervisor: str, pages: int, order: int, *, bbml3: bool = True) -> None:
        ram = max(pages * PAGE * 17 // 16 + 256 * _MIB, _GIB) + _GIB - 1 & -_GIB
        self.machine = Machine(hypervisor, Config(ram=ram, on_free="zero", bbml3=bbml3))
        self.library = design(HYPERVISORS[hypervisor].ops(), pages)
        self.library.order, self.library.splits = order, True
        self._done: Counter[str] = Counter()
        self.host = EmulatedHost(self.machine, self.machine.create_vm(pages), pages, judge=self._count)
        self.pages, self.order = pages, order
        assert self.host.run(self.library.create(pages)) == 0
        assert self.host.run(self.library.bind(FIRST_GFN, FIRST_PAGE, pages)) == 0

    def _count(self, primitive: Primitive, _notes: list[facts.Note]) -> None:
        self._done[primitive.name] += 1

    def counted(self) -> FolioCost:
        """All that has been done up to now."""
        machine = self.machine
        return FolioCost(
            sum(self._done[name] for name in _WRITES), self._done["flush_tlb_kernel_range"],
            sum(machine.linear_map.splits.values()), self._done["hyp_call"],
            machine.kernel_pages.tables + machine.el2_pool.tables)

    def fault(self, gfn: Gfn) -> None:
        """A guest fault on *gfn*."""
        ret = self.host.run(self.library.guest_fault(gfn, Index(gfn)))
        assert ret == 0, ret

    def lend(self) -> None:
        """Every folio into the guest, by a fault on its first page."""
        for gfn in span(FIRST_GFN, self.pages >> self.order, 1 << self.order):
            self.fault(gfn)

    def consent(self, gfn: Gfn) -> None:
        """The guest lets go of its page in the way of its hypervisor, if there is one."""
        if self.machine.hypervisor.consents is not None:
            told = self.host.perform_by_name("guest_consents", gfn, caller="guest")
            assert told == "ok", told

    def convert(self, index: Index, *, shared: bool) -> Conversion:
        """Convert page *index* to shared or private; what the library returns."""
        procedure = self.library.make_shared if shared else self.library.make_private
        result = self.host.run(procedure(index, 1))
        assert isinstance(result, Conversion)
        return result

    def to_and_fro(self, index: Index) -> None:
        """Page *index* is converted to shared and back, and lent again."""
        self.consent(Gfn(index))
        for shared in (True, False):
            result = self.convert(index, shared=shared)
            assert result.ret == 0, result
        self.fault(Gfn(index))

    def punch(self, index: Index) -> Conversion:
        """The guest lets go of page *index*, and it leaves the file; refused where a living guest gives nothing up."""
        self.consent(Gfn(index))
        result = self.host.run(self.library.punch_hole(index, 1))
        assert isinstance(result, Conversion)
        return result

    def take_back(self) -> None:
        """Kill the VM, tear it down, close the file."""
        host = self.host
        host.perform_by_name("vm_kill")
        assert host.run(self.library.vm_teardown()) == 0
        host.perform_by_name("vm_destroyed")
        host.perform_by_name("fd_close")
        host.run(self.library.close())
        # A folio in a lru_add batch is not free yet, and comes back to the direct map only when it is.
        host.perform_by_name("lru_add_drain_all")

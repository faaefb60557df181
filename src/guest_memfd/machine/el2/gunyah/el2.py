"""The hypervisor as one machine has it: who owns memory, the host, the other VMs. The host is a VM, too.

At boot all memory but what is reserved belongs to the host's extent, which is mapped at its own addresses in the host's
stage 2, in the largest blocks that fit. Pages that leave make blocks come apart; blocks come back when a whole one is
donated, and are not put together from pages. What a stage-2 fault of the host looks like:
hyp/vm/vcpu/aarch64/src/exception_inject.c.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

from guest_memfd.errors import InternalError
from guest_memfd.machine.el2.gunyah import private
from guest_memfd.machine.el2.gunyah.addrspace import AddressSpace
from guest_memfd.machine.el2.gunyah.capabilities import CapabilitySpace
from guest_memfd.machine.el2.gunyah.donate import Options, donate, shown, tables_for_withdrawal
from guest_memfd.machine.el2.gunyah.errors import GunyahError, HypRefused
from guest_memfd.machine.el2.gunyah.hypercalls import Hypercalls
from guest_memfd.machine.el2.gunyah.memdb import MemDb
from guest_memfd.machine.el2.gunyah.memextent import RWX, START, Extent
from guest_memfd.machine.el2.gunyah.stage2 import Stock
from guest_memfd.machine.el2.gunyah.vcpu import SEA_FSC
from guest_memfd.machine.el2.gunyah.vm import PRIVATE_HOST_RIGHTS, GunyahHypVm
from guest_memfd.machine.hw.arm64 import permission
from guest_memfd.machine.hw.arm64.descriptor import AF
from guest_memfd.machine.hw.arm64.fault import ADDRESS_SIZE, ALIGNMENT, PERMISSION, TRANSLATION, Fault
from guest_memfd.machine.hw.arm64.pages import PageSource
from guest_memfd.machine.hw.arm64.regime import Stage2
from guest_memfd.machine.hw.arm64.tlb import Tlb
from guest_memfd.machine.hw.ram import Ram
from guest_memfd.words.units import Ipa, Pa, Va, identity_ipa

HLOS_VMID = 3
FIRST_VMID, LAST_VMID = 0x80, 0xBF
"""VMIDs that can be had dynamically."""

_IL = 1 << 25
_S1PTW = 1 << 7
_EC = {"r": 0x24, "w": 0x24, "x": 0x20}
# Stage-2 faults that are passed on to the VM; others stop it.
_INJECTED = (TRANSLATION, PERMISSION, ADDRESS_SIZE, ALIGNMENT)

InjectKind = Literal["sea", "fixable"]


class GunyahInject(NamedTuple):
    """An exception for the host's EL1: ESR_EL1 and FAR_EL1."""

    esr: int
    far: Va


Owner = str | tuple[str, GunyahHypVm]


class Gunyah:
    """EL2 of a machine with *ram*; *source* gives the hypervisor's own pages, *tlbs* are those of all CPUs.

    *reserved*: (address, size) in bytes, of the hypervisor and never the host's. *inject*: what a host access to memory it
    gave away ends in: ``sea``, a synchronous external abort, or ``fixable``, a data abort with S1PTW as pKVM has it.
    *modify_flags* and *relock*: see private.py. Raises HypRefused(NOMEM) when the host's tables cannot be had.
    """

    def __init__(self, ram: Ram, source: PageSource, tlbs: list[Tlb], *, reserved: Iterable[tuple[Pa, int]] = (),
                 inject: InjectKind = "sea", modify_flags: private.Layout = "2024-12",
                 relock: private.Relock = "access") -> None:
        self.ram, self.source, self.tlbs = ram, source, tlbs
        self.inject, self.modify_flags, self.relock = inject, modify_flags, relock
        self.hypercalls = Hypercalls(self)
        self.memdb = MemDb(Extent("nowhere"))
        self.root_extent = Extent("hypervisor")
        self.host_extent = Extent("host", parent=self.root_extent)
        self.cspace = CapabilitySpace()
        self.host_cap = self.cspace.grant(self.host_extent, PRIVATE_HOST_RIGHTS)
        self.vms: dict[int, GunyahHypVm] = {}
        self._roles: dict[Extent, Owner] = {self.host_extent: "host", self.root_extent: "hypervisor"}
        self.memdb.insert(ram.base, ram.end, self.host_extent)
        for start, size in reserved:
            # Before the host's map is made below: the hypervisor's own memory is never in the host's stage 2.
            self.memdb.insert(start, start + size, self.root_extent)
        self.hlos = AddressSpace(ram, self.memdb, source, tlbs, HLOS_VMID, "hlos", lambda: True)
        self.hlos.map(self.host_extent, Ipa(0), RWX, 0, 0, 0)

    # -- what a machine asks of EL2 ------------------------------------------------------------------------------

    def stage2(self) -> Stage2:
        """The registers while the host runs."""
        return self.hlos.table.registers

    def hvc(self, regs: list[int]) -> None:
        """An HVC of the host: SMCCC in and out, x0..x17 in place."""
        self.hypercalls.call(regs, self.cspace, self.hlos)

    def host_abort(self, fault: Fault, el: int) -> GunyahInject | None:
        """A stage-2 fault of the host; None: nothing is wrong with the tables (any more), run the instruction again.

        Raises InternalError for faults that the hypervisor's tables cannot cause.
        """
        if fault.stage != 2 or fault.ipa is None or fault.va is None or fault.kind not in _INJECTED:
            raise InternalError(f"{fault!r} is no stage-2 fault that a host of Gunyah can survive")
        found = self.hlos.table.leaf(fault.ipa)
        need = permission.BITS[el, "r" if fault.s1ptw else fault.access]
        # The table allows it by now: another CPU has changed it since the fault.
        if found.valid and found.value & AF and permission.stage2(found.value, True) & need:
            return None
        if self.inject == "fixable":
            return GunyahInject(fault.esr_el1() | _S1PTW, fault.va)
        # Built anew, not copied: ISV, WnR and S1PTW are gone, so Linux sees a hardware error and asks no exception
        # table. This is what kills the host (linux/mem_abort.py).
        return GunyahInject((_EC[fault.access] | el) << 26 | _IL | SEA_FSC, fault.va)

    # -- VMs -----------------------------------------------------------------------------------------------------

    def create_vm(self, name: str, vmid: int | None = None, running: bool = True) -> GunyahHypVm:
        """A new VM; *vmid* None: the lowest free one. Raises HypRefused: NORESOURCES no VMID, NOMEM."""
        if vmid is None:
            vmid = next((v for v in range(FIRST_VMID, LAST_VMID + 1) if v not in self.vms), None)
        if vmid is None or vmid in self.vms:
            raise HypRefused(GunyahError.NORESOURCES, "no VMID is free")
        vm = self.vms[vmid] = GunyahHypVm(self, name, vmid, running)
        self._roles[vm.guest_private] = "guest", vm
        self._roles[vm.guest_shared] = "shared", vm
        return vm

    def forget(self, vm: GunyahHypVm) -> None:
        """It has been destroyed."""
        del self.vms[vm.vmid], self._roles[vm.guest_private], self._roles[vm.guest_shared]

    # -- memory --------------------------------------------------------------------------------------------------

    def donate(self, options: Options, source: Extent, to: Extent, offset: int, size: int) -> None:
        """MEMEXTENT_DONATE of *size* bytes from byte *offset* of *source* (donate.py); raises HypRefused."""
        donate(self.memdb, self.source, self._spaces, options, source, to, offset, size)

    def sync(self) -> None:
        """What a series of donations without synchronisation, by the host, ends with."""
        for space in self._spaces:
            # The host's own space always: its donations take pages out of it.
            if space.stale or space is self.hlos:
                space.sync_all()

    @property
    def _spaces(self) -> list[AddressSpace]:
        return [self.hlos, *(vm.space for vm in self.vms.values())]

    def take_back(self, vm: GunyahHypVm) -> None:
        """All memory of a dead VM becomes the host's again, and leaves other VMs: what was private is sanitised first.

        Raises HypRefused(NOMEM), and nothing has changed, when the host's own table cannot grow.
        """
        identity = next(m for m in self.host_extent.mappings if m.space is self.hlos)
        private_ranges = list(self.memdb.ranges(vm.guest_private))
        shared_ranges = list(self.memdb.ranges(vm.guest_shared))
        others = [other.space for other in self.vms.values() if other is not vm]
        gone = [place for start, end in shared_ranges for place in shown(others, start, end, ())]
        need = self.hlos.tables_for_mapping(identity, START, private_ranges) + tables_for_withdrawal(gone)
        # Everything the host's table may need is taken first. The VM's tables are freed inside, and cannot be had
        # back.
        with Stock(self.source, need) as stock:
            # Sanitises private pages and flushes, before the memory is the host's again.
            vm.space.destroy()
            for place in gone:
                place.space.withdraw(place.start, place.end, place.distance, stock)
            for space in {place.space for place in gone}:
                space.sync_all()
            for start, end in private_ranges:
                self.memdb.change(start, end, vm.guest_private, self.host_extent)
            for start, end in shared_ranges:
                self.memdb.change(start, end, vm.guest_shared, self.host_extent)
            # Last. Shared memory never left the host's table, so only the private ranges are mapped again.
            self.hlos.apply(identity, START, private_ranges, stock)

    def owner(self, pa: Pa) -> Owner | None:
        """``host``, ``hypervisor``, ("guest" or "shared", VM); None: a memory parcel has it, or nothing is there."""
        return self._roles.get(self.memdb.owner(pa))

    def host_may(self, pa: Pa) -> bool:
        """Whether the host's stage 2 maps the page at *pa*."""
        return self.hlos.table.leaf(identity_ipa(pa)).valid

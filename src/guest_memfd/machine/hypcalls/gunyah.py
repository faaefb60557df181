"""Gunyah: the hypercalls that drivers/virt/gunyah issues for a folio (series v17, patches 16 and 20), and RM's part.

The Resource Manager configures which guest addresses hold private pages and which are VMMIO. Conversion in place needs a
range to change its kind while the VM runs; here the driver has RM do that whenever the other kind is to be mapped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from errno import EBUSY, EINVAL
from typing import Any

from guest_memfd.compat import override
from guest_memfd.core.hypervisor import Hypervisor
from guest_memfd.machine.el2.gunyah import hypercalls as n
from guest_memfd.machine.el2.gunyah.addrspace import AddrMapFlag
from guest_memfd.machine.el2.gunyah.config import RangeOp
from guest_memfd.machine.el2.gunyah.donate import NOSYNC, Donation
from guest_memfd.machine.el2.gunyah.el2 import HLOS_VMID, Gunyah, InjectKind
from guest_memfd.machine.el2.gunyah.errors import GunyahError, HypRefused, remap
from guest_memfd.machine.el2.gunyah.memextent import RWX, Attributes, ExtentAccess
from guest_memfd.machine.el2.gunyah.rm.client import RmClient
from guest_memfd.machine.el2.gunyah.rm.server import ResourceManager
from guest_memfd.machine.hw.arm64.fault import ACCESS_FLAG, PERMISSION, Fault
from guest_memfd.machine.hw.arm64.tables import PageTable
from guest_memfd.machine.hw.arm64.walk import Stage2
from guest_memfd.machine.hypcalls.driver import Driver
from guest_memfd.machine.hypcalls.hardware import Hardware
from guest_memfd.machine.hypcalls.vm import Vm
from guest_memfd.machine.linux.maple import MapleTree
from guest_memfd.words.primitives import Folio
from guest_memfd.words.units import PAGE, Gfn, Ipa, Pa, gfn_to_gpa, identity_ipa, identity_pa

RW = Attributes(ExtentAccess.RW, ExtentAccess.RW)
RX = Attributes(ExtentAccess.RX, ExtentAccess.RX)
READ = Attributes(ExtentAccess.R, ExtentAccess.R)

_SIGN = 1 << 63
_UNLOCK = 1
"""ADDRSPACE_MODIFY_PAGES: unlock, and sanitise nothing."""

# "It is not yours, or not there": to the driver these are one answer, whatever the hypervisor calls it.
_NOT_THERE = (GunyahError.DENIED, GunyahError.ADDR_INVAL, GunyahError.MEMDB_NOT_OWNER)


@dataclass(eq=False)
class DeviceVm(Vm):
    """A VM of /dev/gunyah: made by the Resource Manager, `handle` None before and after that.

    posted: as series v17 has it, the Resource Manager configures guest addresses at START and never again, and errors of
    the hypervisor are not interpreted. writable: whether the binding of a gfn lets the guest write.
    """

    posted: bool = False
    writable: Callable[[Gfn], bool] = lambda gfn: True
    provided: MapleTree = field(default_factory=MapleTree)          # v17's vm->mm


class GunyahDriver(Driver):
    """The hypervisor owns both stage 2s."""

    host_vmid = HLOS_VMID
    rules = frozenset({("unmap_private", -EBUSY), ("donate_from_protected", -EBUSY)})

    def __init__(self, hardware: Hardware, hypervisor: Hypervisor, *, inject: InjectKind = "sea") -> None:
        super().__init__(hardware, hypervisor)
        pool = hardware.el2_pool
        self.el2 = Gunyah(hardware.ram, pool, hardware.tlbs, reserved=[(pool.start, pool.size)],
                          inject=inject)
        self._plain = False
        self._rm: tuple[ResourceManager, RmClient] | None = None

    @property
    def rm(self) -> ResourceManager:
        """The Resource Manager of this machine."""
        return self._manager()[0]

    @property
    def rm_client(self) -> RmClient:
        """Linux's end of its channel."""
        return self._manager()[1]

    def _manager(self) -> tuple[ResourceManager, RmClient]:
        if self._rm is None:
            server = ResourceManager(self.el2)
            self._rm = server, RmClient(server.channels[HLOS_VMID], server.serve)
        return self._rm

    @override
    def hypercall(self, vm: Vm, name: str, args: tuple[Any, ...]) -> int:
        """As every driver's, with the errno that the device of the posted series would see."""
        self._plain = isinstance(vm, DeviceVm) and vm.posted
        try:
            return super().hypercall(vm, name, args)
        except HypRefused as refused:                      # by the Resource Manager, for a range it cannot configure
            return remap(refused.error)

    def _call(self, function: int, *args: int) -> int:
        regs = [function, *args] + [0] * (17 - len(args))
        self.el2.hvc(regs)
        # x0 is a signed 64-bit number.
        error = regs[0] - (regs[0] & _SIGN) * 2
        return -EINVAL if error in _NOT_THERE and not self._plain else remap(error)

    # -- donate and map --------------------------------------------------------------------------------------------

    def _donate(self, kind: Donation, source: int, to: int, folio: Folio) -> int:
        return self._call(n.MEMEXTENT_DONATE, kind, source, to, folio.pfn * PAGE, folio.nr * PAGE)

    def _donate_to_protected(self, vm: Vm, folio: Folio) -> int:
        caps = vm.handle.caps
        return self._donate(Donation.TO_PROTECTED, caps.host_private, caps.guest_private, folio)

    def _donate_from_protected(self, vm: Vm, folio: Folio) -> int:
        caps = vm.handle.caps
        return self._donate(Donation.FROM_PROTECTED, caps.guest_private, caps.host_private, folio)

    def _donate_to_sibling(self, vm: Vm, folio: Folio) -> int:
        caps = vm.handle.caps
        return self._donate(Donation.TO_SIBLING, caps.host_shared, caps.guest_shared, folio)

    def _donate_from_sibling(self, vm: Vm, folio: Folio) -> int:
        caps = vm.handle.caps
        return self._donate(Donation.TO_SIBLING, caps.guest_shared, caps.host_shared, folio)

    def _map(self, vm: Vm, gfn: Gfn, folio: Folio, extent: int, attributes: Attributes, flags: int) -> int:
        return self._call(n.ADDRSPACE_MAP, vm.handle.caps.addrspace, extent, gfn * PAGE, attributes.value,
                          AddrMapFlag.PARTIAL | flags, folio.pfn * PAGE, folio.nr * PAGE)

    def _unmap(self, vm: Vm, gfn: Gfn, folio: Folio, extent: int, flags: int) -> int:
        return self._call(n.ADDRSPACE_UNMAP, vm.handle.caps.addrspace, extent, gfn * PAGE, AddrMapFlag.PARTIAL | flags,
                          folio.pfn * PAGE, folio.nr * PAGE)

    def _map_private(self, vm: Vm, gfn: Gfn, folio: Folio) -> int:
        self._configure(vm, gfn, folio.nr, "private")
        attributes = RWX if self._writable(vm, gfn) else RX
        return self._map(vm, gfn, folio, vm.handle.caps.guest_private, attributes, AddrMapFlag.PRIVATE)

    def _map_vmmio(self, vm: Vm, gfn: Gfn, folio: Folio) -> int:
        self._configure(vm, gfn, folio.nr, "vmmio")
        attributes = RW if self._writable(vm, gfn) else READ
        return self._map(vm, gfn, folio, vm.handle.caps.guest_shared, attributes, AddrMapFlag.VMMIO)

    @staticmethod
    def _writable(vm: Vm, gfn: Gfn) -> bool:
        return vm.writable(gfn) if isinstance(vm, DeviceVm) else True

    def _unmap_private(self, vm: Vm, gfn: Gfn, folio: Folio, sync: bool) -> int:
        ret = self._unmap(vm, gfn, folio, vm.handle.caps.guest_private, AddrMapFlag.PRIVATE | (0 if sync else NOSYNC))
        self.sanitised = not ret
        return ret

    def _unmap_vmmio(self, vm: Vm, gfn: Gfn, folio: Folio, sync: bool) -> int:
        return self._unmap(vm, gfn, folio, vm.handle.caps.guest_shared, AddrMapFlag.VMMIO | (0 if sync else NOSYNC))

    def configure(self, vm: Vm, gfn: Gfn, nr: int, kind: str) -> int:
        """Have the Resource Manager make guest pages ``private`` or ``vmmio``; 0 or -errno."""
        try:
            self._configure(vm, gfn, nr, kind)
        except HypRefused as refused:
            return remap(refused.error)
        return 0

    # RM's part: VM_SET_DEMAND_PAGING and what it leaves as VMMIO.
    def _configure(self, vm: Vm, gfn: Gfn, nr: int, kind: str) -> None:
        if isinstance(vm, DeviceVm) and vm.posted:
            return
        space, start, size = vm.handle.space, gfn_to_gpa(gfn), nr * PAGE
        now = space.ranges.kind(start, start + size)
        if now == kind:
            return
        if now is not None:
            space.configure(RangeOp.REMOVE_VMMIO if now == "vmmio" else RangeOp.REMOVE_PRIVATE, start, size)
        space.configure(RangeOp.ADD_VMMIO if kind == "vmmio" else RangeOp.ADD_PRIVATE, start, size)

    # -- records and tables ----------------------------------------------------------------------------------------

    @override
    def owner(self, pa: Pa) -> str:
        """The memory database: whose extent."""
        found = self.el2.owner(pa)
        return str(found[0] if isinstance(found, tuple) else found)

    @override
    def not_the_hosts(self) -> Iterator[tuple[Pa, Pa, str]]:
        """From the memory database, and from the host's table."""
        memdb, ram = self.el2.memdb, self.hardware.ram
        end = self.hardware.el2_pool.start
        at = ram.base
        for low, high in [*memdb.ranges(self.el2.host_extent, ram.base, end), (end, end)]:
            if at < low:
                yield at, low, f"belongs to {memdb.owner(at)!r}"
            at = high
        for leaf in self.el2.hlos.table.leaves(identity_ipa(ram.base), identity_ipa(end)):
            if not leaf.valid:
                yield identity_pa(leaf.ipa), identity_pa(leaf.ipa + leaf.size), "is not in the host's stage 2"

    @override
    def leftovers(self) -> Iterator[str]:
        """VMs and memory parcels that the hypervisor and the Resource Manager still know."""
        yield from (f"{vm!r} exists" for vm in self.el2.vms.values())
        if self._rm is not None:
            yield from (f"the Resource Manager keeps VM {vmid:#x}" for vmid in self.rm.vms)
            yield from (f"the Resource Manager keeps parcel {handle:#x}" for handle in self.rm.parcels.parcels)

    @override
    def lookup(self, vm: Vm, ipa: Ipa) -> Pa | None:
        """By the guest's table."""
        leaf = vm.handle.space.table.leaf(ipa)
        return leaf.oa + (ipa - leaf.ipa) if leaf.valid else None

    @override
    def may_sanitise(self, vm: Vm, pa: Pa) -> bool:
        """What the guest has not unlocked."""
        return self.locked_in(vm, pa)

    @property
    @override
    def guest_splits(self) -> int:
        """By the tables of their address spaces."""
        return int(sum(vm.space.table.splits for vm in self.el2.vms.values()))

    @property
    @override
    def host_splits(self) -> int:
        """By the table of its address space, where a hole that comes apart counts as what maps."""
        return int(self.el2.hlos.table.splits + self.el2.hlos.table.filled)

    @override
    def host_tables(self) -> Sequence[PageTable]:
        """The host's, which EL2 has."""
        return (self.el2.hlos.table.pages,)

    @override
    def host_order(self, pa: Pa) -> int:
        """By the host's table."""
        return int(self.el2.hlos.table.leaf(identity_ipa(pa)).size.bit_length() - PAGE.bit_length())

    @override
    def guest_order(self, vm: Vm, ipa: Ipa) -> int:
        """By the guest's table."""
        return int(vm.handle.space.table.leaf(ipa).size.bit_length() - PAGE.bit_length())

    @override
    def locked_in(self, vm: Vm, pa: Pa) -> bool:
        """Private and locked, where it is mapped."""
        ipa = self.ipa_of(vm, pa)
        return ipa is not None and bool(vm.handle.locked(ipa))

    @override
    def guest_stage2(self, vm: Vm) -> Stage2:
        """The stage-2 registers of the VM's address space, for a walk of the guest's tables."""
        registers: Stage2 = vm.handle.space.table.registers
        return registers

    @override
    def guest_table(self, vm: Vm) -> PageTable:
        """The stage-2 table of the VM's address space, to be read entry by entry."""
        table: PageTable = vm.handle.space.table.pages
        return table

    # -- the guest acts, VMs ---------------------------------------------------------------------------------------

    @override
    def handles(self, vm: Vm, fault: Fault) -> bool:
        """The first access to a page that the guest has unlocked locks it again."""
        return fault.kind in (ACCESS_FLAG, PERMISSION) and fault.ipa is not None and bool(
            vm.handle.space.touch(fault.ipa, fault.access))

    @override
    def guest_consents(self, vm: Vm, ipa: Ipa) -> bool:
        """HVC ADDRSPACE_MODIFY_PAGES: unlock; refused for what is not a private page."""
        regs = [n.ADDRSPACE_MODIFY_PAGES, 0, ipa, PAGE, _UNLOCK] + [0] * 13
        vm.handle.guest_call(regs)
        return regs[0] == GunyahError.OK

    @override
    def create_vm(self, frames: int) -> Vm:
        """RM: VM_ALLOC_VMID to VM_START."""
        handle = self.el2.create_vm("guest")
        return Vm(handle, handle.vmid)

    @override
    def vm_kill(self, vm: Vm) -> None:
        """The Resource Manager's VM_STOP: the vCPUs run no more, memory stays where it is."""
        vm.handle.kill()

    @override
    def vm_destroyed(self, vm: Vm) -> None:
        """RM: VM_RESET. What the driver has not taken back by then stays with the VM's extents: it is lost."""
        memdb, handle = self.el2.memdb, vm.handle
        if not any(list(memdb.ranges(extent)) for extent in (handle.guest_private, handle.guest_shared)):
            handle.destroy()
        else:
            handle.space.abandon()

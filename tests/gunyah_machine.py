"""A machine under Gunyah's EL2, driven by hypercalls, and what must hold of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from guest_memfd.machine.el2.gunyah import hypercalls as hc
from guest_memfd.machine.el2.gunyah import private
from guest_memfd.machine.el2.gunyah.addrspace import AddressSpace, AddrMapFlag
from guest_memfd.machine.el2.gunyah.config import RangeOp
from guest_memfd.machine.el2.gunyah.donate import Donation
from guest_memfd.machine.el2.gunyah.el2 import HLOS_VMID, Gunyah
from guest_memfd.machine.el2.gunyah.memextent import Attributes, ExtentAccess
from guest_memfd.machine.hw.arm64.access import Transfer
from guest_memfd.machine.hw.arm64.descriptor import ADDRESS
from guest_memfd.machine.hw.arm64.fault import Fault
from guest_memfd.machine.hw.arm64.mmu import Mmu
from guest_memfd.machine.hw.arm64.registers import Tcr
from guest_memfd.machine.hw.arm64.stop import CpuAbort, Expired, Stop
from guest_memfd.machine.hw.arm64.tables import PageTable
from guest_memfd.machine.hw.arm64.tlb import Tlb
from guest_memfd.machine.hw.arm64.walk import Stage1
from guest_memfd.machine.hw.buddy import Buddy
from guest_memfd.machine.hw.ram import Ram
from guest_memfd.words.units import PAGE

GIB, MIB = 1 << 30, 1 << 20
POOL = 16 * MIB
RWX = Attributes(ExtentAccess.RWX, ExtentAccess.RWX).value
RW = Attributes(ExtentAccess.RW, ExtentAccess.RW).value
PARTIAL = int(AddrMapFlag.PARTIAL)
PRIVATE, VMMIO = AddrMapFlag.PRIVATE | AddrMapFlag.PARTIAL, AddrMapFlag.VMMIO | AddrMapFlag.PARTIAL
LENT, DEVICE = 0x8000_0000, 0x8_0000
FULL = (1 << 64) - 1


class Machine:
    """RAM, two CPUs' TLBs, EL2 with one VM, a host stage 1 that maps RAM at its own addresses."""

    def __init__(self, size: int = 4 * GIB, **options: Any) -> None:
        self.ram = Ram(size)
        self.pool = Buddy(self.ram, self.ram.end - POOL, POOL)
        self.tlbs = [Tlb(), Tlb()]
        self.el2 = Gunyah(self.ram, self.pool, self.tlbs, reserved=[(self.ram.end - POOL, POOL)], **options)
        self.vm = self.el2.create_vm("guest")
        self.vm.space.configure(RangeOp.ADD_PRIVATE, GIB, 64 * GIB)
        self.vm.space.configure(RangeOp.ADD_VMMIO, 0, GIB)
        self.spaces = [self.el2.hlos, self.vm.space]
        for space in self.spaces:
            self.watch(space)
        # The host's own tables lie in a page-mapped corner, where nothing is ever donated.
        self.host_pages = Buddy(self.ram, self.ram.end - 2 * POOL, POOL)
        linear = PageTable(self.ram, self.host_pages, 1, ia_bits=48)
        linear.map(self.ram.base, size, self.ram.base, 0x707 & ~3)
        self.stage1 = Stage1(Tcr(), linear.root, linear.root)
        self.mmus = [Mmu(self.ram, tlb) for tlb in self.tlbs]

    def watch(self, space: AddressSpace) -> None:
        vmid = space.table.vmid
        space.table.pages.live_check = lambda ia, size: any(
            entry.vmid == vmid and entry.kind != "stage1" and entry.ipa < ia + size and ia < entry.ipa + entry.size
            for tlb in self.tlbs for entry in tlb.entries())

    def hvc(self, *args: int) -> int:
        """The error of a hypercall."""
        return self.hvc_all(*args)[0]

    def hvc_all(self, *args: int) -> list[int]:
        regs = list(args) + [0] * (18 - len(args))
        self.el2.hvc(regs)
        if regs[0] >> 63:
            regs[0] -= 1 << 64
        return regs

    def donate(self, kind: int, source: int, to: int, pa: int, size: int = PAGE) -> int:
        return self.hvc(hc.MEMEXTENT_DONATE, kind, source, to, pa, size)

    def to_protected(self, pa: int, size: int = PAGE) -> int:
        return self.donate(Donation.TO_PROTECTED, self.vm.caps.host_private, self.vm.caps.guest_private, pa, size)

    def from_protected(self, pa: int, size: int = PAGE) -> int:
        return self.donate(Donation.FROM_PROTECTED, self.vm.caps.guest_private, self.vm.caps.host_private, pa, size)

    def map(self, ipa: int, pa: int, size: int = PAGE, attributes: int = RWX, flags: int = PRIVATE) -> int:
        extent = self.vm.caps.guest_private if flags & AddrMapFlag.PRIVATE else self.vm.caps.guest_shared
        return self.hvc(hc.ADDRSPACE_MAP, self.vm.caps.addrspace, extent, ipa, attributes, flags, pa, size)

    def unmap(self, ipa: int, pa: int, size: int = PAGE, flags: int = PRIVATE) -> int:
        extent = self.vm.caps.guest_private if flags & AddrMapFlag.PRIVATE else self.vm.caps.guest_shared
        return self.hvc(hc.ADDRSPACE_UNMAP, self.vm.caps.addrspace, extent, ipa, flags, pa, size)

    def lend(self, ipa: int, pa: int, size: int = PAGE) -> None:
        assert self.to_protected(pa, size) == 0
        assert self.map(ipa, pa, size) == 0

    def share(self, ipa: int, pa: int, size: int = PAGE) -> None:
        caps = self.vm.caps
        assert self.donate(Donation.TO_SIBLING, caps.host_shared, caps.guest_shared, pa, size) == 0
        assert self.map(ipa, pa, size, RW, VMMIO) == 0

    def guest_hvc(self, *args: int) -> list[int]:
        regs = list(args) + [0] * (18 - len(args))
        assert self.vm.guest_call(regs) is None
        if regs[0] >> 63:
            regs[0] -= 1 << 64
        return regs

    def unlock(self, ipa: int, size: int = PAGE, flags: int = 1) -> int:
        return self.guest_hvc(hc.ADDRSPACE_MODIFY_PAGES, 0, ipa, size, flags)[0]

    # -- what memory and TLBs say --------------------------------------------------------------------------------

    def host_reads(self, pa: int, cpu: int = 0) -> bool:
        try:
            return self.mmus[cpu].translate(pa, "r", 1, self.stage1, self.el2.stage2()).pa == pa
        except Fault:
            return False

    def guest_walk(self, ipa: int, access: Any = "r", cpu: int = 1) -> int | None:
        """The physical address a guest with stage 1 off reaches, through the TLB."""
        try:
            off = Stage1(Tcr(), 0, 0, enabled=False)
            return self.mmus[cpu].translate(ipa, access, 1, off, self.vm.space.table.registers).pa
        except Fault:
            return None

    def snapshot(self) -> Any:
        """All that may not change when a call is refused."""
        extents = (self.el2.host_extent, self.vm.guest_private, self.vm.guest_shared)
        owners = [list(self.el2.memdb.ranges(extent)) for extent in extents]
        return owners, [list(space.mappings()) for space in self.spaces], self.pool.free_pages

    def check(self, unmapped_first: bool = True) -> None:
        """The invariants of EL2; *unmapped_first*: the host has unmapped shared pages before it took them back."""
        host = self.el2.hlos
        for space in self.spaces:
            assert space.table.pages.violations == []
            check_places(space)
        assert self.pool.free_pages == POOL // PAGE - sum(tables(self.ram, s.table.pages.root, 0) for s in self.spaces)
        mapped = ranges((leaf.oa, leaf.oa + leaf.size) for leaf in host.mappings())
        may = [r for e in (self.el2.host_extent, self.vm.guest_shared) for r in self.el2.memdb.ranges(e)]
        assert mapped == ranges(may)
        for start, end in self.el2.memdb.ranges(self.vm.guest_private):
            for tlb in self.tlbs:
                assert not any(entry.vmid == HLOS_VMID and entry.kind != "stage1" and start < entry.oa + entry.size
                               and entry.oa < end for entry in tlb.entries())
        for leaf in self.vm.space.mappings():
            secret = bool(leaf.value & private.PRIVATE)
            if secret or unmapped_first:
                assert self.el2.owner(leaf.oa) == ("guest" if secret else "shared", self.vm)


def ranges(found: Iterator[tuple[int, int]] | list[tuple[int, int]]) -> list[tuple[int, int]]:
    out: list[tuple[int, int]] = []
    for low, high in sorted(found):
        if out and out[-1][1] == low:
            out[-1] = out[-1][0], high
        else:
            out.append((low, high))
    return out


def tables(ram: Ram, at: int, level: int) -> int:
    """Pages of a tree, counted from memory alone."""
    values = [ram.read64(at + 8 * n) for n in range(512)]
    return 1 + sum(tables(ram, v & ADDRESS, level + 1) for v in values if level < 3 and v & 3 == 3)


def check_places(space: AddressSpace) -> None:
    """The reverse map is the table, read backwards."""
    places: dict[int, list[tuple[int, int]]] = {}
    for leaf in space.mappings():
        places.setdefault(leaf.ipa - leaf.oa, []).append((leaf.oa, leaf.oa + leaf.size))
    cached: dict[int, list[tuple[int, int]]] = {}
    for low, high, distances in space._places.runs(0, 1 << 48):
        for distance in distances:
            cached.setdefault(distance, []).append((low, high))
    assert {d: ranges(r) for d, r in places.items()} == {d: ranges(r) for d, r in cached.items()}


def guest_access(m: Machine, ipa: int, access: Any) -> CpuAbort | None:
    try:
        m.mmus[0].translate(ipa, access, 1, Stage1(Tcr(), 0, 0, enabled=False), m.vm.space.table.registers)
    except Fault as fault:
        return CpuAbort(fault, 0)
    return None


class Script:
    """A CPU whose runs end as written down."""

    def __init__(self, stops: list[Stop], transfers: list[Transfer | None] | None = None) -> None:
        self.stops, self.transfers = stops, transfers or []
        self.regs = [0] * 31
        self.pc, self.el = 0x1000, 1
        self.taken: list[tuple[int, int | None]] = []
        self.budgets: list[float | None] = []

    def run(self, budget: float | None) -> Stop:
        self.budgets.append(budget)
        return self.stops.pop(0) if self.stops else Expired()

    def x(self, n: int) -> int:
        return self.regs[n]

    def set_x(self, n: int, value: int) -> None:
        self.regs[n] = value

    def transfer(self) -> Transfer | None:
        return self.transfers.pop(0)

    def take_exception(self, esr: int, far: int | None = None) -> None:
        self.taken.append((esr, far))

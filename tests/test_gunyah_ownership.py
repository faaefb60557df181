"""Gunyah's EL2: whatever is asked for, in whatever order, a page that is private to one VM is mapped in no other.

Several VMs, hypercalls with any capabilities, memory parcels, guests that unlock pages, VMs that die and come again. TLBs
are filled all the time, so that what a call forgets to remove is there to be seen.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from guest_memfd.machine.el2.gunyah import hypercalls as hc
from guest_memfd.machine.el2.gunyah import private
from guest_memfd.machine.el2.gunyah.addrspace import AddressSpace, AddrMapFlag
from guest_memfd.machine.el2.gunyah.config import RangeOp
from guest_memfd.machine.el2.gunyah.donate import NOSYNC, Donation
from guest_memfd.machine.el2.gunyah.el2 import HLOS_VMID, Gunyah
from guest_memfd.machine.el2.gunyah.errors import GunyahError as E
from guest_memfd.machine.el2.gunyah.errors import HypRefused
from guest_memfd.machine.el2.gunyah.memextent import Attributes, ExtentAccess
from guest_memfd.machine.el2.gunyah.rm.errors import RmRefused
from guest_memfd.machine.el2.gunyah.rm.memparcel import Memparcels, Transaction
from guest_memfd.machine.el2.gunyah.rm.payloads import ACCEPT_DONE, Accept, Acl, MemRequest, Sgl
from guest_memfd.machine.el2.gunyah.vm import GunyahHypVm
from guest_memfd.machine.hw.arm64.fault import Fault
from guest_memfd.machine.hw.arm64.mmu import Mmu
from guest_memfd.machine.hw.arm64.registers import Tcr
from guest_memfd.machine.hw.arm64.tlb import Tlb
from guest_memfd.machine.hw.arm64.walk import Stage1
from guest_memfd.machine.hw.buddy import Buddy
from guest_memfd.machine.hw.ram import Ram
from guest_memfd.words.units import PAGE

MIB = 1 << 20
POOL = 8 * MIB
RWX, RW = Attributes(ExtentAccess.RWX, ExtentAccess.RWX).value, Attributes(ExtentAccess.RW, ExtentAccess.RW).value
PLAIN, PRIVATE, VMMIO = (
    int(AddrMapFlag.PARTIAL | more) for more in (AddrMapFlag(0), AddrMapFlag.PRIVATE, AddrMapFlag.VMMIO))
OFF = Stage1(Tcr(), 0, 0, enabled=False)
LENT, DEVICE, ELSEWHERE = 1 << 32, 1 << 20, 1 << 36
"""Guest addresses that are configured private and VMMIO, and that are neither."""
NR = 6
"""Pages that all calls are about."""


class Machine:
    """EL2 with some VMs on 12 MiB."""

    def __init__(self, vms: int = 2) -> None:
        self.ram = Ram(12 * MIB)
        self.pool = Buddy(self.ram, self.ram.end - POOL, POOL)
        self.tlbs = [Tlb(), Tlb()]
        self.el2 = Gunyah(self.ram, self.pool, self.tlbs, reserved=[(self.ram.end - POOL, POOL)])
        self.mmus = [Mmu(self.ram, tlb) for tlb in self.tlbs]
        self.vms = [self.create() for _ in range(vms)]
        self.parcels = Memparcels(self.el2, lambda vmid: vmid == HLOS_VMID or vmid in self.el2.vms, lambda *_: None)
        self.pages = [self.ram.base + n * PAGE for n in range(NR)]

    def create(self) -> GunyahHypVm:
        """A VM that runs, with its ranges configured."""
        vm = self.el2.create_vm("guest")
        vm.space.configure(RangeOp.ADD_PRIVATE, LENT, 1 << 24)
        vm.space.configure(RangeOp.ADD_VMMIO, DEVICE, 1 << 24)
        return vm

    def hvc(self, *args: int) -> int:
        """The error of a hypercall of the host's."""
        regs = list(args) + [0] * (18 - len(args))
        self.el2.hvc(regs)
        return regs[0] - (regs[0] >> 63 << 64)

    def donate(self, kind: int, source: int, to: int, pa: int, size: int = PAGE) -> int:
        """MEMEXTENT_DONATE."""
        return self.hvc(hc.MEMEXTENT_DONATE, kind, source, to, pa, size)

    def map(
        self, vm: GunyahHypVm, extent: int, ipa: int, pa: int, flags: int, size: int = PAGE, attributes: int = RW
    ) -> int:
        """ADDRSPACE_MAP."""
        return self.hvc(hc.ADDRSPACE_MAP, vm.caps.addrspace, extent, ipa, attributes, flags, pa, size)

    def unmap(self, vm: GunyahHypVm, extent: int, ipa: int, pa: int, flags: int, size: int = PAGE) -> int:
        """ADDRSPACE_UNMAP."""
        return self.hvc(hc.ADDRSPACE_UNMAP, vm.caps.addrspace, extent, ipa, flags, pa, size)

    def lend(self, vm: GunyahHypVm, pa: int, kind: int = Donation.TO_PROTECTED) -> int:
        """The page becomes the VM's alone, at LENT."""
        caps = vm.caps
        return self.donate(kind, caps.host_private, caps.guest_private, pa) or self.map(
            vm, caps.guest_private, self.at(LENT, pa), pa, PRIVATE, attributes=RWX)

    def share(self, vm: GunyahHypVm, pa: int) -> int:
        """The page becomes the VM's as well as the host's, at DEVICE."""
        caps = vm.caps
        return self.donate(Donation.TO_SIBLING, caps.host_shared, caps.guest_shared, pa) or self.map(
            vm, caps.guest_shared, self.at(DEVICE, pa), pa, VMMIO)

    def at(self, base: int, pa: int) -> int:
        """Where in the VM, from *base* on, a page goes that nobody wants elsewhere."""
        return base + pa - self.ram.base

    @property
    def spaces(self) -> Iterator[AddressSpace]:
        """Of the host and of all VMs."""
        yield self.el2.hlos
        yield from (vm.space for vm in self.el2.vms.values())

    def fill(self) -> None:
        """Every CPU translates all that it may."""
        for space in self.spaces:
            for pa in self.pages:
                for start, _, distance in space.places(pa, pa + PAGE):
                    for mmu in self.mmus:
                        mmu.prefetch(start + distance, OFF, space.table.registers)

    def check(self, tables: bool = True) -> None:
        """Who may reach what: by the tables (or by what EL2 knows of them, which is faster) and by what TLBs have kept."""
        owners = {id(vm.guest_private): vm.vmid for vm in self.el2.vms.values()}
        reached = []
        for space in self.spaces:
            leaves = space.mappings() if tables else (
                space.table.leaf(start + distance)
                for pa in self.pages for start, _, distance in space.places(pa, pa + PAGE))
            reached += [(space.table.vmid, leaf.oa, leaf.oa + leaf.size, bool(leaf.value & private.PRIVATE))
                        for leaf in leaves]
        reached += [(entry.vmid, entry.oa, entry.oa + entry.size, False)
                    for tlb in self.tlbs for entry in tlb.entries() if entry.kind != "stage1"]
        for vmid, start, end, secret in reached:
            for low, high, extent in self.el2.memdb._owners.runs(start, end):
                owner = owners.get(id(extent))
                assert owner in (None, vmid), f"[{low:#x}, {high:#x}) is VM {owner:#x}'s alone, and VM {vmid:#x} has it"
                assert not secret or owner == vmid, f"[{low:#x}, {high:#x}) is {extent!r}'s, and VM {vmid:#x}'s private page"
        for vm in self.el2.vms.values():
            for start, end in self.el2.memdb.ranges(vm.guest_private):
                assert not self.el2.hlos.maps_any(start, end)
        for space in self.spaces:
            assert not space.table.pages.violations


@pytest.fixture
def m() -> Machine:
    return Machine()


def reads(m: Machine, space: AddressSpace, ipa: int) -> int | None:
    try:
        return m.mmus[0].translate(ipa, "r", 1, OFF, space.table.registers).pa
    except Fault:
        return None


# -- one after the other -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Donation.TO_PROTECTED, Donation.TO_PROTECTED | NOSYNC, Donation.TO_CHILD,
                                  Donation.TO_CHILD | NOSYNC])
def test_a_partial_map_of_a_host_page_ends_when_it_becomes_private(m: Machine, kind: int) -> None:
    (mine, other), pa = m.vms, m.pages[0]
    assert m.map(other, other.caps.host_shared, ELSEWHERE, pa, PLAIN) == 0
    assert m.map(mine, mine.caps.host_shared, ELSEWHERE, pa, PLAIN) == 0
    m.fill()
    assert m.lend(mine, pa, kind) == 0
    assert [reads(m, vm.space, ELSEWHERE) for vm in m.vms] == [None, None]
    m.check()


@pytest.mark.parametrize("sync", [0, NOSYNC])
def test_a_shared_page_that_goes_back_is_no_longer_the_vms(m: Machine, sync: int) -> None:
    (mine, other), pa = m.vms, m.pages[0]
    assert m.share(other, pa) == 0
    m.fill()
    assert m.donate(Donation.TO_SIBLING | sync, other.caps.guest_shared, other.caps.host_shared, pa) == 0
    assert (reads(m, other.space, m.at(DEVICE, pa)) is None) == (not sync)
    assert m.lend(mine, pa) == 0
    assert reads(m, other.space, m.at(DEVICE, pa)) is None
    m.check()


def test_a_quiet_unmap_is_made_good_before_another_has_the_page_alone(m: Machine) -> None:
    (mine, other), pa = m.vms, m.pages[0]
    assert m.share(other, pa) == 0
    m.fill()
    assert m.unmap(other, other.caps.guest_shared, m.at(DEVICE, pa), pa, VMMIO | int(AddrMapFlag.NOSYNC)) == 0
    assert m.donate(Donation.TO_SIBLING, other.caps.guest_shared, other.caps.host_shared, pa) == 0
    assert m.lend(mine, pa) == 0
    m.check()


@pytest.mark.parametrize("kind", [Donation.TO_PARENT, Donation.FROM_PROTECTED])
def test_nothing_takes_a_page_that_the_guest_has(m: Machine, kind: int) -> None:
    mine, pa = m.vms[0], m.pages[0]
    assert m.lend(mine, pa) == 0
    m.ram.write64(pa, 0x5EC7)
    caps = mine.caps
    assert m.donate(kind, caps.guest_private, caps.host_private, pa) == E.BUSY
    assert not m.el2.host_may(pa)
    assert reads(m, mine.space, m.at(LENT, pa)) == pa
    m.check()


def test_a_vm_has_no_private_page_of_another(m: Machine) -> None:
    (mine, other), pa = m.vms, m.pages[0]
    assert m.donate(Donation.TO_PROTECTED, mine.caps.host_private, mine.caps.guest_private, pa) == 0
    assert m.map(other, mine.caps.guest_private, m.at(LENT, pa), pa, PRIVATE, attributes=RWX) == E.DENIED
    m.check()


@pytest.mark.parametrize("kind", [Transaction.LEND, Transaction.SHARE])
def test_a_partial_map_ends_when_the_page_goes_into_a_parcel(m: Machine, kind: Transaction) -> None:
    (mine, other), pa = m.vms, m.pages[0]
    assert m.map(other, other.caps.host_shared, ELSEWHERE, pa, PLAIN) == 0
    m.fill()
    offer(m, kind, (mine,), pa)
    assert reads(m, other.space, ELSEWHERE) is None


def test_a_vm_that_goes_takes_its_pages_from_others_and_its_records_along(m: Machine) -> None:
    (mine, other), pa = m.vms, m.pages[0]
    assert m.share(mine, pa) == 0
    assert m.map(other, mine.caps.guest_shared, ELSEWHERE, pa, PLAIN) == 0
    assert m.map(mine, mine.caps.host_shared, 1 << 40, 0, 0, 0) == 0            # all of the host's extent
    m.fill()
    mine.destroy()
    assert reads(m, other.space, ELSEWHERE) is None
    others = [m.pool.alloc_table() for _ in range(64)]      # tables of the VM that has gone, which are something else now
    assert m.lend(other, pa) == 0
    assert all(m.ram.read(at, PAGE) == bytes(PAGE) for at in others)
    m.check()


# -- anything ----------------------------------------------------------------------------------------------------------


def offer(m: Machine, kind: Transaction, vms: tuple[GunyahHypVm, ...], pa: int) -> int:
    acl = tuple(Acl(vm.vmid, 7 if kind == Transaction.DONATE else 6) for vm in vms)
    acl += (Acl(HLOS_VMID, 6),) if kind == Transaction.SHARE else ()
    return m.parcels.create(HLOS_VMID, kind, MemRequest(0, 0, 0, acl, (Sgl(pa, PAGE),)))


class Anything:
    """Random calls on *m*."""

    def __init__(self, m: Machine, seed: int) -> None:
        self.m, self.choose = m, random.Random(seed)
        self.answers: set[str] = set()

    def vm(self) -> GunyahHypVm:
        return self.choose.choice(list(self.m.el2.vms.values()))

    def extent(self) -> int:
        caps = self.vm().caps
        return self.choose.choice((caps.host_private, caps.guest_private, caps.guest_shared))

    def where(self) -> tuple[int, int, int]:
        """A page or some, and where: guest address, physical address, bytes."""
        pa, nr = self.choose.choice(self.m.pages), self.choose.choice((1, 1, 1, 2, 3))
        base = self.choose.choice((LENT, LENT, DEVICE, DEVICE, ELSEWHERE))
        return self.m.at(base, pa) + self.choose.choice((0, 0, PAGE)), pa, nr * PAGE

    def flags(self) -> int:
        return self.choose.choice((PLAIN, PRIVATE, PRIVATE, VMMIO, VMMIO, 0))

    def step(self) -> None:
        name = self.choose.choice(("donate", "donate", "donate", "lend", "share", "map", "map", "map", "unmap", "unmap",
                                   "unlock", "offer", "accept", "release", "reclaim", "kill", "reborn", "fill"))
        if name in ("kill", "reborn") and self.choose.random() < 0.8:
            name = "fill"
        if self.choose.random() < 0.1:
            self.m.pool.fail_at(self.choose.randrange(4))
        call: Callable[[], Any] = getattr(self, f"_{name}")
        try:
            self.answers.add(f"{name} {call()}")
        except (HypRefused, RmRefused) as refused:
            self.answers.add(f"{name} {refused.error!r}")
        self.m.pool.fail_at(None)

    def _donate(self) -> int:
        _, pa, size = self.where()
        kind = self.choose.choice(list(Donation)) | self.choose.choice((0, 0, NOSYNC))
        return self.m.donate(kind, self.extent(), self.extent(), pa, size)

    def _lend(self) -> int:
        return self.m.lend(self.vm(), self.choose.choice(self.m.pages))

    def _share(self) -> int:
        return self.m.share(self.vm(), self.choose.choice(self.m.pages))

    def _map(self) -> int:
        ipa, pa, size = self.where()
        flags = self.flags()
        if not flags:
            ipa, pa, size = self.choose.choice((1 << 40, 1 << 41)), 0, 0
        return self.m.map(self.vm(), self.extent(), ipa, pa, flags, size, self.choose.choice((RW, RWX)))

    def _unmap(self) -> int:
        ipa, pa, size = self.where()
        flags = self.flags()
        if not flags:
            ipa, pa, size = self.choose.choice((1 << 40, 1 << 41)), 0, 0
        quiet = self.choose.choice((0, int(AddrMapFlag.NOSYNC))) if flags else 0
        return self.m.unmap(self.vm(), self.extent(), ipa, pa, flags | quiet, size)

    def _unlock(self) -> int:
        ipa, _, size = self.where()
        regs = [hc.ADDRSPACE_MODIFY_PAGES, 0, ipa, size, self.choose.choice((1, 3))] + [0] * 13
        self.vm().guest_call(regs)
        return regs[0]

    def _offer(self) -> None:
        kind = self.choose.choice((Transaction.LEND, Transaction.SHARE))
        vms = {vm.vmid: vm for vm in (self.vm(), self.vm())}.values()
        offer(self.m, kind, tuple(vms), self.choose.choice(self.m.pages))

    def _parcel(self) -> Any:
        parcels = list(self.m.parcels.parcels.values())
        return self.choose.choice(parcels) if parcels else None

    def _accept(self) -> None:
        parcel = self._parcel()
        if parcel is not None:
            where = Sgl(self.where()[0], PAGE)
            self.m.parcels.accept(self.vm(), Accept(
                parcel.handle, parcel.mem_type, parcel.kind, ACCEPT_DONE, parcel.label, (where,)))

    def _release(self) -> None:
        parcel = self._parcel()
        if parcel is not None:
            self.m.parcels.release(self.vm(), parcel.handle, 0)

    def _reclaim(self) -> None:
        parcel = self._parcel()
        if parcel is not None:
            self.m.parcels.reclaim(HLOS_VMID, parcel.handle, 0)

    def _kill(self) -> None:
        self.vm().kill()

    # As the Resource Manager does it: what the VM has accepted is released first.
    def _reborn(self) -> None:
        vm = self.vm()
        vm.kill()
        for parcel in self.m.parcels.parcels.values():
            if vm.vmid in parcel.accepted:
                self.m.parcels.release(vm, parcel.handle, 0)
        vm.destroy()
        self.m.pool.fail_at(None)
        self.m.create()

    def _fill(self) -> None:
        self.m.fill()


def wander(seed: int, steps: int) -> set[str]:
    """*steps* random calls, each followed by a look at everything."""
    m = Machine(3)
    anything = Anything(m, seed)
    for n in range(steps):
        anything.step()
        if anything.choose.random() < 0.5:
            m.fill()
        m.check(tables=n % 50 == 49)
    return anything.answers


@pytest.mark.parametrize("seed", range(4))
def test_nothing_shares_what_is_private(seed: int) -> None:
    assert len(wander(seed, 250)) > 25


@pytest.mark.long
@pytest.mark.parametrize("seed", range(100, 104))
def test_nothing_shares_what_is_private_for_long(seed: int) -> None:
    wander(seed, 2500)

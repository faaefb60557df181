"""Gunyah's address spaces: every answer of map, unmap, configure and lookup, locked pages, memory running out."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise

import pytest
from effort import calls
from gunyah_machine import (
    DEVICE,
    FULL,
    GIB,
    LENT,
    MIB,
    PARTIAL,
    PRIVATE,
    RW,
    RWX,
    VMMIO,
    Machine,
    Script,
    check_places,
    guest_access,
)

from guest_memfd.machine.el2.gunyah import hypercalls as hc
from guest_memfd.machine.el2.gunyah import private
from guest_memfd.machine.el2.gunyah.addrspace import AddrMapFlag
from guest_memfd.machine.el2.gunyah.capabilities import ExtentRight, SpaceRight
from guest_memfd.machine.el2.gunyah.config import MAX_RANGES, RangeOp
from guest_memfd.machine.el2.gunyah.donate import Donation
from guest_memfd.machine.el2.gunyah.el2 import Gunyah
from guest_memfd.machine.el2.gunyah.errors import GunyahError as E
from guest_memfd.machine.el2.gunyah.errors import HypRefused
from guest_memfd.machine.el2.gunyah.memdb import MemDb
from guest_memfd.machine.el2.gunyah.memextent import Attributes, Extent, ExtentAccess
from guest_memfd.machine.el2.gunyah.rangemap import RangeMap
from guest_memfd.machine.el2.gunyah.stage2 import IA_BITS, GunyahStage2Table, Stock
from guest_memfd.machine.el2.gunyah.vcpu import VcpuState
from guest_memfd.machine.el2.gunyah.vm import GunyahHypVm
from guest_memfd.machine.hw.arm64.descriptor import VALID
from guest_memfd.machine.hw.arm64.tlb import Tlb
from guest_memfd.machine.hw.buddy import Buddy
from guest_memfd.machine.hw.ram import Ram
from guest_memfd.words.units import PAGE

RX = Attributes(ExtentAccess.RX, ExtentAccess.RX).value


@pytest.fixture
def m() -> Machine:
    return Machine()


@pytest.fixture
def pa(m: Machine) -> int:
    return m.ram.base


# -- map ---------------------------------------------------------------------------------------------------------------


MAP_ERRORS: list[tuple[str, dict[str, int], int]] = [
    ("right", {}, 0),
    ("again", {"twice": 1}, 0),
    ("reserved flag", {"flags": PRIVATE | 1 << 5}, E.ARG_INVAL),
    ("reserved high flag", {"flags": PRIVATE | 1 << 40}, E.ARG_INVAL),
    ("whole-extent is for unmap", {"flags": PRIVATE | AddrMapFlag.WHOLE}, E.ARG_INVAL),
    ("private and devices", {"flags": PRIVATE | VMMIO}, E.ARG_INVAL),
    ("private of the whole", {"flags": AddrMapFlag.PRIVATE}, E.ARG_INVAL),
    ("reserved attribute bits", {"attributes": RWX | 8}, E.ARG_INVAL),
    ("no such memory type", {"attributes": 0x77 | 0x10 << 16}, E.ARG_INVAL),
    ("more than the extent allows", {"attributes": 0x77}, E.ARG_INVAL),
    ("not writable", {"attributes": RX}, E.ARG_INVAL),
    ("offset misaligned", {"offset": 8}, E.ARG_ALIGN),
    ("size misaligned", {"size": PAGE - 1}, E.ARG_ALIGN),
    ("guest address misaligned", {"ipa": LENT + 8}, E.ARG_ALIGN),
    ("no size", {"size": 0}, E.ARG_SIZE),
    ("outside of the extent", {"offset": 1 << 48}, E.ARG_SIZE),
    ("guest address too high", {"ipa": 1 << 48}, E.ADDR_INVAL),
    ("guest address beyond the table", {"ipa": 1 << IA_BITS}, E.ADDR_INVAL),
    ("guest address in the upper half", {"ipa": 1 << 63}, E.ADDR_INVAL),
    ("not configured private", {"ipa": DEVICE}, E.DENIED),
    ("end not configured", {"ipa": 65 * GIB - PAGE, "size": 2 * PAGE}, E.DENIED),
    ("not the guest's", {"offset": 4 * PAGE}, E.DENIED),
    ("partly not the guest's", {"offset": 3 * PAGE, "size": 2 * PAGE}, E.DENIED),
]


@pytest.mark.parametrize(("what", "change", "error"), MAP_ERRORS, ids=[what for what, _, _ in MAP_ERRORS])
def test_map_private_errors(m: Machine, pa: int, what: str, change: dict[str, int], error: int) -> None:
    assert m.to_protected(pa, 4 * PAGE) == 0
    args = {"ipa": LENT, "offset": 0, "size": PAGE, "attributes": RWX, "flags": int(PRIVATE)} | change
    if args.pop("twice", 0):
        assert m.map(LENT, pa) == 0
    before = m.snapshot()
    assert m.map(args["ipa"], pa + args["offset"], args["size"], args["attributes"], args["flags"]) == error
    if error:
        assert m.snapshot() == before
    else:
        assert m.vm.locked(LENT)
    m.check()


VMMIO_ERRORS: list[tuple[str, dict[str, int], int]] = [
    ("right", {}, 0),
    ("executable", {"attributes": RX}, E.ARG_INVAL),
    ("not configured for devices", {"ipa": LENT}, E.DENIED),
    ("not in the shared extent", {"offset": 4 * PAGE}, E.MEMDB_NOT_OWNER),
    ("read only is right", {"attributes": Attributes(ExtentAccess.R, ExtentAccess.R).value}, 0),
]


@pytest.mark.parametrize(("what", "change", "error"), VMMIO_ERRORS, ids=[what for what, _, _ in VMMIO_ERRORS])
def test_map_vmmio_errors(m: Machine, pa: int, what: str, change: dict[str, int], error: int) -> None:
    assert m.donate(2, m.vm.caps.host_shared, m.vm.caps.guest_shared, pa, 4 * PAGE) == 0
    args = {"ipa": DEVICE, "offset": 0, "attributes": RW} | change
    assert m.map(args["ipa"], pa + args["offset"], PAGE, args["attributes"], VMMIO) == error
    assert (m.vm.ipa_of(pa) is None) == bool(error)
    m.check()


def test_a_shared_page_is_reachable_by_both(m: Machine, pa: int) -> None:
    assert m.host_reads(pa)
    m.share(DEVICE, pa)
    assert m.host_reads(pa)
    assert m.guest_walk(DEVICE, "w") == pa
    assert m.guest_walk(DEVICE, "x") is None
    assert m.el2.owner(pa) == ("shared", m.vm)
    assert m.unmap(DEVICE, pa, flags=VMMIO) == 0
    assert m.guest_walk(DEVICE) is None
    caps = m.vm.caps
    assert m.donate(Donation.TO_SIBLING, caps.guest_shared, caps.host_shared, pa) == 0
    assert m.el2.owner(pa) == "host"
    m.check()


def test_vmmio_replaces_silently_and_nothing_of_the_old_page_stays(m: Machine, pa: int) -> None:
    m.share(DEVICE, pa, 4 * PAGE)
    assert m.guest_walk(DEVICE + PAGE) == pa + PAGE
    assert m.map(DEVICE + PAGE, pa, PAGE, RW, VMMIO) == 0
    assert m.guest_walk(DEVICE + PAGE) == pa
    assert m.vm.ipa_of(pa) == DEVICE
    assert m.vm.ipa_of(pa + PAGE) is None
    assert m.unmap(DEVICE, pa, flags=VMMIO) == 0
    assert m.vm.ipa_of(pa) == DEVICE + PAGE
    m.check()


def test_a_private_page_has_one_place(m: Machine, pa: int) -> None:
    m.lend(LENT, pa, 2 * MIB)
    assert m.map(LENT + 4 * MIB, pa + PAGE) == E.EXISTING_MAPPING
    m.check()


def test_mapping_over_a_locked_page_is_refused_and_over_a_relinquished_one_zeroes_it(m: Machine, pa: int) -> None:
    m.lend(LENT, pa)
    m.ram.write64(pa, 5)
    assert m.to_protected(pa + PAGE) == 0
    assert m.map(LENT, pa + PAGE) == E.BUSY
    assert m.unlock(LENT, flags=3) == 0
    assert m.map(LENT, pa + PAGE) == 0
    assert m.ram.read64(pa) == 0
    assert m.vm.ipa_of(pa) is None
    assert m.guest_walk(LENT) == pa + PAGE
    m.check()


def test_a_range_that_changes_its_kind_does_not_lose_a_locked_page(m: Machine, pa: int) -> None:
    m.lend(LENT, pa)
    m.ram.write64(pa, 5)
    m.share(DEVICE, pa + PAGE)
    assert configure(m, RangeOp.REMOVE_PRIVATE, LENT, PAGE) == 0
    assert configure(m, RangeOp.ADD_VMMIO, LENT, PAGE) == 0
    assert m.map(LENT, pa + PAGE, PAGE, RW, VMMIO) == E.BUSY
    assert m.unlock(LENT, flags=3) == 0
    assert m.map(LENT, pa + PAGE, PAGE, RW, VMMIO) == 0
    assert m.guest_walk(LENT) == pa + PAGE
    assert m.ram.read64(pa) == 0
    m.check()


def test_plain_maps_do_not_replace(m: Machine, pa: int) -> None:
    assert m.donate(2, m.vm.caps.host_shared, m.vm.caps.guest_shared, pa, 2 * PAGE) == 0
    assert m.map(65 * GIB, pa, PAGE, RWX, PARTIAL) == 0
    assert m.map(65 * GIB, pa, PAGE, RWX, PARTIAL) == E.EXISTING_MAPPING
    assert m.map(65 * GIB + PAGE, pa + 2 * PAGE, PAGE, RWX, PARTIAL) == E.MEMDB_NOT_OWNER
    assert m.unmap(65 * GIB, pa, PAGE, PARTIAL) == 0
    assert m.unmap(65 * GIB, pa, PAGE, PARTIAL) == E.ADDR_INVAL


def test_rights_for_maps(m: Machine, pa: int) -> None:
    assert m.to_protected(pa) == 0
    grant, caps = m.el2.cspace.grant, m.vm.caps
    extent = grant(m.vm.guest_private, ExtentRight.MAP)
    space = grant(m.vm.space, SpaceRight.MAP)
    tail = (LENT, RWX, PRIVATE, pa, PAGE)
    assert m.hvc(hc.ADDRSPACE_MAP, caps.addrspace, extent, *tail) == E.CSPACE_INSUFFICIENT_RIGHTS
    assert m.hvc(hc.ADDRSPACE_MAP, space, caps.guest_private, *tail) == E.CSPACE_INSUFFICIENT_RIGHTS
    assert m.hvc(hc.ADDRSPACE_MAP, caps.guest_private, caps.guest_private, *tail) == E.CSPACE_WRONG_OBJECT_TYPE
    assert m.hvc(hc.ADDRSPACE_MAP, caps.addrspace, caps.guest_private, *tail) == 0
    assert m.hvc(hc.ADDRSPACE_UNMAP, space, caps.guest_private, LENT, PRIVATE, pa, PAGE) == E.CSPACE_INSUFFICIENT_RIGHTS


def test_whole_extents_are_mapped_with_what_comes_later_and_four_times_at_most(m: Machine, pa: int) -> None:
    caps, extent = m.vm.caps, Extent("window", parent=m.el2.root_extent)
    cap = m.el2.cspace.grant(extent, ExtentRight.MAP | ExtentRight.DONATE)
    for n in range(1, 5):
        assert m.hvc(hc.ADDRSPACE_MAP, caps.addrspace, cap, n << 40, RWX, 0, 0, 0) == 0
    assert m.hvc(hc.ADDRSPACE_MAP, caps.addrspace, cap, 5 << 40, RWX, 0, 0, 0) == E.MEMEXTENT_MAPPINGS_FULL
    assert m.donate(Donation.TO_SIBLING, caps.host_shared, cap, pa, 2 * MIB) == 0
    assert [m.guest_walk((n << 40) + pa) for n in range(1, 6)] == [pa] * 4 + [None]
    assert m.hvc(hc.ADDRSPACE_UNMAP, caps.addrspace, cap, 5 << 40, 0, 0, 0) == E.ADDR_INVAL
    assert m.hvc(hc.ADDRSPACE_UNMAP, caps.addrspace, cap, 2 << 40, 0, 0, 0) == 0
    assert m.guest_walk((2 << 40) + pa) is None
    assert m.guest_walk((3 << 40) + pa) == pa
    assert m.donate(Donation.TO_SIBLING, cap, caps.host_shared, pa, 2 * MIB) == 0
    assert [m.guest_walk((n << 40) + pa) for n in range(1, 5)] == [None] * 4
    assert m.hvc(hc.ADDRSPACE_MAP, caps.addrspace, cap, 2 << 40, RWX, 0, 0, PAGE) == E.ARG_INVAL
    for space in m.spaces:
        assert not space.table.pages.violations
        check_places(space)


# -- unmap -------------------------------------------------------------------------------------------------------------


UNMAP_ERRORS: list[tuple[str, dict[str, int], int]] = [
    ("right", {}, 0),
    ("reserved flag", {"flags": PRIVATE | 1 << 4}, E.ARG_INVAL),
    ("private and devices", {"flags": PRIVATE | VMMIO}, E.ARG_INVAL),
    ("reserved high flag", {"flags": PRIVATE | 1 << 40}, E.ARG_INVAL),
    ("partial and whole", {"flags": PRIVATE | AddrMapFlag.WHOLE}, E.ARG_INVAL),
    ("private of the whole", {"flags": AddrMapFlag.PRIVATE}, E.ARG_INVAL),
    ("offset misaligned", {"offset": 8}, E.ARG_ALIGN),
    ("guest address misaligned", {"ipa": LENT + 8}, E.ARG_ALIGN),
    ("no size", {"size": 0}, E.ARG_SIZE),
    ("guest address too high", {"ipa": 1 << 48}, E.ADDR_INVAL),
    ("not mapped", {"ipa": LENT + GIB}, E.ADDR_INVAL),
    ("another page is mapped there", {"ipa": LENT + PAGE}, E.ADDR_INVAL),
    ("only the first of two is mapped so", {"offset": 3 * PAGE, "ipa": LENT + 3 * PAGE, "size": 2 * PAGE}, E.ADDR_INVAL),
    ("not the guest's", {"offset": 8 * PAGE, "ipa": LENT + 8 * PAGE}, E.MEMDB_NOT_OWNER),
    ("outside of private ranges", {"ipa": DEVICE}, E.DENIED),
]


@pytest.mark.parametrize(("what", "change", "error"), UNMAP_ERRORS, ids=[what for what, _, _ in UNMAP_ERRORS])
def test_unmap_private_errors(m: Machine, pa: int, what: str, change: dict[str, int], error: int) -> None:
    m.lend(LENT, pa, 4 * PAGE)
    assert m.to_protected(pa + 4 * PAGE) == 0
    assert m.unlock(LENT, 4 * PAGE) == 0
    args = {"ipa": LENT, "offset": 0, "size": PAGE, "flags": int(PRIVATE)} | change
    before = m.snapshot()
    assert m.unmap(args["ipa"], pa + args["offset"], args["size"], args["flags"]) == error
    assert (m.snapshot() == before) == bool(error)
    m.check()


def test_unmap_of_what_is_not_private_is_busy(m: Machine, pa: int) -> None:
    assert m.to_protected(pa) == 0
    m.vm.space.map(m.vm.guest_private, LENT, Attributes.decode(RWX), PARTIAL, pa, PAGE)
    assert m.unmap(LENT, pa) == E.BUSY


def test_unmap_vmmio_that_is_not_there_still_synchronises(m: Machine, pa: int) -> None:
    m.share(DEVICE, pa)
    assert m.guest_walk(DEVICE) == pa
    assert m.unmap(DEVICE, pa, flags=VMMIO | AddrMapFlag.NOSYNC) == 0
    assert m.guest_walk(DEVICE) == pa                              # the TLB's
    assert m.unmap(DEVICE, pa, flags=VMMIO | AddrMapFlag.NOSYNC) == E.ADDR_INVAL
    assert m.guest_walk(DEVICE) == pa
    assert m.unmap(DEVICE, pa, flags=VMMIO) == E.ADDR_INVAL
    assert m.guest_walk(DEVICE) is None
    assert m.unmap(LENT, pa, flags=VMMIO) == E.DENIED
    assert m.unmap(DEVICE, pa + PAGE, flags=VMMIO) == E.MEMDB_NOT_OWNER


def test_a_map_over_a_quiet_unmap_is_not_served_by_the_old_entry(m: Machine, pa: int) -> None:
    m.share(DEVICE, pa, 2 * PAGE)
    assert m.guest_walk(DEVICE) == pa
    assert not m.vm.space.stale
    assert m.unmap(DEVICE, pa, flags=VMMIO | AddrMapFlag.NOSYNC) == 0
    assert m.vm.space.stale
    assert m.map(DEVICE, pa + PAGE, PAGE, RW, VMMIO) == 0
    assert not m.vm.space.stale
    assert m.guest_walk(DEVICE) == pa + PAGE
    m.check()


def test_a_table_that_makes_room_for_a_block_is_forgotten_by_the_walker(m: Machine, pa: int) -> None:
    m.lend(LENT, pa)
    assert m.unlock(LENT) == 0
    assert m.unmap(LENT, pa) == 0
    assert m.guest_walk(LENT) is None           # leaves the way to the empty table in the walk cache
    free = m.pool.free_pages
    assert m.to_protected(pa + 2 * MIB, 2 * MIB) == 0
    assert m.map(LENT, pa + 2 * MIB, 2 * MIB) == 0
    assert m.guest_walk(LENT + PAGE) == pa + 2 * MIB + PAGE
    assert m.pool.free_pages == free + 1
    m.check()


# -- locked pages ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("flags", "left"), [(1, 0x77), (3, 0)])
def test_unlocking_with_and_without_sanitising(m: Machine, pa: int, flags: int, left: int) -> None:
    m.lend(LENT, pa)
    m.ram.write64(pa, 0x77)
    assert m.unlock(LENT, flags=flags) == 0
    assert not m.vm.locked(LENT)
    assert m.unmap(LENT, pa) == 0
    assert m.ram.read64(pa) == left
    assert m.from_protected(pa) == 0
    assert m.host_reads(pa)


@pytest.mark.parametrize(("flags", "left"), [(1, 0), (9, 0x77), (13, 0x77)])
def test_the_later_flags(pa: int, m: Machine, flags: int, left: int) -> None:
    m = Machine(modify_flags="new")
    m.lend(LENT, pa)
    m.ram.write64(pa, 0x77)
    assert m.unlock(LENT, flags=flags) == 0
    assert m.unmap(LENT, pa) == 0
    assert m.ram.read64(pa) == left
    assert m.unlock(LENT, flags=2) == E.ARG_INVAL
    assert m.unlock(LENT, flags=4) == E.ARG_INVAL


MODIFY_ERRORS: list[tuple[str, tuple[int, int, int], int]] = [
    ("right", (LENT, PAGE, 1), 0),
    ("flush alone", (0, 0, 4), 0),
    ("flush of a range", (LENT, PAGE, 4), E.ARG_INVAL),
    ("nothing to do", (LENT, PAGE, 0), E.ARG_INVAL),
    ("sanitise alone", (LENT, PAGE, 2), E.ARG_INVAL),
    ("sanitise and flush", (LENT, PAGE, 6), E.ARG_INVAL),
    ("reserved flag", (LENT, PAGE, 9), E.ARG_INVAL),
    ("misaligned", (LENT + 1, PAGE, 1), E.ARG_ALIGN),
    ("no size", (LENT, 0, 1), E.ARG_SIZE),
    ("beyond the address space", (FULL & -PAGE, PAGE, 1), E.ARG_SIZE),
    ("just beyond the address space", (1 << IA_BITS, PAGE, 1), E.ARG_SIZE),
    ("not mapped", (LENT + PAGE, PAGE, 1), E.ADDR_INVAL),
    ("partly not mapped", (LENT, 2 * PAGE, 1), E.ADDR_INVAL),
    ("not private", (DEVICE, PAGE, 1), E.DENIED),
]


@pytest.mark.parametrize(("what", "args", "error"), MODIFY_ERRORS, ids=[what for what, _, _ in MODIFY_ERRORS])
def test_modify_pages_errors(m: Machine, pa: int, what: str, args: tuple[int, int, int], error: int) -> None:
    m.lend(LENT, pa)
    m.share(DEVICE, pa + PAGE)
    found = m.guest_hvc(hc.ADDRSPACE_MODIFY_PAGES, 0, *args)
    assert found[0] == error
    assert found[1] == (args[1] if error else 0)
    assert m.vm.locked(LENT) == (what != "right")


def test_modify_pages_through_a_capability(m: Machine, pa: int) -> None:
    m.lend(LENT, pa)
    call = (hc.ADDRSPACE_MODIFY_PAGES,)
    weak = m.vm.cspace.grant(m.vm.space, SpaceRight.LOOKUP)
    assert m.guest_hvc(*call, weak, LENT, PAGE, 1)[0] == E.CSPACE_INSUFFICIENT_RIGHTS
    assert m.guest_hvc(*call, 0x99, LENT, PAGE, 1)[0] == E.CSPACE_CAP_NULL
    strong = m.vm.cspace.grant(m.vm.space, SpaceRight.MODIFY_PROTECTED)
    assert m.guest_hvc(*call, strong, LENT, PAGE, 1)[0] == 0
    assert not m.vm.locked(LENT)


def test_a_part_of_a_block_is_unlocked(m: Machine, pa: int) -> None:
    m.lend(LENT, pa, 2 * MIB)
    assert m.guest_walk(LENT + MIB) == pa + MIB
    assert m.unlock(LENT, MIB) == 0
    assert [m.vm.locked(LENT + at) for at in (0, MIB - PAGE, MIB, 2 * MIB - PAGE)] == [False, False, True, True]
    assert m.unmap(LENT, pa, 2 * MIB) == E.BUSY
    assert m.unmap(LENT, pa) == 0
    assert m.unlock(LENT + MIB, MIB) == 0
    assert m.unmap(LENT + PAGE, pa + PAGE, 2 * MIB - PAGE) == 0
    assert m.from_protected(pa, 2 * MIB) == 0
    m.check()


@pytest.mark.parametrize(("relock", "access", "locked"), [
    ("access", "r", True), ("access", "w", True), ("write", "r", False), ("write", "w", True),
    ("never", "r", False), ("never", "w", False)])
def test_what_locks_an_unlocked_page_again(relock: private.Relock, access: str, locked: bool) -> None:
    m = Machine(relock=relock)
    pa = m.ram.base
    m.lend(LENT, pa)
    assert m.guest_walk(LENT, access) == pa                     # in the TLB
    assert m.unlock(LENT) == 0
    if relock == "write":
        assert m.guest_walk(LENT) == pa                         # in the TLB, without the right to write
    stop = guest_access(m, LENT + 8, access)
    script = Script([stop] if stop else [])
    cap = m.vm.add_vcpu(script)
    assert m.hvc_all(hc.VCPU_RUN, cap)[:2] == [0, VcpuState.READY]
    assert m.vm.locked(LENT) == locked
    assert m.guest_walk(LENT + 8, access) == pa + 8
    assert m.unmap(LENT, pa) == (E.BUSY if locked else 0)
    m.check()


def test_mapping_an_unlocked_page_again_locks_it(m: Machine, pa: int) -> None:
    m.lend(LENT, pa, 2 * MIB)
    assert m.unlock(LENT, 2 * MIB) == 0
    assert m.map(LENT, pa, 2 * MIB) == 0
    assert m.vm.locked(LENT)
    assert m.unmap(LENT, pa, 2 * MIB) == E.BUSY
    m.check()


# -- memory runs out ---------------------------------------------------------------------------------------------------


def exhaust(m: Machine, call: Callable[[], int]) -> int:
    """Make each allocation of *call* fail in turn, until it succeeds: how many it needs."""
    for n in range(10000):
        before = m.snapshot()
        m.pool.fail_at(n)
        ret = call()
        m.pool.fail_at(None)
        if ret != E.NOMEM:
            assert ret == 0
            m.check()
            return n
        assert m.snapshot() == before
        m.check()
    raise AssertionError("it never succeeds")


def test_no_allocation_that_fails_loses_anything(m: Machine, pa: int) -> None:
    assert exhaust(m, lambda: m.to_protected(pa + 513 * PAGE)) == 2
    assert exhaust(m, lambda: m.to_protected(pa + GIB + PAGE, 2 * MIB)) == 3
    assert exhaust(m, lambda: m.map(LENT, pa + 513 * PAGE)) == 3
    assert exhaust(m, lambda: m.map(LENT + 2 * MIB, pa + GIB + PAGE, 2 * MIB)) == 1
    m.vm.kill()
    assert m.unmap(LENT, pa + 513 * PAGE) == 0
    assert exhaust(m, lambda: m.from_protected(pa + 513 * PAGE)) == 0


def test_unlocking_and_unmapping_parts_of_blocks_without_memory(m: Machine, pa: int) -> None:
    m.lend(LENT, pa, GIB)
    assert exhaust(m, lambda: m.unlock(LENT + PAGE)) == 2
    assert exhaust(m, lambda: m.unmap(LENT + PAGE, pa + PAGE)) == 0
    assert exhaust(m, lambda: m.from_protected(pa + PAGE)) == 2
    assert exhaust(m, lambda: m.unlock(LENT + GIB // 2, 2 * MIB)) == 0


def window(m: Machine, vbase: int) -> int:
    """An extent that is mapped as a whole at *vbase*, and has nothing yet: its capability."""
    cap = m.el2.cspace.grant(Extent("window", parent=m.el2.root_extent), ExtentRight.MAP | ExtentRight.DONATE)
    assert m.hvc(hc.ADDRSPACE_MAP, m.vm.caps.addrspace, cap, vbase, RWX, 0, 0, 0) == 0
    return cap


def tables_needed(m: Machine, call: Callable[[], int]) -> int:
    """As `exhaust`, of pages that belong to neither host nor guest."""
    for n in range(100):
        before = m.snapshot()
        m.pool.fail_at(n)
        ret = call()
        m.pool.fail_at(None)
        assert all(not space.table.pages.violations for space in m.spaces)
        check_places(m.vm.space)
        if ret != E.NOMEM:
            assert ret == 0
            return n
        assert m.snapshot() == before
    raise AssertionError("it never succeeds")


# In the guest each lies 1 TiB, and 2 MiB, above its own address: what is counted has to be counted there.
@pytest.mark.parametrize("away", [1 << 40, (1 << 40) + 2 * MIB])
def test_tables_are_counted_where_the_guest_has_the_pages(m: Machine, pa: int, away: int) -> None:
    caps, cap = m.vm.caps, window(m, away)
    assert m.donate(Donation.TO_SIBLING, caps.host_shared, cap, pa, 4 * MIB) == 0
    assert m.guest_walk(away + pa + PAGE) == pa + PAGE
    # A range that begins in one block of 2 MiB and ends in the next goes back: both are cut there, and the host needs two
    # tables of pages in its hole.
    middle = pa + PAGE, 2 * MIB
    back = tables_needed(m, lambda: m.donate(Donation.TO_SIBLING, cap, caps.host_shared, *middle))
    assert [m.guest_walk(away + pa + at) for at in (0, PAGE, 2 * MIB, 2 * MIB + PAGE)] == [
        pa, None, None, pa + 2 * MIB + PAGE]
    # And comes again, to where there are tables already.
    again = tables_needed(m, lambda: m.donate(Donation.TO_SIBLING, caps.host_shared, cap, *middle))
    assert m.guest_walk(away + pa + PAGE) == pa + PAGE
    assert (back, again) == (4, 0)


def test_pages_that_come_cut_the_blocks_that_are_in_their_place(m: Machine, pa: int) -> None:
    caps, away = m.vm.caps, 1 << 40
    assert m.donate(Donation.TO_SIBLING, caps.host_shared, caps.guest_shared, pa, 4 * MIB) == 0
    assert m.map(away + pa + 4 * MIB, pa, 4 * MIB, RWX, PARTIAL) == 0        # two blocks, where the window will have others
    cap = window(m, away)
    there = pa + 4 * MIB + PAGE
    # The host's block of 1 GiB is cut (1 and 2), and the guest's two of 2 MiB (2); what is to be mapped is counted as
    # long as there are no tables yet (2).
    assert tables_needed(m, lambda: m.donate(Donation.TO_SIBLING, caps.host_shared, cap, there, 2 * MIB)) == 7
    assert [m.guest_walk(away + there + at) for at in (-PAGE, 0, 2 * MIB - PAGE, 2 * MIB)] == [
        pa, there, there + 2 * MIB - PAGE, pa + 2 * MIB + PAGE]


def test_a_vm_that_has_no_table_does_not_exist(m: Machine) -> None:
    m.pool.fail_at(0)
    before = m.snapshot()
    with pytest.raises(HypRefused) as refused:
        m.el2.create_vm("second")
    assert refused.value.error == E.NOMEM
    assert m.snapshot() == before


def test_a_stock_gives_back_what_is_left(m: Machine) -> None:
    free = m.pool.free_pages
    with Stock(m.pool, 5) as stock:
        stock.take()
    assert m.pool.free_pages == free - 1
    with pytest.raises(HypRefused, match="NOMEM"):
        Stock(m.pool, free)
    assert m.pool.free_pages == free - 1


# -- configuration, lookup ---------------------------------------------------------------------------------------------


def configure(m: Machine, op: int, base: int, size: int) -> int:
    cap = m.el2.cspace.grant(m.vm.space, SpaceRight.CONFIGURE_RANGE)
    return m.hvc(hc.ADDRSPACE_CONFIGURE_RANGE, cap, base, size, op)


@pytest.mark.parametrize(("op", "base", "size", "error"), [
    (RangeOp.ADD_PRIVATE, 66 * GIB, GIB, 0),
    (RangeOp.ADD_PRIVATE, 2 * GIB, GIB, E.BUSY),
    (RangeOp.ADD_PRIVATE, 64 * GIB, 2 * GIB, E.ARG_INVAL),
    (RangeOp.ADD_VMMIO, 2 * GIB, GIB, E.ARG_INVAL),
    (RangeOp.REMOVE_PRIVATE, 2 * GIB, GIB, 0),
    (RangeOp.REMOVE_PRIVATE, 100 * GIB, GIB, E.IDLE),
    (RangeOp.REMOVE_PRIVATE, 64 * GIB, 2 * GIB, E.ARG_INVAL),
    (RangeOp.REMOVE_VMMIO, 2 * GIB, GIB, E.ARG_INVAL),
    (4, 65 * GIB, GIB, E.ARG_INVAL),
    (RangeOp.ADD_PRIVATE, 65 * GIB + 1, GIB, E.ARG_ALIGN),
    (RangeOp.ADD_PRIVATE, 65 * GIB, 0, E.ARG_SIZE),
    (RangeOp.ADD_PRIVATE, 1 << IA_BITS, GIB, E.ARG_SIZE),
])
def test_configure_range_errors(m: Machine, op: int, base: int, size: int, error: int) -> None:
    assert configure(m, op, base, size) == error
    # A range that lost its middle is two.
    assert len(m.vm.space.ranges) == 2 + (error == 0)


def test_neighbours_are_one_range(m: Machine) -> None:
    for at in (67, 65, 66):
        assert configure(m, RangeOp.ADD_PRIVATE, at * GIB, GIB) == 0
    assert sorted(m.vm.space.ranges) == [(0, GIB, "vmmio"), (GIB, 68 * GIB, "private")]
    assert configure(m, RangeOp.ADD_VMMIO, 68 * GIB, GIB) == 0
    assert m.vm.space.ranges.kind(67 * GIB, 69 * GIB) is None
    assert m.vm.space.ranges.kind(2 * GIB, 68 * GIB) == "private"
    assert len(m.vm.space.ranges) == 3


def test_no_more_than_128_ranges(m: Machine) -> None:
    for n in range(MAX_RANGES - 2):
        assert configure(m, RangeOp.ADD_PRIVATE, (100 + 2 * n) * GIB, GIB) == 0
    assert configure(m, RangeOp.ADD_PRIVATE, 98 * GIB, PAGE) == E.NORESOURCES
    assert configure(m, RangeOp.ADD_PRIVATE, 101 * GIB, PAGE) == 0         # beside one that is there
    assert configure(m, RangeOp.REMOVE_PRIVATE, 100 * GIB + PAGE, PAGE) == E.NORESOURCES
    assert configure(m, RangeOp.REMOVE_PRIVATE, 102 * GIB, PAGE) == 0     # an edge: as many as before
    assert configure(m, RangeOp.REMOVE_PRIVATE, 100 * GIB, GIB + PAGE) == 0
    assert configure(m, RangeOp.ADD_PRIVATE, 98 * GIB, PAGE) == 0


def test_configure_needs_its_right(m: Machine) -> None:
    assert m.hvc(hc.ADDRSPACE_CONFIGURE_RANGE, m.vm.caps.addrspace, 99 * GIB, PAGE, 2) == E.CSPACE_INSUFFICIENT_RIGHTS


def test_removing_the_range_takes_the_right_to_map(m: Machine, pa: int) -> None:
    m.lend(LENT, pa)
    assert configure(m, RangeOp.REMOVE_PRIVATE, LENT, GIB) == 0
    assert m.to_protected(pa + PAGE) == 0
    assert m.map(LENT + PAGE, pa + PAGE) == E.DENIED


def test_a_lookup_ends_where_the_memory_does_not_go_on(m: Machine, pa: int) -> None:
    for at, frame in enumerate((0, 2, 1)):
        m.lend(LENT + at * PAGE, pa + frame * PAGE)
    look = (hc.ADDRSPACE_LOOKUP, m.vm.caps.addrspace, m.vm.caps.guest_private)
    assert [m.hvc_all(*look, LENT + at * PAGE, 3 * PAGE)[1:3] for at in range(3)] == [
        [pa, PAGE], [pa + 2 * PAGE, PAGE], [pa + PAGE, PAGE]]


def test_lookup(m: Machine, pa: int) -> None:
    m.lend(LENT, pa, 3 * PAGE)
    caps = m.vm.caps
    look = (hc.ADDRSPACE_LOOKUP, caps.addrspace, caps.guest_private)
    assert m.hvc_all(*look, LENT + PAGE, 8 * PAGE)[:4] == [0, pa + PAGE, 2 * PAGE, RWX]
    assert m.hvc_all(*look, LENT, PAGE)[:3] == [0, pa, PAGE]
    assert m.hvc(*look, LENT + 3 * PAGE, PAGE) == E.ADDR_INVAL
    assert m.hvc(*look, 1 << IA_BITS, PAGE) == E.ADDR_INVAL
    assert m.hvc(*look, LENT + 1, PAGE) == E.ARG_ALIGN
    assert m.hvc(*look, LENT, 0) == E.ARG_SIZE
    assert m.hvc(hc.ADDRSPACE_LOOKUP, caps.addrspace, caps.guest_shared, LENT, PAGE) == E.MEMDB_NOT_OWNER
    weak = m.el2.cspace.grant(m.vm.space, SpaceRight.MAP)
    assert m.hvc(hc.ADDRSPACE_LOOKUP, weak, caps.guest_private, LENT, PAGE) == E.CSPACE_INSUFFICIENT_RIGHTS


# -- the structures below ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_a_range_map_is_an_array(seed: int) -> None:
    choose, size = random.Random(seed), 3000
    found, array = RangeMap(0), [0] * size
    offset = GIB - 700 * PAGE           # across 2M and 1G borders
    for _ in range(400):
        low = choose.randrange(size)
        high = min(size, low + choose.choice((1, 1, 5, 600)))
        value = choose.randrange(3)
        found.set(offset + low * PAGE, offset + high * PAGE, value)
        array[low:high] = [value] * (high - low)
        at = choose.randrange(size)
        assert found.get(offset + at * PAGE + 17) == array[at]
        low = choose.randrange(size - 1)
        high = choose.randrange(low + 1, size)
        runs = list(found.runs(offset + low * PAGE, offset + high * PAGE))
        assert [v for a, b, v in runs for _ in range((b - a) // PAGE)] == array[low:high]
        assert all(one[2] != two[2] for one, two in pairwise(runs))
        assert found.only(offset + low * PAGE, offset + high * PAGE, array[low]) == (len(runs) == 1)


def test_a_range_map_forgets_what_is_uniform_again() -> None:
    found = RangeMap(0)
    for page in range(512 * 4):
        found.set(page * PAGE, (page + 1) * PAGE, 1)
    assert list(found.runs(0, 16 * MIB)) == [(0, 8 * MIB, 1), (8 * MIB, 16 * MIB, 0)]
    found.set(0, 8 * MIB, 0)
    assert not found._root.other


def test_memdb_moves_all_or_nothing() -> None:
    one, two = Extent("one"), Extent("two")
    db = MemDb(Extent("nowhere"))
    db.insert(0, 4 * PAGE, one)
    with pytest.raises(HypRefused, match="MEMDB_NOT_OWNER"):
        db.change(3 * PAGE, 5 * PAGE, one, two)
    assert list(db.ranges(one)) == [(0, 4 * PAGE)]
    db.change(PAGE, 2 * PAGE, one, two)
    assert list(db.ranges(one)) == [(0, PAGE), (2 * PAGE, 4 * PAGE)]


def test_a_split_block_is_broken_before_it_is_made(m: Machine) -> None:
    """The order of stores and flushes, seen from outside."""
    table = m.el2.hlos.table
    seen: list[tuple[str, int]] = []
    write, sync = table.pages.write, table.sync
    table.pages.write = lambda a, level, v, ia=None: (seen.append(("write", v)), write(a, level, v, ia))[1]  # type: ignore
    table.sync = lambda start, end: (seen.append(("sync", end - start)), sync(start, end))[1]       # type: ignore
    with Stock(m.pool, 1) as stock:
        table.cut(m.ram.base, m.ram.base + 2 * MIB, stock)
    assert [(what, value & VALID if what == "write" else value) for what, value in seen] == [
        ("write", 0), ("sync", GIB), ("write", 1)]
    assert isinstance(table, GunyahStage2Table)


@pytest.mark.long
@pytest.mark.parametrize(("count", "size"), [(10_000, PAGE), (1024, GIB)])
def test_effort_per_folio_is_flat(count: int, size: int) -> None:
    ram = Ram((1 << 40) + 512 * MIB)
    pool = Buddy(ram, ram.end - 512 * MIB, 512 * MIB)
    el2 = Gunyah(ram, pool, [Tlb()], reserved=[(ram.end - 512 * MIB, 512 * MIB)])
    vm: GunyahHypVm = el2.create_vm("big")
    vm.space.configure(RangeOp.ADD_PRIVATE, GIB, 8 << 40)

    def lend(n: int) -> None:
        at = ram.base + n * size
        for args in ((hc.MEMEXTENT_DONATE, 3, vm.caps.host_private, vm.caps.guest_private, at, size),
                     (hc.ADDRSPACE_MAP, vm.caps.addrspace, vm.caps.guest_private, at, RWX, PRIVATE, at, size)):
            regs = [*args] + [0] * (18 - len(args))
            el2.hvc(regs)
            assert regs[0] == 0

    effort = [calls(lambda n=n: lend(n)) if n < 100 or n >= count - 100 else lend(n) for n in range(count)]     # type: ignore
    assert sum(effort[-100:]) < 1.5 * sum(effort[:100])

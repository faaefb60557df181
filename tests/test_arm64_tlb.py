"""TLBs: what is kept, what answers, and what each operation removes and leaves."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from effort import calls

from guest_memfd.errors import BadInput
from guest_memfd.machine.hw.arm64 import descriptor as d
from guest_memfd.machine.hw.arm64 import tlbi
from guest_memfd.machine.hw.arm64 import tlbi_instruction as ins
from guest_memfd.machine.hw.arm64.fault import Fault
from guest_memfd.machine.hw.arm64.mmu import Mmu
from guest_memfd.machine.hw.arm64.registers import Tcr, Vtcr
from guest_memfd.machine.hw.arm64.tables import PageTable
from guest_memfd.machine.hw.arm64.tlb import Tlb
from guest_memfd.machine.hw.arm64.walk import Stage1, Stage2, walk
from guest_memfd.machine.hw.buddy import Buddy
from guest_memfd.machine.hw.ram import Ram

KERNEL = d.AF | d.SH_INNER | d.UXN
ALL2 = d.AF | d.SH_INNER | d.NORMAL_WB << d.MEMATTR_SHIFT | d.S2_READ | d.S2_WRITE
HIGH = 0xffff_0000_0000_0000
RAM, MEM = 0x8000_0000, 0x8800_0000
BLOCK = HIGH | 0x4000_0000          # mapped by a block of 2 MiB
PAGES = HIGH | 0x8000_0000          # 32 global pages
USER = HIGH | 0xc000_0000           # 4 pages with nG
RUN = HIGH | 0x1_0000_0000          # a contiguous run of 16 pages


class World:
    """One regime of two stages on two CPUs."""

    def __init__(self, *, conflict_aborts: bool = False) -> None:
        self.ram = Ram(256 << 20)
        buddy = Buddy(self.ram, self.ram.base, 64 << 20)
        self.t1, self.t2 = PageTable(self.ram, buddy, 1, bbml3=True), PageTable(self.ram, buddy, 2, ia_bits=39)
        self.t2.map(RAM, 256 << 20, RAM, ALL2)
        self.t2.split(MEM, 3)
        self.t1.map(BLOCK, 2 << 20, MEM, KERNEL)
        self.t1.map(PAGES, 32 << 12, MEM, KERNEL)
        self.t1.map(USER, 4 << 12, MEM, KERNEL | d.NG)
        self.t1.map(RUN, 16 << 12, MEM, KERNEL, contiguous=True)
        self.tlbs = [Tlb(), Tlb()]
        self.mmus = [Mmu(self.ram, tlb, conflict_aborts=conflict_aborts) for tlb in self.tlbs]

    def s1(self, asid: int = 1) -> Stage1:
        return Stage1(Tcr(), self.t1.root | asid << 48, self.t1.root)

    def s2(self, vmid: int = 7) -> Stage2:
        return Stage2(Vtcr(t0sz=25), self.t2.root | vmid << 48)

    def touch(self, va: int, asid: int = 1, vmid: int = 7, access: str = "r", cpu: int | None = None) -> int:
        """The PA; on both CPUs unless one is named."""
        found = {self.mmus[n].translate(va, access, 1, self.s1(asid), self.s2(vmid)).pa  # type: ignore[arg-type]
                 for n in ((0, 1) if cpu is None else (cpu,))}
        assert len(found) == 1
        return found.pop()

    def gone(self, va: int, asid: int = 1, vmid: int = 7, cpu: int = 0) -> bool:
        try:
            self.touch(va, asid, vmid, cpu=cpu)
        except Fault:
            return True
        return False

    def clear1(self, va: int) -> None:
        """Take the leaf out of memory, and tell no TLB."""
        self.ram.write64(self.t1.lookup(va).address, 0)

    def clear2(self, ipa: int) -> None:
        self.ram.write64(self.t2.lookup(ipa).address, 0)


@pytest.fixture
def world() -> World:
    return World()


# -- what is kept -----------------------------------------------------------------------------------------------------


def test_a_stale_entry_wins_over_memory(world: World) -> None:
    assert world.touch(PAGES) == MEM
    world.clear1(PAGES)
    assert world.touch(PAGES | 8) == MEM | 8
    assert world.gone(PAGES + 4096) is False
    with pytest.raises(Fault):
        walk(world.ram, PAGES, "r", 1, world.s1(), world.s2())
    tlbi.vaale1is(world.tlbs, PAGES, 7)
    assert world.gone(PAGES)


def test_three_kinds_of_entry(world: World) -> None:
    world.touch(PAGES)
    kinds = sorted(entry.kind for entry in world.tlbs[0].entries() if entry.oa == MEM)
    assert kinds == ["combined", "stage1", "stage2"]
    assert len(list(world.tlbs[0].tables())) > 3
    shown = repr([entry for entry in world.tlbs[0].entries() if entry.kind == "combined"])
    assert f"<combined VMID=7 global {PAGES & tlb_mask():#x} -> {MEM:#x} -> {MEM:#x} +0x1000>" in shown


def tlb_mask() -> int:
    return (1 << 56) - 1


def test_the_holes_of_both_stages_are_never_kept(world: World) -> None:
    """Translation, access flag and address size faults leave nothing: making the entry valid needs no maintenance."""
    ipa_entry = world.t2.lookup(MEM)
    va_entry = world.t1.lookup(PAGES)
    for address, value in ((va_entry.address, va_entry.value), (ipa_entry.address, ipa_entry.value)):
        for bad in (0, value & ~d.AF, value | 1 << 47):
            world.ram.write64(address, bad)
            limited = Stage2(Vtcr(t0sz=25, ps=3), world.t2.root | 7 << 48)
            s1 = Stage1(Tcr(ips=3), world.t1.root | 1 << 48, world.t1.root)
            with pytest.raises(Fault):
                world.mmus[0].translate(PAGES, "r", 1, s1, limited)
            world.ram.write64(address, value)
            assert world.mmus[0].translate(PAGES, "r", 1, s1, limited).pa == MEM
            world.tlbs[0].clear()


def test_an_entry_that_fails_permission_is_kept(world: World) -> None:
    entry = world.t1.lookup(PAGES)
    world.ram.write64(entry.address, entry.value | d.AP_RO)
    for _ in range(2):
        with pytest.raises(Fault) as caught:
            world.touch(PAGES, access="w", cpu=0)
        assert (caught.value.kind, caught.value.level, caught.value.stage) == ("permission", 3, 1)
        world.ram.write64(entry.address, entry.value)      # more permissive in memory only
    tlbi.vaae1is(world.tlbs, PAGES, 7)
    assert world.touch(PAGES, access="w") == MEM


def test_stage2_permission_from_a_kept_entry(world: World) -> None:
    world.touch(PAGES)
    entry = world.t2.lookup(MEM)
    world.ram.write64(entry.address, entry.value & ~d.S2_WRITE)
    assert world.touch(PAGES, access="w") == MEM
    tlbi.vmalls12e1is(world.tlbs, 7)
    for _ in range(2):
        with pytest.raises(Fault) as caught:
            world.touch(PAGES | 0x18, access="w", cpu=0)
        assert (caught.value.kind, caught.value.stage, caught.value.ipa) == ("permission", 2, MEM | 0x18)
    assert world.touch(PAGES) == MEM


def test_prefetch_fills_and_never_faults(world: World) -> None:
    world.mmus[0].prefetch(PAGES, world.s1(), world.s2())
    world.mmus[0].prefetch(HIGH | 0x7000_0000_0000, world.s1(), world.s2())
    world.mmus[0].prefetch(1 << 54, world.s1(), world.s2())
    assert world.tlbs[0].holds_stage1(PAGES, 1, 7)
    world.clear1(PAGES)
    world.clear2(MEM)
    assert not world.gone(PAGES)
    assert world.gone(PAGES, cpu=1)
    assert (world.mmus[0].hits, world.mmus[0].walks) == (1, 0)


def test_queries(world: World) -> None:
    world.touch(USER, asid=1, cpu=0)
    world.touch(PAGES + 4096, cpu=0)
    tlb = world.tlbs[0]
    assert tlb.holds_stage1(USER, 1, 7)
    assert tlb.holds_stage1(USER, None, 7)
    assert not tlb.holds_stage1(USER, 2, 7)
    assert not tlb.holds_stage1(USER, 1, 8)
    assert tlb.holds_stage1(PAGES + 4096, 2, 7)             # global
    assert not tlb.holds_stage1(PAGES, 1, 7)
    assert tlb.holds_stage2(MEM + 4096, 7)
    assert not tlb.holds_stage2(MEM + 4096, 8)
    assert not tlb.holds_stage2(MEM + 8192, 7)
    assert {entry.kind for entry in tlb.reaching(MEM + 4096)} == {"combined", "stage2"}
    assert not tlb.reaching(MEM + 8192)
    assert not world.tlbs[1].holds_stage2(MEM + 4096, 7)
    tlbi.ipas2e1(tlb, MEM + 4096, 7)
    assert tlb.holds_stage2(MEM + 4096, 7)                  # the combined one


def test_a_stage1_entry_of_a_large_page_reaches_what_was_never_touched(world: World) -> None:
    world.touch(BLOCK, cpu=0)
    world.clear1(BLOCK)
    assert world.touch(BLOCK + 0x5000, cpu=0) == MEM + 0x5000


# -- each operation: removes what it must, leaves what it may ---------------------------------------------------------

# name: (call, whether it makes a hole of stage 1 in: a global page, a page of ASID 1, of ASID 2, and a neighbour page known)
Call = Callable[[World], None]
OPERATIONS: dict[str, tuple[Call, str]] = {
    "VAE1IS of the global page": (lambda w: tlbi.vae1is(w.tlbs, PAGES, 1, 7), "global"),
    "VALE1IS of the global page": (lambda w: tlbi.vale1is(w.tlbs, PAGES, 9, 7), "global"),
    "VAAE1IS of the global page": (lambda w: tlbi.vaae1is(w.tlbs, PAGES, 7), "global"),
    "VAALE1IS of the global page": (lambda w: tlbi.vaale1is(w.tlbs, PAGES, 7), "global"),
    "VAE1IS of ASID 1": (lambda w: tlbi.vae1is(w.tlbs, USER, 1, 7), "asid1"),
    "VALE1IS of ASID 2": (lambda w: tlbi.vale1is(w.tlbs, USER, 2, 7), "asid2"),
    "VAAE1IS of a user page": (lambda w: tlbi.vaae1is(w.tlbs, USER, 7), "asid1 asid2"),
    "VAALE1IS of a user page": (lambda w: tlbi.vaale1is(w.tlbs, USER, 7), "asid1 asid2"),
    "ASIDE1IS": (lambda w: tlbi.aside1is(w.tlbs, 1, 7), "asid1"),
    "VMALLE1IS": (lambda w: tlbi.vmalle1is(w.tlbs, 7), "global asid1 asid2 neighbour block"),
    "VMALLS12E1IS": (lambda w: tlbi.vmalls12e1is(w.tlbs, 7), "global asid1 asid2 neighbour block"),
    "ALLE1IS": (lambda w: tlbi.alle1is(w.tlbs), "global asid1 asid2 neighbour block vmid8"),
    "IPAS2E1IS": (lambda w: tlbi.ipas2e1is(w.tlbs, MEM, 7), ""),
    "IPAS2LE1IS": (lambda w: tlbi.ipas2le1is(w.tlbs, MEM, 7), ""),
    "RIPAS2E1IS": (lambda w: tlbi.ripas2e1is(w.tlbs, MEM, 2 << 20, 7), ""),
    "RVAE1IS of two": (lambda w: tlbi.rvae1is(w.tlbs, PAGES, 8192, 5, 7), "global neighbour"),
    "RVALE1IS of ASID 1": (lambda w: tlbi.rvale1is(w.tlbs, USER, 8192, 1, 7), "asid1"),
    "RVAAE1IS of users": (lambda w: tlbi.rvaae1is(w.tlbs, USER, 8192, 7), "asid1 asid2"),
    "RVAALE1IS of all": (lambda w: tlbi.rvaale1is(w.tlbs, BLOCK, 4 << 30, 7), "global asid1 asid2 neighbour block"),
    "VAALE1IS inside the block": (lambda w: tlbi.vaale1is(w.tlbs, BLOCK + 0x123000, 7), "block"),
    "VAALE1IS with the right level": (lambda w: tlbi.vaale1is(w.tlbs, BLOCK, 7, level=2), "block"),
    "VAALE1IS with a wrong level": (lambda w: tlbi.vaale1is(w.tlbs, BLOCK + 0x1000, 7, level=3), ""),
    "another VMID": (lambda w: tlbi.vmalle1is(w.tlbs, 8), "vmid8"),
    "nothing": (lambda w: None, ""),
}
PLACES = {"global": (PAGES, 1, 7), "asid1": (USER, 1, 7), "asid2": (USER, 2, 7), "neighbour": (PAGES + 4096, 1, 7),
          "block": (BLOCK + 0x1000, 1, 7), "vmid8": (PAGES, 1, 8)}


@pytest.mark.parametrize("name", OPERATIONS)
def test_what_goes_and_what_stays(world: World, name: str) -> None:
    call, goes = OPERATIONS[name]
    for va, asid, vmid in PLACES.values():
        world.touch(va, asid, vmid)
    world.touch(BLOCK, 1, 7)
    for va in (PAGES, USER, PAGES + 4096, BLOCK):
        world.clear1(va)
    call(world)
    for cpu in (0, 1):
        gone = {place for place, (va, asid, vmid) in PLACES.items() if world.gone(va, asid, vmid, cpu)}
        assert gone == set(goes.split()), name


def test_the_ones_that_are_not_broadcast(world: World) -> None:
    calls: list[Callable[[Tlb], None]] = [
        lambda t: tlbi.vae1(t, PAGES, 1, 7), lambda t: tlbi.vale1(t, PAGES, 1, 7), lambda t: tlbi.vaae1(t, PAGES, 7),
        lambda t: tlbi.vaale1(t, PAGES, 7), lambda t: tlbi.vmalle1(t, 7), lambda t: tlbi.vmalls12e1(t, 7), tlbi.alle1]
    for call in calls:
        world = World()
        world.touch(PAGES)
        world.clear1(PAGES)
        call(world.tlbs[0])
        assert world.gone(PAGES, cpu=0)
        assert not world.gone(PAGES, cpu=1)
    world.touch(USER)
    world.clear1(USER)
    tlbi.aside1(world.tlbs[1], 1, 7)
    assert (world.gone(USER, cpu=0), world.gone(USER, cpu=1)) == (False, True)


def test_stage2_needs_both_operations(world: World) -> None:
    """IPAS2E1IS leaves the combined entry, VMALLE1IS the stage-2-only one; KVM does both."""
    for first, second in ((tlbi.ipas2e1is, None), (None, tlbi.vmalle1is), (tlbi.ipas2e1is, tlbi.vmalle1is),
                          (tlbi.ipas2le1is, tlbi.vmalle1is)):
        world = World()
        world.touch(PAGES)
        world.clear2(MEM)
        if first:
            first(world.tlbs, MEM, 7)
        if second:
            second(world.tlbs, 7)
        assert world.gone(PAGES) == bool(first and second)


def test_a_piece_of_a_block_goes_with_any_address_of_it(world: World) -> None:
    """Stage 2 has pages below the block of stage 1, so the combined entries are pages; one operation drops them all."""
    for page in range(8):
        world.touch(BLOCK + page * 4096)
    assert sum(e.kind == "combined" for e in world.tlbs[0].entries()) == 8
    world.clear1(BLOCK)
    tlbi.vaale1is(world.tlbs, BLOCK + (1 << 20), 7)
    assert all(world.gone(BLOCK + page * 4096) for page in range(8))


def test_a_run_is_kept_whole_and_singly(world: World) -> None:
    for tlb_touched in (RUN, RUN + 4096):
        world.touch(tlb_touched)
    sizes = sorted(e.size for e in world.tlbs[0].entries() if e.kind == "stage1")
    assert sizes == [4096, 16 << 12]                            # the second page came from the run
    for page in range(16):
        world.clear1(RUN + page * 4096)
    assert world.touch(RUN + 0x9000, cpu=0) == MEM + 0x9000     # from the entry of the run; it becomes a combined one
    tlbi.vaale1is(world.tlbs, RUN, 7)
    assert world.gone(RUN)
    assert not world.gone(RUN + 4096)                           # kept singly as well
    assert world.gone(RUN + 2 * 4096)                           # known through the run only
    tlbi.rvaale1is(world.tlbs, RUN, 16 << 12, 7)
    assert world.gone(RUN + 4096)


def test_a_run_of_stage2(world: World) -> None:
    world.t2.map(0x8a00_0000, 2 << 20, 0x8a00_0000, ALL2)
    world.t2.split(0x8a00_0000, 3, contiguous=True)
    world.t1.map(HIGH, 32 << 12, 0x8a00_0000, KERNEL)
    world.touch(HIGH)
    assert sorted(e.size for e in world.tlbs[0].entries() if e.kind == "stage2" and e.oa == 0x8a00_0000) == [4096, 16 << 12]
    for page in range(32):
        world.clear2(0x8a00_0000 + page * 4096)
    assert not world.gone(HIGH + 15 * 4096)
    assert world.gone(HIGH + 16 * 4096)
    tlbi.ipas2e1is(world.tlbs, 0x8a00_5000, 7)
    tlbi.vmalle1is(world.tlbs, 7)
    assert not world.gone(HIGH)                                 # kept singly as well
    assert world.gone(HIGH + 4096)


def test_pan_is_looked_at_when_an_entry_is_used(world: World) -> None:
    entry = world.t1.lookup(USER)
    world.ram.write64(entry.address, entry.value | d.AP_EL0)
    world.touch(USER, cpu=0)
    pan = Stage1(Tcr(), world.t1.root | 1 << 48, world.t1.root, pan=True)
    with pytest.raises(Fault) as caught:
        world.mmus[0].translate(USER, "r", 1, pan, world.s2())
    assert (caught.value.kind, caught.value.stage) == ("permission", 1)
    assert world.mmus[0].translate(USER, "r", 0, pan, world.s2()).pa == MEM
    assert world.mmus[0].translate(PAGES, "r", 1, pan, world.s2()).writable


def test_at_asks_stage1_alone_and_leaves_nothing_that_goes_around_stage2(world: World) -> None:
    mmu, s1, s2 = world.mmus[0], world.s1(), world.s2()
    world.clear2(MEM)
    assert mmu.at_s1(PAGES | 8, "r", 1, s1, s2).pa == MEM | 8
    assert world.gone(PAGES)                                    # a hole of stage 2 still is one
    with pytest.raises(Fault) as caught:
        mmu.at_s1(HIGH, "r", 1, s1, s2)
    assert (caught.value.kind, caught.value.stage) == ("translation", 1)
    entry = world.t1.lookup(USER)
    world.ram.write64(entry.address, entry.value | d.AP_RO | d.AP_EL0)
    pan = Stage1(Tcr(), world.t1.root | 1 << 48, world.t1.root, pan=True)
    assert mmu.at_s1(USER, "r", 1, pan, s2).pa == MEM
    with pytest.raises(Fault):
        mmu.at_s1(USER, "w", 1, pan, s2)
    off = Stage1(Tcr(), 0, 0, enabled=False)
    assert mmu.at_s1(0x1234, "w", 0, off, s2).pa == 0x1234
    world.clear2(world.t1.lookup(PAGES).address)
    with pytest.raises(Fault) as caught:
        world.mmus[1].at_s1(PAGES, "r", 1, s1, s2)
    assert caught.value.s1ptw


def test_epd_and_a_wrong_base_do_not_matter_to_what_is_kept(world: World) -> None:
    world.touch(PAGES, cpu=0)
    root = world.t1.root
    for s1 in (Stage1(Tcr(epd1=1), root | 1 << 48, root), Stage1(Tcr(ips=0), root | 1 << 48, root | 1 << 40)):
        assert world.mmus[0].translate(PAGES, "r", 1, s1, world.s2()).pa == MEM
        with pytest.raises(Fault) as caught:
            world.mmus[0].translate(PAGES + 4096, "r", 1, s1, world.s2())
        assert caught.value.level == 0
        with pytest.raises(Fault):
            world.mmus[1].translate(PAGES, "r", 1, s1, world.s2())


def test_last_level_operations_leave_table_descriptors(world: World) -> None:
    """The table below an entry that became a block: without the form that is not last-level, walks still go through it."""
    entry = world.t1.path(PAGES)[2]
    world.touch(PAGES)
    table = d.table_address(entry.value)
    world.t1.write(entry.address, 2, d.leaf(MEM + (2 << 20), KERNEL, 2))
    tlbi.vaale1is(world.tlbs, PAGES, 7)
    assert any(passed.table == table for _, _, passed in world.tlbs[0].tables())
    assert world.touch(PAGES) == MEM                            # the freed table decides
    tlbi.vaae1is(world.tlbs, PAGES, 7)
    assert not any(passed.table == table for _, _, passed in world.tlbs[0].tables())
    assert world.touch(PAGES) == MEM + (2 << 20)


def test_what_drops_all_of_stage1_drops_its_table_descriptors(world: World) -> None:
    calls: tuple[Call, ...] = (lambda w: tlbi.vmalle1is(w.tlbs, 7), lambda w: tlbi.aside1is(w.tlbs, 1, 7))
    for call in calls:
        world.touch(PAGES)
        call(world)
        assert [asid for _, asid, _ in world.tlbs[0].tables() if asid is not None] == []
        assert [asid for _, asid, _ in world.tlbs[0].tables() if asid is None]


def test_table_descriptors_of_stage2(world: World) -> None:
    entry = world.t2.path(MEM)[1]
    world.touch(PAGES)
    world.ram.write64(entry.address, 0)
    tlbi.ipas2le1is(world.tlbs, MEM, 7)
    tlbi.vmalle1is(world.tlbs, 7)
    assert world.touch(PAGES + 0x2000) == MEM + 0x2000
    tlbi.ipas2e1is(world.tlbs, MEM, 7)
    tlbi.ipas2e1is(world.tlbs, MEM + 0x2000, 7)
    tlbi.vmalle1is(world.tlbs, 7)
    assert world.gone(PAGES + 0x2000)


def test_table_descriptors_belong_to_an_asid_even_for_global_pages(world: World) -> None:
    world.touch(PAGES, asid=1)
    world.ram.write64(world.t1.path(PAGES)[2].address, 0)
    tlbi.vae1is(world.tlbs, PAGES, 2, 7)                        # another ASID: the leaf is global and goes, the tables stay
    assert world.touch(PAGES + 4096, asid=1) == MEM + 4096
    assert world.gone(PAGES + 4096 * 2, asid=2)
    assert not world.gone(PAGES + 4096, asid=2)                 # global


# -- conflicts --------------------------------------------------------------------------------------------------------


def _collapse_live(world: World) -> None:
    """A page is known, then its table becomes a block elsewhere, and another address of the block is used."""
    world.t2.map(0x8900_0000, 2 << 20, 0x8900_0000, ALL2)
    world.touch(PAGES, cpu=0)
    entry = world.t1.path(PAGES)[2]
    world.t1.write(entry.address, 2, d.leaf(MEM + 0x1000_000, KERNEL, 2))
    world.tlbs[0].drop_va(7, None, PAGES + 0x10000, 4096, None, last_only=False)
    world.touch(PAGES + 0x10000, cpu=0)


def test_without_conflict_aborts_one_of_the_entries_is_used(world: World) -> None:
    _collapse_live(world)
    assert world.touch(PAGES | 8, cpu=0) == MEM | 8             # the older


def test_conflict_abort() -> None:
    world = World(conflict_aborts=True)
    _collapse_live(world)
    with pytest.raises(Fault) as caught:
        world.touch(PAGES, cpu=0)
    assert (caught.value.kind, caught.value.fsc, caught.value.level) == ("tlb conflict", 0x30, None)
    tlbi.vaae1is(world.tlbs, PAGES, 7)
    assert world.touch(PAGES, cpu=0) == MEM + 0x1000_000


def test_overlapping_entries_that_agree_are_no_conflict() -> None:
    world = World(conflict_aborts=True)
    for page in range(16):
        assert world.touch(RUN + page * 4096) == MEM + page * 4096
        assert world.touch(RUN + page * 4096 + 8) == MEM + page * 4096 + 8


# -- operands ---------------------------------------------------------------------------------------------------------


def test_operands_by_address() -> None:
    value = 0x1234 << 48 | (PAGES >> 12 & (1 << 44) - 1)
    assert ins.va_operand(value) == (PAGES, 4096, None, 0x1234)
    assert ins.va_operand(value | (1 << 2 | 3) << 44).level == 3
    assert ins.va_operand(value | 2 << 44).level is None       # no granule, no hint
    assert ins.va_operand(0x1_2345).start == 0x1_2345_000
    assert ins.ipa_operand(1 << 63 | 6 << 44 | 0x8_8000) == (0x8800_0000, 4096, 2, 0)


@pytest.mark.parametrize(("tg", "shift"), [(1, 12), (2, 14), (3, 16)])
@pytest.mark.parametrize(("scale", "num", "pages"), [(0, 0, 2), (0, 31, 64), (1, 0, 64), (2, 4, 5 << 11), (3, 31, 32 << 16)])
def test_range_operands(tg: int, shift: int, scale: int, num: int, pages: int) -> None:
    value = 0x55 << 48 | tg << 46 | scale << 44 | num << 39 | 3 << 37 | 0x12345
    assert ins.range_operand(value) == (0x12345 << shift, pages << shift, 3, 0x55)
    top = ins.range_operand(value | 1 << 36)
    assert top is not None
    assert top.start == (1 << 64) - (1 << 36 + shift) + (0x12345 << shift)
    assert ins.range_operand(value & ~(3 << 46)) is None


def test_a_range_of_ipas_has_no_sign() -> None:
    found = ins.range_operand(1 << 46 | 1 << 36, signed=False)
    assert found is not None
    assert found.start == 1 << 48


# name: (register, what goes, as in OPERATIONS)
_U, _P, _B = (at >> 12 & (1 << 44) - 1 for at in (USER, PAGES, BLOCK))
INSTRUCTIONS = {
    "VAE1IS": (1 << 48 | _U, "asid1"), "VALE1IS": (2 << 48 | _U, "asid2"), "VAAE1IS": (_U, "asid1 asid2"),
    "VAALE1IS": (_P, "global"), "ASIDE1IS": (2 << 48, "asid2"), "VMALLE1IS": (0, "global asid1 asid2 neighbour block"),
    "VMALLS12E1IS": (0, "global asid1 asid2 neighbour block"), "ALLE1IS": (0, "global asid1 asid2 neighbour block vmid8"),
    "IPAS2E1IS": (MEM >> 12, ""), "IPAS2LE1IS": (MEM >> 12, ""),
    "RVAE1IS": (1 << 48 | 1 << 46 | _P & (1 << 37) - 1, "global neighbour"),
    "RVALE1IS": (1 << 48 | 1 << 46 | _U & (1 << 37) - 1, "asid1"),
    "RVAAE1IS": (1 << 46 | _U & (1 << 37) - 1, "asid1 asid2"),
    "RVAALE1IS": (1 << 46 | 2 << 44 | 31 << 39 | _B & (1 << 37) - 1, "block"),
    "RIPAS2E1IS": (1 << 46 | MEM >> 12, ""), "RIPAS2LE1IS": (MEM >> 12, ""),
}


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_instructions(world: World, name: str) -> None:
    value, goes = INSTRUCTIONS[name]
    for va, asid, vmid in PLACES.values():
        world.touch(va, asid, vmid)
    for va in (PAGES, USER, PAGES + 4096, BLOCK):
        world.clear1(va)
    ins.execute(name, value, world.tlbs[0], world.tlbs, 7)
    for cpu in (0, 1):
        assert {place for place, (va, asid, vmid) in PLACES.items() if world.gone(va, asid, vmid, cpu)} == set(goes.split())


def test_instructions_of_stage2_and_of_one_cpu(world: World) -> None:
    for name, value in (("IPAS2E1IS", MEM >> 12), ("IPAS2LE1IS", MEM >> 12), ("RIPAS2E1IS", 1 << 46 | MEM >> 12),
                        ("RIPAS2LE1IS", 1 << 46 | MEM >> 12)):
        world = World()
        world.touch(PAGES)
        assert any(entry.kind == "stage2" and entry.ia == MEM for entry in world.tlbs[1].entries())
        ins.execute(name, value, world.tlbs[0], world.tlbs, 7)
        assert not any(entry.kind == "stage2" and entry.ia == MEM for tlb in world.tlbs for entry in tlb.entries())
    world.clear1(PAGES)
    ins.execute("VAALE1", _P, world.tlbs[1], world.tlbs, 7)
    assert (world.gone(PAGES, cpu=0), world.gone(PAGES, cpu=1)) == (False, True)
    with pytest.raises(BadInput, match="TLBI VAE2IS"):
        ins.execute("VAE2IS", 0, world.tlbs[0], world.tlbs, 7)


def test_a_range_that_no_operation_has() -> None:
    for size in (0, -4096, HIGH):
        with pytest.raises(BadInput, match="no range operation"):
            tlbi.rvaale1is([], PAGES, size, 7)


BY_RANGE: list[tuple[Callable[..., None], int, bool]] = [
    *((call, PAGES, False) for call in (
        lambda w, at, size: tlbi.rvae1is(w.tlbs, at, size, 1, 7), lambda w, at, size: tlbi.rvale1is(w.tlbs, at, size, 1, 7),
        lambda w, at, size: tlbi.rvaae1is(w.tlbs, at, size, 7), lambda w, at, size: tlbi.rvaale1is(w.tlbs, at, size, 7))),
    *((call, MEM, True) for call in (
        lambda w, at, size: tlbi.ripas2e1is(w.tlbs, at, size, 7), lambda w, at, size: tlbi.ripas2le1is(w.tlbs, at, size, 7),
        *(lambda w, at, size, name=name: ins.execute(
            name, 1 << 46 | (size // 8192 - 1) << 39 | at >> 12, w.tlbs[0], w.tlbs, 7)
          for name in ("RIPAS2E1IS", "RIPAS2LE1IS")))),
]


@pytest.mark.parametrize(("call", "base", "stage2"), BY_RANGE)
def test_a_range_ends_where_it_ends(call: Callable[..., None], base: int, stage2: bool) -> None:
    world = World()
    pages = [base + n * 4096 for n in range(6)]
    for n in range(6):
        world.touch(PAGES + n * 4096)
    call(world, pages[2], 8192)
    for tlb in world.tlbs:
        held = {entry.ia for entry in tlb.entries() if (entry.kind == "stage2") == stage2}
        assert [at & tlb_mask() in held for at in pages] == [True, True, False, False, True, True]


def test_a_run_below_a_larger_leaf_is_kept_whole_and_singly_when_it_is_combined(world: World) -> None:
    off = Mmu(world.ram, Tlb())
    off.translate(RUN, "r", 1, world.s1(), None)
    assert sorted(e.size for e in off.tlb.entries() if e.kind == "combined") == [4096, 16 << 12]


# -- at random: the TLB never answers what was neither in memory nor removed in vain ----------------------------------


def test_random_changes_with_full_maintenance_are_never_stale() -> None:
    rnd = random.Random(5)
    world = World(conflict_aborts=True)
    for _ in range(600):
        page = rnd.randrange(32)
        va = PAGES + page * 4096
        if rnd.random() < .3:
            world.t1.unmap(va, 4096)
            (tlbi.vaale1is if rnd.random() < .5 else tlbi.vaae1is)(world.tlbs, va, 7)
            if rnd.random() < .8:
                world.t1.map(va, 4096, MEM + rnd.randrange(512) * 4096, KERNEL)
        for cpu in (0, 1):
            try:
                expected: int | None = walk(world.ram, va, "r", 1, world.s1(), world.s2()).pa
            except Fault:
                expected = None
            assert world.gone(va, cpu=cpu) == (expected is None)
            if expected is not None:
                assert world.touch(va, cpu=cpu) == expected


@pytest.mark.long
def test_effort() -> None:
    """Ceilings far above what it takes, so that only a change of the order of growth breaks them."""
    world, rnd = World(), random.Random(9)
    world.t1.map(HIGH | 1 << 40, 128 << 20, RAM, KERNEL, 3)
    vas = [HIGH | 1 << 40 | rnd.randrange(128 << 20) & ~7 for _ in range(5000)]
    s1, s2, mmu = world.s1(), world.s2(), world.mmus[0]

    def effort(what: Callable[[int], object]) -> float:
        return calls(lambda: [what(va) for va in vas]) / len(vas)

    walks = effort(lambda va: walk(world.ram, va, "r", 1, s1, s2))
    misses = effort(lambda va: (mmu.tlb.clear(), mmu.translate(va, "r", 1, s1, s2)))
    effort(lambda va: mmu.translate(va, "r", 1, s1, s2))
    hits = effort(lambda va: mmu.translate(va, "r", 1, s1, s2))
    print(f"calls: walk {walks:.0f}, miss of an empty TLB {misses:.0f}, hit {hits:.0f}")
    assert walks < 200
    assert misses < 500
    assert hits < 40

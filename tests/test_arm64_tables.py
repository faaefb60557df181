"""Building, splitting and freeing tables: what the walker finds, what is allocated, and break-before-make."""

from __future__ import annotations

import random

import pytest

from guest_memfd.errors import BadInput
from guest_memfd.machine.hw.arm64 import bbm, tlbi
from guest_memfd.machine.hw.arm64 import descriptor as d
from guest_memfd.machine.hw.arm64.fault import Fault
from guest_memfd.machine.hw.arm64.granule import K4, K16, K64, Granule
from guest_memfd.machine.hw.arm64.mmu import Mmu
from guest_memfd.machine.hw.arm64.registers import Tcr, Vtcr
from guest_memfd.machine.hw.arm64.tables import PageTable
from guest_memfd.machine.hw.arm64.tlb import Tlb
from guest_memfd.machine.hw.arm64.walk import Stage1, Stage2, walk
from guest_memfd.machine.hw.buddy import Buddy, OutOfMemory
from guest_memfd.machine.hw.ram import Ram

BITS = d.AF | d.SH_INNER | d.PXN | d.UXN
S2BITS = d.AF | d.SH_INNER | d.NORMAL_WB << d.MEMATTR_SHIFT | d.S2_READ | d.S2_WRITE
MIB, GIB, TIB = 1 << 20, 1 << 30, 1 << 40
PAGE = 4096


class Box:
    def __init__(self, granule: Granule = K4, size: int = 64 * MIB, **more: object) -> None:
        self.ram = Ram(size)
        self.buddy = Buddy(self.ram, self.ram.base, size)
        self.all = self.buddy.free_pages
        self.table = PageTable(self.ram, self.buddy, 1, granule, **more)  # type: ignore[arg-type]

    def pa(self, va: int) -> int | None:
        g = self.table.granule
        try:
            return walk(self.ram, va, "r", 1, Stage1(Tcr(tg0=g, tg1=g), self.table.root, self.table.root)).pa
        except Fault:
            return None

    def words(self) -> dict[int, int]:
        """All table memory."""
        return {at: value for table in (self.table.root, *self.table.tables)
                for at in range(table, table + self.table.granule.size, 8) if (value := self.ram.read64(at))}


@pytest.fixture
def box() -> Box:
    return Box()


# -- map --------------------------------------------------------------------------------------------------------------


def test_the_largest_blocks_that_fit(box: Box) -> None:
    start = GIB - 2 * 2 * MIB - 3 * PAGE
    size = 3 * PAGE + 2 * 2 * MIB + 2 * GIB + 2 * MIB + PAGE
    box.table.map(start, size, 8 * GIB + start, BITS)
    assert [entry.level for _, _, entry in box.table.leaves(start, size)] == [3, 3, 3, 2, 2, 1, 1, 2, 3]
    for va in (start, start + size - 8, GIB, GIB - 8, 3 * GIB):
        assert box.pa(va) == 8 * GIB + va
    assert box.pa(start - 8) is None
    assert box.pa(start + size) is None


@pytest.mark.parametrize(("largest", "level"), [(0, 1), (1, 1), (2, 2), (3, 3)])
def test_largest_bounds_the_blocks(box: Box, largest: int, level: int) -> None:
    box.table.map(GIB, GIB, GIB, BITS, largest)
    assert box.table.lookup(GIB).level == level
    assert box.pa(2 * GIB - 8) == 2 * GIB - 8
    assert len(box.table.tables) == {1: 1, 2: 2, 3: 514}[level]


def test_an_output_that_is_not_aligned_gets_pages(box: Box) -> None:
    box.table.map(2 * MIB, 4 * MIB, 8 * MIB + PAGE, BITS)
    assert {entry.level for _, _, entry in box.table.leaves(2 * MIB, 4 * MIB)} == {3}
    assert box.pa(3 * MIB) == 9 * MIB + PAGE


def test_attributes_and_either_half(box: Box) -> None:
    high = 0xffff_0000_0000_0000
    box.table.map(high | MIB, PAGE, 5 * MIB, BITS | d.DBM | d.NG | 1 << d.ATTR_INDEX_SHIFT)
    assert box.table.lookup(MIB).value == d.leaf(5 * MIB, BITS | d.DBM | d.NG | 4, 3)
    assert box.pa(high | MIB) == 5 * MIB == box.pa(MIB)


@pytest.mark.parametrize("granule", [K4, K16, K64])
def test_other_granules(granule: Granule) -> None:
    box = Box(granule)
    size = 3 << granule.level_shift(2)
    start = (1 << granule.level_shift(2)) - granule.size
    box.table.map(start, size, start + (1 << granule.level_shift(2)), BITS)
    rnd = random.Random(1)
    for va in [start, start + size - 8, *(start + rnd.randrange(size) & ~7 for _ in range(50))]:
        assert box.pa(va) == va + (1 << granule.level_shift(2))
    assert {entry.level for _, _, entry in box.table.leaves(start, size)} == {2, 3}
    assert all(table % granule.size == 0 for table in box.table.tables)
    box.table.free()
    assert box.buddy.free_pages == box.all


def test_a_tebibyte_of_blocks_is_two_tables() -> None:
    ram = Ram(TIB)
    buddy = Buddy(ram, ram.base, 64 * MIB)
    one = PageTable(ram, buddy, 1)
    one.map(0, TIB, 0, BITS)
    two = PageTable(ram, buddy, 2, ia_bits=40, start_level=1, concatenated=2)
    two.map(0, TIB, 0, S2BITS)
    assert len(one.tables) == 2
    assert not two.tables
    assert walk(ram, TIB - 8, "w", 1, Stage1(Tcr(), one.root, 0), Stage2(Vtcr(), two.root)).pa == TIB - 8


@pytest.mark.parametrize("granule", [K4, K16, K64])
def test_contiguous_marks_whole_runs_only(granule: Granule) -> None:
    box = Box(granule)
    run = granule.contiguous(3) * granule.size
    box.table.map(run - granule.size, 2 * run + granule.size, run - granule.size, BITS, 3, contiguous=True)
    marked = [at for at, _, entry in box.table.leaves(0, 4 * run) if entry.value & d.CONTIGUOUS]
    assert marked == list(range(run, 3 * run, granule.size))
    # The output has to be aligned as well.
    box.table.map(8 * run, run, 16 * run + granule.size, BITS, 3, contiguous=True)
    assert not box.table.lookup(8 * run).value & d.CONTIGUOUS
    size2 = granule.contiguous(2) << granule.level_shift(2)
    box.table.map(size2, size2, size2, BITS, 2, contiguous=True)
    assert all(entry.value & d.CONTIGUOUS and entry.level == 2 for _, _, entry in box.table.leaves(size2, size2))


def test_no_contiguous_run_over_a_table(box: Box) -> None:
    box.table.map(32 * MIB + 2 * MIB, PAGE, MIB, BITS)
    box.table.map(32 * MIB, 32 * MIB, 32 * MIB, BITS, 2, contiguous=True)
    assert box.table.lookup(32 * MIB).level == 2
    assert not box.table.lookup(32 * MIB).value & d.CONTIGUOUS
    assert box.table.lookup(34 * MIB).value & d.CONTIGUOUS       # its pages are whole runs


def test_what_is_small_enough_stays_with_its_marks(box: Box) -> None:
    box.table.map(32 * MIB, 64 * 1024, 32 * MIB, BITS, contiguous=True)
    before = box.words()
    assert box.table.lookup(32 * MIB).value & d.CONTIGUOUS
    box.table.split(32 * MIB + PAGE, 2)
    box.table.split(32 * MIB + PAGE, 3, contiguous=True)
    assert box.words() == before


def test_what_map_refuses_changes_nothing(box: Box) -> None:
    box.table.map(GIB, GIB, GIB, BITS)
    before, free = box.words(), box.buddy.free_pages
    for bad in ((MIB + 8, PAGE, 0), (MIB, PAGE + 8, 0), (MIB, PAGE, 8), (MIB, 0, 0)):
        with pytest.raises(BadInput):
            box.table.map(*bad, BITS)
    with pytest.raises(BadInput, match="split it first"):
        box.table.map(GIB - 4 * PAGE, 8 * PAGE, 0, BITS)
    assert (box.words(), box.buddy.free_pages) == (before, free)
    with pytest.raises(BadInput, match="does not fit"):
        box.table.map(0, 2 * PAGE, (1 << 48) - PAGE, BITS)
    with pytest.raises(BadInput, match="beyond the 40 bits"):
        PageTable(box.ram, box.buddy, 2, ia_bits=40, start_level=1, concatenated=2).map(TIB - PAGE, 2 * PAGE, 0, S2BITS)


def test_a_part_of_a_contiguous_run_has_to_be_split_first(box: Box) -> None:
    run = 16 * PAGE
    box.table.map(run, 2 * run, run, BITS, contiguous=True)
    before = box.words()
    for ia, size in ((run, PAGE), (run - PAGE, 2 * PAGE), (2 * run + PAGE, 15 * PAGE), (3 * run - PAGE, 2 * PAGE)):
        for change in (lambda ia, size: box.table.map(ia, size, 64 * run, BITS), box.table.unmap,
                       lambda ia, size: box.table.annotate(ia, size, 2)):
            with pytest.raises(BadInput, match="contiguous run"):
                change(ia, size)
            assert box.words() == before
    box.table.unmap(run, run)
    box.table.split(2 * run)
    box.table.unmap(2 * run, PAGE)
    assert [box.pa(va) for va in (run, 2 * run, 2 * run + PAGE)] == [None, None, 2 * run + PAGE]


def test_mapping_again_replaces_leaves(box: Box) -> None:
    box.table.map(MIB, 4 * PAGE, MIB, BITS)
    box.table.map(MIB + PAGE, PAGE, 7 * MIB, BITS)
    assert [box.pa(MIB + n * PAGE) for n in range(3)] == [MIB, 7 * MIB, MIB + 2 * PAGE]


# -- unmap, annotate --------------------------------------------------------------------------------------------------


def test_unmap(box: Box) -> None:
    box.table.map(0, 4 * MIB, 0, BITS)
    box.table.map(4 * MIB, 4 * PAGE, 4 * MIB, BITS)
    with pytest.raises(BadInput, match="reaches beyond"):
        box.table.unmap(MIB, 2 * MIB)
    with pytest.raises(BadInput, match="reaches beyond"):
        box.table.unmap(2 * MIB, MIB)
    assert box.pa(MIB) == MIB
    box.table.unmap(2 * MIB, 2 * MIB + PAGE)
    assert [box.pa(va) for va in (0, 2 * MIB, 4 * MIB, 4 * MIB + PAGE)] == [0, None, None, 4 * MIB + PAGE]
    box.table.unmap(64 * GIB, GIB)
    assert not box.table.violations


def test_annotations_are_found_and_map_nothing(box: Box) -> None:
    note = 2 << 60 | 2 << 1 | 0x1234 << 4
    box.table.map(0, 2 * MIB, 0, BITS, 3)
    box.table.annotate(8 * PAGE, 2 * PAGE, note)
    box.table.annotate(GIB, 2 * MIB, note, largest=2)
    assert [box.table.lookup(n * PAGE).value == note for n in range(7, 11)] == [False, True, True, False]
    assert (box.table.lookup(GIB + MIB).level, box.table.lookup(GIB).value) == (2, note)
    assert box.pa(8 * PAGE) is None
    assert box.pa(GIB) is None
    with pytest.raises(BadInput, match="split it first"):
        box.table.map(GIB, PAGE, 0, BITS)               # an annotation of a larger entry is in the way
    with pytest.raises(BadInput, match="is valid"):
        box.table.annotate(0, PAGE, note | 1)
    assert not box.table.violations


# -- split ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granule", [K4, K16, K64])
def test_split_keeps_every_translation(granule: Granule) -> None:
    box = Box(granule, bbml3=True)
    level = granule.block_levels[0]
    size = 1 << granule.level_shift(level)
    bits = BITS | d.DBM | d.NG | d.AP_RO | 3 << 2 | 5 << 55
    box.table.map(size, size, 2 * size, bits)
    where = size + (size // 3 & -granule.size)
    box.table.split(where, 3)
    assert box.table.lookup(where).level == 3
    assert box.table.lookup(where).value == d.leaf(where + size, bits, 3)
    rnd = random.Random(3)
    for va in (size, 2 * size - 8, where, *(size + rnd.randrange(size) & ~7 for _ in range(200))):
        assert box.pa(va) == va + size
    if level == 1:
        assert box.table.lookup(size).level == 2        # only the way down to it was taken apart
    assert len(box.table.tables) == 3 - granule.start_level(48)
    assert not box.table.violations


def test_split_by_one_level_and_contiguous_marks() -> None:
    box = Box(bbml3=True)
    box.table.map(GIB, GIB, GIB, BITS)
    box.table.split(GIB + 5 * MIB, 2, contiguous=True)
    assert all(entry.level == 2 and entry.value & d.CONTIGUOUS for _, _, entry in box.table.leaves(GIB, GIB))
    # One of these becomes pages: its run loses the marks, and no other.
    box.table.split(GIB + 5 * MIB, 3, contiguous=True)
    blocks = [(at, entry) for at, _, entry in box.table.leaves(GIB, GIB) if entry.level == 2]
    assert len({at // (32 * MIB) for at, entry in blocks if entry.value & d.CONTIGUOUS}) == 31
    assert all(entry.value & d.CONTIGUOUS for _, _, entry in box.table.leaves(GIB + 4 * MIB, 2 * MIB))
    # And a run of pages loses them for one page.
    box.table.split(GIB + 5 * MIB, 3)
    marks = [bool(entry.value & d.CONTIGUOUS) for _, _, entry in box.table.leaves(GIB + 5 * MIB, 32 * PAGE)]
    assert marks == [False] * 16 + [True] * 16
    assert all(box.pa(va) == va for va in range(GIB, GIB + 8 * MIB, 0x3000))
    assert not box.table.violations


def test_a_split_over_two_levels_marks_around_the_table_only() -> None:
    box = Box(bbml3=True)
    box.table.map(GIB, GIB, GIB, BITS)
    box.table.split(GIB + 5 * MIB, 3, contiguous=True)
    plain = {at for at, covers, entry in box.table.leaves(GIB, GIB) if not entry.value & d.CONTIGUOUS}
    assert plain == {GIB + n * 2 * MIB for n in range(16) if n != 2}
    assert all(box.pa(va) == va for va in range(GIB, 2 * GIB, 0x333000))


def test_nothing_to_split(box: Box) -> None:
    with pytest.raises(BadInput, match="nothing is mapped"):
        box.table.split(GIB)
    box.table.map(0, PAGE, 0, BITS)
    before = box.words()
    box.table.split(0, 3)
    box.table.split(0, 2)
    assert box.words() == before


# -- running out of memory changes nothing -------------------------------------------------------------------------------


@pytest.mark.parametrize("granule", [K4, K64])
def test_every_allocation_of_map_can_fail(granule: Granule) -> None:
    box = Box(granule)
    box.table.map(0, granule.size, 0, BITS)
    before, tables, free = box.words(), set(box.table.tables), box.buddy.free_pages
    span = 1 << granule.level_shift(1)
    start, oa = span - 8 * granule.size, 2 * span + granule.size
    failures = 0
    while True:
        box.buddy.fail_at(failures)
        try:
            box.table.map(start, 16 * granule.size, oa, BITS)
            break
        except OutOfMemory:
            failures += 1
            assert (box.words(), box.table.tables, box.buddy.free_pages) == (before, tables, free)
    box.buddy.fail_at(None)
    assert failures == 3        # a last table below the first gigabyte (4 TiB), two above
    assert [box.pa(start + n * granule.size) for n in range(-1, 17)] == [
        None, *(oa + n * granule.size for n in range(16)), None]


def test_every_allocation_of_split_can_fail() -> None:
    box = Box(bbml3=True)
    box.table.map(GIB, GIB, GIB, BITS)
    before, free = box.words(), box.buddy.free_pages
    for n in range(2):
        box.buddy.fail_at(n)
        with pytest.raises(OutOfMemory):
            box.table.split(GIB, 3)
        assert (box.words(), box.buddy.free_pages) == (before, free)
    box.table.split(GIB, 3)
    assert box.buddy.free_pages == free - 2


def test_free_gives_everything_back() -> None:
    for more in ({"stage": 1}, {"stage": 2, "ia_bits": 42, "start_level": 1, "concatenated": 8},
                 {"stage": 2, "granule": K16, "ia_bits": 40, "start_level": 2, "concatenated": 16}):
        ram = Ram(64 * MIB)
        buddy = Buddy(ram, ram.base, 64 * MIB)
        before = buddy.free_pages
        ram.fill(ram.base, 8 * MIB, 0xff)               # what a block held before is not in the table
        table = PageTable(ram, buddy, **more)  # type: ignore[arg-type]
        granule = table.granule
        assert table.root % (granule.size * table.concatenated) == 0
        assert not table.lookup((1 << table.ia_bits) - granule.size).value
        for ia in (0, 1 << 33, (1 << 39) + granule.size):
            table.map(ia, 3 * granule.size, 0, S2BITS)
        table.free()
        assert buddy.free_pages == before


@pytest.mark.parametrize("more", [{"concatenated": 2}, {"stage": 2, "ia_bits": 40, "start_level": 1},
                                  {"stage": 2, "ia_bits": 40, "start_level": 1, "concatenated": 4},
                                  {"stage": 2, "ia_bits": 44, "start_level": 1, "concatenated": 32}])
def test_geometries_that_do_not_exist(more: dict[str, int]) -> None:
    ram = Ram(4 * MIB)
    with pytest.raises(BadInput, match="first-level tables"):
        PageTable(ram, Buddy(ram, ram.base, 4 * MIB), **{"stage": 1, **more})  # type: ignore[arg-type]


def test_a_source_of_single_pages_has_no_large_tables() -> None:
    class Pages:
        def alloc_table(self) -> int:
            return 0x8000_0000

        def free_table(self, pa: int) -> None:
            raise AssertionError

    with pytest.raises(BadInput, match="no blocks of order 2"):
        PageTable(Ram(4 * MIB), Pages(), 1, K16)


# -- break-before-make ---------------------------------------------------------------------------------------------------


PAGE_VALUE = d.leaf(0x8000_1000, BITS | d.NG | 4, 3)
BLOCK_VALUE = d.leaf(0x8020_0000, BITS, 2)


@pytest.mark.parametrize(("old", "new", "level", "stage", "why"), [
    (PAGE_VALUE, PAGE_VALUE ^ 0x4000, 3, 1, "output address"),
    (PAGE_VALUE, PAGE_VALUE | d.CONTIGUOUS, 3, 1, "contiguous bit"),
    (PAGE_VALUE, PAGE_VALUE ^ 8, 3, 1, "memory type"),
    (PAGE_VALUE, PAGE_VALUE ^ d.SH_INNER, 3, 1, "shareability"),
    (PAGE_VALUE, PAGE_VALUE & ~d.NG, 3, 1, "nG to global"),
    (PAGE_VALUE & ~d.NG, PAGE_VALUE, 3, 1, None),
    (PAGE_VALUE, PAGE_VALUE ^ (d.AP_RO | d.PXN | d.UXN | d.DBM | 15 << 55), 3, 1, None),
    (PAGE_VALUE, PAGE_VALUE & ~d.AF, 3, 1, None),
    (PAGE_VALUE, 0, 3, 1, None),
    (0, PAGE_VALUE, 3, 1, None),
    (PAGE_VALUE & ~1, PAGE_VALUE ^ 0x4000, 3, 1, None),
    (BLOCK_VALUE, d.table(0x8000_0000), 2, 1, "size"),
    (d.table(0x8000_0000), BLOCK_VALUE, 2, 1, "size"),
    (d.table(0x8000_0000), d.table(0x8000_1000), 2, 1, "next-level table"),
    (d.table(0x8000_0000), d.table(0x8000_0000, d.PXN_TABLE), 2, 1, None),
    (PAGE_VALUE, PAGE_VALUE ^ 0x20, 3, 2, "memory type"),
    (PAGE_VALUE, PAGE_VALUE ^ 0x20, 3, 1, None),
    (PAGE_VALUE, PAGE_VALUE ^ d.S2_WRITE, 3, 2, None),
])
def test_what_needs_it(old: int, new: int, level: int, stage: int, why: str | None) -> None:
    assert bbm.needs(old, new, level, stage, K4, bbml3=False) == why
    live = bbm.needs(old, new, level, stage, K4, bbml3=True)
    assert live == (None if why in ("size", "contiguous bit") else why)


def test_write_records_and_stores(box: Box) -> None:
    box.table.map(MIB, PAGE, MIB, BITS)
    entry = box.table.lookup(MIB)
    box.table.write(entry.address, 3, d.leaf(2 * MIB, BITS, 3))
    assert box.pa(MIB) == 2 * MIB
    (violation,) = box.table.violations
    assert (violation.address, violation.why) == (entry.address, "output address")
    assert str(violation) == (
        f"output address changes without break-before-make at {entry.address:#x}: "
        "L3 page OA=0x100000 AttrIndx=0 AP=EL1:RW,EL0:- SH=inner AF nG=0 PXN UXN => "
        "L3 page OA=0x200000 AttrIndx=0 AP=EL1:RW,EL0:- SH=inner AF nG=0 PXN UXN")


def test_a_live_split_needs_bbml3_or_a_flush() -> None:
    for bbml3 in (False, True):
        box = Box(bbml3=bbml3)
        box.table.map(0, 2 * MIB, 0, BITS)
        box.table.split(PAGE)
        assert [v.why for v in box.table.violations] == ([] if bbml3 else ["size"])
    box = Box()
    flushed: list[tuple[int, int]] = []

    def flush(ia: int, size: int) -> None:
        assert box.pa(ia + 5 * PAGE) is None            # broken, not made yet
        flushed.append((ia, size))

    box.table.map(0, 32 * MIB, 0, BITS, 2, contiguous=True)
    box.table.split(5 * MIB, flush=flush)
    assert flushed == [(0, 32 * MIB), (4 * MIB, 2 * MIB)]
    assert not box.table.violations
    assert all(box.pa(va) == va for va in range(0, 32 * MIB, 0x7000))


def test_break_without_maintenance_before_make() -> None:
    """Invalid in between is not enough: as long as a TLB holds the old entry, another one must not become valid."""
    tlb = Tlb()

    def held(ia: int, size: int) -> bool:
        return any(tlb.holds_stage1(at, None, 0) for at in range(ia, ia + size, PAGE))

    box = Box(live_check=held)
    mmu, s1 = Mmu(box.ram, tlb), Stage1(Tcr(), box.table.root, box.table.root)
    for flush, other, wrong in ((True, 7 * MIB, False), (False, MIB, False), (False, 7 * MIB, True)):
        tlb.clear()
        box.table.unmap(MIB, PAGE)
        box.table.map(MIB, PAGE, MIB, BITS)
        mmu.translate(MIB, "r", 1, s1)
        box.table.unmap(MIB, PAGE)
        if flush:
            tlbi.vaae1is([tlb], MIB, 0)
        assert not box.table.violations
        box.table.map(MIB, PAGE, other, BITS)
        assert [v.why for v in box.table.violations] == (["output address that a TLB still holds"] if wrong else [])


# -- at random, against a dictionary of pages ------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_random_operations_against_a_dictionary(seed: int) -> None:
    rnd, box = random.Random(seed), Box(bbml3=True)
    space, pages = 2 * GIB - 4 * MIB, {}
    edges = [space + n * MIB for n in range(0, 12, 2)]
    for _ in range(120):
        ia, nr = rnd.choice(edges) + rnd.choice((0, 0, PAGE, 17 * PAGE)), rnd.choice((1, 2, 16, 512, 600, 1024))
        oa = rnd.choice((ia, ia + 64 * PAGE, GIB + ia))
        before = box.words()
        try:
            match rnd.randrange(4):
                case 0 | 1:
                    box.table.map(ia, nr * PAGE, oa, BITS, contiguous=rnd.random() < .5)
                    pages.update({ia + n * PAGE: oa + n * PAGE for n in range(nr)})
                case 2:
                    box.table.unmap(ia, nr * PAGE)
                    for n in range(nr):
                        pages.pop(ia + n * PAGE, None)
                case 3:
                    box.table.split(ia, 3, contiguous=rnd.random() < .5)
        except BadInput:
            assert box.words() == before
    mmu = Mmu(box.ram, Tlb(), conflict_aborts=True)
    s1 = Stage1(Tcr(), box.table.root, box.table.root)
    for va in range(space - MIB, space + 16 * MIB, PAGE):
        assert box.pa(va) == pages.get(va), hex(va)
        if va in pages:                                 # runs that are marked are runs
            assert mmu.translate(va, "r", 1, s1).pa == pages[va], hex(va)
    assert pages

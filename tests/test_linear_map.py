"""The linear map of arm64 Linux: descriptors bit by bit, splitting, holes, and when the TLBs learn of them."""

from __future__ import annotations

from errno import EBUSY, EINVAL, ENOMEM

import pytest

from guest_memfd.errors import BadInput
from guest_memfd.machine.hw.arm64.fault import Fault
from guest_memfd.machine.hw.arm64.mmu import Mmu
from guest_memfd.machine.hw.arm64.regime import Stage1
from guest_memfd.machine.hw.arm64.registers import Tcr
from guest_memfd.machine.hw.arm64.tlb import Tlb
from guest_memfd.machine.hw.buddy import Buddy
from guest_memfd.machine.hw.ram import Ram
from guest_memfd.machine.linux.direct_map import CONT, VALID, KernelTable, is_present, level_size
from guest_memfd.machine.linux.linear_map import PAGE_OFFSET, LinearMap
from guest_memfd.machine.linux.text import KIMAGE_VADDR
from guest_memfd.machine.linux.trans_pgd import trans_pgd_create_copy
from guest_memfd.words.units import PAGE

G, M = 1 << 30, 1 << 20
BASE = 0x8000_0000


class Box:
    """RAM, an allocator at its very end, TLBs, and the linear map."""

    def __init__(self, size: int = 2 * G, *, cpus: int = 2, base: int = BASE, **options: object) -> None:
        self.ram = Ram(size, base)
        self.buddy = Buddy(self.ram, self.ram.end - min(size // 2, 16 * M), min(size // 2, 16 * M))
        self.tlbs = [Tlb() for _ in range(cpus)]
        self.map = LinearMap(self.ram, self.buddy, self.tlbs, **options)  # type: ignore[arg-type]
        self.mmus = [Mmu(self.ram, tlb) for tlb in self.tlbs]
        self.s1 = Stage1(Tcr(t0sz=16, t1sz=16), 0, self.map.root, mair=0xFF)

    def value(self, pa: int) -> int:
        return self.map.leaf(pa).value

    def read(self, pa: int, cpu: int = 0) -> int:
        """Where a load from the linear-map address of *pa* ends; raises Fault."""
        return self.mmus[cpu].translate(self.map.va(pa), "r", 1, self.s1).pa

    def sizes(self) -> dict[str, int]:
        """meminfo(), recomputed from the tables themselves."""
        counted = dict.fromkeys(self.map.meminfo(), 0)
        for start, end in self.map.ranges:
            for _, entry in self.map.tables.leaves(self.map.va(start), self.map.va(end)):
                size = level_size(entry.level)
                name = {(12, 0): "DirectMap4k", (12, 1): "DirectMap64k", (21, 0): "DirectMap2M", (21, 1): "DirectMap32M",
                        (30, 0): "DirectMap1G"}[size.bit_length() - 1, int(bool(entry.value & CONT))]
                counted[name] += size
        return counted


# -- construction ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "forced", "settable"), [
    ({"release": "7.3"}, True, True),
    ({"release": "7.3", "rodata": "on"}, True, True),
    ({"release": "7.3", "rodata": "off"}, False, False),
    ({"release": "7.3", "rodata": "noalias"}, False, False),
    ({"release": "7.3", "bbml3": True}, False, True),
    ({"release": "7.3", "bbml3": True, "rodata": "noalias"}, False, False),
    ({"release": "7.3", "bbml3": True, "debug_pagealloc": True}, True, True),
    ({"release": "7.3", "rodata": "off", "debug_pagealloc": True}, True, True),
    ({"release": "6.12"}, True, True),
    ({"release": "6.12", "bbml3": True}, True, True),
    ({"release": "6.12", "rodata": "noalias"}, False, False),
    ({"release": "6.12", "rodata": "off", "debug_pagealloc": True}, True, True),
])
def test_which_linear_map_is_made_of_pages_and_which_can_have_holes(
        options: dict[str, object], forced: bool, settable: bool) -> None:
    box = Box(**options)
    assert (box.map.force_pte_mapping(), box.map.can_set_direct_map()) == (forced, settable)
    assert box.map.leaf(BASE).level == (3 if forced else 1)


def test_descriptors_bit_by_bit() -> None:
    pages, blocks = Box(), Box(bbml3=True)
    assert pages.value(BASE + 0x5000) == 0x00E8_0000_8000_5707
    assert blocks.value(BASE + 0x5000) == 0x00E8_0000_8000_0705
    assert Box(kpti=True).value(BASE + 0x5000) == 0x00E8_0000_8000_5F07
    path = pages.map.path(pages.map.va(BASE + 0x5000))
    assert [entry.level for entry in path] == [0, 1, 2, 3]
    assert all(entry.value >> 59 & 3 == 3 and entry.value & 0xFFF == 3 for entry in path[:3])      # UXNTable, PXNTable


def test_addresses() -> None:
    box = Box(base=BASE + 64 * M, size=G)
    assert box.map.va(BASE + 64 * M) == PAGE_OFFSET + 64 * M        # memstart is rounded down to a gigabyte
    assert box.map.pa(box.map.va(BASE + 128 * M)) == BASE + 128 * M
    assert box.map.covers(PAGE_OFFSET)
    assert not box.map.covers(PAGE_OFFSET - 1)
    assert not box.map.covers(0xFFFF_8000_0000_0000)
    assert box.map.covers(0xFFFF_7FFF_FFFF_FFFF)
    assert not box.map.covers(KIMAGE_VADDR)


def test_ragged_ranges_are_mapped_greedily() -> None:
    start = BASE + 0xF000
    box = Box(4 * G, rodata="noalias", ranges=[(start, BASE + 2 * G + 0x21_0000), (BASE + 3 * G, BASE + 3 * G + 5 * M)])
    assert box.value(start) == 0x00E8_0000_8000_F707
    assert box.value(BASE + 0x1_0000) == 0x00F8_0000_8001_0707
    assert box.value(BASE + 2 * M) == 0x00E8_0000_8020_0705
    assert box.value(BASE + 32 * M) == 0x00F8_0000_8200_0705
    assert box.value(BASE + G) == 0x00E8_0000_C000_0705
    assert box.value(BASE + 2 * G + 2 * M) == 0x00F8_0001_0020_0707
    assert box.map.leaf(BASE + 2 * G + 0x21_0000).value == 0
    assert box.sizes() == box.map.meminfo()
    for pa in range(start, BASE + 2 * G, 37 * M + PAGE):
        assert box.read(pa) == pa


def test_a_terabyte_of_blocks_costs_nothing() -> None:
    ram = Ram(1 << 40)
    blocks = LinearMap(ram, Buddy(ram, BASE, G), [], bbml3=True)
    assert blocks.meminfo()["DirectMap1G"] == 1 << 40
    assert blocks.table_pages == blocks.tables.pages == 3


def test_lazy_pages_are_the_eager_ones() -> None:
    lazy, eager = Box(3 * G, eager=G), Box(3 * G)
    assert lazy.map.tables.pages < lazy.map.table_pages == eager.map.table_pages == eager.map.tables.pages
    assert lazy.map.meminfo() == eager.map.meminfo()
    pa = BASE + 2 * G + 0x7000
    with pytest.raises(Fault, match="translation"):
        lazy.read(pa)
    assert lazy.map.fault_in(lazy.map.va(pa))
    assert lazy.read(pa) == pa
    assert not lazy.map.fault_in(lazy.map.va(pa))
    assert lazy.value(pa) == eager.value(pa)
    assert lazy.map.table_pages == eager.map.table_pages
    assert lazy.map.set_direct_map_invalid_noflush(BASE + G) == 0           # needed: built first
    assert lazy.map.tables.pages == lazy.map.table_pages


def test_kernel_text_is_executable_and_read_only() -> None:
    box = Box(rodata="noalias")
    box.map.map_text(KIMAGE_VADDR, BASE + 0x4000, 2 * PAGE)
    assert box.map.path(KIMAGE_VADDR + PAGE)[-1].value == 0x0040_0000_8000_5783
    mmu = box.mmus[0]
    assert mmu.translate(KIMAGE_VADDR, "x", 1, box.s1).pa == BASE + 0x4000
    with pytest.raises(Fault, match="permission"):
        mmu.translate(KIMAGE_VADDR, "w", 1, box.s1)
    with pytest.raises(Fault, match="permission"):
        mmu.translate(box.map.va(BASE + 0x4000), "x", 1, box.s1)


@pytest.mark.parametrize("wrong", [{"release": "5.4"}, {"rodata": "maybe"}])
def test_unknown_options_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(BadInput):
        Box(**wrong)


# -- the setters, bit by bit -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("release", "kpti", "mapped", "invalid", "default"), [
    ("7.3", False, 0x707, 0xF06, 0x707),
    ("7.3", True, 0xF07, 0xF06, 0xF07),
    ("6.12", False, 0x707, 0x706, 0x707),
    ("6.12", True, 0xF07, 0xF06, 0xF07),
])
def test_values_of_a_hole(release: str, kpti: bool, mapped: int, invalid: int, default: int) -> None:
    box = Box(release=release, kpti=kpti)
    pa, high = BASE + 0x9000, 0x00E8_0000_8000_9000
    assert box.value(pa) == high | mapped
    assert box.map.set_direct_map_invalid_noflush(pa) == 0
    assert box.value(pa) == high | invalid
    assert not box.map.kernel_page_present(pa)
    assert box.map.kernel_page_present(pa + PAGE)
    assert box.map.set_direct_map_default_noflush(pa) == 0
    assert box.value(pa) == high | default
    assert box.map.kernel_page_present(pa)


def test_default_makes_writable_and_valid_does_not() -> None:
    for release in ("7.3", "6.12"):
        box = Box(release=release)
        entry = box.map.leaf(BASE)
        box.ram.write64(entry.address, entry.value & ~(1 << 51) | 1 << 7)
        assert box.map.set_memory_valid(BASE, 1, False) == 0
        assert box.map.set_memory_valid(BASE, 1, True) == 0
        assert box.value(BASE) == 0x00E0_0000_8000_0787
        assert box.map.set_direct_map_default_noflush(BASE) == 0
        assert box.value(BASE) == 0x00E8_0000_8000_0707


@pytest.mark.parametrize("release", ["7.3", "6.12"])
def test_without_can_set_direct_map_nothing_happens(release: str) -> None:
    box = Box(release=release, rodata="noalias", bbml3=True)
    before = box.value(BASE)
    assert box.map.set_direct_map_invalid_noflush(BASE + PAGE) == 0
    assert box.map.set_direct_map_default_noflush(BASE + PAGE) == 0
    box.map.kernel_map_pages(BASE, 1, False)
    if release == "7.3":
        assert box.map.set_direct_map_valid_noflush(BASE, 1, False) == 0
    assert box.value(BASE) == before == 0x00E8_0000_8000_0705
    assert box.map.kernel_page_present(BASE)
    assert not box.map.warnings


def test_612_has_no_valid_noflush_and_sees_every_block_as_present() -> None:
    box = Box(release="6.12", rodata="noalias")
    with pytest.raises(BadInput, match=r"6\.12"):
        box.map.set_direct_map_valid_noflush(BASE, 1, False)
    assert box.map.set_memory_valid(BASE, 1, False) == -EINVAL              # a block: apply_to_page_range() warns
    assert box.map.warnings == ["WARNING: arch/arm64/mm/pageattr.c: pageattr_entry() = -22"]
    assert box.map.kernel_page_present(BASE)


def test_without_bbml3_a_block_is_never_split() -> None:
    box = Box(rodata="noalias")
    for _ in range(2):
        assert box.map.set_memory_valid(BASE, 1, False) == -EINVAL
    assert len(box.map.warnings) == 1                                       # WARN_ON_ONCE
    assert box.map.splits == {"DirectMap1G": 0, "DirectMap32M": 0, "DirectMap2M": 0, "DirectMap64k": 0}


@pytest.mark.parametrize(("pa", "nr"), [(BASE + 1, 1), (BASE, 0), (BASE, -1)])
def test_unaligned_requests_are_refused(pa: int, nr: int) -> None:
    box = Box(bbml3=True)
    assert box.map.set_direct_map_invalid_noflush(pa, nr) == -EINVAL
    assert box.map.warnings
    assert box.map.meminfo()["DirectMap1G"] == 2 * G


def test_what_is_not_in_the_linear_map_has_no_page() -> None:
    box = Box()
    with pytest.raises(ValueError, match="not in the linear map"):
        box.map.set_direct_map_invalid_noflush(box.ram.end)


# -- splitting ---------------------------------------------------------------------------------------------------


def test_one_page_out_of_a_gigabyte() -> None:
    box = Box(bbml3=True)
    pa = BASE + 0x5000
    assert box.map.set_direct_map_invalid_noflush(pa) == 0
    table = 0x1800_0000_0000_0403                                           # UXNTable, PXNTable, AF, table
    path = box.map.path(box.map.va(pa))
    assert [entry.value & ~0x0000_FFFF_FFFF_F000 for entry in path[1:3]] == [table, table]
    assert path[0].value & ~0x0000_FFFF_FFFF_F000 == table & ~0x400         # made at boot: no AF
    assert path[3].value == 0x00E8_0000_8000_5F06
    assert box.value(pa + PAGE) == 0x00E8_0000_8000_6707                    # its run is not contiguous any more
    assert box.value(BASE + 0x1_0000) == 0x00F8_0000_8001_0707
    assert box.value(BASE + 2 * M) == 0x00E8_0000_8020_0705
    assert box.value(BASE + 32 * M) == 0x00F8_0000_8200_0705
    assert box.value(BASE + G) == 0x00E8_0000_C000_0705
    assert box.map.splits == {"DirectMap1G": 1, "DirectMap32M": 1, "DirectMap2M": 1, "DirectMap64k": 1}
    assert box.map.meminfo() == box.sizes() == {
        "DirectMap4k": 64 << 10, "DirectMap64k": 2 * M - (64 << 10), "DirectMap2M": 30 * M,
        "DirectMap32M": G - 32 * M, "DirectMap1G": G}
    assert box.map.table_pages == 4
    assert not box.map.tables.violations
    assert not any(box.map.flushes.values())


def test_nothing_is_ever_merged_again() -> None:
    box = Box(bbml3=True)
    box.map.set_direct_map_invalid_noflush(BASE)
    after = box.map.meminfo()
    assert box.map.set_direct_map_default_noflush(BASE) == 0
    assert box.map.meminfo() == after == box.sizes()
    assert box.map.table_pages == 4


@pytest.mark.parametrize(("pa", "nr", "level", "value"), [
    (BASE, 1 << 18, 1, 0x00E8_0000_8000_0F04),
    (BASE + 4 * M, 512, 2, 0x00E8_0000_8040_0F04),
    (BASE + 64 * M, 16 * 512, 2, 0x00F8_0000_8400_0F04),
    (BASE + 0x2_0000, 16, 3, 0x00F8_0000_8002_0F06),
])
def test_a_whole_leaf_is_flipped_in_place(pa: int, nr: int, level: int, value: int) -> None:
    box = Box(bbml3=True)
    assert box.map.set_direct_map_invalid_noflush(pa, nr) == 0
    assert (box.map.leaf(pa).level, box.value(pa)) == (level, value)
    for page in (pa, pa + (nr - 1) * PAGE):
        assert not box.map.kernel_page_present(page)
        with pytest.raises(Fault, match="translation"):
            box.read(page)
    for page in (pa + nr * PAGE, pa - PAGE):
        if box.ram.contains(page):
            assert box.read(page) == page
    assert box.map.meminfo() == box.sizes()
    assert box.map.set_direct_map_default_noflush(pa, nr) == 0
    assert box.map.kernel_page_present(pa)
    assert box.read(pa) == pa


def test_splitting_a_hole_keeps_the_rest_of_it_a_hole() -> None:
    box = Box(bbml3=True)
    assert box.map.set_direct_map_invalid_noflush(BASE, 1 << 18) == 0
    assert box.map.set_direct_map_default_noflush(BASE + 3 * PAGE) == 0
    assert box.read(BASE + 3 * PAGE) == BASE + 3 * PAGE
    assert box.value(BASE + 2 * PAGE) == 0x00E8_0000_8000_2F06
    assert box.value(BASE + 2 * M) == 0x00E8_0000_8020_0F04
    for pa in (BASE, BASE + 4 * PAGE, BASE + 64 * M, BASE + G - PAGE):
        assert not box.map.kernel_page_present(pa)
        assert is_present(box.value(pa))


def test_a_range_that_is_no_leaf_is_split_at_both_ends() -> None:
    box = Box(bbml3=True)
    pa, nr = BASE + 2 * M - 3 * PAGE, 512 + 6
    assert box.map.set_direct_map_invalid_noflush(pa, nr) == 0
    holes = [page for page in range(BASE, BASE + 8 * M, PAGE) if not box.map.kernel_page_present(page)]
    assert holes == list(range(pa, pa + nr * PAGE, PAGE))
    assert box.value(BASE + 2 * M) == 0x00E8_0000_8020_0F04                 # the 2M in the middle stays a block
    assert box.map.meminfo() == box.sizes()
    assert box.map.splits["DirectMap2M"] == 2


@pytest.mark.parametrize("split", range(5))
def test_every_table_page_of_a_split_can_fail(split: int) -> None:
    box = Box(bbml3=True)
    pa, nr = BASE + G - PAGE, 2                                             # two gigabytes, two tables each
    free = box.buddy.free_pages
    box.buddy.fail_at(split)
    assert box.map.set_direct_map_invalid_noflush(pa, nr) == (-ENOMEM if split < 4 else 0)
    assert free - box.buddy.free_pages == box.map.table_pages - 2 == split  # split as far as it went: no harm
    assert box.map.meminfo() == box.sizes()
    if split < 4:
        assert box.map.warnings == ["WARNING: arch/arm64/mm/pageattr.c: update_range_prot() = -12"]
        assert box.map.kernel_page_present(pa)
        assert box.map.kernel_page_present(pa + PAGE)
        assert box.read(pa) == pa
        box.buddy.fail_at(None)
        assert box.map.set_direct_map_invalid_noflush(pa, nr) == 0          # and once more
    assert not box.map.kernel_page_present(pa)
    assert not box.map.kernel_page_present(pa + PAGE)
    assert box.map.table_pages == 6


def test_splitting_needs_the_page_allocator_and_known_cpus() -> None:
    box = Box(bbml3=True, cpus=2)
    box.map.capabilities_finalized = False
    assert box.map.set_direct_map_invalid_noflush(BASE) == -EBUSY
    box.map.online_cpus = 1
    box.map.page_alloc_available = False
    assert box.map.set_direct_map_invalid_noflush(BASE) == -EBUSY
    box.map.page_alloc_available = True
    assert box.map.set_direct_map_invalid_noflush(BASE) == 0
    assert [w for w in box.map.warnings if "split_kernel_leaf_mapping" in w]


def test_splitting_in_atomic_context_is_complained_about() -> None:
    for options, complaints in (({"bbml3": True}, 1), ({}, 0), ({"bbml3": True, "debug_pagealloc": True}, 0)):
        box = Box(**options)
        box.map.atomic = True
        assert box.map.set_direct_map_invalid_noflush(BASE) == 0
        assert sum("sleeping function called from invalid context" in w for w in box.map.warnings) == complaints


def test_a_late_cpu_without_bbml3_ends_all_blocks() -> None:
    box = Box(G, bbml3=True, ranges=[(BASE, BASE + 66 * M + 0x1_1000)])
    box.map.capabilities_finalized = False
    box.read(BASE)
    box.map.finalize_capabilities(bbml3=True)
    assert box.map.leaf(BASE).level == 2
    box.map.finalize_capabilities(bbml3=False)
    assert box.map.meminfo() == box.sizes()
    assert box.map.meminfo()["DirectMap4k"] == 66 * M + 0x1_1000
    assert not box.tlbs[0].holds_stage1(box.map.va(BASE), None, 0)
    assert box.map.set_direct_map_invalid_noflush(BASE + 5 * PAGE) == 0
    assert not box.map.warnings


def test_only_bbml3_makes_a_live_change_of_size_legal() -> None:
    ram = Ram(G)
    for tolerated in (True, False):
        table = KernelTable(ram, Buddy(ram, BASE, 16 * M), any_size=tolerated)
        table.map(PAGE_OFFSET, PAGE_OFFSET + 2 * M, BASE, 0x00E8_0000_0000_0707)
        entry = table.lookup(PAGE_OFFSET)
        table.store(entry, table.new_table() | 3)
        assert [violation.why for violation in table.violations] == ([] if tolerated else ["size"])


# -- TLBs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"bbml3": True}, {"release": "6.12"}, {"kpti": True}])
def test_a_hole_is_closed_only_by_the_flush(options: dict[str, object]) -> None:
    box = Box(**options)
    pa = BASE + 0x5000
    assert box.read(pa, 0) == box.read(pa, 1) == pa
    assert box.map.set_direct_map_invalid_noflush(pa) == 0
    assert box.read(pa, 0) == box.read(pa, 1) == pa                         # stale
    box.map.flush_tlb_kernel_range(box.map.va(pa), box.map.va(pa) + PAGE)
    for cpu in (0, 1):
        with pytest.raises(Fault, match="translation"):
            box.read(pa, cpu)
    assert box.map.flushes == {"vaale1is": 1, "rvaale1is": 0, "vmalle1is": 0}
    assert box.map.set_direct_map_default_noflush(pa) == 0                  # nothing stale can be left: no flush
    assert box.read(pa, 1) == pa


def test_the_large_entry_goes_with_the_flush_of_one_page() -> None:
    box = Box(bbml3=True)
    assert box.read(BASE + 8 * M) == BASE + 8 * M
    box.map.set_direct_map_invalid_noflush(BASE)
    assert box.read(BASE) == BASE
    box.map.flush_tlb_kernel_range(box.map.va(BASE), box.map.va(BASE) + 1)
    with pytest.raises(Fault, match="translation"):
        box.read(BASE)


@pytest.mark.parametrize(("release", "valid", "flushed"), [
    ("7.3", False, 1), ("7.3", True, 0), ("6.12", False, 1), ("6.12", True, 1)])
def test_set_memory_valid_flushes(release: str, valid: bool, flushed: int) -> None:
    box = Box(release=release)
    assert box.map.set_memory_valid(BASE, 1, valid) == 0
    assert box.map.flushes["vaale1is"] == flushed


def test_valid_noflush_flushes_in_spite_of_its_name() -> None:
    box = Box()
    box.read(BASE, 1)
    assert box.map.set_direct_map_valid_noflush(BASE, 1, False) == 0
    with pytest.raises(Fault, match="translation"):
        box.read(BASE, 1)
    box.map.kernel_map_pages(BASE, 1, True)
    assert box.read(BASE, 1) == BASE


@pytest.mark.parametrize(("release", "tlb_range", "pages", "counts"), [
    ("7.3", False, 511, (511, 0, 0)),
    ("7.3", False, 512, (0, 0, 1)),
    ("6.12", False, 512, (512, 0, 0)),
    ("6.12", True, 513, (0, 0, 1)),
    ("7.3", True, 1, (1, 0, 0)),
    ("7.3", True, 2, (0, 1, 0)),
    ("7.3", True, 513, (1, 1, 0)),
    ("7.3", True, (1 << 18) + 1, (1, 1, 0)),
    ("7.3", True, 2097152, (0, 1, 0)),
    ("7.3", True, 2097153, (0, 0, 1)),
])
def test_how_a_range_is_flushed(release: str, tlb_range: bool, pages: int, counts: tuple[int, int, int]) -> None:
    box = Box(release=release, rodata="noalias", tlb_range=tlb_range, cpus=1)
    box.map.flush_tlb_kernel_range(PAGE_OFFSET, PAGE_OFFSET + pages * PAGE)
    assert tuple(box.map.flushes.values()) == counts


@pytest.mark.parametrize("tlb_range", [True, False])
def test_a_flush_reaches_all_of_its_range_and_nothing_else(tlb_range: bool) -> None:
    box = Box(G, tlb_range=tlb_range)
    pages = 33 + 64 * 2
    for index in range(pages + 2):
        box.read(BASE + index * PAGE)
    box.map.flush_tlb_kernel_range(PAGE_OFFSET + PAGE, PAGE_OFFSET + (pages + 1) * PAGE)
    held = [index for index in range(pages + 2) if box.tlbs[0].holds_stage1(PAGE_OFFSET + index * PAGE, None, 0)]
    # Pages that boot has mapped singly are cached singly.
    assert held == [0, pages + 1]


def test_a_flush_is_for_the_vmid_the_host_runs_in() -> None:
    box = Box(vmid=lambda: 3)
    box.read(BASE)
    box.map.flush_tlb_kernel_range(PAGE_OFFSET, PAGE_OFFSET + PAGE)
    assert box.tlbs[0].holds_stage1(PAGE_OFFSET, None, 0)


# -- copies of the tables ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"bbml3": True}])
def test_holes_disappear_in_a_copy_of_the_tables(options: dict[str, object]) -> None:
    box = Box(**options)
    hole, block = BASE + 0x5000, BASE + 4 * M
    box.map.set_direct_map_invalid_noflush(hole)
    box.map.set_direct_map_invalid_noflush(block, 512)
    read_only = box.map.leaf(BASE)
    box.ram.write64(read_only.address, read_only.value & ~(1 << 51) | 1 << 7)
    pages = Buddy(box.ram, BASE + G, 512 * M)
    root = trans_pgd_create_copy(box.map, pages, box.map.va(BASE), box.map.va(BASE + G))
    assert root > 0
    copy = Stage1(Tcr(t0sz=16, t1sz=16), 0, root, mair=0xFF)
    mmu = Mmu(box.ram, Tlb())
    for pa in (BASE, hole, block, block + 511 * PAGE, BASE + G - PAGE):
        assert mmu.translate(box.map.va(pa), "w", 1, copy).pa == pa
    assert not box.map.kernel_page_present(hole)                            # the original keeps them
    with pytest.raises(Fault, match="translation"):
        mmu.translate(box.map.va(BASE + G), "r", 1, copy)


def test_a_copy_that_finds_no_memory_leaves_nothing() -> None:
    box = Box(G, bbml3=True)
    box.map.set_direct_map_invalid_noflush(BASE)
    pages = Buddy(box.ram, BASE + 512 * M, M)
    free = pages.free_pages
    for failing in range(4):
        pages.fail_at(failing)
        assert trans_pgd_create_copy(box.map, pages, box.map.va(BASE), box.map.va(BASE + G)) == -ENOMEM
        assert pages.free_pages == free
    pages.fail_at(4)
    root = trans_pgd_create_copy(box.map, pages, box.map.va(BASE), box.map.va(BASE + G))
    assert box.ram.read64(root) & VALID

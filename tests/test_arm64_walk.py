"""The walk of two stages, rule by rule: what keeps each rule is translated, what breaks it ends in the fault it must."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest

from guest_memfd.errors import BadInput
from guest_memfd.machine.hw.arm64 import descriptor as d
from guest_memfd.machine.hw.arm64.fault import Fault
from guest_memfd.machine.hw.arm64.granule import K4, K16, K64, Granule
from guest_memfd.machine.hw.arm64.registers import CpuFeatures, Tcr, Vtcr
from guest_memfd.machine.hw.arm64.tables import PageTable
from guest_memfd.machine.hw.arm64.walk import Stage1, Stage2, Translation, walk
from guest_memfd.machine.hw.buddy import Buddy
from guest_memfd.machine.hw.ram import Ram

KERNEL = d.AF | d.SH_INNER | d.UXN
ALL2 = d.AF | d.SH_INNER | d.NORMAL_WB << d.MEMATTR_SHIFT | d.S2_READ | d.S2_WRITE
HIGH = 0xffff_0000_0000_0000
VA = HIGH | 0x1234_5678_9000
PAGE = 0x8100_0000


class World:
    """A machine with RAM at 2 GiB and tables of both stages, nothing mapped."""

    def __init__(self, granule: Granule = K4, bits: int = 48, granule2: Granule = K4, bits2: int = 40, start2: int = 1,
                 concatenated: int = 2) -> None:
        self.ram = Ram(256 << 20)
        self.buddy = Buddy(self.ram, self.ram.base, 64 << 20)
        self.t1 = PageTable(self.ram, self.buddy, 1, granule, bits)
        self.t2 = PageTable(self.ram, self.buddy, 2, granule2, bits2, start2, concatenated)
        self.tcr = Tcr(t0sz=64 - bits, t1sz=64 - bits, tg0=granule, tg1=granule, tbi0=0, tbi1=0)
        sl0 = {K4: (2, 1, 0, 3), K16: (3, 2, 1, 0), K64: (3, 2, 1, 0)}[granule2][start2]
        self.vtcr = Vtcr(t0sz=64 - bits2, sl0=sl0, tg0=granule2)
        self.features = CpuFeatures()
        self.stage2 = True
        self.more: dict[str, object] = {}

    def identity2(self, largest: int = 0) -> None:
        self.t2.map(0x8000_0000, 256 << 20, 0x8000_0000, ALL2, largest)

    def regs(self) -> tuple[Stage1, Stage2 | None]:
        s1 = Stage1(self.tcr, self.t1.root, self.t1.root, features=self.features, **self.more)  # type: ignore[arg-type]
        return s1, Stage2(self.vtcr, self.t2.root | 7 << 48, self.features) if self.stage2 else None

    def go(self, va: int = VA, access: str = "r", el: int = 1) -> Translation:
        return walk(self.ram, va, access, el, *self.regs())  # type: ignore[arg-type]

    def fault(self, va: int = VA, access: str = "r", el: int = 1) -> tuple[str, int | None, int, bool]:
        with pytest.raises(Fault) as caught:
            self.go(va, access, el)
        fault = caught.value
        assert (fault.va, fault.access, fault.el) == (va, access, el)
        assert (fault.ipa is not None) == (fault.stage == 2)
        return fault.kind, fault.level, fault.stage, fault.s1ptw


@pytest.fixture
def one() -> World:
    """Stage 1 only, one page mapped."""
    world = World()
    world.stage2 = False
    world.t1.map(VA, 4096, PAGE, KERNEL)
    return world


@pytest.fixture
def two() -> World:
    world = World()
    world.identity2()
    world.t1.map(VA, 4096, PAGE, KERNEL)
    return world


# -- 1. which half, and what is outside -------------------------------------------------------------------------------


def test_bit_55_selects_the_half(one: World) -> None:
    other = PageTable(one.ram, one.buddy, 1)
    other.map(0x1000, 4096, PAGE + 0x5000, KERNEL)
    s1 = Stage1(one.tcr, other.root, one.t1.root)
    assert walk(one.ram, 0x1008, "r", 1, s1).pa == PAGE + 0x5008
    assert walk(one.ram, VA | 8, "r", 1, s1).pa == PAGE + 8
    with pytest.raises(Fault):
        walk(one.ram, HIGH | 0x1000, "r", 1, s1)


def test_bits_above_the_size_are_copies_of_bit_55(one: World) -> None:
    assert one.go(VA).pa == PAGE
    for bit in range(48, 64):
        if bit != 55:
            assert one.fault(VA ^ 1 << bit) == ("translation", 0, 1, False)


def test_tbi_ignores_the_top_byte_and_no_more(one: World) -> None:
    one.tcr = replace(one.tcr, tbi1=1)
    assert one.go(VA ^ 0x5a << 56).pa == PAGE
    assert one.fault(VA ^ 1 << 54) == ("translation", 0, 1, False)


def test_epd_and_e0pd_end_in_level_0(one: World) -> None:
    one.tcr = replace(one.tcr, epd1=1)
    assert one.fault() == ("translation", 0, 1, False)
    one.tcr = replace(one.tcr, epd1=0, epd0=1, e0pd1=1)
    assert one.go().pa == PAGE
    assert one.fault(el=0) == ("translation", 0, 1, False)


@pytest.mark.parametrize(("txsz", "ttst", "fine"), [
    (15, False, False), (16, False, True), (39, False, True), (40, False, False), (40, True, True), (48, True, True),
    (49, True, False)])
def test_size_of_the_half(txsz: int, ttst: bool, fine: bool) -> None:
    world = World(bits=64 - txsz if fine else 48)
    world.stage2, world.features = False, CpuFeatures(ttst=ttst)
    world.t1.map(0, 4096, PAGE, KERNEL)
    world.tcr = replace(world.tcr, t1sz=txsz)
    va = (1 << 64) - (1 << 64 - txsz)
    if fine:
        assert world.go(va).pa == PAGE
    else:
        assert world.fault(va) == ("translation", 0, 1, False)


@pytest.mark.parametrize(("txsz", "fine"), [(47, True), (48, False)])
def test_size_of_the_half_in_pages_of_64k(txsz: int, fine: bool) -> None:
    """FEAT_TTST allows 48, and with a 64K granule 47 (DDI 0487, D8.2)."""
    world = World(granule=K64, bits=17)
    world.stage2, world.features = False, CpuFeatures(ttst=True)
    world.t1.map(0, 1 << 16, 1 << 16, KERNEL)
    world.tcr = replace(world.tcr, t1sz=txsz)
    va = (1 << 64) - (1 << 64 - txsz)
    if fine:
        assert world.go(va).pa == 1 << 16
    else:
        assert world.fault(va) == ("translation", 0, 1, False)


def test_lpa2_is_refused() -> None:
    with pytest.raises(BadInput, match="DS"):
        Stage1(Tcr(ds=1), 0, 0)
    with pytest.raises(BadInput, match="DS"):
        Stage2(Vtcr(ds=1), 0)


def test_asid_and_vmid() -> None:
    assert Stage1(Tcr(a1=0), 5 << 48, 6 << 48).asid == 5
    assert Stage1(Tcr(a1=1), 5 << 48, 6 << 48).asid == 6
    assert Stage1(Tcr(as16=0), 0x1234 << 48, 0).asid == 0x34
    assert Stage2(Vtcr(), 0x1234 << 48).vmid == 0x1234
    assert Stage2(Vtcr(vs=0), 0x1234 << 48).vmid == 0x34


# -- 2. bases and output sizes ----------------------------------------------------------------------------------------


def test_base_beyond_ips_is_an_address_size_fault_of_level_0(one: World) -> None:
    s1 = Stage1(replace(one.tcr, ips=0), 0, one.t1.root | 1 << 33)
    with pytest.raises(Fault) as caught:
        walk(one.ram, VA, "r", 1, s1)
    assert (caught.value.kind, caught.value.level, caught.value.fsc) == ("address size", 0, 0)
    assert walk(one.ram, VA, "r", 1, Stage1(replace(one.tcr, ips=0), 0, one.t1.root)).pa == PAGE


def test_low_bits_of_a_base_are_dropped(one: World) -> None:
    s1 = Stage1(one.tcr, 0, one.t1.root | 0x7ff)
    assert walk(one.ram, VA, "r", 1, s1).pa == PAGE


def test_next_table_and_leaf_beyond_ips(one: World) -> None:
    path = one.t1.path(VA)
    for entry in path:
        one.ram.write64(entry.address, entry.value | 1 << 45)
        one.tcr = replace(one.tcr, ips=4)
        assert one.fault() == ("address size", entry.level, 1, False)
        one.ram.write64(entry.address, entry.value)
        assert one.go().pa == PAGE


def test_implemented_size_bounds_ips(one: World) -> None:
    one.tcr = replace(one.tcr, ips=5)
    entry = one.t1.lookup(VA)
    one.ram.write64(entry.address, entry.value | 1 << 44)
    one.features = CpuFeatures(pa_bits=44)
    assert one.fault() == ("address size", 3, 1, False)


def test_52_bits_with_64k_pages() -> None:
    world = World(granule=K64)
    world.stage2 = False
    far = 0xa_0000_0000_0000 | 0x8100_0000
    world.t1.map(VA & -65536, 65536, far, KERNEL)
    world.tcr, world.features = replace(world.tcr, ips=6), CpuFeatures(pa_bits=52)
    assert world.go(VA & -65536 | 8).pa == far | 8
    world.tcr = replace(world.tcr, ips=5)
    assert world.fault(VA & -65536) == ("address size", 3, 1, False)
    # The base has its top bits in 5:2 then.
    assert Stage1(replace(world.tcr, ips=6), 0xa << 2 | 0x8100_0000, 0, features=world.features).low.base == far
    # And 4 TiB blocks exist.
    entry = world.t1.path(VA)[0]
    world.ram.write64(entry.address, KERNEL | d.VALID)
    world.tcr = replace(world.tcr, ips=6)
    assert world.go(VA).size == 4 << 40
    world.features = CpuFeatures()
    assert world.fault() == ("translation", 1, 1, False)


@pytest.mark.parametrize("stage2", [False, True])
def test_bits_15_to_12_of_a_4k_page_are_not_its_top_bits(stage2: bool) -> None:
    world = World()
    world.features, world.stage2 = CpuFeatures(pa_bits=52), stage2
    world.tcr, world.vtcr = replace(world.tcr, ips=6), replace(world.vtcr, ps=6)
    world.t1.map(VA, 4096, PAGE + 0x5000, KERNEL)
    world.identity2(3)
    assert world.go(VA | 8).pa == PAGE + 0x5008


# -- 3. levels --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("granule", "bits"), [
    (K4, 48), (K4, 39), (K4, 30), (K16, 48), (K16, 47), (K16, 36), (K64, 48), (K64, 42)])
def test_every_leaf_size_of_every_geometry(granule: Granule, bits: int) -> None:
    world = World(granule=granule, bits=bits)
    world.stage2 = False
    start = granule.start_level(bits)
    for level in range(start, 4):
        size = 1 << granule.level_shift(level)
        if (level != 3 and not granule.block_legal(level)) or size >= 1 << bits - 1:
            continue
        world.t1 = PageTable(world.ram, world.buddy, 1, granule, bits)
        world.t1.map(size, size, 2 * size, KERNEL)
        high = (1 << 64) - (1 << bits)
        for va in (high | size, size, size + size - 8):
            found = world.go(va)
            assert found.pa == va - (high if va >> 63 else 0) + size
            assert found.s1 is not None
            assert (found.s1.level, found.size) == (level, size)
        assert world.fault(2 * size)[0] == "translation"


@pytest.mark.parametrize("granule", [K4, K16, K64])
def test_invalid_and_reserved_descriptors_at_every_level(granule: Granule) -> None:
    world = World(granule=granule)
    world.stage2 = False
    va = VA & -granule.size
    world.t1.map(va, granule.size, PAGE, KERNEL)
    for entry in world.t1.path(va):
        for value in (0, 2, entry.value & ~1, *([] if granule.block_legal(entry.level) else [entry.value & ~2])):
            world.ram.write64(entry.address, value)
            assert world.fault(va) == ("translation", entry.level, 1, False)
        world.ram.write64(entry.address, entry.value)
    assert world.go(va).pa == PAGE


def test_external_abort_on_a_walk(one: World) -> None:
    for entry in one.t1.path(VA)[:-1]:
        one.ram.write64(entry.address, 0x1_0000_0003)
        kind, level, stage, s1ptw = one.fault()
        assert (kind, stage, s1ptw) == ("external abort", 1, False)
        assert level == entry.level + 1
        one.ram.write64(entry.address, entry.value)


def test_present_invalid_faults(one: World) -> None:
    entry = one.t1.lookup(VA)
    one.ram.write64(entry.address, entry.value & ~1 | d.PRESENT_INVALID)
    assert one.fault() == ("translation", 3, 1, False)


def test_contiguous_bit_changes_nothing_without_a_tlb(one: World) -> None:
    entry = one.t1.lookup(VA)
    one.ram.write64(entry.address, entry.value | d.CONTIGUOUS)
    assert one.go().pa == PAGE
    assert one.fault(VA + 4096) == ("translation", 3, 1, False)


# -- 4. order of the checks on a leaf ---------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [1, 2])
def test_address_size_before_access_flag_before_permission(two: World, stage: int) -> None:
    two.vtcr, two.tcr = replace(two.vtcr, ps=4), replace(two.tcr, ips=4)
    if stage == 2:
        two.t2.split(PAGE, 3)
    entry = two.t1.lookup(VA) if stage == 1 else two.t2.lookup(PAGE)
    unpermitted = entry.value & ~d.AF | d.AP_RO if stage == 1 else entry.value & ~(d.AF | d.S2_WRITE)
    for value, kind in ((unpermitted | 1 << 44, "address size"), (unpermitted, "access flag"),
                        (unpermitted | d.AF, "permission")):
        two.ram.write64(entry.address, value)
        assert two.fault(access="w") == (kind, 3, stage, False)
    two.ram.write64(entry.address, entry.value)
    assert two.go(access="w").pa == PAGE


# AP[2:1], APTable, PXN, UXN -> what EL1 and EL0 may do (Arm ARM, tables of D8.4).
RIGHTS = {0: ("rw", ""), 1: ("rw", "rw"), 2: ("r", ""), 3: ("r", "r")}


@pytest.mark.parametrize("ap", range(4))
def test_permissions_of_every_combination(ap: int) -> None:
    world = World()
    world.stage2 = False
    world.t1.map(VA, 4096, PAGE, KERNEL)
    entry, table = world.t1.lookup(VA), world.t1.path(VA)[1]
    for ap_table, pxn, uxn, pxn_table, uxn_table, wxn in product(range(4), *[range(2)] * 5):
        world.ram.write64(entry.address, entry.value & ~d.UXN | ap << 6 | pxn << 53 | uxn << 54)
        world.ram.write64(table.address, table.value | ap_table << 61 | pxn_table << 59 | uxn_table << 60)
        world.more = {"wxn": bool(wxn)}
        el1, el0 = RIGHTS[ap]
        if ap_table & 2:
            el1, el0 = el1.replace("w", ""), el0.replace("w", "")
        if ap_table & 1:
            el0 = ""
        if not (pxn or pxn_table or "w" in el0 or (wxn and "w" in el1)):
            el1 += "x"
        if not (uxn or uxn_table or (wxn and "w" in el0)):
            el0 += "x"
        for el, allowed in ((1, el1), (0, el0)):
            for access in "rwx":
                if access in allowed:
                    found = world.go(VA, access, el)
                    assert (found.readable, found.writable, found.executable) == tuple(c in allowed for c in "rwx")
                else:
                    assert world.fault(VA, access, el) == ("permission", 3, 1, False)


def test_hierarchical_bits_can_be_switched_off(one: World) -> None:
    table = one.t1.path(VA)[1]
    one.ram.write64(table.address, table.value | 2 << 61)
    assert one.fault(access="w") == ("permission", 3, 1, False)
    one.tcr = replace(one.tcr, hpd1=1)
    assert one.go(access="w").pa == PAGE


def test_pan_takes_data_access_from_el1_only_where_el0_has_it(one: World) -> None:
    one.more = {"pan": True}
    assert one.go(access="w").writable
    entry = one.t1.lookup(VA)
    one.ram.write64(entry.address, entry.value & ~d.UXN | d.AP_EL0 | d.AP_RO)
    assert one.fault(access="r") == ("permission", 3, 1, False)
    assert one.go(access="x").executable
    assert not one.go(access="x").readable
    assert one.go(access="r", el=0).readable


# -- 5. stage 2 -------------------------------------------------------------------------------------------------------


def test_two_stages(two: World) -> None:
    found = two.go(VA | 0x123)
    assert (found.pa, found.size) == (PAGE | 0x123, 4096)
    assert found.s1 is not None
    assert found.s2 is not None
    assert (found.s1.level, found.s2.level) == (3, 2)
    assert found.readable
    assert found.writable
    assert found.executable


@pytest.mark.parametrize(("granule", "bits", "start", "concatenated"), [
    (K4, 40, 1, 2), (K4, 42, 1, 8), (K4, 43, 1, 16), (K4, 44, 0, 1), (K4, 48, 0, 1), (K4, 39, 1, 1), (K4, 34, 2, 16),
    (K4, 40, 0, 1), (K16, 40, 2, 16), (K16, 36, 2, 1), (K16, 42, 1, 1), (K64, 42, 2, 1), (K64, 46, 2, 16), (K64, 33, 3, 16),
    (K64, 48, 1, 1)])
def test_first_levels_and_concatenated_tables(granule: Granule, bits: int, start: int, concatenated: int) -> None:
    world = World(granule2=granule, bits2=bits, start2=start, concatenated=concatenated)
    world.more = {"enabled": False}
    for ia in (0x8000_0000, (1 << bits) - granule.size):
        world.t2.map(ia, granule.size, PAGE, ALL2)
        found = world.go(ia | 0x40)
        assert found.pa == PAGE | 0x40
        assert found.s1 is None
    assert world.t2.root % (concatenated << granule.shift) == 0
    assert world.fault(0x4000_0000)[0::2] == ("translation", 2)


@pytest.mark.parametrize(("granule", "sl0", "smallest", "largest"), [
    (K4, 0, 22, 34), (K4, 1, 31, 43), (K4, 2, 40, 48), (K16, 0, 15, 29), (K16, 1, 26, 40), (K16, 2, 37, 48),
    (K64, 0, 17, 33), (K64, 1, 30, 46), (K64, 2, 43, 48)])
def test_sl0_has_to_fit_the_size(granule: Granule, sl0: int, smallest: int, largest: int) -> None:
    features = CpuFeatures(ttst=True)
    for bits in range(16, 49):
        plan = Stage2(Vtcr(t0sz=64 - bits, sl0=sl0, tg0=granule), 0, features).plan
        assert (plan.wrong is None) == (smallest <= bits <= largest), bits
    world = World()
    world.vtcr = Vtcr(t0sz=64 - smallest + 1, sl0=sl0, tg0=granule)
    world.more = {"enabled": False}
    assert world.fault(0x1000) == ("translation", 0, 2, False)


def test_reserved_sl0_and_sizes_beyond_the_implementation() -> None:
    assert Stage2(Vtcr(tg0=K64, sl0=3), 0).plan.wrong == ("translation", 0)
    assert Stage2(Vtcr(t0sz=64 - 30, sl0=3), 0).plan.wrong == ("translation", 0)
    assert Stage2(Vtcr(t0sz=64 - 44, sl0=2), 0, CpuFeatures(pa_bits=44)).plan.wrong is None
    assert Stage2(Vtcr(t0sz=64 - 45, sl0=2), 0, CpuFeatures(pa_bits=44)).plan.wrong == ("translation", 0)
    assert Stage2(Vtcr(t0sz=64 - 42, sl0=2), 0, CpuFeatures(pa_bits=42)).plan.wrong == ("translation", 0)


def test_linear_for_the_smaller_of_the_two_leaves(two: World) -> None:
    two.t1.map(HIGH | 0x4000_0000, 2 << 20, 0x8200_0000, KERNEL)
    assert two.go(HIGH | 0x4000_0000).size == 2 << 20
    two.t2.split(0x8200_0000, 3)
    assert two.go(HIGH | 0x4000_0000).size == 4096


def test_ipa_beyond_the_size_is_a_translation_fault_of_level_0(two: World) -> None:
    two.t1.map(VA + 4096, 4096, 1 << 40, KERNEL)
    assert two.fault(VA + 4096) == ("translation", 0, 2, False)


def test_stage2_base_beyond_ps(two: World) -> None:
    two.vtcr = replace(two.vtcr, ps=0)
    assert two.go().pa == PAGE
    s1, _ = two.regs()
    with pytest.raises(Fault) as caught:
        walk(two.ram, VA, "r", 1, s1, Stage2(two.vtcr, two.t2.root | 1 << 34))
    assert (caught.value.kind, caught.value.level, caught.value.stage) == ("address size", 0, 2)


def test_stage2_permissions(two: World) -> None:
    two.t2.split(PAGE, 3)
    entry = two.t2.lookup(PAGE)
    bare = entry.value & ~(d.S2_READ | d.S2_WRITE)
    for s2ap, xn in product(range(4), range(4)):
        two.ram.write64(entry.address, bare | s2ap << 6 | xn << 53)
        t1 = two.t1.lookup(VA)
        two.ram.write64(t1.address, t1.value & ~d.UXN | d.AP_EL0 | d.AP_RO)
        for el, good in ((1, (0, 3)), (0, (0, 1))):
            if xn in good:
                assert two.go(access="x", el=el).executable
            else:
                assert two.fault(access="x", el=el) == ("permission", 3, 2, False)
            if s2ap & 1:
                assert two.go(el=el).readable
            else:
                assert two.fault(el=el) == ("permission", 3, 2, False)
        two.ram.write64(t1.address, t1.value)
        if s2ap & 2:
            assert two.go(access="w").writable
        else:
            assert two.fault(access="w") == ("permission", 3, 2, False)


def test_without_xnx_only_the_upper_bit_counts(two: World) -> None:
    two.t2.split(PAGE, 3)
    entry = two.t2.lookup(PAGE)
    two.ram.write64(entry.address, entry.value | 1 << 53)
    assert two.fault(access="x") == ("permission", 3, 2, False)
    two.features = CpuFeatures(xnx=False)
    assert two.go(access="x").executable
    two.ram.write64(entry.address, entry.value | 3 << 53)
    assert two.fault(access="x") == ("permission", 3, 2, False)


def test_stage1_permission_comes_before_stage2(two: World) -> None:
    two.t1.map(VA, 4096, 0x9999_0000_0000 & (1 << 40) - 1, KERNEL | d.AP_RO)
    assert two.fault(access="w") == ("permission", 3, 1, False)
    assert two.fault(access="r") == ("translation", 1, 2, False)


@pytest.mark.parametrize("level", [1, 2, 3])
def test_a_walk_of_stage1_needs_stage2_and_reports_its_level(level: int) -> None:
    world = World()
    world.identity2(largest=max(level, 2))
    world.t1.map(VA, 4096, PAGE, KERNEL)
    for at in world.t1.path(VA):
        if level > 1:
            world.t2.split(at.address, level)
        entry = world.t2.lookup(at.address) if level > 1 else world.t2.path(at.address)[0]
        for value, kind in ((0, "translation"), (entry.value & ~d.AF, "access flag"),
                            (entry.value & ~d.S2_READ, "permission"), (entry.value | 1 << 45, "address size")):
            if level == 1 and kind in ("access flag", "permission"):
                continue            # a table has no such bits
            world.vtcr = replace(world.vtcr, ps=3)
            world.ram.write64(entry.address, value)
            assert world.fault() == (kind, level, 2, True)
            assert world.fault(access="w") == (kind, level, 2, True)
        world.ram.write64(entry.address, entry.value)
        assert world.go().pa == PAGE


def test_a_walk_of_stage1_needs_no_stage2_write(two: World) -> None:
    two.t2.split(two.t1.lookup(VA).address, 3)
    entry = two.t2.lookup(two.t1.lookup(VA).address)
    two.ram.write64(entry.address, entry.value & ~d.S2_WRITE | d.S2_XN)
    assert two.go(access="w").pa == PAGE
    assert two.go(access="x").pa == PAGE


def test_external_aborts_of_stage2(two: World) -> None:
    two.t2.split(PAGE, 3)
    first, table, _ = two.t2.path(PAGE)
    two.ram.write64(table.address, 0x1_0000_0003)
    assert two.fault() == ("external abort", 3, 2, False)
    # The table of stage 1 lies in another block of stage 2: send its stage-2 walk nowhere as well.
    two.ram.write64(first.address, 0x1_0000_0003)
    assert two.fault() == ("external abort", 2, 2, True)


def test_stage1_off() -> None:
    world = World()
    world.more, world.stage2 = {"enabled": False}, False
    found = world.go(0x1234_5678)
    assert (found.pa, found.s1, found.s2) == (0x1234_5678, None, None)
    assert found.writable
    assert found.executable
    assert world.fault(1 << 48) == ("address size", 0, 1, False)
    assert world.fault(0xab << 56 | 0x1000) == ("address size", 0, 1, False)
    world.tcr = replace(world.tcr, tbi0=1, tbi1=1)
    assert world.go(0xab << 56 | 0x1000).pa == 0x1000
    assert "PA=0x12345678 rwx at EL1" in repr(found)

"""Descriptors, registers, faults and syndromes: encodings against values that Linux and real exceptions have."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guest_memfd.errors import BadInput
from guest_memfd.machine.hw.arm64 import descriptor as d
from guest_memfd.machine.hw.arm64.fault import (
    ACCESS_FLAG,
    ADDRESS_SIZE,
    ALIGNMENT,
    EXTERNAL_ABORT,
    PERMISSION,
    TLB_CONFLICT,
    TRANSLATION,
    Fault,
    LoadStore,
)
from guest_memfd.machine.hw.arm64.granule import GRANULES, K4, K16, K64, Granule
from guest_memfd.machine.hw.arm64.registers import Tcr, Vtcr
from guest_memfd.machine.hw.arm64.syndrome import Syndrome

# -- geometry ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("granule", "level", "size", "run"), [
    (K4, 0, 512 << 30, 1), (K4, 1, 1 << 30, 16), (K4, 2, 2 << 20, 16), (K4, 3, 4 << 10, 16),
    (K16, 0, 128 << 40, 1), (K16, 1, 64 << 30, 1), (K16, 2, 32 << 20, 32), (K16, 3, 16 << 10, 128),
    (K64, 1, 4 << 40, 1), (K64, 2, 512 << 20, 32), (K64, 3, 64 << 10, 32),
])
def test_sizes_and_runs(granule: Granule, level: int, size: int, run: int) -> None:
    assert 1 << granule.level_shift(level) == size
    assert granule.contiguous(level) == run


@pytest.mark.parametrize(("granule", "bits", "level"), [
    (K4, 48, 0), (K4, 40, 0), (K4, 39, 1), (K4, 30, 2), (K16, 48, 0), (K16, 47, 1), (K16, 36, 2), (K64, 48, 1),
    (K64, 42, 2)])
def test_start_level(granule: Granule, bits: int, level: int) -> None:
    assert granule.start_level(bits) == level


@pytest.mark.parametrize("granule", GRANULES)
def test_kinds_at_every_level(granule: Granule) -> None:
    blocks = {K4: (1, 2), K16: (2,), K64: (2,)}[granule]
    for level in range(4):
        assert d.kind(0, level, granule) == d.kind(2, level, granule) == "invalid"
        assert d.kind(3, level, granule) == ("page" if level == 3 else "table")
        assert d.kind(1, level, granule) == ("block" if level in blocks else "invalid")     # 0b01 at level 3 is reserved
    assert d.kind(1, 1, K64, pa_bits=52) == "block"


# -- repr ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("descriptor", "text"), [
    (d.Stage1Leaf(0x0068000080001707, 3),
     "L3 page OA=0x80001000 AttrIndx=1 AP=EL1:RW,EL0:- SH=inner AF nG=0 PXN UXN DBM"),
    (d.Stage1Leaf(0x00e8000080001707, 3),
     "L3 page OA=0x80001000 AttrIndx=1 AP=EL1:RW,EL0:- SH=inner AF nG=0 PXN UXN DBM SW=0x1"),
    (d.Stage1Leaf(0x0078000080000705, 2),
     "L2 block OA=0x80000000 AttrIndx=1 AP=EL1:RW,EL0:- SH=inner AF nG=0 PXN UXN contiguous DBM"),
    (d.Stage1Leaf(0x00200000900008c3, 3), "L3 page OA=0x90000000 AttrIndx=0 AP=EL1:RO,EL0:RO SH=non AF=0 nG=1 PXN"),
    (d.Stage2Leaf(0x00000000800007fd, 1), "L1 block OA=0x80000000 MemAttr=0xf S2AP=RW SH=inner AF"),
    (d.Stage2Leaf(0x0040000009000447, 3), "L3 page OA=0x9000000 MemAttr=0x1 S2AP=R SH=non AF XN"),
    (d.Stage1Leaf(0, 3), "L3 invalid"), (d.Stage1Leaf(0x80005003, 1), "L1 table ->0x80005000"),
    (d.Stage2Leaf(0, 3), "L3 invalid"), (d.Stage2Leaf(0x80005003, 1), "L1 table ->0x80005000"),
    (d.TableDescriptor(0x1800000080005003, 1), "L1 table ->0x80005000 PXNTable UXNTable"),
    (d.TableDescriptor(0x6000000080005003, 1), "L1 table ->0x80005000 APTable=RO,no EL0"),
    (d.Invalid(0, 2), "L2 invalid"),
    (d.Invalid(0x80001f06, 3), "L3 invalid (present-invalid) 0x0000000080001f06"),
    (d.Invalid(0x80001705, 3), "L3 invalid (reserved encoding) 0x0000000080001705"),
])
def test_repr(descriptor: object, text: str) -> None:
    assert repr(descriptor) == text


def test_view_picks_the_right_one() -> None:
    assert isinstance(d.view(0x80001703, 3, 1), d.Stage1Leaf)
    assert isinstance(d.view(0x80001703, 3, 2), d.Stage2Leaf)
    assert isinstance(d.view(0x80001703, 2, 1), d.TableDescriptor)
    assert isinstance(d.view(0x80001701, 3, 1), d.Invalid)
    assert d.Invalid(d.PRESENT_INVALID, 3).present_invalid
    assert not d.Invalid(0, 3).present_invalid
    assert repr(d.Stage1Leaf(0x80001701, 3)).startswith("L3 invalid")


@given(st.sampled_from(GRANULES), st.integers(1, 3), st.integers(0, (1 << 48) - 1), st.integers(0, (1 << 12) - 1))
def test_leaf_round_trip(granule: Granule, level: int, oa: int, bits: int) -> None:
    oa &= -(1 << granule.level_shift(level))
    value = d.leaf(oa, (bits & 0x3ff) << 2, level)
    if d.kind(value, level, granule) != "invalid":
        assert d.output_address(value, level, granule) == oa


def test_a_52_bit_address_has_its_top_bits_in_15_to_12() -> None:
    value = d.leaf(0xa_8000_0000_0000, d.AF, 3)
    assert value >> 12 & 15 == 0xa
    assert d.output_address(value, 3, K64, pa_bits=52) == 0xa_8000_0000_0000
    assert d.output_address(value, 3, K64) == 0x8000_0000_0000


# -- registers -------------------------------------------------------------------------------------------------------------


def test_tcr_as_linux_sets_it() -> None:
    # T0SZ=T1SZ=16, inner and outer write-back, inner shareable, 4K in both halves, IPS 48 bits, 16-bit ASIDs.
    assert Tcr().value == 0x15b5103510
    assert Tcr.decode(0x15b5103510) == Tcr()
    assert repr(Tcr(t0sz=25, tg1=K64)) == "Tcr(t0sz=25, tg1=64K)"


@pytest.mark.parametrize(("granule", "tg0", "tg1"), [(K4, 0, 2), (K16, 2, 1), (K64, 1, 3)])
def test_the_two_granule_fields_differ(granule: Granule, tg0: int, tg1: int) -> None:
    value = Tcr(tg0=granule, tg1=granule).value
    assert (value >> 14 & 3, value >> 30 & 3) == (tg0, tg1)


@given(st.integers(0, (1 << 64) - 1))
def test_decode_and_encode(value: int) -> None:
    tcr, vtcr = Tcr.decode(value), Vtcr.decode(value)
    assert Tcr.decode(tcr.value) == tcr
    assert Vtcr.decode(vtcr.value) == vtcr
    assert vtcr.value >> 31 & 1


def test_a_field_that_does_not_fit() -> None:
    with pytest.raises(BadInput, match="t0sz = 64"):
        Tcr(t0sz=64).value  # noqa: B018


@pytest.mark.parametrize(("bits", "start"), [(40, 1), (42, 1), (43, 1), (44, 0), (48, 0), (36, 1), (32, 2)])
def test_vtcr_as_kvm_picks_it(bits: int, start: int) -> None:
    vtcr = Vtcr.for_ipa(bits)
    assert vtcr.start_level == start
    assert vtcr.t0sz == 64 - bits


# -- faults ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "level", "fsc"), [
    (ADDRESS_SIZE, 0, 0x00), (ADDRESS_SIZE, 3, 0x03), (TRANSLATION, 0, 0x04), (TRANSLATION, 3, 0x07), (ACCESS_FLAG, 1, 0x09),
    (ACCESS_FLAG, 3, 0x0b), (PERMISSION, 1, 0x0d), (PERMISSION, 3, 0x0f), (EXTERNAL_ABORT, None, 0x10),
    (EXTERNAL_ABORT, 2, 0x16), (ALIGNMENT, None, 0x21), (TLB_CONFLICT, None, 0x30)])
def test_fault_status_codes(kind: str, level: int | None, fsc: int) -> None:
    assert Fault(kind, level, 1).fsc == fsc


def test_observed_syndromes() -> None:
    hole = {"va": 0xffff000002201000, "ipa": 0x2201000}
    assert Fault(TRANSLATION, 3, 1, va=hole["va"]).esr_el1() == 0x96000007
    assert Fault(TRANSLATION, 3, 1, va=hole["va"], access="w").esr_el1() == 0x96000047
    assert Fault(TRANSLATION, 3, 2, **hole).esr_el2(LoadStore(1)) == 0x93c18007
    assert Fault(TRANSLATION, 3, 2, **hole).hpfar == 0x22010
    assert Fault(EXTERNAL_ABORT, None, 2, **hole).esr_el1() == 0x96000010
    # What pKVM makes of the second: same EL, and S1PTW as its mark.
    injected = Syndrome.decode(0x93c18007)
    assert Syndrome(injected.ec + 1, iss=injected.iss | 1 << 7).value == 0x97c18087


def test_fnv_only_for_an_external_abort_of_the_access_itself() -> None:
    assert Fault(EXTERNAL_ABORT, None, 1).esr_el1(far_valid=False) == 0x96000410
    assert Fault(EXTERNAL_ABORT, None, 1, el=0).esr_el2(far_valid=False) == 0x92000410
    assert Fault(EXTERNAL_ABORT, 2, 1).esr_el1(far_valid=False) == 0x96000016
    assert Fault(TRANSLATION, 3, 1).esr_el1(far_valid=False) == 0x96000007


def test_exception_class_by_el_and_access() -> None:
    for el, access, ec1, ec2 in ((0, "r", 0x24, 0x24), (1, "r", 0x25, 0x24), (0, "x", 0x20, 0x20), (1, "x", 0x21, 0x20)):
        fault = Fault(TRANSLATION, 2, 2, access=access, el=el)
        assert fault.esr_el1() >> 26 == ec1
        assert fault.esr_el2() >> 26 == ec2


def test_isv_only_for_a_stage2_fault_of_the_access_itself() -> None:
    load = LoadStore(7, size=2, sixty_four=False, sign_extend=True, acquire_release=True)
    decoded = Syndrome.decode(Fault(PERMISSION, 3, 2, access="w").esr_el2(load))
    assert (decoded.isv, decoded.sas, decoded.sse, decoded.srt, decoded.sf, decoded.ar, decoded.write) == \
        (True, 1, True, 7, False, True, True)
    for fault in (Fault(TRANSLATION, 3, 2, s1ptw=True), Fault(TRANSLATION, 3, 1), Fault(TRANSLATION, 3, 2, access="x"),
                  Fault(EXTERNAL_ABORT, None, 2)):
        assert not Syndrome.decode(fault.esr_el2(load)).isv
    assert not Syndrome.decode(Fault(TRANSLATION, 3, 2).esr_el2()).isv


def test_when_hpfar_is_valid() -> None:
    for kind in (TRANSLATION, ADDRESS_SIZE, ACCESS_FLAG):
        assert Fault(kind, 3, 2, ipa=0x1234567).hpfar == 0x12340
    assert Fault(PERMISSION, 3, 2, ipa=0x1000).hpfar is None
    assert Fault(PERMISSION, 3, 2, s1ptw=True, ipa=0x1000).hpfar == 0x10
    assert Fault(TRANSLATION, 3, 1, va=0x1000).hpfar is None
    assert Fault(EXTERNAL_ABORT, None, 2, ipa=0x1000).hpfar is None


def test_far_needs_an_address() -> None:
    assert Fault(TRANSLATION, 3, 1, va=0x77).far == 0x77
    with pytest.raises(ValueError, match="without a virtual address"):
        Fault(TRANSLATION, 3, 1).far  # noqa: B018


@pytest.mark.parametrize(("value", "text"), [
    (0x96000010, "ESR 0x96000010: DABT (current EL), IL=32 bits, DFSC=0x10 synchronous external abort, read"),
    (0x96000047, "ESR 0x96000047: DABT (current EL), IL=32 bits, DFSC=0x07 translation fault, level 3, write"),
    (0x93c18007,
     "ESR 0x93c18007: DABT (lower EL), IL=32 bits, DFSC=0x07 translation fault, level 3, read, doubleword of x1"),
    (0x97c18087,
     "ESR 0x97c18087: DABT (current EL), IL=32 bits, DFSC=0x07 translation fault, level 3, read, doubleword of x1, S1PTW"),
    (0x8600000f, "ESR 0x8600000f: IABT (current EL), IL=32 bits, IFSC=0x0f permission fault, level 3"),
    (0x96000410, "ESR 0x96000410: DABT (current EL), IL=32 bits, DFSC=0x10 synchronous external abort, read, FnV"),
    (0x5a000000, "ESR 0x5a000000: HVC64, IL=32 bits, ISS=0x0"),
])
def test_syndrome_reads_like_the_manual(value: int, text: str) -> None:
    assert repr(Syndrome.decode(value)) == text


@given(st.integers(0, (1 << 56) - 1))
def test_syndrome_round_trip(value: int) -> None:
    assert Syndrome.decode(value).value == value
    assert repr(Syndrome.decode(value))


def test_fault_repr() -> None:
    fault = Fault(TRANSLATION, 2, 2, True, 0xffff000000001000, 0x80001000, "w", 0)
    assert str(fault) == "<translation fault L2 stage 2 on a stage-1 walk write at EL0 VA=0xffff000000001000 IPA=0x80001000>"

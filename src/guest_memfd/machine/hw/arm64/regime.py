"""The registers of a context, and what follows from them. Nothing here depends on the tables of an address.

What is wrong with the registers themselves (TxSZ, SL0, a table base beyond the output size) is found here once and
raised by the walk on every translation. Arm ARM: AArch64.S1TxSZFaults, S1TTBaseAddress, S2InvalidSL,
S2InconsistentSL, S2TTBaseAddress.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

from guest_memfd.errors import BadInput
from guest_memfd.machine.hw.arm64.fault import ADDRESS_SIZE, TRANSLATION
from guest_memfd.machine.hw.arm64.granule import K4, K16, K64, Granule
from guest_memfd.machine.hw.arm64.registers import FEATURES, PA_BITS, CpuFeatures, Tcr, Vtcr
from guest_memfd.words.units import Va


class WalkStep(NamedTuple):
    """One level of lookup; *mask* is for the entry number, *leaf* the output address of a block or page (0: illegal)."""

    level: int
    shift: int
    mask: int
    leaf: int
    run: int        # log2 of the bytes of a contiguous run


@dataclass(frozen=True, slots=True)
class Plan:
    """How to walk one half of stage 1, or stage 2.

    *limit* is the first address beyond the output size; *wrong* what every translation ends in, if anything.
    """

    granule: Granule
    ia_bits: int
    steps: tuple[WalkStep, ...]
    base: int
    limit: int
    wide: bool
    next_table: int
    wrong: tuple[str, int] | None
    tag_mask: int = 0
    tag_value: int = 0
    epd: bool = False
    e0pd: bool = False
    hierarchical: bool = True


@lru_cache(maxsize=256)
def _steps(granule: Granule, ia_bits: int, start: int, pa_bits: int) -> tuple[WalkStep, ...]:
    found = []
    for level in range(start, 4):
        shift = granule.level_shift(level)
        # The first level resolves all bits that are left: more than one table of them where stage 2 concatenates,
        # fewer entries than a table where the size asks for less.
        mask = (1 << (ia_bits - shift if level == start else granule.stride)) - 1
        legal = level == 3 or granule.block_legal(level, pa_bits)
        found.append(WalkStep(level, shift, mask, (1 << 48) - (1 << shift) if legal else 0,
                          shift + granule.contiguous(level).bit_length() - 1))
    return tuple(found)


# Bits of output address, of a table base as well.
def _output_bits(code: int, granule: Granule, features: CpuFeatures) -> int:
    return min(PA_BITS[code], features.pa_bits, 52 if granule is K64 else 48)


# The base from a TTBR, aligned down to the size of the first table.
def _base(ttbr: int, granule: Granule, ia_bits: int, start: int, code: int, features: CpuFeatures) -> int:
    size = ia_bits - granule.level_shift(start) + 3
    base = ttbr & (1 << 48) - 2
    if granule is K64 and code == 6 and features.pa_bits >= 52:
        # A 52-bit base has its upper bits in TTBR[5:2], so it is aligned to 64 bytes at least.
        size = max(size, 6)
        base = base & ~63 | (ttbr >> 2 & 15) << 48
    return base & -(1 << size)


# TxSZ out of range may fault or be clamped; here it faults.
def _size_ok(txsz: int, smallest: int, granule: Granule, features: CpuFeatures) -> bool:
    largest = 39 if not features.ttst else 47 if granule is K64 else 48
    return smallest <= txsz <= largest


@dataclass(frozen=True)
class Stage1:
    """TCR_EL1, TTBR0/1_EL1, MAIR_EL1, SCTLR_EL1.M (*enabled*) and WXN, PSTATE.PAN; `low` and `high` are the halves' plans.

    With stage 1 off the input address is the output address and everything is permitted. Raises BadInput for TCR.DS.
    """

    tcr: Tcr
    ttbr0: int
    ttbr1: int
    mair: int = 0
    enabled: bool = True
    pan: bool = False
    wxn: bool = False
    features: CpuFeatures = FEATURES
    low: Plan = field(init=False, repr=False, compare=False)
    high: Plan = field(init=False, repr=False, compare=False)
    asid: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.tcr.ds:
            raise BadInput("TCR_EL1.DS: 52-bit addresses with 4K and 16K granules are not modelled")
        object.__setattr__(self, "low", self._plan(0))
        object.__setattr__(self, "high", self._plan(1))
        asid = (self.ttbr1 if self.tcr.a1 else self.ttbr0) >> 48
        object.__setattr__(self, "asid", asid if self.tcr.as16 else asid & 0xff)

    def _plan(self, half: int) -> Plan:
        tcr, features = self.tcr, self.features
        txsz, granule, ttbr, tbi, epd, e0pd, hpd = (
            (tcr.t1sz, tcr.tg1, self.ttbr1, tcr.tbi1, tcr.epd1, tcr.e0pd1, tcr.hpd1) if half else
            (tcr.t0sz, tcr.tg0, self.ttbr0, tcr.tbi0, tcr.epd0, tcr.e0pd0, tcr.hpd0))
        wrong = None if _size_ok(txsz, 16, granule, features) else (TRANSLATION, 0)
        ia_bits = 64 - min(max(txsz, 16), 48)
        start = granule.start_level(ia_bits)
        base = _base(ttbr, granule, ia_bits, start, tcr.ips, features)
        limit = 1 << _output_bits(tcr.ips, granule, features)
        if wrong is None and base >= limit:
            wrong = ADDRESS_SIZE, 0
        # The bits that must all equal VA[55]; with TBI the top byte is not among them.
        tag_mask = (1 << (56 if tbi else 64)) - (1 << ia_bits)
        return Plan(granule, ia_bits, _steps(granule, ia_bits, start, features.pa_bits), base, limit,
                    granule is K64 and features.pa_bits >= 52, (1 << 48) - granule.size, wrong,
                    tag_mask, tag_mask if half else 0, bool(epd), bool(e0pd), not hpd)

    def half(self, va: Va) -> Plan:
        """The half that VA[55] selects."""
        return self.high if va >> 55 & 1 else self.low


@dataclass(frozen=True)
class Stage2:
    """VTCR_EL2 and VTTBR_EL2 with HCR_EL2.VM on. Raises BadInput for VTCR.DS."""

    vtcr: Vtcr
    vttbr: int
    features: CpuFeatures = FEATURES
    plan: Plan = field(init=False, repr=False, compare=False)
    vmid: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.vtcr.ds or self.vtcr.sl2:
            raise BadInput("VTCR_EL2.DS and SL2: 52-bit addresses with 4K and 16K granules are not modelled")
        vmid = self.vttbr >> 48
        object.__setattr__(self, "vmid", vmid if self.vtcr.vs else vmid & 0xff)
        object.__setattr__(self, "plan", self._plan())

    # SL0 and the size have to fit: up to 16 concatenated tables at the first level, and none with a single entry.
    def _start_level(self) -> int | None:
        vtcr, granule, pa_bits = self.vtcr, self.vtcr.tg0, self.features.pa_bits
        start = vtcr.start_level
        if start is None or (granule is K4 and vtcr.sl0 == 3 and not self.features.ttst):
            return None
        # A start level that smaller implementations do not have (AArch64.S2InvalidSL).
        if vtcr.sl0 == 2 and pa_bits < (42 if granule is K16 else 44):
            return None
        least = (3 - start) * granule.stride + granule.shift + 1
        return start if least <= 64 - vtcr.t0sz <= least + granule.stride - 1 + 4 else None

    def _plan(self) -> Plan:
        vtcr, granule, features = self.vtcr, self.vtcr.tg0, self.features
        ia_bits, start = 64 - vtcr.t0sz, self._start_level()
        limit = 1 << _output_bits(vtcr.ps, granule, features)
        most = min(features.pa_bits, 52 if granule is K64 else 48)
        if start is None or not _size_ok(vtcr.t0sz, 64 - most, granule, features):
            return Plan(granule, ia_bits, (), 0, limit, False, 0, (TRANSLATION, 0))
        base = _base(self.vttbr, granule, ia_bits, start, vtcr.ps, features)
        return Plan(granule, ia_bits, _steps(granule, ia_bits, start, features.pa_bits), base, limit,
                    granule is K64 and features.pa_bits >= 52, (1 << 48) - granule.size,
                    (ADDRESS_SIZE, 0) if base >= limit else None)

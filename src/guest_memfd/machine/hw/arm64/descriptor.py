"""Translation table entries as named fields. Here is what each bit of a descriptor means.

Arm ARM D8.3; arch/arm64/include/asm/pgtable-hwdef.h, pgtable-prot.h (software bits), kvm_pgtable.h (stage 2).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from guest_memfd.compat import override
from guest_memfd.machine.hw.arm64.granule import K4, Granule
from guest_memfd.words.units import Pa

VALID = 1 << 0
TABLE = 0b11
"""A table above level 3 and a page at level 3; a block has VALID alone."""
AF = 1 << 10
CONTIGUOUS = 1 << 52
DBM = 1 << 51
SH_INNER = 3 << 8

# Stage 1.
ATTR_INDEX_SHIFT = 2
NS = 1 << 5
AP_EL0 = 1 << 6
AP_RO = 1 << 7
NG = 1 << 11
NT = 1 << 16
GP = 1 << 50
PXN = 1 << 53
UXN = 1 << 54
PXN_TABLE = 1 << 59
UXN_TABLE = 1 << 60
AP_TABLE_SHIFT = 61
NS_TABLE = 1 << 63
PRESENT_INVALID = 1 << 11
"""Linux's PTE_PRESENT_INVALID: an entry whose VALID bit is clear, but which pte_present() accepts."""

# Stage 2.
MEMATTR_SHIFT = 2
S2_READ = 1 << 6
S2_WRITE = 1 << 7
FNXS = 1 << 11
XN_SHIFT = 53
S2_XN = 2 << XN_SHIFT
"""XN[1:0] = 0b10: no one executes."""

ADDRESS = ((1 << 48) - 1) & ~0xfff
"""Bits that can hold an output address, before the granule takes its lower ones."""

NORMAL_WB = 0xf
"""MemAttr of ordinary memory at stage 2 without FEAT_S2FWB."""
DEVICE_NGNRE = 0x1

Kind = Literal["invalid", "block", "page", "table"]
_SH = ("non", "reserved", "outer", "inner")
_AP = ("EL1:RW,EL0:-", "EL1:RW,EL0:RW", "EL1:RO,EL0:-", "EL1:RO,EL0:RO")
_APTABLE = ("", "APTable=no EL0", "APTable=RO", "APTable=RO,no EL0")
_S2AP = ("-", "R", "W", "RW")
_XN = ("", "XN=EL1", "XN", "XN=EL0")


class Entry(NamedTuple):
    """What was found where: the *value* of the descriptor at physical *address*, reached at *level*."""

    level: int
    address: Pa
    value: int

    @property
    def valid(self) -> bool:
        """Whether bit 0 is set: the entry maps memory, or leads to a table."""
        return bool(self.value & VALID)

    @property
    def order(self) -> int:
        """log2 of the pages it decides, of a tree with a granule of 4 KiB."""
        return (3 - self.level) * 9

    @property
    def oa(self) -> Pa:
        """Output address of the first byte, of a leaf of stage 2 with a granule of 4 KiB."""
        return Pa(output_address(self.value, self.level))


def kind(value: int, level: int, granule: Granule = K4, pa_bits: int = 48) -> Kind:
    """What a descriptor is at *level*; reserved encodings are ``invalid`` (AArch64.DecodeDescriptorType)."""
    if not value & VALID:
        return "invalid"
    if value & 2:
        return "table" if level < 3 else "page"
    return "block" if granule.block_legal(level, pa_bits) else "invalid"


def output_address(value: int, level: int, granule: Granule = K4, pa_bits: int = 48) -> int:
    """The OA of a leaf: bits below the size of what it maps are dropped; 64K has OA[51:48] in bits 15:12."""
    # Bits below the size of the leaf are not address bits at this level; bit 16 of a block is nT.
    oa = value & ADDRESS & -(1 << granule.level_shift(level))
    return oa | (value >> 12 & 15) << 48 if granule.shift == 16 and pa_bits >= 52 else oa


def table_address(value: int, granule: Granule = K4, pa_bits: int = 48) -> Pa:
    """The next-level table of a table descriptor."""
    return Pa(output_address(value, 3, granule, pa_bits))


def leaf(oa: int, attributes: int, level: int) -> int:
    """A block or page descriptor for *oa*; *attributes* has every bit but type and address."""
    return oa & (1 << 48) - 1 | (oa >> 48) << 12 | attributes | (TABLE if level == 3 else VALID)


def table(address: Pa, attributes: int = 0) -> int:
    """A table descriptor for the next-level table at physical *address*; bits 1:0 are 11, as a page's."""
    return leaf(address, attributes, 3)


class _Descriptor:
    # What stage-1 and stage-2 leaves share.
    __slots__ = ("granule", "level", "value")

    def __init__(self, value: int, level: int, granule: Granule = K4) -> None:
        self.value, self.level, self.granule = value, level, granule

    @property
    def kind(self) -> Kind:
        """What it is at its level."""
        return kind(self.value, self.level, self.granule)

    @property
    def oa(self) -> int:
        """The output address in bytes, aligned to what a leaf of this level maps."""
        return output_address(self.value, self.level, self.granule)

    @property
    def af(self) -> bool:
        """The Access flag, bit 10: where it is 0, the first access is an Access flag fault or sets it (HAFDBS)."""
        return bool(self.value & AF)

    @property
    def sh(self) -> int:
        """Shareability: 0 non, 2 outer, 3 inner."""
        return self.value >> 8 & 3

    @property
    def contiguous(self) -> bool:
        """The Contiguous bit: one TLB entry may stand for the aligned run of leaves."""
        return bool(self.value & CONTIGUOUS)

    @property
    def dbm(self) -> bool:
        """Dirty bit modifier; Linux's PTE_WRITE at stage 1."""
        return bool(self.value & DBM)

    @property
    def software(self) -> int:
        """Bits 58:55, which the walker ignores and software may use."""
        return self.value >> 55 & 15

    # The middle of the line is each stage's own.
    def _show(self, *parts: str) -> str:
        said = [f"L{self.level} {self.kind} OA={self.oa:#x}", *parts]
        if self.contiguous:
            said.append("contiguous")
        if self.dbm:
            said.append("DBM")
        if self.software:
            said.append(f"SW={self.software:#x}")
        return " ".join(part for part in said if part)


class Stage1Leaf(_Descriptor):
    """A stage-1 block or page descriptor."""

    __slots__ = ()

    @property
    def attr_index(self) -> int:
        """AttrIndx: the byte of MAIR_EL1."""
        return self.value >> ATTR_INDEX_SHIFT & 7

    @property
    def ap(self) -> int:
        """AP[2:1], bits 7:6: bit 0 lets EL0 in, bit 1 makes read-only."""
        return self.value >> 6 & 3

    @property
    def ng(self) -> bool:
        """Not global: tagged with the ASID."""
        return bool(self.value & NG)

    @property
    def pxn(self) -> bool:
        """No execution at EL1."""
        return bool(self.value & PXN)

    @property
    def uxn(self) -> bool:
        """No execution at EL0."""
        return bool(self.value & UXN)

    @override
    def __repr__(self) -> str:
        if self.kind in ("invalid", "table"):
            return describe(self.value, self.level, 1, self.granule)
        return self._show(
            f"AttrIndx={self.attr_index}", f"AP={_AP[self.ap]}", f"SH={_SH[self.sh]}", "AF" if self.af else "AF=0",
            f"nG={int(self.ng)}", "NS" * bool(self.value & NS), "PXN" * self.pxn, "UXN" * self.uxn,
            "GP" * bool(self.value & GP), "nT" * bool(self.value & NT and self.level < 3))


class Stage2Leaf(_Descriptor):
    """A stage-2 block or page descriptor."""

    __slots__ = ()

    @property
    def memattr(self) -> int:
        """MemAttr[3:0], bits 5:2: the memory type that stage 2 asks for."""
        return self.value >> MEMATTR_SHIFT & 15

    @property
    def s2ap(self) -> int:
        """S2AP: bit 0 read, bit 1 write."""
        return self.value >> 6 & 3

    @property
    def xn(self) -> int:
        """XN[1:0]: 0 all execute, 1 EL0 only, 2 none, 3 EL1 only (FEAT_XNX; without it bit 1 alone counts)."""
        return self.value >> XN_SHIFT & 3

    @override
    def __repr__(self) -> str:
        if self.kind in ("invalid", "table"):
            return describe(self.value, self.level, 2, self.granule)
        return self._show(f"MemAttr={self.memattr:#x}", f"S2AP={_S2AP[self.s2ap]}", f"SH={_SH[self.sh]}",
                          "AF" if self.af else "AF=0", _XN[self.xn], "FnXS" * bool(self.value & FNXS))


class TableDescriptor:
    """A table descriptor; the hierarchical bits exist at stage 1 only."""

    __slots__ = ("granule", "level", "value")

    def __init__(self, value: int, level: int, granule: Granule = K4) -> None:
        self.value, self.level, self.granule = value, level, granule

    @property
    def address(self) -> int:
        """The physical address of the next-level table."""
        return table_address(self.value, self.granule)

    @property
    def ap_table(self) -> int:
        """APTable: bit 0 takes EL0's access away, bit 1 makes read-only."""
        return self.value >> AP_TABLE_SHIFT & 3

    @property
    def pxn_table(self) -> bool:
        """PXNTable: no execution at EL1 from anything below."""
        return bool(self.value & PXN_TABLE)

    @property
    def uxn_table(self) -> bool:
        """UXNTable: no execution at EL0 from anything below."""
        return bool(self.value & UXN_TABLE)

    @override
    def __repr__(self) -> str:
        parts = (f"L{self.level} table ->{self.address:#x}", _APTABLE[self.ap_table], "PXNTable" * self.pxn_table,
                 "UXNTable" * self.uxn_table, "NSTable" * bool(self.value & NS_TABLE))
        return " ".join(part for part in parts if part)


class Invalid:
    """An entry that maps nothing; what is in its other bits is software's."""

    __slots__ = ("level", "value")

    def __init__(self, value: int, level: int) -> None:
        self.value, self.level = value, level

    @property
    def present_invalid(self) -> bool:
        """Linux's PTE_PRESENT_INVALID: pte_present(), although the walker faults."""
        return self.value & (VALID | PRESENT_INVALID) == PRESENT_INVALID

    @override
    def __repr__(self) -> str:
        if not self.value:
            return f"L{self.level} invalid"
        if self.value & VALID:
            return f"L{self.level} invalid (reserved encoding) {self.value:#018x}"
        return f"L{self.level} invalid{' (present-invalid)' * self.present_invalid} {self.value:#018x}"


Descriptor = Stage1Leaf | Stage2Leaf | TableDescriptor | Invalid


def view(value: int, level: int, stage: int, granule: Granule = K4) -> Descriptor:
    """The descriptor as the object whose repr reads like the manual."""
    found = kind(value, level, granule)
    if found == "invalid":
        return Invalid(value, level)
    if found == "table":
        return TableDescriptor(value, level, granule)
    return Stage1Leaf(value, level, granule) if stage == 1 else Stage2Leaf(value, level, granule)


def describe(value: int, level: int, stage: int, granule: Granule = K4) -> str:
    """The descriptor in one line of text: what `view` returns, as its repr."""
    return repr(view(value, level, stage, granule))

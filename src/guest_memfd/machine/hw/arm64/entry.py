"""One entry of a TLB. Here is what an entry knows, and when two agree.

The Arm ARM leaves the structure of a TLB open; what an entry has to know follows from the scope of the TLBI operations.
"""

from __future__ import annotations

from typing import Literal

from guest_memfd.compat import override
from guest_memfd.machine.hw.arm64.walk import Entry, PassedEntry
from guest_memfd.words.units import Ipa, Pa, Va

TlbKind = Literal["stage1", "stage2", "combined"]


class TlbEntry:
    """One cached translation of 1 << *shift* bytes from *ia* (VA[55:0] or IPA) to *oa*.

    *asid* None: global. *level*: of the leaf that maintenance by address refers to; *leaf_shift*: log2 of what that leaf,
    or its run, maps; *unit*: of the leaf alone. *may* and *may2* are `permission` sets. *ipa*: where stage 1 leads, for
    combined ones; stage-1-only ones have it in *oa*. *born*: its age.
    """

    __slots__ = ("asid", "born", "ia", "ipa", "kind", "leaf_shift", "level", "may", "may2", "oa", "s1", "s2", "shift",
                 "unit", "vmid")

    def __init__(self, kind: TlbKind, vmid: int, asid: int | None, ia: Va | Ipa, oa: Pa, shift: int, leaf_shift: int,
                 level: int, may: int, may2: int, s1: Entry | None, s2: Entry | None, ipa: Ipa, unit: int) -> None:
        self.kind: TlbKind = kind
        self.vmid, self.asid, self.shift, self.leaf_shift, self.level, self.unit = vmid, asid, shift, leaf_shift, level, unit
        # Aligned down, as an entry is found by its number at its size.
        mask = -1 << shift
        self.ia, self.oa, self.ipa = ia & mask, oa & mask, ipa & mask
        self.may, self.may2, self.s1, self.s2, self.born = may, may2, s1, s2, 0

    @property
    def size(self) -> int:
        """How many bytes the entry translates; a power of 2."""
        return 1 << self.shift

    def agrees(self, other: TlbEntry) -> bool:
        """Whether both give the same answer wherever they overlap: address, permissions, attributes."""
        # By distance and not by output address: two entries of different sizes over one mapping agree.
        return (self.oa - self.ia == other.oa - other.ia and self.may == other.may and self.may2 == other.may2
                and not _attributes(self.s1, other.s1) and not _attributes(self.s2, other.s2))

    @override
    def __repr__(self) -> str:
        tag = "" if self.kind == "stage2" else " global" if self.asid is None else f" ASID={self.asid}"
        arrow = f"{self.ipa:#x} -> {self.oa:#x}" if self.kind == "combined" and self.s2 else f"{self.oa:#x}"
        return f"<{self.kind} VMID={self.vmid}{tag} {self.ia:#x} -> {arrow} +{self.size:#x}>"


# Differing memory attribute and shareability bits.
def _attributes(one: Entry | None, other: Entry | None) -> int:
    if one is None or other is None:
        return int(one is not other)
    return (one.value ^ other.value) & 0x33c


Sized = dict[int, dict[int, TlbEntry]]
"""Entries by size (as a shift), then by number at that size."""
Tables = dict[int, dict[int, PassedEntry]]
"""Table descriptors by what one of them spans (as a shift), then by number."""


class Context:
    """What belongs to one VMID. Stage-1 things have one lane per ASID and one (None) for global entries."""

    __slots__ = ("combined", "pieces", "stage1", "stage2", "tables1", "tables2")

    def __init__(self) -> None:
        self.stage1: dict[int | None, Sized] = {}
        self.combined: dict[int | None, Sized] = {}
        # Combined entries smaller than their stage-1 leaf: per ASID, leaf size and leaf the (shift, number) of each.
        self.pieces: dict[int | None, dict[int, dict[int, dict[tuple[int, int], None]]]] = {}
        self.stage2: Sized = {}
        self.tables1: dict[int | None, Tables] = {}
        self.tables2: Tables = {}

    def forget_stage1(self) -> None:
        """All of stage 1, combined entries included."""
        # VMALLE1 removes combined entries, too: they hold stage-1 information.
        self.stage1.clear()
        self.combined.clear()
        self.pieces.clear()
        self.tables1.clear()

    def forget_asid(self, asid: int) -> None:
        """All of one ASID's lane."""
        self.stage1.pop(asid, None)
        self.combined.pop(asid, None)
        self.pieces.pop(asid, None)
        self.tables1.pop(asid, None)

"""Break-before-make. Here is which change of a valid descriptor software may not make while hardware can see it.

Arm ARM D8.16.1 (R_WHZWS and around); Linux's list of what is always safe is pgattr_change_is_safe() in arch/arm64/mm/mmu.c.
A change of output address counts even where neither entry can be written through.
"""

from __future__ import annotations

from typing import NamedTuple

from guest_memfd.compat import override
from guest_memfd.machine.hw.arm64 import descriptor as d
from guest_memfd.machine.hw.arm64.granule import Granule


class Violation(NamedTuple):
    """A descriptor at *address* went from *old* to *new*, both valid or with a stale copy of *old* about: *why* is wrong."""

    address: int
    level: int
    stage: int
    granule: Granule
    old: int
    new: int
    why: str

    @override
    def __str__(self) -> str:
        old, new = (d.describe(value, self.level, self.stage, self.granule) for value in (self.old, self.new))
        return f"{self.why} changes without break-before-make at {self.address:#x}: {old} => {new}"


def needs(old: int, new: int, level: int, stage: int, granule: Granule, bbml3: bool) -> str | None:
    """What differs between two descriptors that needs break-before-make; None: nothing, or one of them is invalid.

    *bbml3*: the implementation has FEAT_BBM level 3, so sizes (block, table, contiguous) may change live.
    """
    before, after = d.kind(old, level, granule), d.kind(new, level, granule)
    if old == new or "invalid" in (before, after):
        return None
    # Hierarchical bits may change live, as they only take rights away; another table would be another translation of
    # everything below.
    if before == after == "table":
        return "next-level table" if d.table_address(old, granule) != d.table_address(new, granule) else None
    # Block and table of one range: a TLB may hold the old size and the new one, and use a mix. Level 3 of FEAT_BBM
    # excludes that.
    if "table" in (before, after):
        return None if bbml3 else "size"
    return _leaves(old, new, level, stage, granule, bbml3)


def _leaves(old: int, new: int, level: int, stage: int, granule: Granule, bbml3: bool) -> str | None:
    changed = old ^ new
    if d.output_address(old, level, granule) != d.output_address(new, level, granule):
        return "output address"
    if changed & d.CONTIGUOUS and not bbml3:
        return "contiguous bit"
    # AttrIndx has three bits, MemAttr has four. Two CPUs that see one page with different cacheability lose
    # coherence.
    if changed & (0x1c if stage == 1 else 0x3c):
        return "memory type"
    if changed & d.SH_INNER:
        return "shareability"
    # The old entry would go on to answer for its ASID, beside the new one for all. Linux allows the other way round
    # (pgattr_change_is_safe()).
    if stage == 1 and old & d.NG and not new & d.NG:
        return "nG to global"
    return None

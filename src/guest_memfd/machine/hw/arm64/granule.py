"""Geometry of a translation granule. Here is which levels exist, what an entry maps, and where blocks are legal.

Arm ARM D8.2 (translation process), D8.3 (descriptor formats); arch/arm64/include/asm/pgtable-hwdef.h.
"""

from __future__ import annotations

from guest_memfd.compat import override


class Granule:
    """One of the three granules; sizes and alignments are bytes, as powers of two where named shift."""

    __slots__ = ("block_levels", "name", "runs", "shift", "stride", "table_entries")

    def __init__(self, name: str, shift: int, block_levels: tuple[int, ...], runs: dict[int, int]) -> None:
        self.name, self.shift = name, shift
        self.stride = shift - 3
        self.table_entries = 1 << self.stride
        self.block_levels = block_levels
        self.runs = runs

    @property
    def size(self) -> int:
        """Bytes of a page, which are those of a table too."""
        return 1 << self.shift

    def level_shift(self, level: int) -> int:
        """log2 of the bytes that one entry at *level* maps."""
        return self.shift + (3 - level) * self.stride

    def contiguous(self, level: int) -> int:
        """Entries of a contiguous run at *level*; 1 where bit 52 is ignored (ContiguousSize of the Arm ARM)."""
        return self.runs.get(level, 1)

    def block_legal(self, level: int, pa_bits: int = 48) -> bool:
        """Whether 0b01 at *level* is a block: 64K has 4 TiB blocks at level 1 only where PAs have 52 bits."""
        return level in self.block_levels or (self.shift == 16 and level == 1 and pa_bits >= 52)

    def start_level(self, ia_bits: int) -> int:
        """The first level of lookup for *ia_bits* bits of input address, without concatenation."""
        return 3 - (ia_bits - 1 - self.shift) // self.stride

    @override
    def __repr__(self) -> str:
        return self.name


K4 = Granule("4K", 12, (1, 2), {1: 16, 2: 16, 3: 16})
K16 = Granule("16K", 14, (2,), {2: 32, 3: 128})
K64 = Granule("64K", 16, (2,), {2: 32, 3: 32})
GRANULES = (K4, K16, K64)

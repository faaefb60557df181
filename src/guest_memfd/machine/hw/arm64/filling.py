"""What a range of input addresses is filled with. Here is where blocks fit, and which runs are contiguous."""

from __future__ import annotations

from collections.abc import Iterator

from guest_memfd.machine.hw.arm64 import descriptor as d
from guest_memfd.machine.hw.arm64.granule import Granule


class Filling:
    """[ia, ia+size) with leaves that lead to *oa* on and have *bits* besides, or (*oa* None) with *bits* in every entry.

    Leaves are as large as fits, from level *largest* down; *contiguous*: whole runs are marked.
    """

    def __init__(self, granule: Granule, ia: int, size: int, oa: int | None, bits: int, largest: int,
                 contiguous: bool) -> None:
        self.granule, self.ia, self.end, self.oa = granule, ia, ia + size, oa
        self.bits, self.largest, self.contiguous = bits, largest, contiguous

    def fits(self, ia: int, end: int, level: int) -> bool:
        """Whether one entry at *level* does for [ia, end)."""
        size = 1 << self.granule.level_shift(level)
        if end - ia != size or level < self.largest:
            return False
        if self.oa is None:
            return True
        return level == 3 or (self.granule.block_legal(level) and not self.oa + ia - self.ia & size - 1)

    def value(self, ia: int, level: int) -> int:
        """That entry, without a contiguous mark."""
        return self.bits if self.oa is None else d.leaf(self.oa + ia - self.ia, self.bits, level)

    def run(self, ia: int, level: int) -> int | None:
        """Where the contiguous run around *ia* begins; None unless all of it is filled, and its output aligned too."""
        entries = self.granule.contiguous(level)
        size = entries << self.granule.level_shift(level)
        base = ia & -size
        if not self.contiguous or entries == 1 or self.oa is None or base < self.ia or base + size > self.end \
                or self.oa + base - self.ia & size - 1:
            return None
        return base

    def slots(self, ia: int, end: int, level: int) -> Iterator[tuple[int, int]]:
        """The parts of [ia, end) that the entries of one level stand for."""
        size = 1 << self.granule.level_shift(level)
        while ia < end:
            until = min(end, (ia & -size) + size)
            yield ia, until
            ia = until

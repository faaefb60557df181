"""Splitting live leaves of the linear map, so that a leaf ends at an address; nothing is ever merged again.

Here is which entry is replaced by what (split_pud ... split_contpte in arch/arm64/mm/mmu.c, 7.3).

The machine must tolerate a change of size on a live entry (BBML3): no TLBI is issued, and TLBs may keep the large leaf.
"""

from __future__ import annotations

from errno import ENOMEM

from guest_memfd.machine.hw.arm64.descriptor import Entry
from guest_memfd.machine.hw.arm64.pages import PageSource, TableMemory
from guest_memfd.machine.hw.buddy import OutOfMemory
from guest_memfd.machine.linux import direct_map as dm
from guest_memfd.words.units import PAGE, Va, span

COUNTERS = {PAGE: "DirectMap4k", dm.CONT_PTE_SIZE: "DirectMap64k", dm.PMD_SIZE: "DirectMap2M",
            dm.CONT_PMD_SIZE: "DirectMap32M", dm.PUD_SIZE: "DirectMap1G"}
"""Leaf sizes, named as in /proc/meminfo."""

_LARGE = (dm.PUD_SIZE, dm.CONT_PMD_SIZE, dm.PMD_SIZE, dm.CONT_PTE_SIZE)


class SplitTable(dm.KernelTable):
    """A table whose leaves can be split; `mapped` is bytes by leaf size, `splits` how many leaves of a size were split."""

    def __init__(self, memory: TableMemory, source: PageSource, *, any_size: bool = False) -> None:
        super().__init__(memory, source, any_size=any_size)
        self.mapped = dict.fromkeys(COUNTERS, 0)
        self.splits = dict.fromkeys(_LARGE, 0)

    def count(self, va: Va, end: Va, flags: int) -> None:
        """Add [va, end), up to a gigabyte of the linear map, to `mapped` by the rules of map()."""
        if flags & dm.NO_BLOCK:
            self.mapped[PAGE] += end - va
            return
        for size in sorted(COUNTERS, reverse=True):
            first, last = va + -va % size, end & -size
            if first < last:
                self.mapped[size] += last - first
                self.count(va, first, flags)
                self.count(last, end, flags)
                return

    def split_at(self, va: Va) -> int:
        """split_kernel_leaf_mapping_locked(): afterwards no leaf reaches across *va*. -ENOMEM: some were split."""
        try:
            for size in _LARGE:
                if not va % size:
                    return 0
                entry = self.lookup(va)
                if not dm.is_present(entry.value):
                    return 0
                if size in (dm.PUD_SIZE, dm.PMD_SIZE):
                    if dm.level_size(entry.level) == size:
                        self._split_block(entry)
                elif entry.value & dm.CONT and dm.level_size(entry.level) * 16 == size:
                    self._split_run(entry)
        except OutOfMemory:
            return -ENOMEM
        return 0

    def split_to_ptes(self, va: Va, end: Va) -> None:
        """range_split_to_ptes(): nothing but single pages in [va, end); raises OutOfMemory."""
        while va < end:
            entry = self.lookup(va)
            if entry.value & dm.CONT:
                self._split_run(entry)
            elif entry.level < 3:
                self._split_block(entry, to_cont=False)
            else:
                va = (va & -dm.CONT_PTE_SIZE) + dm.CONT_PTE_SIZE

    # split_pud(), split_pmd(): a table of contiguous leaves takes the block's place; what was a hole stays one.
    def _split_block(self, entry: Entry, *, to_cont: bool = True) -> None:
        table = self.new_table()
        size = dm.level_size(entry.level + 1)
        value = entry.value & ~(dm.TABLE | dm.CONT) | (dm.CONT if to_cont else 0)
        if entry.level == 2:
            value |= dm.TABLE
        self.fill(table, 0, list(range(value, value + 512 * size, size)))
        pxn = dm.TABLE_PXN if entry.value & dm.PXN else 0
        self.store(entry, table | dm.VALID | dm.TABLE | dm.AF | dm.TABLE_UXN | pxn)
        self._account(512 * size, 16 * size if to_cont else size, 512 * size)

    # split_contpmd(), split_contpte(): the sixteen entries of the run lose the contiguous bit.
    def _split_run(self, entry: Entry) -> None:
        size = dm.level_size(entry.level)
        first = entry.address & -128
        for address in span(first, 16, 8):
            one = Entry(entry.level, address, self.memory.read64(address))
            self.store(one, one.value & ~dm.CONT)
        self._account(16 * size, size, 16 * size)

    def _account(self, old: int, new: int, nr: int) -> None:
        self.splits[old] += 1
        self.mapped[old] -= nr
        self.mapped[new] += nr

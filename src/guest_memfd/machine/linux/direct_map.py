"""The kernel's own page table in emulated RAM: descriptors, the walk, and how a memory range is mapped. Rule of this
file: a range is mapped greedily, with the largest leaf that alignment and flags allow (map_mem, alloc_init_pud,
alloc_init_cont_pmd, alloc_init_cont_pte in arch/arm64/mm/mmu.c).

4 KiB granule, 48-bit addresses, four levels: 0 (pgd), 1 (pud), 2 (pmd), 3 (pte).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator

from guest_memfd.machine.hw.arm64 import bbm
from guest_memfd.machine.hw.arm64 import descriptor as d
from guest_memfd.machine.hw.arm64.descriptor import Entry
from guest_memfd.machine.hw.arm64.granule import K4
from guest_memfd.machine.hw.arm64.pages import PageSource, TableMemory
from guest_memfd.words.units import PAGE, PAGE_SHIFT, Pa, Va

CONT_PTE_SIZE = 1 << 16
PMD_SIZE = 1 << 21
CONT_PMD_SIZE = 1 << 25
PUD_SIZE = 1 << 30
PGDIR_SIZE = 1 << 39

VALID, AF, NG, PXN = d.VALID, d.AF, d.NG, d.PXN
TABLE_PXN, TABLE_UXN = d.PXN_TABLE, d.UXN_TABLE
PRESENT_INVALID = d.PRESENT_INVALID
"""Bit 11 of an entry whose bit 0 is clear: present for Linux, invalid for the hardware (asm/pgtable-prot.h)."""
TABLE = 1 << 1
"""Levels 0-2: a table and not a block. Level 3: a page."""
RDONLY, WRITE, CONT = d.AP_RO, d.DBM, d.CONTIGUOUS
OUTPUT = d.ADDRESS

PAGE_KERNEL_TAGGED = 0x00E8_0000_0000_0707
"""Attributes of a page of the linear map: Normal-Tagged, inner shareable, AF, writable, dirty, never executable."""
PAGE_KERNEL_ROX = 0x0040_0000_0000_0783
"""Attributes of kernel text: Normal, inner shareable, AF, read-only, executable at EL1 only."""

NO_BLOCK = 1 << 0
NO_CONT = 1 << 1
ROX = 1 << 2
"""Map as text: read-only and executable, and no PXNTable on the way down."""


def level_size(level: int) -> int:
    """Bytes that one entry of *level* covers."""
    return 1 << (39 - 9 * level)


def is_table(entry: Entry) -> bool:
    """Whether the entry leads to another table."""
    return entry.level < 3 and entry.value & 3 == 3


def is_present(value: int) -> bool:
    """Linux's pte_present(): valid, or marked present-invalid (arch/arm64/include/asm/pgtable.h)."""
    return bool(value & (VALID | PRESENT_INVALID))


class KernelTable:
    """One table tree below one root page.

    Table pages come from *source* (OutOfMemory passes through; what was mapped stays mapped, as at boot).
    `violations` collects changes of live entries that need break-before-make; *any_size* says that this machine
    tolerates a change of size (BBML3), so that those are none.
    """

    def __init__(self, memory: TableMemory, source: PageSource, *, any_size: bool = False) -> None:
        self.memory, self.source, self.any_size = memory, source, any_size
        self.violations: list[bbm.Violation] = []
        self.before_store: Callable[[], None] = lambda: None
        """Called before an entry changes: until then hardware may walk the old one."""
        self.pages = 1
        self.root = source.alloc_table()

    # -- reading ------------------------------------------------------------------------------------------------

    def path(self, va: Va) -> Iterator[Entry]:
        """Every entry on the way to what decides *va*, from level 0 down."""
        table = self.root
        for level in range(4):
            address = table + 8 * (va >> (39 - 9 * level) & 511)
            entry = Entry(level, address, self.memory.read64(address))
            yield entry
            if not is_table(entry):
                return
            table = Pa(entry.value & OUTPUT)

    def lookup(self, va: Va) -> Entry:
        """What decides *va*: a leaf (valid or present-invalid) or an empty entry."""
        *_, last = self.path(va)
        return last

    def leaves(self, va: Va, end: Va) -> Iterator[tuple[Va, Entry]]:
        """(address, entry) of everything that decides [va, end), in order, empty entries included."""
        while va < end:
            entry = self.lookup(va)
            size = level_size(entry.level)
            yield va, entry
            va = (va & -size) + size

    # -- writing ------------------------------------------------------------------------------------------------

    def store(self, entry: Entry, value: int) -> None:
        """The one place where an entry of the tree changes while the hardware may walk it."""
        why = bbm.needs(entry.value, value, entry.level, 1, K4, self.any_size)
        if why:
            self.violations.append(bbm.Violation(entry.address, entry.level, 1, K4, entry.value, value, why))
        self.before_store()
        self.memory.write64(entry.address, value)

    def table_for(self, va: Va, level: int, flags: int) -> Pa:
        """Address of the table of *level* that covers *va*; tables on the way are made."""
        table = self.root
        for above in range(level):
            address = table + 8 * (va >> (39 - 9 * above) & 511)
            value = self.memory.read64(address)
            if not value & VALID:
                value = self.new_table() | VALID | TABLE | TABLE_UXN | (0 if flags & ROX else TABLE_PXN)
                self.memory.write64(address, value)
            table = Pa(value & OUTPUT)
        return table

    def new_table(self) -> Pa:
        """One zeroed page for a table; raises OutOfMemory."""
        pa = self.source.alloc_table()
        self.pages += 1
        return pa

    def fill(self, table: Pa, index: int, values: list[int]) -> None:
        """Consecutive entries of a table, from *index* on."""
        self.memory.write(table + 8 * index, struct.pack(f"<{len(values)}Q", *values))

    # -- construction -------------------------------------------------------------------------------------------

    def map(self, va: Va, end: Va, pa: Pa, prot: int, flags: int = 0) -> None:
        """alloc_init_pud(): [va, end) -> pa. *prot* is the attributes of a page; raises OutOfMemory."""
        while va < end:
            nxt = min(end, (va & -PUD_SIZE) + PUD_SIZE)
            if not (va | nxt | pa) % PUD_SIZE and not flags & NO_BLOCK:
                self.fill(self.table_for(va, 1, flags), va >> 30 & 511, [pa | prot & ~TABLE])
            else:
                self._map_pmds(va, nxt, pa, prot, flags)
            va, pa = nxt, pa + (nxt - va)

    # alloc_init_cont_pmd() and init_pmd()
    def _map_pmds(self, va: Va, end: Va, pa: Pa, prot: int, flags: int) -> None:
        while va < end:
            run = min(end, (va & -CONT_PMD_SIZE) + CONT_PMD_SIZE)
            cont = 0 if (va | run | pa) % CONT_PMD_SIZE or flags & NO_CONT else CONT
            while va < run:
                nxt = min(run, (va & -PMD_SIZE) + PMD_SIZE)
                if not (va | nxt | pa) % PMD_SIZE and not flags & NO_BLOCK:
                    self.fill(self.table_for(va, 2, flags), va >> 21 & 511, [pa | prot & ~TABLE | cont])
                else:
                    self._map_ptes(va, nxt, pa, prot, flags)
                va, pa = nxt, pa + (nxt - va)

    # alloc_init_cont_pte() and init_pte()
    def _map_ptes(self, va: Va, end: Va, pa: Pa, prot: int, flags: int) -> None:
        values: list[int] = []
        at = va
        while at < end:
            run = end if flags & NO_CONT else min(end, (at & -CONT_PTE_SIZE) + CONT_PTE_SIZE)
            cont = 0 if (at | run | pa) % CONT_PTE_SIZE or flags & NO_CONT else CONT
            values += range(pa | prot | cont, (pa | prot | cont) + run - at, PAGE)
            at, pa = run, pa + (run - at)
        self.fill(self.table_for(va, 3, flags), va >> PAGE_SHIFT & 511, values)

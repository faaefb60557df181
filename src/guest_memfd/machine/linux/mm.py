"""The VMM's address space: a stage-1 table for TTBR0, its VMAs, and the page tables that all VMAs of a file share.

Entries and the TLB entries made from them go together (mm/memory.c unmap_mapping_range()).

VMAs of one file share their last-level tables, as hugetlbfs lets mappings share page-table pages one level further up. So a
page that was faulted in through one VMA is there in all that show it, which is what the abstract host says of "the VMM's
page table".
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from guest_memfd.machine.hw.arm64 import descriptor as d
from guest_memfd.machine.hw.arm64 import tlbi
from guest_memfd.machine.hw.arm64.tables import PageTable
from guest_memfd.machine.hw.arm64.tlb import Tlb
from guest_memfd.machine.hw.buddy import Buddy, OutOfMemory
from guest_memfd.machine.hw.ram import Ram
from guest_memfd.machine.linux.inode import Inode
from guest_memfd.machine.linux.oops import TASK_SIZE
from guest_memfd.words.units import FIRST_PAGE, PAGE, Index, Pa, Va

FIRST = Va(512 << 30)
"""VMAs of files begin here: no table above them is the VMM's own text's."""
MAX_VMAS = 65530
"""vm.max_map_count."""
CHUNK = 512
"""Pages that one last-level table maps."""

USER_PAGE = d.AF | d.NG | d.SH_INNER | d.AP_EL0 | d.DBM | d.PXN | d.UXN
"""PAGE_SHARED (arch/arm64/include/asm/pgtable-prot.h): EL0 and EL1 read and write it."""

USER_TEXT = d.AF | d.NG | d.SH_INNER | d.AP_EL0 | d.AP_RO | d.PXN
"""PAGE_READONLY_EXEC."""

ASID = 1
TEXT = Va(0x40_0000)
"""Virtual address of the VMM's own code."""

# ldr x1, [x0]; svc #0; str x1, [x0]; svc #0
_CODE = b"".join(word.to_bytes(4, "little") for word in (0xF9400001, 0xD4000001, 0xF9000001, 0xD4000001))
LOAD, STORE = TEXT, TEXT + 8

_SPAN = CHUNK * PAGE
# log2 of what an entry of the first three levels maps.
_SHIFT = (39, 30, 21)


class Vma(NamedTuple):
    """Pages [start, start+nr) of a file at *address*, which is as far from 2 MiB as page *start* is."""

    address: Va
    start: Index
    nr: int

    def covers(self, index: Index) -> bool:
        """Whether it shows page *index* of the file."""
        return self.start <= index < self.start + self.nr

    def va(self, index: Index) -> Va:
        """The user virtual address of page *index* of the file."""
        return self.address + (index - self.start) * PAGE

    @property
    def chunks(self) -> range:
        """Which last-level tables of the file it is made of."""
        return range(self.start // CHUNK, (self.start + self.nr - 1) // CHUNK + 1)

    @property
    def base(self) -> Va:
        """The first address that its tables are for."""
        return self.address & -_SPAN


@dataclass
class Upper:
    """A table above those that are shared, and how many entries it has."""

    pa: Pa
    entries: int = 0


class FileMapping:
    """How one file is mapped: its VMAs, and the tables below them."""

    def __init__(self, mm: Mm) -> None:
        self.mm = mm
        self.vmas: list[Vma] = []
        self.tables: dict[int, Pa] = {}                 # chunk -> physical address of its table
        self.present: dict[Index, Pa] = {}              # page index -> physical address: what folio_mapped() counts

    def covering(self, index: Index) -> Vma | None:
        """The oldest VMA that shows page *index*."""
        return next((vma for vma in self.vmas if vma.covers(index)), None)

    def _entry(self, index: Index) -> Pa:
        return self.tables[index // CHUNK] + 8 * (index % CHUNK)

    def lookup(self, index: Index) -> Pa | None:
        """The physical address that the entry of page *index* has, None if it is not valid."""
        if index // CHUNK not in self.tables:
            return None
        value = self.mm.ram.read64(self._entry(index))
        return Pa(d.output_address(value, 3)) if d.kind(value, 3) == "page" else None

    def insert(self, index: Index, pa: Pa) -> None:
        """Let page *index* be *pa*; an entry that is there stays (vmf_insert_pfn()). Raises OutOfMemory."""
        if self.lookup(index) is not None:
            return
        chunk = index // CHUNK
        if chunk not in self.tables:
            table = self.mm.source.alloc_table()
            try:
                self.mm.link_all([(vma, chunk, table) for vma in self.vmas if chunk in vma.chunks])
            except OutOfMemory:
                self.mm.source.free_table(table)
                raise
            self.tables[chunk] = table
        self.mm.table.write(self._entry(index), 3, d.leaf(pa, USER_PAGE, 3))
        self.present[index] = pa

    def zap(self, start: Index, nr: int) -> list[Index]:
        """Remove the entries of [start, start+nr), and from every CPU's TLB: the page indexes that had one."""
        end = start + nr
        had = []
        for index in [i for i in self.present if start <= i < end] if nr > 1 else [start]:
            if self.present.pop(index, None) is not None:
                had.append(index)
                self.mm.table.write(self._entry(index), 3, 0)
                for vma in self.vmas:
                    if index // CHUNK in vma.chunks:
                        tlbi.vae1is(self.mm.tlbs, vma.va(index), ASID, self.mm.vmid)
        return had


class Mm:
    """struct mm_struct of the VMM. *vmid* is that of the host, under which its TLB entries are kept."""

    def __init__(self, ram: Ram, source: Buddy, tlbs: list[Tlb], vmid: int) -> None:
        self.ram, self.source, self.tlbs, self.vmid = ram, source, tlbs, vmid
        self.table = PageTable(ram, source, stage=1, ia_bits=48, start_level=0)
        text = source.alloc()
        ram.write(text, _CODE)
        self.table.map(TEXT, PAGE, text, USER_TEXT)
        self._bases: list[Va] = []                      # of all VMAs, in order
        self._vmas: dict[Va, tuple[Inode, Vma]] = {}    # by their bases
        self._next = FIRST
        self._uppers: dict[tuple[int, int], Upper] = {}     # level, and which of that level
        self._empty: list[Pa] = []                      # tables that no entry leads to, and a TLB may

    @property
    def ttbr0(self) -> int:
        """TTBR0_EL1: the root and the ASID."""
        return self.table.root | ASID << 48

    @property
    def full(self) -> bool:
        """Whether there are as many VMAs as a process may have."""
        return len(self._vmas) >= MAX_VMAS

    def find(self, va: Va) -> tuple[Inode, Index] | None:
        """The file whose tables *va* leads to, and which page of it (find_vma())."""
        at = bisect_right(self._bases, va) - 1
        if at < 0:
            return None
        inode, vma = self._vmas[self._bases[at]]
        index = vma.start + (va - vma.address) // PAGE
        return (inode, index) if index // CHUNK in vma.chunks else None

    def mmap(self, inode: Inode, start: Index = FIRST_PAGE, nr: int | None = None) -> Vma:
        """A new VMA over pages [start, start+nr) of *inode*, all of it by default; raises OutOfMemory."""
        nr = inode.size if nr is None else nr
        if self.full:
            raise OutOfMemory(f"{MAX_VMAS} VMAs are mapped")
        vma = Vma(self._place(start % CHUNK * PAGE, nr * PAGE), start, nr)
        mapping = inode.mapping or FileMapping(self)
        self.link_all([(vma, chunk, table) for chunk, table in mapping.tables.items() if chunk in vma.chunks])
        inode.mapping = mapping
        mapping.vmas.append(vma)
        insort(self._bases, vma.base)
        self._vmas[vma.base] = inode, vma
        return vma

    # An address that is *skew* after a multiple of 2 MiB (get_unmapped_area()): after the last, or where there is room.
    def _place(self, skew: int, size: int) -> Va:
        room = -(-(skew + size) // _SPAN) * _SPAN
        if self._next + room > TASK_SIZE:
            return self._gap(room) + skew
        self._next += room
        return self._next - room + skew

    def _gap(self, room: int) -> Va:
        at = FIRST
        for base in self._bases:
            if base - at >= room:
                return at
            at = base + len(self._vmas[base][1].chunks) * _SPAN
        if at + room > TASK_SIZE:
            raise OutOfMemory(f"no {room:#x} bytes of address space")
        return at

    def munmap(self, inode: Inode, vma: Vma | None = None) -> None:
        """*vma* of *inode* goes, by default the newest; entries go with the last VMA that shows them."""
        mapping = inode.mapping
        assert mapping is not None
        vmas = mapping.vmas
        vma = vma or vmas[-1]
        vmas.remove(vma)
        for index in [i for i in mapping.present if vma.covers(i) and mapping.covering(i) is None]:
            mapping.zap(index, 1)
        del self._bases[bisect_left(self._bases, vma.base)], self._vmas[vma.base]
        for chunk in [chunk for chunk in mapping.tables if chunk in vma.chunks]:
            self._unlink(vma, chunk)
            if not any(chunk in other.chunks for other in vmas):
                self._empty.append(mapping.tables.pop(chunk))
        # Before tables are freed: a CPU may keep what leads to them, and walk a page that has become something else.
        tlbi.aside1is(self.tlbs, ASID, self.vmid)
        self._free()
        if not mapping.vmas:
            inode.mapping = None

    # -- the levels above the shared tables ----------------------------------------------------------------------

    def link_all(self, wanted: Iterable[tuple[Vma, int, Pa]]) -> None:
        """Let each VMA lead to the table of a chunk, (VMA, chunk, table); raises OutOfMemory, and nothing has changed."""
        done: list[tuple[Vma, int]] = []
        try:
            for vma, chunk, table in wanted:
                self._link(vma, chunk, table)
                done.append((vma, chunk))
        except OutOfMemory:
            for vma, chunk in done:
                self._unlink(vma, chunk)
            tlbi.aside1is(self.tlbs, ASID, self.vmid)
            self._free()
            raise

    # Raises OutOfMemory before anything is changed.
    def _link(self, vma: Vma, chunk: int, table: Pa) -> None:
        va, new = _base(vma, chunk), list[Pa]()
        keys = [(level, va >> _SHIFT[level - 1]) for level in (1, 2)]
        try:
            for _ in [key for key in keys if key not in self._uppers]:
                new.append(self.source.alloc_table())
        except OutOfMemory:
            for pa in new:
                self.source.free_table(pa)
            raise
        above = self.table.root
        for level, number in keys:
            if (level, number) not in self._uppers:
                self._uppers[level, number] = Upper(new.pop())
                self._write(level - 1, va, above, self._uppers[level, number].pa | d.TABLE)
            above = self._uppers[level, number].pa
        self._write(2, va, above, table | d.TABLE)

    # A table that is empty now waits for `_free`, since a walk may be under way in it.
    def _unlink(self, vma: Vma, chunk: int) -> None:
        va = _base(vma, chunk)
        for level in (2, 1):
            key = level, va >> _SHIFT[level - 1]
            upper = self._uppers[key]
            self._write(level, va, upper.pa, 0)
            if upper.entries:
                return
            self._empty.append(self._uppers.pop(key).pa)
        self._write(0, va, self.table.root, 0)

    # The entry of *va* in the *table* at *level*.
    def _write(self, level: int, va: Va, table: Pa, value: int) -> None:
        self.table.write(table + 8 * (va >> _SHIFT[level] & CHUNK - 1), level, value)
        if level:
            self._uppers[level, va >> _SHIFT[level - 1]].entries += 1 if value else -1

    def _free(self) -> None:
        while self._empty:
            self.source.free_table(self._empty.pop())


def _base(vma: Vma, chunk: int) -> Va:
    return vma.base + (chunk - vma.start // CHUNK) * _SPAN

"""The VMM's address space: a stage-1 table for TTBR0, its VMAs, and the page table that all VMAs of a file share.

Rule of this file: entries and the TLB entries made from them go together (mm/memory.c unmap_mapping_range()).

VMAs of one file share their tables from the second level on, as hugetlbfs lets mappings share page-table pages. So a
page that was faulted in through one is there in all, which is what the abstract host says of "the VMM's page table".
"""

from __future__ import annotations

from guest_memfd.hosts.emulated.arm64 import descriptor as d
from guest_memfd.hosts.emulated.arm64 import tlbi
from guest_memfd.hosts.emulated.arm64.tables import PageTable
from guest_memfd.hosts.emulated.arm64.tlb import Tlb
from guest_memfd.hosts.emulated.buddy import Buddy
from guest_memfd.hosts.emulated.kernel.inode import Inode
from guest_memfd.hosts.emulated.ram import PAGE, Ram

SLOT = 512 << 30
"""Bytes that one first-level entry covers; every VMA starts at a multiple of it."""

USER_PAGE = d.AF | d.NG | d.SH_INNER | d.AP_EL0 | d.DBM | d.PXN | d.UXN
"""PAGE_SHARED (arch/arm64/include/asm/pgtable-prot.h): EL0 and EL1 read and write it."""

USER_TEXT = d.AF | d.NG | d.SH_INNER | d.AP_EL0 | d.AP_RO | d.PXN
"""PAGE_READONLY_EXEC."""

ASID = 1
TEXT = 0x40_0000
"""Virtual address of the VMM's own code."""

# ldr x1, [x0]; svc #0; str x1, [x0]; svc #0
_CODE = b"".join(word.to_bytes(4, "little") for word in (0xF9400001, 0xD4000001, 0xF9000001, 0xD4000001))
LOAD, STORE = TEXT, TEXT + 8


class FileMapping:
    """How one file is mapped: the slots of its VMAs, and the shared tables below them."""

    def __init__(self, mm: Mm, size: int) -> None:
        self.mm = mm
        self.vmas: list[int] = []                       # first slot of each
        self.slots = -(-size * PAGE // SLOT)
        self.tables = [
            PageTable(mm.ram, mm.source, stage=1, ia_bits=39, start_level=1) for _ in range(self.slots)]
        self.present: dict[int, int] = {}               # page index -> physical address: what folio_mapped() counts

    def va(self, index: int, slot: int | None = None) -> int:
        """Where the VMA at *slot* (default: the first) shows page *index*."""
        return (self.vmas[0] if slot is None else slot) * SLOT + index * PAGE

    def lookup(self, index: int) -> int | None:
        """The physical address that the entry of page *index* has, None if it is not valid."""
        ia = index * PAGE
        entry = self.tables[ia // SLOT].lookup(ia % SLOT)
        return d.output_address(entry.value, entry.level) if d.kind(entry.value, entry.level) == "page" else None

    def insert(self, index: int, pa: int) -> None:
        """Let page *index* be *pa*; an entry that is there stays (vmf_insert_pfn())."""
        if self.lookup(index) is None:
            ia = index * PAGE
            self.tables[ia // SLOT].map(ia % SLOT, PAGE, pa, USER_PAGE)
            self.present[index] = pa

    def zap(self, start: int, nr: int) -> list[int]:
        """Remove the entries of [start, start+nr), and from every CPU's TLB: the page indexes that had one."""
        end = start + nr
        had = []
        for index in [i for i in self.present if start <= i < end] if nr > 1 else [start]:
            if self.present.pop(index, None) is not None:
                had.append(index)
                ia = index * PAGE
                self.tables[ia // SLOT].unmap(ia % SLOT, PAGE)
                for slot in self.vmas:
                    tlbi.vae1is(self.mm.tlbs, slot * SLOT + ia, ASID, self.mm.vmid)
        return had

    def free(self) -> None:
        """The last VMA has gone: its tables go back."""
        for table in self.tables:
            table.free()


class Mm:
    """struct mm_struct of the VMM. *vmid* is that of the host, under which its TLB entries are kept."""

    def __init__(self, ram: Ram, source: Buddy, tlbs: list[Tlb], vmid: int) -> None:
        self.ram, self.source, self.tlbs, self.vmid = ram, source, tlbs, vmid
        self.table = PageTable(ram, source, stage=1, ia_bits=48, start_level=0)
        text = source.alloc()
        ram.write(text, _CODE)
        self.table.map(TEXT, PAGE, text, USER_TEXT)
        self._free_slots = list(range(255, 0, -1))

    @property
    def ttbr0(self) -> int:
        """TTBR0_EL1: the root and the ASID."""
        return self.table.root | ASID << 48

    def mmap(self, inode: Inode) -> None:
        """A VMA over the whole of *inode*."""
        if inode.mapping is None:
            inode.mapping = FileMapping(self, inode.size)
        mapping = inode.mapping
        slot = self._take(mapping.slots)
        mapping.vmas.append(slot)
        for i, table in enumerate(mapping.tables):
            self._write(slot + i, table.root | d.TABLE)

    def _take(self, nr: int) -> int:
        slot = next(s for s in sorted(self._free_slots) if all(s + i in self._free_slots for i in range(nr)))
        for i in range(nr):
            self._free_slots.remove(slot + i)
        return slot

    def _write(self, slot: int, value: int) -> None:
        self.table.write(self.table.root + 8 * slot, 0, value)

    def munmap(self, inode: Inode) -> None:
        """The newest VMA of *inode* goes; the entries go with the last."""
        mapping = inode.mapping
        assert mapping is not None
        if len(mapping.vmas) == 1:
            mapping.zap(0, inode.size)
        slot = mapping.vmas.pop()
        for i in range(mapping.slots):
            self._write(slot + i, 0)
            self._free_slots.append(slot + i)
        tlbi.aside1is(self.tlbs, ASID, self.vmid)
        if not mapping.vmas:
            mapping.free()
            inode.mapping = None

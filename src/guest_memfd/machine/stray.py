"""Mappings of memory that is free, or that its file no longer holds. Everything is read from tables and TLBs; no record
is believed.

None of them may be there at any time, so one can look in the middle of a run: a page leaves every table, and every TLB,
before it leaves its file (mm/truncate.c truncate_cleanup_folio(), mm/memory.c unmap_mapping_range()) and before the
allocator has it. Read are the tables as hardware walks them, the TLBs, and the gfn_to_pfn_caches of the VMs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from guest_memfd.machine.hw.arm64.entry import TlbEntry
from guest_memfd.machine.hw.arm64.reached import reached
from guest_memfd.machine.hw.arm64.tlb import VA_MASK, Tlb
from guest_memfd.machine.linux.direct_map import level_size
from guest_memfd.machine.linux.mm import FIRST
from guest_memfd.words.units import PAGE, Pa, Va, pa_to_pfn

if TYPE_CHECKING:
    from guest_memfd.machine.board.board import Board

_KERNEL_HALF = 1 << 55
"""The bit of a virtual address that says which table translates it."""
_KERNEL_BITS = ~VA_MASK & (1 << 64) - 1
"""What a kernel address has above those that a TLB entry keeps."""


def stray_mappings(machine: Board) -> list[str]:
    """One line for every way to memory that there should be no way to; at any moment between two primitives."""
    # A CPU may have one translation twice, with and without stage 2.
    return list(dict.fromkeys((
        *_user_entries(machine), *_guest_entries(machine), *_caches(machine), *_tlbs(machine))))


# What is wrong with user address *va* leading to the page at *pa*; nothing: an empty string.
def _against_user(machine: Board, va: Va, pa: Pa) -> str:
    if machine.first_free(pa, PAGE) is not None:
        return "which is free"
    if va < FIRST:                                          # the VMM's own text
        return ""
    found = machine.vmm.find(va)
    if found is None:
        return "where no file is mapped"
    inode, index = found
    page = inode.find(index)
    held = page is not None and page.pa + (index - page.index) * PAGE == pa
    return "" if held else f"which its file does not hold as page {index}"


# -- tables ------------------------------------------------------------------------------------------------------------

def _user_entries(machine: Board) -> Iterator[str]:
    for entry in reached(machine.ram, machine.vmm.table):
        if entry.table:
            why = "a table that is free" if machine.first_free(entry.pa, PAGE) is not None else ""
        else:                                               # a page: Linux maps no blocks there
            why = _against_user(machine, Va(entry.ia), entry.pa)
        if why:
            yield f"the VMM's page table leads from {entry.ia:#x} to {entry.pa:#x}, {why}"


def _guest_entries(machine: Board) -> Iterator[str]:
    for vm in machine.vms:
        for entry in reached(machine.ram, machine.driver.guest_table(vm)):
            free = machine.first_free(entry.pa, PAGE if entry.table else entry.size)
            if free is not None:
                ipa = entry.ia + free - entry.pa
                yield (f"stage 2 of VMID {vm.vmid:#x} leads from {ipa:#x} to {free:#x}, "
                       f"{'a table that' if entry.table else 'which'} is free")


def _caches(machine: Board) -> Iterator[str]:
    for vm in machine.vms:
        page = vm.gpc
        if page is None:
            continue
        if machine.pages.get(pa_to_pfn(page.pa)) is not page:
            why = "which is free, or somebody else's by now"
        else:
            why = "" if page.inode is not None else "which its file no longer holds"
        if why:
            yield f"the gfn_to_pfn_cache of VMID {vm.vmid:#x} leads to {page.pa:#x}, {why}"


# -- TLBs --------------------------------------------------------------------------------------------------------------

def _tlbs(machine: Board) -> Iterator[str]:
    for cpu, tlb in enumerate(machine.tlbs):
        for entry in tlb.entries():
            for ia, pa, why in _against(machine, entry):
                yield f"an entry in the TLB of CPU {cpu}, VMID {entry.vmid:#x}, leads from {ia:#x} to {pa:#x}, {why}"
        yield from (f"a walk in the TLB of CPU {cpu}, VMID {vmid:#x}, goes on at {table:#x}, a table that is free"
                    for vmid, table in _free_tables(machine, tlb))


# Of the tables of a guest's own stage 1 a TLB knows intermediate addresses only.
def _free_tables(machine: Board, tlb: Tlb) -> Iterator[tuple[int, int]]:
    for vmid, asid, passed in tlb.tables():
        physical = asid is None or vmid == machine.driver.host_vmid
        if physical and machine.first_free(passed.table, PAGE) is not None:
            yield vmid, passed.table


# Where the entry leads astray: from, to, and what is wrong with it.
def _against(machine: Board, entry: TlbEntry) -> Iterator[tuple[int, int, str]]:
    if entry.vmid != machine.driver.host_vmid:
        # What a guest's own stage 1 says of intermediate addresses leads nowhere by itself.
        free = None if entry.kind == "stage1" else machine.first_free(entry.oa, entry.size)
        if free is not None:
            yield entry.ia + free - entry.oa, free, "which is free"
    elif entry.kind == "stage2":
        return                                              # the host's own stage 2 maps what is free
    elif entry.ia & _KERNEL_HALF:
        yield from _against_kernel(machine, entry)
    else:
        why = _against_user(machine, Va(entry.ia), entry.oa)
        if why:
            yield entry.ia, entry.oa, why


# The kernel maps what is free, in the direct map; an entry that is in no table any more is another matter.
def _against_kernel(machine: Board, entry: TlbEntry) -> Iterator[tuple[int, int, str]]:
    start = Va(entry.ia | _KERNEL_BITS)
    for va, leaf in machine.linear_map.tables.leaves(start, start + entry.size):
        size = level_size(leaf.level)
        pa, end = entry.oa + (va - start), min((va & -size) + size, start + entry.size)
        if leaf.valid and leaf.oa + va % size == pa:
            continue
        free = machine.first_free(pa, end - va)
        if free is not None:
            yield va + (free - pa), free, "which is free and no longer mapped there"

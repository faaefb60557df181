"""What has not come back to Linux once all VMs and files are gone. Everything is read; nothing is told by those who
should have given it back.

The words are those of the law nothing-lost: a page that is free is the host's, in the direct map, and within reach.
Memory that is broken is out of use, and not lost; what EL2 keeps for good is lost, and has to be counted. What may be
there at no time, a way to a page that is free, is stray.py's to find; it is part of the audit, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from guest_memfd.machine.hypcalls.vm import Vm
from guest_memfd.machine.linux.direct_map import PUD_SIZE, VALID, level_size
from guest_memfd.machine.linux.folio import KINDS
from guest_memfd.machine.primitives.host import EmulatedHost
from guest_memfd.machine.stray import stray_mappings
from guest_memfd.words.pagestate import EVICTED
from guest_memfd.words.primitives import Primitive
from guest_memfd.words.units import PAGE

if TYPE_CHECKING:
    from guest_memfd.machine.board.board import Board


def audit(machine: Board) -> list[str]:
    """One line for everything that is lost; lru_add batches are drained first, as memory pressure would."""
    if machine.dead is not None:
        return [f"the kernel has stopped: {machine.dead}"]
    EmulatedHost(machine, Vm(None, -1), 1).perform(Primitive("lru_add_drain_all", (), "mm"), 0)
    return [*_folios(machine), *(f"{start:#x}..{end:#x} {how}" for start, end, how in machine.driver.not_the_hosts()),
            *_holes(machine), *_references(machine), *machine.driver.leftovers(), *stray_mappings(machine)]


def _folios(machine: Board) -> Iterator[str]:
    used = [page for page in machine.pages.values() if not page.retired]
    for page in used:
        held = [f"{kind} {count}" for kind in KINDS if (count := getattr(page, kind))]
        yield f"the folio at {page.pa:#x} is never freed ({', '.join(held)})"
    # Of a large folio all may have been given up at once, or a page.
    kept = [page.nr for page in used if page.kept]
    if not len(kept) <= machine.leaked <= sum(kept):
        yield f"{machine.leaked} pages are counted as leaked, and there are {sum(kept)}"


def _holes(machine: Board) -> Iterator[str]:
    broken = {page.pa + at for page in machine.pages.values() if page.retired for at in range(0, page.size, PAGE)}
    yield from (f"{pa:#x} is not in the direct map" for pa in _not_mapped(machine) if pa not in broken)


def _not_mapped(machine: Board) -> Iterator[int]:
    lm, pa = machine.linear_map, machine.ram.base
    while pa < machine.ram.end:
        va = lm.va(pa)
        if not lm.built(va):                            # no one has needed it, so no one has made a hole in it
            pa += PUD_SIZE - va % PUD_SIZE
            continue
        leaf = lm.leaf(pa)
        size = level_size(min(leaf.level, 2))
        if leaf.level < 3 and not leaf.valid:
            yield pa
        elif leaf.level == 3:
            table = memoryview(machine.ram.read(leaf.address & -PAGE, PAGE)).cast("Q")
            first = va // PAGE % len(table)
            yield from (pa + i * PAGE for i, value in enumerate(table[first:])
                        if not value & VALID and pa + i * PAGE < machine.ram.end)
        pa += size - va % size


def _references(machine: Board) -> Iterator[str]:
    if machine.module.refcount:
        yield f"module {machine.module.name} has {machine.module.refcount} references"
    if machine.power.away:
        yield f"{machine.power.away} pages are counted as away from the host"
    for inode in machine.inodes:
        if inode.life == EVICTED:
            yield f"the inode of a file of {inode.size * PAGE:#x} bytes has no reference, and is never destroyed"
        elif inode.files or inode.references:
            yield f"a file of {inode.size * PAGE:#x} bytes has {inode.files} references, its inode {inode.references}"
    yield from (f"a VM exists (VMID {vm.vmid:#x})" for vm in machine.vms)

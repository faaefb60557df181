"""What has not come back to Linux once all VMs and files are gone. Rule of this file: everything is read, nothing is told.

The words are those of the law nothing-lost: a page that is free is the host's, in the direct map, and within reach.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from guest_memfd.hosts.emulated.kernel.direct_map import PUD_SIZE, VALID, level_size
from guest_memfd.hosts.emulated.kernel.page import KINDS
from guest_memfd.hosts.emulated.primitives.host import EmulatedHost
from guest_memfd.hosts.emulated.ram import PAGE
from guest_memfd.hosts.emulated.vm import Vm
from guest_memfd.hosts.host import Primitive

if TYPE_CHECKING:
    from guest_memfd.hosts.emulated.machine import Machine


def audit(machine: Machine) -> list[str]:
    """One line for everything that is lost; lru_add batches are drained first, as memory pressure would."""
    if machine.dead is not None:
        return [f"the kernel has stopped: {machine.dead}"]
    EmulatedHost(machine, Vm(None, -1), 1).perform(Primitive("lru_add_drain_all", (), "mm"), 0)
    return [*_folios(machine), *(f"{start:#x}..{end:#x} {how}" for start, end, how in machine.driver.not_the_hosts()),
            *_holes(machine), *_references(machine), *machine.driver.leftovers()]


def _folios(machine: Machine) -> Iterator[str]:
    for page in machine.pages.values():
        held = [f"{kind} {count}" for kind in KINDS if (count := getattr(page, kind))]
        yield f"the folio at {page.pa:#x} is never freed ({', '.join(held) or 'kept'})"


def _holes(machine: Machine) -> Iterator[str]:
    lm, pa = machine.linear_map, machine.ram.base
    while pa < machine.ram.end:
        va = lm.va(pa)
        if not lm.built(va):                            # nobody has needed it, so nobody has made a hole in it
            pa += PUD_SIZE - va % PUD_SIZE
            continue
        leaf = lm.leaf(pa)
        size = level_size(min(leaf.level, 2))
        if leaf.level < 3 and not leaf.value & VALID:
            yield f"{pa:#x} is not in the direct map"
        elif leaf.level == 3:
            table = memoryview(machine.ram.read(leaf.address & -PAGE, PAGE)).cast("Q")
            first = va // PAGE % len(table)
            yield from (f"{pa + i * PAGE:#x} is not in the direct map" for i, value in enumerate(table[first:])
                        if not value & VALID and pa + i * PAGE < machine.ram.end)
        pa += size - va % size


def _references(machine: Machine) -> Iterator[str]:
    if machine.module.refcount:
        yield f"module {machine.module.name} has {machine.module.refcount} references"
    if machine.power.away:
        yield f"{machine.power.away} pages are counted as away from the host"
    for inode in machine.inodes:
        if inode.files or inode.references:
            yield f"a file of {inode.size * PAGE:#x} bytes has {inode.files} references, its inode {inode.references}"
    yield from (f"a VM exists (VMID {vm.vmid:#x})" for vm in machine.vms)

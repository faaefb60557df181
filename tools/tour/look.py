"""One look at the page: what every record and every table of the machine says of it now, in words.

It only reads. A look between two instructions of the kernel changes nothing of what follows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from guest_memfd.machine.hw.arm64.descriptor import describe
from guest_memfd.machine.hw.arm64.tlb import VA_MASK
from guest_memfd.words.units import PAGE
from tour.ride import INDEX, IPA, Ride

ROWS = {
    "page cache": "which folio the file has at the page's index",
    "mark": "the library's mark on the folio, `folio->private`: it may not be reached through the direct map",
    "first doubleword": "the first eight bytes of the frame",
    "direct map": "the entry of the kernel's direct map, stage 1, for the frame",
    "TLB, kernel": "how many TLB entries translate the kernel's address of the frame, on all CPUs",
    "EL2's record": "who owns the frame: its state in `hyp_vmemmap`, and the annotation in the host's stage 2",
    "host stage 2": "the entry of the host's stage 2 for the frame",
    "TLB, host stage 2": "how many TLB entries are copies of that entry alone, on all CPUs",
    "guest stage 2": "the entry of the guest's stage 2 for the gfn",
    "TLB, guest": "how many TLB entries translate the guest's address of the page, on all CPUs",
}
"""What a look has, and what each of it means."""

Look = dict[str, str]
"""Each of ROWS, in words."""


def frame(ride: Ride) -> int:
    """Physical address of the folio at the page's index; there must be one."""
    return int(_page(ride).pa)


def look(ride: Ride, pa: int) -> Look:
    """What is said now of the page, and of the frame at *pa*, whether it is the page's folio yet or not."""
    page, vm = _page(ride), ride.machine.vms[0]
    found = _frame(ride, pa)
    found["page cache"] = "no folio" if page is None else f"pfn {page.pa // PAGE:#x}"
    found["mark"] = "set" if page is not None and page.no_direct_map else "not set"
    leaf = vm.handle.pgt.leaf(IPA)
    found["guest stage 2"] = described(leaf.value, leaf.level, 2)
    found["TLB, guest"] = str(sum(entry.ia <= IPA < entry.ia + entry.size
                                  for entry in _entries(ride) if entry.vmid == vm.vmid))
    return {row: found[row] for row in ROWS}


def _page(ride: Ride) -> Any:
    memory: Any = ride.guest.memory
    return memory.host.inode.find(INDEX)


def _entries(ride: Ride) -> Iterator[Any]:
    return (entry for tlb in ride.machine.tlbs for entry in tlb.entries())


def _frame(ride: Ride, pa: int) -> Look:
    machine = ride.machine
    va = machine.linear_map.va(pa) & VA_MASK
    stage1, stage2 = machine.linear_map.leaf(pa), machine.el2.host.pgt.leaf(pa)
    host = [entry for entry in _entries(ride) if entry.vmid == machine.driver.host_vmid]
    note = machine.el2.host.note(pa)
    return {
        "first doubleword": f"{machine.ram.read64(pa):#x}",
        "direct map": described(stage1.value, stage1.level, 1),
        "TLB, kernel": str(sum(entry.kind != "stage2" and entry.ia <= va < entry.ia + entry.size for entry in host)),
        "TLB, host stage 2": str(sum(entry.kind == "stage2" and entry.ia <= pa < entry.ia + entry.size for entry in host)),
        "EL2's record": machine.driver.owner(pa),
        "host stage 2": described(stage2.value, stage2.level, 2) + ("" if note is None else f": {_plain(note)}"),
    }


def _plain(note: object) -> str:
    return repr(note).strip("<>")


def described(value: int, level: int, stage: int) -> str:
    """An entry as a number, and what decides about it: its level, what it is, and where it leads."""
    if not value:
        return f"L{level}, empty"
    words = describe(value, level, stage).split(f" {value:#018x}")[0].split(" AttrIndx=")[0].split(" MemAttr=")[0]
    return f"{value:#018x}, {words}"

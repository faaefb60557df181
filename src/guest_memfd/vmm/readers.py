"""The host kernel reads what it should not. Real instructions of the kernel's text run, at real addresses.

    zeropad   load_unaligned_zeropad() 4 bytes before a page that the guest owns, as a path name's comparison would do it
              when the name ends where the page before ends
    kcore     copy_from_kernel_nofault() of every page that the guest owns, as a read of /proc/kcore
    plain     one load of a page that the guest owns, by code that has no exception-table entry: a bug of the kernel
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from guest_memfd.errors import BadInput
from guest_memfd.machine.boot import Machine
from guest_memfd.machine.linux.folio import LinuxFolio
from guest_memfd.machine.primitives.contents import BEFORE
from guest_memfd.machine.primitives.host import EmulatedHost
from guest_memfd.words.pagestate import PRIVATE_PAGE
from guest_memfd.words.primitives import Primitive
from guest_memfd.words.units import PAGE, Pa, pa_to_pfn

READERS = ("zeropad", "kcore", "plain")
NAME = b"/boot/initrd.img"
"""A path name whose last byte is the last of its page."""
_PAIRS = 8


class Read(NamedTuple):
    """What a reader saw: at *address* (of the linear map), the doubleword *word*, and how it went, in words."""

    reader: str
    address: int
    word: int
    how: str


class Names:
    """Some pages of the kernel's own, each with `NAME` at its end; what is allocated next comes to lie after them."""

    def __init__(self, machine: Machine) -> None:
        self.machine, self.pages = machine, set[Pa]()
        self._held = [machine.kernel_pages.alloc()]
        behind: list[Pa] = []
        while len(behind) < _PAIRS:
            now, before = machine.kernel_pages.alloc(), self._held[-1]
            if now == before + PAGE and not before % (2 * PAGE):
                self.pages.add(before)
                behind.append(now)
                machine.ram.write(now - len(NAME), NAME)
            else:
                self._held.append(now)
        # Lowest first, and their buddies are not free: the next single pages to be had.
        for pa in behind:
            machine.kernel_pages.free(pa)

    def free(self) -> None:
        """Zero and free the pages that are still held; those with a name have been given back before."""
        for pa in self._held:
            self.machine.ram.zero(pa, PAGE)
            self.machine.kernel_pages.free(pa)


def read(reader: str, machine: Machine, host: EmulatedHost, names: Names) -> Read:
    """Let the kernel read as *reader* says, preferably after one of *names*.

    Raises KernelPanic, and BadInput when the guest owns no page for that.
    """
    owned = list(_owned(machine))
    if reader == "zeropad":
        owned = [page for page in owned if _hosts(machine, page.pa - PAGE, owned)]
        # Any page of the host's will do, so the reader never fails for the
        # lack of a name; with one the string is seen as well.
        owned.sort(key=lambda page: page.pa - PAGE not in names.pages)
    if not owned:
        raise BadInput(f"--reader {reader}: the guest owns no page" + " after one of the host's" * (reader == "zeropad"))
    if reader == "kcore":
        return _kcore(machine, host, owned)
    page, va = owned[0], machine.linear_map.va(owned[0].pa)
    if reader == "zeropad":
        how = host.perform(Primitive("load_unaligned_zeropad", (pa_to_pfn(page.pa),), "kernel"), 0)
        return Read(reader, va - BEFORE, machine.cpu.core.x(0), _words(how))
    how = host.perform(Primitive("kernel_access", (page, "kernel", "a stray load", "plain_read", va), "kernel"), 0)
    return Read(reader, va, machine.cpu.core.x(0), _words(how))


def _kcore(machine: Machine, host: EmulatedHost, owned: list[LinuxFolio]) -> Read:
    how = [host.perform(Primitive("copy_from_kernel_nofault", (pa_to_pfn(page.pa),), "kernel"), 0) for page in owned]
    copied = sum(one == "ok" for one in how)
    words = f"{len(how)} pages, {copied} copied, {len(how) - copied} read as zeros"
    bounce = machine.linear_map.pa(machine.bounce_va)
    word = machine.ram.read64(bounce) if copied else 0
    return Read("kcore", machine.linear_map.va(owned[-1].pa), word, words)


def _words(how: str) -> str:
    return "the exception table stepped in, missing bytes are zeros" if how == "fixed" else "it went through"


# Pages that are some guest's alone: by EL2's record, or where no one keeps one, by the library's word.
def _owned(machine: Machine) -> Iterator[LinuxFolio]:
    for inode in machine.inodes:
        for page in sorted(inode.pages.values(), key=lambda p: p.pa):
            private = inode.entry("attributes", page.index) == PRIVATE_PAGE and machine.any_guest_maps(page.pa)
            if machine.driver.owner(page.pa) == "guest" or (private and not machine.hypervisor.tracks_owner):
                yield page


# Whether the page at *pa* is the host's, and readable.
def _hosts(machine: Machine, pa: Pa, owned: list[LinuxFolio]) -> bool:
    return (machine.ram.contains(pa) and machine.driver.owner(pa) == "host" and machine.driver.host_may(pa)
            and machine.linear_map.kernel_page_present(pa) and not any(page.pa == pa for page in owned))

"""Linux's own readers and writers of all RAM, on this machine: /proc/kcore, the hibernation image, page poisoning.

Every byte goes through the linear map, by the kernel's text on a CPU. What the rules are is said in linux/kcore.py,
linux/snapshot.py and linux/page_poison.py; this is what they ask.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from guest_memfd.words.units import PAGE, Pa, span

if TYPE_CHECKING:
    from guest_memfd.machine.board.board import Board


class Services:
    """What those three ask of *machine*; *read* replaces the copy loop of the image where someone watches it."""

    def __init__(self, machine: Board, read: Callable[[Pa], bytes] | None = None) -> None:
        self.machine, self.linear_map, self._read = machine, machine.linear_map, read

    # -- pages -------------------------------------------------------------------------------------------------------

    def pages(self) -> Sequence[Pa]:
        """Physical addresses of all pages that Linux has."""
        start, end = self.machine.ram.base, self.machine.el2_pool.start
        return span(start, (end - start) // PAGE, PAGE)

    def is_ram(self, pa: Pa) -> bool:
        """Whether Linux has the page."""
        return self.machine.ram.base <= pa < self.machine.el2_pool.start

    def is_free(self, pa: Pa) -> bool:
        """In one of the allocators."""
        folios, kernel = self.machine.folios, self.machine.kernel_pages
        return kernel.is_free(pa) or (folios is not kernel and folios.is_free(pa))

    def is_nosave(self, pa: Pa) -> bool:
        """No page of this machine is."""
        return False

    def is_offline(self, pa: Pa) -> bool:
        """guest_memfd marks nothing PageOffline."""
        return False

    def is_guard(self, pa: Pa) -> bool:
        """There are no guard pages."""
        return False

    def is_reserved(self, pa: Pa) -> bool:
        """Only the page of kernel text is PageReserved on this machine."""
        return pa == self.machine.text.pa

    def is_hwpoison(self, pa: Pa) -> bool:
        """PageHWPoison() of the page at *pa*."""
        return pa & -PAGE in self.machine.page_at(pa).broken

    def free_pages(self) -> int:
        """What the allocators could give."""
        return self.machine.kernel_pages.free_pages

    # -- the linear map ----------------------------------------------------------------------------------------------

    def kernel_page_present(self, pa: Pa) -> bool:
        """The linear map has it."""
        return self.linear_map.kernel_page_present(pa)

    def set_direct_map_default_noflush(self, pa: Pa) -> int:
        """For the time of a copy."""
        return self.linear_map.set_direct_map_default_noflush(pa)

    def set_direct_map_invalid_noflush(self, pa: Pa) -> int:
        """Take one page out of the linear map again, after the copy that needed it; 0 or -ENOMEM."""
        return self.linear_map.set_direct_map_invalid_noflush(pa)

    def flush_tlb_kernel_page(self, pa: Pa) -> None:
        """Drop the linear-map entry of one page from the TLBs of all CPUs."""
        va = self.linear_map.va(pa)
        self.linear_map.flush_tlb_kernel_range(va, va + PAGE)

    # -- accesses: instructions on a CPU -------------------------------------------------------------------------------

    def do_copy_page(self, pa: Pa) -> bytes:
        """Word by word into a page of the kernel's; raises KernelPanic when an abort on the way is fatal."""
        if self._read is not None:
            return self._read(pa)
        machine = self.machine
        machine.cpu.call("do_copy_page", machine.bounce_va, self.linear_map.va(pa))
        return machine.ram.read(self.linear_map.pa(machine.bounce_va), PAGE)

    def copy_from_kernel_nofault(self, pa: Pa, nr: int) -> bytes | None:
        """*nr* bytes, None when the exception table stepped in; raises KernelPanic when it is not asked."""
        machine = self.machine
        ran = machine.cpu.call("copy_from_kernel_nofault", machine.bounce_va, self.linear_map.va(pa), nr)
        return None if ran.fixed else machine.ram.read(self.linear_map.pa(machine.bounce_va), nr)

    def memset_page(self, pa: Pa, byte: int) -> None:
        """Store to every doubleword of the page."""
        self.machine.cpu.call("memset_page", self.linear_map.va(pa), byte * 0x0101_0101_0101_0101)

    def memchr_inv_page(self, pa: Pa, byte: int) -> bytes | None:
        """Look at every doubleword until one differs."""
        ran = self.machine.cpu.call("memchr_inv_page", self.linear_map.va(pa), byte * 0x0101_0101_0101_0101)
        return self.machine.ram.read(pa, PAGE) if ran.x0 else None

    # -- processes and devices -----------------------------------------------------------------------------------------

    def freeze_processes(self) -> int:
        """No one else runs while a service does."""
        self.machine.power.frozen = True
        return 0

    def thaw_processes(self) -> None:
        """User space goes on after `freeze_processes`."""
        self.machine.power.frozen = False

    def suspend_devices(self) -> int:
        """0: this machine has no devices to suspend."""
        return 0

    def resume_devices(self) -> None:
        """The reverse of `suspend_devices`, which had none to suspend."""

"""What EL2, Linux and its drivers are built on: RAM, who has which page of it, and the TLBs of the CPUs."""

from __future__ import annotations

from collections.abc import Callable

from guest_memfd.compat import override
from guest_memfd.errors import BadInput
from guest_memfd.machine.hw.arm64.tlb import Tlb
from guest_memfd.machine.hw.buddy import Buddy
from guest_memfd.machine.hw.ram import Ram
from guest_memfd.words.units import Pa


class KernelPages(Buddy):
    """Linux's own pages. A table is zeroed by the kernel, so from then on the host's stage 2 maps it."""

    touched: Callable[[Pa], None] = staticmethod(lambda pa: None)

    @override
    def alloc_table(self) -> Pa:
        """One zeroed page; raises OutOfMemory."""
        pa = super().alloc_table()
        self.touched(pa)
        return pa


class Hardware:
    """*ram* bytes, of which EL2 has a pool of its own, and *cpus* TLBs; raises BadInput for less than a machine needs."""

    def __init__(self, ram: int, cpus: int) -> None:
        if cpus < 1:
            raise BadInput(f"a machine needs a CPU, not {cpus}")
        if ram < 16 << 20:
            raise BadInput(f"a machine needs 16 MiB of RAM at least, not {ram:#x} bytes")
        self.ram = Ram(ram)
        pool = min(max(ram >> 7, 4 << 20) & -(1 << 21), 8 << 30)
        self.el2_pool = Buddy(self.ram, self.ram.end - pool, pool)
        self.kernel_pages = KernelPages(self.ram, self.ram.base, ram - pool)
        self.tlbs = [Tlb() for _ in range(cpus)]

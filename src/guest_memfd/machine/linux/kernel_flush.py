"""flush_tlb_kernel_range(). Here is which TLBI operations a range becomes (arch/arm64/include/asm/tlbflush.h)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from guest_memfd.machine.hw.arm64 import tlbi
from guest_memfd.machine.hw.arm64.tlb import Tlb
from guest_memfd.words.units import PAGE, Va

MAX_DVM_OPS = 512
"""Without range operations, so many pages (4 KiB) are too many to be flushed one by one."""
MAX_TLBI_RANGE_PAGES = 32 << 16
"""With range operations, more than this are too many."""


class KernelFlush:
    """Broadcasts to *tlbs* in the context of the VMID that vmid() gives; `counts` is operations by kind.

    *release*: 6.12 knows no range operations for the kernel, and flushes exactly 512 pages one by one.
    """

    def __init__(self, tlbs: Sequence[Tlb], release: str, *, tlb_range: bool, vmid: Callable[[], int]) -> None:
        self.tlbs, self.vmid = tlbs, vmid
        self.ranges = tlb_range and release != "6.12"
        self.too_many = MAX_TLBI_RANGE_PAGES + 1 if self.ranges else MAX_DVM_OPS + (release == "6.12")
        self.counts = {"vaale1is": 0, "rvaale1is": 0, "vmalle1is": 0}

    def __call__(self, start: Va, end: Va) -> None:
        """All CPUs forget the last-level entries of kernel addresses [start, end), rounded to pages."""
        start, end = start & -PAGE, end + -end % PAGE
        nr = (end - start) // PAGE
        if nr >= self.too_many:
            self.counts["vmalle1is"] += 1
            tlbi.vmalle1is(self.tlbs, self.vmid())
            return
        # __flush_tlb_range_op(): the largest scale first, an odd page by itself.
        scale = 3
        while nr:
            pages = 1
            if not self.ranges or nr == 1:
                self.counts["vaale1is"] += 1
                tlbi.vaale1is(self.tlbs, start, self.vmid())
            else:
                pages = min(nr >> 5 * scale + 1, 32) << 5 * scale + 1
                scale -= 1
                if pages:
                    self.counts["rvaale1is"] += 1
                    tlbi.rvaale1is(self.tlbs, start, pages * PAGE, self.vmid())
            start, nr = start + pages * PAGE, nr - pages

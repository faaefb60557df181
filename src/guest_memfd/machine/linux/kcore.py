"""/proc/kcore, the kernel's memory as root reads it. Here is which RAM pages are read at all, and what a fault leaves
(read_kcore_iter() in fs/proc/kcore.c).
"""

from __future__ import annotations

from typing import Protocol

from guest_memfd.words.units import PAGE, Pa


class Kcore(Protocol):
    """What read_kcore() asks of the kernel; physical addresses."""

    def is_ram(self, pa: Pa) -> bool:
        """pfn_is_ram(), and the page is online."""

    def is_offline(self, pa: Pa) -> bool:
        """PageOffline() of the page at *pa*: a balloon or memory hotplug has taken it, and it is read as zeros."""

    def is_hwpoison(self, pa: Pa) -> bool:
        """The page, or a page of its folio, is poisoned."""

    def copy_from_kernel_nofault(self, pa: Pa, nr: int) -> bytes | None:
        """*nr* bytes through the linear map; None when a fault was fixed up (-EFAULT)."""


def read_kcore(kernel: Kcore, pa: Pa, nr: int) -> bytes:
    """*nr* bytes of RAM from *pa* on; zeros for what is no RAM, offline or poisoned, and for a page that faults."""
    out = bytearray()
    while nr:
        chunk = min(nr, PAGE - pa % PAGE)
        page = pa & -PAGE
        data = None
        if kernel.is_ram(page) and not kernel.is_offline(page) and not kernel.is_hwpoison(page):
            data = kernel.copy_from_kernel_nofault(pa, chunk)
        out += bytes(chunk) if data is None else data
        pa, nr = pa + chunk, nr - chunk
    return bytes(out)

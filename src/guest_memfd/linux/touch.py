"""What it costs to touch pages of a file for the first time, and to free them. No page of these files is private or missing.

memfd_secret(2) takes each page out of the direct map at its first touch: it writes one entry, splits the leaf around it if
that is larger, and flushes the kernel's TLBs. When the page is freed it zeroes it, and puts the entry back.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable
from typing import NamedTuple

from guest_memfd.linux.fd import Descriptor
from guest_memfd.linux.mapping import PAGE, LinuxMapping


class Touched(NamedTuple):
    """Seconds: a store to each page, the same again, munmap() and close()."""

    first: float
    again: float
    free: float

    def fault(self, pages: int) -> float:
        """Microseconds for the fault of one of *pages*: a store to a page that is there is not counted."""
        return (self.first - self.again) / pages * 1e6

    def freed(self, pages: int) -> float:
        """Microseconds to free one of *pages*."""
        return self.free / pages * 1e6


def timed(n: int, step: Callable[[], object]) -> float:
    """Seconds that *step* takes, of *n* times."""
    start = time.perf_counter()
    for _ in range(n):
        step()
    return (time.perf_counter() - start) / n


def memfd(size: int) -> Descriptor:
    """A memfd of *size* bytes."""
    file = Descriptor(os.memfd_create("gmem"), "memfd")
    os.ftruncate(file.fileno(), size)
    return file


def touched(file: Descriptor, size: int) -> Touched:
    """Touch and free all of *file*, which is closed. Raises SyscallFailed from mmap(2).

    Where the kernel has no page for a touch the process gets SIGBUS.
    """
    try:
        mapping = LinuxMapping(file, 0, size)
    except BaseException:
        file.close()
        raise

    def each() -> None:
        # Not by the safe way, which would be most of the cost.
        for at in range(0, size, PAGE):
            ctypes.memset(mapping.address + at, 1, 8)

    def free() -> None:
        mapping.close()
        file.close()

    return Touched(timed(1, each), timed(1, each), timed(1, free))


def direct_map() -> dict[str, int]:
    """Size of leaf -> kB of the direct map in such leaves (``DirectMap2M``); empty where the kernel does not say (arm64)."""
    with open("/proc/meminfo", encoding="ascii") as file:
        rows = (row.split(":") for row in file)
        return {name: int(rest.split()[0]) for name, rest in rows if name.startswith("DirectMap")}


def splits(before: dict[str, int], after: dict[str, int]) -> int:
    """How many leaves of 2M and of 1G there are less; those of 1G become such of 2M, which are counted with them."""
    gone = {name: max(before[name] - after.get(name, 0), 0) for name in before}
    large = gone.get("DirectMap1G", 0) >> 20
    # Of the leaves of 2M there are 512 more for each of 1G.
    small = before.get("DirectMap2M", 0) - after.get("DirectMap2M", 0) + (large << 20)
    return large + max(small >> 11, 0)

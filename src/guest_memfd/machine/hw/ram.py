"""Physical memory: one sparse array of bytes. RAM costs what is touched, whatever its size.

The array is anonymous memory of this process that is never reserved, so a machine of 1 TiB is an address range until
someone writes to it; Unicorn executes on the same bytes.
"""

from __future__ import annotations

import ctypes
import mmap

from guest_memfd.errors import BadInput, HostUnavailable
from guest_memfd.words.units import PAGE, Pa

BASE = Pa(0x8000_0000)
"""Where RAM begins on this machine (memstart), as on most arm64 boards; below are devices."""

# Linux's value; the mmap module has no name for it before 3.12.
_MAP_NORESERVE = 0x4000
# From this size on, zeroing gives the memory back instead of writing to it.
_GIVE_BACK = 1 << 16


class BusError(Exception):
    """There is no memory at this physical address."""

    def __init__(self, pa: Pa) -> None:
        super().__init__(f"no memory at physical address {pa:#x}")
        self.pa = pa


class Ram:
    """*size* bytes from physical address *base* on; all zeros at first.

    Raises BadInput when the size is no positive multiple of a page, HostUnavailable when there is no address range for it.
    """

    def __init__(self, size: int, base: Pa = BASE) -> None:
        if size <= 0 or size % PAGE:
            raise BadInput(f"RAM of {size:#x} bytes: the size must be a positive multiple of {PAGE}")
        self.size, self.base, self.end = size, base, base + size
        try:
            self._store = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
        except OverflowError as error:
            raise BadInput(f"no address range for RAM of {size:#x} bytes: {error}") from error
        except OSError as error:
            raise HostUnavailable(f"no address range for RAM of {size:#x} bytes: {error.strerror}; ulimit -v may allow more"
                                  ) from error
        self._bytes = memoryview(self._store)
        self._words = self._bytes.cast("Q")

    @property
    def pointer(self) -> int:
        """Address of the first byte in this process."""
        return ctypes.addressof(ctypes.c_char.from_buffer(self._store))

    def contains(self, pa: Pa, nr: int = 1) -> bool:
        """Whether all of [pa, pa+nr) is RAM."""
        return self.base <= pa and pa + nr <= self.end

    def _at(self, pa: Pa, nr: int) -> int:
        if not self.contains(pa, nr):
            raise BusError(pa)
        return pa - self.base

    def read64(self, pa: Pa) -> int:
        """The aligned little-endian doubleword at *pa*."""
        if not self.base <= pa < self.end:
            raise BusError(pa)
        return self._words[(pa - self.base) >> 3]

    def write64(self, pa: Pa, value: int) -> None:
        """Store an aligned doubleword."""
        if not self.base <= pa < self.end:
            raise BusError(pa)
        self._words[(pa - self.base) >> 3] = value

    def read(self, pa: Pa, nr: int) -> bytes:
        """The *nr* bytes from physical address *pa* on; raises BusError where there is no RAM."""
        at = self._at(pa, nr)
        return bytes(self._bytes[at:at + nr])

    def write(self, pa: Pa, data: bytes) -> None:
        """Store *data* from physical address *pa* on; raises BusError where there is no RAM."""
        at = self._at(pa, len(data))
        self._bytes[at:at + len(data)] = data

    def fill(self, pa: Pa, nr: int, byte: int) -> None:
        """Store the same byte *nr* times."""
        at = self._at(pa, nr)
        self._bytes[at:at + nr] = bytes((byte,)) * nr

    def zero(self, pa: Pa, nr: int) -> None:
        """Store zeros; whole pages of large ranges are given back and cost nothing from then on."""
        at = self._at(pa, nr)
        if nr < _GIVE_BACK or at % PAGE or nr % PAGE:
            self._bytes[at:at + nr] = bytes(nr)
        else:
            self._store.madvise(mmap.MADV_DONTNEED, at, nr)

"""Memory of this process that no one takes away. It may be touched from user space, and is."""

from __future__ import annotations

import ctypes
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, PROT_READ, PROT_WRITE

from guest_memfd.compat import override
from guest_memfd.errors import BadInput
from guest_memfd.linux import syscall
from guest_memfd.linux.fd import OwnedFd
from guest_memfd.words.units import Va


class Anonymous(OwnedFd):
    """*size* bytes of zeros at `address`, for a plain slot. Raises SyscallFailed."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.address = Va(syscall.mmap(-1, 0, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS))
        self.closed = False

    def put(self, at: int, data: bytes) -> None:
        """Store *data* from byte *at* on; raises BadInput beyond the memory, or once it is closed."""
        if self.closed or not 0 <= at <= at + len(data) <= self.size:
            raise BadInput(f"{len(data):#x} bytes at {at:#x} of memory of {0 if self.closed else self.size:#x} bytes")
        ctypes.memmove(self.address + at, data, len(data))

    @override
    def _release(self) -> None:
        syscall.munmap(self.address, self.size)

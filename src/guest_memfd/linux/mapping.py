"""A mapping that can be touched safely. No load or store here is ever executed in user space.

A page that is private, missing or past the end of the file answers a load with SIGBUS, and a process cannot survive that
from Python. So the kernel touches it for us, where the same fault is an error code: `syscall.copy_from` and `copy_to`.
Of the ways to do that, this one copies once, needs no pipe or file between, no lock, and works for memfd_secret and
memory without a direct map, too, which get_user_pages() refuses; asking first (mincore(2), MADV_POPULATE_READ) would be
out of date by the time of the touch. It costs a system call: bench/linux.py compares it with memmove().
"""

from __future__ import annotations

import ctypes
import os
from errno import EBADF
from mmap import MAP_PRIVATE, MAP_SHARED, PROT_READ, PROT_WRITE
from typing import Any

from guest_memfd.compat import override
from guest_memfd.errors import BadInput, Signalled, SyscallFailed
from guest_memfd.linux import syscall
from guest_memfd.linux.fd import Descriptor, OwnedFd
from guest_memfd.words.units import Va

PAGE = os.sysconf("SC_PAGESIZE")
"""Bytes of a page of the kernel that this process runs on; on arm64 it need not be the emulated machine's 4 KiB."""
BUS_ADRERR = 2
"""si_code of the SIGBUS of a fault handler that has no page (include/uapi/asm-generic/siginfo.h)."""

_new_bytes = ctypes.pythonapi.PyBytes_FromStringAndSize
_new_bytes.argtypes, _new_bytes.restype = (ctypes.c_void_p, ctypes.c_ssize_t), ctypes.py_object
_bytes_at = ctypes.pythonapi.PyBytes_AsString
_bytes_at.argtypes, _bytes_at.restype = (ctypes.py_object,), ctypes.c_void_p


class LinuxMapping(OwnedFd):
    """uapi/memory.py Mapping: *nr* bytes of *file* from byte *offset* on. Raises SyscallFailed from mmap(2).

    `address`: where it lies, for a memory slot's userspace_addr; a caller that touches that by itself takes the signal.
    It outlives its file's descriptor. Not to be closed while another thread uses it.
    """

    def __init__(self, file: Descriptor, offset: int, nr: int, *, shared: bool = True, flags: int = 0) -> None:
        fd = file.fileno()
        self.offset, self.size, self.name = offset, nr, file.name
        self.address = Va(syscall.mmap(fd, offset, nr, PROT_READ | PROT_WRITE,
                                       flags | (MAP_SHARED if shared else MAP_PRIVATE)))
        self.closed = False

    def read(self, at: int, nr: int) -> bytes:
        """*nr* bytes from byte *at* on; raises Signalled at the first byte that a load does not get, BadInput beyond."""
        where = self._at("read", at, nr)
        data: bytes = _new_bytes(None, nr)              # no one else has it yet, so it may be filled
        # Copied by a system call and not by a load: where there is no page it returns a short count, and a load would
        # be SIGBUS.
        self._whole(where, syscall.copy_from(where, _bytes_at(data), nr) if nr else 0, nr)
        return data

    def readinto(self, at: int, buffer: Any) -> None:
        """`read` into a writable buffer of ordinary memory, all of it; what came before a Signalled is in it."""
        view = memoryview(buffer).cast("B")
        where = self._at("read", at, view.nbytes)
        if view.nbytes:
            ours = ctypes.addressof(ctypes.c_char.from_buffer(view))
            self._whole(where, syscall.copy_from(where, ours, view.nbytes), view.nbytes)

    def write(self, at: int, data: bytes) -> None:
        """Store *data* from byte *at* on; raises as `read`. What lies before the page that refused has been written."""
        if not isinstance(data, bytes):
            data = bytes(memoryview(data))
        where = self._at("write", at, len(data))
        self._whole(where, syscall.copy_to(where, _bytes_at(data), len(data)) if data else 0, len(data))

    def advise(self, advice: int, at: int = 0, nr: int | None = None) -> None:
        """madvise(2) of [at, at+nr) bytes, *nr* None being the rest; raises SyscallFailed, BadInput beyond."""
        nr = self.size - at if nr is None else nr
        syscall.madvise(self._at("madvise", at, nr), nr, advice)

    # The address of [at, at+nr), which is inside.
    def _at(self, call: str, at: int, nr: int) -> int:
        if self.closed:
            raise SyscallFailed(EBADF, call, "the mapping has been closed")
        if at < 0 or nr < 0 or at + nr > self.size:
            raise BadInput(f"{call} of {nr:#x} bytes at {at:#x} of a mapping of {self.size:#x} bytes")
        return self.address + at

    @staticmethod
    def _whole(where: int, done: int, nr: int) -> None:
        if done < nr:
            raise Signalled("SIGBUS", where + done, BUS_ADRERR)

    @override
    def _release(self) -> None:
        syscall.munmap(self.address, self.size)

    @override
    def __repr__(self) -> str:
        where = "closed" if self.closed else f"at {self.address:#x}"
        return f"<Mapping of {self.name}, {self.size:#x} bytes from {self.offset:#x} on, {where}>"

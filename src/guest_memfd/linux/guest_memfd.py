"""KVM's guest_memfd (virt/kvm/guest_memfd.c). What the kernel says is what the caller gets."""

from __future__ import annotations

import os
from errno import EINTR

from guest_memfd.errors import SyscallFailed
from guest_memfd.linux import syscall
from guest_memfd.linux.abi.memory import Cachestat
from guest_memfd.linux.fd import Descriptor
from guest_memfd.linux.mapping import PAGE, LinuxMapping
from guest_memfd.uapi import kvm as uapi
from guest_memfd.uapi.memory import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, Stat

_PUNCH = FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE


class MemoryFile(Descriptor):
    """uapi/memory.py GuestMemory: a file of *size* bytes that some device has made, *fd*."""

    def __init__(self, fd: int, name: str, size: int) -> None:
        super().__init__(fd, name)
        self.size = size

    def fallocate(self, mode: int, offset: int, nr: int) -> None:
        """fallocate(2), bytes; raises SyscallFailed. After EINTR the pages allocated by then are still there."""
        syscall.fallocate(self._fd, mode, offset, nr)

    def allocate(self, offset: int, nr: int) -> None:
        """fallocate(2) with KEEP_SIZE that goes on after a signal, from the first page that is missing.

        So it ends even if signals come faster than pages that are there can be walked. Raises SyscallFailed for everything
        but EINTR, and whatever a signal handler raises.
        """
        end = offset + nr
        while True:
            try:
                return self.fallocate(FALLOC_FL_KEEP_SIZE, offset, end - offset)
            except SyscallFailed as error:
                if error.errno != EINTR:
                    raise
            offset += self._present(offset, end - offset)

    # How many bytes from *offset* on are allocated without a hole, at most *nr* less a page: by bisection.
    def _present(self, offset: int, nr: int) -> int:
        low, high = 0, nr // PAGE - 1
        while low < high:
            middle = (low + high + 1) // 2
            if self.cachestat(offset, middle * PAGE).nr_cache == middle:
                low = middle
            else:
                high = middle - 1
        return low * PAGE

    def punch_hole(self, offset: int, nr: int) -> None:
        """fallocate(2) with KEEP_SIZE | PUNCH_HOLE; raises SyscallFailed."""
        syscall.fallocate(self._fd, _PUNCH, offset, nr)

    def mmap(self, offset: int = 0, nr: int | None = None, *, shared: bool = True) -> LinuxMapping:
        """mmap(2) of PROT_READ | PROT_WRITE, bytes; *nr* None: to the end of the file. Raises SyscallFailed."""
        return LinuxMapping(self, offset, max(self.size - offset, 0) if nr is None else nr, shared=shared)

    def fstat(self) -> Stat:
        """fstat(2); KVM never counts blocks, `resident` does."""
        found = os.fstat(self.fileno())
        return Stat(found.st_mode, found.st_size, found.st_blocks)

    def cachestat(self, offset: int = 0, nr: int = 0) -> Cachestat:
        """cachestat(2) of *nr* bytes from *offset* on, 0 being all the rest. Raises SyscallFailed, HostUnavailable."""
        return syscall.cachestat(self.fileno(), offset, nr)

    def resident(self, offset: int = 0, nr: int = 0) -> int:
        """How many pages of [offset, offset+nr) there are; arguments and errors as for `cachestat`."""
        return int(self.cachestat(offset, nr).nr_cache)


class GuestMemfd(MemoryFile):
    """A guest_memfd of this kernel's KVM, with the calls that uapi/kvm.py promises in KvmGuestMemory."""

    def set_memory_attributes2(self, attributes: uapi.MemoryAttributes2) -> None:
        """KVM_SET_MEMORY_ATTRIBUTES2; raises SyscallFailed with `attributes.error_offset` filled in, ENOTTY without it."""
        syscall.ioctl(self.fileno(), uapi.SET_MEMORY_ATTRIBUTES2, attributes, call="KVM_SET_MEMORY_ATTRIBUTES2",
                      why=f"{attributes.size:#x} bytes at {attributes.offset:#x}")


def create(vm: Descriptor, size: int, flags: int) -> GuestMemfd:
    """KVM_CREATE_GUEST_MEMFD on *vm*; raises SyscallFailed."""
    fd = syscall.ioctl(vm.fileno(), uapi.CREATE_GUEST_MEMFD, uapi.CreateGuestMemfd(size, flags),
                       call="KVM_CREATE_GUEST_MEMFD", why=f"{size:#x} bytes, flags {flags:#x}")
    return GuestMemfd(fd, "guest_memfd", size)

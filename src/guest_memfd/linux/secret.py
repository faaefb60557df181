"""memfd_secret(2) (mm/secretmem.c): memory that is in no direct map. Its limits are said, not hidden.

    size        set once, by ftruncate(2) while it is 0; no fallocate(2), so a page that has been touched stays
    contents    only through a mapping: no read(2), no write(2), no get_user_pages() (so no process_vm_readv(2) of it,
                O_DIRECT, io_uring buffers, and no guest: KVM takes the pages of a plain slot that way)
    mapping     only MAP_SHARED; its length counts against RLIMIT_MEMLOCK at mmap(2) (EAGAIN) without CAP_IPC_LOCK;
                MAP_POPULATE does nothing, every page is made by a touch
    cost        each new page splits the direct map down to 4K entries around it, which nothing merges again
"""

from __future__ import annotations

import os
from errno import ENOSYS

from guest_memfd.errors import HostUnavailable, SyscallFailed
from guest_memfd.linux import syscall
from guest_memfd.linux.abi.memfd_secret import SecretFlag
from guest_memfd.linux.abi.memory import numbers
from guest_memfd.linux.fd import Descriptor
from guest_memfd.linux.mapping import LinuxMapping
from guest_memfd.uapi.memory import Stat


class Secret(Descriptor):
    """A memfd_secret of *size* bytes. Raises SyscallFailed, HostUnavailable when there is none on this kernel."""

    def __init__(self, size: int, flags: int = SecretFlag.CLOEXEC) -> None:
        try:
            fd = syscall.raw(numbers().memfd_secret, flags, call="memfd_secret", why=f"flags {flags:#x}")
        except SyscallFailed as error:
            if error.errno == ENOSYS:
                raise HostUnavailable("memfd_secret(2) is not here: no CONFIG_SECRETMEM, secretmem.enable=0, or a direct "
                                      "map that cannot be changed page by page (arm64: rodata=full)") from error
            raise
        super().__init__(fd, "memfd_secret")
        self.size = 0
        try:
            self.truncate(size)
        except SyscallFailed:
            self.close()
            raise

    def truncate(self, size: int) -> None:
        """ftruncate(2), bytes: EINVAL once the size is not 0."""
        with syscall.named("ftruncate", f"{size:#x} bytes; now {self.size:#x}"):
            os.ftruncate(self.fileno(), size)
        self.size = size

    def mmap(self, offset: int = 0, nr: int | None = None, *, shared: bool = True) -> LinuxMapping:
        """mmap(2), bytes; *nr* None: to the end. EAGAIN above RLIMIT_MEMLOCK, EINVAL unless *shared*."""
        return LinuxMapping(self, offset, self.size - offset if nr is None else nr, shared=shared)

    def fstat(self) -> Stat:
        """Mode, size in bytes and blocks of 512 bytes, from fstat(2)."""
        found = os.fstat(self.fileno())
        return Stat(found.st_mode, found.st_size, found.st_blocks)

"""System calls by name, and the words of their arguments.

A call goes to the kernel as it is given, wrong arguments included, which the C library might refuse or repeat. Numbers:
arch/x86/entry/syscalls/syscall_64.tbl and scripts/syscall.tbl.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable
from errno import ENOSYS
from typing import Any

from guest_memfd.errors import SyscallFailed, errno_name
from guest_memfd.linux.syscall import raw

_X86, _ARM = 0, 1
_NUMBERS: dict[str, tuple[int, int]] = {
    "read": (0, 63), "write": (1, 64), "lseek": (8, 62), "mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215),
    "ioctl": (16, 29), "pread64": (17, 67), "pwrite64": (18, 68), "readv": (19, 65), "writev": (20, 66),
    "madvise": (28, 233), "sendfile": (40, 71), "fcntl": (72, 25), "fsync": (74, 82), "truncate": (76, 45),
    "ftruncate": (77, 46), "fchmod": (91, 52), "fchown": (93, 55), "fstatfs": (138, 44), "mlock": (149, 228),
    "munlock": (150, 229), "fsetxattr": (190, 7), "fgetxattr": (193, 10), "flistxattr": (196, 13), "futex": (202, 98),
    "epoll_ctl": (233, 21), "mbind": (237, 235), "set_mempolicy": (238, 237),
    "get_mempolicy": (239, 236), "openat": (257, 56), "linkat": (265, 37),
    "splice": (275, 76), "vmsplice": (278, 75), "move_pages": (279, 239), "utimensat": (280, 88), "fallocate": (285, 47),
    "preadv": (295, 69), "pwritev": (296, 70), "name_to_handle_at": (303, 264), "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271), "memfd_create": (319, 279), "execveat": (322, 281), "userfaultfd": (323, 282),
    "mlock2": (325, 284), "copy_file_range": (326, 285), "io_uring_setup": (425, 425), "io_uring_register": (427, 427),
    "pidfd_open": (434, 434), "pidfd_getfd": (438, 438), "memfd_secret": (447, 447), "cachestat": (451, 451),
}
_COLUMN = {"x86_64": _X86, "aarch64": _ARM}.get(platform.machine())

FAILED = (OSError, SyscallFailed)
"""What a call that returned -1 raises: ours, or Python's own."""


def call(name: str, *given: Any) -> int:
    """The system call *name*: numbers go as they are, ctypes objects and bytes by address, None as 0.

    Raises SyscallFailed; ENOSYS for an architecture whose numbers are not in the table.
    """
    if _COLUMN is None:
        raise SyscallFailed(ENOSYS, name, f"numbers of system calls on {platform.machine()} are not known here")
    words = [0 if x is None else ctypes.create_string_buffer(x) if isinstance(x, bytes) else x for x in given]
    return raw(_NUMBERS[name][_COLUMN], *words, call=name)


def name_of(error: OSError | SyscallFailed) -> str:
    """The name of the errno, as ``EINVAL``; its number where it has no name."""
    return errno_name(error.errno or 0)


def attempt(do: Callable[[], object]) -> str:
    """What *do* comes to, as one word: ``ok``, a value, or an errno's name."""
    try:
        value = do()
    except FAILED as error:
        return name_of(error)
    return "ok" if value is None else str(value)


PROT_NONE, PROT_READ, PROT_WRITE, PROT_EXEC = 0, 1, 2, 4
RW = PROT_READ | PROT_WRITE
MAP_SHARED, MAP_PRIVATE, MAP_SHARED_VALIDATE, MAP_ANONYMOUS = 1, 2, 3, 0x20
MAP_GROWSDOWN, MAP_LOCKED, MAP_POPULATE, MAP_HUGETLB, MAP_SYNC = 0x100, 0x2000, 0x8000, 0x40000, 0x80000
KEEP_SIZE, PUNCH_HOLE = 1, 2
PUNCH = KEEP_SIZE | PUNCH_HOLE
AT_FDCWD, AT_EMPTY_PATH = -100, 0x1000

ADVICE = {
    "NORMAL": 0, "RANDOM": 1, "SEQUENTIAL": 2, "WILLNEED": 3, "DONTNEED": 4, "FREE": 8, "REMOVE": 9, "DONTFORK": 10,
    "DOFORK": 11, "MERGEABLE": 12, "UNMERGEABLE": 13, "HUGEPAGE": 14, "NOHUGEPAGE": 15, "DONTDUMP": 16, "DODUMP": 17,
    "WIPEONFORK": 18, "KEEPONFORK": 19, "COLD": 20, "PAGEOUT": 21, "POPULATE_READ": 22, "POPULATE_WRITE": 23,
    "DONTNEED_LOCKED": 24, "COLLAPSE": 25, "HWPOISON": 100, "SOFT_OFFLINE": 101, "GUARD_INSTALL": 102, "GUARD_REMOVE": 103,
}
"""madvise(2), by name (include/uapi/asm-generic/mman-common.h)."""


def load(address: int, nr: int = 1) -> bytes:
    """*nr* bytes at *address*, by the CPU: may be the end of the process."""
    return ctypes.string_at(address, nr)


def store(address: int, data: bytes) -> None:
    """Bytes to *address*, by the CPU."""
    ctypes.memmove(address, data, len(data))

"""A guest_memfd file and a mapping of it, as a VMM holds them."""

from __future__ import annotations

from enum import IntEnum
from types import TracebackType
from typing import NamedTuple, Protocol, Self

from guest_memfd.words.units import Va

FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_COLLAPSE_RANGE, FALLOC_FL_ZERO_RANGE = 0x01, 0x02, 0x08, 0x10
FALLOC_FL_INSERT_RANGE, FALLOC_FL_UNSHARE_RANGE, FALLOC_FL_WRITE_ZEROES = 0x20, 0x40, 0x80
"""Mode bits of fallocate(2) (include/uapi/linux/falloc.h)."""


class Advice(IntEnum):
    """Advice of madvise(2) that means something for a file's mapping (include/uapi/asm-generic/mman-common.h)."""

    NORMAL, RANDOM, SEQUENTIAL, WILLNEED, DONTNEED = range(5)
    FREE, REMOVE, DONTFORK, DOFORK = range(8, 12)
    DONTDUMP, DODUMP, WIPEONFORK, KEEPONFORK, COLD, PAGEOUT, POPULATE_READ, POPULATE_WRITE, DONTNEED_LOCKED = range(16, 25)


class Stat(NamedTuple):
    """The fields of struct stat that mean something here: mode, size in bytes, blocks of 512 bytes."""

    mode: int
    size: int
    blocks: int


class Owner(Protocol):
    """Something that owns a file descriptor or a mapping: `close` gives it up; a with block does so at its end."""

    def close(self) -> None:
        """Give it up; a second time changes nothing."""

    @property
    def closed(self) -> bool:
        """Whether it has been given up; using it then is SyscallFailed(EBADF)."""

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None: ...


class Mapping(Owner, Protocol):
    """A shared mapping of part of a file: *size* bytes from file offset *offset* on; offsets below count from its start.

    A touch of memory the host may not have raises Signalled instead of killing anybody.
    """

    offset: int
    size: int

    @property
    def address(self) -> Va:
        """Where it lies in the VMM's address space, for the userspace_addr of a memory slot."""

    def read(self, at: int, nr: int) -> bytes:
        """*nr* bytes; raises Signalled, BadInput beyond the mapping."""

    def write(self, at: int, data: bytes) -> None:
        """Store bytes; raises as `read`. What lies before the page that refused has been written."""


class GuestMemory(Owner, Protocol):
    """A guest_memfd file of *size* bytes; offsets are bytes. All calls raise SyscallFailed."""

    size: int

    def fallocate(self, mode: int, offset: int, nr: int) -> None:
        """fallocate(2): *mode* as FALLOC_FL_*, *offset* and *nr* in bytes."""

    def punch_hole(self, offset: int, nr: int) -> None:
        """fallocate(2) with KEEP_SIZE | PUNCH_HOLE."""

    def mmap(self, offset: int = 0, nr: int | None = None, *, shared: bool = True) -> Mapping:
        """mmap(2) with PROT_READ | PROT_WRITE; *nr* None: to the end of the file."""

    def resident(self) -> int:
        """How many pages of the file there are, as cachestat(2) counts them."""

    def fstat(self) -> Stat:
        """Mode, size in bytes and blocks of 512 bytes, as fstat(2) gives them."""

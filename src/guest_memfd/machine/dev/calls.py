"""System calls on a guest_memfd and its mappings that no driver has a method for: what the VFS and mm answer.

File calls: fs/read_write.c, fs/open.c; there is no read_iter, write_iter or llseek, and setattr is always -EINVAL.
madvise(2): mm/madvise.c, in the order of its checks: the advice, the address, the length.
"""

from __future__ import annotations

from errno import EFAULT, EINVAL, ESPIPE
from typing import TYPE_CHECKING

from guest_memfd.errors import SyscallFailed
from guest_memfd.uapi.memory import Advice
from guest_memfd.words.units import PAGE, page_index

if TYPE_CHECKING:
    from guest_memfd.machine.dev.file import Mapped

REFUSED = {
    "read": EINVAL, "write": EINVAL, "pread64": ESPIPE, "pwrite64": ESPIPE, "lseek": ESPIPE, "ftruncate": EINVAL,
    "fchmod": EINVAL, "fsync": EINVAL,
}
"""errno of each."""

_NOT_OF_A_FILE = {Advice.FREE, Advice.WIPEONFORK}
"""Of private anonymous memory alone."""


def advise(mapped: Mapped, advice: int, at: int, nr: int) -> None:
    """madvise(2) of [at, at+nr) bytes of *mapped*, whole pages of which are in it; raises SyscallFailed."""
    if advice not in Advice.__members__.values():
        raise SyscallFailed(EINVAL, "madvise", f"advice {advice}")
    if at % PAGE:
        raise SyscallFailed(EINVAL, "madvise", f"address {mapped.vma.address + at:#x}")
    pages = -(-nr // PAGE)
    if not pages:
        return
    if advice in _NOT_OF_A_FILE:
        raise SyscallFailed(EINVAL, "madvise", f"advice {advice} is for anonymous memory")
    first, file = page_index(mapped.offset + at), mapped.file
    if advice == Advice.REMOVE:
        # vfs_fallocate() of the VMA's file, whose descriptor may have been closed long ago.
        file.check(file.run(file.library.punch_hole(first, pages)).ret, "madvise")
    elif advice in (Advice.POPULATE_READ, Advice.POPULATE_WRITE):
        if advice == Advice.POPULATE_WRITE and mapped.readonly:
            raise SyscallFailed(EINVAL, "madvise", "the mapping is read-only")
        for i in range(pages):
            if not file.fault_in(first + i):
                raise SyscallFailed(EFAULT, "madvise", f"page {first + i} of the file")
    # What is left says how the memory will be used. Entries may go, pages stay: they are unevictable.

"""irqfd and ioeventfd. Arguments are checked as documented; an eventfd is a number and a count.

Interrupts are not modelled: an irqfd is there, can be removed, and does nothing. Source: drivers/virt/gunyah/irqfd.c and
ioeventfd.c (series v17, patches 31 to 33).
"""

from __future__ import annotations

from errno import EBADF, EINVAL

from guest_memfd.errors import SyscallFailed
from guest_memfd.uapi.gunyah import IOEVENTFD_DATAMATCH, IRQFD_LEVEL, FnIoeventfdArg, FnIrqfdArg


class Irqfd:
    """One irqfd; raises SyscallFailed(EINVAL) for flags that do not exist."""

    def __init__(self, arg: FnIrqfdArg) -> None:
        if arg.flags & ~IRQFD_LEVEL:
            raise SyscallFailed(EINVAL, "ADD_FUNCTION", f"irqfd flags {arg.flags:#x}")
        self.arg = arg
        self.removed = False


class Ioeventfd:
    """One ioeventfd; `count` is what its eventfd would hold.

    Raises SyscallFailed: EINVAL for a length other than 0, 1, 2, 4, 8, a range that wraps, flags that do not exist, or a
    match on nothing; EBADF for a negative descriptor.
    """

    def __init__(self, arg: FnIoeventfdArg) -> None:
        call = "ADD_FUNCTION"
        if arg.len not in (0, 1, 2, 4, 8) or arg.addr + arg.len > 1 << 64:
            raise SyscallFailed(EINVAL, call, f"ioeventfd of {arg.len} bytes at {arg.addr:#x}")
        if arg.flags & ~IOEVENTFD_DATAMATCH:
            raise SyscallFailed(EINVAL, call, f"ioeventfd flags {arg.flags:#x}")
        if not arg.len and arg.flags & IOEVENTFD_DATAMATCH:
            raise SyscallFailed(EINVAL, call, "a match on no bytes")
        if arg.fd < 0:
            raise SyscallFailed(EBADF, call, f"descriptor {arg.fd}")
        self.arg = arg
        self.count = 0
        self.removed = False

    def takes(self, address: int, size: int, value: int) -> bool:
        """Whether a write of the guest is for it; then it has been counted."""
        arg = self.arg
        if address != arg.addr or arg.len not in (0, size):
            return False
        if arg.flags & IOEVENTFD_DATAMATCH and value != arg.datamatch:
            return False
        self.count += 1
        return True

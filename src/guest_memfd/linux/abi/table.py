"""A row of a device's table of commands."""

from __future__ import annotations

import ctypes
from typing import NamedTuple


class Command(NamedTuple):
    """One ioctl: the kernel's *name*, *on* which kind of descriptor, its *number*, and what its argument points to.

    *argument* None: it takes no pointer. *since*: the release that has it first, "" where that is older than 6.8 or none.
    """

    name: str
    on: str
    number: int
    argument: type[ctypes.Structure] | None = None
    since: str = ""

    @property
    def size(self) -> int:
        """Bytes of the argument as the number encodes them (_IOC_SIZE)."""
        return self.number >> 16 & 0x3FFF

    @property
    def direction(self) -> int:
        """_IOC_DIR of the number."""
        return self.number >> 30

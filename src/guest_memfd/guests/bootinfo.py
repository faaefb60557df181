"""What a guest is told when it starts. The layout is the one that common.s reads.

Six little-endian doublewords, 16-byte aligned: magic, hypervisor, private base and size, shared base and size; IPAs and
bytes. A guest without a shared window finds zeros there.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import NamedTuple

MAGIC = int.from_bytes(b"GMEMBOOT", "little")
_LAYOUT = struct.Struct("<6Q")
SIZE = _LAYOUT.size
"""Bytes."""


class BootHypervisor(IntEnum):
    """Whose hypercalls the guest has to use."""

    GUNYAH = 1
    PKVM = 2
    KVM = 3
    """Plain KVM: none, and the host has set the shared window up."""


class BootInfo(NamedTuple):
    """Where a guest's memory is."""

    hypervisor: BootHypervisor
    private_base: int
    private_size: int
    shared_base: int = 0
    shared_size: int = 0

    def pack(self) -> bytes:
        """The bytes to put where x0 points to at entry."""
        return _LAYOUT.pack(MAGIC, *self)

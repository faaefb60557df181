"""memfd_secret(2): its flags and its limits as bytes and numbers (mm/secretmem.c)."""

from __future__ import annotations

import os
from enum import IntFlag

SECRETMEM_MAGIC = 0x5345434D
"""f_type of fstatfs(2)."""


class SecretFlag(IntFlag):
    """Flags of memfd_secret(2); every other bit is EINVAL."""

    CLOEXEC = os.O_CLOEXEC

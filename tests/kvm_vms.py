"""VMs of the real /dev/kvm, for tests."""

from __future__ import annotations

import os

from guest_memfd.linux.guest_x86 import RESULT, SmallGuest
from guest_memfd.linux.mapping import PAGE
from guest_memfd.uapi.kvm_run import Mmio

GPA, SIZE = 0x100_0000, 16 * PAGE
SECONDS = 300.0
"""Far more than any program here needs."""
STORE = bytes.fromhex("488907" "488906" "ebfe")            # mov [rdi], rax; mov [rsi], rax; jmp .


def run(guest: SmallGuest, code: bytes, **registers: int) -> int:
    """Run *code* until it stores its result; the result."""
    guest.start(code, rsi=RESULT, **registers)
    out = guest.vcpu.run(SECONDS)
    assert isinstance(out, Mmio), out
    assert (out.phys_addr, out.size, out.is_write) == (RESULT, 8, True)
    return int.from_bytes(out.data, "little")


BIG = 512 << 20


def enough_memory() -> bool:
    return os.sysconf("SC_AVPHYS_PAGES") * PAGE > 2 * BIG

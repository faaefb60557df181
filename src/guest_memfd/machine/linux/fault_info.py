"""The fault table of arm64 Linux. It leads from a fault status code to handler, signal and name (fault_info[] in
arch/arm64/mm/fault.c).
"""

from __future__ import annotations

from typing import NamedTuple

SIGBUS, SIGKILL, SIGSEGV = 7, 9, 11
SEGV_MAPERR, SEGV_ACCERR, SEGV_MTESERR = 1, 2, 9
BUS_ADRALN, BUS_ADRERR, BUS_OBJERR, BUS_MCEERR_AR = 1, 2, 3, 4
SI_KERNEL = 0x80


class FaultInfo(NamedTuple):
    """One row: the name of the handler in mem_abort.py, the signal and its code, and what the fault is called."""

    handler: str
    signal: int
    code: int
    name: str


_LEVELS, _WALKED = range(4), range(-1, 4)

_ROWS = {
    0x00: FaultInfo("do_bad", SIGKILL, SI_KERNEL, "ttbr address size fault"),
    **{n: FaultInfo("do_bad", SIGKILL, SI_KERNEL, f"level {n} address size fault") for n in _LEVELS if n},
    **{0x04 + n: FaultInfo("do_translation_fault", SIGSEGV, SEGV_MAPERR, f"level {n} translation fault") for n in _LEVELS},
    **{0x08 + n: FaultInfo("do_page_fault", SIGSEGV, SEGV_ACCERR, f"level {n} access flag fault") for n in _LEVELS},
    **{0x0C + n: FaultInfo("do_page_fault", SIGSEGV, SEGV_ACCERR, f"level {n} permission fault") for n in _LEVELS},
    **{0x14 + n: FaultInfo("do_sea", SIGKILL, SI_KERNEL, f"level {n} (translation table walk)") for n in _WALKED},
    **{0x1C + n: FaultInfo("do_sea", SIGKILL, SI_KERNEL, f"level {n} synchronous parity error (translation table walk)")
       for n in _WALKED},
    0x10: FaultInfo("do_sea", SIGBUS, BUS_OBJERR, "synchronous external abort"),
    0x11: FaultInfo("do_tag_check_fault", SIGSEGV, SEGV_MTESERR, "synchronous tag check fault"),
    0x18: FaultInfo("do_sea", SIGBUS, BUS_OBJERR, "synchronous parity or ECC error"),
    0x21: FaultInfo("do_alignment_fault", SIGBUS, BUS_ADRALN, "alignment fault"),
    0x29: FaultInfo("do_bad", SIGKILL, SI_KERNEL, "level -1 address size fault"),
    0x2B: FaultInfo("do_translation_fault", SIGSEGV, SEGV_MAPERR, "level -1 translation fault"),
    0x30: FaultInfo("do_bad", SIGKILL, SI_KERNEL, "TLB conflict abort"),
    0x31: FaultInfo("do_bad", SIGKILL, SI_KERNEL, "Unsupported atomic hardware update fault"),
    0x34: FaultInfo("do_bad", SIGKILL, SI_KERNEL, "implementation fault (lockdown abort)"),
    0x35: FaultInfo("do_bad", SIGBUS, BUS_OBJERR, "implementation fault (unsupported exclusive)"),
    0x3D: FaultInfo("do_bad", SIGKILL, SI_KERNEL, "section domain fault"),
    0x3E: FaultInfo("do_bad", SIGKILL, SI_KERNEL, "page domain fault"),
}

fault_info = tuple(_ROWS.get(n, FaultInfo("do_bad", SIGKILL, SI_KERNEL, f"unknown {n}")) for n in range(64))
"""By fault status code."""

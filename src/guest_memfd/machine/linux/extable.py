"""The exception table: which instructions may fault, and what happens then. An instruction without an entry has no second
chance (arch/arm64/mm/extable.c, arch/arm64/include/asm/asm-extable.h).
"""

from __future__ import annotations

import struct
from bisect import bisect_left
from collections.abc import Callable, Iterable
from enum import IntEnum
from errno import EFAULT
from typing import NamedTuple, Protocol

from guest_memfd.words.units import Va

ZERO_REGISTER = 31
ENTRY_SIZE = 12

_WNR = 1 << 6
# ex_handler_bpf(): "no register to clear".
_DONT_CLEAR = 5
_U64 = (1 << 64) - 1


class ExType(IntEnum):
    """EX_TYPE_* of arch/arm64/include/asm/asm-extable.h: which handler fixes a fault up."""

    NONE = 0
    BPF = 1
    UACCESS_ERR_ZERO = 2
    KACCESS_ERR_ZERO = 3
    UACCESS_CPY = 4
    LOAD_UNALIGNED_ZEROPAD = 5


class ExceptionEntry(NamedTuple):
    """The instruction at `insn` may fault; execution then continues at `fixup`. `data`: register numbers, by type."""

    insn: int
    fixup: int
    type: ExType
    data: int

    def encode(self, at: int) -> bytes:
        """The 12 bytes of struct exception_table_entry at virtual address *at*; raises struct.error out of reach."""
        # Each of the two counts from its own place, so that the kernel can be loaded anywhere.
        return struct.pack("<iiHH", self.insn - at, self.fixup - (at + 4), self.type, self.data)

    @classmethod
    def decode(cls, at: int, data: bytes) -> ExceptionEntry:
        """The entry whose 12 bytes are at virtual address *at*; raises ValueError for an unknown type."""
        insn, fixup, kind, fields = struct.unpack("<iiHH", data)
        return cls(at + insn, at + 4 + fixup, ExType(kind), fields)


def registers(low: int, high: int) -> int:
    """The data field: *low* is the error or data register (4:0), *high* the zeroed or address register (9:5)."""
    return low | high << 5


class Registers(Protocol):
    """struct pt_regs as a handler sees it; x(31) and set_x(31, ...) are never called."""

    pc: int

    def x(self, n: int) -> int: ...  # noqa: D102
    def set_x(self, n: int, value: int) -> None: ...  # noqa: D102


def read_reg(regs: Registers, n: int) -> int:
    """pt_regs_read_reg(): 31 reads as zero."""
    return 0 if n == ZERO_REGISTER else regs.x(n)


def write_reg(regs: Registers, n: int, value: int) -> None:
    """pt_regs_write_reg(): a write to 31 is lost."""
    if n != ZERO_REGISTER:
        regs.set_x(n, value & _U64)


class ExceptionTable:
    """Entries sorted by the address of the instruction."""

    def __init__(self, entries: Iterable[ExceptionEntry] = ()) -> None:
        self._entries = sorted(entries)
        self._addresses = [entry.insn for entry in self._entries]

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, entries: Iterable[ExceptionEntry]) -> None:
        """A module's entries, too."""
        self._entries = sorted([*self._entries, *entries])
        self._addresses = [entry.insn for entry in self._entries]

    def search(self, pc: int) -> ExceptionEntry | None:
        """search_exception_tables(): the entry of the instruction at *pc*."""
        at = bisect_left(self._addresses, pc)
        return self._entries[at] if at < len(self._addresses) and self._addresses[at] == pc else None

    def encode(self, at: int) -> bytes:
        """The __ex_table section at virtual address *at*."""
        return b"".join(entry.encode(at + ENTRY_SIZE * i) for i, entry in enumerate(self._entries))

    def fixup(self, regs: Registers, esr: int, read_aligned: Callable[[Va], int]) -> bool:
        """fixup_exception(): True, and *regs* continue at the fixup; False when there is no entry for the pc.

        *read_aligned* reads the aligned doubleword at a kernel address as the zero-padding handler does, with an
        instruction that has no entry; what it raises when that faults passes through.
        """
        entry = self.search(regs.pc)
        return entry is not None and _HANDLERS[entry.type](entry, regs, esr, read_aligned)


Reader = Callable[[Va], int]


def _bug(entry: ExceptionEntry, regs: Registers, esr: int, read_aligned: Reader) -> bool:
    raise ValueError(f"exception table entry of type {entry.type.name} for {entry.insn:#x}: the kernel has BUG() here")


def _bpf(entry: ExceptionEntry, regs: Registers, esr: int, read_aligned: Reader) -> bool:
    if entry.data != _DONT_CLEAR:
        regs.set_x(entry.data, 0)
    regs.pc = entry.fixup
    return True


def _err_zero(entry: ExceptionEntry, regs: Registers, esr: int, read_aligned: Reader) -> bool:
    write_reg(regs, entry.data & 31, -EFAULT)
    write_reg(regs, entry.data >> 5 & 31, 0)
    regs.pc = entry.fixup
    return True


# A CPY instruction reads one side and writes the other: bit 0 of the data says which side is user memory.
def _uaccess_cpy(entry: ExceptionEntry, regs: Registers, esr: int, read_aligned: Reader) -> bool:
    if bool(entry.data & 1) != bool(esr & _WNR):
        return False
    regs.pc = entry.fixup
    return True


# Whichever page faulted: the word is read again, rounded down, and what lies beyond its end becomes zero.
def _zeropad(entry: ExceptionEntry, regs: Registers, esr: int, read_aligned: Reader) -> bool:
    address = read_reg(regs, entry.data >> 5 & 31)
    word = read_aligned(Va(address & ~7))
    write_reg(regs, entry.data & 31, word >> 8 * (address & 7))
    regs.pc = entry.fixup
    return True


_HANDLERS = {ExType.NONE: _bug, ExType.BPF: _bpf, ExType.UACCESS_ERR_ZERO: _err_zero, ExType.KACCESS_ERR_ZERO: _err_zero,
             ExType.UACCESS_CPY: _uaccess_cpy, ExType.LOAD_UNALIGNED_ZEROPAD: _zeropad}

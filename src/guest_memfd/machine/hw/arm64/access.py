"""What a load or store says about its own access. Instructions are decoded here, never executed.

Source: Arm ARM (DDI 0487) C4.1, "Loads and Stores".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from guest_memfd.machine.hw.arm64.fault import LoadStore


class Transfer(NamedTuple):
    """A load or store of one general register, as an abort syndrome with ISV=1 describes it."""

    write: bool
    size: int
    """Bytes: 1, 2, 4 or 8."""
    register: int
    """0..30, or 31 for the zero register."""
    sign_extend: bool
    sixty_four: bool
    """The destination is an X register (SF)."""

    @property
    def load_store(self) -> LoadStore:
        """The same for `Fault.esr_el2`."""
        return LoadStore(self.register, self.size, self.sixty_four, self.sign_extend)

    def extend(self, data: int) -> int:
        """What a load of *data* leaves in the register."""
        bits = 8 * self.size
        data &= (1 << bits) - 1
        if self.sign_extend and data >> (bits - 1):
            data -= 1 << bits
        return data & (0xffff_ffff_ffff_ffff if self.sixty_four else 0xffff_ffff)


def access_of(word: int) -> Transfer | None:
    """The transfer of a single-register load or store; None for any other instruction.

    Covers unsigned offset, unscaled, pre- and post-index and register offset. Writeback forms are decoded, too, although
    the architecture leaves ISV clear for them (ESR_ELx.ISV): code that builds a syndrome looks at `writes_back`.
    """
    if word >> 27 & 0b111 != 0b111 or word >> 26 & 1:
        return None
    if not word >> 24 & 1:
        mode, register_offset = word >> 10 & 3, word >> 21 & 1
        # Only a plain load or store of one register has a syndrome with ISV; a hypervisor that is given none cannot
        # emulate a device.
        if register_offset and mode != 2:
            return None                     # atomics and authenticated loads
    elif word >> 25 & 1:
        return None
    if word >> 25 & 1:
        return None
    size, opc, register = word >> 30, word >> 22 & 3, word & 31
    if opc == 0:
        return Transfer(True, 1 << size, register, False, size == 3)
    if opc == 1:
        return Transfer(False, 1 << size, register, False, size == 3)
    if size == 3 or (size == 2 and opc == 3):
        return None                         # PRFM, unallocated
    return Transfer(False, 1 << size, register, True, opc == 2)


def writes_back(word: int) -> bool:
    """Whether a single-register load or store changes its base register, too."""
    return access_of(word) is not None and not word >> 24 & 1 and not word >> 21 & 1 and bool(word >> 10 & 1)


def _signed(value: int, bits: int) -> int:
    return value - (1 << bits) if value >> (bits - 1) & 1 else value


def _register_offset(word: int, x: Callable[[int], int], scale: int) -> int:
    index, option = x(word >> 16 & 31), word >> 13 & 7
    if not option & 1:                      # UXTW, SXTW
        index &= 0xffff_ffff
        if option == 6:
            index = _signed(index, 32)
    return index << (scale if word >> 12 & 1 else 0)


# Load/store register: bits 29:27 are 111.
def _single(word: int, x: Callable[[int], int]) -> int:
    scale = word >> 30
    if word >> 26 & 1:                      # vector registers: a fifth size
        scale |= word >> 21 & 4
    if word >> 24 & 1:
        return (word >> 10 & 0xfff) << scale
    mode = word >> 10 & 3
    if word >> 21 & 1:
        if mode & 1:                        # authenticated
            return _signed(word >> 13 & 0x200 | word >> 12 & 0x1ff, 10) << 3
        return _register_offset(word, x, scale) if mode == 2 else 0
    return 0 if mode == 1 else _signed(word >> 12 & 0x1ff, 9)


# Load/store pair: bits 29:27 are 101.
def _pair(word: int) -> int:
    if word >> 23 & 3 == 1:                 # post-index
        return 0
    scale = (2 + (word >> 30)) if word >> 26 & 1 else 2 + (word >> 31)
    return _signed(word >> 15 & 0x7f, 7) << scale


def address_of(word: int, pc: int, x: Callable[[int], int], sp: Callable[[], int]) -> int | None:
    """The first byte that the load, store or cache operation *word* at *pc* accesses; None when it is none of these.

    *x* reads a general register (31 is zero), *sp* the stack pointer.
    """
    if word & 0xfff8_f000 == 0xd508_7000:   # DC, IC by address
        return x(word & 31)
    if word >> 27 & 1 != 1 or word >> 25 & 1:
        return None
    group = word >> 27 & 7
    if group == 0b011 and not word >> 24 & 1:
        return (pc + (_signed(word >> 5 & 0x7ffff, 19) << 2)) & 0xffff_ffff_ffff_ffff
    offset = 0                              # exclusives, ordered, vector structures: the base is the address
    if group == 0b111:
        offset = _single(word, x)
    elif group == 0b101:
        offset = _pair(word)
    elif group == 0b011:                    # LDAPUR, STLUR
        offset = _signed(word >> 12 & 0x1ff, 9)
    number = word >> 5 & 31
    base = sp() if number == 31 else x(number)
    return (base + offset) & 0xffff_ffff_ffff_ffff

"""An operand in memory as bytes. Rule of this file: of the encodings that mean an address, the shortest that GNU as knows
(tests/test_asm_x86.py holds it).

Source: Intel SDM vol. 2, tables 2-1, 2-2 and 2-3 (ModR/M and SIB), 2.2.1.6 "RIP-Relative Addressing".
"""

from __future__ import annotations

from typing import NamedTuple

from guest_memfd.asm.assembler import Malformed
from guest_memfd.asm.x86_64.operand import MemoryOperand, X86Register


class Field(NamedTuple):
    """Bytes that wait for a symbol: the value of *text*, in *low*..*high*; *relative* to the instruction's end."""

    text: str
    size: int
    low: int
    high: int
    relative: bool = False


Code = tuple[bytes | Field, ...]
_NO_INDEX = 4 << 3
# By the numbers of the registers: bx is 3, bp 5, si 6, di 7.
_RM16: dict[tuple[int, ...], int] = {(3, 6): 0, (3, 7): 1, (5, 6): 2, (5, 7): 3, (6,): 4, (7,): 5, (5,): 6, (3,): 7}


def signed(text: str, size: int, relative: bool = False) -> Field:
    """The signed number *text* of *size* bytes."""
    return Field(text, size, -1 << 8 * size - 1, (1 << 8 * size - 1) - 1, relative)


def wrapped(number: int, bits: int) -> int:
    """*number* as the signed number of so many bits that it is written as. Raises Malformed."""
    if not -1 << bits - 1 <= number < 1 << bits:
        raise Malformed(f"{number:#x} does not fit {bits} bits")
    return number - (1 << bits) if number >> bits - 1 == 1 else number


def modrm(field: int, rm: X86Register | MemoryOperand) -> Code:
    """ModRM with *field* in its middle, and what follows. Raises Malformed."""
    if isinstance(rm, X86Register):
        return (bytes((0xc0 | field << 3 | rm.number & 7,)),)
    if rm.base is not None and rm.base.kind == "rip":
        relative = rm.number is None
        rest = signed(rm.displacement, 4, True) if relative else _displacement(rm, 4)
        return bytes((5 | field << 3,)), rest
    if rm.width == 16:
        return _modrm16(field, rm)
    index = (rm.scale.bit_length() - 1) << 6 | (rm.index.number & 7) << 3 if rm.index is not None else _NO_INDEX
    if rm.base is None:
        # By way of SIB: in 64-bit mode ModRM alone would mean an address relative to RIP.
        return bytes((4 | field << 3, index | 5)), _displacement(rm, 4)
    base = rm.base.number & 7
    size = _displacement_size(rm, base == 5)
    start = _mod(size) | field << 3
    # 4 in ModRM announces SIB, so rsp and r12 as a base take one.
    if rm.index is None and base != 4:
        return bytes((start | base,)), _displacement(rm, size)
    return bytes((start | 4, index | base)), _displacement(rm, size)


def _modrm16(field: int, rm: MemoryOperand) -> Code:
    used = tuple(sorted(register.number for register in (rm.base, rm.index) if register is not None))
    if not used:
        return bytes((6 | field << 3,)), _displacement(rm, 2)
    size = _displacement_size(rm, used == (5,))
    return bytes((_mod(size) | field << 3 | _RM16[used],)), _displacement(rm, size)


def _mod(size: int) -> int:
    return {0: 0, 1: 0x40}.get(size, 0x80)


# A base of number 5 without displacement means something else.
def _displacement_size(memory: MemoryOperand, never_none: bool) -> int:
    if memory.number is None:
        return memory.width // 8 if memory.width == 16 else 4
    number = wrapped(memory.number, memory.width)
    if number == 0 and not never_none:
        return 0
    return 1 if -128 <= number < 128 else 2 if memory.width == 16 else 4


def _displacement(memory: MemoryOperand, size: int) -> bytes | Field:
    if memory.number is None:
        if memory.width == 64:
            return signed(memory.displacement, size)
        return Field(memory.displacement, size, -1 << memory.width - 1, (1 << memory.width) - 1)
    number = wrapped(memory.number, memory.width)
    if memory.width == 64 and not -1 << 31 <= number < 1 << 31:
        raise Malformed(f"displacement {number:#x} does not fit 32 signed bits")
    return (number & (1 << 8 * size) - 1).to_bytes(size, "little")

"""Operands as they are written. A number that does not fit its field is refused, never cut.

Source: Arm ARM (DDI 0487) C1.2 "Structure of the A64 assembler language".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from guest_memfd.asm.assembler import Malformed as Malformed

Value = Callable[[str], int]
Encoder = Callable[[list[str], int, Value], int]


class Register(NamedTuple):
    """A general register: *sp* tells number 31 apart."""

    number: int
    wide: bool
    sp: bool = False


_NAMES = {"sp": Register(31, True, True), "wsp": Register(31, False, True), "xzr": Register(31, True),
          "wzr": Register(31, False), "lr": Register(30, True), "fp": Register(29, True)}
_NAMES |= {f"{kind}{n}": Register(n, kind == "x") for kind in "xw" for n in range(31)}
CONDITIONS = {name: number for number, name in enumerate(
    ("eq", "ne", "cs", "cc", "mi", "pl", "vs", "vc", "hi", "ls", "ge", "lt", "gt", "le", "al"))} | {"hs": 2, "lo": 3}
SHIFTS = {"lsl": 0, "lsr": 1, "asr": 2, "ror": 3}
EXTENDS = {"uxtb": 0, "uxth": 1, "uxtw": 2, "uxtx": 3, "sxtb": 4, "sxth": 5, "sxtw": 6, "sxtx": 7}


def register(text: str) -> Register:
    """The register that *text* names."""
    found = _NAMES.get(text.lower())
    if found is None:
        raise Malformed(f"{text!r} is no general register")
    return found


def reg(text: str, *, sp: bool = False, like: Register | None = None) -> Register:
    """The register *text*, of the size of *like*; number 31 is the stack pointer in some places (*sp*), zero in others."""
    found = register(text)
    if found.number == 31 and found.sp != sp:
        raise Malformed(f"{text!r} cannot stand here")
    if like is not None and found.wide != like.wide:
        raise Malformed(f"{text!r} has another size than the registers before it")
    return found


def wide(text: str) -> int:
    """The number of an x register."""
    found = reg(text)
    if not found.wide:
        raise Malformed(f"{text!r} must be an x register")
    return found.number


def is_register(text: str) -> bool:
    """Whether *text* names a general register."""
    return text.lower() in _NAMES


def unsigned(number: int, bits: int, what: str = "immediate") -> int:
    """*number*, if it fits so many bits."""
    if not 0 <= number < 1 << bits:
        raise Malformed(f"{what} {number:#x} does not fit {bits} bits")
    return number


def signed(number: int, bits: int, what: str) -> int:
    """*number* in two's complement, if it fits so many bits."""
    if not -(1 << bits - 1) <= number < 1 << bits - 1:
        raise Malformed(f"{what} {number:#x} does not fit {bits} signed bits")
    return number & (1 << bits) - 1


def scaled(number: int, scale: int, bits: int, what: str) -> int:
    """*number* divided by 2^*scale*, if that leaves nothing and fits."""
    if number & (1 << scale) - 1:
        raise Malformed(f"{what} {number:#x} is no multiple of {1 << scale}")
    return signed(number >> scale, bits, what)


def want(operands: list[str], *counts: int) -> None:
    """Refuse any other number of operands."""
    if len(operands) not in counts:
        raise Malformed(f"takes {' or '.join(map(str, counts))} operands, not {len(operands)}")


def modifier(text: str, value: Value) -> tuple[str, int]:
    """``lsl #3`` as ("lsl", 3)."""
    name, _, amount = text.strip().partition(" ")
    return name.lower(), value(amount) if amount.strip() else 0


def bitmask(number: int, width: int) -> int | None:
    """N:immr:imms of a logical immediate of *width* bits, or None when there is none (Arm ARM "DecodeBitMasks")."""
    number &= (1 << width) - 1
    for size in (2, 4, 8, 16, 32, 64):
        element = number & (1 << size) - 1
        if size > width or any(number >> at & (1 << size) - 1 != element for at in range(0, width, size)):
            continue
        ones = element.bit_count()
        if ones in (0, size):
            return None
        for rotate in range(size):
            if (element << rotate | element >> size - rotate) & (1 << size) - 1 == (1 << ones) - 1:
                return (size == 64) << 12 | rotate << 6 | 0x3f & ~(2 * size - 1) | ones - 1
    return None

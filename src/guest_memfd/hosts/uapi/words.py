"""Structures of the kernel's interface as bytes. Rule of this file: a number that does not fit is refused, not cut."""

from __future__ import annotations

import re
import struct

from guest_memfd.errors import BadInput

_BITS = {"Q": 64, "I": 32, "i": 32}


def word(name: str, value: int, bits: int) -> int:
    """*value* as an unsigned word of *bits* bits: a negative one wraps as in C. Raises BadInput when it does not fit."""
    if not -1 << bits - 1 <= value < 1 << bits:
        raise BadInput(f"{name}: {value:#x} does not fit {bits} bits")
    return value % (1 << bits)


def packed(form: str, name: str, *values: int) -> bytes:
    """The bytes of structure *name*, whose fields are *form* (struct's letters Q, I and i, and padding); raises as `word`.

    Fields behind *values* are reserved, and 0.
    """
    words = []
    letters = [letter for nr, letter in re.findall(r"(\d*)([QIi])", form) for _ in range(int(nr or 1))]
    for letter, value in zip(letters, (*values, *[0] * (len(letters) - len(values))), strict=True):
        bits = _BITS[letter]
        one = word(name, value, bits)
        words.append(one - (1 << bits) if letter == "i" and one >> bits - 1 else one)
    return struct.pack(form, *words)

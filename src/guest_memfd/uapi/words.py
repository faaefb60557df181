"""Structures of the kernel's interface as bytes. A number that does not fit is refused, not cut."""

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


def signed(name: str, value: int, bits: int) -> int:
    """The same as a signed word: what is too large for one wraps as in C."""
    one = word(name, value, bits)
    return one - (1 << bits) if one >> bits - 1 else one


def packed(form: str, name: str, *values: int) -> bytes:
    """The bytes of structure *name*, whose fields are *form* (struct's letters Q, I and i, and padding); raises as `word`.

    Fields after *values* are reserved, and 0.
    """
    words = []
    letters = [letter for nr, letter in re.findall(r"(\d*)([QIi])", form) for _ in range(int(nr or 1))]
    for letter, value in zip(letters, (*values, *[0] * (len(letters) - len(values))), strict=True):
        bits = _BITS[letter]
        words.append(signed(name, value, bits) if letter == "i" else word(name, value, bits))
    return struct.pack(form, *words)

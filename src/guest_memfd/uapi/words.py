"""Structures of the kernel's interface as bytes. A number that does not fit is refused, not cut.

ctypes stores what is left of it, and takes any name for an attribute; the kernel would then be asked for something else.
"""

from __future__ import annotations

import ctypes
from typing import Any

from guest_memfd.compat import override
from guest_memfd.errors import BadInput


def word(name: str, value: int, bits: int) -> int:
    """*value* as an unsigned word of *bits* bits: a negative one wraps as in C. Raises BadInput when it does not fit."""
    if not -1 << bits - 1 <= value < 1 << bits:
        raise BadInput(f"{name}: {value:#x} does not fit {bits} bits")
    return value % (1 << bits)


def signed(name: str, value: int, bits: int) -> int:
    """The same as a signed word: what is too large for one wraps as in C."""
    one = word(name, value, bits)
    return one - (1 << bits) if one >> bits - 1 else one


class Words(ctypes.Structure):
    """A structure whose constructor raises BadInput for unknown fields and numbers too large; negative ones wrap as in C.

    Fields that are not given are 0. `bytes()` of one is what the kernel copies, and `from_buffer_copy` the reverse.
    """

    def __init__(self, *values: Any, **named: Any) -> None:
        # ctypes cuts without a word. So all is stored first, and what is then another number is looked at again.
        super().__init__(*values, **named)
        for field, value in zip(self._fields_, values, strict=False):
            if getattr(self, field[0]) != value:
                self._check(field[0], value)
        for name, value in named.items():
            if not hasattr(type(self), name):
                raise BadInput(f"{type(self).__name__} has no field {name!r}; there are {', '.join(self._names())}")
            if getattr(self, name) != value:
                self._check(name, value)

    def _check(self, name: str, value: object) -> None:
        if isinstance(value, int):
            word(f"{type(self).__name__}.{name}", value, 8 * int(getattr(type(self), name).size))

    def _names(self) -> list[str]:
        return [field[0] for field in self._fields_]

    @override
    def __repr__(self) -> str:
        shown = ((name, getattr(self, name)) for name in self._names())
        return f"{type(self).__name__}({', '.join(f'{n}={v:#x}' if isinstance(v, int) else f'{n}={v!r}' for n, v in shown)})"

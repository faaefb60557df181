"""Structures of the kernel's interface. A number that does not fit is refused, not cut.

ctypes stores what is left of it, and takes any name for an attribute; the kernel would then be asked for something else.
"""

from __future__ import annotations

import ctypes
from typing import Any

from guest_memfd.compat import override
from guest_memfd.errors import BadInput


class Words(ctypes.Structure):
    """A structure whose constructor raises BadInput for unknown fields and numbers too large; negative ones wrap as in C."""

    def __init__(self, *values: Any, **named: Any) -> None:
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
        bits = 8 * int(getattr(type(self), name).size)
        if isinstance(value, int) and not -1 << bits - 1 <= value < 1 << bits:
            raise BadInput(f"{type(self).__name__}.{name}: {value:#x} does not fit {bits} bits")

    def _names(self) -> list[str]:
        return [field[0] for field in self._fields_]

    @override
    def __repr__(self) -> str:
        shown = ((name, getattr(self, name)) for name in self._names())
        return f"{type(self).__name__}({', '.join(f'{n}={v:#x}' if isinstance(v, int) else f'{n}={v!r}' for n, v in shown)})"

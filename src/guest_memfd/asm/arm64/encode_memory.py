"""Loads and stores. What the architecture leaves unpredictable is refused.

Source: Arm ARM (DDI 0487) C6, by instruction; C4.1 "Loads and Stores".
"""

from __future__ import annotations

import re
from typing import NamedTuple

from guest_memfd.asm.arm64.operand import (
    Encoder,
    Malformed,
    Register,
    Value,
    is_register,
    modifier,
    reg,
    scaled,
    signed,
    want,
)


class Address(NamedTuple):
    """``[base, #offset]``, ``[base, #offset]!``, ``[base], #offset`` or ``[base, index{, extend}]``."""

    base: int
    mode: str
    offset: int = 0
    by: Register | None = None
    extend: tuple[str, int | None] = ("lsl", None)


# A shift by 0 that is written out is encoded as such where the size is a byte.
def _extend(text: str, value: Value) -> tuple[str, int | None]:
    name, amount = modifier(text, value)
    return name, amount if " " in text else None


def _address(operands: list[str], value: Value) -> Address:
    match = re.fullmatch(r"\[(.*)\](!?)", operands[0]) if operands else None
    if match is None:
        raise Malformed("needs an address in brackets")
    inside = [part.strip() for part in match[1].split(",")]
    base = reg(inside[0], sp=True)
    if not base.wide:
        raise Malformed(f"{inside[0]!r} must be an x register or sp")
    if len(operands) == 2:
        if match[2] or len(inside) > 1:
            raise Malformed("an offset after the brackets needs the base alone in them")
        return Address(base.number, "post", value(operands[1]))
    want(operands, 1)
    if len(inside) > 1 and is_register(inside[1]):
        extend = _extend(inside[2], value) if len(inside) > 2 else ("lsl", None)
        if match[2]:
            raise Malformed("a register offset has no writeback")
        return Address(base.number, "register", by=reg(inside[1]), extend=extend)
    if len(inside) > 2:
        raise Malformed("too much in the brackets")
    return Address(base.number, "pre" if match[2] else "offset", value(inside[1]) if len(inside) > 1 else 0)


# Writeback to a register that is transferred, too, is CONSTRAINED UNPREDICTABLE.
def _no_overlap(to: Address, *registers: Register) -> None:
    if to.mode in ("pre", "post") and to.base != 31 and to.base in (each.number for each in registers):
        raise Malformed("the base is written back and transferred")


# name -> (log2 of the size, opc for x, opc for w); None: decided by, or not there for, the register's size
_SINGLE: dict[str, tuple[int | None, int | None, int | None]] = {
    "ldr": (None, 1, 1), "str": (None, 0, 0), "ldrb": (0, None, 1), "strb": (0, None, 0), "ldrh": (1, None, 1),
    "strh": (1, None, 0), "ldrsb": (0, 2, 3), "ldrsh": (1, 2, 3), "ldrsw": (2, 2, None)}
_UNSCALED = {name.replace("r", "ur", 1) if name != "str" else "stur": name for name in _SINGLE if name[:2] == "ld"}
_UNSCALED |= {"stur": "str", "sturb": "strb", "sturh": "strh"}


def _single(name: str, unscaled: bool) -> Encoder:
    size_of, opc_x, opc_w = _SINGLE[name]

    def encode_single(operands: list[str], at: int, value: Value) -> int:
        want(operands, 2, 3)
        rt = reg(operands[0])
        opc = opc_x if rt.wide else opc_w
        if opc is None:
            raise Malformed(f"{operands[0]!r} has the wrong size")
        size = size_of if size_of is not None else 3 if rt.wide else 2
        word = 0x3800_0000 | size << 30 | opc << 22 | rt.number
        if not operands[1].startswith("["):
            if name != "ldr" or unscaled:
                raise Malformed("needs an address in brackets")
            return 0x1800_0000 | rt.wide << 30 | scaled(value(operands[1]) - at, 2, 19, "distance") << 5 | rt.number
        to = _address(operands[1:], value)
        word |= to.base << 5
        if to.mode == "register" and not unscaled:
            return word | _index(to, size)
        # The scaled form first, as GNU as has it: the other reaches 256 bytes only, but odd and negative offsets.
        if to.mode == "offset" and not unscaled and not to.offset & (1 << size) - 1 and 0 <= to.offset < 4096 << size:
            return word | 1 << 24 | to.offset >> size << 10
        if unscaled and to.mode != "offset":
            raise Malformed("has only an offset")
        _no_overlap(to, rt)
        mode = {"offset": 0, "post": 1, "pre": 3}[to.mode]
        return word | signed(to.offset, 9, "offset") << 12 | mode << 10
    return encode_single


def _index(to: Address, size: int) -> int:
    name, amount = to.extend
    index = to.by
    if index is None or name not in ("lsl", "uxtw", "sxtw", "sxtx") or index.wide != (name in ("lsl", "sxtx")):
        raise Malformed(f"{name!r} does not go with the index register")
    if amount not in (None, 0, size):
        raise Malformed(f"the index can be shifted by 0 or {size}")
    option = {"lsl": 3, "uxtw": 2, "sxtw": 6, "sxtx": 7}[name]
    return 1 << 21 | index.number << 16 | option << 13 | (amount == size) << 12 | 2 << 10


def _pair(load: int) -> Encoder:
    def encode_pair(operands: list[str], at: int, value: Value) -> int:
        want(operands, 3, 4)
        rt = reg(operands[0])
        rt2 = reg(operands[1], like=rt)
        to = _address(operands[2:], value)
        if to.mode == "register":
            raise Malformed("a pair has no register offset")
        _no_overlap(to, rt, rt2)
        if load and rt.number == rt2.number:
            raise Malformed("both registers are the same")
        mode = {"post": 1, "offset": 2, "pre": 3}[to.mode]
        return (0x2800_0000 | rt.wide << 31 | mode << 23 | load << 22
                | scaled(to.offset, 3 if rt.wide else 2, 7, "offset") << 15 | rt2.number << 10 | to.base << 5 | rt.number)
    return encode_pair


def _exclusive(base: int, status: bool) -> Encoder:
    def encode_exclusive(operands: list[str], at: int, value: Value) -> int:
        want(operands, 3 if status else 2)
        rs = reg(operands[0]) if status else Register(31, False)
        rt = reg(operands[-2])
        to = _address(operands[-1:], value)
        if to.mode != "offset" or to.offset or rs.wide:
            raise Malformed("takes a bare base, and a w register for the status")
        if status and rs.number in (rt.number, to.base):
            raise Malformed("the status register is used twice")
        return base | rt.wide << 30 | rs.number << 16 | to.base << 5 | rt.number
    return encode_exclusive


MEMORY: dict[str, Encoder] = {
    "ldp": _pair(1), "stp": _pair(0), "ldxr": _exclusive(0x885f_7c00, False), "ldaxr": _exclusive(0x885f_fc00, False),
    "ldar": _exclusive(0x88df_fc00, False), "stlr": _exclusive(0x889f_fc00, False), "stxr": _exclusive(0x8800_7c00, True),
    "stlxr": _exclusive(0x8800_fc00, True),
}
MEMORY |= {name: _single(name, unscaled=False) for name in _SINGLE}
MEMORY |= {name: _single(scaled_name, unscaled=True) for name, scaled_name in _UNSCALED.items()}
"""By mnemonic."""

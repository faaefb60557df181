"""Branches, calls to a higher level, barriers, system registers. Distances are counted from the instruction's own word.

Source: Arm ARM (DDI 0487) C6, by instruction; C4.1 "Branches, Exception Generating and System instructions".
"""

from __future__ import annotations

import re

from guest_memfd.asm.arm64.operand import (
    CONDITIONS,
    Encoder,
    Malformed,
    Value,
    is_register,
    reg,
    scaled,
    signed,
    unsigned,
    want,
    wide,
)
from guest_memfd.machine.hw.arm64 import sysreg

_BARRIERS = {"sy": 15, "st": 14, "ld": 13, "ish": 11, "ishst": 10, "ishld": 9, "nsh": 7, "nshst": 6, "nshld": 5,
             "osh": 3, "oshst": 2, "oshld": 1}
_CACHE = {("dc", "zva"): (3, 7, 4, 1), ("dc", "ivac"): (0, 7, 6, 1), ("dc", "cvac"): (3, 7, 10, 1),
          ("dc", "cvau"): (3, 7, 11, 1), ("dc", "civac"): (3, 7, 14, 1), ("ic", "ivau"): (3, 7, 5, 1),
          ("ic", "iallu"): (0, 7, 5, 0), ("ic", "ialluis"): (0, 7, 1, 0), ("at", "s1e1r"): (0, 7, 8, 0),
          ("at", "s1e1w"): (0, 7, 8, 1)}


def _branch(base: int, at_bit: int, bits: int) -> Encoder:
    def encode_branch(operands: list[str], at: int, value: Value) -> int:
        want(operands, 1)
        return base | scaled(value(operands[0]) - at, 2, bits, "distance") << at_bit
    return encode_branch


def _compare_branch(base: int) -> Encoder:
    def encode_compare(operands: list[str], at: int, value: Value) -> int:
        want(operands, 2)
        rt = reg(operands[0])
        return base | rt.wide << 31 | scaled(value(operands[1]) - at, 2, 19, "distance") << 5 | rt.number
    return encode_compare


def _test_branch(base: int) -> Encoder:
    def encode_test(operands: list[str], at: int, value: Value) -> int:
        want(operands, 3)
        rt = reg(operands[0])
        bit = unsigned(value(operands[1]), 6 if rt.wide else 5, "bit number")
        distance = scaled(value(operands[2]) - at, 2, 14, "distance")
        return base | bit >> 5 << 31 | (bit & 31) << 19 | distance << 5 | rt.number
    return encode_test


def _jump(base: int, default: str | None = None) -> Encoder:
    def encode_jump(operands: list[str], at: int, value: Value) -> int:
        want(operands, 1) if default is None else want(operands, 0, 1)
        return base | wide(operands[0] if operands else str(default)) << 5
    return encode_jump


def _adr(page: int) -> Encoder:
    def encode_adr(operands: list[str], at: int, value: Value) -> int:
        want(operands, 2)
        to = value(operands[1])
        # ADRP counts pages, of both addresses apart: the low bits of neither have a part in it.
        distance = signed((to >> 12) - (at >> 12) if page else to - at, 21, "distance")
        return 0x1000_0000 | page << 31 | (distance & 3) << 29 | distance >> 2 << 5 | wide(operands[0])
    return encode_adr


def _immediate(base: int) -> Encoder:
    def encode_immediate(operands: list[str], at: int, value: Value) -> int:
        want(operands, 1)
        # UDF alone has its immediate in the lowest bits: a word of zeros is UDF #0.
        return base | unsigned(value(operands[0]), 16) << (5 if base else 0)
    return encode_immediate


def _bare(word: int) -> Encoder:
    def encode_bare(operands: list[str], at: int, value: Value) -> int:
        want(operands, 0)
        return word
    return encode_bare


def _barrier(base: int, default: str | None = None) -> Encoder:
    def encode_barrier(operands: list[str], at: int, value: Value) -> int:
        want(operands, 1) if default is None else want(operands, 0, 1)
        name = (operands[0] if operands else str(default)).lower()
        if name not in _BARRIERS:
            raise Malformed(f"{name!r} is no barrier option")
        return base | _BARRIERS[name] << 8
    return encode_barrier


def _system_register(text: str) -> int:
    found = sysreg.ENCODINGS.get(text.upper())
    if found is not None:
        return found.field
    match = re.fullmatch(r"S([23])_([0-7])_C(\d+)_C(\d+)_([0-7])", text.upper())
    if match is None or int(match[3]) > 15 or int(match[4]) > 15:
        raise Malformed(f"{text!r} is no system register known here; S3_<op1>_C<n>_C<m>_<op2> names any")
    return sysreg.Encoding(*map(int, match.groups())).field


def _mrs(operands: list[str], at: int, value: Value) -> int:
    want(operands, 2)
    return 0xd520_0000 | _system_register(operands[1]) | wide(operands[0])


_PSTATE_FIELDS = {"daifset": 0xd503_40df, "daifclr": 0xd503_40ff, "spsel": 0xd500_40bf, "pan": 0xd500_409f}


def _msr(operands: list[str], at: int, value: Value) -> int:
    want(operands, 2)
    if not is_register(operands[1]) and operands[0].lower() in _PSTATE_FIELDS:
        return _PSTATE_FIELDS[operands[0].lower()] | unsigned(value(operands[1]), 4) << 8
    return 0xd500_0000 | _system_register(operands[0]) | wide(operands[1])


def _tlbi(operands: list[str], at: int, value: Value) -> int:
    want(operands, 1, 2)
    found = sysreg.TLBI.get(operands[0].upper())
    if found is None:
        raise Malformed(f"{operands[0]!r} is no TLB invalidation of EL1")
    # Register 31 where the operation takes none.
    return 0xd500_0000 | found.field | (wide(operands[1]) if len(operands) > 1 else 31)


def _cache(name: str) -> Encoder:
    def encode_cache(operands: list[str], at: int, value: Value) -> int:
        want(operands, 1, 2)
        found = _CACHE.get((name, operands[0].lower()))
        if found is None:
            raise Malformed(f"no operation {operands[0]!r}")
        return 0xd500_0000 | sysreg.Encoding(1, *found).field | (wide(operands[1]) if len(operands) > 1 else 31)
    return encode_cache


SYSTEM: dict[str, Encoder] = {
    "b": _branch(0x1400_0000, 0, 26), "bl": _branch(0x9400_0000, 0, 26), "cbz": _compare_branch(0x3400_0000),
    "cbnz": _compare_branch(0x3500_0000), "tbz": _test_branch(0x3600_0000), "tbnz": _test_branch(0x3700_0000),
    "br": _jump(0xd61f_0000), "blr": _jump(0xd63f_0000), "ret": _jump(0xd65f_0000, "x30"), "adr": _adr(0),
    "adrp": _adr(1), "svc": _immediate(0xd400_0001), "hvc": _immediate(0xd400_0002), "smc": _immediate(0xd400_0003),
    "brk": _immediate(0xd420_0000), "hlt": _immediate(0xd440_0000), "udf": _immediate(0), "nop": _bare(0xd503_201f),
    "yield": _bare(0xd503_203f), "wfe": _bare(0xd503_205f), "wfi": _bare(0xd503_207f), "sev": _bare(0xd503_209f),
    "eret": _bare(0xd69f_03e0), "isb": _barrier(0xd503_30df, "sy"), "dsb": _barrier(0xd503_309f),
    "dmb": _barrier(0xd503_30bf), "mrs": _mrs, "msr": _msr, "tlbi": _tlbi, "dc": _cache("dc"), "ic": _cache("ic"),
    "at": _cache("at"),
}
SYSTEM |= {f"b.{name}": _branch(0x5400_0000 | number, 5, 19) for name, number in CONDITIONS.items()}
"""By mnemonic."""

"""Operands as they are written. What no instruction of the mode could take is refused here.

The syntax is GNU as's Intel syntax without prefixes. Source: Intel SDM vol. 2, 2.1.5 "Addressing-Mode Encoding of ModR/M and
SIB Bytes", 2.2.1 "REX Prefixes"; vol. 1, 3.7 "Operand Addressing".
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from guest_memfd.asm.assembler import ATOM, Malformed
from guest_memfd.distinct import distinct


class Mode(NamedTuple):
    """64- or 16-bit code, and what expressions come to: None for one that needs a label."""

    bits: int
    constant: Callable[[str], int | None]


@distinct
class X86Register(NamedTuple):
    """Any register; *rex* tells that a byte register needs a REX prefix (spl), or cannot stand with one (ah)."""

    text: str
    number: int
    size: int
    kind: str = "general"
    rex: bool | None = None


@dataclass(frozen=True)
class MemoryOperand:
    """An address: *number* is its displacement, None where that needs a label; *width* is the size of addresses."""

    text: str
    size: int | None
    segment: X86Register | None
    base: X86Register | None
    index: X86Register | None
    scale: int
    displacement: str
    number: int | None
    width: int


@distinct
class Immediate(NamedTuple):
    """An expression; *plain* unless ``offset`` says that a label means its address."""

    text: str
    expression: str
    number: int | None
    plain: bool
    size: int | None = None


@distinct
class Far(NamedTuple):
    """The target of a far jump or call: ``selector:offset``, both expressions; *size* in bits, None if not written."""

    text: str
    selector: str
    offset: str
    size: int | None = None


Operand = X86Register | MemoryOperand | Immediate | Far

_SIZES = {"byte": 8, "word": 16, "dword": 32, "fword": 48, "qword": 64}
_SIZED = re.compile(rf"({'|'.join(_SIZES)})\s+ptr\b\s*", re.IGNORECASE)
_SEGMENT = re.compile(r"([a-z]s)\s*:\s*(?=\[)", re.IGNORECASE)
_FAR = re.compile(r"([^'\":\[\]]+):([^'\":\[\]]+)")
_OFFSET = re.compile(r"^\s*offset\b", re.IGNORECASE)
_TOKEN = re.compile(f"{ATOM}|.", re.DOTALL)
_WORDS = ("ax", "cx", "dx", "bx", "sp", "bp", "si", "di")
SEGMENTS = ("es", "cs", "ss", "ds", "fs", "gs")
_REGISTERS = [X86Register(prefix + name, number, size)
              for number, name in enumerate(_WORDS) for prefix, size in (("", 16), ("e", 32), ("r", 64))]
_REGISTERS += [X86Register(f"r{number}{suffix}", number, size)
               for number in range(8, 16) for suffix, size in (("b", 8), ("w", 16), ("d", 32), ("", 64))]
_REGISTERS += [X86Register(f"{name}l", number, 8) for number, name in enumerate("acdb")]
_REGISTERS += [X86Register(f"{name}h", number, 8, rex=False) for number, name in enumerate("acdb", 4)]
_REGISTERS += [X86Register(f"{name}l", number, 8, rex=True) for number, name in enumerate(_WORDS) if number > 3]
_REGISTERS += [X86Register(name, number, 16, "segment") for number, name in enumerate(SEGMENTS)]
_REGISTERS += [X86Register(f"cr{number}", number, 64, "control") for number in (0, 2, 3, 4, 8)]
_REGISTERS.append(X86Register("rip", 5, 64, "rip"))
REGISTERS = {register.text: register for register in _REGISTERS}
"""By name."""


def operand(text: str, mode: Mode) -> Operand:
    """The operand that *text* is. Raises Malformed."""
    if text.lower() in REGISTERS:
        return _register(text, mode)
    sized = _SIZED.match(text)
    rest = text[sized.end():] if sized else text
    if sized or rest.startswith("[") or _SEGMENT.match(rest):
        return _memory(text, rest, _SIZES[sized[1].lower()] if sized else None, mode)
    far = _FAR.fullmatch(text)
    if far:
        return Far(text, far[1], _OFFSET.sub("", far[2]))
    expression = _OFFSET.sub("", text)
    return Immediate(text, expression, mode.constant(expression), expression == text)


def _register(text: str, mode: Mode) -> X86Register:
    found = REGISTERS[text.lower()]
    long = found.number > 7 or found.rex or (found.size == 64 and found.kind != "control")
    if mode.bits == 16 and long:
        raise Malformed(f"{text!r} is no register of 16-bit code")
    return found._replace(text=text)


def _memory(text: str, rest: str, size: int | None, mode: Mode) -> MemoryOperand:
    segment, overridden = None, _SEGMENT.match(rest)
    if overridden:
        segment, rest = REGISTERS.get(overridden[1].lower()), rest[overridden.end():]
    if not rest.startswith("[") or not rest.endswith("]") or (overridden and segment is None):
        raise Malformed(f"{text!r} is no address; those are [base + index*scale + displacement]")
    base, index, scale, displacement = None, None, 0, ""
    for term in _terms(rest[1:-1]):
        name, factor = _scaled(term.removeprefix("+").strip(), mode)
        if name is None:
            displacement += term if term[0] in "+-" else f"+{term}"
        elif base is None and not factor:
            base = name
        elif index is None:
            index, scale = name, factor
        else:
            raise Malformed(f"{text!r} has too many registers")
    if not scale and index is not None and index.number == 4:
        base, index = index, base
    displacement = displacement.removeprefix("+").strip()
    if not displacement and base is None and index is None:
        raise Malformed(f"{text!r} is empty")
    number = mode.constant(displacement) if displacement else 0
    width = _width(text, base, index, scale, mode)
    return MemoryOperand(text, size, segment, base, index, scale or 1, displacement, number, width)


# What is added and subtracted, each with its sign.
def _terms(text: str) -> list[str]:
    terms, depth = [""], 0
    for token in _TOKEN.findall(text):
        if token in "+-" and not depth and terms[-1].strip()[-1:] not in ("", *"+-*/%&|^~<>"):
            terms.append("")
        depth += (token in "([") - (token in ")]")
        terms[-1] += token
    return [term.strip() for term in terms if term.strip()]


# The register of a term and its scale, 0 when none is written.
def _scaled(term: str, mode: Mode) -> tuple[X86Register | None, int]:
    if term.lower() in REGISTERS:
        return _register(term, mode), 0
    for name, _, factor in (term.partition("*"), term.rpartition("*")[::-1]):
        if factor and name.strip().lower() in REGISTERS:
            scale = mode.constant(factor)
            if scale not in (1, 2, 4, 8):
                raise Malformed(f"{term!r}: a scale is 1, 2, 4 or 8")
            return _register(name.strip(), mode), scale
    return None, 0


# bx, bp, si and di, alone and by twos.
_PAIRS = {(3, 6), (3, 7), (5, 6), (5, 7), (3, None), (5, None), (6, None), (7, None)}


# The size of the address, if there is such an address.
def _width(text: str, base: X86Register | None, index: X86Register | None, scale: int, mode: Mode) -> int:
    used = [register for register in (base, index) if register is not None]
    widths = {register.size for register in used} or {mode.bits}
    width = widths.pop()
    fits = not widths and width in (mode.bits, 32)
    kinds = [register.kind for register in used]
    fits &= kinds == ["rip"] or kinds == ["general"] * len(kinds)
    if width == 16 and used:
        first, second = [*sorted(register.number for register in used), None][:2]
        fits &= (first, second) in _PAIRS and not scale
    elif index is not None:
        fits &= index.number != 4
    if not fits:
        raise Malformed(f"{text!r} cannot be an address")
    return width

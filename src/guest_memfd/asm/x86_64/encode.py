"""Instructions to bytes. The first form of forms.py that takes the operands is used; what fits none is refused.

Source: Intel SDM vol. 2, 2.1 "Instruction Format for Protected Mode, real-address Mode, and virtual-8086 Mode", 2.2.1 "REX
Prefixes"; 3.6 of vol. 1 for the sizes that a mode begins with.
"""

from __future__ import annotations

from guest_memfd.asm.assembler import Malformed
from guest_memfd.asm.x86_64.encode_memory import Code, Field, modrm, signed, wrapped
from guest_memfd.asm.x86_64.forms import FORMS, PREFIXES, Form, Pattern
from guest_memfd.asm.x86_64.operand import Far, Immediate, MemoryOperand, Mode, Operand, X86Register, operand

_SIZES = {"b": (8,), "w": (16,), "d": (32,), "q": (64,), "f": (48,), "v": (16, 32, 64), "y": (32, 64), "z": (16, 32)}
_OPERAND_SIZES = {"o16": 16, "o32": 32, "o64": 64}
_SEGMENT_PREFIXES = (0x26, 0x2e, 0x36, 0x3e, 0x64, 0x65)
_SS, _DS = 2, 3


# Why a form is not the one; of several the reason of the highest rank says best what is wrong.
class _Misfit(Malformed):
    def __init__(self, rank: int, message: str) -> None:
        super().__init__(message)
        self.rank = rank


def encode(mnemonic: str, texts: list[str], mode: Mode) -> list[Code]:
    """One instruction; a jump has several codes, the shortest first, of which the first that reaches is to be taken.

    Raises Malformed.
    """
    prefix = mnemonic if mnemonic in PREFIXES else ""
    if prefix:
        mnemonic, _, first = texts[0].partition(" ") if texts else ("", "", "")
        mnemonic, texts = mnemonic.lower(), [*([first.strip()] if first else []), *texts[1:]]
    forms = _candidates(mnemonic, prefix, len(texts), mode)
    operands = [operand(text, mode) for text in texts]
    if prefix == "lock" and not any(isinstance(each, MemoryOperand) for each in operands):
        raise Malformed("only what is in memory can be locked")
    codes, worst = [], _Misfit(0, "")
    for form in forms:
        try:
            codes.append(_code(form, operands, prefix, mode))
        except _Misfit as misfit:
            worst = max(worst, misfit, key=lambda each: each.rank)
            continue
        if form.patterns[:1] != (Pattern("J", "b"),):
            break
    if not codes:
        raise worst
    # To a bare number the long form: GNU as leaves its distance to the linker, and does not know it.
    return codes[-1:] if operands and isinstance(operands[0], Immediate) and operands[0].number is not None else codes


def _candidates(mnemonic: str, prefix: str, count: int, mode: Mode) -> list[Form]:
    if mnemonic not in FORMS:
        raise Malformed("no such instruction here")
    forms = [form for form in FORMS[mnemonic] if ("real" if mode.bits == 64 else "long") not in form.flags]
    if not forms:
        raise Malformed(f"not in {mode.bits}-bit code")
    if prefix:
        forms = [form for form in forms if ("lock" if prefix == "lock" else "rep") in form.flags]
        if not forms:
            raise Malformed(f"{mnemonic} does not take this prefix")
    counts = sorted({len(form.patterns) for form in forms})
    if count not in counts:
        raise Malformed(f"takes {' or '.join(map(str, counts))} operands, not {count}")
    return [form for form in forms if len(form.patterns) == count]


# The letters and names of forms.py under which an operand may stand.
def _kinds(given: Operand) -> list[str]:
    if isinstance(given, X86Register):
        if given.kind != "general":
            return [given.text.lower(), *{"segment": "S", "control": "C"}.get(given.kind, "")]
        return [given.text.lower(), *"EGRUZ", *"a" * (given.number == 0)]
    if isinstance(given, MemoryOperand):
        absolute = given.base is None and given.index is None
        beyond = given.number is not None and not -1 << 31 <= wrapped(given.number, given.width) < 1 << 31
        return [*"EM", *"N" * (given.size is None), *"O" * absolute, *"X" * (absolute and beyond)]
    if isinstance(given, Far):
        return ["A"]
    return ["I", *"J" * given.plain, str(given.number)]


# The size that decides about prefixes, None where nothing depends on it.
def _size(form: Form, operands: list[Operand], mode: Mode) -> int | None:
    sized = [(_SIZES[pattern.size], given) for pattern, given in zip(form.patterns, operands, strict=True)
             if pattern.size in _SIZES and given.size is not None]
    for allowed, given in sized:
        if len(allowed) == 1 and given.size not in allowed:
            raise _Misfit(2, f"{given.text!r} must be of {allowed[0]} bits")
    size = _common([(allowed, given) for allowed, given in sized if len(allowed) > 1], "wide" in form.flags, mode)
    if not form.flags & {"any", "wide"}:
        _refuse_unknown(form, operands)
    return next((_OPERAND_SIZES[flag] for flag in form.flags if flag in _OPERAND_SIZES), size)


# The size of all operands that may be of several.
def _common(sized: list[tuple[tuple[int, ...], Operand]], wide: bool, mode: Mode) -> int | None:
    if not sized:
        return mode.bits if wide else None
    allowed, first = sized[0]
    for _, given in sized:
        if given.size != first.size:
            raise _Misfit(3, f"{given.text!r} has another size than {first.text!r}")
    if first.size not in allowed or first.size == (64 if mode.bits == 16 else 32 if wide else None):
        raise _Misfit(3, f"{first.text!r} cannot be of {first.size} bits here")
    return first.size


def _refuse_unknown(form: Form, operands: list[Operand]) -> None:
    known_sizes = {pattern.size for pattern, given in zip(form.patterns, operands, strict=True) if given.size is not None}
    for pattern, given in zip(form.patterns, operands, strict=True):
        if isinstance(given, MemoryOperand) and pattern.size and given.size is None and pattern.size not in known_sizes:
            raise _Misfit(3, f"the size of {given.text!r} is not known; 'byte ptr' or another is missing")


def _code(form: Form, operands: list[Operand], prefix: str, mode: Mode) -> Code:
    if any(pattern.kind not in _kinds(given) for pattern, given in zip(form.patterns, operands, strict=True)):
        raise _Misfit(1, "takes other operands")
    size = _size(form, operands, mode)
    rm, reg, low, absolute = (_at(form, operands, kinds) for kinds in ("EMNRU", "GSCU", "Z", "OX"))
    number = reg.number if isinstance(reg, X86Register) else form.digit or 0
    opcode = form.opcode
    if isinstance(low, X86Register):
        opcode = bytes((*opcode[:-1], opcode[-1] | low.number & 7))
    tail = [piece for pattern, given in zip(form.patterns, operands, strict=True)
            for piece in _tail(form, pattern, given, size, mode)]
    start = _prefixes(form, size, rm or absolute, prefix, mode) + _rex(form, operands, size, number >> 3, rm or low)
    return (start + opcode, *(modrm(number & 7, rm) if rm is not None else ()), *tail)


def _at(form: Form, operands: list[Operand], kinds: str) -> X86Register | MemoryOperand | None:
    for pattern, given in zip(form.patterns, operands, strict=True):
        if pattern.kind in kinds and isinstance(given, X86Register | MemoryOperand):
            return given
    return None


# In the order of GNU as: segment, address size, operand size, the rest.
def _prefixes(form: Form, size: int | None, memory: X86Register | MemoryOperand | None, prefix: str, mode: Mode) -> bytes:
    out = []
    if isinstance(memory, MemoryOperand):
        if memory.segment is not None and memory.segment.number != _default_segment(memory):
            out.append(_SEGMENT_PREFIXES[memory.segment.number])
        if memory.width != mode.bits:
            out.append(0x67)
    if size == (32 if mode.bits == 16 else 16) and "plain" not in form.flags:
        out.append(0x66)
    return bytes(out + ([PREFIXES[prefix]] if prefix else []))


# SS for addresses that begin at bp or sp.
def _default_segment(memory: MemoryOperand) -> int:
    begins = (memory.base, memory.index) if memory.width == 16 else (memory.base,)
    stack = any(register is not None and register.kind == "general" and register.number in (4, 5) for register in begins)
    return _SS if stack else _DS


def _high(register: X86Register | None) -> int:
    return register.number >> 3 if register is not None else 0


def _rex(form: Form, operands: list[Operand], size: int | None, high: int, rm: X86Register | MemoryOperand | None) -> bytes:
    rex = (size == 64 and not form.flags & {"wide", "plain"}) << 3 | high << 2
    rex |= _high(rm.index) << 1 | _high(rm.base) if isinstance(rm, MemoryOperand) else _high(rm)
    registers = [given for given in operands if isinstance(given, X86Register)]
    if not rex and not any(given.rex for given in registers):
        return b""
    for given in registers:
        # ah, ch, dh and bh: their numbers mean spl, bpl, sil and dil as soon as there is a REX prefix.
        if given.rex is False:
            raise Malformed(f"{given.text!r} cannot stand with an operand that needs a REX prefix")
    return bytes((0x40 | rex,))


# What follows ModRM for one operand.
def _tail(form: Form, pattern: Pattern, given: Operand, size: int | None, mode: Mode) -> list[bytes | Field]:
    if isinstance(given, Immediate) and pattern.kind == "I":
        return [_immediate(pattern.size, given, mode.bits if size is None else size)]
    if isinstance(given, Immediate) and pattern.kind == "J":
        return [signed(given.expression, 1 if pattern.size == "b" else 2 if mode.bits == 16 else 4, relative=True)]
    if isinstance(given, Far):
        width = 32 if size == 32 else 16
        return [Field(given.offset, width // 8, 0, (1 << width) - 1), Field(given.selector, 2, 0, 0xffff)]
    if isinstance(given, MemoryOperand) and pattern.kind in ("O", "X"):
        return [Field(given.displacement, mode.bits // 8, -1 << mode.bits - 1, (1 << mode.bits) - 1)]
    return []


def _immediate(letter: str, given: Immediate, size: int) -> bytes | Field:
    if given.number is None and given.plain:
        raise _Misfit(4, f"{given.text!r} is no constant; a label is written 'offset label', what lies there '[label]'")
    bits = {"b": 8, "u": 8, "w": 16, "q": 64}.get(letter, size)
    stored = 8 if letter == "x" else bits if letter == "q" else min(bits, 32)
    low, high = 0 if letter == "u" else -1 << bits - 1, (1 << bits) - 1
    if given.number is None:
        if letter == "x":
            raise _Misfit(1, "takes other operands")
        return Field(given.expression, stored // 8, low, high) if stored == bits else signed(given.expression, stored // 8)
    if not low <= given.number <= high:
        raise _Misfit(4, f"{given.number:#x} does not fit {bits} bits")
    number = wrapped(given.number, bits)
    if stored < bits and not -1 << stored - 1 <= number < 1 << stored - 1:
        raise _Misfit(1 if letter == "x" else 4, f"{given.number:#x} does not fit {stored} signed bits")
    return (number & (1 << stored) - 1).to_bytes(stored // 8, "little")

"""Data processing: arithmetic, logic, shifts, selects, moves. Register number 31 means SP in some forms and XZR in
others; each form here says which.

Source: Arm ARM (DDI 0487) C6, by instruction; C4.1 "Data Processing".
"""

from __future__ import annotations

from guest_memfd.asm.arm64.operand import (
    CONDITIONS,
    EXTENDS,
    SHIFTS,
    Encoder,
    Malformed,
    Register,
    Value,
    bitmask,
    is_register,
    modifier,
    reg,
    register,
    unsigned,
    want,
)


def _add_immediate(base: int, rd: Register, rn: Register, number: int, shifted: list[str], value: Value) -> int:
    if shifted:
        name, shift = modifier(shifted[0], value)
        if name != "lsl" or shift not in (0, 12):
            raise Malformed(f"{shifted[0]!r}: only lsl #0 or lsl #12")
        number <<= shift
    # There are no negative immediates. The other operation with the number negated has the same effect, flags included.
    if number < 0:
        base, number = base ^ 1 << 30, -number
    high = number > 0xfff and not number & 0xfff
    if number >> (24 if high else 12):
        raise Malformed(f"immediate {number:#x} is neither 12 bits nor 12 bits shifted by 12")
    return base | 0x1100_0000 | high << 22 | (number >> 12 if high else number) << 10 | rn.number << 5 | rd.number


# With an immediate or an extended register number 31 is the stack pointer, except where flags are all that is wanted.
def _no_zero(operands: list[str], rd: Register, rn: Register, flags: bool) -> None:
    for operand, found, zero in ((operands[0], rd, flags), (operands[1], rn, False)):
        if found.number == 31 and not found.sp and not zero:
            raise Malformed(f"{operand!r} cannot stand here")


def _add(base: int, flags: bool) -> Encoder:
    def encode_add(operands: list[str], at: int, value: Value) -> int:
        want(operands, 3, 4)
        rd = reg(operands[0], sp=False) if flags else register(operands[0])
        rn = register(operands[1])
        if rd.wide != rn.wide:
            raise Malformed(f"{operands[1]!r} has another size than {operands[0]!r}")
        word = base | flags << 29 | rd.wide << 31
        if not is_register(operands[2]):
            _no_zero(operands, rd, rn, flags)
            return _add_immediate(word, rd, rn, value(operands[2]), operands[3:], value)
        name, amount = modifier(operands[3], value) if len(operands) > 3 else ("lsl", 0)
        extend = name in EXTENDS or rd.sp or rn.sp
        if name not in (*EXTENDS, "lsl") if extend else name not in ("lsl", "lsr", "asr"):
            raise Malformed(f"no shift {name!r}")
        rm = reg(operands[2], like=rd if not extend or name == "lsl" else None)
        word |= rm.number << 16 | rn.number << 5 | rd.number
        if not extend:
            return word | 0x0b00_0000 | SHIFTS[name] << 22 | unsigned(amount, 6 if rd.wide else 5, "shift") << 10
        _no_zero(operands, rd, rn, flags)
        option = (3 if rd.wide else 2) if name == "lsl" else EXTENDS[name]
        if amount not in range(5) or rm.wide != (rd.wide and option & 3 == 3):
            raise Malformed(f"{operands[2:]} is no extended register")
        return word | 0x0b20_0000 | option << 13 | amount << 10
    return encode_add


def _logic(opcode: int, invert: int = 0) -> Encoder:
    def encode_logic(operands: list[str], at: int, value: Value) -> int:
        want(operands, 3, 4)
        rn = reg(operands[1])
        if is_register(operands[2]):
            rd = reg(operands[0], like=rn)
            rm = reg(operands[2], like=rn)
            name, amount = modifier(operands[3], value) if len(operands) > 3 else ("lsl", 0)
            if name not in SHIFTS:
                raise Malformed(f"no shift {name!r}")
            return (0x0a00_0000 | opcode << 29 | rd.wide << 31 | SHIFTS[name] << 22 | invert << 21 | rm.number << 16
                    | unsigned(amount, 6 if rd.wide else 5, "shift") << 10 | rn.number << 5 | rd.number)
        want(operands, 3)
        rd = reg(operands[0], like=rn) if opcode == 3 else register(operands[0])
        number = value(operands[2])
        field = bitmask(~number if invert else number, 64 if rn.wide else 32)
        if field is None or rd.wide != rn.wide or (invert and opcode) or (rd.number == 31 and opcode != 3 and not rd.sp):
            raise Malformed(f"{number:#x} is no logical immediate")
        return 0x1200_0000 | opcode << 29 | rn.wide << 31 | field << 10 | rn.number << 5 | rd.number
    return encode_logic


def _three(base: int) -> Encoder:
    def encode_three(operands: list[str], at: int, value: Value) -> int:
        want(operands, 3)
        rd = reg(operands[0])
        rn, rm = (reg(text, like=rd) for text in operands[1:])
        return base | rd.wide << 31 | rm.number << 16 | rn.number << 5 | rd.number
    return encode_three


def _shift(name: str) -> Encoder:
    variable = _three(0x1ac0_2000 | SHIFTS[name] << 10)

    def encode_shift(operands: list[str], at: int, value: Value) -> int:
        want(operands, 3)
        if is_register(operands[2]):
            return variable(operands, at, value)
        rd = reg(operands[0])
        rn = reg(operands[1], like=rd)
        top = 63 if rd.wide else 31
        amount = value(operands[2])
        if not 0 <= amount <= top:
            raise Malformed(f"shift {amount} is not in 0..{top}")
        # Shifts by a number are UBFM and SBFM: bits are taken from *first* on, or brought there.
        first, last = (-amount & top, top - amount) if name == "lsl" else (amount, top)
        base = 0x1300_0000 if name == "asr" else 0x5300_0000
        return base | rd.wide << 31 | rd.wide << 22 | first << 16 | last << 10 | rn.number << 5 | rd.number
    return encode_shift


def _ubfx(operands: list[str], at: int, value: Value) -> int:
    want(operands, 4)
    rd = reg(operands[0])
    rn = reg(operands[1], like=rd)
    low, width = value(operands[2]), value(operands[3])
    if low < 0 or width < 1 or low + width > (64 if rd.wide else 32):
        raise Malformed(f"bits {low}, width {width} are not in the register")
    return 0x5300_0000 | rd.wide << 31 | rd.wide << 22 | low << 16 | low + width - 1 << 10 | rn.number << 5 | rd.number


def _madd(subtract: int) -> Encoder:
    def encode_madd(operands: list[str], at: int, value: Value) -> int:
        want(operands, 4)
        rd = reg(operands[0])
        rn, rm, ra = (reg(text, like=rd) for text in operands[1:])
        return 0x1b00_0000 | rd.wide << 31 | rm.number << 16 | subtract << 15 | ra.number << 10 | rn.number << 5 | rd.number
    return encode_madd


def _condition(text: str) -> int:
    found = CONDITIONS.get(text.lower())
    if found is None:
        raise Malformed(f"{text!r} is no condition")
    return found


def _csel(op2: int) -> Encoder:
    def encode_csel(operands: list[str], at: int, value: Value) -> int:
        want(operands, 4)
        return _three(0x1a80_0000 | op2 << 10 | _condition(operands[3]) << 12)(operands[:3], at, value)
    return encode_csel


def _cset(operands: list[str], at: int, value: Value) -> int:
    want(operands, 2)
    rd = reg(operands[0])
    # CSINC of two zero registers adds one where its condition does not hold: so it gets the other one.
    return 0x1a9f_07e0 | rd.wide << 31 | (_condition(operands[1]) ^ 1) << 12 | rd.number


def _move_wide(opcode: int) -> Encoder:
    def encode_move(operands: list[str], at: int, value: Value) -> int:
        want(operands, 2, 3)
        rd = reg(operands[0])
        name, shift = modifier(operands[2], value) if len(operands) > 2 else ("lsl", 0)
        if name != "lsl" or shift not in ((0, 16, 32, 48) if rd.wide else (0, 16)):
            raise Malformed(f"{operands[2]!r}: only lsl #0, #16, #32 or #48")
        number = unsigned(value(operands[1]), 16)
        return 0x1280_0000 | rd.wide << 31 | opcode << 29 | shift // 16 << 21 | number << 5 | rd.number
    return encode_move


def move(operands: list[str], value: Value) -> list[int]:
    """MOV: a register, or a constant in as few of MOVZ, MOVN, ORR, MOVK as it needs."""
    want(operands, 2)
    rd = register(operands[0])
    if is_register(operands[1]):
        rn = register(operands[1])
        if rn.wide != rd.wide:
            raise Malformed(f"{operands[1]!r} has another size than {operands[0]!r}")
        if rd.sp or rn.sp:
            if (rd.number == 31 and not rd.sp) or (rn.number == 31 and not rn.sp):
                raise Malformed("sp and zr cannot be moved into each other")
            return [0x1100_0000 | rd.wide << 31 | rn.number << 5 | rd.number]
        return [0x2a00_03e0 | rd.wide << 31 | rn.number << 16 | rd.number]
    width = 64 if rd.wide else 32
    number = value(operands[1])
    if not -(1 << width - 1) <= number < 1 << width:
        raise Malformed(f"{number:#x} does not fit {width} bits")
    return _constant(rd, number & (1 << width) - 1, width)


def _constant(rd: Register, number: int, width: int) -> list[int]:
    if rd.number == 31:
        raise Malformed("a constant needs a general register")
    pieces = [number >> at & 0xffff for at in range(0, width, 16)]
    inverted = pieces.count(0xffff) > pieces.count(0)
    idle = 0xffff if inverted else 0
    busy = [n for n, piece in enumerate(pieces) if piece != idle] or [0]
    field = bitmask(number, width)
    # ORR with the zero register: one word, where moves by halfwords would take two or more.
    if len(busy) > 1 and field is not None:
        return [0x3200_03e0 | rd.wide << 31 | field << 10 | rd.number]
    words: list[int] = []
    for n in busy:
        opcode = 3 if words else 0 if inverted else 2
        piece = pieces[n] ^ 0xffff if opcode == 0 else pieces[n]
        words.append(0x1280_0000 | rd.wide << 31 | opcode << 29 | n << 21 | piece << 5 | rd.number)
    return words


# cmp is subs to the zero register, and so on: an operand put in, at a place.
def _alias(encoder: Encoder, place: int) -> Encoder:
    def encode_alias(operands: list[str], at: int, value: Value) -> int:
        if len(operands) < 2:
            raise Malformed("takes more operands")
        zero = "xzr" if register(operands[0]).wide else "wzr"
        return encoder([*operands[:place], zero, *operands[place:]], at, value)
    return encode_alias


DATA: dict[str, Encoder] = {
    "add": _add(0, False), "adds": _add(0, True), "sub": _add(1 << 30, False), "subs": _add(1 << 30, True),
    "cmp": _alias(_add(1 << 30, True), 0), "cmn": _alias(_add(0, True), 0), "neg": _alias(_add(1 << 30, False), 1),
    "and": _logic(0), "orr": _logic(1), "eor": _logic(2), "ands": _logic(3), "bic": _logic(0, 1), "orn": _logic(1, 1),
    "tst": _alias(_logic(3), 0), "mvn": _alias(_logic(1, 1), 1), "lsl": _shift("lsl"), "lsr": _shift("lsr"),
    "asr": _shift("asr"), "ubfx": _ubfx, "udiv": _three(0x1ac0_0800), "sdiv": _three(0x1ac0_0c00),
    "mul": _three(0x1b00_7c00), "madd": _madd(0), "msub": _madd(1), "csel": _csel(0), "csinc": _csel(1), "cset": _cset,
    "movz": _move_wide(2), "movn": _move_wide(0), "movk": _move_wide(3),
}
"""By mnemonic; MOV is apart, because it may take several words."""

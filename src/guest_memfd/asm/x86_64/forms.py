"""Which instructions there are. Rule of this file: of the forms that fit, the first is what GNU as takes
(tests/test_asm_x86.py holds it).

A form is a mnemonic, its operands, the opcode, and what else is to be said; two blanks part it from the next. An operand is
a letter, after the Intel SDM's vol. 2, A.2.1, and a size.

    E, M, N, R      in ModRM.rm: register or memory, memory, memory without ``ptr``, register
    G, S, C         in ModRM.reg: general, segment, control register
    U, Z            a register: in both fields of ModRM, in the opcode
    O, X            memory without ModRM; X where 32 bits do not reach
    I, J, A         a number; a label, as a distance; selector:offset
    a               the accumulator
    CL, 3           this register, this number

    b, w, d, q, f   8, 16, 32, 64, 48 bits
    v, y, z         16 to 64, 32 to 64, 16 to 32 bits; all operands of a form alike
    I, Ix, Iu       of the size of the operands but at most 32 bits, a sign-extended byte, an unsigned byte
    Jz              of the size that jumps have

    long, real      only in 64-bit, only in 16-bit code
    wide            64 bits are the default of 64-bit mode, without REX.W; 32 are not there
    o16, o32, o64   the operand size, whatever the operands
    plain           no prefix for the operand size
    any             memory may come without ``ptr``
    lock, rep       takes such a prefix
    /0 to /7        in ModRM.reg

Source: Intel SDM vol. 2, chapters 3 to 5, by instruction; A.3. VMMCALL: AMD APM vol. 3, chapter 4.
"""

from __future__ import annotations

import re
from typing import NamedTuple


class Pattern(NamedTuple):
    """One operand of a form: what may stand there, and its size."""

    kind: str
    size: str


class Form(NamedTuple):
    """One way to encode a mnemonic."""

    patterns: tuple[Pattern, ...]
    opcode: bytes
    digit: int | None
    flags: frozenset[str]


CONDITIONS = ("o", "no", "b c nae", "ae nb nc", "e z", "ne nz", "be na", "a nbe", "s", "ns", "p pe", "np po", "l nge",
              "ge nl", "le ng", "g nle")
"""The names of each, by number."""

_MOVES = """
mov ab,Ob a0 real       mov av,Ov a1 real       mov Ob,ab a2 real       mov Ov,av a3 real
mov ab,Xb a0 long       mov av,Xv a1 long       mov Xb,ab a2 long       mov Xv,av a3 long
mov Eb,Gb 88            mov Ev,Gv 89            mov Gb,Eb 8a            mov Gv,Ev 8b
mov Zb,Ib b0            mov Zz,I b8             mov Eb,Ib c6 /0         mov Ev,I c7 /0          mov Zq,Iq b8 o64 long
mov Rz,S 8c             mov Rq,S 8c             mov Mw,S 8c any         mov S,Rv 8e plain       mov S,Mw 8e any
mov C,Rq 0f22 long      mov C,Rd 0f22 real      mov Rq,C 0f20 long      mov Rd,C 0f20 real
movabs ab,Ob a0 long    movabs av,Ov a1 long    movabs Ob,ab a2 long    movabs Ov,av a3 long    movabs Zq,Iq b8 o64
movzx Gv,Eb 0fb6        movzx Gv,Ew 0fb7        movsx Gv,Eb 0fbe        movsx Gv,Ew 0fbf
movsx Gq,Ed 63 o64      movsxd Gq,Ed 63 o64 any
lea Gv,M 8d             bswap Zy 0fc8
push Zv 50 wide         push Ix 6a wide         push I 68 wide          push Ev ff /6 wide
pop Zv 58 wide          pop Ev 8f /0 wide
push ES 06 real         push CS 0e real         push SS 16 real         push DS 1e real
pop ES 07 real          pop SS 17 real          pop DS 1f real
push FS 0fa0            push GS 0fa8            pop FS 0fa1             pop GS 0fa9
pushf - 9c              pushfq - 9c long        pushfd - 9c o32 real    popf - 9d               popfq - 9d long
popfd - 9d o32 real     pusha - 60 real         popa - 61 real          pushad - 60 o32 real    popad - 61 o32 real
xchg aq,aq 90 plain     xchg ad,ad 87c0 long    xchg av,Zv 90           xchg Zv,av 90
xchg Eb,Gb 86 lock      xchg Ev,Gv 87 lock      xchg Gb,Eb 86 lock      xchg Gv,Ev 87 lock
cmpxchg Eb,Gb 0fb0 lock         cmpxchg Ev,Gv 0fb1 lock         xadd Eb,Gb 0fc0 lock            xadd Ev,Gv 0fc1 lock
cmpxchg8b Mq 0fc7 /1 any lock   cmpxchg16b N 0fc7 /1 o64 long lock
in ab,Iu e4             in az,Iu e5             in ab,DX ec             in az,DX ed
out Iu,ab e6            out Iu,az e7            out DX,ab ee            out DX,az ef
"""
_ARITHMETIC = """
test Eb,Gb 84           test Ev,Gv 85           test Gb,Eb 84           test Gv,Ev 85
test ab,Ib a8           test av,I a9            test Eb,Ib f6 /0        test Ev,I f7 /0
inc Zz 40 real          inc Eb fe /0 lock       inc Ev ff /0 lock
dec Zz 48 real          dec Eb fe /1 lock       dec Ev ff /1 lock
not Eb f6 /2 lock       not Ev f7 /2 lock       neg Eb f6 /3 lock       neg Ev f7 /3 lock
mul Eb f6 /4            mul Ev f7 /4            imul Eb f6 /5           imul Ev f7 /5
div Eb f6 /6            div Ev f7 /6            idiv Eb f6 /7           idiv Ev f7 /7
imul Gv,Ev 0faf         imul Uv,Ix 6b           imul Uv,I 69            imul Gv,Ev,Ix 6b        imul Gv,Ev,I 69
cbw - 98 o16            cwde - 98 o32           cdqe - 98 o64 long
cwd - 99 o16            cdq - 99 o32            cqo - 99 o64 long
"""
_JUMPS = """
jmp Jb eb               jmp Jz e9               jmp Md ff /5 o16       jmp Mf ff /5 o32        jmp Ev ff /4 wide
call Jz e8              call Md ff /3 o16      call Mf ff /3 o32       call Ev ff /2 wide
jmp A ea real           ljmp A ea real          ljmpd A ea o32 real     ljmp N ff /5
call A 9a real          lcall A 9a real         lcalld A 9a o32 real    lcall N ff /3
ret - c3 rep            ret Iw c2               retf - cb               retf Iw ca              retfq - cb o64 long
lret - cb               lret Iw ca              lretq - cb o64 long     leave - c9
loop Jb e2              loope Jb e1             loopne Jb e0            loopz Jb e1             loopnz Jb e0
jcxz Jb e3 real         jecxz Jb 67e3           jrcxz Jb e3 long
int 3 cc                int Iu cd               int3 - cc
iret - cf               iretd - cf o32          iretq - cf o64 long
"""
_SYSTEM = """
lgdt N 0f01 /2          lidt N 0f01 /3          sgdt N 0f01 /0          sidt N 0f01 /1
ltr Ew 0f00 /3 any      lldt Ew 0f00 /2 any     lmsw Ew 0f01 /6 any     invlpg M 0f01 /7        clflush M 0fae /7
hlt - f4                nop - 90                cli - fa                sti - fb                cld - fc
std - fd                clc - f8                stc - f9                cmc - f5                lahf - 9f
sahf - 9e               xlatb - d7              pause - f390            ud2 - 0f0b              clts - 0f06
mfence - 0faef0         lfence - 0faee8         sfence - 0faef8         wbinvd - 0f09           invd - 0f08
cpuid - 0fa2            rdtsc - 0f31            rdtscp - 0f01f9         rdmsr - 0f32            wrmsr - 0f30
vmcall - 0f01c1         vmmcall - 0f01d9        swapgs - 0f01f8 long    syscall - 0f05          sysretq - 0f07 o64 long
"""


def _families() -> list[str]:
    lines = []
    for number, name in enumerate(("add", "or", "adc", "sbb", "and", "sub", "xor", "cmp")):
        base, lock = 8 * number, "" if name == "cmp" else "lock"
        lines += [f"{name} {operands} {base + low:02x} {flags}" for low, operands, flags in (
            (0, "Eb,Gb", lock), (1, "Ev,Gv", lock), (2, "Gb,Eb", ""), (3, "Gv,Ev", ""))]
        lines += [f"{name} Ev,Ix 83 /{number} {lock}", f"{name} ab,Ib {base + 4:02x}", f"{name} av,I {base + 5:02x}",
                  f"{name} Eb,Ib 80 /{number} {lock}", f"{name} Ev,I 81 /{number} {lock}"]
    for number, name in enumerate(("rol", "ror", "rcl", "rcr", "shl", "shr", "sal", "sar")):
        lines += [f"{name} {operands} {opcode} /{4 if name == 'sal' else number}" for operands, opcode in (
            ("Eb", "d0"), ("Ev", "d1"), ("Eb,1", "d0"), ("Ev,1", "d1"), ("Eb,Iu", "c0"), ("Ev,Iu", "c1"), ("Eb,CL", "d2"),
            ("Ev,CL", "d3"))]
    for number, name in enumerate(("bt", "bts", "btr", "btc"), 4):
        lock = "" if name == "bt" else "lock"
        lines += [f"{name} Ev,Gv 0f{0x83 + 8 * number:02x} {lock}", f"{name} Ev,Iu 0fba /{number} {lock}"]
    for number, names in enumerate(CONDITIONS):
        for name in names.split():
            lines += [f"j{name} Jb {0x70 + number:02x}", f"j{name} Jz 0f{0x80 + number:02x}",
                      f"set{name} Eb 0f{0x90 + number:02x} any", f"cmov{name} Gv,Ev 0f{0x40 + number:02x}"]
    for opcode, name in ((0x6c, "ins"), (0x6e, "outs"), (0xa4, "movs"), (0xa6, "cmps"), (0xaa, "stos"), (0xac, "lods"),
                         (0xae, "scas")):
        lines += [f"{name}b - {opcode:02x} rep"]
        lines += [f"{name}{letter} - {opcode + 1:02x} rep {size}" for letter, size in (("w", "o16"), ("d", "o32"))]
        lines += [f"{name}q - {opcode + 1:02x} rep o64 long"] if opcode > 0xa0 else []
    return lines


def _pattern(text: str) -> Pattern:
    literal = (text.isupper() and len(text) == 2) or text.isdigit()
    return Pattern(text.lower(), "") if literal else Pattern(text[0], text[1:])


def _read() -> dict[str, list[Form]]:
    lines = [line for text in (_MOVES, _ARITHMETIC, _JUMPS, _SYSTEM) for line in re.split(r"\s{2,}|\n", text) if line]
    forms: dict[str, list[Form]] = {}
    for line in _families() + lines:
        name, operands, opcode, *flags = line.split()
        digits = [int(flag[1]) for flag in flags if flag.startswith("/")]
        patterns = tuple(map(_pattern, operands.split(","))) if operands != "-" else ()
        digit = digits[0] if digits else None
        forms.setdefault(name, []).append(Form(patterns, bytes.fromhex(opcode), digit, frozenset(flags)))
    return forms


FORMS = _read()
"""By mnemonic."""
PREFIXES = {"lock": 0xf0, "rep": 0xf3, "repe": 0xf3, "repz": 0xf3, "repne": 0xf2, "repnz": 0xf2}
"""What may stand before some instructions."""

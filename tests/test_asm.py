"""The assembler: known encodings, what it refuses and where it says so, and programs that Unicorn executes."""

from __future__ import annotations

import contextlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as some

from guest_memfd.asm.arm64.asm import assemble
from guest_memfd.asm.arm64.operand import bitmask
from guest_memfd.errors import BadInput
from guest_memfd.machine.hw.arm64.cpu import Breakpoint, Cpu
from guest_memfd.machine.hw.ram import Ram

# The Arm ARM's encoding of each, checked against another assembler.
KNOWN = """
8b020020 add x0, x1, x2
91001020 add x0, x1, #4
113ffc83 add w3, w4, #0xfff
914004c5 add x5, x6, #1, lsl #12
914014c5 add x5, x6, #0x5000
910043ff add sp, sp, #16
910043e0 add x0, sp, #16
cb2163ff sub sp, sp, x1
8b214be0 add x0, sp, w1, uxtw #2
8b020c20 add x0, x1, x2, lsl #3
0b827c20 add w0, w1, w2, asr #31
d1000420 sub x0, x1, #1
eb421420 subs x0, x1, x2, lsr #5
31000c20 adds w0, w1, #3
f100003f cmp x1, #0
6b02003f cmp w1, w2
f10013ff cmp sp, #4
eb04087f cmp x3, x4, lsl #2
b100143f cmn x1, #5
cb0103e0 neg x0, x1
92401c20 and x0, x1, #0xff
121f7820 and w0, w1, #0xfffffffe
927cec3f and sp, x1, #0xfffffffffffffff0
b200f020 orr x0, x1, #0x5555555555555555
cac21c20 eor x0, x1, x2, ror #7
ea020020 ands x0, x1, x2
f27d003f tst x1, #0x8
6a02003f tst w1, w2
8a220020 bic x0, x1, x2
aa220020 orn x0, x1, x2
aa2103e0 mvn x0, x1
d37df020 lsl x0, x1, #3
53010020 lsl w0, w1, #31
d37ffc20 lsr x0, x1, #63
1ac22420 lsr w0, w1, w2
9341fc20 asr x0, x1, #1
13047c20 asr w0, w1, #4
9ac52083 lsl x3, x4, x5
d34c5020 ubfx x0, x1, #12, #9
53000020 ubfx w0, w1, #0, #1
9ac20820 udiv x0, x1, x2
1ac20c20 sdiv w0, w1, w2
9b027c20 mul x0, x1, x2
9b020c20 madd x0, x1, x2, x3
1b028c20 msub w0, w1, w2, w3
9a820020 csel x0, x1, x2, eq
1a82b420 csinc w0, w1, w2, lt
9a9f07e0 cset x0, ne
1a9f37e5 cset w5, hs
d2824680 movz x0, #0x1234
d2e24680 movz x0, #0x1234, lsl #48
72a00020 movk w0, #1, lsl #16
92800000 movn x0, #0
aa0103e0 mov x0, x1
2a0103e0 mov w0, w1
aa1f03e0 mov x0, xzr
9100001f mov sp, x0
910003e0 mov x0, sp
d2800000 mov x0, #0
92800000 mov x0, #-1
12800000 mov w0, #-1
d2a00020 mov x0, #0x10000
929db960 mov x0, #0xffffffffffff1234
b200f3e0 mov x0, #0x5555555555555555
f9400020 ldr x0, [x1]
b9400420 ldr w0, [x1, #4]
f97fffe0 ldr x0, [sp, #32760]
f8008c20 str x0, [x1, #8]!
b81fc420 str w0, [x1], #-4
f85f8020 ldr x0, [x1, #-8]
f8626820 ldr x0, [x1, x2]
f8627820 ldr x0, [x1, x2, lsl #3]
b8625820 ldr w0, [x1, w2, uxtw #2]
b862c820 ldr w0, [x1, w2, sxtw]
f822f820 str x0, [x1, x2, sxtx #3]
39400420 ldrb w0, [x1, #1]
38401420 ldrb w0, [x1], #1
38226820 strb w0, [x1, x2]
3900003f strb wzr, [x1]
79400420 ldrh w0, [x1, #2]
78002c20 strh w0, [x1, #2]!
39800020 ldrsb x0, [x1]
39c00420 ldrsb w0, [x1, #1]
79800420 ldrsh x0, [x1, #2]
79c00020 ldrsh w0, [x1]
b9800420 ldrsw x0, [x1, #4]
f8403020 ldur x0, [x1, #3]
b81fd020 stur w0, [x1, #-3]
38401020 ldurb w0, [x1, #1]
38001020 sturb w0, [x1, #1]
78401020 ldurh w0, [x1, #1]
78001020 sturh w0, [x1, #1]
38801020 ldursb x0, [x1, #1]
78c01020 ldursh w0, [x1, #1]
b8801020 ldursw x0, [x1, #1]
a8c107e0 ldp x0, x1, [sp], #16
a9bf7bfd stp x29, x30, [sp, #-16]!
29410440 ldp w0, w1, [x2, #8]
a9200440 stp x0, x1, [x2, #-512]
a9007c1f stp xzr, xzr, [x0]
c85f7c20 ldxr x0, [x1]
885ffc20 ldaxr w0, [x1]
c8007c41 stxr w0, x1, [x2]
8800fc41 stlxr w0, w1, [x2]
c8dffc20 ldar x0, [x1]
889ffc20 stlr w0, [x1]
d61f0020 br x1
d63f0040 blr x2
d65f03c0 ret
d65f0060 ret x3
d4000001 svc #0
d4000022 hvc #1
d42000a0 brk #5
d4400040 hlt #2
d503201f nop
d503203f yield
d503205f wfe
d503207f wfi
d503209f sev
d5033fdf isb
d5033f9f dsb sy
d5033a9f dsb ishst
d5033bbf dmb ish
d503379f dsb nsh
d69f03e0 eret
d5381000 mrs x0, sctlr_el1
d5384240 mrs x0, currentel
d5385200 mrs x0, esr_el1
d5386000 mrs x0, far_el1
d5384020 mrs x0, elr_el1
d5182000 msr ttbr0_el1, x0
d5182020 msr ttbr1_el1, x0
d5182040 msr tcr_el1, x0
d518a200 msr mair_el1, x0
d518c000 msr vbar_el1, x0
d518403f msr elr_el1, xzr
d5184000 msr spsr_el1, x0
d5184100 msr sp_el0, x0
d518d020 msr contextidr_el1, x0
d518d080 msr tpidr_el1, x0
d51bd040 msr tpidr_el0, x0
d5181040 msr cpacr_el1, x0
d5387400 mrs x0, par_el1
d53b4220 mrs x0, daif
d53b4200 mrs x0, nzcv
d51b4201 msr nzcv, x1
d5034fdf msr daifset, #15
d50342ff msr daifclr, #2
d50041bf msr spsel, #1
d5381000 mrs x0, S3_0_C1_C0_0
d508871f tlbi vmalle1
d508831f tlbi vmalle1is
d5088720 tlbi vae1, x0
d5088363 tlbi vaae1is, x3
d5088743 tlbi aside1, x3
d50883a3 tlbi vale1is, x3
d50b7420 dc zva, x0
d50b7e20 dc civac, x0
d5087620 dc ivac, x0
d50b7a20 dc cvac, x0
d50b7b21 dc cvau, x1
d508751f ic iallu
d50b7520 ic ivau, x0
d5087800 at s1e1r, x0
00000007 udf #7
d41fffe3 smc #65535
"""
CODE = 0x8000_0000


def words(source: str, origin: int = 0) -> list[int]:
    data = assemble(source, origin).data
    return list(struct.unpack(f"<{len(data) // 4}I", data))


@pytest.mark.parametrize("line", KNOWN.strip().splitlines())
def test_known_encodings(line: str) -> None:
    word, text = line[:8], line[9:]
    assert [f"{each:08x}" for each in words(text)] == [word]
    assert words(text.upper().replace("#0X", "#0x")) == words(text)


def execute(source: str, **x: int) -> Cpu:
    """Run *source* to its BRK."""
    ram = Ram(1 << 20)
    cpu = Cpu(ram, lambda va, access, el: (va, 4096, True, True, True))
    program = assemble(source, CODE)
    ram.write(CODE, program.data)
    for name, value in x.items():
        cpu.set_x(int(name[1:]), value)
    cpu.pc, cpu.sp = CODE, CODE + 0x8000
    assert cpu.run(timeout=300) == Breakpoint(0)
    return cpu


def test_branches_reach_labels_before_and_behind() -> None:
    cpu = execute("""
            mov     x0, #0
            mov     x1, #10
    again:  add     x0, x0, x1
            subs    x1, x1, #1
            b.ne    again
            cbz     x1, behind
            mov     x0, #0
    behind: tbnz    x0, #0, odd
            bl      double
            b       end
    odd:    bl      double
            add     x0, x0, #1000
    end:    brk     #0
    double: add     x0, x0, x0
            ret
    """)
    assert cpu.x(0) == 1110


def test_branch_distances_are_of_the_words_themselves() -> None:
    assert words("here: b here\nb here\nb.eq here\ncbnz w1, ahead\ntbnz x2, #33, ahead\nbl ahead\nahead: nop") == [
        0x14000000, 0x17ffffff, 0x54ffffc0, 0x35000061, 0xb7080042, 0x94000001, 0xd503201f]
    assert words("adr x0, there\nadrp x1, there\n.space 8\nthere: .word 1", 0x1ff8) == [
        0x10000080, 0xb0000001, 0, 0, 1]


@given(value=some.integers(-(1 << 63), (1 << 64) - 1))
def test_mov_and_ldr_load_any_constant(value: int) -> None:
    wide, narrow = value & (1 << 64) - 1, value & (1 << 32) - 1
    cpu = execute(f"mov x0, #{value}\nldr x1, ={value}\nldr w2, ={narrow:#x}\nmov w3, #{narrow}\nbrk #0")
    assert [cpu.x(n) for n in range(4)] == [wide, wide, narrow, narrow]


@given(ones=some.integers(1, 63), rotate=some.integers(0, 63), size=some.sampled_from((2, 4, 8, 16, 32, 64)))
def test_logical_immediates_execute_as_written(ones: int, rotate: int, size: int) -> None:
    ones = ones % (size - 1) + 1
    element = (1 << ones) - 1
    rotate %= size
    element = (element >> rotate | element << size - rotate) & (1 << size) - 1
    value = sum(element << at for at in range(0, 64, size))
    assert bitmask(value, 64) is not None
    assert execute(f"mov x1, #-1\nand x0, x1, #{value:#x}\neor x2, x1, #{value:#x}\nbrk #0").x(0) == value


def test_what_is_no_logical_immediate() -> None:
    assert [bitmask(value, 64) for value in (0, (1 << 64) - 1, 5, 0x1234, 0xff00ff)] == [None] * 5


def test_data_and_pools() -> None:
    program = assemble("""
    .equ    LATER, 1 << 4 | 1       // needs no label: holds everywhere
    start:  ldr     x0, =start
            ldr     x1, =LATER
            ldr     x2, =start
            b       over
            .ltorg
    over:   .byte   1, 'A', '\\n', -1
            .hword  0x1234
            .align  2
            .word   end - start
            .quad   end, . - start
            .ascii  "a,b // \\"c\\""
            .asciz  "d"
            .balign 8
            .space  3, 0xee
    end:
    """, CODE)
    assert program.symbols == {"LATER": 17, "start": CODE, "over": CODE + 0x20, "end": CODE + 0x20 + 24 + 16 + 3}
    assert program.data[0x10:] == b"".join((
        struct.pack("<QQ", CODE, 17), b"\x01A\n\xff", struct.pack("<HxxI", 0x1234, 0x4b),
        struct.pack("<QQ", CODE + 0x4b, 0x2c), b'a,b // "c"', b"d\0", b"\xee\xee\xee"))


def test_origin_and_listing() -> None:
    program = assemble("top: nop\n.org 0x1010\nb top  // back\n", 0x1000)
    assert program.origin == 0x1000
    assert program.data == struct.pack("<IQII", 0xd503201f, 0, 0, 0x17fffffc)
    assert program.listing.splitlines() == ["0x0000001000            top: nop", "0x0000001000  d503201f  top: nop",
                                            "0x0000001004  00000000  .org 0x1010", "0x0000001010  17fffffc  b top  // back"]


@pytest.mark.parametrize(("source", "message"), [
    ("nop\nfrob x0", "source:2: frob: no such instruction here"),
    ("mov x0", "source:1: mov: takes 2 operands, not 1"),
    ("add x0, w1, x2", "source:1: add: 'w1' has another size than 'x0'"),
    ("add x0, x1, #0x1001", "source:1: add: immediate 0x1001 is neither 12 bits nor 12 bits shifted by 12"),
    ("and x0, x1, #5", "source:1: and: 0x5 is no logical immediate"),
    ("ldr x0, x1", "source:1: ldr: no symbol 'x1'"),
    ("ldr x0, [w1]", "source:1: ldr: 'w1' must be an x register or sp"),
    ("ldr x0, [x1, #300]!", "source:1: ldr: offset 0x12c does not fit 9 signed bits"),
    ("ldp x0, x1, [x2, #4]", "source:1: ldp: offset 0x4 is no multiple of 8"),
    ("ldrb x0, [x1]", "source:1: ldrb: 'x0' has the wrong size"),
    ("b nowhere", "source:1: b: no symbol 'nowhere'"),
    ("b 2", "source:1: b: distance 0x2 is no multiple of 4"),
    ("tbz x0, #1, 0x10000", "source:1: tbz: distance 0x4000 does not fit 14 signed bits"),
    ("a:\na:", "source:2: :: 'a' is defined twice"),
    ("mrs x0, foo_el1", "source:1: mrs: 'foo_el1' is no system register known here; S3_<op1>_C<n>_C<m>_<op2> names any"),
    ("msr daifset, #16", "source:1: msr: immediate 0x10 does not fit 4 bits"),
    ("tlbi everything", "source:1: tlbi: 'everything' is no TLB invalidation of EL1"),
    ("hvc #0x10000", "source:1: hvc: immediate 0x10000 does not fit 16 bits"),
    (".byte 256", "source:1: .byte: 0x100 does not fit 1 bytes"),
    (".byte 1\nnop", "source:2: nop: an instruction at 0x1, which is not aligned; .align 2 is missing"),
    (".ascii 'x'", "source:1: .ascii: 'x' is no string in double quotes"),
    (".ascii \"\\q\"", "source:1: .ascii: no escape \\q"),
    (".frob 1", "source:1: .frob: no such directive here"),
    (".space later\nlater:", "source:1: no symbol 'later' (it must be defined before this line)"),
    (".space 0x10000000", "source:1: the program grows over 0x1000000 bytes"),
    (".org 0\nnop\n.org 0", "source:3: .org: 0 goes backwards"),
    (".word 1 +", "source:1: .word: cannot read '1 +' as a number"),
    (".word 1 / 0", "source:1: .word: '1 / 0' divides by zero"),
    (".word __import__('os')", "source:1: .word: cannot read \"__import__('os')\" as a number"),
    (".word 1or 2", "source:1: .word: cannot read '1or 2' as a number"),
    (".word " + "-" * 100000 + "1", "source:1: .word: an expression this deep cannot be read"),
    ("nop\nldr x0, =missing", "source:2: ldr: no symbol 'missing'"),
    ("mov sp, #1", "source:1: mov: a constant needs a general register"),
    ("lsl w0, w1, #32", "source:1: lsl: shift 32 is not in 0..31"),
    ("movz x0, #1, lsl #8", "source:1: movz: 'lsl #8': only lsl #0, #16, #32 or #48"),
    ("mov xzr, #3", "source:1: mov: a constant needs a general register"),
    ("cmp xzr, #1", "source:1: cmp: 'xzr' cannot stand here"),
    ("and x0, w1, #1", "source:1: and: 0x1 is no logical immediate"),
    ("str x1, [x1], #8", "source:1: str: the base is written back and transferred"),
    ("dsb", "source:1: dsb: takes 1 operands, not 0"),
    ("b.xx 0", "source:1: b.xx: no such instruction here"),
])
def test_mistakes_are_named_with_their_line(source: str, message: str) -> None:
    with pytest.raises(BadInput) as caught:
        assemble(source)
    assert str(caught.value) == message


@given(some.text(some.sampled_from("abx01[]()#,.:=!+-*/<>\"'\\ \n;lrdvmo"), max_size=40))
def test_any_text_is_assembled_or_refused(source: str) -> None:
    with contextlib.suppress(BadInput):
        assemble(source)


def test_memory_forms_execute_as_written() -> None:
    cpu = execute("""
            adr     x9, data
            mov     x10, #2
            ldrsb   x0, [x9]
            ldrsb   w1, [x9]
            ldrh    w2, [x9], #2
            ldr     x3, [x9, x10, lsl #3]
            ldr     w4, [x9, w10, uxtw #2]
            str     x3, [x9, #8]!
            ldur    x5, [x9, #-8]
            stp     x3, x5, [sp, #-16]!
            ldp     x6, x7, [sp], #16
            ldrsw   x8, [x9, #-8]
            mov     x11, sp
            brk     #0
            .align  3
            .space  6
    data:   .byte   0xf0, 0xff
            .quad   0x1122334480000000, 2, 0x5566778899aabbcc
    """)
    assert [cpu.x(n) for n in (0, 1, 2, 3)] == [0xffff_ffff_ffff_fff0, 0xffff_fff0, 0xfff0, 0x5566778899aabbcc]
    assert (cpu.x(4), cpu.x(5), cpu.x(6), cpu.x(7)) == (2, 0x1122334480000000, 0x5566778899aabbcc, 0x1122334480000000)
    assert (cpu.x(8), cpu.x(11)) == (0xffff_ffff_8000_0000, CODE + 0x8000)
    assert cpu.ram.read64(cpu.x(9)) == cpu.x(3)

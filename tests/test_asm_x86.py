"""The x86 assembler beside GNU as."""

from __future__ import annotations

import contextlib
import itertools
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from guest_memfd.asm.x86_64.asm import assemble
from guest_memfd.asm.x86_64.forms import FORMS
from guest_memfd.asm.x86_64.operand import REGISTERS, SEGMENTS
from guest_memfd.errors import BadInput

# Worked out from the Intel SDM vol. 2 by hand: the instruction's page, and tables 2-1 to 2-3 for ModRM and SIB.
KNOWN_64 = """
4889c3           mov rbx, rax
4d89c8           mov r8, r9
b878563412       mov eax, 0x12345678
48c7c0ffffffff   mov rax, -1
48b80000000001000000 mov rax, 0x100000000
8b4508           mov eax, [rbp+8]
8b4500           mov eax, [rbp]
418b4500         mov eax, [r13]
8b0424           mov eax, [rsp]
418b0424         mov eax, [r12]
8b049d00000000   mov eax, [rbx*4]
8b042500100000   mov eax, [0x1000]
8b0500000000     mov eax, [rip+next]
8b848b00010000   mov eax, [rbx+rcx*4+0x100]
678b03           mov eax, [ebx]
c60305           mov byte ptr [rbx], 5
48c70305000000   mov qword ptr [rbx], 5
40b605           mov sil, 5
b405             mov ah, 5
0fb6c3           movzx eax, bl
480fbec3         movsx rax, bl
4863c3           movsxd rax, ebx
488d4308         lea rax, [rbx+8]
4883c001         add rax, 1
4805e8030000     add rax, 1000
0403             add al, 3
6683e80a         sub ax, 10
31c0             xor eax, eax
f6c301           test bl, 1
48ffc0           inc rax
f7d8             neg eax
48f7f3           div rbx
f7fb             idiv ebx
480fafc3         imul rax, rbx
6bc305           imul eax, ebx, 5
c1e004           shl eax, 4
d1e8             shr eax, 1
48d3f8           sar rax, cl
50               push rax
4154             push r12
6a05             push 5
415f             pop r15
ebfe             jmp .
7404             jz .+6
e8fbffffff       call .
ffe0             jmp rax
ff5308           call [rbx+8]
c3               ret
e2fe             loop .
0f94c0           setz al
480f4dc3         cmovge rax, rbx
87d9             xchg ecx, ebx
91               xchg eax, ecx
f0480fb10b       lock cmpxchg [rbx], rcx
0fbae007         bt eax, 7
480fc8           bswap rax
ec               in al, dx
e680             out 0x80, al
cd80             int 0x80
48cf             iretq
f348ab           rep stosq
f3a4             rep movsb
0f0117           lgdt [rdi]
0f00d8           ltr ax
0f0138           invlpg [rax]
0f22d8           mov cr3, rax
8ed8             mov ds, ax
0f30             wrmsr
0f01c1           vmcall
0f01d9           vmmcall
480f07           sysretq
26ff30           push es:[rax]
"""
KNOWN_16 = """
89d8             mov ax, bx
6689d8           mov eax, ebx
b83412           mov ax, 0x1234
8b00             mov ax, [bx+si]
8b4302           mov ax, [bp+di+2]
8b4600           mov ax, [bp]
8b1e3412         mov bx, [0x1234]
a13412           mov ax, [0x1234]
26880d           mov es:[di], cl
668b01           mov eax, [bx+di]
678b03           mov ax, [ebx]
40               inc ax
664b             dec ebx
06               push es
1f               pop ds
83c001           add ax, 1
e8fdff           call .
0f84fc00         jz .+256
ea00100000       jmp 0:0x1000
66ea000001000800 ljmpd 8:0x10000
ff2f             ljmp [bx]
e3fe             jcxz .
66f3ab           rep stosd
0f0117           lgdt [bx]
0f20c0           mov eax, cr0
ee               out dx, al
cf               iret
"""
# Every instruction there is here, in every form; <a|b> stands for each of a and b.
TABLE_64 = """
<add|or|adc|sbb|and|sub|xor|cmp> <al, bl|ah, ch|sil, r9b|ax, r9w|r10d, edx|rax, r15|bh, [rbx]|r8b, [rbx]|[r12], spl>
<add|or|adc|sbb|and|sub|xor|cmp> <r9, [rbp]|[rbp], r9|ax, [r13]|[r13], ax>
<add|or|adc|sbb|and|sub|xor|cmp> <al|ah|bl|r8b|dil|byte ptr [rax]>, <0|127|128|255|-1|-128>
<add|or|adc|sbb|and|sub|xor|cmp> <ax|r9w|word ptr [r13]>, <5|127|128|0xff7f|0xff80|0xffff|-32768>
<add|or|adc|sbb|and|sub|xor|cmp> <eax|ebx|dword ptr [rbx+rcx]>, <5|-128|-129|0xffffff80|0xffffff7f|0x7fffffff>
<add|or|adc|sbb|and|sub|xor|cmp> <rax|r11|qword ptr [r12]>, <5|-128|128|-0x80000000|0x7fffffff|0xffffffffffffffff>
lock <add|or|adc|sbb|and|sub|xor> <byte ptr [rax], 1|dword ptr [rax], 1000|[r9], r9|word ptr [rax], cx>
test <al, 1|bl, 1|eax, 1|ebx, 1|rax, -1|ax, 0x8000|cl, dl|r8, rax|[rbx], ecx|ecx, [rbx]|bl, [r9]|qword ptr [rbx], 1>
test byte ptr [rbx], <0|255|-128>
mov <al, bl|ah, bl|ax, r9w|eax, r9d|rbp, rsp|r8, [r9]|[r9], r8|[rbx], ah|sil, [rdi]|bpl, spl>
mov <al|ah|r8b|sil|byte ptr [rdi]>, <0|255|-1|'A'>
mov <ax|r8w|word ptr [rdi]>, <0|0xffff|-1>
mov <eax|r8d|dword ptr [rdi]>, <0|0xffffffff|-0x80000000>
mov <rax|r8>, <0|-1|0x7fffffff|0x80000000|0xffffffff|-0x80000001|0xffffffff80000000|0x123456789abcdef0>
mov qword ptr [rdi], <0|-1|0x7fffffff>
mov <ax|eax|rax|r8|word ptr [rbx]|[rbx]>, <es|cs|ss|ds|fs|gs>
mov <es|ss|ds|fs|gs>, <ax|eax|rax|r8|word ptr [rbx]|[rbx]>
mov <rax|r9>, <cr0|cr2|cr3|cr4|cr8>
mov <cr0|cr2|cr3|cr4|cr8>, <rdx|r15>
mov <al|ax|eax|rax>, <[0x1000]|[0x112233445566]|fs:[0x28]|gs:[0x112233445566]>
mov <[0x1000]|[0x112233445566]>, <al|ax|eax|rax>
movabs <rax|r9>, <5|-1|0xfedcba9876543210>
movabs <al|ax|eax|rax>, [0x112233445566]
movabs [0x1000], <al|ax|eax|rax>
<movzx|movsx> <ax, bl|eax, bl|rax, bl|r9, sil|eax, ah|eax, bx|rax, r9w|eax, byte ptr [rbx]|r8, word ptr [rbx]>
<movsx|movsxd> <rax, ebx|r9, r10d|rax, dword ptr [rbx]>
movsxd rcx, [r8]
lea <ax|eax|rax|r9>, <[rbx]|[r9+r10*8-5]|[ebx+4]>
xchg <al, bl|bl, al|ah, al|ax, bx|bx, ax|eax, ebx|r9d, eax|rax, r9|rcx, rdx|ax, ax|eax, eax|rax, rax>
xchg <[rbx], ecx|ecx, [rbx]|[rbx], bl|bl, [rbx]>
lock xchg <[rbx], al|rax, [rbx]>
<lock |><cmpxchg|xadd> [rbx], <al|r9b|cx|edx|r10>
<cmpxchg|xadd> <al, bl|cx, dx|r8d, eax|rax, r9>
lock <inc|dec|not|neg> <byte|word|dword|qword> ptr [rbx+8]
<lock |>cmpxchg<8b|16b> [rbx]
<inc|dec|not|neg|mul|imul|div|idiv> <al|ah|r8b|dil|ax|r9w|eax|r10d|rax|r11|byte ptr [rax]|word ptr [rax]|dword ptr [rax]>
<inc|dec|not|neg|mul|imul|div|idiv> qword ptr [<rax|r8|rip>]
imul <ax, bx|eax, r9d|rax, [rbx]|ax, 5|eax, 500|rax, -1|r9, r10, 127|eax, [rbx], 128|cx, dx, 0xffff|r8w, r9w, 1000>
<shl|shr|sar|sal|rol|ror|rcl|rcr> <al|ah|r8b|ax|ebx|r9|byte ptr [rax]|qword ptr [r12]>, <1|2|255|cl>
<shl|shr|sar|sal|rol|ror|rcl|rcr> <al|ah|r8b|ax|ebx|r9|byte ptr [rax]|qword ptr [r12]>
repz ret
<bt|bts|btr|btc> <ax, bx|eax, r9d|r8, rax|[rbx], ecx|eax, 31|rax, 63|word ptr [rbx], 3|qword ptr [r9], 3>
lock <bts|btr|btc> <[rbx], eax|dword ptr [rbx], 5>
bswap <eax|r8d|rax|r15>
push <ax|rax|rbp|r8|r9w|fs|gs|0|127|128|-1|-128|0x7fffffff|-0x80000000|word ptr [rax]|qword ptr [rax]|[r9]>
pop <ax|rax|rbp|r8|r9w|fs|gs|word ptr [rax]|qword ptr [rax]|[r9]>
<pushf|popf|pushfq|popfq|leave>
<jmp|call> <rax|r9|ax|[rax]|qword ptr [r9+8]|word ptr [rax]|dword ptr [r9]|fword ptr [rax]|[rip]>
<ljmp|lcall> [r9]
<ret|ret 0|ret 0xffff|retfq|lretq|lret|lret 8|retf 8>
<loop|loope|loopne|loopz|loopnz|jrcxz|jecxz|jmp|call> .
j<CC> <.|.+100>
set<CC> <al|r8b|sil|ah|[rbx]|byte ptr [r9]>
cmov<CC> <ax, bx|eax, [rbx]|r8, r9>
in <al, 0x60|ax, 0x60|eax, 255|al, dx|ax, dx|eax, dx>
out <0x60, al|0x60, ax|255, eax|dx, al|dx, ax|dx, eax>
int <0|3|4|255>
<int3|iretq|hlt|cli|sti|cld|std|clc|stc|cmc|nop|ud2|lahf|sahf|xlatb|pause|mfence|lfence|sfence|wbinvd|invd|clts|cpuid|rdtsc>
<rdtscp|rdmsr|wrmsr|vmcall|vmmcall|syscall|sysretq|swapgs|cbw|cwde|cdqe|cwd|cdq|cqo|iretd>
<|rep ><movs|stos|lods><b|w|d|q>
<|rep ><ins|outs><b|w|d>
<|repe |repne |repz |repnz ><scas|cmps><b|w|d|q>
<lgdt|lidt|sgdt|sidt|invlpg|clflush> <[rax]|[r9+r10]|[rip]|[0x1000]>
<ltr|lldt|lmsw> <ax|r9w|[rbx]|word ptr [r9]>
mov ecx, <[rax]|[rbx]|[rsp]|[rbp]|[rsi]|[r8]|[r12]|[r13]|[rip]|[rip+5]|[rip-5]|[0]|[0x7fffffff]|[-1]|[-0x80000000]>
mov ecx, <[rax]|[rbp]|[rsp]|[r12]|[r13]|[ebx]>
mov ecx, [<rax|rbp|rsp|r12|r13|ebx|r13d><+0|+1|-1|+127|+128|-128|-129|+0x7fffffff|-0x80000000|+2*3-1|-(1+5)/2|- -5>]
mov ecx, [<rax|rbx|rbp|rsp|r12|r13>+<rcx|r9|rbp|r13|r12><|*1|*2|*4|*8><|+1|-0x100>]
mov ecx, [<rcx|r9|rbp|r13|r12>*<1|2|4|8><|+1|-0x100|+rbx|+rsp|+r13>]
mov ecx, [<rax+rsp|rsp+rax|eax+esp|eax+ecx*2|8*rax+rbx|5+rax|rax+5+rbx-3|2*4+rax|(1+2)*3+rax|'a'+rax>]
mov ecx, [<eax+0xffffffff|rax+0xffffffffffffffff|eax-0x80000000|ecx*4>]
mov <ecx|r9b>, <es|cs|ss|ds|fs|gs>:<[rax]|[rsp]|[rbp+rax]|[rax+rbp]|[r12]|[r13]|[rip]|[0x10]|[ebx]>
"""
TABLE_16 = """
<add|or|adc|sbb|and|sub|xor|cmp> <al, bl|ah, ch|ax, dx|edx, eax|bh, [bx]|[si], di|edi, [bp]|ax, 5|ax, 500|bx, -1>
<add|or|adc|sbb|and|sub|xor|cmp> <ebx, 0x12345|edx, 0xffffff80|[bx], esi>
<add|cmp> <byte ptr [bx], 5|word ptr [bx], 0xff80|word ptr [bx], 0x1234|dword ptr [bx+si], 5|eax, 0x12345|eax, -1|al, 5>
lock add <[bx], ax|dword ptr [bx], 5>
test <al, 1|ax, 1|eax, 1|bx, 1|cx, [bx]|[bx], ecx>
mov <al|ax|eax>, <[0x1234]|es:[0x1234]|ds:[0x1234]|[-1]>
mov <[0x1234]|fs:[0]>, <al|ax|eax|bx>
mov cx, [<bx|bp|si|di|bx+si|bx+di|bp+si|bp+di|si+bx|di+bp><|+0|+1|-1|+127|+128|-128|-129|+0xffff|+0x7fff>]
mov cx, <es|cs|ss|ds|fs|gs>:[<bx|bp|bp+di|di+bp|ebx|esp|ebp|0x10>]
mov <cl|cx|ecx>, [<eax|ebp|esp|eax+ecx*4|ebp+eax|eax*8|esp+ebp><|+1|-0x81|+0xffffffff>]
mov <ax|eax|word ptr [bx]|[bx]>, <es|cs|ss|ds|fs|gs>
mov <es|ss|ds|fs|gs>, <ax|eax|[bx]>
mov <cr0|cr3|cr4>, eax
mov edx, <cr0|cr2>
mov <al, 5|ax, 0xffff|eax, 0xffffffff|byte ptr [bx], 5|word ptr [bx], 5|dword ptr [bx], 5>
<movzx|movsx> <ax, bl|eax, bl|eax, bx|eax, word ptr [bx]|ax, byte ptr [bx]>
lea <ax|eax>, <[bx+si]|[ebx+esi]>
xchg <ax, bx|ebx, eax|ax, ax|eax, eax|al, bl|cx, dx|[bx], ecx>
<cmpxchg|xadd> [bx], <al|cx|edx>
<inc|dec> <al|ax|di|eax|byte ptr [bx]|word ptr [bx]|dword ptr [bx]>
<not|neg|mul|imul|div|idiv> <al|ax|eax|word ptr [bx]|dword ptr [bx]>
imul <ax, bx|eax, ebx|ax, bx, 5|eax, 500>
<shl|sar> <al|ax|eax|word ptr [bx]>, <1|5|cl>
<shl|rcr> <al|ax|eax|word ptr [bx]>
<bt|bts> <ax, bx|eax, 5|word ptr [bx], 5>
bswap eax
push <ax|eax|es|cs|ss|ds|fs|gs|0|127|128|0xffff|0xff80|-1|-32768|[bx]|word ptr [bx]|dword ptr [bx]>
pop <ax|eax|es|ss|ds|fs|gs|[bx]|word ptr [bx]|dword ptr [bx]>
<pushf|popf|pushfd|popfd|pusha|popa|pushad|popad|leave|ret|repz ret|ret 4|retf|lret|iret|iretd>
<jmp|call> <ax|eax|[bx]|word ptr [bx]|dword ptr [bx]|fword ptr [bx]|0x10:0x1234>
<ljmp|lcall> <[bx]|0x10:0x1234|0xffff:0xffff>
<ljmpd|lcalld> 0x10:0x12345678
<loop|loope|loopne|jcxz|jecxz|jmp|call> .
j<CC> .
set<CC> <al|[bx]>
cmov<CC> <ax, bx|eax, [bx]>
in <al, 0x60|ax, 0x60|eax, 255|al, dx|ax, dx|eax, dx>
out <0x60, al|0x60, ax|255, eax|dx, al|dx, ax|dx, eax>
<hlt|cli|sti|cld|nop|ud2|pause|cpuid|rdmsr|wrmsr|rdtsc|vmcall|vmmcall|int 0x10|int 3|cbw|cwde|cwd|cdq|wbinvd|mfence>
<|rep ><movs|stos|lods|ins|outs><b|w|d>
<repe|repne> <scas|cmps><b|w|d>
<lgdt|lidt|invlpg> <[bx]|[0x1234]|[ebx]>
<ltr|lldt> <ax|[bx]>
"""
CONDITIONS = "o|no|b|c|nae|ae|nb|nc|e|z|ne|nz|be|na|a|nbe|s|ns|p|pe|np|po|l|nge|ge|nl|le|ng|g|nle"
MARK = 0xa5


def lines_of(table: str) -> list[str]:
    choices = [[part.split("|") for part in re.split("[<>]", line.replace("<CC>", f"<{CONDITIONS}>"))]
               for line in table.strip().splitlines()]
    return ["".join(parts) for choice in choices for parts in itertools.product(*choice)]


def known(table: str) -> list[tuple[str, str]]:
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in table.strip().splitlines()]


@pytest.mark.parametrize(("code", "line"), known(KNOWN_64))
def test_known_encodings(code: str, line: str) -> None:
    assert assemble(f"{line}\nnext:").data.hex() == code
    assert assemble(f"{line.upper()}\nNEXT:").data.hex() == code


@pytest.mark.parametrize(("code", "line"), known(KNOWN_16))
def test_known_encodings_of_16_bit_code(code: str, line: str) -> None:
    assert assemble(f".code16\n{line}").data.hex() == code


def test_upper_case_and_blanks_mean_nothing() -> None:
    for line in lines_of(TABLE_64):
        spaced = line.upper().replace("[", "[ ").replace(",", " ,\t").replace("+", " + ").replace("*", " * ")
        assert assemble(spaced).data == assemble(line.replace("'a'", "'A'")).data


def test_every_mnemonic_is_in_a_table() -> None:
    assert not set(FORMS) - set(" ".join(lines_of(TABLE_64) + lines_of(TABLE_16)).split())


# -- GNU as ------------------------------------------------------------------------------------------------------------


oracle = pytest.mark.skipif(not (shutil.which("as") and shutil.which("objcopy")), reason="needs GNU as and objcopy")


def gnu(source: str, bits: int) -> tuple[bytes, set[int]]:
    """What GNU as makes of *source*, and the lines that it refuses or bends."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "x.s").write_text(f".intel_syntax noprefix; .code{bits}; {source}\n", encoding="ascii")
        made = subprocess.run(["as", "--64", "-Z", "-o", "x.o", "x.s"], cwd=folder, capture_output=True, text=True)
        subprocess.run(["objcopy", "-O", "binary", "-j", ".text", "x.o", "x.bin"], cwd=folder, check=True)
        complaints = re.findall(r"^x\.s:(\d+): (?:Error|Warning: .* shortened)", made.stderr, re.M)
        return (Path(folder) / "x.bin").read_bytes(), {int(number) for number in complaints}


def compare(lines: list[str], bits: int) -> list[tuple[str, str, str]]:
    """Every line that comes out otherwise, with ours and GNU's bytes; "" for one that is refused."""
    theirs, refused = gnu("".join(f"{line}\n.byte {MARK}; .org {16 * n}\n" for n, line in enumerate(lines, 1)), bits)
    wrong = []
    for number, line in enumerate(lines):
        try:
            ours = assemble(f".code{bits}\n{line}").data
        except BadInput:
            ours = b""
        expected = theirs[16 * number:16 * number + 16].rstrip(b"\0")[:-1] if 2 * number + 1 not in refused else b""
        if ours != expected:
            wrong.append((line, ours.hex(), expected.hex()))
    return wrong


@oracle
@pytest.mark.parametrize(("bits", "table"), [(64, TABLE_64), (16, TABLE_16)])
def test_every_instruction_is_what_gnu_as_makes_of_it(bits: int, table: str) -> None:
    lines = lines_of(table)
    assert all(assemble(f".code{bits}\n{line}").data for line in lines)
    assert compare(lines, bits) == []


@oracle
@pytest.mark.parametrize(("bits", "table"), [(64, KNOWN_64), (16, KNOWN_16)])
def test_gnu_as_knows_the_same_encodings(bits: int, table: str) -> None:
    assert compare([line for _, line in known(table) if "." not in line and "next" not in line], bits) == []


# -- instructions at random --------------------------------------------------------------------------------------------


SIZES = {"b": 8, "w": 16, "d": 32, "q": 64, "f": 48}
PTR = {8: "byte ptr ", 16: "word ptr ", 32: "dword ptr ", 48: "fword ptr ", 64: "qword ptr "}
LONG = {size: sorted(text for text, found in REGISTERS.items() if (found.size, found.kind) == (size, "general"))
        for size in (8, 16, 32, 64)}
REAL = {size: [text for text in names if REGISTERS[text].number < 8 and not REGISTERS[text].rex]
        for size, names in LONG.items() if size < 64}


# Numbers that fit, near every edge: of some that do not fit GNU as cuts bits off.
def numbers(letter: str, size: int) -> some.SearchStrategy[int]:
    bits = {"u": 8, "b": 8, "w": 16, "q": 64}.get(letter, size)
    low, high = 0 if letter == "u" else -1 << bits - 1, (1 << bits) - 1
    edges = [sign * (1 << bit) + more for sign in (1, -1) for bit in (7, 8, 15, 16, 31, 32, 63) for more in (-1, 0, 1)]
    return some.one_of(some.integers(low, high), some.sampled_from([edge for edge in edges if low <= edge <= high] + [1, 3]))


@some.composite
def memories(draw: some.DrawFn, bits: int) -> str:
    registers = REAL if bits == 16 else LONG
    width = draw(some.sampled_from([bits, bits, bits, 32, 8]))
    base, index = (draw(some.sampled_from(registers[width])) for _ in range(2))
    scale = draw(some.sampled_from(["", "*1", "*2", "*4", "*8", "*3"] if width > 16 else [""]))
    shape = draw(some.sampled_from([base, f"{base}+{index}{scale}", f"{index}{scale}+{base}", f"{index}{scale}", "0",
                                    "rip" if bits == 64 else "bx+si"]))
    segment = draw(some.sampled_from([""] * 6 + [f"{name}:" for name in SEGMENTS]))
    displacement = draw(some.just("") | numbers("", min(bits, 32)).filter(lambda n: n < 1 << 31).map("{:+}".format))
    return f"{segment}[{shape}{displacement}]"


@some.composite
def instructions(draw: some.DrawFn, bits: int) -> str:
    registers = REAL if bits == 16 else LONG
    name, form = draw(some.sampled_from([
        (name, form) for name, forms in FORMS.items() for form in forms
        if not {p.kind for p in form.patterns} & {"J", "A"} and ("real" if bits == 64 else "long") not in form.flags]))
    common, texts = draw(some.sampled_from(sorted(registers))), []
    mixed = sorted(registers) if "I" not in {pattern.kind for pattern in form.patterns} else []
    for kind, letter in form.patterns:
        size = SIZES[letter] if letter in SIZES else draw(some.sampled_from([common] * 9 + mixed))
        register = some.sampled_from(registers.get(size, ["al"]))
        memory = some.builds("{}{}".format, some.sampled_from([PTR[size]] * 3 + [""]), memories(bits))
        number = numbers(letter, bits if "wide" in form.flags else common)
        operand = {"I": number.map(str), "S": some.sampled_from(SEGMENTS), "E": register | memory,
                   "M": memory, "N": memory, "O": memory, "X": memory, "C": some.sampled_from(["cr0", "cr3"]),
                   "a": some.just(registers.get(size, ["al"])[0])}.get(kind, register)
        texts.append(kind if len(kind) > 1 or kind.isdigit() else draw(operand))
    return f"{name} {', '.join(texts)}"


@oracle
@pytest.mark.parametrize("bits", [64, 16])
def test_instructions_at_random_are_what_gnu_as_makes_of_them(bits: int) -> None:
    @settings(max_examples=40, deadline=None, derandomize=True)
    @given(some.lists(instructions(bits), min_size=20, max_size=60))
    def check(lines: list[str]) -> None:
        assert compare(lines, bits) == []
    check()


BRANCHES = [f"j{name}" for name in CONDITIONS.split("|")] + ["jmp", "jmp", "call"]
SPACES = some.sampled_from([1, 2, 30, 60, 100, 120, 124, 125, 126, 127, 128, 129, 130, 200])


@oracle
@pytest.mark.parametrize("bits", [64, 16])
def test_jumps_are_as_long_as_those_of_gnu_as(bits: int) -> None:
    part = some.tuples(some.sampled_from(BRANCHES), some.integers(0, 11), SPACES, some.booleans())

    @settings(max_examples=150, deadline=None, derandomize=True)
    @given(some.lists(part, min_size=12, max_size=12))
    def check(parts: list[tuple[str, int, int, bool]]) -> None:
        source = "\n".join(f"l{number}: {jump} l{to}\n{f'.skip {space}' if wide else 'add ax, 5'}"
                           for number, (jump, to, space, wide) in enumerate(parts))
        assert assemble(f".code{bits}\n{source}").data == gnu(source, bits)[0]
    check()


@oracle
def test_one_jump_that_grows_makes_all_before_it_grow() -> None:
    for more in range(4):
        source = "".join(f"l{n}: jne l{n + 21}\n.skip 4\n" for n in range(300)) + "".join(f"l{n}:" for n in range(300, 321))
        source += f"\n.skip {more}\njmp l{300 - more}\n.skip 124\nloop last\njrcxz last\njecxz last\nlast: jmp last\njmp l0"
        assert assemble(source).data == gnu(source, 64)[0]


@oracle
@pytest.mark.parametrize("source", [
    "1: dec ecx; jnz 1b; jmp 1f; 2: nop; 1: jmp 2b; jmp 1b\n1: .byte 1b - 2b",
    ".Lloop: jmp .Lloop\n.LC0.part: .quad .LC0.part - .Lloop",
    "nop; nop # one; two\n.ascii \"a;b 1f\"; .byte ';'; .byte 0x1f",
    ".byte -7 / 2, 7 / -2, -7 / -2, -7 % 3, 7 % -3, -7 % -3, 0b1, 0x1b", "10: jmp 10b; jmp 10f; 10: nop",
    "0: jmp 0b; jmp 0f; 0:", "mov al, [rip + 1f]\n1: .byte 1",
])
def test_labels_and_numbers_as_gnu_as_reads_them(source: str) -> None:
    assert assemble(source).data == gnu(source, 64)[0]


@pytest.mark.skipif(not (shutil.which("as") and shutil.which("ld")), reason="needs GNU as and ld")
@pytest.mark.parametrize(("bits", "origin"), [(64, 0x401000), (16, 0x1000)])
def test_labels_have_the_addresses_that_gnu_ld_gives_them(bits: int, origin: int, tmp_path: Path) -> None:
    source = """
    .equ    SIZE, 8
    start:  mov     ebx, offset data + SIZE - 1
            mov     cl, [data]
            add     dword ptr [data + 4], SIZE
            add     dword ptr [data], offset data
            cmp     ecx, offset data - start
            mov     edx, fs:[ebx + data]
            push    offset start
            jmp     start
            call    there + 2
            jmp     [data]
            lea     eax, [eax + ecx*4 + start]
            mov     al, byte ptr SECOND
            .skip   200, 0xcc
    there:  jz      start
            .balign 16, 0xcc
    data:   .byte   1, 2, -1, 'A', ',', '#', '"'    # comment
            .word   0x1234, 5 * 3
            .long   start, data - start, -1
            .int    1 << 4 | 1
            .quad   0x123456789abcdef0, data + 8
            .ascii  "a,b # // \\"c\\""
            .asciz  "d", "e"
            .p2align 3, 0x11
            .zero   3
            .space  2, 0xee
    """
    extra = ["mov rax, [rip + data]", "mov dword ptr [rip + data + 4], 5", "mov rax, offset data", "movabs rax, offset data",
             "lea r8, [rbx + data]", "add byte ptr [rip + start], 1", "jmp qword ptr [rip + data]"]
    more = ["mov ax, [bx + si + data]", "ljmp 0x10:start", "jmp 0:offset there", "mov ax, offset data", "mov ax, [data]"]
    source = source.replace("            mov     al, byte ptr SECOND\n", "\n".join(extra if bits == 64 else more) + "\n")
    (tmp_path / "x.s").write_text(f".intel_syntax noprefix; .code{bits}\n{source}", encoding="ascii")
    subprocess.run(["as", "--64", "-o", "x.o", "x.s"], cwd=tmp_path, check=True)
    subprocess.run(["ld", "-e", "0", f"-Ttext={origin:#x}", "--oformat=binary", "-o", "x", "x.o"], cwd=tmp_path, check=True)
    assert assemble(f".code{bits}\n{source}", origin).data == (tmp_path / "x").read_bytes()


# -- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("source", "message"), [
    ("nop\nfrob rax", "2: frob: no such instruction here"),
    ("mov eax", "1: mov: takes 2 operands, not 1"),
    ("imul", "1: imul: takes 1 or 2 or 3 operands, not 0"),
    ("mov eax, bx", "1: mov: 'bx' has another size than 'eax'"),
    ("mov al, bx", "1: mov: 'bx' has another size than 'al'"),
    ("add dword ptr [rbx], ax", "1: add: 'ax' has another size than 'dword ptr [rbx]'"),
    ("mov [rbx], 5", "1: mov: the size of '[rbx]' is not known; 'byte ptr' or another is missing"),
    ("inc [rbx]", "1: inc: the size of '[rbx]' is not known; 'byte ptr' or another is missing"),
    ("movzx eax, [rbx]", "1: movzx: the size of '[rbx]' is not known; 'byte ptr' or another is missing"),
    ("shl [rbx], cl", "1: shl: the size of '[rbx]' is not known; 'byte ptr' or another is missing"),
    ("mov al, 256", "1: mov: 0x100 does not fit 8 bits"),
    ("add ax, -32769", "1: add: -0x8001 does not fit 16 bits"),
    ("add rax, 0xffffffff", "1: add: 0xffffffff does not fit 32 signed bits"),
    ("push 0x80000000", "1: push: 0x80000000 does not fit 32 signed bits"),
    ("int 256", "1: int: 0x100 does not fit 8 bits"),
    ("mov rax, 1 << 64", "1: mov: 0x10000000000000000 does not fit 64 bits"),
    ("mov r8b, ah", "1: mov: 'ah' cannot stand with an operand that needs a REX prefix"),
    ("mov [r9], bh", "1: mov: 'bh' cannot stand with an operand that needs a REX prefix"),
    ("mov eax, [rbx*3]", "1: mov: 'rbx*3': a scale is 1, 2, 4 or 8"),
    ("mov eax, [rbx+rcx+rdx]", "1: mov: '[rbx+rcx+rdx]' has too many registers"),
    ("mov eax, [rbx+ecx]", "1: mov: '[rbx+ecx]' cannot be an address"),
    ("mov eax, [rsp*2]", "1: mov: '[rsp*2]' cannot be an address"),
    ("mov eax, [rip+rax]", "1: mov: '[rip+rax]' cannot be an address"),
    ("mov eax, [bx]", "1: mov: '[bx]' cannot be an address"),
    ("mov eax, [cs+1]", "1: mov: '[cs+1]' cannot be an address"),
    ("mov eax, []", "1: mov: '[]' is empty"),
    ("mov eax, [rbx", "1: mov: '[rbx' is no address; those are [base + index*scale + displacement]"),
    ("mov eax, [rbx-rax]", "1: mov: no symbol 'rax'"),
    ("mov eax, [rbx+0x80000000]", "1: mov: displacement 0x80000000 does not fit 32 signed bits"),
    ("mov eax, [0xffffffffff+ebx]", "1: mov: 0xffffffffff does not fit 32 bits"),
    (".code16\nmov rax, rbx", "2: mov: 'rax' is no register of 16-bit code"),
    (".code16\nmov r8d, ebx", "2: mov: 'r8d' is no register of 16-bit code"),
    (".code16\nmov sil, 1", "2: mov: 'sil' is no register of 16-bit code"),
    (".code16\nmov ax, [bx+bp]", "2: mov: '[bx+bp]' cannot be an address"),
    (".code16\nmov ax, [si*2]", "2: mov: '[si*2]' cannot be an address"),
    (".code16\nmov ax, [0x10000]", "2: mov: 0x10000 does not fit 16 bits"),
    (".code16\ninc qword ptr [bx]", "2: inc: 'qword ptr [bx]' cannot be of 64 bits here"),
    (".code16\nswapgs", "2: swapgs: not in 16-bit code"),
    ("push eax", "1: push: 'eax' cannot be of 32 bits here"),
    ("push ds", "1: push: takes other operands"),
    ("ljmp 8:1", "1: ljmp: takes other operands"),
    ("jcxz 0", "1: jcxz: not in 64-bit code"),
    ("pop 5", "1: pop: takes other operands"),
    ("mov cs:rax, 5", "1: mov: takes other operands"),
    ("setz eax", "1: setz: 'eax' must be of 8 bits"),
    ("mov eax, later\nlater:",
     "1: mov: 'later' is no constant; a label is written 'offset label', what lies there '[label]'"),
    ("nop\njmp nowhere", "2: jmp: no symbol 'nowhere'"),
    ("call nowhere", "1: call: no symbol 'nowhere'"), ("nop; jmp 1f", "1: jmp: no label 1 in that direction"),
    ("jmp 1b\n1:", "1: jmp: no label 1 in that direction"), (".: nop", "1: :: '.' is no name"),
    ("mov eax, [nowhere]", "1: mov: no symbol 'nowhere'"),
    ("a: .skip 127\nloop a", "2: loop: distance -0x81 does not fit 8 bits"),
    ("lock add eax, 1", "1: lock: only what is in memory can be locked"),
    ("lock mov [rax], eax", "1: lock: mov does not take this prefix"),
    ("rep add [rax], eax", "1: rep: add does not take this prefix"),
    ("lock", "1: lock: no such instruction here"),
    ("rax: nop", "1: :: 'rax' is a register"),
    (".word 65536", "1: .word: 0x10000 does not fit 2 bytes"),
    (".align 0", "1: .align: cannot align to 0"),
    (".p2align 4,,15", "1: .p2align: takes a number, and with what to fill"),
    (".code32", "1: .code32: no such directive here"),
    (".equ A, 1 << 127\n.quad A * A", "2: .quad: 'A * A' takes more than 128 bits"),
    ("mov eax, \"a\"", "1: mov: cannot read '\"a\"' as a number"),
])
def test_mistakes_are_named_with_their_line(source: str, message: str) -> None:
    with pytest.raises(BadInput) as caught:
        assemble(source, name="guest.s")
    assert str(caught.value) == f"guest.s:{message}"


def test_a_loop_as_far_as_it_reaches() -> None:
    assert assemble("a: .skip 126\nloop a").data[-2:] == b"\xe2\x80"
    assert assemble(f"b: .skip {1 << 20}\njmp b").data[-5:] == b"\xe9\xfb\xff\xef\xff"


PIECES = [*REGISTERS, *FORMS, "lock", "rep", "[", "]", "[rbx", "[rip + a]", "[bx+si]", "+", "-", "*", ":", ",", ", ", " ",
          "\t", "\n", "a:", "a", ".", "5", "0x80", "-1", "1 << 63", "dword ptr ", "byte ptr [", "offset a", "es:", "(", ")",
          "'", '"', "#", "//", "/", ".code16\n", ".code64\n", ".align ", ".org ", ".skip ", ".equ a, ", ".ascii ", ".quad "]


@settings(max_examples=500, deadline=None)
@given(some.one_of(some.text(max_size=60), some.lists(some.sampled_from(PIECES), max_size=30).map("".join),
                   some.lists(some.sampled_from(PIECES), max_size=30).map(" ".join)))
def test_any_text_is_assembled_or_refused(source: str) -> None:
    with contextlib.suppress(BadInput):
        assemble(source)


@settings(max_examples=200, deadline=None)
@given(some.data(), some.sampled_from(lines_of(TABLE_64)))
def test_a_damaged_instruction_is_assembled_or_refused(data: some.DataObject, line: str) -> None:
    start, end = sorted(data.draw(some.integers(0, len(line))) for _ in range(2))
    with contextlib.suppress(BadInput):
        assemble(line[:start] + data.draw(some.sampled_from(PIECES)) + line[end:])

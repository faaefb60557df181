"""Assembled x86 programs that run."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from guest_memfd.asm.x86_64.asm import assemble

# -- programs that run -------------------------------------------------------------------------------------------------


CODE = 0x1000


def execute(source: str, **registers: int) -> Callable[[str], int]:
    """Run *source* to its HLT; what it leaves in a register."""
    unicorn = pytest.importorskip("unicorn")
    constants = pytest.importorskip("unicorn.x86_const")
    program = assemble(source, CODE)
    machine = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_16 if program.bits == 16 else unicorn.UC_MODE_64)
    machine.mem_map(0, 0x10000)
    machine.mem_write(CODE, program.data)

    def number(name: str) -> int:
        return int(getattr(constants, f"UC_X86_REG_{name.upper()}"))
    for name, value in {"rsp": 0x8000, **registers}.items():
        machine.reg_write(number(name), value)
    machine.emu_start(CODE, CODE + len(program.data), timeout=300_000_000, count=100_000)
    return lambda name: int(machine.reg_read(number(name)))


@pytest.mark.parametrize("bits", [64, 16])
def test_a_sum_is_added_up_in_a_loop(bits: int) -> None:
    read = execute(f"""
            .code{bits}
            xor     eax, eax
            mov     ecx, 100
    again:  add     eax, ecx
            dec     ecx
            jnz     again
            mov     cx, 10
            movzx   ecx, cx
    more:   inc     eax
            loop    more
            hlt
    """)
    assert (read("eax"), read("ecx")) == (5060, 0)


def test_strings_are_copied_and_compared() -> None:
    read = execute("""
            .intel_syntax noprefix
            lea     rsi, [rip + text]
            mov     rdi, offset room
            mov     ecx, offset end - text
            cld
            rep     movsb
            lea     rsi, [rip + text]
            lea     rdi, [room]
            mov     ecx, offset end - text
            repe    cmpsb
            sete    al
            mov     r8d, dword ptr [rdi - 5]
            mov     rdi, offset room
            mov     al, 0
            mov     rcx, -1
            repne   scasb
            not     rcx
            hlt
    text:   .asciz  "as it is written"
    end:    .balign 16
    room:   .space  end - text
    """)
    assert (read("rcx"), read("r8d")) == (17, int.from_bytes(b"tten", "little"))


def test_calls_return_and_arguments_are_found_on_the_stack() -> None:
    read = execute("""
            push    40
            push    offset later
            call    [rip + pointer]
            add     rsp, 16
            hlt
    double: push    rbp
            mov     rbp, rsp
            mov     rax, [rbp + 24]
            lea     rax, [rax + rax*2 + 1]
            mov     rcx, [rbp + 16]
            call    rcx
            pop     rbp
            ret
    later:  bswap   eax
            xchg    r9, rax
            ret
    pointer: .quad  double
    """)
    assert (read("r9"), read("rsp")) == (121 << 24, 0x8000)


def test_numbers_are_divided_with_and_without_sign() -> None:
    read = execute("""
            mov     rax, -1000
            cqo
            mov     ebx, 7
            idiv    rbx
            mov     r8, rax
            mov     r9, rdx
            mov     eax, 1000
            xor     edx, edx
            div     ebx
            mov     r10d, eax
            imul    r11, r10, -5
            movsx   r12, r11w
            sar     r12, 2
            hlt
    """)
    assert [read(f"r{n}") for n in range(8, 13)] == [each & (1 << 64) - 1 for each in (-142, -6, 142, -710, -178)]


def test_real_mode_runs_with_its_own_addresses() -> None:
    read = execute("""
            .code16
            mov     ax, 0x100
            mov     es, ax
            mov     di, offset room - 0x1000
            mov     si, offset text
            mov     cx, offset end - text
            rep     movsb
            mov     bx, 2
            mov     si, 1
            mov     dl, [bx + si + room]
            mov     dh, es:[di - 1]
            call    square
            ljmp    0:onward
            hlt
    onward: mov     ebp, eax
            hlt
    square: movzx   eax, dl
            imul    eax, eax
            ret
    text:   .ascii  "16 bits"
    end:    .align  8
    room:   .skip   8
    """, rsp=0x8000)
    assert (read("dl"), read("dh"), read("ebp")) == (ord("b"), ord("s"), ord("b") ** 2)


def test_bits_are_those_of_the_first_instruction() -> None:
    sources = ["nop", ".code16\nnop\n.code64\nnop", ".code16", "", ".byte 1\n.code16\nnop", "nop\n.code16\nnop"]
    assert [assemble(source).bits for source in sources] == [64, 16, 16, 64, 16, 64]


def test_origin_listing_and_symbols() -> None:
    program = assemble("start: nop # back\n.org 0x1008\nstop: jmp start // there\n.align 4\n.equ N, 3\nmov eax, N", 0x1000)
    assert program.data == bytes.fromhex("90 00000000000000 ebf6 9090 b803000000")
    assert (program.symbols, program.origin) == ({"start": 0x1000, "stop": 0x1008, "N": 3}, 0x1000)
    assert program.listing.splitlines()[1] == "0x0000001000  90                    start: nop # back"

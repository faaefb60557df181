"""Guests of one's own on the real KVM: assembly, flat binaries, ELF, C; and files that are none."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import threading
from collections.abc import Iterator
from errno import EINVAL
from pathlib import Path

import pytest
from guests_on_kvm import PAGE_OF_DOCS, ROOT, on_kvm, run, shell
from linux_driver import nothing_stays_open

from guest_memfd.guests.loader import load
from guest_memfd.guests.target import REAL_MODE, X86_64


@pytest.fixture(autouse=True)
def nothing_leaks() -> Iterator[None]:
    with nothing_stays_open():
        yield


@on_kvm
@pytest.mark.parametrize(("source", "code", "words"), [
    ("_start: call enter\n lea rdi, [rip + text]\n call print\n jmp power_off\ntext: .asciz \"no end\"\n", 0, "no end\n"),
    (".code16\n_start: mov si, offset text\n call print\n hlt\ntext: .asciz \"16\"\n", 0, "16\n"),
    ("_start: mov rdi, 0x80000001\n call give_page\n mov rdi, rax\n call print_hex\n jmp power_off\n", 0,
     f"{EINVAL:016x}"),
    ("_start: mov edi, 0x80000\n call give_page\n mov rdi, rax\n call print_hex\n jmp power_off\n", 0, f"{EINVAL:016x}"),
    (".code16\n_start: mov dx, 0x1234\n in al, dx\n cmp al, 0xff\n jne other\n out dx, al\n mov al, 0x21\n out 0xe9, al\n"
     "other: hlt\n", 0, "!"),
    (".code16\n_start: mov si, offset text\n mov cx, 3\n mov dx, 0xe9\n rep outsb\n hlt\ntext: .ascii \"rep\"\n", 0, "rep"),
    (".code16\n_start: xor ax, ax\n mov es, ax\n mov cx, 3\n mov dx, 0x60\n mov di, 0x500\n rep insb\n"
     " cmp dword ptr [0x500], 0xffffff\n jne other\n mov al, 0x21\n out 0xe9, al\nother: hlt\n", 0, "!"),
    ("_start: mov edx, CONSOLE\n mov dword ptr [rdx], 0x64636261\n mov qword ptr [rdx], 0x44434241\n jmp power_off\n", 0,
     "aA\n"),
    ("_start: mov edx, CONSOLE\n mov byte ptr [rdx], 0xc3\n mov byte ptr [rdx], 0xbc\n mov byte ptr [rdx], 0xff\n"
     " mov byte ptr [rdx], 0x21\n mov byte ptr [rdx], 0xc3\n jmp power_off\n", 0, "ü\\xff!\\xc3\n"),
    ("_start: mov edx, CONTROL\n mov rax, [rdx]\n lea rdi, [rip + text]\n call print\n jmp power_off\n"
     "text: .asciz \"still on\"\n", 0, "still on\n"),
    ("_start: mov rax, 0x7fffffffffff\n mov [rax], rax\n", 2, "triple fault"),
    ("_start: hlt\n", 2, "triple fault"),
    ("_start: cli\n", 2, "triple fault"),
])
def test_assembly(tmp_path: Path, source: str, code: int, words: str) -> None:
    (tmp_path / "own.s").write_text(source)
    got, said = run(str(tmp_path / "own.s"), "--timeout", "300")
    assert (got, words in said) == (code, True), said


@on_kvm
def test_flat_binaries(tmp_path: Path) -> None:
    path = tmp_path / "own"
    path.write_bytes(load("hello", X86_64).segments[0][1])
    assert run(str(path))[1].startswith("hello from a guest\n")
    path.write_bytes(load("boot-sector", REAL_MODE).segments[0][1])
    assert run(str(path), "--real-mode")[1].startswith("hello from real mode\n")


def elf(machine: int, bits: int = 2) -> bytes:
    code = load("hello", X86_64).segments[0][1]
    header = struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF" + bytes((bits, 1, 1)) + bytes(9), 2, machine, 1, 0x8000_0000, 64, 0,
                         0, 64, 56, 1, 0, 0, 0)
    segment = struct.pack("<IIQQQQQQ", 1, 7, 4096, 0x8000_0000, 0x8000_0000, len(code), len(code), 4096)
    return (header + segment).ljust(4096, b"\0") + code


@on_kvm
def test_a_static_elf(tmp_path: Path) -> None:
    pytest.importorskip("elftools")
    path = tmp_path / "guest.elf"
    path.write_bytes(elf(62))
    assert run(str(path))[1].startswith("hello from a guest\n")


@pytest.mark.parametrize(("raw", "options", "words"), [
    (elf(183), (), "an ELF for EM_AARCH64; guests are EM_X86_64"), (elf(3, 1), (), "a 32-bit"),
    (elf(62), ("--real-mode",), "real-mode x86 guests are flat binaries or assembly"),
    (b"\xf4" * 0x8000, ("--real-mode", "--memory", "32K"), "does not fit"),
    (b"_start: hlt\n", (), "is text; assembly ends in .s"),
    (b"\xf4" * 0x100000, ("--real-mode", "--memory", "4M", "--shared", "0"), "beyond what real mode reaches"),
])
@on_kvm
def test_images_that_are_refused(tmp_path: Path, raw: bytes, options: tuple[str, ...], words: str) -> None:
    pytest.importorskip("elftools")
    (tmp_path / "guest").write_bytes(raw)
    code, said = run(str(tmp_path / "guest"), *options)
    assert code == 4
    assert words in said
    assert said.count("\n") == 1, said


@on_kvm
def test_the_example_in_c(tmp_path: Path) -> None:
    if shutil.which("gcc") is None:
        pytest.skip("there is no gcc")
    pytest.importorskip("elftools")
    (command,) = re.findall(r"^gcc .*$", PAGE_OF_DOCS, re.M)
    subprocess.run(command.replace("/tmp/greeter", f"{tmp_path}/greeter").split(), cwd=ROOT, check=True, timeout=600)
    for memory, size in (("32M", "32 MiB or more"), ("16M", "less than 32 MiB")):
        code, said = run(str(tmp_path / "greeter"), "--memory", memory)
        assert (code, said.splitlines()[0]) == (0, f"greetings from C: {size}")
    assert f"```c\n{(ROOT / 'docs' / 'examples' / 'greeter.c').read_text()}```" in PAGE_OF_DOCS


@on_kvm
def test_assembly_for_another_machine_is_recognised(tmp_path: Path) -> None:
    (tmp_path / "arm.s").write_text("_start:\n    mov x0, #1\n    b _start\n")
    code, said = run(str(tmp_path / "arm.s"))
    assert code == 4
    assert "(this looks like assembly for AArch64, and guests here are x86-64; see --on)" in said
    code, said = shell("run", str(ROOT / "docs/examples/greeter-x86.s"), "--on", "emulated:arm64/kvm")
    assert code == 4
    assert "(this looks like assembly for x86-64, and guests here are AArch64; see --on)" in said


@on_kvm
def test_the_pc_is_an_address_and_no_offset(tmp_path: Path) -> None:
    (tmp_path / "own.s").write_text(".code16\n_start: jmp 0x7c0:here - 0x7c00\nhere: jmp here\n")
    assert "the guest is at PC 0x7c05\n" in run(str(tmp_path / "own.s"), "--timeout", "0.2")[1]


@on_kvm
def test_all_of_a_line_in_the_window_is_shown(tmp_path: Path) -> None:
    line = "bytes up to sixty-four are shown, \\351 is a byte: " + "x" * 40
    (tmp_path / "own.s").write_text("_start: call enter\n mov rdi, r14\n lea rsi, [rip + text]\n call copy\n jmp power_off\n"
                                    f"text: .ascii \"{line.partition(chr(92))[0]}\"\n .byte 0xe9\n"
                                    f" .asciz \"{line.partition('351')[2]}\"\n")
    _, said = run(str(tmp_path / "own.s"), "--json")
    found = json.loads(said[:said.rindex("}\n") + 1])
    assert found["shared_window"] == line.replace("\\351", "\xe9")[:64]


@on_kvm
def test_mistakes_are_placed_where_they_are(tmp_path: Path) -> None:
    for source, words in (("_start: hlt\nprint: hlt\n", "'print' is defined twice, in line 25 of common.s, which"),
                          ("_start: hlt\nhlt hlt\n", "own.s:2: hlt: "), (".equ _start, 5\n nop\n", "_start is 0x5, and the"),
                          (".equ _start, -5\n nop\n", "_start is -0x5, and"), ("nop\n", "there is no label _start")):
        (tmp_path / "own.s").write_text(source)
        code, said = run(str(tmp_path / "own.s"))
        assert (code, words in said, said.count("\n")) == (4, True, 1), said


@on_kvm
def test_files_that_are_no_plain_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.s")
    writer = threading.Thread(target=lambda: (tmp_path / "pipe.s").write_text("_start: jmp power_off\n"))
    writer.start()
    assert run(str(tmp_path / "pipe.s"))[0] == 0
    writer.join()
    for given, words in (("/dev/zero", "/dev/zero is a device"), ("/tmp", "/tmp is a directory"),
                         ("a" * 5000, "unknown guest"), ("/" + "a" * 5000, "File name too long")):
        code, said = run(given)
        assert (code, words in said) == (4, True), said

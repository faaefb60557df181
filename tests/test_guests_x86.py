"""The x86 guests that come with the package: what GNU as makes of them, and what they do on a machine of Unicorn's."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from guest_memfd.errors import BadInput
from guest_memfd.guests import CONSOLE, CONSOLE_PORT, CONTROL, CONTROL_PORT, GUESTS, SECRET, SHARED_BASE, SHARED_LINE, source
from guest_memfd.guests.bootinfo import BootHypervisor, BootInfo
from guest_memfd.guests.loader import load, read, x86_target
from guest_memfd.guests.target import REAL_MODE, X86_64, Target

unicorn = pytest.importorskip("unicorn")
x86 = pytest.importorskip("unicorn.x86_const")

PAGE, SIZE, SHARED = 4096, 128 << 10, 2 * 4096
NAMES = [name for name, guest in GUESTS.items() if "x86_64" in guest.architectures]
LONG = [name for name in NAMES if not GUESTS[name].real_mode]


class Machine:
    """A guest and its VMM: RAM, the shared window, a console, and a balloon that replaces the page (or refuses)."""

    def __init__(self, name: str, takes: bool = True, told: bool = True) -> None:
        target = x86_target(read(name, "x86_64"), False)
        self.real_mode = target is REAL_MODE
        self.base, self.takes = 0 if self.real_mode else target.base, takes
        self.console, self.gone, self.ended = "", [], ""
        image = load(name, target)
        self.uc = uc = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_16 if self.real_mode else unicorn.UC_MODE_64)
        uc.mem_map(self.base, SIZE)
        uc.mem_map(SHARED_BASE, SHARED)
        for gpa, data in image.segments:
            uc.mem_write(gpa, data)
        info = -(-image.end // PAGE) * PAGE
        if told:
            uc.mem_write(info, BootInfo(BootHypervisor.KVM, self.base, SIZE, SHARED_BASE, SHARED).pack())
        if self.real_mode:
            uc.reg_write(x86.UC_X86_REG_ES, info >> 4)
            uc.reg_write(x86.UC_X86_REG_SS, info >> 4)
            uc.reg_write(x86.UC_X86_REG_SP, PAGE)
            uc.hook_add(unicorn.UC_HOOK_INSN, self._out, None, 1, 0, x86.UC_X86_INS_OUT)
            uc.hook_add(unicorn.UC_HOOK_INSN, self._in, None, 1, 0, x86.UC_X86_INS_IN)
        else:
            uc.reg_write(x86.UC_X86_REG_RDI, info)
            uc.reg_write(x86.UC_X86_REG_RSP, info + PAGE)
            uc.mmio_map(CONSOLE, PAGE, None, None, lambda _uc, at, _size, value, _data: self._say(at, value), None)
            uc.mmio_map(CONTROL, PAGE, lambda _uc, at, _size, _data: self._errno if at == 8 else 0, None,
                        lambda _uc, at, _size, value, _data: self._control(at, value), None)
        self.entry, self._errno = image.entry, 0

    def run(self, instructions: int = 200_000) -> str:
        try:
            self.uc.emu_start(self.entry, 0xFFFF_FFFF_FFFF, count=instructions)
        except unicorn.UcError as error:
            self.ended = self.ended or str(error)
        return self.console

    def _say(self, at: int, value: int) -> None:
        assert at == 0
        self.console += chr(value & 0xFF)

    def _control(self, at: int, value: int) -> None:
        if at == 8:
            self._balloon(value)
        elif at == 0:
            self.ended = "off"
            self.uc.emu_stop()
        else:
            assert (at % 8, value) == (4, 0) or self.ended          # Unicorn halves a store of eight bytes

    def _balloon(self, gpa: int) -> None:
        self._errno = 0 if self.takes else 22
        if self.takes:
            self.gone.append(gpa)
            self.uc.mem_write(gpa, bytes(PAGE))

    def _out(self, _uc: Any, port: int, _size: int, value: int, _data: Any) -> None:
        if port == CONSOLE_PORT:
            self._say(0, value)
        elif port == CONTROL_PORT:
            self._balloon(value)

    def _in(self, _uc: Any, _port: int, _size: int, _data: Any) -> int:
        return self._errno


def test_there_is_a_file_for_every_guest() -> None:
    for name, guest in GUESTS.items():
        for architecture in guest.architectures:
            assert source(architecture, name).is_file()
    files = {path.name for path in (Path(__file__).parent.parent / "src/guest_memfd/guests/x86_64").iterdir()}
    assert files == {f"{name}.s" for name in (*NAMES, "common", "common16")}


@pytest.mark.parametrize("name", NAMES)
def test_gnu_as_makes_the_same_of_it(name: str, tmp_path: Path) -> None:
    if not all(map(shutil.which, ("as", "ld", "objcopy"))):
        pytest.skip("there is no GNU as")
    target = x86_target(read(name, "x86_64"), False)
    common = source("x86_64", "common16" if target is REAL_MODE else "common")
    lines = f"{source('x86_64', name).read_text()}\n{common.read_text()}".splitlines()
    # GNU as takes a name that is not defined yet for an address.
    lines.sort(key=lambda line: not line.startswith(".equ"))
    (tmp_path / "g.s").write_text(".intel_syntax noprefix\n.globl _start\n" + "\n".join(lines) + "\n")
    for command in ("as -o g.o g.s", f"ld -Ttext={target.base:#x} -o g.elf g.o", "objcopy -O binary -j .text g.elf g.bin"):
        subprocess.run(command.split(), cwd=tmp_path, check=True, timeout=600)
    assert load(name, target).segments == [(target.base, (tmp_path / "g.bin").read_bytes())]


@pytest.mark.parametrize(("name", "said"), [
    ("hello", "hello from a guest\nsecret written\n"), ("memory", "30 pages hold what was written\n"),
    ("shared", "line left in the shared window\n"),
    ("relinquish", "page given up\npage reads zeros\npage in use again\n"),
    ("boot-sector", "hello from real mode\npage given up\npage reads zeros\npage in use again\n"),
])
def test_what_they_say(name: str, said: str) -> None:
    machine = Machine(name)
    assert machine.run() == said
    assert machine.real_mode or machine.ended == "off"
    if name == "hello":
        assert machine.uc.mem_read(machine.base + SIZE - PAGE, len(SECRET)) == SECRET
    if name == "shared":
        assert machine.uc.mem_read(SHARED_BASE, len(SHARED_LINE) + 1) == SHARED_LINE + b"\0"
    if name in ("relinquish", "boot-sector"):
        assert machine.gone == [machine.base + SIZE // 2]
        assert machine.uc.mem_read(machine.gone[0], 8) == (1).to_bytes(8, "little")


def test_a_lost_page_is_noticed() -> None:
    machine = Machine("memory")
    lost = machine.base + 9 * PAGE

    def lose(uc: Any, _access: int, address: int, _size: int, _value: int, _data: Any) -> None:
        if address == lost:
            uc.mem_write(lost, bytes(8))

    machine.uc.hook_add(unicorn.UC_HOOK_MEM_READ, lose)
    assert machine.run() == f"lost page {lost:016x}\n"


@pytest.mark.parametrize("name", ["relinquish", "boot-sector"])
def test_a_host_that_refuses_the_page(name: str) -> None:
    assert Machine(name, takes=False).run().endswith("the host refused to take the page\n")


@pytest.mark.parametrize("name", [name for name in NAMES if not name.endswith("loop")])
def test_without_boot_info_a_guest_only_powers_off(name: str) -> None:
    machine = Machine(name, told=False)
    assert machine.run() == ""
    assert machine.gone == []
    assert machine.real_mode or machine.ended == "off"


@pytest.mark.parametrize("name", ["loop", "real-loop"])
def test_a_loop_loops(name: str) -> None:
    machine = Machine(name)
    assert (machine.run(), machine.ended) == ("", "")


@pytest.mark.parametrize(("name", "why"), [("jump-nowhere", "fetch"), ("outside", "read"), ("fault-forever", "")])
def test_misbehaviour(name: str, why: str) -> None:
    machine = Machine(name)
    machine.run()
    assert machine.ended != "off"
    assert why in machine.ended.lower()


def test_targets_are_told_apart(tmp_path: Path) -> None:
    def target(given: str, real_mode: bool = False) -> Target:
        return x86_target(read(given, "x86_64"), real_mode)

    for name, text in (("a.s", "_start: hlt\n# .code16\n"), ("b.s", "  .code16\n_start: hlt\n"), ("c.s", "x: .code16\n"),
                       ("d", "\xf4")):
        (tmp_path / name).write_text(text, encoding="latin-1")
    assert target(str(tmp_path / "a.s")) is X86_64
    assert target(str(tmp_path / "a.s"), True) is REAL_MODE
    assert target(str(tmp_path / "b.s")) is target(str(tmp_path / "c.s")) is REAL_MODE
    assert [target(str(tmp_path / "d"), real_mode) for real_mode in (False, True)] == [X86_64, REAL_MODE]
    assert target("hello") is X86_64
    assert target("boot-sector") is target("boot-sector", True) is REAL_MODE
    with pytest.raises(BadInput, match="'hello' is made for 64-bit mode"):
        target("hello", True)
    with pytest.raises(BadInput, match="is there for arm64 only"):
        target("mmu")
    assert len(LONG) >= 8

"""`gmem run --on kvm`: real guests on the /dev/kvm of this machine, in memory from its guest_memfd; and without one.

What is shown of the real kernel is skipped, with the reason, where that is not there.
"""

from __future__ import annotations

import io
import json
import platform
import re
import resource
import shutil
import signal
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from errno import EINVAL, EPERM
from pathlib import Path

import pytest
from linux_driver import limit, lowest_free, no_guests, nothing_stays_open
from pages import agrees, commands

from guest_memfd.cli.main import main
from guest_memfd.errors import BadInput, GuestMemfdError, SyscallFailed
from guest_memfd.guests import GUESTS, SHARED_LINE
from guest_memfd.guests.loader import Image, load, x86_target
from guest_memfd.guests.target import REAL_MODE, X86_64
from guest_memfd.hosts.linux import fault_path, syscall
from guest_memfd.hosts.linux.anonymous import Anonymous
from guest_memfd.hosts.linux.system import System
from guest_memfd.hosts.uapi.kvm import Cap
from guest_memfd.vmm.devices import Console
from guest_memfd.vmm.kvm_x86 import X86Guest
from guest_memfd.vmm.layout import PAGE, Layout
from guest_memfd.vmm.loop import drive

ROOT = Path(__file__).parent.parent
X86 = {name: guest for name, guest in GUESTS.items() if "x86_64" in guest.architectures}


REASON = no_guests()
on_kvm = pytest.mark.skipif(bool(REASON), reason=REASON)


def shell(*argv: str) -> tuple[int, str]:
    """The exit code of gmem, and what a terminal would show."""
    terminal = io.StringIO()
    with redirect_stdout(terminal), redirect_stderr(terminal):
        code = main(list(argv))
    return code, terminal.getvalue()


def run(guest: str, *options: str) -> tuple[int, str]:
    return shell("run", guest, "--on", "kvm", *options)


@pytest.fixture(autouse=True)
def nothing_leaks() -> Iterator[None]:
    with nothing_stays_open():
        yield


# -- the page ------------------------------------------------------------------------------------------------------------

PAGE_OF_DOCS = (ROOT / "docs" / "run-kvm.md").read_text(encoding="utf-8")
SHOWN = commands(PAGE_OF_DOCS)


# Times, and counters that differ from run to run.
def masked(line: str) -> str:
    line = re.sub(r"^KVM counts: .*", "KVM counts", line)
    return re.sub(r"\d+\.\d+ s$", "T s", line)


@on_kvm
@pytest.mark.skipif(not Path("/sys/module/kvm_pvm").exists(), reason="the page shows what kvm_pvm does")
@pytest.mark.parametrize(("command", "output"), SHOWN, ids=[command for command, _ in SHOWN])
def test_the_page_shows_what_is_printed(command: str, output: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    agrees(output, shell(*command.split())[1], masked)


def test_the_example_is_shown_as_it_is() -> None:
    (shown,) = re.findall(r"^```asm\n(.*?)^```$", PAGE_OF_DOCS, re.M | re.S)
    assert shown == (ROOT / "docs" / "examples" / "greeter-x86.s").read_text(encoding="utf-8")
    assert len(SHOWN) > 5


# -- guests --------------------------------------------------------------------------------------------------------------


@on_kvm
@pytest.mark.parametrize(("guest", "code", "words"), [
    ("hello", 0, "hello from a guest\nsecret written\n"), ("memory", 0, "4094 pages hold what was written\n"),
    ("shared", 0, "line left in the shared window\n"),
    ("relinquish", 0, "page given up\npage reads zeros\npage in use again\n"),
    ("outside", 0, "ffffffffffffffff read behind private memory\nwrote behind private memory\n"),
    ("boot-sector", 0, "hello from real mode\npage given up\npage reads zeros\npage in use again\n"),
    ("jump-nowhere", 2, "KVM cannot go on with an instruction"), ("fault-forever", 2, "triple fault"),
    ("loop", 3, "0.3 s are over, and the guest is at PC 0x80000000"),
    ("real-loop", 3, "0.3 s are over, and the guest is at PC 0x7c00"),
])
def test_every_guest(guest: str, code: int, words: str) -> None:
    began = time.monotonic()
    got, said = run(guest, "--timeout", "0.3" if code == 3 else "5")
    assert (got, words in said) == (code, True), said
    assert time.monotonic() - began < 20
    assert re.search(r"^vCPU in (64-bit mode at CPL 3|real mode): ", said, re.M)


def test_the_list_above_is_complete() -> None:
    cases = {case[0] for mark in test_every_guest.pytestmark if mark.name == "parametrize" for case in mark.args[1]}
    assert cases == set(X86)


@on_kvm
def test_what_the_guest_writes_is_seen_and_a_hole_reads_zero_on_both_sides() -> None:
    code, said = run("relinquish", "-v")
    assert code == 0
    assert "the guest gives up 0x80800000: punched; the host's mapping reads zeros" in said
    assert "page reads zeros" in said
    code, said = run("shared", "-v")
    assert f"shared window: {SHARED_LINE!r}" in said


@on_kvm
@pytest.mark.parametrize("name", ["hello", "boot-sector"])
def test_the_memory_is_the_guest_memfd(name: str) -> None:
    real_mode = name == "boot-sector"
    layout = Layout(1 << 19, 0, base=0) if real_mode else Layout(1 << 20, 0)
    with System() as system, ExitStack() as stack:
        image = load(name, x86_target(name, False))
        console = Console(lambda text: None)
        guest = X86Guest(system, layout, image, real_mode, console, stack, lambda text: None)
        before = guest.memory.resident()
        assert drive(guest, 5).how == "off"
        assert guest.memory.resident() == before + 1            # the page that it touches, and nothing else
        if real_mode:
            assert guest.mapping.read(1 << 18, 4) == struct.pack("<I", 1)
        else:
            assert guest.mapping.read(layout.private - PAGE, 12) == b"guest secret"
        with guest.memory.mmap() as again:                      # by the file, not by the slot's address
            at = (1 << 18) if real_mode else layout.private - PAGE
            assert again.read(at, 8) == guest.mapping.read(at, 8)
            again.write(0, b"\xaa" * 8)
            assert guest.mapping.read(0, 8) == b"\xaa" * 8


@on_kvm
def test_the_last_descriptor_gone_is_a_memory_fault_that_is_named() -> None:
    with System() as system, ExitStack() as stack:
        said = []
        image = load("loop", X86_64)
        guest = X86Guest(system, Layout(1 << 20, 0), image, False, Console(said.append), stack, said.append)
        guest.mapping.close()
        guest.memory.close()
        ended = drive(guest, 5)
        assert (ended.how, "KVM_RUN" in ended.why) == ("crash", True)
        assert re.search("the guest's page at 0x80000000 is gone|KVM_RUN ends with reason", ended.why)
        assert ended.registers["rip"] == 0x8000_0000


@on_kvm
def test_which_path_a_guest_s_touch_takes_is_found_out_by_asking() -> None:
    with System() as system:
        assert fault_path.native(system, real_mode=False) is True      # at CPL 3 every KVM runs the guest itself
        real = fault_path.native(system, real_mode=True)
    if Path("/sys/module/kvm_pvm").exists():
        assert real is False
    _, said = run("boot-sector")
    assert ("emulated: KVM executes" in said) == (real is False)
    assert ("native: what the guest" in said) == (real is True)


@on_kvm
def test_counters_agree_with_the_path() -> None:
    for name in ("hello", "boot-sector"):
        _, said = run(name, "--json")
        found = json.loads(said[:said.rindex("}") + 1])
        if found["vcpu"]["native"]:
            assert found["kvm_statistics"]["pf_fixed"] >= 2
        else:
            assert found["kvm_statistics"]["insn_emulation"] > found["exits"]


# -- guests of one's own -------------------------------------------------------------------------------------------------


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
    ("_start: mov rax, 0x7fffffffffff\n mov [rax], rax\n", 2, "triple fault"),
    ("_start: hlt\n", 2, "triple fault"),
    ("_start: cli\n", 2, "triple fault"),
])
def test_assembly(tmp_path: Path, source: str, code: int, words: str) -> None:
    (tmp_path / "own.s").write_text(source)
    got, said = run(str(tmp_path / "own.s"), "--timeout", "5")
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
    subprocess.run(command.replace("-o greeter", f"-o {tmp_path}/greeter").split(), cwd=ROOT, check=True, timeout=60)
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


# -- the clock -----------------------------------------------------------------------------------------------------------


@on_kvm
@pytest.mark.parametrize("source", [
    "_start: jmp _start\n", ".code16\n_start: jmp _start\n",
    "_start: mov edi, 0x9000000\nagain: mov al, [rdi]\n jmp again\n",
    ".code16\n_start: in al, 0x60\n jmp _start\n", "_start: pause\n jmp _start\n", ".code16\n_start: cli\n jmp _start\n",
])
def test_the_clock_always_works(tmp_path: Path, source: str) -> None:
    (tmp_path / "own.s").write_text(source)
    began = time.monotonic()
    code, said = run(str(tmp_path / "own.s"), "--timeout", "0.4")
    assert code == 3, said
    assert "0.4 s are over" in said
    assert time.monotonic() - began < 20


@on_kvm
def test_ctrl_c_ends_it() -> None:
    main_thread = threading.get_ident()
    timer = threading.Timer(0.3, lambda: signal.pthread_kill(main_thread, signal.SIGINT))
    timer.start()
    began = time.monotonic()
    assert run("loop", "--timeout", "30")[0] == 130
    timer.join()
    assert time.monotonic() - began < 20


# -- what is asked for ---------------------------------------------------------------------------------------------------


@on_kvm
@pytest.mark.parametrize(("options", "words"), [
    (("--design", "none"), "--design is for emulated machines"), (("--ram", "1G"), "--ram is for emulated machines"),
    (("--zeropad",), "--zeropad is for emulated machines"), (("--fail", "kernel:1"), "--fail is for emulated machines"),
    (("--folio", "2M"), "--folio is for emulated machines"), (("--memory", "4097"), "no multiple of a page"),
    (("--memory", "0"), "at least a page"), (("--memory", "4K"), "no page is left behind the image"),
    (("--memory", "600G"), "beyond the 64 GiB that this vCPU can address; 62G is the most"),
    (("--shared", "200M"), "would reach the console"),
    (("--timeout", "0"), "above 0"), (("--real-mode", "--memory", "1M"), "would reach the window at 0x80000"),
    (("--real-mode", "--memory", "200M", "--shared", "0"), "would reach the console"), (("--memory", ""), "is no size"),
])
def test_mistakes_are_one_line(options: tuple[str, ...], words: str) -> None:
    code, said = run("hello", *options)
    assert code == 4
    assert words in said
    assert said.startswith("gmem: ")
    assert said.count("\n") == 1


@on_kvm
def test_a_guest_of_another_architecture() -> None:
    code, said = run("mmu")
    assert code == 4
    assert "guest 'mmu' is there for arm64 only; for x86_64 there are hello, memory" in said
    code, said = shell("run", "boot-sector", "--on", "emulated:arm64/kvm")
    assert code == 4
    assert "is there for x86_64 only" in said
    code, said = shell("run", "hello", "--on", "emulated:arm64/kvm", "--real-mode")
    assert code == 4
    assert run("helo")[0] == 4


@on_kvm
def test_much_memory_costs_nothing() -> None:
    code, said = run("hello", "--memory", "60G")
    assert code == 0, said
    assert "3 pages of guest_memfd" in said


@on_kvm
def test_json_is_all_of_it() -> None:
    code, said = run("fault-forever", "--json")
    found = json.loads(said[:said.rindex("}\n") + 1])
    assert (found["schema"], found["on"], found["exit_code"], found["ended"]) == ("guest-memfd-run/1", "kvm", code, "crash")
    assert found["vcpu"]["mode"] == "64-bit mode at CPL 3"
    assert found["registers"]["rip"] != "0x0"


# -- what is missing -----------------------------------------------------------------------------------------------------


@on_kvm
def test_too_few_descriptors_is_an_error_and_nothing_stays() -> None:
    image = load("hello", X86_64)
    said = [_life(image, lowest_free() + more) for more in range(12)]
    enough = said.index("")
    assert enough > 3
    assert all(re.search("EMFILE|Too many open files", words) for words in said[:enough]), said
    assert not any(said[enough:])


# What goes wrong with so many descriptors, in words.
def _life(image: Image, descriptors: int) -> str:
    try:
        with limit(resource.RLIMIT_NOFILE, descriptors), System() as system, ExitStack() as stack:
            guest = X86Guest(system, Layout(1 << 20), image, False, Console(lambda text: None), stack, lambda text: None)
            return "" if drive(guest, 5).how == "off" else "it does not end"
    except GuestMemfdError as error:
        return str(error)


@on_kvm
def test_no_address_space_for_the_memory_is_an_error_and_nothing_stays() -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * PAGE
    with limit(resource.RLIMIT_AS, used + (1 << 30)):
        code, said = run("hello", "--memory", "8G")
    assert code == 4
    assert said.endswith("gmem: mmap: ENOMEM (Cannot allocate memory): 0x200000000 bytes at 0x0\n")
    assert run("hello", "--memory", "8G")[0] == 0


@on_kvm
def test_a_guest_runs_where_a_container_refuses_to_count_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise SyscallFailed(EPERM, "cachestat")

    monkeypatch.setattr(syscall, "cachestat", refused)
    code, said = run("hello", "-v")
    assert code == 0
    assert "not counted: cachestat: EPERM (Operation not permitted)\n" in said
    assert re.search(r"^35 exits, \d", said, re.M)


def test_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("guest_memfd.hosts.linux.system.System.__init__.__defaults__", ("/nowhere/kvm",))
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    code, said = run("hello")
    assert (code, said) == (5, "gmem: /nowhere/kvm: No such file or directory; load kvm_intel, kvm_amd or kvm_pvm, or start "
                               "this machine with nested virtualisation\n")


def test_another_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    code, said = run("hello")
    assert code == 5
    assert "are x86-64 programs, and this machine is aarch64" in said


@on_kvm
@pytest.mark.parametrize(("flags", "words"), [(0, "Linux 6.18 and later"), (1, "KVM_CAP_GUEST_MEMFD_FLAGS is 0x1")])
def test_an_old_kernel(monkeypatch: pytest.MonkeyPatch, flags: int, words: str) -> None:
    real = System.check_extension
    monkeypatch.setattr(System, "check_extension",
                        lambda self, cap: flags if cap == Cap.GUEST_MEMFD_FLAGS else real(self, cap))
    code, said = run("hello")
    assert code == 5
    assert words in said


def test_memory_of_ones_own_has_an_end() -> None:
    with Anonymous(PAGE) as memory, pytest.raises(BadInput, match="bytes at 0x0 of memory"):
        memory.put(0, bytes(PAGE + 1))

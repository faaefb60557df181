"""`gmem run --on kvm`: real guests on the /dev/kvm of this machine, in memory from its guest_memfd; and without one.

What is shown of the real kernel is skipped, with the reason, where that is not there.
"""

from __future__ import annotations

import json
import platform
import re
import resource
import signal
import struct
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from errno import EINVAL, ENOMEM, EPERM
from pathlib import Path

import pytest
from guests_on_kvm import PAGE_OF_DOCS, ROOT, on_kvm, run, shell
from linux_driver import limit, lowest_free, nothing_stays_open
from pages import agrees, commands

from guest_memfd.errors import BadInput, GuestMemfdError, HostUnavailable, SyscallFailed
from guest_memfd.guests import CONSOLE, CONTROL, GUESTS, SHARED_BASE, SHARED_LINE
from guest_memfd.guests.loader import GuestImage, load, read
from guest_memfd.guests.target import ARM64, REAL_MODE, X86_64
from guest_memfd.linux import fault_path, syscall
from guest_memfd.linux.abi import kvm_x86
from guest_memfd.linux.anonymous import Anonymous
from guest_memfd.linux.guest_x86 import SmallGuest
from guest_memfd.linux.system import System
from guest_memfd.linux.vcpu_x86 import X86Vcpu
from guest_memfd.uapi import kvm_arm64
from guest_memfd.uapi.kvm import Cap
from guest_memfd.uapi.kvm_run import (
    Exit,
    FailEntry,
    Intr,
    Io,
    KvmInternalError,
    MemoryFault,
    Mmio,
    Shutdown,
    SystemEvent,
    Unknown,
)
from guest_memfd.vmm.devices import Console
from guest_memfd.vmm.kvm import KvmGuest
from guest_memfd.vmm.kvm_x86 import X86Guest, fit
from guest_memfd.vmm.layout import Layout
from guest_memfd.vmm.loop import LoopEnded, drive
from guest_memfd.words.units import PAGE

X86 = {name: guest for name, guest in GUESTS.items() if "x86_64" in guest.architectures}


@pytest.fixture(autouse=True)
def nothing_leaks() -> Iterator[None]:
    with nothing_stays_open():
        yield


# -- the page ------------------------------------------------------------------------------------------------------------

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
    ("outside", 0, "ffffffffffffffff read beyond private memory\nwrote beyond private memory\n"),
    ("boot-sector", 0, "hello from real mode\npage given up\npage reads zeros\npage in use again\n"),
    ("jump-nowhere", 2, "KVM cannot go on with an instruction|triple fault"),       # kvm_pvm; kvm_amd
    ("fault-forever", 2, "triple fault"),
    ("loop", 3, "0.3 s are over, and the guest is at PC 0x80000000"),
    ("real-loop", 3, "0.3 s are over, and the guest is at PC 0x7c00"),
])
def test_every_guest(guest: str, code: int, words: str) -> None:
    got, said = run(guest, "--timeout", "0.3" if code == 3 else "300")
    assert (got, bool(re.search(words, said))) == (code, True), said
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
        image = load(name, REAL_MODE if real_mode else X86_64)
        console = Console(lambda text: None)
        guest = X86Guest(system, layout, image, real_mode, console, stack, lambda text: None)
        before = guest.memory.resident()
        assert drive(guest, 300).how == "off"
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
        ended = drive(guest, 300)
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


# -- a guest that does one thing -----------------------------------------------------------------------------------------


class Scripted:
    """A guest whose vCPU comes back with what the test says."""

    def __init__(self, stack: ExitStack, layout: Layout = Layout(1 << 20, 0)) -> None:     # noqa: B008 - frozen
        self.said: list[str] = []
        self.log: list[str] = []
        self.console = Console(self.said.append)
        system = stack.enter_context(System())
        self.guest = X86Guest(system, layout, load("loop", X86_64), False, self.console, stack, self.log.append)

    def step(self, told: Exit, monkeypatch: pytest.MonkeyPatch) -> tuple[LoopEnded | None, list[bytes]]:
        answers: list[bytes] = []
        monkeypatch.setattr(self.guest.vcpu, "run", lambda _seconds: told)
        monkeypatch.setattr(self.guest.vcpu, "answer", answers.append)
        return self.guest.step(1.0), answers


@on_kvm
def test_what_a_guest_starts_with() -> None:
    with ExitStack() as stack:
        guest = Scripted(stack).guest
        regs = guest.vcpu.get_regs()
        info = guest.layout.boot_info(load("loop", X86_64))
        assert (regs.rdi, regs.rsp, regs.rip) == (info, info + PAGE - 8, 0x8000_0000)


@on_kvm
@pytest.mark.parametrize(("told", "text", "answer"), [
    (Io(0xE9, 1, 3, True, b"abc"), "abc", []), (Io(0xE9, 2, 2, True, b"a.b."), "ab", []),
    (Io(0x60, 2, 3, False, b""), "", [b"\xff" * 6]), (Io(0xE9, 1, 2, False, b""), "", [bytes(2)]),
    (Mmio(CONSOLE, 4, False, b""), "", [bytes(4)]), (Mmio(0x5000_0000, 8, False, b""), "", [b"\xff" * 8]),
    (Mmio(0x5000_0000, 8, True, bytes(8)), "", []), (Mmio(CONTROL, 8, False, b""), "", [b"\xff" * 8]),
    (Intr(), "", []),
])
def test_devices(told: Exit, text: str, answer: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    with ExitStack() as stack:
        scripted = Scripted(stack)
        assert scripted.step(told, monkeypatch) == (None, answer)
        assert "".join(scripted.said) == scripted.console.text == text


@on_kvm
def test_one_page_goes_and_its_neighbours_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    with ExitStack() as stack:
        scripted = Scripted(stack)
        guest = scripted.guest
        guest.mapping.write(0x8000, b"x" * 3 * PAGE)
        before = guest.memory.resident()
        give = Mmio(CONTROL + 8, 8, True, (0x8000_9000).to_bytes(8, "little"))
        assert scripted.step(give, monkeypatch)[0] is None
        assert guest.memory.resident() == before                # the log has read the page, so there is a new one
        assert guest.mapping.read(0x8000, 3 * PAGE) == b"x" * PAGE + bytes(PAGE) + b"x" * PAGE
        assert scripted.step(Mmio(CONTROL + 8, 8, False, b""), monkeypatch)[1] == [bytes(8)]
        for wrong in (0x8010_0000, 0x7FFF_F000, 0x8000_0001):
            scripted.step(Mmio(CONTROL + 8, 8, True, wrong.to_bytes(8, "little")), monkeypatch)
            assert scripted.step(Mmio(CONTROL + 8, 8, False, b""), monkeypatch)[1] == [EINVAL.to_bytes(8, "little")]
        assert scripted.log[-1].endswith("0x80000001, which is no page of its memory")
        monkeypatch.setattr(guest.memory, "punch_hole", lambda *_: None)
        guest.mapping.write(0xA000, bytes(PAGE - 1) + b"!")
        scripted.step(Mmio(CONTROL + 8, 8, True, (0x8000_A000).to_bytes(8, "little")), monkeypatch)
        assert scripted.log[-1].endswith("the host's mapping reads something else")


@on_kvm
@pytest.mark.parametrize(("told", "words"), [
    (Shutdown(), "a triple fault"), (FailEntry(0x21), "refuses the vCPU's state: 0x21"),
    (KvmInternalError("KVM_INTERNAL_ERROR_EMULATION"), "KVM_INTERNAL_ERROR_EMULATION"),
    (MemoryFault(0, 0x8000_3000, PAGE, 14), "EFAULT (Bad address): the guest's page at 0x80003000 is gone"),
    (Unknown(7, 0), "ends with reason 7"), (SystemEvent(1), "an exit that no one here expects"),
])
def test_crashes(told: Exit, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with ExitStack() as stack:
        ended, _ = Scripted(stack).step(told, monkeypatch)
        assert ended is not None
        assert (ended.how, words in ended.why) == ("crash", True), ended.why
        assert "; code at 0x80000000: eb fe" in ended.why


@on_kvm
def test_a_call_that_fails_is_an_error_and_what_was_counted_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    real, rounds = X86Vcpu.run, []

    def runs_out(self: X86Vcpu, timeout: float | None = None) -> Exit:
        rounds.append(timeout)
        if len(rounds) > 10:
            raise SyscallFailed(ENOMEM, "KVM_RUN")
        return real(self, timeout)

    monkeypatch.setattr(X86Vcpu, "run", runs_out)
    code, said = run("hello")
    assert code == 5
    assert re.search(r"^9 exits, 2 pages of guest_memfd, \d", said, re.M), said
    assert said.splitlines()[-1].startswith("gmem: KVM_RUN: ENOMEM (Cannot allocate memory); the machine, or a limit")


@on_kvm
def test_a_call_that_this_kvm_refuses_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(self: X86Vcpu, sregs: object) -> None:
        raise SyscallFailed(EINVAL, "KVM_SET_SREGS")

    monkeypatch.setattr(X86Vcpu, "set_sregs", refuses)
    assert run("hello") == (5, "gmem: KVM_SET_SREGS: EINVAL (Invalid argument); the KVM of this kernel refuses it; without: "
                               "--on emulated:arm64/kvm\n")


def test_what_fits() -> None:
    image = GuestImage([(0x7C00, b"\xf4")], 0x7C00, "it")
    high = GuestImage([(0x7C00, bytes(0x100000 - 0x7C00 - PAGE))], 0x7C00, "it")
    assert fit(Layout(1 << 20, 0, base=0), image, True) == (0x8000, 1)
    assert fit(Layout(2 << 20, 0, base=0), high, True)[0] == 0xFF000
    with pytest.raises(BadInput, match="beyond what real mode reaches"):
        fit(Layout(2 << 20, 0, base=0), GuestImage([(0x7C00, bytes(0x100000 - 0x7C00))], 0x7C00, "it"), True)
    low = GuestImage([(0x8000_0000, b"\xf4")], 0x8000_0000, "it")
    assert fit(Layout(62 << 30, 0), low, False) == (0x8000_1000, 64)
    with pytest.raises(BadInput, match="62G is the most"):
        fit(Layout((62 << 30) + PAGE, 0), low, False)
    assert Layout(CONSOLE, 0, base=0).end == CONSOLE
    assert Layout(PAGE, CONSOLE - SHARED_BASE).shared == CONSOLE - SHARED_BASE
    for private, shared, base in ((CONSOLE + PAGE, 0, 0), (PAGE, CONSOLE - SHARED_BASE + PAGE, 0x8000_0000),
                                  (SHARED_BASE + PAGE, PAGE, 0)):
        with pytest.raises(BadInput, match="would reach"):
            Layout(private, shared, base=base)
    assert Layout(SHARED_BASE, PAGE, base=0).end == SHARED_BASE


# A kernel checks EFER against CPUID from 6.18.y and 7.2.y on, whichever module runs the guest.
@on_kvm
def test_cpuid_comes_before_the_registers_that_need_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, object]] = []
    real = syscall.ioctl

    def ioctl(fd: int, request: int, argument: object = 0, *, call: str, why: str = "") -> int:
        asked.append((call, argument))
        return real(fd, request, argument, call=call, why=why)

    monkeypatch.setattr(syscall, "ioctl", ioctl)
    with System() as system, SmallGuest(system) as guest:
        for _ in range(2):
            guest.start(b"\xeb\xfe")
            assert isinstance(guest.vcpu.run(0.01), Intr)
    names = [name for name, _ in asked]
    assert names.count("KVM_SET_CPUID2") == 1                   # after the first run it could not be another
    assert names.index("KVM_SET_CPUID2") < names.index("KVM_SET_SREGS")
    cpuid = dict(asked)["KVM_SET_CPUID2"]
    assert isinstance(cpuid, kvm_x86.Cpuid2)
    (entry,) = cpuid.entries
    assert (cpuid.nent, entry.function, entry.edx) == (1, 0x8000_0001, 1 << 29 | 1 << 20 | 1 << 11)


# Where the table is said to be 64 KiB long, kvm_intel and kvm_amd look for it at address 0, where there is no slot.
@on_kvm
def test_there_is_no_table_to_look_an_exception_up_in() -> None:
    with System() as system, SmallGuest(system) as guest:
        guest.start(b"\x0f\x0b")                               # ud2
        sregs = guest.vcpu.get_sregs()
        assert (sregs.idt.limit, sregs.gdt.limit) == (0, 0)
        assert isinstance(guest.vcpu.run(5), Shutdown)


# -- the clock -----------------------------------------------------------------------------------------------------------


@on_kvm
@pytest.mark.parametrize("source", [
    "_start: jmp _start\n", ".code16\n_start: jmp _start\n",
    "_start: mov edi, 0x9000000\nagain: mov al, [rdi]\n jmp again\n",
    ".code16\n_start: in al, 0x60\n jmp _start\n", "_start: pause\n jmp _start\n", ".code16\n_start: cli\n jmp _start\n",
])
def test_the_clock_always_works(tmp_path: Path, source: str) -> None:
    (tmp_path / "own.s").write_text(source)
    code, said = run(str(tmp_path / "own.s"), "--timeout", "0.4")
    assert code == 3, said
    assert "0.4 s are over" in said


@on_kvm
def test_ctrl_c_ends_it_and_nothing_that_was_said_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own.s").write_text("_start: call enter\n lea rdi, [rip + text]\n call print\nhere: jmp here\n"
                                    "text: .asciz \"no end\"\n")
    main_thread, written = threading.get_ident(), threading.Event()
    real = Console.put

    def put(self: Console, data: bytes) -> None:
        real(self, data)
        if self.text.endswith("no end"):
            written.set()

    def press() -> None:
        written.wait()
        signal.pthread_kill(main_thread, signal.SIGINT)

    monkeypatch.setattr(Console, "put", put)
    timer = threading.Thread(target=press)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)       # it may be ignored where tests run in the dark
    try:
        timer.start()
        code, said = run(str(tmp_path / "own.s"), "--timeout", "100000")
        timer.join()
    finally:
        signal.signal(signal.SIGINT, before)
    assert (code, said) == (130, "no end\n")


# -- what is asked for ---------------------------------------------------------------------------------------------------


@on_kvm
@pytest.mark.parametrize(("options", "words"), [
    (("--design", "none"), "--design is for emulated machines"), (("--ram", "1G"), "--ram is for emulated machines"),
    (("--zeropad",), "--zeropad is for emulated machines"),
    (("--perfetto", "trace"), "--perfetto is for emulated machines"),
    (("--fail", "kernel:1"), "--fail is for emulated machines"),
    (("--folio", "2M"), "--folio is for emulated machines"), (("--memory", "4097"), "no multiple of a page"),
    (("--memory", "0"), "at least a page"), (("--memory", "4K"), "no page is left after the image"),
    (("--memory", "600G"), "beyond the 64 GiB that this vCPU can address; 62G is the most"),
    (("--shared", "200M"), "would reach the console"),
    (("--timeout", "0"), "above 0"), (("--real-mode", "--memory", "1M"), "would reach the window at 0x80000"),
    (("--real-mode", "--memory", "200M", "--shared", "0"), "would reach the console"), (("--memory", ""), "is no size"),
])
def test_mistakes_are_one_line(options: tuple[str, ...], words: str) -> None:
    code, said = run("boot-sector" if "--real-mode" in options else "hello", *options)
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
    assert found["console"] == ""
    said = run("hello", "--json")[1]
    assert json.loads(said[:said.rindex("}\n") + 1])["console"] == "hello from a guest\nsecret written\n"
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
def _life(image: GuestImage, descriptors: int) -> str:
    try:
        with limit(resource.RLIMIT_NOFILE, descriptors), System() as system, ExitStack() as stack:
            guest = X86Guest(system, Layout(1 << 20), image, False, Console(lambda text: None), stack, lambda text: None)
            return "" if drive(guest, 300).how == "off" else "it does not end"
    except GuestMemfdError as error:
        return str(error)


@on_kvm
def test_no_address_space_for_the_memory_is_an_error_and_nothing_stays() -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * PAGE
    with limit(resource.RLIMIT_AS, used + (1 << 30)):
        code, said = run("hello", "--memory", "8G")
    assert code == 5
    assert "gmem: mmap: ENOMEM (Cannot allocate memory): 0x200000000 bytes at 0x0; the machine, or a limit" in said
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
    monkeypatch.setattr("guest_memfd.linux.system.System.__init__.__defaults__", ("/nowhere/kvm",))
    monkeypatch.setattr("guest_memfd.linux.system.PATH", "/nowhere/kvm")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    code, said = run("hello")
    assert (code, said) == (5, "gmem: /nowhere/kvm: No such file or directory; load kvm_intel, kvm_amd or kvm_pvm, or start "
                               "this machine with nested virtualisation\n")


def test_a_device_that_somebody_has_named_is_not_there() -> None:
    with pytest.raises(HostUnavailable, match=r"^/nowhere/kvm: No such file or directory$"):
        System("/nowhere/kvm")


def test_another_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    code, said = run("hello")
    assert code == 5
    assert "are x86-64 or arm64 programs, and this machine is riscv64" in said


def test_real_mode_is_x86s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    code, said = run("hello", "--real-mode")
    assert code == 4
    assert "--real-mode is x86's, and this machine is arm64" in said


def test_an_arm64_guest_is_in_shared_memory_from_the_beginning() -> None:
    """The emulated /dev/kvm of 7.3, which converts nothing, in place of a real one on arm64."""
    pytest.importorskip("unicorn")
    from guest_memfd.machine.boot import Config, Machine

    machine = Machine("kvm", Config(ram=64 << 20, kvm_release="7.3"))
    image, said = load(read("shared", "arm64"), ARM64), list[str]()
    with ExitStack() as stack:
        device = stack.enter_context(machine.open("/dev/kvm"))
        guest = KvmGuest(device, Layout(1 << 20, 4096), image, Console(said.append), stack, str, converts=False)
        assert drive(guest, 10.0).how == "off"
        assert guest.debugger.registers()["pc"] == guest.debugger.pc() == guest.vcpu.get_one_reg(kvm_arm64.PC)
        assert (guest.window() or b"").startswith(SHARED_LINE)
        with guest.memory.mmap() as mapping:
            assert mapping.read(0, 8) == image.segments[0][1][:8]


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

"""`gmem run`: what its page shows is what it prints; guests that end, loop, crash; memory that runs out; every bad input."""

from __future__ import annotations

import io
import json
import re
import struct
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from pages import agrees, commands

from guest_memfd.cli.main import main
from guest_memfd.cli.run import size
from guest_memfd.errors import BadInput
from guest_memfd.guests import GUESTS, SHARED_LINE
from guest_memfd.guests.loader import load
from guest_memfd.machine.boot import Machine
from guest_memfd.vmm.emulated import EmulatedOrder, EmulatedReport, EmulatedRun
from guest_memfd.vmm.ghosts import ProgramTracer
from guest_memfd.vmm.layout import Layout

pytest.importorskip("unicorn")

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "run.md").read_text(encoding="utf-8")
HOSTS = ("gunyah", "pkvm", "kvm")
SMALL = ["--memory", "1M", "--ram", "32M"]
EVERYWHERE = pytest.mark.parametrize("host", HOSTS)


def shell(*argv: str) -> tuple[int, str]:
    """The exit code of gmem, and what a terminal would show."""
    terminal = io.StringIO()
    with redirect_stdout(terminal), redirect_stderr(terminal):
        code = main(list(argv))
    return code, terminal.getvalue()


def run(guest: str, host: str, *options: str) -> tuple[int, str]:
    return shell("run", guest, "--on", f"emulated:arm64/{host}", *SMALL, *options)


# -- the page ------------------------------------------------------------------------------------------------------------

SHOWN = commands(PAGE)


# Addresses and paces are not the same everywhere.
def masked(line: str) -> str:
    line = re.sub(r"[\d,]+ instructions, [\d,]+ a second", "N instructions, N a second", line)
    line = re.sub(r"^\d+ exits", "N exits", line)               # the clock interrupts a guest, too
    line = re.sub(r"\bpfn\d+|\b\d{6,}\b|entry 0x[0-9a-f]{16}", "FRAME", line)
    return re.sub(r"(?<![0-9a-f])(0x)?ffff[0-9a-f]{12}", "ADDRESS", line)


@pytest.mark.parametrize(("command", "output"), SHOWN, ids=[command for command, _ in SHOWN])
def test_the_page_shows_what_is_printed(command: str, output: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    _, printed = shell(*command.split())
    agrees(output, printed, masked)


def test_the_page_shows_every_built_in_misbehaviour_and_the_main_point() -> None:
    shown = " ".join(command for command, _ in SHOWN)
    assert all(name in shown for name, guest in GUESTS.items() if not guest.well_behaved and "arm64" in guest.architectures)
    assert "--design none --zeropad" in shown


def test_the_example_is_shown_as_it_is() -> None:
    (shown,) = re.findall(r"^```asm\n(.*?)^```$", PAGE, re.M | re.S)
    assert shown == (ROOT / "docs" / "examples" / "greeter.s").read_text(encoding="utf-8")


# -- what the exercise is about ------------------------------------------------------------------------------------------


def test_gunyah_without_a_hole_panics_on_its_own_load() -> None:
    code, said = run("hello", "gunyah", "--design", "none", "--zeropad")
    assert code == 2
    assert "ESR 0x96000010" in said
    assert "Kernel panic - not syncing: synchronous external abort" in said
    assert "gmem: the host has panicked" in said
    assert "pc : load_unaligned_zeropad" in said
    assert "law host-survives is broken" in said


@pytest.mark.parametrize(("host", "design"), [
    ("gunyah", "library"), ("gunyah", "fixup"), ("gunyah", "secretmem"), ("pkvm", "library"), ("pkvm", "none"),
    ("kvm", "library"),
])
def test_the_load_gets_its_zero_padded_word(host: str, design: str) -> None:
    code, said = run("hello", host, "--design", design, "--zeropad")
    assert code == 0, said
    assert "0x00000000676d692e, the exception table stepped in" in said


def test_without_a_hole_plain_kvm_gives_the_secret_away() -> None:
    code, said = run("hello", "kvm", "--design", "none", "--zeropad")
    assert code == 2
    assert "law guest-private is broken: load_unaligned_zeropad reads a page" in said


def test_a_design_that_cannot_lend_is_refused_in_one_line() -> None:
    assert run("hello", "gunyah", "--design", "guestmem-rfc2") == (
        4, "gmem: design 'guestmem-rfc2' has no conversion, so it cannot lend and take back for /dev/gunyah\n")


@pytest.mark.parametrize(("design", "law"), [("none", "no-stale-data"), ("library", "host-survives")])
def test_a_stray_load_under_pkvm(design: str, law: str) -> None:
    code, said = run("hello", "pkvm", "--design", design, "--reader", "plain")
    assert code == 2
    assert f"law {law} is broken" in said
    assert ("Unable to handle kernel paging request" in said) == (design == "library")


@EVERYWHERE
def test_kcore_finds_nothing(host: str) -> None:
    code, said = run("hello", host, "--reader", "kcore")
    assert code == 0
    assert "pages, 0 copied" in said


def test_posted_gunyah_code_breaks_a_law_by_itself() -> None:
    code, said = run("hello", "gunyah", "--design", "gunyah-v17")
    assert code == 2
    assert "law library-alone is broken: module gunyah changes the direct map itself" in said


def test_without_more_words_it_is_the_first_of_the_machines() -> None:
    code, said = shell("run", "guest-that-is-not", "--on", "emulated")
    assert (code, run("guest-that-is-not", "gunyah")) == (4, (4, said))
    assert shell("run", "fault-forever", "--on", "emulated", *SMALL)[0] == run("fault-forever", "gunyah")[0]


def test_hello_runs_everywhere() -> None:
    for host in HOSTS:
        assert shell("run", "hello", "--on", f"emulated:arm64/{host}")[0] == 0


# -- guests --------------------------------------------------------------------------------------------------------------


@EVERYWHERE
@pytest.mark.parametrize("folio", ["4K", "2M"])
def test_every_page_keeps_what_was_written(host: str, folio: str) -> None:
    code, said = shell("run", "memory", "--on", f"emulated:arm64/{host}", "--memory", "2M" if folio == "4K" else "6M",
                       "--ram", "64M", "--folio", folio)
    assert code == 0, said
    assert f"{511 if folio == '4K' else 1535} pages hold what was written" in said


@EVERYWHERE
def test_the_host_reads_what_the_guest_shares(host: str) -> None:
    code, said = run("shared", host, "--json")
    found = json.loads(said[:said.rindex("}") + 1])
    assert (code, found["ended"], found["console"]) == (0, "off", "line left in the shared window\n")
    assert found["shared_window"] == SHARED_LINE.decode()


@pytest.mark.parametrize(("host", "line"), [
    ("gunyah", "page still holds the secret"), ("pkvm", "page reads zeros"),
    ("kvm", "the hypervisor refused to take the page"),
])
@pytest.mark.parametrize("folio", ["4K", "2M"])
def test_a_page_given_up(host: str, line: str, folio: str) -> None:
    """Of a folio of 2 MiB it is one page as well, and the guest's own call is what has the block split."""
    code, said = shell("run", "relinquish", "--on", f"emulated:arm64/{host}", "--memory", "6M", "--ram", "64M",
                       "--folio", folio)
    assert code == 0, said
    assert line in said


@EVERYWHERE
def test_a_guest_with_tables_of_its_own(host: str) -> None:
    code, said = shell("run", "mmu", "--on", f"emulated:arm64/{host}", "--memory", "4M", "--ram", "32M")
    assert code == 0
    assert said.startswith("MMU off\nMMU on\nsecond mapping agrees\n")


@EVERYWHERE
@pytest.mark.parametrize("source", ["b _start", "wfi", "nop"])
def test_the_clock_always_works(host: str, source: str, tmp_path: Path) -> None:
    path = tmp_path / "own.s"
    path.write_text(f"_start:\n {source}\n b _start\n")
    code, said = run(str(path), host, "--timeout", "0.5")
    assert code == 3
    assert re.search(r"^gmem: timeout: 0.5 s are over, and the guest is at PC 0x8000000[04]$", said, re.M)


@EVERYWHERE
def test_a_stage_1_fault_loop_ends_by_the_clock_or_before(host: str, tmp_path: Path) -> None:
    path = tmp_path / "own.s"
    path.write_text("_start:\n mov x0, #0x40000000\n msr vbar_el1, x0\n isb\n mrs x0, sctlr_el1\n orr x0, x0, #1\n"
                    " msr sctlr_el1, x0\n isb\n nop\n")
    code, said = run(str(path), host, "--timeout", "0.7")
    assert code in (2, 3), said
    assert "PC" in said


@EVERYWHERE
def test_an_undefined_instruction_without_vectors_is_a_crash(host: str, tmp_path: Path) -> None:
    path = tmp_path / "raw"
    path.write_bytes(struct.pack("<I", 0))
    code, said = run(str(path), host, "--timeout", "300")
    assert code == 2
    assert re.search("crashed|faults for ever", said)
    assert "esr_el1" in said
    assert re.search(r"pc +0000000000000200", said)


@pytest.mark.parametrize("host", ["gunyah", "pkvm"])
def test_a_console_store_that_has_no_syndrome_is_named(host: str, tmp_path: Path) -> None:
    (tmp_path / "g.s").write_text("_start: mov x1, #0x9000000\nstrb w0, [x1], #1\nhere: b here\n")
    code, said = run(str(tmp_path / "g.s"), host, "--timeout", "300")
    assert code == 2
    assert "writeback" in said
    assert "<" not in said


def test_faulting_for_ever_is_noticed_at_once() -> None:
    for host in HOSTS:
        code, said = run("fault-forever", host, "--timeout", "300")
        assert code == 2
        assert "0x7000000000" in said


@pytest.mark.parametrize(("host", "code", "line"), [
    ("gunyah", 2, "it touched 0x80100000, where it has nothing"), ("pkvm", 0, "guest: abort, esr 0000000096000010"),
    ("kvm", 0, "guest: abort, esr 0000000096000010"),
])
def test_memory_outside_of_its_ranges(host: str, code: int, line: str) -> None:
    got, said = run("outside", host)
    assert got == code
    assert line in said


@EVERYWHERE
def test_hypercalls_that_make_no_sense(host: str) -> None:
    code, said = run("bad-hypercall", host)
    assert code == 0
    assert said.startswith("ffffffffffffffff\n")


def test_a_reset_ends_it(tmp_path: Path) -> None:
    path = tmp_path / "own.s"
    path.write_text("_start:\n ldr x0, =0x84000009\n hvc #0\n .ltorg\n")
    for host in HOSTS:
        assert run(str(path), host)[0] == 0


def test_a_flat_binary_and_a_line_without_end(tmp_path: Path) -> None:
    source = tmp_path / "own.s"
    source.write_text("_start:\n bl enter\n adr x0, text\n bl print\n b power_off\ntext: .asciz \"no end\"\n .align 3\n")
    binary = tmp_path / "own"
    binary.write_bytes(load(source).segments[0][1])
    for path in (source, binary):
        assert run(str(path), "gunyah")[1].startswith("no end\n")


def elf(machine: int = 183, size: int = 4096, memory: int = 4096, data: bytes = b"") -> bytes:
    header = struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF\2\1\1" + bytes(9), 2, machine, 1, 0x8000_0000, 64, 0, 0, 64, 56, 1,
                         0, 0, 0)
    segment = struct.pack("<IIQQQQQQ", 1, 7, 4096, 0x8000_0000, 0x8000_0000, size, memory, 4096)
    return (header + segment).ljust(4096, b"\0") + data.ljust(4096, b"\0")


def test_a_static_elf(tmp_path: Path) -> None:
    pytest.importorskip("elftools")
    path = tmp_path / "guest.elf"
    path.write_bytes(elf(data=load("hello").segments[0][1], memory=8192))
    for host in HOSTS:
        assert run(str(path), host)[1].startswith("hello from a guest\nsecret written\n")


@pytest.mark.parametrize(("raw", "words"), [
    (elf(62), "EM_X86_64"), (elf()[:50], "truncated"), (elf()[:5000], "truncated"), (elf(memory=2 << 20), "does not fit"),
])
def test_elf_files_that_are_refused(raw: bytes, words: str, tmp_path: Path) -> None:
    pytest.importorskip("elftools")
    path = tmp_path / "guest.elf"
    path.write_bytes(raw)
    code, said = run(str(path), "gunyah")
    assert code == 4
    assert words in said
    assert said.count("\n") == 1


# -- what was asked for ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "number"), [
    ("4096", 4096), ("64K", 64 << 10), ("16M", 16 << 20), ("2g", 2 << 30), ("1T", 1 << 40), ("0x1000", 4096), ("8KiB", 8192),
])
def test_sizes(text: str, number: int) -> None:
    assert size("--memory", text) == number


@pytest.mark.parametrize("text", ["", "0", "M", "1.5M", "-4096", "4097", "100", "4 096", "0x", "16MM", "1e9", "16m6"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(BadInput, match="--memory"):
        size("--memory", text)


@pytest.mark.parametrize(("options", "words"), [
    (["--on", "emulated:x86_64/kvm"], "--on emulated:x86_64/kvm: not yet; emulated machines are arm64"),
    (["--on", "emulated:arm64/gunya"], "did you mean 'emulated:arm64/gunyah'"),
    (["--on", "emulated:arm64/tiny"], "runs on a hypervisor of your own: --load FILE"),
    (["--folio", "1G", "--memory", "1G", "--ram", "8G"], "a file of /dev/gunyah has folios of 4K or 2M"),
    (["--on", "xen"], "unknown host 'xen'"),
    (["--design", "libary"], "did you mean 'library'"), (["--memory", "0"], "at least a page"),
    (["--memory", "5000"], "no multiple of a page"), (["--memory", "1G"], "more than the machine's RAM"),
    (["--memory", "256M"], "bytes are free"), (["--ram", "1M"], "16M at least"), (["--timeout", "0"], "above 0"),
    (["--timeout", "soon"], "not a number of seconds"), (["--folio", "8K"], "unknown folio size"),
    (["--memory", "4K"], "no page is left after the image"),
    (["--folio", "2M", "--memory", "17M"], "no multiple of the folio size"), (["--reader", "mind"], "unknown reader 'mind'"),
    (["--zeropad", "--reader", "kcore"], "exclude each other"), (["--shared", "200M"], "would reach the console"),
    (["--folio", "2M", "--shared", "2M"], "cannot be made of folios"), (["--fail", "disk:1"], "kernel:N"),
    (["--on", "emulated:arm64/pkvm", "--design", "gunyah-v17"], "posted for gunyah only"),
    (["--output", "/nowhere/at/all"], "cannot write"), (["--frobnicate"], "unknown option"),
])
def test_mistakes_are_one_line(options: list[str], words: str) -> None:
    code, said = shell("run", "hello", *options)
    assert code == 4
    assert words in said
    assert said.startswith("gmem: ")
    assert said.count("\n") == 1


@pytest.mark.parametrize(("guest", "words"), [("helo", "did you mean 'hello'"), ("./nothing", "No such file")])
def test_guests_that_there_are_not(guest: str, words: str) -> None:
    code, said = shell("run", guest)
    assert (code, words in said) == (4, True)


def test_without_unicorn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "unicorn", None)
    code, said = shell("run", "hello")
    assert code == 5
    assert "pip install -e '.[emu]'" in said


# -- output ----------------------------------------------------------------------------------------------------------------


def test_json_is_all_of_it(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    code, said = run("hello", "gunyah", "--design", "none", "--zeropad", "--json", "-o", str(path))
    found = json.loads(path.read_text())
    assert (found["schema"], found["exit_code"], found["ended"]) == ("guest-memfd-run/1", code, "panic")
    assert found["panic"].startswith("Internal error: synchronous external abort")
    assert found["broken"][0]["law"] == "host-survives"
    assert found["primitives"]["load_unaligned_zeropad"] == 1
    assert not said.startswith(("hello", "Internal error"))


def test_what_the_guest_says_may_go_to_a_file(tmp_path: Path) -> None:
    path = tmp_path / "said"
    assert run("hello", "pkvm", "-o", str(path))[0] == 0
    assert path.read_text() == "hello from a guest\nsecret written\n"


def test_verbose_shows_moves_and_very_verbose_all() -> None:
    _, once = run("hello", "gunyah", "-v")
    _, twice = run("hello", "gunyah", "-vv")
    assert "donate_to_protected" in once
    assert "lock_folio" not in once
    assert "lock_folio" in twice
    assert "exit STATUS EXITED" in once
    assert re.search(r"^host: leaves that a file has split, of those it can: direct map 0 of [1-9]", once, re.M)


def test_guests_are_listed() -> None:
    _, said = shell("list", "guests", "--json")
    assert [guest["name"] for guest in json.loads(said)["guests"]] == [*GUESTS]


# -- memory that runs out --------------------------------------------------------------------------------------------------


def starved(guest: str, host: str, who: str, n: int) -> EmulatedReport:
    order = EmulatedOrder(load(guest), host, layout=Layout(1 << 20, 1 << 16), ram=32 << 20, timeout=300, fail=(who, n))  # type: ignore
    return EmulatedRun(order, lambda text: None, lambda text: None).run()


@EVERYWHERE
@pytest.mark.parametrize("who", ["kernel", "slab", "el2"])
def test_every_allocation_may_fail_and_nothing_is_lost(host: str, who: str) -> None:
    failed = 0
    for n in range(18):
        report = starved("shared", host, who, n)
        assert (report.broken, report.lost, report.panic) == ([], [], "")
        if report.failed is not None:
            failed += 1
            assert re.search("ENOMEM|SIGBUS", str(report.failed))
        else:
            assert report.ended is not None
            assert report.ended.how == "off"
    assert bool(failed) == (who != "el2" or host == "gunyah")


def test_a_failed_allocation_is_an_error_of_the_call() -> None:
    code, said = run("hello", "gunyah", "--fail", "slab:0")
    assert code == 4
    assert said.splitlines()[-1].startswith("gmem: CREATE_VM: ENOMEM")


def test_what_is_lost_is_a_broken_law(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Machine, "audit", lambda machine: ["0x1000 is not in the direct map"])
    code, said = run("hello", "pkvm")
    assert code == 2
    assert "law nothing-lost is broken: 0x1000 is not in the direct map" in said


def test_a_mistake_of_the_program_is_no_broken_law(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ProgramTracer, "content", lambda *_: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        EmulatedRun(EmulatedOrder(load("hello"), "kvm"), lambda text: None, lambda text: None).run()

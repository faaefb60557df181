"""The CPU on Unicorn: every way to stop, with the exact state that the architecture leaves; and what a run may cost."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from guest_memfd.asm.arm64.asm import assemble
from guest_memfd.errors import HostUnavailable
from guest_memfd.machine.hw.arm64.access import access_of, address_of, writes_back
from guest_memfd.machine.hw.arm64.cpu import (
    Breakpoint,
    Bus,
    Counted,
    Cpu,
    CpuAbort,
    Expired,
    Hvc,
    Smc,
    Stop,
    Svc,
    Undefined,
    Wfi,
)
from guest_memfd.machine.hw.arm64.fault import ALIGNMENT, PERMISSION, TRANSLATION, Fault
from guest_memfd.machine.hw.arm64.regime import Stage1
from guest_memfd.machine.hw.arm64.registers import Tcr
from guest_memfd.machine.hw.arm64.walk import walk
from guest_memfd.machine.hw.ram import Ram

BASE = 0x8000_0000
CODE, DATA = BASE, BASE + 0x10_0000
VA = 0xffff_0000_0000_0000          # where DATA is mapped, too, a page at a time
PAGE = 4096


class Machine:
    """RAM, one CPU, and a map of pages: the code is identity mapped, the rest as `pages` says."""

    def __init__(self, source: str = "", size: int = 4 << 20) -> None:
        self.ram = Ram(size)
        self.pages: dict[int, tuple[int, str]] = {}
        self.asked: list[tuple[int, str, int]] = []
        self.invalidated: list[tuple[str, int]] = []
        self.cpu = Cpu(self.ram, self.translate, lambda name, value: self.invalidated.append((name, value)))
        self.load(source)

    def load(self, source: str, at: int = CODE) -> None:
        self.symbols = dict(assemble(source, at).symbols)
        self.ram.write(at, assemble(source, at).data)
        self.cpu.pc, self.cpu.sp = at, CODE + 0x8000

    def map(self, va: int, pa: int, rights: str = "rw") -> None:
        self.pages[va // PAGE] = pa, rights

    def translate(self, va: int, access: str, el: int) -> tuple[int, int, bool, bool, bool]:
        self.asked.append((va, access, el))
        if CODE <= va < CODE + 0x4_0000:
            return va, PAGE, True, True, True
        pa, rights = self.pages.get(va // PAGE, (0, ""))
        if access not in rights:
            raise Fault(PERMISSION if rights else TRANSLATION, 3, 1, va=va, access=access, el=el)
        return pa + va % PAGE, PAGE, "r" in rights, "w" in rights, "x" in rights

    def run(self, **x: int) -> Stop:
        for name, value in x.items():
            self.cpu.set_x(int(name[1:]), value)
        return self.cpu.run(timeout=300)


def abort(stop: Stop) -> tuple[int, str, int]:
    assert isinstance(stop, CpuAbort)
    return stop.fault.far, stop.fault.access, stop.pc


# -- stops -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("source", "stop", "pc"), [
    ("hvc #7", Hvc(7), 4), ("smc #65535", Smc(65535), 4), ("svc #1", Svc(1), 4), ("wfi", Wfi(), 4),
    ("brk #9", Breakpoint(9), 0), ("udf #0", Undefined(CODE), 0), ("wfe\nhvc #0", Hvc(0), 8),
    ("mrs x0, S3_6_C1_C1_0", Undefined(CODE), 0), (".word 0xf8210003 // ldadd x1, x3, [x0]", Undefined(CODE), 0),
    (".word 0x2edf0de4 // half precision, unallocated", Undefined(CODE), 0),
])
def test_each_exception_stops_with_the_pc_of_the_manual(source: str, stop: Stop, pc: int) -> None:
    machine = Machine(source)
    assert machine.run() == stop
    assert machine.cpu.pc == CODE + pc


def test_execution_goes_on_after_a_call_and_after_wfi() -> None:
    machine = Machine("again: add x0, x0, #1\nhvc #1\nadd x0, x0, #10\nwfi\nb again")
    stops = [machine.run() for _ in range(4)]
    assert stops == [Hvc(1), Wfi(), Hvc(1), Wfi()]
    assert machine.cpu.x(0) == 22


def test_a_jump_to_an_odd_address_is_undefined_there() -> None:
    machine = Machine("br x0")
    assert machine.run(x0=CODE + 0x102) == Undefined(CODE + 0x102)


def test_a_bus_error_names_the_physical_byte() -> None:
    machine = Machine("ldr x1, [x0, #8]\nstrb w1, [x2], #1")
    machine.map(VA, 0x900_0000)
    machine.map(VA + PAGE, 0x900_1000)
    assert machine.run(x0=VA + 0x18, x1=5) == Bus(0x900_0020, CODE, VA + 0x20, "r")
    assert machine.cpu.x(1) == 5
    machine.cpu.pc += 4
    assert machine.run(x2=VA + PAGE + 3) == Bus(0x900_1003, CODE + 4, VA + PAGE + 3, "w")
    assert machine.cpu.x(2) == VA + PAGE + 3
    machine.cpu.pc = VA
    machine.map(VA, 0x900_0000, "x")
    assert machine.run() == Bus(0x900_0000, VA, VA, "x")


def test_what_translate_raises_leaves_run(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine("nop\nldr x1, [x0]\nhvc #0")
    machine.map(VA, DATA)

    def broken(error: BaseException) -> Callable[..., Any]:
        def translate(va: int, access: str, el: int) -> Any:
            if access == "r":
                raise error
            return machine.translate(va, access, el)
        return translate

    for error in (ZeroDivisionError("in a callback"), KeyboardInterrupt()):
        machine.cpu.pc = CODE
        monkeypatch.setattr(machine.cpu, "translate", broken(error))
        with pytest.raises(type(error)) as caught:
            machine.run(x0=VA)
        assert caught.value is error
        assert machine.cpu.pc == CODE + 4
    monkeypatch.setattr(machine.cpu, "translate", machine.translate)
    assert machine.run() == Hvc(0)


@pytest.mark.parametrize("error", [KeyboardInterrupt("between"), None])
def test_a_signal_at_the_border_of_a_callback_leaves_run(
    error: BaseException | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine("nop\nldr x1, [x0]\nhvc #0")
    machine.map(VA, DATA)
    before = sys.unraisablehook

    def translate(va: int, access: str, el: int) -> Any:
        if access == "r":                               # what ctypes does with what is raised there
            sys.unraisablehook(SimpleNamespace(exc_type=KeyboardInterrupt, exc_value=error))
        return machine.translate(va, access, el)

    monkeypatch.setattr(machine.cpu, "translate", translate)
    with pytest.raises(KeyboardInterrupt):
        machine.run(x0=VA)
    assert sys.unraisablehook is before


def test_without_unicorn_the_host_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "unicorn", None)
    with pytest.raises(HostUnavailable, match=r"pip install -e '.\[emu\]'"):
        Cpu(Ram(PAGE), lambda va, access, el: (va, PAGE, True, True, True))


# -- aborts ----------------------------------------------------------------------------------------------------------

# Every class of load and store: the address in terms of x0 = VA + 0x100, x1 = 0x40, x2 = -8 (32 bits), sp = VA + 0x200
@pytest.mark.parametrize(("source", "offset", "access"), [
    ("ldr x3, [x0]", 0x100, "r"), ("ldrb w3, [x0, #1]", 0x101, "r"), ("str w3, [x0, #12]", 0x10c, "w"),
    ("ldr x3, [x0, #-8]", 0xf8, "r"), ("ldur x3, [x0, #-1]", 0xff, "r"), ("stur w3, [x0, #255]", 0x1ff, "w"),
    ("ldr x3, [x0], #16", 0x100, "r"), ("str x3, [x0, #16]!", 0x110, "w"), ("ldrsw x3, [x0, x1]", 0x140, "r"),
    ("ldr x3, [x0, x1, lsl #3]", 0x300, "r"), ("ldrh w3, [x0, w2, sxtw #1]", 0xf0, "r"), ("strb wzr, [sp]", 0x200, "w"),
    ("ldp x3, x4, [x0, #-16]", 0xf0, "r"), ("stp x3, x4, [sp, #-32]!", 0x1e0, "w"), ("ldp w3, w4, [x0], #8", 0x100, "r"),
    ("ldxr x3, [x0]", 0x100, "r"), ("stlr w3, [x0]", 0x100, "w"), ("ldar x3, [x0]", 0x100, "r"),
    (".word 0x3dc00400 // ldr q0, [x0, #16]", 0x110, "r"),
    (".word 0x3d800400 // str q0, [x0, #16]", 0x110, "w"), (".word 0x6d000400 // stp d0, d1, [x0]", 0x100, "w"),
    (".word 0xad410400 // ldp q0, q1, [x0, #32]", 0x120, "r"), (".word 0x4c407000 // ld1 {v0.16b}, [x0]", 0x100, "r"),
    ("dc zva, x0", 0x100, "w"),
])
def test_an_abort_knows_the_byte_and_did_nothing(source: str, offset: int, access: str) -> None:
    machine = Machine(source + "\nhvc #0")
    machine.cpu.sp = VA + 0x200
    assert abort(machine.run(x0=VA + 0x100, x1=0x40, x2=0xffff_fff8, x3=33)) == (VA + offset, access, CODE)
    assert [machine.cpu.x(n) for n in (0, 3)] == [VA + 0x100, 33]
    assert machine.cpu.sp == VA + 0x200
    machine.map(VA, DATA)                       # mapped: the same instruction goes through
    assert machine.run() == Hvc(0)


def test_a_literal_load_aborts_at_its_literal() -> None:
    machine = Machine()
    machine.map(VA, DATA, "x")
    machine.ram.write(DATA, assemble("ldr x0, 0x10").data)
    machine.cpu.pc = VA
    assert abort(machine.run()) == (VA + 0x10, "r", VA)


def test_a_fetch_aborts_at_the_target() -> None:
    machine = Machine("br x0")
    assert abort(machine.run(x0=VA + 0x10)) == (VA + 0x10, "x", VA + 0x10)
    machine.map(VA, DATA, "rw")
    fault = machine.run()
    assert isinstance(fault, CpuAbort)
    assert fault.fault.kind == PERMISSION


def test_running_into_the_next_page() -> None:
    machine = Machine()
    machine.map(VA, DATA, "x")
    machine.ram.write(DATA + PAGE - 8, assemble("add x0, x0, #1\nadd x0, x0, #1").data)
    machine.cpu.pc = VA + PAGE - 8
    assert abort(machine.run(x0=0)) == (VA + PAGE, "x", VA + PAGE)
    assert machine.cpu.x(0) == 2


@pytest.mark.parametrize("size", [2, 4, 8])
def test_a_store_across_two_pages_of_which_one_is_bad_stores_nothing(size: int) -> None:
    store = {2: "strh w1, [x0]", 4: "str w1, [x0]", 8: "str x1, [x0]"}[size]
    before = b"\xaa" * PAGE * 2
    for bad in (0, 1):
        for into in range(1, size):
            machine = Machine(store + "\nhvc #0")
            machine.ram.write(DATA, before)
            machine.map(VA + (1 - bad) * PAGE, DATA + (1 - bad) * PAGE)
            start = VA + PAGE - into
            where = start if bad == 0 else VA + PAGE
            assert abort(machine.run(x0=start, x1=0x1122334455667788)) == (where, "w", CODE)
            assert machine.ram.read(DATA, 2 * PAGE) == before
            machine.map(VA + bad * PAGE, DATA + bad * PAGE)
            assert machine.run() == Hvc(0)
            stored = machine.ram.read(DATA + PAGE - into, size)
            assert stored == (0x1122334455667788).to_bytes(8, "little")[:size]


def test_a_pair_stored_across_two_pages_is_stored_by_registers() -> None:
    machine = Machine("stp x1, x2, [x0]\nhvc #0")
    machine.map(VA, DATA)
    assert abort(machine.run(x0=VA + PAGE - 8, x1=1, x2=2)) == (VA + PAGE, "w", CODE)
    assert machine.ram.read64(DATA + PAGE - 8) in (0, 1)
    assert machine.ram.read64(DATA + PAGE) == 0
    machine.map(VA + PAGE, DATA + PAGE)
    assert machine.run() == Hvc(0)
    assert (machine.ram.read64(DATA + PAGE - 8), machine.ram.read64(DATA + PAGE)) == (1, 2)


def test_a_load_across_two_pages_takes_each_part_from_its_own_frame() -> None:
    machine = Machine("ldr x1, [x0]\nhvc #0")
    machine.ram.write(DATA + PAGE - 4, b"abcd")
    machine.ram.write(DATA + 5 * PAGE, b"efgh")
    machine.map(VA, DATA)
    assert abort(machine.run(x0=VA + PAGE - 4)) == (VA + PAGE, "r", CODE)
    machine.map(VA + PAGE, DATA + 5 * PAGE)
    assert machine.run() == Hvc(0)
    assert machine.cpu.x(1).to_bytes(8, "little") == b"abcdefgh"


def test_a_store_to_a_page_that_may_only_be_read() -> None:
    machine = Machine("ldr x1, [x0]\nstr x1, [x0]")
    machine.map(VA, DATA, "r")
    stop = machine.run(x0=VA + 8)
    assert abort(stop) == (VA + 8, "w", CODE + 4)
    assert isinstance(stop, CpuAbort)
    assert stop.fault.kind == PERMISSION


def test_an_unaligned_exclusive_is_an_alignment_fault() -> None:
    machine = Machine("ldxr x1, [x0]")
    machine.map(VA, DATA)
    stop = machine.run(x0=VA + 1)
    assert abort(stop) == (VA + 1, "r", CODE)
    assert isinstance(stop, CpuAbort)
    assert (stop.fault.kind, stop.fault.stage) == (ALIGNMENT, 1)


def test_translations_are_kept_within_a_run_and_asked_again_in_the_next() -> None:
    machine = Machine("mov x2, #100\nagain: ldr x1, [x0]\nsubs x2, x2, #1\nb.ne again\nhvc #0\nldr x1, [x0]\nhvc #1")
    machine.map(VA, DATA)
    assert machine.run(x0=VA) == Hvc(0)
    assert [each for each in machine.asked if each[1] == "r"] == [(VA, "r", 1)]
    machine.map(VA, DATA + PAGE)
    machine.ram.write64(DATA + PAGE, 77)
    assert machine.run() == Hvc(1)
    assert machine.cpu.x(1) == 77


def test_a_call_from_a_page_that_is_no_longer_mapped_has_its_immediate() -> None:
    machine = Machine()
    machine.map(VA, DATA, "x")
    machine.ram.write(DATA, assemble("tlbi vmalle1\nstr x1, [x0]\nhvc #0x77").data)
    machine.map(VA + PAGE, DATA + PAGE)
    translate = machine.translate

    def unmapping(va: int, access: str, el: int) -> tuple[int, int, bool, bool, bool]:
        if access == "w":
            machine.pages.pop(VA // PAGE)       # what the store does to the tables
        return translate(va, access, el)

    machine.cpu.translate = unmapping
    machine.cpu.pc = VA
    assert machine.run(x0=VA + PAGE) == Hvc(0x77)
    assert abort(machine.run()) == (VA + 12, "x", VA + 12)


def test_a_mapping_far_up_in_a_large_ram() -> None:
    machine = Machine("str x1, [x0]\nldr x2, [x0]\nhvc #0", size=1 << 40)
    top = BASE + (1 << 40) - PAGE
    machine.map(VA, top)
    assert machine.run(x0=VA, x1=99) == Hvc(0)
    assert (machine.cpu.x(2), machine.ram.read64(top)) == (99, 99)


# -- code that changes -----------------------------------------------------------------------------------------------

def test_code_written_behind_the_cpu_is_executed() -> None:
    machine = Machine("mov x0, #1\nhvc #0")
    assert (machine.run(), machine.cpu.x(0)) == (Hvc(0), 1)
    for value in (2, 3):
        machine.load(f"mov x0, #{value}\nhvc #0")
        assert (machine.run(), machine.cpu.x(0)) == (Hvc(0), value)
    machine.load("bl there\nhvc #0\n.org 0x80002000\nthere: mov x0, #4\nret")
    assert (machine.run(), machine.cpu.x(0)) == (Hvc(0), 4)
    machine.ram.write(CODE + 0x2000, assemble("mov x0, #5").data)
    machine.cpu.pc = CODE
    assert (machine.run(), machine.cpu.x(0)) == (Hvc(0), 5)


def test_code_written_by_the_cpu_itself_is_executed() -> None:
    machine = Machine("adr x1, patch\nbl patch\nldr w2, =0xd2800140\nstr w2, [x1]\nic ivau, x1\nisb\nbl patch\nhvc #0\n"
                      "patch: mov x0, #1\nret")
    assert machine.run() == Hvc(0)
    assert machine.cpu.x(0) == 10
    machine.cpu.pc = CODE
    machine.ram.write(machine.symbols["patch"], assemble("mov x0, #1").data)
    assert machine.cpu.run(instructions=3) == Counted()
    assert machine.cpu.x(0) == 1


# -- budgets ---------------------------------------------------------------------------------------------------------

def test_counts_are_exact() -> None:
    machine = Machine("again: add x0, x0, #1\nadd x1, x1, #1\nb again")
    for count in (1, 2, 3, 4, 5, 1000, 1001, (1 << 20) + 1, 3 << 20):
        machine.cpu.pc = CODE
        machine.cpu.set_x(0, 0)
        machine.cpu.set_x(1, 0)
        assert machine.cpu.run(instructions=count) == Counted()
        found = machine.cpu.x(0), machine.cpu.x(1), machine.cpu.pc
        assert found == (-(-count // 3), (count + 1) // 3, CODE + count % 3 * 4)
    assert machine.cpu.run(instructions=0) == Counted()


def test_the_last_instruction_does_not_answer_for_the_next() -> None:
    machine = Machine()
    machine.map(VA, DATA, "rx")
    machine.ram.write(DATA + PAGE - 8, assemble("nop\nldr x1, [x0]").data)
    machine.cpu.pc = VA + PAGE - 8
    machine.cpu.set_x(0, VA)
    assert machine.cpu.run(instructions=2) == Counted()
    assert machine.cpu.pc == VA + PAGE
    assert abort(machine.cpu.run(instructions=1)) == (VA + PAGE, "x", VA + PAGE)
    machine.load("hvc #3")
    assert machine.cpu.run(instructions=1) == Hvc(3)


@pytest.mark.parametrize("source", ["b .", "again: wfe\nb again", "again: ldr x1, [x0]\nadd x0, x0, #4096\nb again",
                                    "again: nop\nb again", "again: ldxr x1, [x2]\nstxr w3, x1, [x2]\nb again"])
def test_a_timeout_ends_any_loop(source: str) -> None:
    machine = Machine(source)
    machine.cpu.translate = lambda va, access, el: (BASE + va % (1 << 20), PAGE, True, True, True)
    machine.cpu.set_x(2, DATA)
    for timeout in (0.0, 0.02, 0.2):
        start = time.monotonic()
        assert machine.cpu.run(timeout=timeout) == Expired()
        assert timeout <= time.monotonic() - start


def test_a_timeout_does_not_hide_what_came_first() -> None:
    machine = Machine("hvc #1\nb .")
    assert machine.cpu.run(timeout=300) == Hvc(1)
    assert machine.cpu.run(timeout=0.01) == Expired()
    assert machine.cpu.run(timeout=300, instructions=10) == Counted()


def test_who_has_executed_all_that_was_asked_for_was_not_interrupted() -> None:
    machine = Machine("nop\nnop")
    machine.cpu.kicked = lambda: True
    assert machine.cpu.run(instructions=1) == Counted()
    assert machine.cpu.run(instructions=2) == Expired()


# -- registers and exceptions ----------------------------------------------------------------------------------------

def test_registers_hold_64_bits() -> None:
    machine = Machine("hvc #0")
    for n in range(31):
        machine.cpu.set_x(n, (n << 56) - 1)
    assert [machine.cpu.x(n) for n in range(31)] == [(n << 56) - 1 & (1 << 64) - 1 for n in range(31)]
    for name in ("SCTLR_EL1", "TCR_EL1", "TTBR0_EL1", "TTBR1_EL1", "MAIR_EL1", "VBAR_EL1", "ESR_EL1", "FAR_EL1", "ELR_EL1"):
        machine.cpu.set_sysreg(name, 0x1234_5000)
        assert machine.cpu.sysreg(name) == 0x1234_5000


def test_the_cpu_and_the_guest_see_the_same_system_registers() -> None:
    names = ("sctlr_el1", "tcr_el1", "ttbr0_el1", "ttbr1_el1", "mair_el1", "vbar_el1", "esr_el1", "far_el1", "elr_el1",
             "spsr_el1", "contextidr_el1", "tpidr_el1", "sp_el0")
    machine = Machine("".join(f"msr {name}, x0\nmrs x{n + 1}, {name}\n" for n, name in enumerate(names)) + "hvc #0")
    assert machine.run(x0=0x30d0_0800) == Hvc(0)
    assert [machine.cpu.sysreg(name.upper()) for name in names] == [0x30d0_0800] * len(names)
    assert [machine.cpu.x(n + 1) for n in range(len(names))] == [0x30d0_0800] * len(names)


def test_tlb_invalidations_are_reported_and_take_effect() -> None:
    machine = Machine("ldr x1, [x0]\nhvc #0\nldr x1, [x0]\ntlbi vae1is, x5\ndsb ish\nldr x2, [x0]\ntlbi vmalle1\nhvc #1")
    machine.map(VA, DATA)
    machine.ram.write64(DATA + PAGE, 5)
    assert machine.run(x0=VA) == Hvc(0)
    machine.cpu.tlbi = lambda name, value: (machine.invalidated.append((name, value)), machine.map(VA, DATA + PAGE))[0]
    assert machine.run(x5=VA >> 12 & (1 << 44) - 1) == Hvc(1)
    assert (machine.cpu.x(1), machine.cpu.x(2)) == (0, 5)
    assert machine.invalidated == [("VAE1IS", VA >> 12 & (1 << 44) - 1), ("VMALLE1", 0)]


def test_a_guest_maps_itself_and_turns_its_mmu_on() -> None:
    machine = Machine("""
            mov     x0, #0x80200000         // level 1 table, 1 GiB blocks
            ldr     x1, =0x80000000 | 1 << 10 | 3 << 8 | 1
            str     x1, [x0, #16]
            str     x1, [x0, #64]           // VA 0x2_0000_0000: the same memory
            msr     ttbr0_el1, x0
            mov     x1, #0xff
            msr     mair_el1, x1
            ldr     x1, =2 << 32 | 1 << 23 | 25
            msr     tcr_el1, x1
            isb
            mrs     x1, sctlr_el1
            orr     x1, x1, #1
            msr     sctlr_el1, x1
            isb
            ldr     x2, =0x200300000
            mov     x3, #42
            str     x3, [x2]
            ldr     x4, =0x240000000
            ldr     x5, [x4]
    """)
    cpu = machine.cpu

    def translate(va: int, access: str, el: int) -> tuple[int, int, bool, bool, bool]:
        regime = Stage1(Tcr.decode(cpu.sysreg("TCR_EL1")), cpu.sysreg("TTBR0_EL1"), cpu.sysreg("TTBR1_EL1"),
                        enabled=bool(cpu.sysreg("SCTLR_EL1") & 1))
        found = walk(machine.ram, va, access, el, regime, None)
        return found.pa, found.size, found.readable, found.writable, found.executable

    cpu.translate = translate
    stop = machine.run()
    assert abort(stop) == (0x2_4000_0000, "r", cpu.pc)
    assert isinstance(stop, CpuAbort)
    assert (stop.fault.kind, stop.fault.level) == (TRANSLATION, 1)
    assert machine.ram.read64(0x8030_0000) == 42


def test_an_abort_is_delivered_to_the_guest_and_eret_returns() -> None:
    machine = Machine("""
            adr     x9, vectors
            msr     vbar_el1, x9
            cmp     x9, x9
            ldr     x1, [x0]                // aborts
            cset    w2, eq
            hvc     #0
            .balign 2048
    vectors: .space 0x200
            mrs     x3, esr_el1
            mrs     x4, far_el1
            mrs     x5, elr_el1
            mrs     x6, spsr_el1
            mrs     x7, daif
            add     x5, x5, #4
            msr     elr_el1, x5
            eret
    """)
    machine.cpu.pstate = 0x5                # EL1h, nothing masked
    stop = machine.run(x0=VA + 0x123, x1=1)
    assert isinstance(stop, CpuAbort)
    machine.cpu.take_exception(stop.fault.esr_el1(), stop.fault.far)
    assert machine.cpu.pc == machine.symbols["vectors"] + 0x200
    assert machine.run() == Hvc(0)
    assert machine.cpu.x(3) == 0x9600_0007
    assert machine.cpu.x(4) == VA + 0x123
    assert machine.cpu.x(6) & 0xf000_03cf == 0x6000_0005
    assert machine.cpu.x(7) == 0x3c0
    assert (machine.cpu.x(1), machine.cpu.x(2)) == (1, 1)


def test_el0_and_back() -> None:
    machine = Machine("""
            adr     x9, user
            msr     elr_el1, x9
            msr     spsr_el1, xzr
            ldr     x9, =0x80009000
            msr     sp_el0, x9
            eret
    user:   mov     x1, sp
            ldr     x2, [x0]
            svc     #5
            .balign 2048
    vectors: .space 0x400
            mrs     x3, esr_el1
            mov     x4, sp
            mrs     x5, sp_el0
            hvc     #1
    """)
    machine.map(VA, DATA)
    machine.cpu.set_sysreg("VBAR_EL1", machine.symbols["vectors"])
    assert machine.run(x0=VA) == Svc(5)
    assert (machine.cpu.el, machine.cpu.x(1)) == (0, 0x8000_9000)
    assert (VA, "r", 0) in machine.asked
    machine.cpu.take_exception(0x15 << 26 | 1 << 25 | 5)
    assert machine.cpu.el == 1
    assert machine.run() == Hvc(1)
    assert (machine.cpu.x(3), machine.cpu.x(4), machine.cpu.x(5)) == (0x5600_0005, CODE + 0x8000, 0x8000_9000)


def test_hypercalls_and_traps_are_not_for_el0() -> None:
    for source in ("hvc #0", "msr ttbr0_el1, x0", "tlbi vmalle1"):
        machine = Machine(source)
        machine.cpu.pstate = 0
        assert machine.run() == Undefined(CODE)
        assert machine.invalidated == []
        assert machine.cpu.sysreg("TTBR0_EL1") == 0


def test_sp_is_banked_by_pstate() -> None:
    machine = Machine("mov x0, sp\nhvc #0")
    machine.cpu.sp = 0x1000
    machine.cpu.pstate = 0x3c4              # EL1t: SP_EL0
    machine.cpu.sp = 0x2000
    assert machine.run() == Hvc(0)
    assert machine.cpu.x(0) == 0x2000
    machine.cpu.pstate = 0x3c5
    assert machine.cpu.sp == 0x1000
    machine.cpu.take_exception(0)
    assert (machine.cpu.sp, machine.cpu.pc) == (0x1000, 0x200)


# -- what an instruction says about its access -----------------------------------------------------------------------

@pytest.mark.parametrize(("source", "transfer"), [
    ("ldr x1, [x2]", (False, 8, 1, False, True)), ("ldr w1, [x2, #4]", (False, 4, 1, False, False)),
    ("str x3, [x2], #8", (True, 8, 3, False, True)), ("strb wzr, [x2]", (True, 1, 31, False, False)),
    ("ldrh w4, [x2, #2]!", (False, 2, 4, False, False)), ("ldrsb x5, [x2]", (False, 1, 5, True, True)),
    ("ldrsb w5, [x2]", (False, 1, 5, True, False)), ("ldrsw x6, [x2, x3]", (False, 4, 6, True, True)),
    ("ldur x7, [x2, #1]", (False, 8, 7, False, True)), ("sturh w8, [x2, #-1]", (True, 2, 8, False, False)),
    ("strb w9, [x2, w3, uxtw]", (True, 1, 9, False, False)),
    ("ldp x1, x2, [x3]", None), ("ldxr x1, [x2]", None), ("add x1, x2, x3", None), ("ldr x0, 0x10", None),
    (".word 0xf8210003", None), (".word 0x3dc00400", None), (".word 0xf9800000 // prfm", None), ("b .", None),
])
def test_single_transfers_are_decoded(source: str, transfer: tuple[bool, int, int, bool, bool] | None) -> None:
    word = int.from_bytes(assemble(source).data[:4], "little")
    assert access_of(word) == transfer
    assert writes_back(word) == ("!" in source or "], #" in source)


def test_a_device_read_is_extended_as_the_load_says() -> None:
    word = int.from_bytes(assemble("ldrsb x5, [x2]").data, "little")
    signed, plain = access_of(word), access_of(int.from_bytes(assemble("ldrb w5, [x2]").data, "little"))
    assert signed is not None
    assert plain is not None
    assert (signed.extend(0x1ff), plain.extend(0x1ff)) == ((1 << 64) - 1, 0xff)


def test_a_transfer_is_what_a_syndrome_reports() -> None:
    transfer = access_of(int.from_bytes(assemble("ldrsb w5, [x2]").data, "little"))
    assert transfer is not None
    fault = Fault(TRANSLATION, 3, 2, va=VA, ipa=DATA, access="r", el=1)
    assert fault.esr_el2(transfer.load_store) == 0x24 << 26 | 1 << 25 | 1 << 24 | 1 << 21 | 5 << 16 | 7


@pytest.mark.parametrize(("word", "address"), [
    (0x58000041, 0x1008), (0x58ffffc1, 0xff8), (0x58800001, (0x1000 - (1 << 20)) % (1 << 64)),    # LDR X1, label
    (0x587fffe1, 0x1000 + (1 << 20) - 4),
    (0xd95ff041, 2 - 1), (0xd91ff041, 2 - 1), (0x994ff041, 2 + 0xff),       # LDAPUR, STLUR, LDAPURSW [X2, #imm9]
])
def test_a_literal_is_beside_the_code_and_an_unscaled_offset_at_the_base(word: int, address: int) -> None:
    assert address_of(word, 0x1000, lambda n: n, lambda: 0) == address


def test_what_accesses_nothing_has_no_address() -> None:
    for source in ("add x0, x1, x2", "b .", "mov x0, #1", "hvc #0", "mrs x0, esr_el1", "tlbi vmalle1", "eret"):
        assert address_of(int.from_bytes(assemble(source).data, "little"), 0, lambda n: n, lambda: 0) is None

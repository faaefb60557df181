"""What the kernel prints when it dies. Here are the forms of the messages, and when an oops is a panic.

arch/arm64/mm/fault.c (mem_abort_decode, show_pte), arch/arm64/kernel/traps.c (die), process.c (__show_regs).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from guest_memfd.machine.hw.arm64.descriptor import Entry
from guest_memfd.machine.hw.arm64.syndrome import Syndrome
from guest_memfd.machine.linux.extable import Registers
from guest_memfd.machine.linux.panic import HARDWARE
from guest_memfd.words.units import Va

TASK_SIZE = 1 << 48
PAGE_OFFSET = Va(0xFFFF_0000_0000_0000)

_CLASSES = {0x20: "IABT (lower EL)", 0x21: "IABT (current EL)", 0x24: "DABT (lower EL)", 0x25: "DABT (current EL)"}
_LEVELS = ("pgd", "pud", "pmd", "pte")
_SIGSEGV = 11


@dataclass(frozen=True)
class Oops:
    """The task that ran is killed; the kernel goes on, without whatever locks it held."""

    text: str


@dataclass(frozen=True)
class Panic:
    """The machine is dead."""

    text: str


class PtRegs(Registers, Protocol):
    """struct pt_regs: what was interrupted. x(30) is the link register."""

    sp: int
    pstate: int


class Reporter(Protocol):
    """What die() and show_pte() ask of a kernel."""

    panic_on_oops: bool
    in_interrupt: bool
    die_counter: int
    cpu: int
    pid: int
    comm: str
    uname: str

    def symbol_at(self, pc: int) -> str:
        """As %pS prints an address."""

    def page_table(self, va: Va) -> tuple[int, Sequence[Entry]] | None:
        """Root and entries of the tables that translate *va*; None: no user address space is active."""

    def modules(self) -> str:
        """Names of the loaded modules."""


def user_mode(regs: PtRegs) -> bool:
    """Whether PSTATE.M says EL0: the fault came from user space."""
    return regs.pstate & 0xF == 0


def mem_abort_decode(esr: int, name: str) -> list[str]:
    """ESR taken apart; *name* is the fault's in fault_info[]."""
    s = Syndrome.decode(esr)
    lines = ["Mem abort info:",
             f"  ESR = {esr:#018x}",
             f"  EC = {s.ec:#04x}: {_CLASSES.get(s.ec, 'UNRECOGNIZED EC')}, IL = {32 if s.il else 16} bits",
             f"  SET = {s.iss >> 11 & 3}, FnV = {int(s.fnv)}",
             f"  EA = {int(s.ea)}, S1PTW = {int(s.s1ptw)}",
             f"  FSC = {s.iss & 63:#04x}: {name}"]
    if not s.data_abort:
        return lines
    lines.append("Data abort info:")
    if s.isv:
        lines += [f"  Access size = {1 << s.sas} byte(s)",
                  f"  SSE = {int(s.sse)}, SRT = {s.srt}",
                  f"  SF = {int(s.sf)}, AR = {int(s.ar)}"]
    else:
        lines.append(f"  ISV = 0, ISS = {s.iss:#010x}, ISS2 = {s.iss2:#010x}")
    return [*lines,
            f"  CM = {int(s.cache_maintenance)}, WnR = {int(s.write)}, TnD = {s.iss2 >> 10 & 1}, "
            f"TagAccess = {s.iss2 >> 9 & 1}",
            f"  GCS = {s.iss2 >> 8 & 1}, Overlay = {s.iss2 >> 6 & 1}, DirtyBit = {s.iss2 >> 5 & 1}, Xs = {s.iss2 & 31}"]


def show_pte(va: Va, kernel: Reporter) -> list[str]:
    """The page table entries of *va*, down to the first that is no table."""
    if TASK_SIZE <= va < PAGE_OFFSET:
        return [f"[{va:016x}] address between user and kernel address ranges"]
    found = kernel.page_table(va)
    if found is None:
        return [f"[{va:016x}] user address but active_mm is swapper"]
    root, path = found
    entries = ", ".join(f"{_LEVELS[e.level]}={e.value:016x}" + (f", p4d={e.value:016x}" if e.level == 0 and e.value else "")
                        for e in path)
    return [f"{'user' if va < TASK_SIZE else 'swapper'} pgtable: 4k pages, 48-bit VAs, pgdp={root:016x}",
            f"[{va:016x}] {entries}"]


def show_regs(regs: PtRegs, kernel: Reporter) -> list[str]:
    """The lines that __show_regs() prints: PSTATE, pc, lr, sp, and x29 to x0, three to a line."""
    flags = "".join(name.upper() if regs.pstate >> bit & 1 else name
                    for name, bit in (("n", 31), ("z", 30), ("c", 29), ("v", 28)))
    masks = "".join(name.upper() if regs.pstate >> bit & 1 else name
                    for name, bit in (("d", 9), ("a", 8), ("i", 7), ("f", 6)))
    extra = " ".join(f"{'+' if regs.pstate >> bit & 1 else '-'}{name}"
                     for name, bit in (("PAN", 22), ("UAO", 23), ("TCO", 25), ("DIT", 24), ("SSBS", 12)))
    lines = [f"pstate: {regs.pstate:08x} ({flags} {masks} {extra} BTYPE=--)",
             f"pc : {kernel.symbol_at(regs.pc)}",
             f"lr : {kernel.symbol_at(regs.x(30))}",
             f"sp : {regs.sp:016x}"]
    lines += [" ".join(f"x{n:<2}: {regs.x(n):016x}" for n in (top, top - 1, top - 2)) for top in range(29, 0, -3)]
    return lines


def die(what: str, esr: int, regs: PtRegs, kernel: Reporter, before: Sequence[str] = ()) -> Oops | Panic:
    """die(): the oops, and what becomes of it. *before* are the lines that were printed already."""
    kernel.die_counter += 1
    lines = [*before,
             f"Internal error: {what}: {esr:016x} [#{kernel.die_counter}] SMP",
             f"Modules linked in:{kernel.modules()}",
             f"CPU: {kernel.cpu} UID: 0 PID: {kernel.pid} Comm: {kernel.comm} Not tainted {kernel.uname}",
             HARDWARE,
             *show_regs(regs, kernel),
             "Call trace:",
             f" {kernel.symbol_at(regs.pc)} (P)",
             f" {kernel.symbol_at(regs.x(30))}",
             "---[ end trace 0000000000000000 ]---"]
    # There is no task that could be killed in its place.
    if kernel.in_interrupt:
        return panic(f"{what}: Fatal exception in interrupt", lines)
    if kernel.panic_on_oops:
        return panic(f"{what}: Fatal exception", lines)
    # make_task_dead()
    if kernel.pid == 0:
        return panic("Attempted to kill the idle task!", lines)
    if kernel.pid == 1:
        return panic(f"Attempted to kill init! exitcode={_SIGSEGV:#010x}", lines)
    return Oops("\n".join(lines))


def panic(why: str, before: Sequence[str] = ()) -> Panic:
    """panic(): nothing runs after this."""
    return Panic("\n".join([*before, f"Kernel panic - not syncing: {why}"]))

"""Host code runs: kernel text at EL1, the VMM at EL0, on Unicorn through our walker and the TLB of one of the CPUs.

The file decides who takes an abort. Stage 1 is the kernel's (linux/mem_abort.py). Stage 2 is EL2's first: it maps the
page, or has the abort delivered to EL1 with a syndrome of its choice, which is then the kernel's again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from guest_memfd.machine.hw.arm64 import cpu as c
from guest_memfd.machine.hw.arm64.fault import TRANSLATION, Fault
from guest_memfd.machine.hw.arm64.mmu import Mmu
from guest_memfd.machine.hw.arm64.permission import Access
from guest_memfd.machine.hw.arm64.registers import Tcr
from guest_memfd.machine.hw.arm64.syndrome import Syndrome
from guest_memfd.machine.hw.arm64.walk import Entry, Stage1
from guest_memfd.machine.linux import mem_abort
from guest_memfd.machine.linux.mem_abort import KernelDied, MmFault
from guest_memfd.machine.linux.mm import LOAD, STORE
from guest_memfd.machine.linux.oops import TASK_SIZE, Oops, Panic
from guest_memfd.machine.linux.panic import HARDWARE, KernelPanic
from guest_memfd.words.units import PAGE, Pa, Va

if TYPE_CHECKING:
    from guest_memfd.machine.board.board import Board

RETURN = 0xFFFF_FFFF_FFFF_F000
"""Link register of a call: nothing is mapped there, and being fetched from there is how a call ends."""

LOCKUP = 10_000
"""Aborts of one call of kernel text, each of which is to be tried again, before the watchdog steps in."""

TLB_SIZE = 2048
"""Fills after which a CPU has nothing of what it had before."""

_EL1H, _EL0T = 0x3C5, 0x3C0
_DFSC_EXTERNAL = 0x10
_SIGNALS = {7: "SIGBUS", 11: "SIGSEGV", 9: "SIGKILL"}


@dataclass(frozen=True)
class Aborted:
    """An abort taken to EL1: the syndrome and the address it saw, the stage that refused, the entries on the way."""

    esr: int
    far: Va
    stage: int
    path: tuple[Entry, ...]

    @property
    def external(self) -> bool:
        """Whether EL1 was told of an external abort."""
        return self.esr & 0x3F == _DFSC_EXTERNAL

    def words(self) -> str:
        """The evidence in one line."""
        leaf = f", entry {self.path[-1].value:#018x} at level {self.path[-1].level}" if self.path else ""
        return f"{Syndrome.decode(self.esr)!r}, FAR {self.far:#018x}{leaf}"


@dataclass(frozen=True)
class Ran:
    """How a call ended: x0, whether the exception table stepped in, whether a page was reclaimed by force on the way.

    `signal`: what the task at EL0 gets, with si_code and si_addr in `siginfo`; ``fault`` for the fault handler of its VMA.
    `reached`: the physical addresses at which data accesses arrived, in order.
    """

    x0: int
    fixed: bool = False
    reclaimed: bool = False
    signal: str | None = None
    reached: tuple[Pa, ...] = ()
    siginfo: mem_abort.UserSignal | None = None


class HostCpu:
    """The CPUs of the host, one instruction stream at a time; `current` is the one whose TLB is used.

    It is also what the kernel's abort handlers ask (linux/mem_abort.py Kernel).
    """

    in_interrupt = False
    panic_on_oops = True
    pagefault_disabled = False
    pid, comm, cpu = 1187, "cat", 1
    uname = "7.3.0-guest-memfd #1"

    def __init__(self, machine: Board, *, sea_fixup: bool, pkvm: bool) -> None:
        self.machine, self.sea_fixup, self.pkvm = machine, sea_fixup, pkvm
        self.extable = machine.text.extable
        self.die_counter = 0
        self.current = 0
        self.aborts: list[Aborted] = []
        self.mmus = [Mmu(machine.ram, tlb) for tlb in machine.tlbs]
        self.stage1 = Stage1(Tcr(), machine.vmm.ttbr0, machine.linear_map.root)
        self.core = c.Cpu(machine.ram, self._translate)
        self._reached: list[Pa] = []
        self._fills = 0
        self._reclaimed = False

    # Unicorn asks for every page that an instruction touches.
    def _translate(self, va: Va, access: Access, el: int) -> tuple[Pa, int, bool, bool, bool]:
        # Not a fault of anybody: the call has returned to where nothing is mapped, and this is how it is noticed.
        if va == RETURN:
            raise Fault(TRANSLATION, 0, 1, va=va, access=access, el=el)
        self._evict()
        found = self.mmus[self.current].translate(va, access, el, self.stage1, self.machine.el2.stage2())
        # Only data: where the instruction itself lies is not what the laws ask about.
        if access != "x":
            self._reached.append(found.pa)
        return found.pa, found.size, found.readable, found.writable, found.executable

    # A TLB that forgets nothing is for lock step; a machine that runs has one of a size.
    def _evict(self) -> None:
        self._fills += 1
        # A TLB that forgets nothing would hold one entry for each page of a guest that runs for minutes.
        if not self.machine.watched and self._fills % TLB_SIZE == 0:
            self.machine.tlbs[self.current].clear()

    # -- calls ---------------------------------------------------------------------------------------------------

    def call(self, symbol: str, *arguments: int) -> Ran:
        """Call kernel function *symbol* (linux/text.py); raises KernelPanic when an abort ends the kernel."""
        self.aborts, self._reached = [], []
        core = self.core
        core.pstate = _EL1H
        for n in range(3):
            core.set_x(n, arguments[n] if n < len(arguments) else 0)
        core.set_x(30, RETURN)
        core.pc = self.machine.text.va(symbol)
        fixed = self._run()
        return Ran(core.x(0), fixed, self._reclaimed, None, tuple(self._reached))

    def user(self, va: Va, write: bool, value: int = 0) -> Ran:
        """One load or store of the VMM at *va*; what stops it is in `signal`."""
        self.aborts, self._reached = [], []
        core = self.core
        core.pstate = _EL0T
        core.set_x(0, va)
        core.set_x(1, value)
        core.pc = STORE if write else LOAD
        signal, siginfo = self._run_user()
        return Ran(core.x(1), signal=signal, reached=tuple(self._reached), siginfo=siginfo)

    # What stops the CPU, one after the other; it goes on when the next is asked for. The watchdog ends what never ends.
    def _stops(self) -> Iterator[c.Stop]:
        for _ in range(LOCKUP):
            yield self.core.run()
        raise KernelPanic(f"watchdog: BUG: soft lockup - CPU#{self.cpu} stuck for 26s! [{self.comm}:{self.pid}]\n"
                          f"{HARDWARE}\npc : {self.symbol_at(self.core.pc)}\n"
                          "Kernel panic - not syncing: softlockup: hung tasks")

    # What becomes of each abort of kernel text, up to its return.
    def _kernel_aborts(self) -> Iterator[mem_abort.Outcome | None]:
        for stop in self._stops():
            if not isinstance(stop, c.CpuAbort):
                raise KernelPanic(f"kernel text stops with {stop!r} at {self.symbol_at(self.core.pc)}\n{HARDWARE}")
            if stop.pc == RETURN:
                return
            yield self._abort(stop.fault)

    # To the return address; True when the exception table was used on the way.
    def _run(self) -> bool:
        fixed = self._reclaimed = False
        for outcome in self._kernel_aborts():
            if isinstance(outcome, mem_abort.Fixed):
                fixed = True
            elif isinstance(outcome, (Oops, Panic)):
                raise KernelPanic(outcome.text)
        return fixed

    def _run_user(self) -> tuple[str | None, mem_abort.UserSignal | None]:
        for stop in self._stops():
            if not isinstance(stop, c.CpuAbort):
                if isinstance(stop, c.Svc):
                    break
                raise KernelPanic(f"the VMM's text stops with {stop!r}\n{HARDWARE}")
            outcome = self._abort(stop.fault)
            if isinstance(outcome, mem_abort.UserSignal):
                return ("fault", None) if self._missing(stop.fault) else (_SIGNALS[outcome.signal], outcome)
        return None, None

    # A stage-1 fault at EL0 on a VMA is the library's to handle: the code that drives the VMM calls its fault procedure.
    @staticmethod
    def _missing(fault: Fault) -> bool:
        return fault.stage == 1

    def _abort(self, fault: Fault) -> mem_abort.Outcome | None:
        machine = self.machine
        far = fault.far
        # The linear map is built when it is first needed; to the kernel it was there from boot.
        if fault.stage == 1 and machine.linear_map.covers(far) and machine.linear_map.fault_in(far):
            return None
        if fault.stage == 2:
            inject = machine.el2.host_abort(fault, fault.el)
            # EL2 has mapped the page, or another CPU has: the instruction runs again.
            if inject is None:
                return None
            esr, far = inject.esr, inject.far
        else:
            esr = fault.esr_el1()
        self.aborts.append(Aborted(esr, far, fault.stage, tuple(self.path(far))))
        return mem_abort.do_mem_abort(esr, far, self.core, self)

    def path(self, va: Va) -> Sequence[Entry]:
        """Stage-1 entries on the way to *va*."""
        found = self.page_table(va)
        return found[1] if found else ()

    # -- what the abort handlers ask ------------------------------------------------------------------------------

    def read_aligned(self, va: Va) -> int:
        """The zero-padding handler's own load, on the CPU; raises KernelDied when that dies."""
        core = self.core
        saved = [core.x(n) for n in range(31)], core.pc
        core.set_x(0, va)
        core.set_x(30, RETURN)
        core.pc = self.machine.text.va("ex_handler_load_unaligned_zeropad")
        for outcome in self._kernel_aborts():
            if isinstance(outcome, (Oops, Panic)):
                raise KernelDied(outcome)
        word = core.x(0)
        for n, value in enumerate(saved[0]):
            core.set_x(n, value)
        core.pc = saved[1]
        return word

    def at_s1e1r(self, va: Va) -> Pa | None:
        """AT S1E1R: stage 1 alone."""
        try:
            return self.mmus[self.current].at_s1(va, "r", 1, self.stage1, self.machine.el2.stage2()).pa
        except Fault:
            return None

    def force_reclaim(self, pa: Pa) -> int:
        """__pkvm_force_reclaim_guest_page() of the page of *pa*; a success is remembered, the access will be tried again."""
        ret = self.machine.driver.force_reclaim(pa & -PAGE)
        self._reclaimed = self._reclaimed or ret == 0
        return ret

    def handle_mm_fault(self, va: Va, access: str, user: bool) -> MmFault:
        """A user address has a VMA only where the VMM maps a file; its fault handler is a procedure, and runs later."""
        return MmFault.SIGBUS

    def symbol_at(self, pc: int) -> str:
        """As %pS prints an address."""
        return "guest_memfd_reader+0x2c/0x40" if pc == RETURN else self.machine.text.symbol_at(pc)

    def page_table(self, va: Va) -> tuple[int, Sequence[Entry]] | None:
        """Root and entries of the tables that translate *va*."""
        lm = self.machine.linear_map
        if va >= TASK_SIZE:
            return lm.root, lm.path(va)
        return self.machine.vmm.table.root, ()

    def modules(self) -> str:
        """Names of the loaded modules."""
        return "".join(f" {name}" for name in self.machine.modules.modules)

"""Running a vCPU on the host's time: what ends a run, and what the host says when it goes on. This is vcpu_run.

The loop reads like a hypervisor's: enter the guest, look why it came out, handle it here or tell the host. Source:
docs/api/gunyah_api.md of the hypervisor, vcpu_run and the vCPU states; psci of hyp/vm/psci.
"""

from __future__ import annotations

import time
from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple, Protocol

from guest_memfd.machine.el2.gunyah.errors import GunyahError, HypRefused
from guest_memfd.machine.hw.arm64.access import Transfer
from guest_memfd.machine.hw.arm64.fault import ACCESS_FLAG, EXTERNAL_ABORT, PERMISSION, TRANSLATION, Fault
from guest_memfd.machine.hw.arm64.stop import Breakpoint, Bus, CpuAbort, Hvc, Smc, Stop, Svc, Undefined, Wfi
from guest_memfd.words.units import PAGE

if TYPE_CHECKING:
    from guest_memfd.machine.el2.gunyah.vm import GunyahHypVm

_EC_UNKNOWN, _EC_SVC, _EC_BRK = 0x00, 0x15, 0x3C
_IL = 1 << 25
SEA_FSC = 0x10
"""Synchronous external abort, not on a walk."""
# A guest that does nothing but trap gives way to the host now and then, as a timer would make it.
_EXITS_PER_RUN = 1 << 16


class VcpuState(IntEnum):
    """Why vcpu_run came back."""

    READY = 0
    EXPECTS_WAKEUP = 1
    POWERED_OFF = 2
    BLOCKED = 3
    VMMIO_READ = 4
    VMMIO_WRITE = 5
    FAULT = 6
    PAGE_FAULT = 7
    PSCI_SYSTEM_RESET = 0x100


class Action(IntEnum):
    """What the host wants done about a fault; for a page fault EMULATE is the default, which is to retry."""

    EMULATE = 0
    RETRY = 1
    FAULT = 2


class GunyahRun(NamedTuple):
    """State and the three words that go with it.

    VMMIO_READ: IPA, bytes. VMMIO_WRITE: IPA, bytes, value. PAGE_FAULT: IPA of the page, access (0 read, 1 write,
    2 execute), 1 if the page is mapped and the permissions do not suffice. FAULT: IPA.
    """

    state: VcpuState
    data: tuple[int, int, int] = (0, 0, 0)


class GunyahGuestCpu(Protocol):
    """The CPU that executes the guest, at EL1 or EL0, translating through the VM's stage 2."""

    @property
    def pc(self) -> int:
        """Address of the next instruction."""

    @pc.setter
    def pc(self, value: int) -> None: ...

    @property
    def el(self) -> int:
        """The exception level that the guest is at, 0 or 1."""

    def run(self, budget: float | None, /) -> Stop:
        """Execute for up to *budget* seconds (None: no limit) and say what stopped it."""

    def x(self, n: int, /) -> int:
        """The value of general register *n*, 0 to 30."""

    def set_x(self, n: int, value: int, /) -> None:
        """Write 64 bits to general register *n*, 0 to 30."""

    def transfer(self) -> Transfer | None:
        """What the syndrome of the abort just reported says of the access; None when ISV would be 0."""

    def take_exception(self, esr: int, far: int | None = None, /) -> None:
        """Deliver an exception to EL1."""


class GunyahHypVcpu:
    """One virtual CPU. *budget*: seconds of guest execution before the host gets its CPU back."""

    def __init__(self, vm: GunyahHypVm, cpu: GunyahGuestCpu, budget: float | None = None) -> None:
        self.vm, self.cpu, self.budget = vm, cpu, budget
        self.last = GunyahRun(VcpuState.READY)
        self._transfer: Transfer | None = None
        self._fault: Fault | None = None

    def run(self, resume: tuple[int, int, int] = (0, 0, 0)) -> GunyahRun:
        """Go on from where the last run ended; *resume* answers it.

        After VMMIO_READ: value, action. After VMMIO_WRITE: -, action. After PAGE_FAULT: action; the other words are
        reserved. Raises HypRefused: UNIMPLEMENTED for reserved words, ARG_INVAL for an action that does not exist.
        """
        if self.last.state in (VcpuState.POWERED_OFF, VcpuState.FAULT, VcpuState.PSCI_SYSTEM_RESET):
            return self.last
        # A VM that has been stopped is no error of the call: the state says so.
        if not self.vm.running:
            return GunyahRun(VcpuState.BLOCKED)
        # The answer to the last exit is applied before the guest goes on, once. `last` is reset by it, so a repeated
        # run does not apply it again.
        self._resume(resume)
        end = None if self.budget is None else time.monotonic() + self.budget
        for _ in range(_EXITS_PER_RUN):
            run = self._handle(self.cpu.run(self.budget))
            if run is not None:
                break
            if end is not None and time.monotonic() >= end:
                run = GunyahRun(VcpuState.READY)
                break
        else:
            run = GunyahRun(VcpuState.READY)
        self.last = run
        return run

    # -- on the way in -------------------------------------------------------------------------------------------

    def _resume(self, resume: tuple[int, int, int]) -> None:
        state = self.last.state
        if state == VcpuState.PAGE_FAULT:
            if resume[1] or resume[2]:
                raise HypRefused(GunyahError.UNIMPLEMENTED, "resume words 2 and 3 of a page fault are reserved")
            if self._action(resume[0]) == Action.FAULT:
                self._abort_guest()
        elif state in (VcpuState.VMMIO_READ, VcpuState.VMMIO_WRITE):
            action = self._action(resume[1])
            if action == Action.FAULT:
                self._abort_guest()
            elif action == Action.EMULATE:
                self._emulate(resume[0])
        self.last = GunyahRun(VcpuState.READY)

    @staticmethod
    def _action(word: int) -> Action:
        if word not in (Action.EMULATE, Action.RETRY, Action.FAULT):
            raise HypRefused(GunyahError.ARG_INVAL, f"resume action {word:#x}")
        return Action(word)

    def _emulate(self, value: int) -> None:
        transfer = self._transfer
        assert transfer is not None
        # A load into the zero register has an effect on the device only.
        if not transfer.write and transfer.register < 31:
            self.cpu.set_x(transfer.register, transfer.extend(value))
        self.cpu.pc += 4

    # The guest sees a synchronous external abort at the address it used.
    def _abort_guest(self) -> None:
        assert self._fault is not None
        self._deliver(self._fault.esr_el1() & ~0xFF | SEA_FSC, self._fault.va)

    def _deliver(self, esr: int, far: int | None = None) -> None:
        self.cpu.take_exception(esr, far)

    # -- on the way out ------------------------------------------------------------------------------------------

    # None: handled, enter the guest again.
    def _handle(self, stop: Stop) -> GunyahRun | None:
        match stop:
            case CpuAbort(fault, _):
                return self._on_abort(fault)
            case Hvc() | Smc():
                return self._on_call()
            case Wfi():
                return GunyahRun(VcpuState.EXPECTS_WAKEUP)
            case Undefined():
                self._deliver(_EC_UNKNOWN << 26 | _IL)
            case Svc(imm):
                self._deliver(_EC_SVC << 26 | _IL | imm)
            case Breakpoint(imm):
                self._deliver(_EC_BRK << 26 | _IL | imm)
            case Bus(_, _, va, access):
                self._fault = Fault(EXTERNAL_ABORT, None, 2, va=va, access=access, el=self.cpu.el)
                self._abort_guest()
            case _:
                return GunyahRun(VcpuState.READY)
        return None

    def _on_abort(self, fault: Fault) -> GunyahRun | None:
        if fault.stage == 1:
            self._deliver(fault.esr_el1(), fault.va)
            return None
        assert fault.ipa is not None
        ipa = fault.ipa
        # An unlocked page that the guest touches again: locked, and the instruction runs once more. The host is not
        # told.
        if fault.kind in (ACCESS_FLAG, PERMISSION) and self.vm.space.touch(ipa, fault.access):
            return None
        self._fault = fault
        page = ipa & -PAGE
        kind = self.vm.space.ranges.kind(page, page + PAGE)
        # Outside of every configured range no one could do anything about it.
        if kind is None or fault.kind not in (TRANSLATION, ACCESS_FLAG, PERMISSION):
            return GunyahRun(VcpuState.FAULT, (ipa, 0, 0))
        self._transfer = self.cpu.transfer() if kind == "vmmio" and not fault.s1ptw and fault.access != "x" else None
        if self._transfer is None:
            access = {"r": 0, "w": 1, "x": 2}[fault.access]
            return GunyahRun(VcpuState.PAGE_FAULT, (page, access, int(fault.kind == PERMISSION)))
        transfer = self._transfer
        if not transfer.write:
            return GunyahRun(VcpuState.VMMIO_READ, (ipa, transfer.size, 0))
        value = 0 if transfer.register == 31 else self.cpu.x(transfer.register)
        return GunyahRun(VcpuState.VMMIO_WRITE, (ipa, transfer.size, value & (1 << 8 * transfer.size) - 1))

    def _on_call(self) -> GunyahRun | None:
        regs = [self.cpu.x(n) for n in range(18)]
        run = self.vm.guest_call(regs)
        if run is None:
            for n, value in enumerate(regs):
                self.cpu.set_x(n, value)
        return run

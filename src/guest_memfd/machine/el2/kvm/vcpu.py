"""Running a vCPU. What the guest did becomes an exit of KVM_RUN, or the guest's own exception.

What hardware would deliver to the guest's EL1 (stage-1 faults, SVC, BRK, undefined instructions) is delivered here;
stage-2 faults, HVC and SMC are the hypervisor's. Sources: arch/arm64/kvm/{handle_exit,mmio,mmu,psci,hypercalls}.c.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple, Protocol

from guest_memfd.distinct import distinct
from guest_memfd.machine.hw.arm64.access import Transfer, access_of, writes_back
from guest_memfd.machine.hw.arm64.cpu import (
    Breakpoint,
    Bus,
    Counted,
    CpuAbort,
    Hvc,
    Smc,
    Stop,
    Svc,
    Undefined,
)
from guest_memfd.machine.hw.arm64.cpu import Expired as OutOfTime
from guest_memfd.machine.hw.arm64.cpu import Wfi as Waits
from guest_memfd.machine.hw.arm64.fault import Fault
from guest_memfd.machine.hw.ram import BusError
from guest_memfd.words.units import Ipa, Va

NOT_SUPPORTED, INVALID_PARAMETER = -1, -3
"""SMCCC and PSCI return codes."""

PSCI_VERSION, PSCI_SYSTEM_OFF, PSCI_SYSTEM_RESET = 0x8400_0000, 0x8400_0008, 0x8400_0009
SMCCC_VERSION = 0x8000_0000
_VERSIONS = {PSCI_VERSION: 1 << 16 | 3, SMCCC_VERSION: 1 << 16 | 1}
"""PSCI 1.3 and SMCCC 1.1, as Linux 7.3.4 says it."""

_SEA = 0x10        # DFSC of a synchronous external abort that is not on a walk

# ESR_EL1 of what the CPU does not report as a fault: EC and IL; the immediate goes below.
_ESR = {Svc: 0x15 << 26 | 1 << 25, Breakpoint: 0x3c << 26 | 1 << 25, Undefined: 1 << 25}


@distinct
class MmioAccess(NamedTuple):
    """KVM_EXIT_MMIO: *size* bytes at *ipa*; *data* is what is written. A read waits for `Vcpu.complete_mmio`."""

    ipa: Ipa
    size: int
    write: bool
    data: int
    register: int


@distinct
class MemoryFaultExit(NamedTuple):
    """A stage-2 fault on memory that is bound there: the handler maps something, or returns -EFAULT."""

    ipa: Ipa
    write: bool
    exec: bool


@distinct
class SplitExit(NamedTuple):
    """The guest asks for something about the page at *ipa*, which is part of a block: the host is to have that split."""

    ipa: Ipa


@distinct
class SystemEventExit(NamedTuple):
    """KVM_EXIT_SYSTEM_EVENT: ``shutdown`` or ``reset``."""

    what: str


@distinct
class Hypercall(NamedTuple):
    """A hypercall that is the host's business, too: its number and its first argument."""

    number: int
    argument: int


@distinct
class WfiExit(NamedTuple):
    """The guest waits for an interrupt."""


@distinct
class ExpiredExit(NamedTuple):
    """The time, or the number of instructions, that `run` was given is up."""


@distinct
class InternalErrorExit(NamedTuple):
    """KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_ARM_NISV, or an errno of KVM_RUN: the guest cannot go on; in words."""

    why: str


Exit = MmioAccess | MemoryFaultExit | SplitExit | SystemEventExit | Hypercall | WfiExit | ExpiredExit | InternalErrorExit


class VheGuestCpu(Protocol):
    """What executes the guest: `arm64.cpu.Cpu`, as far as it is needed here."""

    pc: int

    def run(self, timeout: float | None = None, instructions: int | None = None) -> Stop:
        """Execute until something stops it."""

    def x(self, n: int) -> int:
        """The value of general register *n*, 0 to 30."""

    def set_x(self, n: int, value: int) -> None:
        """Write general register 0..30."""

    def fetch(self, va: Va) -> int:
        """The instruction at *va*; raises Fault or BusError."""

    def take_exception(self, esr: int, far: int | None = None) -> None:
        """Deliver a synchronous exception to EL1."""


class VheVcpu:
    """One vCPU on *cpu*; *bound* says whether a memslot covers an IPA."""

    def __init__(self, cpu: VheGuestCpu, bound: Callable[[Ipa], bool]) -> None:
        self.cpu, self.bound = cpu, bound
        self._load: Transfer | None = None      # of the MMIO read that user space has not answered yet
        self._fault: tuple[Fault, int] | None = None    # the MMIO access that user space was told of last, and its PC
        self.aborts_injected = 0

    def run(self, timeout: float | None = None, instructions: int | None = None) -> Exit:
        """KVM_RUN: execute until an exit, for *timeout* seconds; *instructions* hold between two stops of the CPU."""
        # The load has not been executed: its register is filled by the answer. To enter the guest without one would
        # run it again.
        if self._load is not None:
            raise ValueError("an MMIO read waits for its data: complete_mmio()")
        end = None if timeout is None else time.monotonic() + timeout
        while True:
            out = self._handle(self.cpu.run(timeout, instructions))
            if out is not None:
                return out
            if end is not None and time.monotonic() >= end:
                return ExpiredExit()

    def complete_mmio(self, data: int) -> None:
        """The device's answer to an MMIO read, little-endian; the guest goes on after the load."""
        load, self._load = self._load, None
        if load is None:
            raise ValueError("no MMIO read is waiting")
        if load.register < 31:
            self.cpu.set_x(load.register, load.extend(data))
        self.cpu.pc += 4

    def abort_mmio(self) -> None:
        """kvm_inject_sea_dabt() for the access that the last `MmioAccess` was about; it is not carried out."""
        if self._fault is None:
            raise ValueError("no MMIO access to abort")
        fault, self.cpu.pc = self._fault
        self._fault = self._load = None
        self._inject_sea(fault)

    # inject_abt64(): the guest sees a synchronous external abort at the address it used.
    def _inject_sea(self, fault: Fault) -> None:
        self.aborts_injected += 1
        self.cpu.take_exception(fault.esr_el1() & ~0xff | _SEA, fault.va)

    # None: the guest goes on.
    def _handle(self, stop: Stop) -> Exit | None:
        if isinstance(stop, (Hvc, Smc)):
            return self._call(self.cpu.x(0) & 0xffff_ffff)
        if isinstance(stop, CpuAbort):
            if stop.fault.stage == 2:
                return self._stage2_fault(stop.fault, stop.pc)
            # A stage-1 fault is the guest kernel's own; the hypervisor is not asked.
            self.cpu.take_exception(stop.fault.esr_el1(), stop.fault.far)
            return None
        if isinstance(stop, Waits):
            return WfiExit()
        if isinstance(stop, (OutOfTime, Counted)):
            return ExpiredExit()
        if isinstance(stop, Bus):
            return InternalErrorExit(f"stage 2 maps {stop.va:#x} to {stop.pa:#x}, where there is no memory")
        self.cpu.take_exception(_ESR[type(stop)] | (0 if isinstance(stop, Undefined) else stop.imm))
        return None

    def _stage2_fault(self, fault: Fault, pc: int) -> Exit | None:
        assert fault.ipa is not None
        if self.bound(fault.ipa):
            return MemoryFaultExit(fault.ipa, fault.access == "w", fault.access == "x")
        # Instructions or page tables where no memory is: user space could do nothing about it (kvm_handle_guest_abort()).
        if fault.access == "x" or fault.s1ptw:
            self._inject_sea(fault)
            return None
        transfer = self._transfer(pc)
        if transfer is None:
            return InternalErrorExit(
                f"no memory at IPA {fault.ipa:#x}, and no syndrome to emulate a device with: only plain loads and stores of "
                "one register without writeback have one")
        data = 0
        if transfer.write:
            data = self.cpu.x(transfer.register) & (1 << 8 * transfer.size) - 1 if transfer.register < 31 else 0
            # A store is complete as far as the guest can tell; the device is user space's business.
            self.cpu.pc = pc + 4
        else:
            self._load = transfer
        self._fault = fault, pc
        return MmioAccess(fault.ipa, transfer.size, transfer.write, data, transfer.register)

    # What ESR_EL2.ISV would describe.
    def _transfer(self, pc: int) -> Transfer | None:
        try:
            word = self.cpu.fetch(Va(pc))
        except (Fault, BusError):
            return None
        # A load that also changes its base register has no valid syndrome; hardware leaves ISV clear, and so must we.
        return None if writes_back(word) else access_of(word)

    def _call(self, number: int) -> Exit | None:
        if number == PSCI_SYSTEM_OFF:
            return SystemEventExit("shutdown")
        if number == PSCI_SYSTEM_RESET:
            return SystemEventExit("reset")
        self.cpu.set_x(0, _VERSIONS.get(number, NOT_SUPPORTED))
        return None

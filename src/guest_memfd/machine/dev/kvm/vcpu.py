"""A vCPU of /dev/kvm: KVM_RUN. A guest's fault is the library's when a slot covers it, else user space's.

arch/arm64/kvm/arm.c kvm_arch_vcpu_ioctl_run(), arch/arm64/kvm/mmu.c gmem_abort(). No one sends interrupts, so a vCPU that
waits for one waits until a signal comes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from errno import EAGAIN, EFAULT, EINVAL, EIO, ENOENT, ENOMEM, EPERM
from typing import TYPE_CHECKING

from guest_memfd.compat import override
from guest_memfd.errors import SyscallFailed
from guest_memfd.machine.board.lock import Turns
from guest_memfd.machine.dev.file import Serialised
from guest_memfd.machine.el2.kvm import vcpu as exits
from guest_memfd.machine.el2.pkvm import hypercalls as pkvm
from guest_memfd.machine.hw.arm64 import sysreg
from guest_memfd.machine.hw.arm64.guestcore import GuestCore
from guest_memfd.machine.hypcalls.pkvm import PkvmDriver
from guest_memfd.uapi import kvm_arm64 as regs
from guest_memfd.uapi import kvm_run as uapi
from guest_memfd.uapi.kvm import PRIVATE
from guest_memfd.words.pagestate import PRIVATE_PAGE, RUNNING
from guest_memfd.words.units import PAGE, Ipa, gfn_to_gpa, gpa_to_gfn

if TYPE_CHECKING:
    from guest_memfd.machine.dev.kvm.vm import KvmVmFile

CALL = "KVM_RUN"
_EVENTS = {"shutdown": uapi.SystemEventType.SHUTDOWN, "reset": uapi.SystemEventType.RESET}
_SYSREGS = {regs.sys_reg(*encoding): name for name, encoding in sysreg.ENCODINGS.items()} | {regs.ELR_EL1: "ELR_EL1"}
_FIELDS = {regs.PC: "pc", regs.PSTATE: "pstate", regs.SP_EL1: "sp"}
_NAP = 0.01
"""Seconds between two looks of a guest that waits."""
_SAME_FAULT = 1000
"""How often a page that has been mapped may fault again at the same instruction before it is a bug of ours."""


_MODES = (0x0, 0x4, 0x5)
"""PSTATE.M[4:0] of EL0t, EL1t and EL1h."""


class KvmVcpuFile(Serialised):
    """uapi/kvm.py KvmVcpu; *inner* is the hypervisor's, number *index* of its VM, and *core* executes it."""

    def __init__(self, vm: KvmVmFile, inner: exits.VheVcpu, index: int, core: GuestCore) -> None:
        self.vm, self.inner, self.index, self.core = vm, inner, index, core
        self._lock, self._mutex = vm.machine.lock, Turns()
        self.immediate_exit = False
        """kvm_run.immediate_exit: while another thread has it set, `run` comes back with Intr, and does not begin."""
        core.kicked = lambda: self._lock.wanted or self.immediate_exit
        self._waits: uapi.Exit | None = None            # the exit that `answer` is about
        self._answer = b""
        self._counts = {"exits": 0, "faults": 0, "mmio_exit_user": 0}
        self._has_run = False
        self._again: tuple[tuple[int, int], int] = ((-1, -1), 0)

    # -- KVM_RUN -------------------------------------------------------------------------------------------------

    def run(self, timeout: float | None = None) -> uapi.Exit:
        """KVM_RUN until an exit, or for *timeout* seconds; raises SyscallFailed(EIO) once the VM is dead, KernelPanic.

        A second thread waits until the first has come back (vcpu->mutex).
        """
        with self._alone(CALL):
            # Before every entry: another thread may have run another vCPU on this CPU, or the VM may have ended.
            self._load()
            # What user space answered is written to the registers before the guest runs, and only once.
            self._complete()
            self._has_run = True
            end = None if timeout is None else time.monotonic() + timeout
            while not self.immediate_exit and (end is None or time.monotonic() < end):
                out = self.inner.run(None if end is None else max(end - time.monotonic(), 0))
                self._counts["exits"] += 1
                told = self._translate(out, end)
                if told is not None:
                    self._waits = told
                    return told
                self._lock.give_way()
                self._load()
            return uapi.Intr()

    # The vCPU's own ioctls, one at a time.
    @contextmanager
    def _alone(self, call: str) -> Iterator[str]:
        with self._lock.behind(self._mutex):
            self._in_use(call)
            yield call

    # What user space gets to see; None: the guest goes on.
    def _translate(self, out: exits.Exit, end: float | None) -> uapi.Exit | None:
        match out:
            case exits.MemoryFaultExit(ipa, _, _):
                return self._fault(ipa)
            case exits.SplitExit(ipa):
                return self._split(ipa)
            case exits.MmioAccess(ipa, size, write, data, _):
                self._counts["mmio_exit_user"] += 1
                return uapi.Mmio(ipa, size, write, data.to_bytes(8, "little")[:size] if write else b"")
            case exits.Hypercall(number, argument):
                return uapi.HypercallExit(number, (argument,))
            case exits.SystemEventExit(what):
                return uapi.SystemEvent(_EVENTS[what])
            case exits.InternalErrorExit(why):
                return uapi.KvmInternalError(why)
            case exits.WfiExit():
                self._sleep(end)
                return uapi.Intr()
            case _:                                             # its time is up, or it was kicked
                return None

    # No one sends interrupts: up to the end of the time, or until another thread wants it to come back.
    def _sleep(self, end: float | None) -> None:
        with self._lock.released():
            while end is not None and not self.immediate_exit and (left := end - time.monotonic()) > 0:
                time.sleep(min(left, _NAP))

    def _fault(self, ipa: Ipa) -> uapi.Exit | None:
        vm, gfn = self.vm, gpa_to_gfn(ipa)
        slot = vm.slots.find(gfn)
        assert slot is not None, "the hypervisor has asked"
        self._counts["faults"] += 1
        if not slot.file_only:
            return uapi.Unknown(0, EFAULT)              # what is at userspace_addr is no memory of this process
        index, file = slot.page(gfn), slot.file
        # pKVM took the page by force. To map a new one would give the guest zeros where its data was.
        if vm.machine.driver.poisoned(vm.vm, gfn):
            ret = -EFAULT
        else:
            ret = file.run(file.library.guest_fault(gfn, index))
        if ret in (0, -EAGAIN):
            return self._stuck(ipa) if not ret else None
        # As KVM_EXIT_MEMORY_FAULT says it: how the file has the page, which is what user space would have to change.
        private = file.host.inode.entry("attributes", index) == PRIVATE_PAGE
        return uapi.MemoryFault(PRIVATE if private else 0, gfn_to_gpa(gfn), PAGE, -ret)

    # The guest shares a page of a block: EL2 is given memory for the tables, and the guest tries again.
    def _split(self, ipa: Ipa) -> uapi.Exit | None:
        driver = self.vm.machine.driver
        assert isinstance(driver, PkvmDriver), "only EL2 of pKVM asks for it"
        return uapi.Unknown(0, ENOMEM) if driver.split_leaf(self.vm.vm, ipa) else None

    def _stuck(self, ipa: Ipa) -> uapi.Exit | None:
        where, times = self._again
        here = ipa, self.core.pc
        self._again = here, times + 1 if here == where else 0
        # A guest that makes progress faults at another address or instruction. The same one again and again is a bug
        # of ours, and better said than looped over.
        if self._again[1] < _SAME_FAULT:
            return None
        return uapi.KvmInternalError(f"the page at {ipa:#x} is mapped and faults again at PC {here[1]:#x}")

    # On the way in: what user space said about the last exit.
    def _complete(self) -> None:
        waits, self._waits = self._waits, None
        if isinstance(waits, uapi.Mmio) and not waits.is_write:
            self.inner.complete_mmio(int.from_bytes(self._answer[:waits.size], "little"))
        elif isinstance(waits, uapi.HypercallExit) and self._answer:
            self.core.set_x(0, int.from_bytes(self._answer, "little"))
        self._answer = b""

    # kvm_arch_vcpu_load(): hypercalls about a VM's pages go by the vCPU that EL2 has loaded.
    def _load(self) -> None:
        machine, handle = self.vm.machine, self.vm.vm.handle
        if machine.dead is not None:
            raise machine.dead
        if self.vm.vm.state != RUNNING:
            raise SyscallFailed(EIO, CALL, "the VM is dead")
        # Only under pKVM does EL2 have to know which vCPU a hypercall about pages is for.
        if machine.hypervisor.name != "pkvm" or machine.el2.loaded.get(0) is self.inner:
            return
        for call in ((pkvm.VCPU_PUT,), (pkvm.VCPU_LOAD, handle.handle, self.index)):
            machine.el2.hvc([pkvm.BASE + call[0], *call[1:]] + [0] * (18 - len(call)), 0)

    def answer(self, data: bytes) -> None:
        """The data of the MMIO read that `run` came back with, or the hypercall's result; little-endian.

        EINVAL when the last exit waits for nothing.
        """
        self._in_use(CALL)
        match self._waits:
            case uapi.Mmio(is_write=False) | uapi.HypercallExit():
                self._answer = bytes(memoryview(data))
            case _:
                raise SyscallFailed(EINVAL, CALL, f"the last exit, {self._waits}, waits for nothing")

    def inject_external_abort(self) -> None:
        """KVM_SET_VCPU_EVENTS: the access that `run` came back with ends in an external abort, wherever it was to go."""
        with self._alone("KVM_SET_VCPU_EVENTS"):
            if isinstance(self._waits, uapi.Mmio):
                self.inner.abort_mmio()
                self._waits = None

    # -- registers, statistics -------------------------------------------------------------------------------------

    def get_one_reg(self, reg: int) -> int:
        """KVM_GET_ONE_REG: ENOENT; EPERM for a protected guest that has run."""
        with self._alone("KVM_GET_ONE_REG") as call:
            self._may_look(call, reg)
            if reg in regs.X:
                return self.core.x(regs.X.index(reg))
            if reg in _FIELDS:
                return int(getattr(self.core, _FIELDS[reg]))
            return self.core.sysreg(_SYSREGS[reg])

    def set_one_reg(self, reg: int, value: int) -> None:
        """KVM_SET_ONE_REG; raises SyscallFailed as `get_one_reg`, and EINVAL for a PSTATE that no guest can have."""
        with self._alone("KVM_SET_ONE_REG") as call:
            self._may_look(call, reg)
            if _FIELDS.get(reg) == "pstate" and value & 0x1F not in _MODES:
                raise SyscallFailed(EINVAL, call, f"PSTATE {value:#x}: a guest is at EL0t, EL1t or EL1h")
            if reg in regs.X:
                self.core.set_x(regs.X.index(reg), value)
            elif reg in _FIELDS:
                setattr(self.core, _FIELDS[reg], value)
            else:
                self.core.set_sysreg(_SYSREGS[reg], value)

    def _may_look(self, call: str, reg: int) -> None:
        if reg not in regs.X and reg not in _FIELDS and reg not in _SYSREGS:
            raise SyscallFailed(ENOENT, call, f"register {reg:#x}")
        if self.vm.protected and self._has_run:
            raise SyscallFailed(EPERM, call, "the guest is protected")

    def statistics(self) -> Mapping[str, int]:
        """Counters: exits (to KVM), faults (given to the library), mmio_exit_user, aborts_injected."""
        return {**self._counts, "aborts_injected": self.inner.aborts_injected}

    @override
    def _release(self) -> None:
        self.vm.put()

"""VCPU_RUN. It is the loop of gunyah_vcpu_run(): enter the guest, look why it came out, give it memory.

Whatever is not memory goes to user space. Source: drivers/virt/gunyah/gunyah_vcpu.c (series v17, patches 15, 28 and 33).
The wait for an interrupt, which no one here sends, ends as a signal ends it: -EINTR; so does a loop without an end.
"""

from __future__ import annotations

from errno import EAGAIN, EINTR, EINVAL, ENODEV, ENOENT, EPERM
from typing import TYPE_CHECKING

from guest_memfd.compat import override
from guest_memfd.errors import SyscallFailed
from guest_memfd.machine.board.lock import Turns
from guest_memfd.machine.dev.file import Serialised
from guest_memfd.machine.dev.gunyah.ioevent import Ioeventfd
from guest_memfd.machine.el2.gunyah import hypercalls as n
from guest_memfd.machine.el2.gunyah.errors import GunyahError, remap
from guest_memfd.machine.el2.gunyah.rm.lifecycle import VmState
from guest_memfd.machine.el2.gunyah.vcpu import Action, VcpuState
from guest_memfd.uapi.gunyah import Exit, ResumeAction, VcpuRun, VmStatus
from guest_memfd.words.units import Ipa, gpa_to_gfn

if TYPE_CHECKING:
    from guest_memfd.machine.dev.gunyah.vm import VmFile
    from guest_memfd.machine.hw.arm64.guestcore import GuestCore

_SIGN = 1 << 63
_WRITE, _EXECUTE = 1, 2
_STUCK = 64
"""Exits at one address, one after the other, until someone sends a signal."""


class VcpuFile(Serialised):
    """uapi/gunyah.py GunyahVcpu: vCPU number *index* of *vm*, which it holds.

    cap: what the hypervisor knows it by; None before START.
    """

    def __init__(self, vm: VmFile, index: int) -> None:
        self.vm, self.index = vm, index
        self._lock, self._mutex = vm.machine.lock, Turns()
        self.page = VcpuRun()
        self.cap: int | None = None
        self.removed = False
        self._last = VcpuState.READY
        self._address = 0
        self._resume = (0, 0, 0)
        self._attempts = 0

    @override
    def _release(self) -> None:
        self.vm.put()

    def run(self) -> Exit:
        """VCPU_RUN; a second thread waits until the first has come back (vcpu->run_lock)."""
        # The machine's lock is let go of while this waits: the first thread needs it to come back.
        with self._lock.behind(self._mutex):
            return self._run()

    # Whether the guest is to come out: a signal, or someone waits for the machine.
    def _kicked(self) -> bool:
        return bool(self._lock.wanted or self.page.immediate_exit)

    def give(self, cap: int, core: GuestCore) -> None:
        """The Resource Manager has told of the vCPU: its capability, and what executes it."""
        self.cap, core.kicked = cap, self._kicked

    def _run(self) -> Exit:
        call, vm = "VCPU_RUN", self.vm
        self._in_use(call)
        # The function was removed, and the vCPU still has its descriptor: it stays, and runs nothing.
        if self.removed:
            raise SyscallFailed(ENODEV, call, "the function has been removed")
        if self.cap is None:
            raise SyscallFailed(ENODEV, call, "the hypervisor has no such vCPU, or not yet")
        if vm.machine.dead is not None:
            raise vm.machine.dead
        # Before the VM's state is looked at: an answer that is no valid one is an error even if the VM has ended.
        self._answer()
        self._attempts = 0
        while not self._system_down():
            if self.page.immediate_exit:
                raise SyscallFailed(EINTR, call, "immediate_exit")
            if self._enter():
                break
            # Other threads get their turn between two entries, as they would on other CPUs.
            self._lock.give_way()
            if vm.machine.dead is not None:
                raise vm.machine.dead
        return self.page.exit

    # What user space made of the last MMIO exit.
    def _answer(self) -> None:
        if self._last not in (VcpuState.VMMIO_READ, VcpuState.VMMIO_WRITE):
            return
        action = self.page.mmio.resume_action
        if action not in tuple(ResumeAction):
            raise SyscallFailed(EINVAL, "VCPU_RUN", f"resume_action {action}")
        if action == ResumeAction.RETRY:
            # RETRY means that user space has bound memory there meanwhile, so the page is provided before the guest
            # tries again.
            self._demand(self._address, self._last == VcpuState.VMMIO_WRITE)
            self._resume = 0, Action.RETRY, 0
        elif action == ResumeAction.FAULT:
            self._resume = 0, Action.FAULT, 0
        else:
            value = int.from_bytes(self.page.data, "little") if self._last == VcpuState.VMMIO_READ else 0
            self._resume = value, Action.EMULATE, 0
        self._last = VcpuState.READY

    # True: the VM does not run, and user space is told.
    def _system_down(self) -> bool:
        status = self.vm.status
        if status == VmState.RUNNING:
            return False
        if status == VmState.EXITED:
            kind, reason = self.vm.exit_info()
            self.page.set_status(VmStatus.EXITED, kind, reason)
        else:
            self.page.set_status(VmStatus.LOAD_FAILED, 0, b"")
        return True

    # One entry into the guest; True: user space has something to do.
    def _enter(self) -> bool:
        # The answer goes with one entry only, and is forgotten below: a second use would emulate the access twice.
        regs = [n.VCPU_RUN, self.cap or 0, *self._resume] + [0] * 13
        self._resume = 0, 0, 0
        self.vm.machine.el2.hvc(regs)
        error = regs[0] - (regs[0] & _SIGN) * 2
        if error == GunyahError.RETRY:
            return False
        if error:
            raise SyscallFailed(-remap(error), "VCPU_RUN", GunyahError(error).name)
        state, data = VcpuState(regs[1]), (regs[2], regs[3], regs[4])
        if state == VcpuState.PAGE_FAULT:
            return self._page_fault(*data)
        if state in (VcpuState.VMMIO_READ, VcpuState.VMMIO_WRITE):
            return self._mmio(state, *data)
        if state in (VcpuState.EXPECTS_WAKEUP, VcpuState.POWERED_OFF) and not self._system_down():
            raise SyscallFailed(EINTR, "VCPU_RUN", f"the vCPU waits ({state.name}), and a signal comes")
        if state == VcpuState.FAULT:
            self.vm.machine.log(f"Unknown vCPU state: {state:#x}")
            raise SyscallFailed(EINTR, "VCPU_RUN", f"the guest touched {data[0]:#x}, which is nothing; it never goes on")
        if state == VcpuState.READY and not self._kicked():
            raise SyscallFailed(EINTR, "VCPU_RUN", "a time slice is over, and a signal comes")
        return False

    # The guest is entered again; -EINTR when that has led nowhere for long.
    def _again(self, address: int) -> bool:
        # A page that is provided and faults again is provided again. On hardware a signal ends this; here no one
        # sends one.
        self._attempts = self._attempts + 1 if address == self._address else 1
        self._address = address
        if self._attempts > _STUCK:
            self._attempts = 0
            raise SyscallFailed(EINTR, "VCPU_RUN", "a signal ends what leads nowhere")
        return False

    def _page_fault(self, address: int, access: int, mapped: int) -> bool:
        # Series v17 takes an instruction fetch for a write (S23).
        write = access == _WRITE or (self.vm.posted and access == _EXECUTE)
        ret = self._demand(address, write, access == _EXECUTE)
        if ret in (0, -EAGAIN):
            return self._again(address)
        self.page.set_page_fault(address, ret)
        return True

    # Memory first: what the hypervisor reports as a device may be a shared page that the guest does not have yet.
    def _mmio(self, state: VcpuState, address: int, size: int, value: int) -> bool:
        is_write = state == VcpuState.VMMIO_WRITE
        # Series v17 asks the page that user space can write, where the previous exit has left its answer (S25).
        ret = self._demand(address, self.page.mmio.is_write if self.vm.posted else is_write)
        if ret in (0, -EAGAIN):
            self._resume = 0, Action.RETRY, 0
            return self._again(address)
        # An ioeventfd takes the store in the kernel, and user space is not woken for it.
        if is_write and any(f.takes(address, size, value) for f in self.vm.functions.values() if isinstance(f, Ioeventfd)):
            return False
        self._last, self._address = state, address
        self.page.set_mmio(address, value.to_bytes(8, "little") if is_write else bytes(8), size, is_write)
        return True

    # gunyah_gmem_demand_page().
    def _demand(self, address: int, write: bool, execute: bool = False) -> int:
        gfn = gpa_to_gfn(Ipa(address))
        binding = self.vm.binding_at(gfn)
        if binding is None:
            return -ENOENT
        # The guest's own mistake, so it is told to user space and not mapped for reading: it would fault without end.
        if write and not binding.writable:
            return -EPERM
        if execute and not binding.lend and not self.vm.posted:
            return -EPERM                               # shared memory is mapped as devices are: never executable
        return binding.file.demand(binding, gfn)

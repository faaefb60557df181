"""A guest by way of /dev/gunyah. Private memory is written while it is the host's, and lent then."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from errno import EINTR, ENOMEM
from typing import Protocol

from guest_memfd.errors import SyscallFailed, errno_name
from guest_memfd.guests import PRIVATE_BASE, SHARED_BASE
from guest_memfd.guests.bootinfo import BootHypervisor
from guest_memfd.guests.loader import GuestImage
from guest_memfd.uapi import gunyah
from guest_memfd.uapi.gunyah import GunyahDevice, GunyahMemFlag, GunyahVcpu, GunyahVm, MapFlag, RegisterSet, ResumeAction
from guest_memfd.uapi.memory import GuestMemory
from guest_memfd.vmm.devices import Console
from guest_memfd.vmm.layout import Layout
from guest_memfd.vmm.loop import SAME_ABORT, Debugger, LoopEnded
from guest_memfd.words.units import PAGE

_HUGE = 2 << 20
_NAP = 0.01
"""Seconds between two tries to run a vCPU that waits."""
_EXITS = {0: "off", 1: "off", 2: "reset", 3: "reset"}
"""Types of VM_EXITED that are the guest's own wish: exit, PSCI off, resets."""


class GunyahDebugger(Debugger, Protocol):
    """Knows what Gunyah tells no one but itself, too."""

    def stopped(self) -> str | None:
        """Why the hypervisor will never run it again, although it says nothing; None: it will."""


class GunyahGuest:
    """*image* in a VM of *device*, up to its first instruction; leaving *stack* gives everything back.

    The driver wants a device tree; the page of the boot info stands for it. *log* is told of exits in words. Raises
    SyscallFailed, BadInput.
    """

    def __init__(self, device: GunyahDevice, layout: Layout, image: GuestImage, console: Console, stack: ExitStack,
                 debugger: GunyahDebugger, log: Callable[[str], None]) -> None:
        self.layout, self.console, self.log, self.debugger = layout, console, log, debugger
        self.aborts = self.exits = 0
        self._address, self._unanswerable = -1, 0
        self.vm: GunyahVm = stack.enter_context(device.create_vm())
        flags = GunyahMemFlag.CLOEXEC | (GunyahMemFlag.ALLOW_HUGEPAGE if layout.folio >= _HUGE else 0)
        self.memory: GuestMemory = stack.enter_context(device.create_guest_mem(layout.private, flags))
        # Before the memory is lent: a page of the guest's is out of the VMM's reach.
        self._load(image)
        self.vm.map_mem(self.memory, PRIVATE_BASE, 0, layout.private, MapFlag.FORCE_LEND | MapFlag.ALLOW_RWX)
        self.shared: GuestMemory | None = None
        if layout.shared:
            self.shared = stack.enter_context(device.create_guest_mem(layout.shared, flags))
            access = MapFlag.FORCE_SHARE | MapFlag.ALLOW_READ | MapFlag.ALLOW_WRITE
            self.vm.map_mem(self.shared, SHARED_BASE, 0, layout.shared, access)
        boot_info = layout.boot_info(image)
        self.vm.set_dtb_config(boot_info & -layout.folio, max(layout.folio, PAGE))
        self.vm.set_boot_context(gunyah.boot_register(RegisterSet.PC, 0), image.entry)
        self.vm.set_boot_context(gunyah.boot_register(RegisterSet.X, 0), boot_info)
        self.vcpu: GunyahVcpu = stack.enter_context(self.vm.add_vcpu(0))
        self._timer: threading.Timer | None = None
        stack.callback(self._disarm)
        self.vm.start()

    # Unmapped again before it is lent: a page that the VMM could touch is not.
    def _load(self, image: GuestImage) -> None:
        with self.memory.mmap() as mapping:
            for offset, data in self.layout.contents(image, BootHypervisor.GUNYAH):
                mapping.write(offset, data)

    # One timer at a time, whatever number of exits comes before it goes off: it is the signal that interrupts VCPU_RUN.
    def _arm(self, seconds: float) -> None:
        if self._timer is None:
            self._timer = threading.Timer(seconds, setattr, (self.vcpu.page, "immediate_exit", 1))
            self._timer.daemon = True
            self._timer.start()

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer.join()
            self._timer = None
        self.vcpu.page.immediate_exit = 0

    # By our own timer, by the host's, or because the vCPU has nothing to do: then no one will wake it.
    def _interrupted(self, ran: float) -> LoopEnded | None:
        if self.vcpu.page.immediate_exit:
            self._disarm()
            return None
        why = self.debugger.stopped()
        if why is not None:
            return LoopEnded("crash", why, self.debugger.registers())
        time.sleep(max(_NAP - ran, 0))
        return None

    def step(self, seconds: float) -> LoopEnded | None:
        """VCPU_RUN once, and whatever the guest wants of us."""
        self._arm(seconds)
        self.exits += 1
        began = time.monotonic()
        try:
            out = self.vcpu.run()
        except SyscallFailed as error:
            if error.errno != EINTR:
                raise
            return self._interrupted(time.monotonic() - began)
        match out:
            case gunyah.MmioExit():
                self._mmio(out)
            case gunyah.StatusExit(status, kind, _):
                self.log(f"exit STATUS {status.name}, type {kind}")
                return self._status(status, kind)
            case gunyah.PageFaultExit(address, attempt):
                self.log(f"exit PAGE_FAULT {address:#x}, errno {-attempt}")
                # The host has no memory. That is no answer to the guest, and says nothing about it.
                if attempt == -ENOMEM:
                    raise SyscallFailed(ENOMEM, "VCPU_RUN", f"the guest's page at {address:#x}")
                return self._unanswered(address, attempt)
        return None

    # User space has no way to answer a page fault: resume_action is never read back, so it comes without end.
    def _unanswered(self, address: int, attempt: int) -> LoopEnded | None:
        self._unanswerable = self._unanswerable + 1 if address == self._address else 1
        self._address = address
        if self._unanswerable < SAME_ABORT:
            return None
        what = errno_name(-attempt)
        why = (f"its access to IPA {address:#x} cannot be emulated: the syndrome describes plain loads and stores of one "
               "register without writeback only") if self.console.has(address) else (
               f"nothing can be mapped at IPA {address:#x} ({what})")
        return LoopEnded("crash", why, self.debugger.registers())

    def _status(self, status: gunyah.VmStatus, kind: int) -> LoopEnded:
        if status == gunyah.VmStatus.EXITED and kind in _EXITS:
            return LoopEnded("off" if _EXITS[kind] == "off" else "reset")
        return LoopEnded("crash", f"the VM has {status.name}, type {kind}", self.debugger.registers())

    def _mmio(self, out: gunyah.MmioExit) -> None:
        page = self.vcpu.page
        if not self.console.has(out.phys_addr):
            self.log(f"exit MMIO {'write' if out.is_write else 'read'} at {out.phys_addr:#x}: nothing there, abort")
            page.mmio.resume_action = ResumeAction.FAULT
            self.aborts += 1
            return
        page.mmio.resume_action = ResumeAction.HANDLED
        if out.is_write:
            self.console.put(out.data)
        else:
            page.data = self.console.get()

    def window(self) -> bytes | None:
        """The shared window's beginning as the host reads it; None without one."""
        if self.shared is None:
            return None
        with self.shared.mmap() as mapping:
            return mapping.read(0, 64)

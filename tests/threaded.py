"""A VMM with threads: each vCPU has one of its own, and the main thread changes memory while their guests run.

Every guest stores into its private pages and into a window that it shares with the VMM, again and again, and tells a device
of each round. The laws are judged at every primitive.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from errno import EAGAIN, EBUSY, EINTR, EPERM
from random import Random
from typing import Any

from judged import judged

from guest_memfd.asm.arm64.asm import assemble
from guest_memfd.errors import SyscallFailed
from guest_memfd.machine.boot import Config, Machine
from guest_memfd.uapi import kvm_arm64, kvm_run
from guest_memfd.uapi.gunyah import MapFlag, MmioExit, RegisterSet, ResumeAction, boot_register
from guest_memfd.uapi.kvm import PRIVATE, SHARED, GuestMemfdFlag, MemFlag, MemoryAttributes2

PAGE = 4096
RAM, WINDOW, NR = 0x8000_0000, 0x4000_0000, 16
FIRST = 8
"""Of the private pages these and up are data; what is below is the program, and Gunyah's device tree."""
BUSY = (EBUSY, EAGAIN, EPERM)

_GUEST = """
_start: movz    x20, #0x0900, lsl #16
        movz    x21, #0x4000, lsl #16
round:  movz    x19, #0x8000, lsl #16
        add     x19, x19, #8, lsl #12
        mov     x22, #8
next:   str     x22, [x19]
        ldr     x23, [x21]
        str     x23, [x21, #8]
        add     x19, x19, #1, lsl #12
        mov     x24, #500
spin:   sub     x24, x24, #1
        cmp     x24, #0
        b.ne    spin
        sub     x22, x22, #1
        cmp     x22, #0
        b.ne    next
        str     x22, [x20]
        b       round
"""


class Vmm(ABC):
    """*vcpus* vCPUs on a machine under *name*; `run` is the life of all of them."""

    def __init__(self, name: str, vcpus: int) -> None:
        self.machine = Machine(name, Config(ram=32 << 20))
        self.watch = judged(self.machine)
        self.free = self.machine.kernel_pages.free_pages
        self.failed: list[BaseException] = []
        self.rounds = [0] * vcpus
        self.refused = self.done = 0
        self.stopping = False
        self.open()
        with self.ram.mmap() as mapping:
            mapping.write(0, assemble(_GUEST, RAM, "test").data)
        self.vcpus = [self.vcpu(index) for index in range(vcpus)]
        self.ready()

    ram: Any
    window: Any

    @abstractmethod
    def open(self) -> None:
        """Make the VM, `ram` and `window`."""

    @abstractmethod
    def vcpu(self, index: int) -> Any:
        """Make one vCPU."""

    def ready(self) -> None:  # noqa: B027 - KVM has no such step
        """Everything is there."""

    @abstractmethod
    def enter(self, vcpu: Any) -> bool:
        """Run a vCPU once; whether the guest has told its device of a round."""

    @abstractmethod
    def stop(self, vcpu: Any) -> None:
        """Make its run come back, from another thread."""

    @abstractmethod
    def convert(self, random: Random) -> None:
        """Change who may have a page of the VM's memory."""

    # -- threads -------------------------------------------------------------------------------------------------------

    def _guest(self, index: int) -> None:
        try:
            while not self.stopping:
                self.rounds[index] += self.enter(self.vcpus[index])
        except BaseException as error:
            self.failed.append(error)

    def _attempt(self, call: Any, *args: Any) -> None:
        try:
            call(*args)
            self.done += 1
        except SyscallFailed as error:
            if error.errno not in BUSY:
                raise
            self.refused += 1

    def _touch(self, random: Random) -> None:
        with self.window.mmap() as mapping:
            mapping.write(random.randrange(NR) * PAGE, b"from the VMM")
            mapping.read(random.randrange(NR) * PAGE, 64)

    def change(self, random: Random) -> None:
        """One change of memory, by the main thread."""
        match random.randrange(5):
            case 0:
                self._attempt(self.window.punch_hole, random.randrange(NR) * PAGE, PAGE)
            case 1:
                self._attempt(self.ram.punch_hole, random.randrange(FIRST, NR) * PAGE, PAGE)
            case 2:
                self._attempt(self.ram.fallocate, 1, random.randrange(FIRST, NR) * PAGE, PAGE)
            case 3:
                self._attempt(self.convert, random)
            case _:
                self._touch(random)

    def run(self, changes: int, seed: int) -> None:
        """The guests run while the main thread makes *changes*, and until each of them has told of a round."""
        threads = [threading.Thread(target=self._guest, args=(index,)) for index in range(len(self.vcpus))]
        random = Random(seed)
        for thread in threads:
            thread.start()
        try:
            while (changes > 0 or not all(self.rounds)) and not self.failed:
                self.change(random)
                changes -= 1
        finally:
            self.stopping = True
            for vcpu in self.vcpus:
                self.stop(vcpu)
            for thread in threads:
                thread.join()

    def end(self) -> None:
        """Everything is closed; nothing may have been lost, and no law may have broken."""
        assert self.failed == []
        for owner in (*self.vcpus, self.ram, self.window, self.vm):
            owner.close()
        assert self.machine.audit() == []
        assert not self.watch.broken
        assert self.machine.kernel_pages.free_pages == self.free

    vm: Any


class KvmVmm(Vmm):
    """By way of /dev/kvm, plain or protected."""

    def open(self) -> None:
        """A private file, and a shared one."""
        self.protected = self.machine.hypervisor.name == "pkvm"
        system = self.machine.open("/dev/kvm")
        self.vm = system.create_vm(kvm_arm64.VM_TYPE_PROTECTED if self.protected else 0)
        self.ram = self.vm.create_guest_memfd(NR * PAGE, GuestMemfdFlag.MMAP)
        self.window = self.vm.create_guest_memfd(NR * PAGE, SHARED)
        for slot, (where, file) in enumerate(((RAM, self.ram), (WINDOW, self.window))):
            self.vm.set_user_memory_region2(slot, MemFlag.GUEST_MEMFD, where, NR * PAGE, guest_memfd=file)
        self.ram.set_memory_attributes2(MemoryAttributes2(0, PAGE, 0))

    def vcpu(self, index: int) -> Any:
        """At the program's beginning."""
        made = self.vm.create_vcpu(index)
        made.set_one_reg(kvm_arm64.PC, RAM)
        return made

    def ready(self) -> None:
        """The program becomes private."""
        self.ram.set_memory_attributes2(MemoryAttributes2(0, PAGE, PRIVATE))

    def enter(self, vcpu: Any) -> bool:
        """KVM_RUN."""
        out = vcpu.run()
        assert isinstance(out, (kvm_run.Mmio, kvm_run.Intr)), out
        return isinstance(out, kvm_run.Mmio)

    def stop(self, vcpu: Any) -> None:
        """As a signal does."""
        vcpu.immediate_exit = True

    def convert(self, random: Random) -> None:
        """A page of the window, to and fro: shared, it is the guest's as well."""
        at = random.randrange(1, NR) * PAGE
        self.window.set_memory_attributes2(MemoryAttributes2(at, PAGE, PRIVATE))
        self.window.set_memory_attributes2(MemoryAttributes2(at, PAGE, 0))


class GunyahVmm(Vmm):
    """By way of /dev/gunyah."""

    def open(self) -> None:
        """Lent memory, and shared memory."""
        device = self.machine.open("/dev/gunyah")
        self.vm = device.create_vm()
        self.ram, self.window = device.create_guest_mem(NR * PAGE), device.create_guest_mem(NR * PAGE)

    def vcpu(self, index: int) -> Any:
        """They begin at START."""
        return self.vm.add_vcpu(index)

    def ready(self) -> None:
        """Bind, configure, start."""
        self.vm.map_mem(self.ram, RAM, 0, NR * PAGE, MapFlag.FORCE_LEND | MapFlag.ALLOW_RWX)
        self.vm.map_mem(self.window, WINDOW, 0, NR * PAGE,
                        MapFlag.FORCE_SHARE | MapFlag.ALLOW_READ | MapFlag.ALLOW_WRITE)
        self.vm.set_dtb_config(RAM + PAGE, PAGE)
        self.vm.set_boot_context(boot_register(RegisterSet.PC, 0), RAM)
        self.vm.start()
        for vcpu in self.machine.vms[0].handle.vcpus[1:]:       # as PSCI CPU_ON would
            vcpu.cpu.pc = RAM
            vcpu.last = type(vcpu.last)(0)

    def enter(self, vcpu: Any) -> bool:
        """VCPU_RUN."""
        try:
            out = vcpu.run()
        except SyscallFailed as error:
            if error.errno == EINTR:
                return False
            raise
        assert isinstance(out, MmioExit), out
        vcpu.page.mmio.resume_action = ResumeAction.HANDLED
        return True

    def stop(self, vcpu: Any) -> None:
        """As a signal does."""
        vcpu.page.immediate_exit = 1

    def convert(self, random: Random) -> None:
        """Bind a file beside the guest's memory, and take it away again."""
        flags = MapFlag.FORCE_SHARE | MapFlag.ALLOW_READ
        with self.vm_device().create_guest_mem(PAGE) as file:
            self.vm.map_mem(file, 0x5000_0000, 0, PAGE, flags)
            self.vm.map_mem(file, 0x5000_0000, 0, PAGE, flags | MapFlag.UNMAP)

    def vm_device(self) -> Any:
        """/dev/gunyah, once more."""
        return self.machine.open("/dev/gunyah")


def vmm(name: str, vcpus: int = 1) -> Vmm:
    """A threaded VMM under *name*."""
    return (GunyahVmm if name == "gunyah" else KvmVmm)(name, vcpus)

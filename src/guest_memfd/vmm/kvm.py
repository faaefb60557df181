"""A guest by way of /dev/kvm on arm64: the emulated one, or that of a real kernel.

Private memory is written while it is shared, then converted. Where nothing converts a plain VM has no private memory, and
its files are shared for all their life.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from errno import ENOMEM

from guest_memfd.errors import SyscallFailed
from guest_memfd.guests import PRIVATE_BASE, SHARED_BASE
from guest_memfd.guests.bootinfo import BootHypervisor
from guest_memfd.guests.loader import GuestImage
from guest_memfd.uapi import kvm, kvm_arm64, kvm_run
from guest_memfd.uapi.kvm import (
    SHARED,
    GuestMemfdFlag,
    KvmGuestMemory,
    KvmSystem,
    KvmVcpu,
    KvmVm,
    MemFlag,
    MemoryAttributes2,
)
from guest_memfd.vmm.devices import Console
from guest_memfd.vmm.layout import Layout
from guest_memfd.vmm.loop import Debugger, LoopEnded
from guest_memfd.words.units import PAGE, Ipa

_INVALID_PARAMETER = ((1 << 64) - 3).to_bytes(8, "little")
_PRIVATE, _WINDOW = 0, 1
"""Slots."""
_REGISTERS = {
    "pc": kvm_arm64.PC, "sp": kvm_arm64.SP_EL1, "pstate": kvm_arm64.PSTATE, "elr_el1": kvm_arm64.ELR_EL1,
    "esr_el1": kvm_arm64.ESR_EL1, "far_el1": kvm_arm64.FAR_EL1, "vbar_el1": kvm_arm64.VBAR_EL1,
    "sctlr_el1": kvm_arm64.SCTLR_EL1, **{f"x{n}": number for n, number in enumerate(kvm_arm64.X)},
}


class OneRegs:
    """A debugger that asks KVM: KVM_GET_ONE_REG of *vcpu*."""

    def __init__(self, vcpu: KvmVcpu) -> None:
        self.vcpu = vcpu

    def pc(self) -> int:
        """As KVM has it."""
        return self.vcpu.get_one_reg(kvm_arm64.PC)

    def registers(self) -> Mapping[str, int]:
        """As KVM has them."""
        return {name: self.vcpu.get_one_reg(number) for name, number in _REGISTERS.items()}


class KvmGuest:
    """*image* in a VM of *system*, up to its first instruction; leaving *stack* gives everything back.

    *protected*: KVM_VM_TYPE_ARM_PROTECTED. *converts*: files convert in place. *debugger*: None: KVM is asked. *log* is told
    of exits in words. Raises SyscallFailed, BadInput.
    """

    def __init__(self, system: KvmSystem, layout: Layout, image: GuestImage, console: Console, stack: ExitStack,
                 log: Callable[[str], None], *, protected: bool = False, converts: bool = True,
                 debugger: Debugger | None = None) -> None:
        self.layout, self.console, self.log, self.converts = layout, console, log, converts
        self._injected = 0
        self.vm: KvmVm = stack.enter_context(system.create_vm(kvm_arm64.VM_TYPE_PROTECTED if protected else 0))
        self.memory = self._slot(stack, _PRIVATE, PRIVATE_BASE, layout.private, GuestMemfdFlag.MMAP if converts else SHARED)
        self.files = {PRIVATE_BASE: self.memory}
        if layout.shared:
            # A protected guest opens its window itself, by MEM_SHARE.
            flags = GuestMemfdFlag.MMAP if protected else SHARED
            self.files[SHARED_BASE] = self._slot(stack, _WINDOW, SHARED_BASE, layout.shared, flags)
        self._load(image, BootHypervisor.PKVM if protected else BootHypervisor.KVM)
        self.vcpu: KvmVcpu = stack.enter_context(self.vm.create_vcpu())
        self.debugger: Debugger = debugger or OneRegs(self.vcpu)
        self.vcpu.set_one_reg(kvm_arm64.PC, image.entry)
        self.vcpu.set_one_reg(kvm_arm64.X[0], layout.boot_info(image))
        self.exits = 0

    def _slot(self, stack: ExitStack, number: int, base: Ipa, size: int, flags: int) -> KvmGuestMemory:
        file = stack.enter_context(self.vm.create_guest_memfd(size, flags))
        self.vm.set_user_memory_region2(number, MemFlag.GUEST_MEMFD, base, size, guest_memfd=file)
        return file

    def _load(self, image: GuestImage, hypervisor: BootHypervisor) -> None:
        contents = self.layout.contents(image, hypervisor)
        runs = list(self.layout.folios(contents)) if self.converts else []
        for offset, size in runs:
            # Shared for as long as it is written, and private before the guest runs: conversion keeps the contents.
            self.memory.set_memory_attributes2(MemoryAttributes2(offset, size, 0))
        with self.memory.mmap() as mapping:
            for offset, data in contents:
                mapping.write(offset, data)
        for offset, size in runs:
            self.memory.set_memory_attributes2(MemoryAttributes2(offset, size, kvm.PRIVATE))

    @property
    def aborts(self) -> int:
        """Those that `step` asked for; and those that KVM delivered, where it counts them."""
        return self.vcpu.statistics().get("aborts_injected", self._injected)

    def step(self, seconds: float) -> LoopEnded | None:
        """KVM_RUN once, and whatever the guest wants of us."""
        out = self.vcpu.run(seconds)
        self.exits += 1
        match out:
            case kvm_run.Mmio():
                self._mmio(out)
            case kvm_run.HypercallExit(nr, args):
                self.log(f"exit HYPERCALL {nr:#x} {args[0]:#x}")
                self._convert(nr, Ipa(args[0]))
            case kvm_run.SystemEvent(kind):
                self.log(f"exit SYSTEM_EVENT {kind}")
                return LoopEnded("off" if kind == kvm_run.SystemEventType.SHUTDOWN else "reset")
            case kvm_run.MemoryFault(_, gpa, size, errno):
                self.log(f"exit MEMORY_FAULT {gpa:#x}, {size:#x} bytes, errno {errno}")
                # The host has no memory. That is not the guest's doing, so it is no crash of its.
                if errno == ENOMEM:
                    raise SyscallFailed(errno, "KVM_RUN", f"the guest's page at {gpa:#x}")
                why = SyscallFailed(errno, "KVM_RUN", f"the guest's page at {gpa:#x} is gone")
                return LoopEnded("crash", str(why), self.debugger.registers())
            case kvm_run.KvmInternalError(why):
                return LoopEnded("crash", why, self.debugger.registers())
            case kvm_run.Unknown(reason, errno):
                return LoopEnded("crash", f"KVM_RUN ends with reason {reason}, errno {errno}", self.debugger.registers())
        return None

    def _mmio(self, out: kvm_run.Mmio) -> None:
        if not self.console.has(out.phys_addr):
            self.log(f"exit MMIO {'write' if out.is_write else 'read'} at {out.phys_addr:#x}: nothing there, abort")
            self._injected += 1
            self.vcpu.inject_external_abort()
        elif out.is_write:
            self.console.put(out.data)
        else:
            self.vcpu.answer(self.console.get()[:out.size])

    # The guest has shared a page with us, or wants it back: the library has to know, too. Of a larger folio only that page.
    def _convert(self, nr: int, ipa: Ipa) -> None:
        base = PRIVATE_BASE if ipa >= PRIVATE_BASE else SHARED_BASE
        wanted = 0 if nr == kvm_arm64.MEM_SHARE else kvm.PRIVATE
        attributes = MemoryAttributes2(ipa - base, PAGE, wanted)
        try:
            self.files[base].set_memory_attributes2(attributes)
        except SyscallFailed as error:
            self.log(f"     {error}")
            # As EL2 answers of an address that it will not share: the guest need not know whose refusal it is.
            self.vcpu.answer(_INVALID_PARAMETER)

    def window(self) -> bytes | None:
        """The shared window's beginning as the host reads it; None without one."""
        if SHARED_BASE not in self.files:
            return None
        with self.files[SHARED_BASE].mmap() as mapping:
            return mapping.read(0, 64)

"""A guest by way of /dev/kvm on arm64. Private memory is written while it is shared, then converted."""

from __future__ import annotations

from collections.abc import Callable
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
from guest_memfd.words.units import Ipa

MEM_SHARE, MEM_UNSHARE = 0xC600_0003, 0xC600_0004
"""ARM_SMCCC_VENDOR_HYP_KVM_MEM_SHARE_FUNC_ID and its opposite (include/linux/arm-smccc.h)."""
_INVALID_PARAMETER = ((1 << 64) - 3).to_bytes(8, "little")
_PRIVATE, _WINDOW = 0, 1
"""Slots."""


class KvmGuest:
    """*image* in a VM of *system*, up to its first instruction; leaving *stack* gives everything back.

    *protected*: KVM_VM_TYPE_ARM_PROTECTED. *log* is told of exits in words. Raises SyscallFailed, BadInput.
    """

    def __init__(self, system: KvmSystem, layout: Layout, image: GuestImage, console: Console, stack: ExitStack,
                 protected: bool, debugger: Debugger, log: Callable[[str], None]) -> None:
        self.layout, self.console, self.log, self.debugger = layout, console, log, debugger
        self.vm: KvmVm = stack.enter_context(system.create_vm(kvm_arm64.VM_TYPE_PROTECTED if protected else 0))
        self.memory = self._slot(stack, _PRIVATE, PRIVATE_BASE, layout.private, GuestMemfdFlag.MMAP)
        self.files = {PRIVATE_BASE: self.memory}
        if layout.shared:
            # A protected guest opens its window itself, by MEM_SHARE.
            flags = GuestMemfdFlag.MMAP if protected else SHARED
            self.files[SHARED_BASE] = self._slot(stack, _WINDOW, SHARED_BASE, layout.shared, flags)
        self._load(image, BootHypervisor.PKVM if protected else BootHypervisor.KVM)
        self.vcpu: KvmVcpu = stack.enter_context(self.vm.create_vcpu())
        self.vcpu.set_one_reg(kvm_arm64.PC, image.entry)
        self.vcpu.set_one_reg(kvm_arm64.X[0], layout.boot_info(image))
        self.exits = 0

    def _slot(self, stack: ExitStack, number: int, base: Ipa, size: int, flags: int) -> KvmGuestMemory:
        file = stack.enter_context(self.vm.create_guest_memfd(size, flags))
        self.vm.set_user_memory_region2(number, MemFlag.GUEST_MEMFD, base, size, guest_memfd=file)
        return file

    def _load(self, image: GuestImage, hypervisor: BootHypervisor) -> None:
        contents = self.layout.contents(image, hypervisor)
        runs = list(self.layout.folios(contents))
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
        """Those that KVM delivered, and those that `step` asked for."""
        return self.vcpu.statistics()["aborts_injected"]

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
            self.vcpu.inject_external_abort()
        elif out.is_write:
            self.console.put(out.data)
        else:
            self.vcpu.answer(self.console.get()[:out.size])

    # The guest has shared a page with us, or wants it back: the library has to know, too.
    def _convert(self, nr: int, ipa: Ipa) -> None:
        base = PRIVATE_BASE if ipa >= PRIVATE_BASE else SHARED_BASE
        wanted = 0 if nr == MEM_SHARE else kvm.PRIVATE
        attributes = MemoryAttributes2(ipa - base, self.layout.folio, wanted)
        try:
            self.files[base].set_memory_attributes2(attributes)
        except SyscallFailed as error:
            self.log(f"     {error}")
            self.vcpu.answer(_INVALID_PARAMETER)

    def window(self) -> bytes | None:
        """The shared window's beginning as the host reads it; None without one."""
        if SHARED_BASE not in self.files:
            return None
        with self.files[SHARED_BASE].mmap() as mapping:
            return mapping.read(0, 64)

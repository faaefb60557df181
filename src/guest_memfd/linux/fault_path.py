"""How a vCPU comes by the memory of a guest_memfd slot. A guest is asked; no module's name is believed.

A slot is given two kinds of memory: a guest_memfd that holds one thing, and at userspace_addr anonymous memory that holds
another. A guest that runs on hardware (or on shadow page tables) faults the guest_memfd in: kvm_mmu_faultin_pfn() in
arch/x86/kvm/mmu/mmu.c. A guest whose instructions KVM emulates reads the other one: kvm_read_guest() knows nothing else.
"""

from __future__ import annotations

from contextlib import ExitStack

from guest_memfd.linux.anonymous import Anonymous
from guest_memfd.linux.guest_x86 import x86_vcpu
from guest_memfd.linux.mapping import PAGE
from guest_memfd.linux.system import System
from guest_memfd.linux.vcpu_x86 import identity_tables
from guest_memfd.uapi.kvm import SHARED, MemFlag
from guest_memfd.uapi.kvm_run import Exit, Io, Mmio
from guest_memfd.words.units import Ipa

_FILE, _OTHER = 0x55, 0xAA
_BASE, _CODE, _SIZE, _RESULT = Ipa(0x8000), 0x4000, 0x8000, 0x3000_0000
_DATA = _BASE + _SIZE
# mov (%rbx),%al | mov %rax,(%rcx) | jmp . - and: mov ax, 0x1000 | mov ds, ax | mov al, [0] | out 0xe9, al | jmp .
_LOAD, _REAL_LOAD = bytes.fromhex("8a03" "488901" "ebfe"), bytes.fromhex("b80010" "8ed8" "a00000" "e6e9" "ebfe")
_SECONDS = 1.0


def native(system: System, real_mode: bool) -> bool | None:
    """Whether a load of a guest in real mode, or in 64-bit mode at CPL 3, comes from the guest_memfd of its slot.

    None: the guest says neither. Takes some milliseconds. Raises SyscallFailed, BadInput where vCPUs are not x86's.
    """
    with ExitStack() as stack:
        vm = stack.enter_context(system.create_vm())
        plain, other = stack.enter_context(Anonymous(_SIZE)), stack.enter_context(Anonymous(PAGE))
        plain.put(0, identity_tables(_BASE))
        plain.put(_CODE, _REAL_LOAD if real_mode else _LOAD)
        vm.set_user_memory_region(0, 0, _BASE, _SIZE, plain.address)
        file = stack.enter_context(vm.create_guest_memfd(PAGE, SHARED))
        with file.mmap() as mapping:
            mapping.write(0, bytes((_FILE,)))
        other.put(0, bytes((_OTHER,)))
        vm.set_user_memory_region2(1, MemFlag.GUEST_MEMFD, _DATA, PAGE, guest_memfd=file, userspace_addr=other.address)
        vcpu = stack.enter_context(x86_vcpu(vm))
        if real_mode:
            vcpu.enter_real_mode(_BASE + _CODE)
        else:
            vcpu.enter_user_mode(_BASE, _BASE + _CODE, rbx=_DATA, rcx=_RESULT)
        return {_FILE: True, _OTHER: False}.get(_byte(vcpu.run(_SECONDS)))


def _byte(told: Exit) -> int:
    return told.data[0] if isinstance(told, Mmio | Io) and told.is_write else -1

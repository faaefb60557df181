"""Memory and VMs for small x86 programs. Code and page tables are in a plain slot, so that any KVM runs it.

The program is position-independent 64-bit code at CPL 3, which every x86 KVM executes natively or on its page tables; a KVM
that emulates CPL 0 (kvm_pvm) would read the memory of a slot through userspace_addr instead of the guest_memfd.
"""

from __future__ import annotations

from contextlib import ExitStack

from guest_memfd.compat import override
from guest_memfd.errors import BadInput
from guest_memfd.linux.anonymous import Anonymous
from guest_memfd.linux.fd import OwnedFd
from guest_memfd.linux.system import System
from guest_memfd.linux.vcpu_x86 import X86Vcpu, identity_tables
from guest_memfd.linux.vm import LinuxVm
from guest_memfd.words.units import Ipa

BASE, SIZE = Ipa(0x10000), 0x10000
"""The plain slot, number 0: page tables first."""
CODE, STACK = BASE + 0x8000, BASE + SIZE
"""Where the program starts; where its stack ends."""
RESULT = 0x3000_0000
"""No slot is here: a store ends the program as an Mmio exit."""


class IdentityMap(OwnedFd):
    """Page tables for programs of *vm* at CPL 3, at guest address *base* in a plain slot of their own, *number*.

    The first *gib* GiB are mapped to themselves. *base* is CR3. Raises SyscallFailed.
    """

    def __init__(self, vm: LinuxVm, number: int, base: Ipa, gib: int) -> None:
        tables = identity_tables(base, gib)
        with ExitStack() as undo:
            memory = undo.enter_context(Anonymous(len(tables)))
            memory.put(0, tables)
            vm.set_user_memory_region(number, 0, base, memory.size, memory.address)
            self._undo = undo.pop_all()
        self.closed = False

    @override
    def _release(self) -> None:
        self._undo.close()


class SmallGuest(OwnedFd):
    """A VM of *system*, its first vCPU, and the plain slot; guest addresses below 1 GiB are mapped as they are.

    Slots from number 1 on are the caller's. Raises SyscallFailed, BadInput where vCPUs are not x86's.
    """

    def __init__(self, system: System) -> None:
        with ExitStack() as undo:
            self.vm = undo.enter_context(system.create_vm())
            self._memory = undo.enter_context(Anonymous(SIZE))
            self._memory.put(0, identity_tables(BASE))
            self.vm.set_user_memory_region(0, 0, BASE, SIZE, self._memory.address)
            self.vcpu = undo.enter_context(x86_vcpu(self.vm))
            self._undo = undo.pop_all()
        self.closed = False

    def start(self, code: bytes, **registers: int) -> None:
        """The next `vcpu.run` executes *code* from its beginning, with *registers* and the others 0."""
        if len(code) > STACK - CODE:
            raise BadInput(f"{len(code):#x} bytes of code; there is room for {STACK - CODE:#x}")
        self._memory.put(CODE - BASE, code)
        self.vcpu.enter_user_mode(BASE, CODE, rsp=STACK, **registers)

    @override
    def _release(self) -> None:
        self._undo.close()


def x86_vcpu(vm: LinuxVm) -> X86Vcpu:
    """A vCPU of *vm*; raises BadInput where it is none of x86's."""
    vcpu = vm.create_vcpu()
    if not isinstance(vcpu, X86Vcpu):
        vcpu.close()
        raise BadInput("a vCPU of this machine runs no x86 program")
    return vcpu

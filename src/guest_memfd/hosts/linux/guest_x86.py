"""A VM with one small program in it. Rule of this file: code and page tables in a plain slot, so that any KVM runs it.

The program is position-independent 64-bit code at CPL 3, which every x86 KVM executes natively or on its page tables; a KVM
that emulates CPL 0 (kvm_pvm) would read the memory of a slot through userspace_addr instead of the guest_memfd.
"""

from __future__ import annotations

import ctypes
from contextlib import ExitStack
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, PROT_READ, PROT_WRITE

from guest_memfd.errors import BadInput
from guest_memfd.hosts.linux import syscall
from guest_memfd.hosts.linux.fd import Owned
from guest_memfd.hosts.linux.system import System
from guest_memfd.hosts.linux.vcpu_x86 import X86Vcpu, identity_tables

BASE, SIZE = 0x10000, 0x10000
"""The plain slot, number 0: page tables first."""
CODE, STACK = BASE + 0x8000, BASE + SIZE
"""Where the program starts; where its stack ends."""
RESULT = 0x3000_0000
"""No slot is here: a store ends the program as an Mmio exit."""


class SmallGuest(Owned):
    """A VM of *system*, its first vCPU, and the plain slot; guest addresses below 1 GiB are mapped as they are.

    Slots from number 1 on are the caller's. Raises SyscallFailed, BadInput where vCPUs are not x86's.
    """

    def __init__(self, system: System) -> None:
        with ExitStack() as undo:
            self.vm = undo.enter_context(system.create_vm())
            self._address = syscall.mmap(-1, 0, SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS)
            undo.callback(syscall.munmap, self._address, SIZE)
            self._put(BASE, identity_tables(BASE))
            self.vm.set_user_memory_region(0, 0, BASE, SIZE, self._address)
            vcpu = undo.enter_context(self.vm.create_vcpu())
            if not isinstance(vcpu, X86Vcpu):
                raise BadInput("a SmallGuest is an x86 program")
            self.vcpu = vcpu
            self._undo = undo.pop_all()
        self.closed = False

    def start(self, code: bytes, **registers: int) -> None:
        """The next `vcpu.run` executes *code* from its beginning, with *registers* and the others 0."""
        if len(code) > STACK - CODE:
            raise BadInput(f"{len(code):#x} bytes of code; there is room for {STACK - CODE:#x}")
        self._put(CODE, code)
        self.vcpu.enter_user_mode(BASE, CODE, rsp=STACK, **registers)

    # Memory of our own that nobody takes away.
    def _put(self, gpa: int, data: bytes) -> None:
        ctypes.memmove(self._address + gpa - BASE, data, len(data))

    def _release(self) -> None:
        self._undo.close()

"""A vCPU: KVM_RUN and what it came back with. This is the same on every architecture; registers are not.

Every run can be ended: by a timeout, by another thread's `kick`, and by `immediate_exit`.
"""

from __future__ import annotations

import ctypes
from abc import abstractmethod
from collections.abc import Mapping as Map
from ctypes import c_uint64
from errno import EFAULT, EINTR, EINVAL
from mmap import MAP_SHARED, PROT_READ, PROT_WRITE
from typing import TYPE_CHECKING

from guest_memfd.compat import override
from guest_memfd.errors import EHWPOISON, BadInput, SyscallFailed
from guest_memfd.linux import stats, syscall
from guest_memfd.linux.fd import Descriptor
from guest_memfd.linux.kick import Thread, drain, let_in, this_thread
from guest_memfd.uapi import kvm as uapi
from guest_memfd.uapi import kvm_run as exits
from guest_memfd.words.units import Ipa

if TYPE_CHECKING:
    from guest_memfd.linux.vm import LinuxVm

_LONGEST = 1e9
"""Seconds."""


class LinuxVcpu(Descriptor):
    """uapi/kvm.py KvmVcpu number *vcpu_id* of *vm*; a subclass per architecture has the registers.

    `page`: the shared struct kvm_run. One thread at a time may run it, and none may while it is closed.
    """

    def __init__(self, vm: LinuxVm, fd: int, vcpu_id: int) -> None:
        super().__init__(fd, f"kvm-vcpu:{vcpu_id}")
        self._size = vm.vcpu_mmap_size
        try:
            self._address = syscall.mmap(fd, 0, self._size, PROT_READ | PROT_WRITE, MAP_SHARED)
        # The constructor raises, so no one else will close the descriptor.
        except SyscallFailed:
            self.closed = True
            super()._release()
            raise
        self.page = exits.KvmRun.from_address(self._address)
        self._thread: Thread | None = None
        self._running = False
        self._last: exits.Exit | None = None

    @override
    def _release(self) -> None:
        del self.page                       # a stray use is an AttributeError, not a SIGSEGV
        syscall.munmap(self._address, self._size)
        super()._release()

    # -- KVM_RUN -------------------------------------------------------------------------------------------------

    def run(self, timeout: float | None = None) -> exits.Exit:
        """KVM_RUN until an exit, or for *timeout* seconds, or until a signal: Intr.

        EFAULT and EHWPOISON are exits: MemoryFault, or Unknown when KVM says no more. Raises SyscallFailed for the rest,
        BadInput for a time that is none.
        """
        fd, thread = self.fileno(), this_thread()
        # The mask belongs to the vCPU, and is made for the thread that runs it: made again when another thread takes
        # over.
        if thread is not self._thread:
            let_in(fd, thread)
            self._thread = thread
        if timeout is None:
            return self._enter(fd)
        if not timeout < _LONGEST:
            raise BadInput(f"a timeout of {timeout} s; None is without an end")
        thread.arm(timeout)
        try:
            return self._enter(fd)
        finally:
            thread.disarm()

    def _enter(self, fd: int) -> exits.Exit:
        self._running = True
        ret = syscall.libc.ioctl(fd, uapi.RUN, 0)
        errno = ctypes.get_errno() if ret < 0 else 0
        self._running = False
        if errno == EINTR:
            # The signal stays pending while it is blocked. Left there it would end every later run at once.
            drain()
            self._last = exits.Intr()
            return self._last
        if errno not in (0, EFAULT, EHWPOISON):
            raise SyscallFailed(errno, "KVM_RUN")
        told = exits.decode_run(ctypes.string_at(self._address, exits.RUN_SAYS), errno)
        # Only what goes to a port lies further on in the page.
        if type(told) is exits.Io and told.is_write:
            told = exits.decode_run(ctypes.string_at(self._address, self._size), errno)
        if errno and not isinstance(told, exits.MemoryFault):
            told = exits.Unknown(self.page.exit_reason, errno)      # the page may still be that of the exit before
        self._last = told
        return told

    @property
    def immediate_exit(self) -> bool:
        """kvm_run.immediate_exit: while it is set, `run` finishes what the last exit began, and is Intr."""
        self.fileno()
        return bool(self.page.immediate_exit)

    @immediate_exit.setter
    def immediate_exit(self, value: bool) -> None:
        self.fileno()
        self.page.immediate_exit = value

    def kick(self) -> None:
        """From another thread: set `immediate_exit`, and make `run` come back if it is under way.

        Every later run is Intr, too, until someone sets `immediate_exit` to False: no kick is lost.
        """
        # The flag before the signal. A vCPU that is about to enter sees the flag, one that is inside gets the signal;
        # the other order would lose a kick between the two.
        self.immediate_exit = True
        thread = self._thread
        if thread is not None and self._running:
            thread.kick()

    def complete(self) -> None:
        """Finish the access or hypercall of the last exit without going on: needed before registers are changed."""
        if self._last is None or isinstance(self._last, exits.Intr):
            return
        # KVM finishes an access at the next entry. With the flag set it does that and comes back before any
        # instruction.
        before = self.immediate_exit
        self.immediate_exit = True
        try:
            self._enter(self.fileno())
        finally:
            self.immediate_exit = before

    def answer(self, data: bytes) -> None:
        """What the last exit waits for: the data of an MMIO or port read (little-endian), or a hypercall's result."""
        self.fileno()
        data = bytes(memoryview(data))
        match self._last:
            case exits.Mmio(is_write=False):
                ctypes.memmove(self.page.mmio.data, data.ljust(8, b"\0"), 8)
            case exits.Io(is_write=False, size=size, times=times):
                ctypes.memmove(self._address + self.page.io.data_offset, data.ljust(size * times, b"\0"), size * times)
            case exits.HypercallExit():
                self._hypercall_result(int.from_bytes(data, "little"))
            case _:
                raise SyscallFailed(EINVAL, "KVM_RUN", f"the last exit, {self._last}, waits for nothing")

    @abstractmethod
    def _hypercall_result(self, value: int) -> None: ...

    # -- registers, statistics -------------------------------------------------------------------------------------

    def get_one_reg(self, reg: int) -> int:
        """KVM_GET_ONE_REG of a register of 64 bits or fewer; raises SyscallFailed."""
        value = c_uint64()
        syscall.ioctl(self.fileno(), uapi.GET_ONE_REG, uapi.OneReg(reg, ctypes.addressof(value)), call="KVM_GET_ONE_REG",
                      why=f"register {reg:#x}")
        return value.value

    def set_one_reg(self, reg: int, value: int) -> None:
        """KVM_SET_ONE_REG of a register of 64 bits or fewer; raises SyscallFailed."""
        word = c_uint64(value)
        syscall.ioctl(self.fileno(), uapi.SET_ONE_REG, uapi.OneReg(reg, ctypes.addressof(word)), call="KVM_SET_ONE_REG",
                      why=f"register {reg:#x}")

    @abstractmethod
    def inject_external_abort(self) -> None:
        """KVM_SET_VCPU_EVENTS; raises SyscallFailed, EOPNOTSUPP where the architecture has no such thing."""

    def pre_fault_memory(self, gpa: Ipa, size: int) -> int:
        """KVM_PRE_FAULT_MEMORY, bytes: how many of them it came. EOPNOTSUPP without two-dimensional paging."""
        argument = uapi.PreFaultMemory(gpa=gpa, size=size)
        syscall.ioctl(self.fileno(), uapi.PRE_FAULT_MEMORY, argument, call="KVM_PRE_FAULT_MEMORY",
                      why=f"{size:#x} bytes at {gpa:#x}")
        return size - int(argument.size)

    def statistics(self) -> Map[str, int]:
        """KVM_GET_STATS_FD: counters by name, ``exits`` among them."""
        return stats.read(self)

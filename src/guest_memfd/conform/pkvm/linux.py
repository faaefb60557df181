"""This kernel's pKVM as a subject. The process ends after its sequence, and is not given back."""

from __future__ import annotations

import os
from errno import EINVAL
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, PROT_READ, PROT_WRITE

from guest_memfd.compat import override
from guest_memfd.conform.linux import toucher
from guest_memfd.conform.pkvm.subject import BASE, DEVICE, PROGRAM, SIZE, PkvmSubject, program
from guest_memfd.errors import HostUnavailable, Signalled, SyscallFailed
from guest_memfd.linux import syscall
from guest_memfd.linux.anonymous import Anonymous
from guest_memfd.linux.system import System
from guest_memfd.linux.vcpu import LinuxVcpu
from guest_memfd.linux.vm import LinuxVm
from guest_memfd.probe.ask.calls import call
from guest_memfd.uapi import kvm_arm64 as arm64
from guest_memfd.uapi import kvm_run
from guest_memfd.uapi.kvm import PATH
from guest_memfd.uapi.memory import Advice
from guest_memfd.words.units import PAGE, Va

SECONDS = 10.0


class LinuxPkvm(PkvmSubject):
    """A process on the KVM at *path*."""

    def __init__(self, path: str = PATH) -> None:
        super().__init__()
        self.system = System(path)
        self.toucher = toucher()
        self.toucher.arm()
        self.memory = os.open("/proc/self/mem", os.O_RDWR)
        self.address = Va(syscall.mmap(-1, 0, SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS))
        self._codes: list[Anonymous] = []               # kept up to the end of the process
        self.vm: LinuxVm | None = None
        self.vcpu: LinuxVcpu | None = None

    @override
    def open_vm(self, protected: bool) -> None:
        """KVM_CREATE_VM, two slots, a vCPU. The program has a page of its own, new for each VM."""
        self.vm = self.system.create_vm(arm64.VM_TYPE_PROTECTED if protected else 0)
        code = Anonymous(PAGE)
        code.put(0, program())
        self._codes.append(code)
        self.vm.set_user_memory_region(0, 0, PROGRAM, PAGE, code.address)
        self.vm.set_user_memory_region(1, 0, BASE, SIZE, self.address)
        self.vcpu = self.vm.create_vcpu()
        for register, value in ((arm64.PC, PROGRAM), (arm64.X[20], DEVICE)):
            self.vcpu.set_one_reg(register, value)

    @override
    def close_vm(self) -> None:
        """close(2) of both descriptors."""
        assert self.vm is not None
        assert self.vcpu is not None
        self.vcpu.close()
        self.vm.close()
        self.vm = self.vcpu = None

    @override
    def running(self) -> bool:
        """Whether there is a VM."""
        return self.vcpu is not None

    @override
    def run(self) -> kvm_run.Exit:
        """KVM_RUN, for SECONDS at most."""
        assert self.vcpu is not None
        return self.vcpu.run(SECONDS)

    @override
    def reply(self, value: int) -> None:
        """By way of struct kvm_run."""
        assert self.vcpu is not None
        self.vcpu.answer(value.to_bytes(8, "little"))

    @override
    def load(self, at: int) -> int:
        """By an instruction of this CPU."""
        return self.toucher.load(self.address + at)

    @override
    def store(self, at: int, value: int) -> None:
        """By an instruction of this CPU."""
        self.toucher.store(self.address + at, value)

    @override
    def copy_from(self, at: int) -> int:
        """write(2) to a pipe."""
        ours, theirs = os.pipe()
        try:
            call("write", theirs, self.address + at, 8)
            return int.from_bytes(os.read(ours, 8), "little")
        finally:
            os.close(ours)
            os.close(theirs)

    @override
    def copy_to(self, at: int, value: int) -> None:
        """read(2) from a pipe."""
        ours, theirs = os.pipe()
        try:
            os.write(theirs, value.to_bytes(8, "little"))
            call("read", ours, self.address + at, 8)
        finally:
            os.close(ours)
            os.close(theirs)

    @override
    def kernel_load(self, at: int) -> int:
        """By way of /proc/self/mem."""
        with syscall.named("pread"):
            return int.from_bytes(os.pread(self.memory, 8, self.address + at), "little")

    @override
    def kernel_store(self, at: int, value: int) -> None:
        """By way of /proc/self/mem."""
        with syscall.named("pwrite"):
            os.pwrite(self.memory, value.to_bytes(8, "little"), self.address + at)

    @override
    def discard(self, page: int) -> None:
        """madvise(2) of it with MADV_DONTNEED."""
        syscall.madvise(self.address + page * PAGE, PAGE, Advice.DONTNEED)

    @override
    def fork_load(self, at: int) -> str:
        """The child says it by a pipe, and exits."""
        ours, theirs = os.pipe()
        pid = os.fork()
        if not pid:
            try:
                said = f"{self.load(at):#x}"
            except Signalled as error:
                said = self._refused(error)
            os.write(theirs, said.encode())
            os._exit(0)
        os.close(theirs)
        said = os.read(ours, 4096).decode()
        os.close(ours)
        os.waitpid(pid, 0)
        return said

    @override
    def end(self) -> list[str]:
        """Nothing: the process ends."""
        return []


def without_protection(path: str) -> str:
    """Why the KVM at *path* has no protected VMs, "" if it has. Raises HostUnavailable."""
    with System(path) as system:
        try:
            system.create_vm(arm64.VM_TYPE_PROTECTED).close()
        except SyscallFailed as error:
            release = os.uname().release
            # kvm_arch_init_vm() says EINVAL of a type that it does not know. Another errno is no answer to that.
            if error.errno != EINVAL:
                raise HostUnavailable(f"Linux {release}: {error}") from error
            return (f"Linux {release} makes no protected VM (KVM_CREATE_VM of type {arm64.VM_TYPE_PROTECTED:#x} is EINVAL); "
                    "it takes arm64, 7.1 or later, and kvm-arm.mode=protected on the kernel's command line")
    return ""

"""This kernel's /dev/kvm as a subject: every call goes to the kernel as it is, a bad descriptor where there should be one.

On x86 guests run at CPL 3, where every KVM takes the path of a guest_memfd (linux/vcpu_x86.py says why).
"""

from __future__ import annotations

import ctypes
import os
import platform
import zlib
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from mmap import MAP_PRIVATE, MAP_SHARED, PROT_READ, PROT_WRITE
from typing import Any

from guest_memfd.compat import override
from guest_memfd.conform.operations import OWN_SIZE, OWN_SLOT
from guest_memfd.conform.subject import ARM64_STORE, MOST_PAGES, NO_MAPPING, RESULT, Pages, Subject, arm64_program
from guest_memfd.conform.touch import Toucher
from guest_memfd.errors import Signalled, SyscallFailed, errno_name
from guest_memfd.linux import fault_path, syscall
from guest_memfd.linux.anonymous import Anonymous
from guest_memfd.linux.fd import OwnedFd, number_of
from guest_memfd.linux.guest_memfd import GuestMemfd
from guest_memfd.linux.guest_x86 import CODE
from guest_memfd.linux.mapping import BUS_ADRERR
from guest_memfd.linux.system import System
from guest_memfd.linux.vcpu_x86 import identity_tables
from guest_memfd.probe.ask.calls import call
from guest_memfd.uapi import kvm_arm64 as arm64
from guest_memfd.uapi import kvm_run
from guest_memfd.uapi.kvm import PATH
from guest_memfd.words.units import PAGE, Ipa

# mov (%rbx),%rax | mov %rax,(%rcx) | jmp . - and: mov %rdx,(%rbx) | mov %rax,(%rcx) | jmp .
_LOAD, _STORE = bytes.fromhex("488b03" "488901" "ebfe"), bytes.fromhex("488913" "488901" "ebfe")
SECONDS = 2.0
_ARM64 = platform.machine() == "aarch64"
_GUESTS = ("guest_load", "guest_store")
# Arguments with which little would be lost should a kernel take the call:
# fchmod(2) to the mode that the file has anyway.
_OTHERS: dict[str, tuple[Any, ...]] = {
    "read": (ctypes.create_string_buffer(8), 8), "write": (b"12345678", 8), "lseek": (0, 0), "ftruncate": (PAGE,),
    "pread64": (ctypes.create_string_buffer(8), 8, 0), "pwrite64": (b"12345678", 8, 0), "fchmod": (0o600,), "fsync": (),
}


toucher = cache(Toucher)
"""One for this process and its children: to assemble it takes longer than many a sequence."""


class _Window(OwnedFd):
    """*nr* bytes of a file from byte *offset* on, at `address`; *size* is what was asked for."""

    def __init__(self, fd: int, offset: int, nr: int, how: int) -> None:
        protection = PROT_READ | (0 if how == 2 else PROT_WRITE)
        self.address = syscall.mmap(fd, offset, nr, protection, MAP_PRIVATE if how == 1 else MAP_SHARED)
        self.size, self.closed = nr, False

    def read(self, at: int, nr: int) -> bytes:
        """By the kernel; raises Signalled where it stops."""
        data = ctypes.create_string_buffer(nr)
        self._whole(at, syscall.copy_from(self.address + at, ctypes.addressof(data), nr) if nr else 0, nr)
        return data.raw

    def write(self, at: int, data: bytes) -> None:
        """By the kernel; raises Signalled where it stops."""
        held = ctypes.create_string_buffer(data, len(data))
        self._whole(at, syscall.copy_to(self.address + at, ctypes.addressof(held), len(data)) if data else 0, len(data))

    def _whole(self, at: int, done: int, nr: int) -> None:
        # process_vm_writev(2) says how far it came and not why. SIGBUS is a
        # guess that no one reads: callers tell the place only.
        if done < nr:
            raise Signalled("SIGBUS", self.address + at + done, BUS_ADRERR)

    def advise(self, advice: int, at: int, nr: int) -> None:
        """madvise(2) of part of it."""
        syscall.madvise(self.address + at, nr, advice)

    @override
    def _release(self) -> None:
        syscall.munmap(self.address, self.size)


class LinuxSubject(Subject):
    """This process on the KVM at *path*. It is not given back: the process ends."""

    def __init__(self, path: str = PATH) -> None:
        super().__init__()
        self.system = System(path)
        self.toucher = toucher()
        self.toucher.arm()
        self._plain: list[Anonymous] = []
        # -1 would do for the kernel. But what has been closed also has `closed`
        # and a size, which subject.py asks before it calls.
        self._none = GuestMemfd(os.dup(self.system.fileno()), "guest_memfd", 0)
        self._none.close()

    @override
    def file(self, register: int) -> Any:
        """The open file, or one that is closed."""
        return self.files.get(register, self._none)

    def _fd(self, register: int) -> int:
        return number_of(self.file(register))

    @override
    def create(self, register: int, vm: int, size: int, flags: int) -> None:
        """KVM_CREATE_GUEST_MEMFD, whatever size and flags."""
        self.leave(register)
        self.files[register] = _ours(self.vm(vm).create_guest_memfd(size, flags))

    @override
    def dup(self, register: int, of: int) -> None:
        """dup(2), into the lowest free descriptor."""
        fd, size = call("fcntl", self._fd(of), 0, 0), self.file(of).size            # F_DUPFD
        self.leave(register)
        self.files[register] = GuestMemfd(fd, "guest_memfd", size)

    @override
    def close(self, register: int) -> None:
        """close(2), EBADF for an empty register."""
        if register not in self.files:
            call("fcntl", -1, 1)                        # EBADF, as close(2) of it; that one no one should try
        self.files.pop(register).close()

    @override
    def do_fallocate(self, file: Any, mode: int, offset: int, nr: int) -> None:
        """fallocate(2), with a descriptor that may be -1."""
        syscall.fallocate(number_of(file), mode, offset, nr)

    def map(self, register: int, file: int, offset: int, nr: int, how: int) -> None:
        """mmap(2), in place of what the register had."""
        self.unmap(register)
        self.mappings[register] = _Window(self._fd(file), offset, nr, how)

    @override
    def stat(self, register: int) -> str:
        """fstat(2), with a descriptor that may be -1."""
        with syscall.named("fstat"):
            found = os.fstat(self._fd(register))
        return f"size {found.st_size:#x} blocks {found.st_blocks}"

    @override
    def other_call(self, register: int, name: str) -> None:
        """As every subject's, with arguments that would do no harm."""
        call(name, self._fd(register), *_OTHERS[name])

    def load(self, register: int, at: int) -> str:
        """A load by the CPU."""
        mapping = self.mappings.get(register)
        if mapping is None or at + 8 > mapping.size:
            return NO_MAPPING
        return self.toucher.load(mapping.address + at).to_bytes(8, "little").hex()

    def store(self, register: int, at: int, value: int) -> str | None:
        """A store by the CPU."""
        mapping = self.mappings.get(register)
        if mapping is None or at + 8 > mapping.size:
            return NO_MAPPING
        self.toucher.store(mapping.address + at, value)
        return None

    def pin(self, number: int, register: int, at: int) -> str | None:
        """A page in a pipe: vmsplice(2) pins it (FOLL_GET), and does not copy."""
        self.unpin(number)
        mapping = self.mappings.get(register)
        if mapping is None or at + 8 > mapping.size:
            return NO_MAPPING
        ours, theirs = os.pipe()
        try:
            call("vmsplice", theirs, (ctypes.c_uint64 * 2)(mapping.address + at, 8), 1, 0)
        except SyscallFailed:
            os.close(ours)
            raise
        finally:
            os.close(theirs)
        self.pins[number] = ours
        return None

    def unpin(self, number: int) -> str:
        """What comes out of the pipe."""
        if number not in self.pins:
            return "no pin"
        fd = self.pins.pop(number)
        data = os.read(fd, 8)
        os.close(fd)
        return data.hex()

    def child_load(self, register: int, at: int) -> str:
        """A load in a forked child, which exits then."""
        # By the kernel, and not by the CPU as in `load`: a signal would
        # have to be told apart from the child's own death.
        return _in_child(lambda: self.read(register, at, 8))

    def child_vm(self, vm: int) -> str:
        """An ioctl in a forked child."""
        known = self.vm(vm)
        return _in_child(lambda: str(known.check_extension(0)))

    @override
    def new_vm(self) -> Any:
        """Its slot 0 is plain memory; on x86 with page tables before the program."""
        vm = self.system.create_vm()
        memory = Anonymous(OWN_SIZE)
        if _ARM64:
            memory.put(0, arm64_program())
        else:
            # Plain memory, for the program and its tables must be where KVM's emulator looks as well: at userspace_addr.
            memory.put(0, identity_tables(OWN_SLOT))
            memory.put(CODE - OWN_SLOT, _LOAD)
            memory.put(CODE + PAGE - OWN_SLOT, _STORE)
        vm.set_user_memory_region(0, 0, Ipa(OWN_SLOT), OWN_SIZE, memory.address)
        self._plain.append(memory)
        return vm

    @override
    def new_vcpu(self, vm: Any) -> Any:
        """A vCPU of this machine's architecture."""
        return vm.create_vcpu()

    @override
    def run_guest(self, vcpu: Any, gpa: int, value: int | None) -> kvm_run.Exit:
        """As every subject's; on x86 at CPL 3."""
        vcpu.complete()
        if _ARM64:
            start = OWN_SLOT if value is None else ARM64_STORE
            for register, number in ((arm64.PC, start), (arm64.X[0], value or 0), (arm64.X[1], gpa), (arm64.X[2], RESULT)):
                vcpu.set_one_reg(register, number)
        else:
            vcpu.enter_user_mode(OWN_SLOT, CODE if value is None else CODE + PAGE, rbx=gpa, rcx=RESULT, rdx=value or 0)
        told: kvm_run.Exit = vcpu.run(SECONDS)
        return told

    @override
    def seen(self) -> Iterator[tuple[int, Pages]]:
        """By cachestat(2), page by page, and a mapping."""
        for register, file in sorted(self.files.items()):
            count, sums = file.resident(), dict[int, int | None]()
            # cachestat(2) counts and does not list: one call a page.
            # mincore(2) needs a mapping, and not every file has one.
            if file.size <= MOST_PAGES * PAGE and count:
                there = [index for index in range(file.size // PAGE) if file.resident(index * PAGE, PAGE)]
                sums = self._sums(file, there)
            yield register, Pages(file.size, count, sums)

    # By a mapping of the moment, of pages that are there: nothing is allocated.
    @staticmethod
    def _sums(file: GuestMemfd, there: list[int]) -> dict[int, int | None]:
        found: dict[int, int | None] = dict.fromkeys(there)
        # A file without MMAP has no mapping (ENODEV), and a private page is a
        # SIGBUS: both stay None, as nothing can be compared.
        with suppress(SyscallFailed), _Window(file.fileno(), 0, file.size, 0) as window:
            for index in there:
                with suppress(Signalled):
                    found[index] = zlib.crc32(window.read(index * PAGE, PAGE))
        return found

    @override
    def end(self) -> list[str]:
        """Nothing: the process ends."""
        return []


def _ours(file: Any) -> GuestMemfd:
    assert isinstance(file, GuestMemfd)
    return file


def _in_child(act: Any) -> str:
    ours, theirs = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            said = act()
        except SyscallFailed as error:
            said = errno_name(error.errno)
        os.write(theirs, said.encode())
        os._exit(0)
    os.close(theirs)
    said = os.read(ours, 4096).decode()
    os.close(ours)
    os.waitpid(pid, 0)
    return said


def lacking(path: str) -> dict[str, str]:
    """Operations that cannot be compared on this machine, each with the reason. Raises HostUnavailable, SyscallFailed."""
    with System(path) as system:
        toucher()                                       # before there are children
        # KVM on arm64 emulates no loads from memory: whatever a guest touches first is a fault at stage 2.
        native = _ARM64 or fault_path.native(system, False)
    return {} if native else dict.fromkeys(_GUESTS, "a guest at CPL 3 does not reach the guest_memfd by a fault of its own")

"""What a row works on, made on demand in the row's own process: /dev/kvm, a VM, a vCPU, files, mappings.

What fails here is not what the row is about, so it makes the row unfit and says why; what a row is about it calls itself.
"""

from __future__ import annotations

import ctypes
import os
import struct
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

from guest_memfd.linux.abi.memory import Cachestat, CachestatRange
from guest_memfd.linux.mapping import PAGE
from guest_memfd.probe.ask.calls import FAILED, MAP_ANONYMOUS, MAP_PRIVATE, MAP_SHARED, PUNCH, RW, attempt, call, name_of
from guest_memfd.probe.ask.child import Slate, Unfit
from guest_memfd.probe.ask.row import KernelFeatures
from guest_memfd.uapi import kvm
from guest_memfd.uapi.kvm import SHARED, GuestMemfdFlag

_T = TypeVar("_T")

SIZE = 4 * PAGE
"""Bytes of a file under test, where the row does not say otherwise."""

SECRET = "secret"
"""Says memfd_secret where others say which flags of KVM_CREATE_GUEST_MEMFD."""


@dataclass
class Here:
    """This process, for one row. Descriptors are numbers, addresses too; nothing is ever closed: the process ends."""

    slate: Slate
    path: str
    features: KernelFeatures
    _kvm: int = -1
    _vm: int = -1

    @property
    def kvm(self) -> int:
        """A descriptor of /dev/kvm, opened by the first use; raises Unfit where that fails."""
        if self._kvm < 0:
            self._kvm = self.open(self.path)
        return self._kvm

    @property
    def vm(self) -> int:
        """A VM of the default type."""
        if self._vm < 0:
            self._vm = self.another_vm()
        return self._vm

    def adopt(self, vm: int) -> None:
        """Make *vm* the one that files and slots of this row belong to."""
        self._vm = vm

    def another_vm(self) -> int:
        """A VM that is not `vm`."""
        return _must("KVM_CREATE_VM", lambda: call("ioctl", self.kvm, kvm.CREATE_VM, 0))

    def vcpu(self) -> int:
        """A vCPU of the VM."""
        return _must("KVM_CREATE_VCPU", lambda: call("ioctl", self.vm, kvm.CREATE_VCPU, 0))

    def gmem(self, flags: int = SHARED, size: int = SIZE, vm: int | None = None) -> int:
        """A guest_memfd of *size* bytes of *vm*; raises Unfit where the kernel lacks one of *flags*."""
        # Asked before the call: EINVAL could not say whether it is the flag or the size.
        for flag in GuestMemfdFlag:
            if flags & flag and f"flag {int(flag)}" not in self.features:
                raise Unfit(self.features.why(f"flag {int(flag)}"))
        owner = self.vm if vm is None else vm
        return _must("KVM_CREATE_GUEST_MEMFD", lambda: create(owner, size, flags))

    def bindable(self, size: int = SIZE, vm: int | None = None) -> int:
        """A guest_memfd that a default VM takes for a slot: any; on arm64 one that can be mapped, and is shared."""
        plain = "arm64" not in self.features or "unmappable slots" in self.features
        return self.gmem(0 if plain else SHARED, size, vm)

    def secret(self, size: int = SIZE) -> int:
        """A memfd_secret of *size* bytes; 0: none set."""
        fd = _must("memfd_secret", lambda: call("memfd_secret", 0))
        if size:
            _must("ftruncate of a memfd_secret", lambda: call("ftruncate", fd, size))
        return fd

    def file(self, which: int | str) -> int:
        """The file under test: a guest_memfd with flags *which*, or `SECRET`."""
        return self.gmem(int(which)) if which != SECRET else self.secret()

    def open(self, path: str) -> int:
        """A file that there is."""
        return _must(f"open {path}", lambda: os.open(path, os.O_RDWR | os.O_CLOEXEC))

    def temporary(self) -> int:
        """An ordinary file of `SIZE` bytes that has no name any more."""
        def make() -> int:
            with tempfile.TemporaryFile() as file:
                file.write(b"t" * SIZE)
                file.flush()
                return os.dup(file.fileno())

        return _must("a temporary file", make)

    def direct(self) -> int:
        """An ordinary file that is read and written with O_DIRECT, by a file system that does so: tmpfs only copies."""
        for folder in (tempfile.gettempdir(), "/var/tmp", os.getcwd()):
            with suppress(OSError):
                fd, name = tempfile.mkstemp(dir=folder)
                os.unlink(name)
                if _in_memory(fd):
                    continue
                os.write(fd, b"d" * SIZE)
                os.fsync(fd)
                return os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_DIRECT)
        raise Unfit("no folder is on a file system that reads and writes memory directly (O_DIRECT)")

    def map(self, fd: int, size: int = SIZE, *, prot: int = RW, flags: int = MAP_SHARED, offset: int = 0) -> int:
        """Map *fd*; faults are told as offsets into the last such mapping."""
        address = _must("mmap", lambda: call("mmap", 0, size, prot, flags, fd, offset))
        self.slate.mark(address, size)
        return address

    def memory(self, size: int = SIZE) -> int:
        """The address of *size* bytes of private anonymous memory, not yet touched; raises Unfit."""
        return _must("mmap", lambda: call("mmap", 0, size, RW, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0))

    def hole(self, size: int = SIZE) -> int:
        """An address with nothing mapped in *size* bytes from there."""
        address = self.memory(size)
        call("munmap", address, size)
        return address

    def descend(self) -> None:
        """Give up all privileges: become nobody."""
        if os.geteuid() == 0:
            def nobody() -> None:
                # Groups first, the user last: without the user's privileges the other two are refused.
                os.setgroups([])
                os.setresgid(65534, 65534, 65534)
                os.setresuid(65534, 65534, 65534)

            _must("becoming nobody", nobody)

    def fork(self, act: Callable[[], object]) -> str:
        """What *act* returns in a forked child, ``ok`` for None, or the errno it fails with; a signal's name."""
        ours, theirs = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.write(theirs, attempt(act).encode())
            os._exit(0)
        os.close(theirs)
        text = os.read(ours, 4096).decode()
        os.waitpid(pid, 0)
        return text


# tmpfs, and the first root of a kernel that is on one or on ramfs.
def _in_memory(fd: int) -> bool:
    found = ctypes.create_string_buffer(256)
    call("fstatfs", fd, found)
    return struct.unpack_from("<Q", found.raw)[0] in (0x01021994, 0x858458F6)


def _must(what: str, do: Callable[[], _T]) -> _T:
    try:
        return do()
    except FAILED as error:
        raise Unfit(f"{what}: {name_of(error)}") from error


def create(vm: int, size: int, flags: int) -> int:
    """KVM_CREATE_GUEST_MEMFD, whatever size and flags."""
    return call("ioctl", vm, kvm.CREATE_GUEST_MEMFD, kvm.CreateGuestMemfd(size, flags))


def resident(fd: int, offset: int = 0, nr: int = 0) -> int:
    """Pages of *fd* in the page cache, counted by cachestat(2); *nr* 0: to the end."""
    counts = Cachestat()
    _must("cachestat", lambda: call("cachestat", fd, CachestatRange(offset, nr), counts, 0))
    return int(counts.nr_cache)


def punch(fd: int, offset: int, nr: int) -> None:
    """Free [offset, offset+nr) bytes of *fd* by fallocate(2) with PUNCH_HOLE and KEEP_SIZE; raises SyscallFailed."""
    call("fallocate", fd, PUNCH, offset, nr)


def bind(
    vm: int, slot: int, flags: int, gpa: int, size: int, uaddr: int = 0, fd: int = 0, offset: int = 0
) -> None:
    """KVM_SET_USER_MEMORY_REGION2, whatever its fields."""
    call("ioctl", vm, kvm.SET_USER_MEMORY_REGION2,
         kvm.UserspaceMemoryRegion2(slot, flags, gpa, size, uaddr, offset & (1 << 64) - 1, fd & 0xFFFFFFFF))

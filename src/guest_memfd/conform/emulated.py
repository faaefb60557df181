"""The emulated /dev/kvm as a subject. Its process has a table of descriptors here, since the device knows files alone."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from errno import EBADF
from typing import Any

from guest_memfd.compat import override
from guest_memfd.conform.operations import OWN_SIZE, OWN_SLOT
from guest_memfd.conform.subject import ARM64_STORE, MOST_PAGES, NO_MAPPING, RESULT, ZEROS, Pages, Subject, arm64_program
from guest_memfd.errors import SyscallFailed
from guest_memfd.testing.hosts import Emulated
from guest_memfd.uapi import kvm_run
from guest_memfd.uapi.kvm import SHARED, GuestMemfdFlag, MemFlag
from guest_memfd.words.pagestate import SHARED_PAGE
from guest_memfd.words.units import PAGE, Index

SECONDS = 5.0


@dataclass
class EmulatedWorld:
    """A machine that lives on from sequence to sequence, under *release*, its files served by *design*; all laws are judged.

    After something went wrong another machine takes over.
    """

    release: str
    architecture: str
    design: str = "library"
    _host: Emulated | None = field(default=None, repr=False)
    _closed: Any = field(default=None, repr=False)

    def subject(self) -> EmulatedSubject:
        """A new process with nothing open."""
        # One machine for many sequences: what one of them leaves behind is seen (`left`), a boot each would hide it.
        if self._host is None:
            self._host = Emulated("kvm", self.design, kvm_release=self.release,
                                  kvm_architecture=self.architecture, on_free="nothing")
            with self._host.open() as device, device.create_vm() as vm, vm.create_guest_memfd(PAGE, int(SHARED)) as file:
                # Closed at once: its number may be asked about by every
                # process that follows, and the answer is always EBADF.
                self._closed = file
        return EmulatedSubject(self._host, self._closed)

    def renew(self) -> None:
        """The next process runs on another machine."""
        self._host = None


class EmulatedSubject(Subject):
    """A process on *host*. *closed*: a file of no one's; what the device says of a bad descriptor, it says of this."""

    def __init__(self, host: Emulated, closed: Any) -> None:
        super().__init__()
        self.host, self._closed = host, closed
        self.device = host.machine.open("/dev/kvm", host.design)
        self._own: list[Any] = []
        self._holders: dict[int, int] = {}              # registers that hold a file, by its id

    @override
    def file(self, register: int) -> Any:
        """The open file, or one of no one's that is closed."""
        return self.files.get(register, self._closed)

    @override
    def create(self, register: int, vm: int, size: int, flags: int) -> None:
        """KVM_CREATE_GUEST_MEMFD, and a first descriptor."""
        super().create(register, vm, size, flags)
        self._holders[id(self.files[register])] = 1

    @override
    def dup(self, register: int, of: int) -> None:
        """dup(2): one more descriptor of the same file."""
        if of not in self.files:
            raise SyscallFailed(EBADF, "dup")
        file = self.files[of]
        self._holders[id(file)] += 1                    # before the register is left: it may be the same
        self.leave(register)
        self.files[register] = file

    @override
    def close(self, register: int) -> None:
        """close(2): the file goes with the last descriptor."""
        if register not in self.files:
            raise SyscallFailed(EBADF, "close")
        file = self.files.pop(register)
        self._holders[id(file)] -= 1
        if not self._holders[id(file)]:
            file.close()

    def map(self, register: int, file: int, offset: int, nr: int, how: int) -> None:
        """mmap(2), in place of what the register had."""
        self.unmap(register)
        self.mappings[register] = self.file(file).mmap(offset, nr, shared=how != 1, readonly=how == 2)

    @override
    def other_call(self, register: int, name: str) -> None:
        """A call that the device refuses by its table."""
        self.file(register).other_call(name)

    def load(self, register: int, at: int) -> str:
        """A load by the CPU."""
        mapping = self.mappings.get(register)
        return NO_MAPPING if mapping is None or at + 8 > mapping.size else mapping.read(at, 8).hex()

    def store(self, register: int, at: int, value: int) -> str | None:
        """A store by the CPU."""
        mapping = self.mappings.get(register)
        if mapping is None or at + 8 > mapping.size:
            return NO_MAPPING
        mapping.write(at, value.to_bytes(8, "little"))
        return None

    def pin(self, number: int, register: int, at: int) -> str | None:
        """A pin of the page at byte *at* of the mapping in *register*."""
        self.unpin(number)
        mapping = self.mappings.get(register)
        if mapping is None or at + 8 > mapping.size:
            return NO_MAPPING
        self.pins[number] = mapping.pin(at), at % PAGE
        return None

    def unpin(self, number: int) -> str:
        """The pinned bytes, and the end of the pin."""
        if number not in self.pins:
            return "no pin"
        pinned, at = self.pins.pop(number)
        with pinned:
            return str(pinned.read(at, 8).hex())

    def child_load(self, register: int, at: int) -> str:
        """A load in a forked child."""
        with self.host.machine.in_child():
            return self.read(register, at, 8)

    def child_vm(self, vm: int) -> int:
        """An ioctl in a forked child."""
        known = self.vm(vm)
        with self.host.machine.in_child():
            return int(known.check_extension(0))

    @override
    def new_vm(self) -> Any:
        """Its slot 0 is a guest_memfd, for there is no other memory."""
        vm = self.device.create_vm()
        program = vm.create_guest_memfd(OWN_SIZE, int(SHARED))
        with program.mmap() as mapping:
            mapping.write(0, arm64_program())
        vm.set_user_memory_region2(0, MemFlag.GUEST_MEMFD, OWN_SLOT, OWN_SIZE, guest_memfd=program)
        self._own.append(program)
        return vm

    @override
    def new_vcpu(self, vm: Any) -> Any:
        """A vCPU that executes arm64."""
        return vm.create_vcpu()

    @override
    def run_guest(self, vcpu: Any, gpa: int, value: int | None) -> kvm_run.Exit:
        """As every subject's, at EL1 with the MMU off."""
        vcpu.immediate_exit = True                      # what the last exit began is finished before registers change
        vcpu.run()
        vcpu.immediate_exit = False
        self.host.enter(vcpu.vm, vcpu, OWN_SLOT if value is None else ARM64_STORE, value or 0, gpa, RESULT)
        told: kvm_run.Exit = vcpu.run(SECONDS)
        return told

    @override
    def seen(self) -> Iterator[tuple[int, Pages]]:
        """The page cache and the frames themselves: nothing is touched."""
        for register, file in sorted(self.files.items()):
            inode, sums = file.host.inode, dict[int, int | None]()
            if file.size <= MOST_PAGES * PAGE:
                sums = {int(index): self._sum(file, index, page) for index, page in inode.pages.items()}
            yield register, Pages(file.size, file.resident(), sums)

    # Only what a host mapping would show: pages that are shared, of a file that can be mapped.
    def _sum(self, file: Any, index: Index, page: Any) -> int | None:
        if not file.flags & GuestMemfdFlag.MMAP or file.host.inode.entry("attributes", index) != SHARED_PAGE:
            return None
        # A page that fallocate(2) made has whatever was in the frame: it is cleared at its first use, and Linux's half,
        # which looks by a mapping, would find zeros.
        return zlib.crc32(self.host.machine.ram.read(page.pa, PAGE)) if page.uptodate else ZEROS

    @override
    def end(self) -> list[str]:
        """As every subject's; laws that were broken, too."""
        everything = [*(pin for pin, _ in self.pins.values()), *self.mappings.values(), *self.files.values(), *self._own,
                      *self.vcpus.values(), *self.vms.values(), self.device]
        for thing in everything:
            thing.close()
        return self.host.left()



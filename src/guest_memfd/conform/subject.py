"""What performs operations: registers, and an answer to each step in words that are the same on every host.

An answer has two halves. What the call said: ``ok``, a value, an errno's name, or a signal with its code and where in the
mapping. And what is seen afterwards of every open file: which pages are there, and what is in those that the host may read.
"""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, NamedTuple, Protocol

from guest_memfd.asm.arm64.asm import assemble
from guest_memfd.compat import override
from guest_memfd.conform.operations import OTHER_CALLS, OWN_SLOT, UserCall
from guest_memfd.errors import Signalled, SyscallFailed, errno_name
from guest_memfd.uapi import kvm_run
from guest_memfd.uapi.kvm import MemoryAttributes2
from guest_memfd.uapi.memory import FALLOC_FL_KEEP_SIZE
from guest_memfd.words.units import PAGE

MOST_PAGES = 8
"""Of a larger file only the number of pages is told."""
RESULT = 0x3000_0000
"""Guest address that no slot has: a guest's store there ends its program, and carries what it has loaded."""
_ARM64_PROGRAM = """
load:   ldr     x3, [x1]
        str     x3, [x2]
        b       .
store:  str     x0, [x1]
        str     xzr, [x2]
        b       .
"""
ARM64_STORE = OWN_SLOT + 12
"""Where the second half of `arm64_program` begins."""
MOST_BYTES = 1 << 20
"""That one call may allocate. A guest_memfd has no limit but the machine's memory, is never reclaimed, and is counted to no
process: when it has used all, the kernel kills processes that have nothing to do with it, one after the other.
"""
TOO_MUCH = "not tried: it would take too much memory"
NO_MAPPING = "nothing is mapped"
ZEROS = zlib.crc32(bytes(PAGE))


@cache
def arm64_program() -> bytes:
    """The guest's program on arm64, for OWN_SLOT: value, guest address and RESULT are in x0, x1 and x2."""
    return assemble(_ARM64_PROGRAM, OWN_SLOT).data


class StepAnswer(NamedTuple):
    """What a step *said*, and the *files* afterwards."""

    said: str
    files: str

    @override
    def __str__(self) -> str:
        return f"{self.said}  [{self.files}]"


class Pages(NamedTuple):
    """Of one file: its *size*, how many are *resident*, and of a small one their checksums; None: not readable."""

    size: int
    resident: int
    sums: Mapping[int, int | None]

    @override
    def __str__(self) -> str:
        shown = (f"{index}:{'zero' if said == ZEROS else '-' if said is None else f'{said:08x}'}"
                 for index, said in sorted(self.sums.items()))
        return f"{self.size:#x} {self.resident}{''.join(f' {each}' for each in shown)}"


class Performing(Protocol):
    """One life of a process, on either host."""

    def perform(self, step: UserCall) -> StepAnswer:
        """The answer to *step*."""

    def end(self) -> list[str]:
        """Close everything: what is left then, in words."""


class Subject(ABC):
    """One life of a process: nothing is open at first, and `end` closes all."""

    def __init__(self) -> None:
        self.files: dict[int, Any] = {}
        self.mappings: dict[int, Any] = {}
        self.pins: dict[int, Any] = {}
        self.vms: dict[int, Any] = {}
        self.vcpus: dict[int, Any] = {}

    def perform(self, step: UserCall) -> StepAnswer:
        """The answer to *step*."""
        try:
            said = getattr(self, step.op)(*step.args)
        except SyscallFailed as error:
            said = errno_name(error.errno)
        except Signalled as error:
            said = self._signal(step, error)
        return StepAnswer("ok" if said is None else str(said), "; ".join(f"{n}: {pages}" for n, pages in self.seen()))

    def _signal(self, step: UserCall, error: Signalled) -> str:
        # Only what touches a mapping gets a signal, and a mapping is its first argument. A place in it is comparable, an
        # address is not: the two hosts map at different ones.
        mapping = self.mappings[step.args[0]]
        where = error.address - mapping.address
        return f"{error.signal} code {error.code} at +{where:#x}"

    # -- what a host has of its own ----------------------------------------------------------------------------------

    @abstractmethod
    def seen(self) -> Iterator[tuple[int, Pages]]:
        """Every open file by its register."""

    @abstractmethod
    def file(self, register: int) -> Any:
        """The file in *register*, or one that is closed."""

    @abstractmethod
    def close(self, register: int) -> None:
        """close(2); of a register that is empty, EBADF."""

    @abstractmethod
    def dup(self, register: int, of: int) -> None:
        """dup(2) of the file in register *of*."""

    @abstractmethod
    def new_vm(self) -> Any:
        """A VM with slot 0, which has the guest's program."""

    @abstractmethod
    def new_vcpu(self, vm: Any) -> Any:
        """A vCPU of *vm*."""

    @abstractmethod
    def run_guest(self, vcpu: Any, gpa: int, value: int | None) -> kvm_run.Exit:
        """One load at *gpa*, or a store of *value*, and then a store of what was loaded (or 0) to RESULT."""

    @abstractmethod
    def end(self) -> list[str]:
        """Close everything: what is left all the same, in words."""

    # -- operations --------------------------------------------------------------------------------------------------

    def vm(self, register: int) -> Any:
        """The VM in *register*, made when it is asked for first."""
        if register not in self.vms:
            self.vms[register] = self.new_vm()
        return self.vms[register]

    def leave(self, register: int) -> None:
        """Close what is in *register* of files, if anything is."""
        if not self.file(register).closed:
            self.close(register)

    def create(self, register: int, vm: int, size: int, flags: int) -> None:
        """KVM_CREATE_GUEST_MEMFD, in place of what the register had."""
        # First, and whatever comes of the call: after a failure the register is
        # empty on both hosts, and not the old file's on one.
        self.leave(register)
        self.files.pop(register, None)
        self.files[register] = self.vm(vm).create_guest_memfd(size, flags)

    def fallocate(self, register: int, mode: int, offset: int, nr: int) -> str | None:
        """fallocate(2), bytes and mode as given; but no more memory than `MOST_BYTES`."""
        file = self.file(register)
        # Only what would succeed is left out. A length that is refused is an edge, and allocates nothing.
        if mode == FALLOC_FL_KEEP_SIZE and nr > MOST_BYTES and not file.closed and 0 <= offset <= file.size - nr:
            return TOO_MUCH
        self.do_fallocate(file, mode, offset, nr)
        return None

    def do_fallocate(self, file: Any, mode: int, offset: int, nr: int) -> None:
        """The call itself; *file* may be closed."""
        file.fallocate(mode, offset, nr)

    def unmap(self, register: int) -> str | None:
        """munmap(2) of the mapping in *register*."""
        if register not in self.mappings:
            return NO_MAPPING
        self.mappings.pop(register).close()
        return None

    def region(self, vm: int, slot: int, flags: int, gpa: int, size: int, user: int, register: int, offset: int) -> None:
        """KVM_SET_USER_MEMORY_REGION2 with a file, which may be closed."""
        self.vm(vm).set_user_memory_region2(slot, flags, gpa, size, userspace_addr=user, guest_memfd=self.file(register),
                                            guest_memfd_offset=offset)

    def region1(self, vm: int, slot: int, flags: int, gpa: int, size: int, user: int) -> None:
        """KVM_SET_USER_MEMORY_REGION, the older of the two."""
        self.vm(vm).set_user_memory_region(slot, flags, gpa, size, user)

    def attributes(self, register: int, offset: int, size: int, attributes: int, flags: int) -> str | None:
        """KVM_SET_MEMORY_ATTRIBUTES2: where it failed is told as well."""
        asked = MemoryAttributes2(offset, size, attributes, flags)
        try:
            self.file(register).set_memory_attributes2(asked)
        except SyscallFailed as error:
            return f"{errno_name(error.errno)} at {asked.error_offset:#x}"
        return None

    def vm_attributes(self, vm: int, gpa: int, size: int, attributes: int) -> None:
        """KVM_SET_MEMORY_ATTRIBUTES on a VM's descriptor."""
        self.vm(vm).set_memory_attributes(gpa, size, attributes)

    def extension(self, vm: int, cap: int) -> int:
        """KVM_CHECK_EXTENSION of a VM."""
        return int(self.vm(vm).check_extension(cap))

    def stat(self, register: int) -> str:
        """fstat(2): the size, and how many blocks."""
        _, size, blocks = self.file(register).fstat()
        return f"size {size:#x} blocks {blocks}"

    def other(self, register: int, which: int) -> None:
        """One of OTHER_CALLS, by its number."""
        self.other_call(register, OTHER_CALLS[which])

    @abstractmethod
    def other_call(self, register: int, name: str) -> None:
        """A system call on a file that has no method for it."""

    def advise(self, register: int, advice: int, at: int, nr: int) -> str | None:
        """madvise(2) of part of the mapping in *register*, up to its end."""
        mapping = self.mappings.get(register)
        end = -(-mapping.size // PAGE) * PAGE if mapping else 0
        if mapping is None or at >= end:
            return NO_MAPPING
        # After its end there may be something of this process's own, and MADV_DONTNEED would throw that away.
        nr = min(nr, end - at)
        if nr > MOST_BYTES:
            return TOO_MUCH
        mapping.advise(advice, at, nr)
        return None

    def read(self, register: int, at: int, nr: int) -> str:
        """Bytes of a mapping, copied by the kernel; the place of the first that it does not get."""
        mapping = self.mappings.get(register)
        # The kernel would go on into whatever lies behind the mapping, and the two processes have other things there.
        if mapping is None or at + nr > mapping.size:
            return NO_MAPPING
        try:
            return f"{zlib.crc32(mapping.read(at, nr)):08x}"
        except Signalled as error:
            return f"EFAULT at +{error.address - mapping.address:#x}"

    def write(self, register: int, at: int, nr: int, value: int) -> str:
        """Bytes to a mapping, copied by the kernel; the place of the first that does not get there."""
        mapping = self.mappings.get(register)
        if mapping is None or at + nr > mapping.size:
            return NO_MAPPING
        try:
            mapping.write(at, (value.to_bytes(8, "little") * (nr // 8 + 1))[:nr])
        except Signalled as error:
            return f"EFAULT at +{error.address - mapping.address:#x}"
        return "ok"

    def guest_load(self, vm: int, gpa: int) -> str:
        """What a guest loads."""
        return self._guest(vm, gpa, None)

    def guest_store(self, vm: int, gpa: int, value: int) -> str:
        """What comes of a guest's store."""
        return self._guest(vm, gpa, value)

    def _guest(self, number: int, gpa: int, value: int | None) -> str:
        if number not in self.vcpus:
            self.vcpus[number] = self.new_vcpu(self.vm(number))
        match self.run_guest(self.vcpus[number], gpa, value):
            case kvm_run.Mmio(phys_addr=where, data=data) if where == RESULT:
                return f"{int.from_bytes(data, 'little'):#x}" if value is None else "ok"
            case kvm_run.Mmio(phys_addr=where, is_write=is_write):
                return f"mmio {'store' if is_write else 'load'} {where:#x}"
            case kvm_run.MemoryFault(flags=flags, gpa=where, size=size, errno=errno):
                return f"{errno_name(errno)}, memory fault flags {flags:#x} gpa {where:#x} size {size:#x}"
            case kvm_run.Unknown(errno=errno):
                return f"{errno_name(errno)}, and no more is said"
            case told:
                return str(told)

    def close_vcpu(self, number: int) -> str | None:
        """close(2) of a vCPU. The VM keeps its number: no other one can be made."""
        if number not in self.vcpus or self.vcpus[number].closed:
            return "no vCPU"
        self.vcpus[number].close()
        return None

    def close_vm(self, number: int) -> None:
        """close(2) of a VM; what refers to it by its descriptor is EBADF from then on."""
        self.vm(number).close()

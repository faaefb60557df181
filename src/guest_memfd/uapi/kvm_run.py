"""struct kvm_run: why KVM_RUN came back, decoded. It tells what the page says, and nothing else.

Offsets and numbers: include/uapi/linux/kvm.h (7.3), the same on every architecture.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import NamedTuple

from guest_memfd.compat import override
from guest_memfd.distinct import distinct
from guest_memfd.errors import errno_name
from guest_memfd.words.units import Ipa


class ExitReason(IntEnum):
    """kvm_run.exit_reason, as far as it is decoded here."""

    UNKNOWN = 0
    IO = 2
    HYPERCALL = 3
    HLT = 5
    MMIO = 6
    SHUTDOWN = 8
    FAIL_ENTRY = 9
    INTR = 10
    INTERNAL_ERROR = 17
    SYSTEM_EVENT = 24
    MEMORY_FAULT = 39


class SystemEventType(IntEnum):
    """kvm_run.system_event.type: what the guest has asked for, or that it has crashed."""

    SHUTDOWN = 1
    RESET = 2
    CRASH = 3


@distinct
class Mmio(NamedTuple):
    """The guest accesses *size* bytes at *phys_addr*; *data* is what it writes.

    A read goes on with what `KvmVcpu.answer` was given.
    """

    phys_addr: Ipa
    size: int
    is_write: bool
    data: bytes

    @override
    def __repr__(self) -> str:
        return f"Mmio({self.phys_addr:#x}, {self.size}, {'write' if self.is_write else 'read'}, data={self.data!r})"


@distinct
class Io(NamedTuple):
    """x86: the guest accesses *port*, *times* times *size* bytes (REP INS and OUTS); *data* is all that it writes.

    A read goes on with what `KvmVcpu.answer` was given.
    """

    port: int
    size: int
    times: int
    is_write: bool
    data: bytes


@distinct
class Halt(NamedTuple):
    """x86: HLT, where no interrupt controller of KVM's waits for the next interrupt."""


@distinct
class Shutdown(NamedTuple):
    """x86: a triple fault."""


@distinct
class HypercallExit(NamedTuple):
    """A hypercall for user space; what it returns to the guest is given to `KvmVcpu.answer`."""

    nr: int
    args: tuple[int, ...]


@distinct
class SystemEvent(NamedTuple):
    """The guest has turned itself off, or reset."""

    type: int


@distinct
class MemoryFault(NamedTuple):
    """KVM_RUN returned -1 with *errno*, EFAULT or EHWPOISON: the guest cannot have [gpa, gpa+size) as it asked for it."""

    flags: int
    gpa: Ipa
    size: int
    errno: int

    @override
    def __repr__(self) -> str:
        return f"MemoryFault(flags={self.flags:#x}, gpa={self.gpa:#x}, size={self.size:#x}, {errno_name(self.errno)})"


@distinct
class Intr(NamedTuple):
    """KVM_RUN returned -1 with EINTR: a signal, or immediate_exit."""


@distinct
class KvmInternalError(NamedTuple):
    """KVM cannot go on with this vCPU; *why* is what there is in words."""

    why: str = ""


@distinct
class FailEntry(NamedTuple):
    """The hardware refuses the vCPU's state; *reason* is the hardware's."""

    reason: int


@distinct
class Unknown(NamedTuple):
    """KVM_RUN returned -1 with *errno* and says nothing else, or an exit that is not decoded here."""

    reason: int
    errno: int = 0


Exit = (Mmio | Io | Halt | Shutdown | HypercallExit | SystemEvent | MemoryFault | Intr | FailEntry | KvmInternalError
        | Unknown)

RUN_EXIT_REASON, RUN_UNION, RUN_IMMEDIATE_EXIT = 8, 32, 1
"""Offsets in struct kvm_run."""

_MMIO, _HYPERCALL, _MEMORY_FAULT = struct.Struct("<Q8sIB"), struct.Struct("<Q6Q"), struct.Struct("<3Q")
_IO = struct.Struct("<BBHIQ")
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
_BARE: dict[int, Exit] = {ExitReason.HLT: Halt(), ExitReason.SHUTDOWN: Shutdown(), ExitReason.INTR: Intr()}


_SUBERRORS = {1: "EMULATION", 2: "SIMUL_EX", 3: "DELIVERY_EV", 4: "UNEXPECTED_EXIT_REASON"}
"""KVM_INTERNAL_ERROR_*."""
_EMULATION = struct.Struct("<IIQB15s")
_HAS_BYTES = 1 << 0
"""KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES: the instruction that could not be emulated follows."""


def _internal(run: bytes) -> str:
    suberror, ndata, flags, size, code = _EMULATION.unpack_from(run, RUN_UNION)
    if suberror not in _SUBERRORS:
        return f"suberror {suberror}"
    name = f"KVM_INTERNAL_ERROR_{_SUBERRORS[suberror]}"
    told = suberror == 1 and ndata > 1 and flags & _HAS_BYTES and size
    return f"{name}, instruction bytes {code[:size].hex(' ')}" if told else name


def decode_run(run: bytes, errno: int = 0) -> Exit:
    """What the shared struct kvm_run says after KVM_RUN; *errno* is positive, 0 when the ioctl returned 0.

    *run* may end after the union, but for an Io, whose data lies after the first page.
    """
    (reason,) = _U32.unpack_from(run, RUN_EXIT_REASON)
    if reason == ExitReason.MMIO:
        address, data, size, write = _MMIO.unpack_from(run, RUN_UNION)
        return Mmio(address, size, bool(write), data[:size] if write else b"")
    if reason in _BARE:
        return _BARE[reason]
    if reason == ExitReason.IO:
        write, size, port, times, at = _IO.unpack_from(run, RUN_UNION)
        return Io(port, size, times, bool(write), run[at:at + size * times] if write else b"")
    if reason == ExitReason.HYPERCALL:
        nr, *args = _HYPERCALL.unpack_from(run, RUN_UNION)
        return HypercallExit(nr, tuple(args))
    if reason == ExitReason.SYSTEM_EVENT:
        return SystemEvent(*_U32.unpack_from(run, RUN_UNION))
    if reason == ExitReason.MEMORY_FAULT:
        flags, gpa, size = _MEMORY_FAULT.unpack_from(run, RUN_UNION)
        return MemoryFault(flags, gpa, size, errno)
    if reason == ExitReason.FAIL_ENTRY:
        return FailEntry(*_U64.unpack_from(run, RUN_UNION))
    if reason == ExitReason.INTERNAL_ERROR:
        return KvmInternalError(_internal(run))
    return Unknown(reason, errno)

"""struct kvm_run: why KVM_RUN came back, as a VMM reads it and as the page has it.

Offsets and numbers: include/uapi/linux/kvm.h (7.3), the same on every architecture.
"""

from __future__ import annotations

import ctypes
from ctypes import c_char, c_uint8, c_uint16, c_uint32, c_uint64
from enum import IntEnum
from typing import NamedTuple

from guest_memfd.compat import override
from guest_memfd.distinct import distinct
from guest_memfd.errors import errno_name
from guest_memfd.uapi.words import Words
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

# -- the page, and what it says ----------------------------------------------------------------------------------------

class RunMmio(Words):
    """kvm_run.mmio: a guest access of `len` bytes, at most 8, at `phys_addr`."""

    _fields_ = [("phys_addr", c_uint64), ("data", c_uint8 * 8), ("len", c_uint32), ("is_write", c_uint8)]


class RunIo(Words):
    """kvm_run.io; `data_offset` counts from the beginning of kvm_run."""

    _fields_ = [("direction", c_uint8), ("size", c_uint8), ("port", c_uint16), ("count", c_uint32),
                ("data_offset", c_uint64)]


class RunHypercall(Words):
    """kvm_run.hypercall; the last word is a union of `longmode` and flags."""

    _fields_ = [("nr", c_uint64), ("args", c_uint64 * 6), ("ret", c_uint64), ("flags", c_uint64)]


class RunMemoryFault(Words):
    """kvm_run.memory_fault: `gpa` and `size` are bytes; `flags` says whether the access was private."""

    _fields_ = [("flags", c_uint64), ("gpa", c_uint64), ("size", c_uint64)]


class RunEmulationFailure(Words):
    """kvm_run.internal, as suberror EMULATION has it: `ndata` words follow, of which `flags` is the first."""

    _fields_ = [("suberror", c_uint32), ("ndata", c_uint32), ("flags", c_uint64), ("insn_size", c_uint8),
                ("insn_bytes", c_uint8 * 15)]


class RunFailEntry(Words):
    """kvm_run.fail_entry: what the CPU said when it refused to enter the guest, and on which CPU."""

    _fields_ = [("hardware_entry_failure_reason", c_uint64), ("cpu", c_uint32)]


class RunSystemEvent(Words):
    """kvm_run.system_event: shutdown, reset or crash in `type`; `ndata` words of `data` come with it."""

    _fields_ = [("type", c_uint32), ("ndata", c_uint32), ("data", c_uint64 * 16)]


class RunUnion(ctypes.Union):
    """What an exit says; which member is valid is `KvmRun.exit_reason`'s."""

    _fields_ = [("mmio", RunMmio), ("io", RunIo), ("hypercall", RunHypercall), ("memory_fault", RunMemoryFault),
                ("emulation_failure", RunEmulationFailure), ("fail_entry", RunFailEntry), ("system_event", RunSystemEvent),
                ("padding", c_char * 256)]


class KvmRun(Words):
    """struct kvm_run, the page that a vCPU shares with user space; `sync_regs` is the architecture's."""

    _anonymous_ = ("exit",)
    _fields_ = [("request_interrupt_window", c_uint8), ("immediate_exit", c_uint8), ("padding1", c_uint8 * 6),
                ("exit_reason", c_uint32), ("ready_for_interrupt_injection", c_uint8), ("if_flag", c_uint8),
                ("flags", c_uint16), ("cr8", c_uint64), ("apic_base", c_uint64), ("exit", RunUnion),
                ("kvm_valid_regs", c_uint64), ("kvm_dirty_regs", c_uint64), ("sync_regs", c_char * 2048)]


_REASON, _SAID = slice(KvmRun.exit_reason.offset, KvmRun.exit_reason.offset + 4), KvmRun.exit.offset
RUN_SAYS = _SAID + ctypes.sizeof(RunUnion)
"""Bytes of struct kvm_run that an exit is decoded from; only what an Io writes lies after them."""

_BARE: dict[int, Exit] = {ExitReason.HLT: Halt(), ExitReason.SHUTDOWN: Shutdown(), ExitReason.INTR: Intr()}
_SUBERRORS = {1: "EMULATION", 2: "SIMUL_EX", 3: "DELIVERY_EV", 4: "UNEXPECTED_EXIT_REASON"}
"""KVM_INTERNAL_ERROR_*."""
_HAS_BYTES = 1 << 0
"""KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES: the instruction that could not be emulated follows."""


def _internal(said: RunEmulationFailure) -> str:
    if said.suberror not in _SUBERRORS:
        return f"suberror {said.suberror}"
    name = f"KVM_INTERNAL_ERROR_{_SUBERRORS[said.suberror]}"
    told = said.suberror == 1 and said.ndata > 1 and said.flags & _HAS_BYTES and said.insn_size
    return f"{name}, instruction bytes {bytes(said.insn_bytes)[:said.insn_size].hex(' ')}" if told else name


def decode_run(run: bytes, errno: int = 0) -> Exit:
    """What the shared struct kvm_run says after KVM_RUN; *errno* is positive, 0 when the ioctl returned 0.

    *run* may end after `RUN_SAYS` bytes, but for an Io, whose data lies after the first page.
    """
    reason = int.from_bytes(run[_REASON], "little")
    if reason == ExitReason.MMIO:
        mmio = RunMmio.from_buffer_copy(run, _SAID)
        size, write = mmio.len, bool(mmio.is_write)
        return Mmio(mmio.phys_addr, size, write, bytes(mmio.data)[:size] if write else b"")
    if reason in _BARE:
        return _BARE[reason]
    said = RunUnion.from_buffer_copy(run, _SAID)
    if reason == ExitReason.IO:
        io = said.io
        data = run[io.data_offset:io.data_offset + io.size * io.count] if io.direction else b""
        return Io(io.port, io.size, io.count, bool(io.direction), data)
    if reason == ExitReason.HYPERCALL:
        return HypercallExit(said.hypercall.nr, tuple(said.hypercall.args))
    if reason == ExitReason.SYSTEM_EVENT:
        return SystemEvent(said.system_event.type)
    if reason == ExitReason.MEMORY_FAULT:
        fault = said.memory_fault
        return MemoryFault(fault.flags, fault.gpa, fault.size, errno)
    if reason == ExitReason.FAIL_ENTRY:
        return FailEntry(said.fail_entry.hardware_entry_failure_reason)
    if reason == ExitReason.INTERNAL_ERROR:
        return KvmInternalError(_internal(said.emulation_failure))
    return Unknown(reason, errno)

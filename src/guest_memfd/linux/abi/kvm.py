"""/dev/kvm as bytes: structures with all their fields, and the table of commands (include/uapi/linux/kvm.h)."""

from __future__ import annotations

import ctypes
from ctypes import c_char, c_int16, c_uint8, c_uint16, c_uint32, c_uint64
from enum import IntEnum

from guest_memfd.linux.abi.table import Command
from guest_memfd.linux.abi.words import Words
from guest_memfd.uapi import kvm as uapi
from guest_memfd.uapi.ioctl import io, iow

PATH = "/dev/kvm"
EHWPOISON = 133
"""Missing in Python's errno (include/uapi/asm-generic/errno.h)."""


# -- guest memory ----------------------------------------------------------------------------------------------------

class CreateGuestMemfd(Words):
    """struct kvm_create_guest_memfd. 6.18 does not look at `reserved`."""

    _fields_ = [("size", c_uint64), ("flags", c_uint64), ("reserved", c_uint64 * 6)]


class UserspaceMemoryRegion(Words):
    """struct kvm_userspace_memory_region: a slot without guest_memfd; address and size are bytes."""

    _fields_ = [("slot", c_uint32), ("flags", c_uint32), ("guest_phys_addr", c_uint64), ("memory_size", c_uint64),
                ("userspace_addr", c_uint64)]


class UserspaceMemoryRegion2(Words):
    """struct kvm_userspace_memory_region2. 6.18 does not look at the pads."""

    _fields_ = [("slot", c_uint32), ("flags", c_uint32), ("guest_phys_addr", c_uint64), ("memory_size", c_uint64),
                ("userspace_addr", c_uint64), ("guest_memfd_offset", c_uint64), ("guest_memfd", c_uint32),
                ("pad1", c_uint32), ("pad2", c_uint64 * 14)]


class MemoryAttributes(Words):
    """struct kvm_memory_attributes of KVM_SET_MEMORY_ATTRIBUTES: guest address and size are bytes."""

    _fields_ = [("address", c_uint64), ("size", c_uint64), ("attributes", c_uint64), ("flags", c_uint64)]


class _AddressOrOffset(ctypes.Union):
    _fields_ = [("address", c_uint64), ("offset", c_uint64)]


class MemoryAttributes2(Words):
    """struct kvm_memory_attributes2; `reserved` has to be 0."""

    _anonymous_ = ("where",)
    _fields_ = [("where", _AddressOrOffset), ("size", c_uint64), ("attributes", c_uint64), ("flags", c_uint64),
                ("error_offset", c_uint64), ("reserved", c_uint64 * 11)]


class PreFaultMemory(Words):
    """struct kvm_pre_fault_memory: guest address and size in bytes; the kernel moves both on as it maps."""

    _fields_ = [("gpa", c_uint64), ("size", c_uint64), ("flags", c_uint64), ("padding", c_uint64 * 5)]


class DirtyLog(Words):
    """struct kvm_dirty_log; `dirty_bitmap` is an address."""

    _fields_ = [("slot", c_uint32), ("padding1", c_uint32), ("dirty_bitmap", c_uint64)]


# -- vCPUs -----------------------------------------------------------------------------------------------------------

class OneReg(Words):
    """struct kvm_one_reg; `addr` is where the value is or goes."""

    _fields_ = [("id", c_uint64), ("addr", c_uint64)]


class SignalMask(Words):
    """struct kvm_signal_mask with the kernel's sigset_t of 8 bytes; without padding, as in C."""

    _pack_ = 4
    _fields_ = [("len", c_uint32), ("sigset", c_uint64)]


class StatsHeader(Words):
    """struct kvm_stats_header: offsets into the file of KVM_GET_STATS_FD."""

    _fields_ = [("flags", c_uint32), ("name_size", c_uint32), ("num_desc", c_uint32), ("id_offset", c_uint32),
                ("desc_offset", c_uint32), ("data_offset", c_uint32)]


class StatsDesc(Words):
    """struct kvm_stats_desc; a name of `StatsHeader.name_size` bytes follows. `size` counts values of 8 bytes."""

    _fields_ = [("flags", c_uint32), ("exponent", c_int16), ("size", c_uint16), ("offset", c_uint32),
                ("bucket_size", c_uint32)]


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


class RunInternal(Words):
    """kvm_run.internal: `ndata` words of `data` belong to `suberror`."""

    _fields_ = [("suberror", c_uint32), ("ndata", c_uint32), ("data", c_uint64 * 16)]


class RunFailEntry(Words):
    """kvm_run.fail_entry: what the CPU said when it refused to enter the guest, and on which CPU."""

    _fields_ = [("hardware_entry_failure_reason", c_uint64), ("cpu", c_uint32)]


class RunSystemEvent(Words):
    """kvm_run.system_event: shutdown, reset or crash in `type`; `ndata` words of `data` come with it."""

    _fields_ = [("type", c_uint32), ("ndata", c_uint32), ("data", c_uint64 * 16)]


class RunUnion(ctypes.Union):
    """What an exit says; which member is valid is `Run.exit_reason`'s."""

    _fields_ = [("mmio", RunMmio), ("io", RunIo), ("hypercall", RunHypercall), ("memory_fault", RunMemoryFault),
                ("internal", RunInternal), ("fail_entry", RunFailEntry), ("system_event", RunSystemEvent),
                ("padding", c_char * 256)]


class KvmRun(Words):
    """struct kvm_run, the page that a vCPU shares with user space; `sync_regs` is the architecture's."""

    _anonymous_ = ("exit",)
    _fields_ = [("request_interrupt_window", c_uint8), ("immediate_exit", c_uint8), ("padding1", c_uint8 * 6),
                ("exit_reason", c_uint32), ("ready_for_interrupt_injection", c_uint8), ("if_flag", c_uint8),
                ("flags", c_uint16), ("cr8", c_uint64), ("apic_base", c_uint64), ("exit", RunUnion),
                ("kvm_valid_regs", c_uint64), ("kvm_dirty_regs", c_uint64), ("sync_regs", c_char * 2048)]


# -- commands --------------------------------------------------------------------------------------------------------

SET_SIGNAL_MASK = iow(uapi.KVMIO, 0x8B, 4)
"""The number counts `len` only."""
GET_STATS_FD = io(uapi.KVMIO, 0xCE)

COMMANDS = (
    Command("KVM_GET_API_VERSION", "system", uapi.GET_API_VERSION),
    Command("KVM_CREATE_VM", "system", uapi.CREATE_VM),
    Command("KVM_CHECK_EXTENSION", "system, VM", uapi.CHECK_EXTENSION),
    Command("KVM_GET_VCPU_MMAP_SIZE", "system", uapi.GET_VCPU_MMAP_SIZE),
    Command("KVM_CREATE_VCPU", "VM", uapi.CREATE_VCPU),
    Command("KVM_GET_DIRTY_LOG", "VM", uapi.GET_DIRTY_LOG, DirtyLog),
    Command("KVM_SET_USER_MEMORY_REGION", "VM", uapi.SET_USER_MEMORY_REGION, UserspaceMemoryRegion),
    Command("KVM_SET_USER_MEMORY_REGION2", "VM", uapi.SET_USER_MEMORY_REGION2, UserspaceMemoryRegion2, "6.8"),
    Command("KVM_SET_MEMORY_ATTRIBUTES", "VM", uapi.SET_MEMORY_ATTRIBUTES, MemoryAttributes, "6.8"),
    Command("KVM_CREATE_GUEST_MEMFD", "VM", uapi.CREATE_GUEST_MEMFD, CreateGuestMemfd, "6.8"),
    Command("KVM_SET_MEMORY_ATTRIBUTES2", "guest_memfd", uapi.SET_MEMORY_ATTRIBUTES2, MemoryAttributes2),
    Command("KVM_RUN", "vCPU", uapi.RUN),
    Command("KVM_SET_SIGNAL_MASK", "vCPU", SET_SIGNAL_MASK),
    Command("KVM_GET_ONE_REG", "vCPU", uapi.GET_ONE_REG, OneReg),
    Command("KVM_SET_ONE_REG", "vCPU", uapi.SET_ONE_REG, OneReg),
    Command("KVM_GET_STATS_FD", "VM, vCPU", GET_STATS_FD),
    Command("KVM_PRE_FAULT_MEMORY", "vCPU", uapi.PRE_FAULT_MEMORY, PreFaultMemory, "6.11"),
)


class StatsType(IntEnum):
    """KVM_STATS_TYPE_*: bits 3:0 of `StatsDesc.flags`."""

    CUMULATIVE = 0
    INSTANT = 1
    PEAK = 2
    LINEAR_HIST = 3
    LOG_HIST = 4

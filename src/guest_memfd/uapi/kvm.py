"""/dev/kvm as far as guest memory goes: ioctl numbers, structures, capabilities, and the protocols of its objects.

Here is what is the same on every architecture; registers and VM types are in kvm_<arch>.py, exits in kvm_run.py. Numbers
and layouts: include/uapi/linux/kvm.h (7.3), and "guest_memfd: In-place conversion" v8-v13 for KVM_SET_MEMORY_ATTRIBUTES2.
Structures are little-endian, and have the size the ioctl number says.
"""

from __future__ import annotations

from collections.abc import Mapping as Map
from ctypes import c_uint32, c_uint64, sizeof
from enum import IntEnum, IntFlag
from typing import Protocol

from guest_memfd.uapi.ioctl import io, iow, iowr
from guest_memfd.uapi.kvm_run import Exit
from guest_memfd.uapi.memory import GuestMemory, Owner
from guest_memfd.uapi.words import Words
from guest_memfd.words.units import NULL, Ipa, Va

PATH = "/dev/kvm"
KVMIO = 0xAE
API_VERSION = 12

# -- structures ------------------------------------------------------------------------------------------------------

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


class MemoryAttributes2(Words):
    """struct kvm_memory_attributes2: *offset* into the file, *size* in bytes; `reserved` has to be 0.

    The kernel writes *error_offset* when it refuses, and only then: the offset in bytes that it refused at. C has a union of
    `offset` with the `address` that a VM's descriptor would take.
    """

    _fields_ = [("offset", c_uint64), ("size", c_uint64), ("attributes", c_uint64), ("flags", c_uint64),
                ("error_offset", c_uint64), ("reserved", c_uint64 * 11)]


class PreFaultMemory(Words):
    """struct kvm_pre_fault_memory: guest address and size in bytes; the kernel moves both on as it maps."""

    _fields_ = [("gpa", c_uint64), ("size", c_uint64), ("flags", c_uint64), ("padding", c_uint64 * 5)]


class DirtyLog(Words):
    """struct kvm_dirty_log; `dirty_bitmap` is an address."""

    _fields_ = [("slot", c_uint32), ("padding1", c_uint32), ("dirty_bitmap", c_uint64)]


class OneReg(Words):
    """struct kvm_one_reg; `addr` is where the value is or goes."""

    _fields_ = [("id", c_uint64), ("addr", c_uint64)]


# -- ioctls ----------------------------------------------------------------------------------------------------------

GET_API_VERSION = io(KVMIO, 0x00)
CREATE_VM = io(KVMIO, 0x01)
CHECK_EXTENSION = io(KVMIO, 0x03)
GET_VCPU_MMAP_SIZE = io(KVMIO, 0x04)
CREATE_VCPU = io(KVMIO, 0x41)
GET_DIRTY_LOG = iow(KVMIO, 0x42, sizeof(DirtyLog))
SET_USER_MEMORY_REGION = iow(KVMIO, 0x46, sizeof(UserspaceMemoryRegion))
SET_USER_MEMORY_REGION2 = iow(KVMIO, 0x49, sizeof(UserspaceMemoryRegion2))
RUN = io(KVMIO, 0x80)
GET_ONE_REG, SET_ONE_REG = iow(KVMIO, 0xAB, sizeof(OneReg)), iow(KVMIO, 0xAC, sizeof(OneReg))
# One number, of two ioctls: the size of the argument is part of the command, and tells them apart.
SET_MEMORY_ATTRIBUTES = iow(KVMIO, 0xD2, sizeof(MemoryAttributes))
SET_MEMORY_ATTRIBUTES2 = iowr(KVMIO, 0xD2, sizeof(MemoryAttributes2))
"""On the descriptor of a guest_memfd, not on that of a VM."""
CREATE_GUEST_MEMFD = iowr(KVMIO, 0xD4, sizeof(CreateGuestMemfd))
PRE_FAULT_MEMORY = iowr(KVMIO, 0xD5, sizeof(PreFaultMemory))


class Cap(IntEnum):
    """KVM_CAP_* that are merged; the number of one that is not differs from tree to tree."""

    NR_VCPUS = 9
    NR_MEMSLOTS = 10
    SYNC_MMU = 16
    MAX_VCPUS = 66
    ARM_VM_IPA_SIZE = 165
    EXIT_HYPERCALL = 201
    USER_MEMORY2 = 231
    MEMORY_FAULT_INFO = 232
    MEMORY_ATTRIBUTES = 233
    GUEST_MEMFD = 234
    VM_TYPES = 235
    PRE_FAULT_MEMORY = 236
    GUEST_MEMFD_FLAGS = 244


CAP_GUEST_MEMFD_MEMORY_ATTRIBUTES = 250
"""As in v8 of the in-place series; it was 246, 248 and 249 before."""


class GuestMemfdFlag(IntFlag):
    """Flags of KVM_CREATE_GUEST_MEMFD; bits from 2 on mean different things in different trees."""

    MMAP = 1 << 0
    INIT_SHARED = 1 << 1


SHARED = GuestMemfdFlag.MMAP | GuestMemfdFlag.INIT_SHARED
"""For a file that the host maps, and that any guest can run in."""


class MemFlag(IntFlag):
    """Flags of a memory slot."""

    LOG_DIRTY_PAGES = 1 << 0
    READONLY = 1 << 1
    GUEST_MEMFD = 1 << 2


# Bits 0 to 2 are kept for read, write and execute.
PRIVATE = 1 << 3
"""KVM_MEMORY_ATTRIBUTE_PRIVATE, and KVM_MEMORY_EXIT_FLAG_PRIVATE."""

# -- protocols -------------------------------------------------------------------------------------------------------


class KvmGuestMemory(GuestMemory, Protocol):
    """A guest_memfd that KVM made; it stays alive without its VM, and cannot serve another."""

    def set_memory_attributes2(self, attributes: MemoryAttributes2) -> None:
        """KVM_SET_MEMORY_ATTRIBUTES2: convert in place.

        EINVAL flags, attributes, size, alignment, past the end; EAGAIN someone else refers to a page; EBUSY the hypervisor
        or the guest refuses; ENOMEM. Nothing has changed its attribute then, and `error_offset` says where.
        """


class KvmVcpu(Owner, Protocol):
    """A vCPU. All calls raise SyscallFailed."""

    def run(self, timeout: float | None = None) -> Exit:
        """KVM_RUN; after *timeout* seconds a signal interrupts it. EINVAL for a vCPU that is not initialised."""

    def answer(self, data: bytes) -> None:
        """Fill in what the last exit waits for: the data of an MMIO read, or a hypercall's result. EINVAL when it waits for
        nothing.
        """

    def get_one_reg(self, reg: int) -> int:
        """KVM_GET_ONE_REG; ENOENT for a register that there is not, EPERM where the host may not look."""

    def set_one_reg(self, reg: int, value: int) -> None:
        """KVM_SET_ONE_REG; ENOENT and EPERM as `get_one_reg`, EINVAL for a value that the register cannot have."""

    def inject_external_abort(self) -> None:
        """KVM_SET_VCPU_EVENTS with exception.ext_dabt_pending: the MMIO access under way ends in an external abort."""

    def statistics(self) -> Map[str, int]:
        """KVM_GET_STATS_FD: counters by name, ``exits`` and ``aborts_injected`` among them."""


class KvmVm(Owner, Protocol):
    """A VM. All calls raise SyscallFailed."""

    def check_extension(self, cap: int) -> int:
        """KVM_CHECK_EXTENSION of this VM; 0 for what it does not have."""

    def create_guest_memfd(self, size: int, flags: int = 0) -> KvmGuestMemory:
        """KVM_CREATE_GUEST_MEMFD; EINVAL for unknown flags, size 0, and a size that is no multiple of a page."""

    def set_user_memory_region2(
        self, slot: int, flags: int, guest_phys_addr: Ipa, memory_size: int, *, userspace_addr: Va = NULL,
        guest_memfd: GuestMemory | None = None, guest_memfd_offset: int = 0,
    ) -> None:
        """KVM_SET_USER_MEMORY_REGION2; *memory_size* 0 deletes the slot.

        EBADF closed file; EINVAL alignment, slot, flags, not this VM's file, past its end, changing a bound slot; EEXIST
        guest addresses or file range in use.
        """

    def set_memory_attributes(self, address: Ipa, size: int, attributes: int, flags: int = 0) -> None:
        """KVM_SET_MEMORY_ATTRIBUTES, where attributes belong to the VM; else ENOTTY on x86, and EINVAL on arm64."""

    def create_vcpu(self, vcpu_id: int = 0) -> KvmVcpu:
        """KVM_CREATE_VCPU; EINVAL for an id too large, EEXIST."""


class KvmSystem(Owner, Protocol):
    """What open("/dev/kvm") gives: questions about KVM, and new VMs. All calls raise SyscallFailed."""

    def get_api_version(self) -> int:
        """KVM_GET_API_VERSION: 12, and nothing else may be used where it is not."""

    def check_extension(self, cap: int) -> int:
        """KVM_CHECK_EXTENSION of any VM."""

    def create_vm(self, vm_type: int = 0) -> KvmVm:
        """KVM_CREATE_VM; EINVAL for a type that there is not. Raises SyscallFailed."""

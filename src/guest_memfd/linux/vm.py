"""A VM's descriptor: memory slots, guest_memfd files, vCPUs. Each method is one ioctl."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Mapping as Map

from guest_memfd.errors import HostUnavailable
from guest_memfd.linux import guest_memfd, stats, syscall
from guest_memfd.linux.fd import Descriptor, number_of
from guest_memfd.linux.guest_memfd import GuestMemfd
from guest_memfd.linux.mapping import PAGE
from guest_memfd.linux.vcpu import LinuxVcpu
from guest_memfd.linux.vcpu_arm64 import Arm64Vcpu
from guest_memfd.linux.vcpu_x86 import X86Vcpu
from guest_memfd.uapi import kvm as uapi
from guest_memfd.uapi.memory import GuestMemory
from guest_memfd.words.units import NULL, Ipa, Va

_VCPUS: dict[str, type[LinuxVcpu]] = {"x86_64": X86Vcpu, "aarch64": Arm64Vcpu}


class LinuxVm(Descriptor):
    """uapi/kvm.py KvmVm, of *fd*. Only the process that made it may use it: EIO in a child.

    The kernel reads a slot's userspace_addr for as long as the slot exists: keep what is mapped there.
    """

    def __init__(self, fd: int, vcpu_mmap_size: int) -> None:
        super().__init__(fd, "kvm-vm")
        self.vcpu_mmap_size = vcpu_mmap_size

    def check_extension(self, cap: int) -> int:
        """KVM_CHECK_EXTENSION of this VM; 0 for what it does not have."""
        return syscall.ioctl(self.fileno(), uapi.CHECK_EXTENSION, cap, call="KVM_CHECK_EXTENSION")

    def create_guest_memfd(self, size: int, flags: int = 0) -> GuestMemfd:
        """KVM_CREATE_GUEST_MEMFD of *size* bytes, flags as `uapi.kvm.GuestMemfdFlag`; raises SyscallFailed."""
        return guest_memfd.create(self, size, flags)

    def set_user_memory_region2(
        self, slot: int, flags: int, guest_phys_addr: Ipa, memory_size: int, *, userspace_addr: Va = NULL,
        guest_memfd: GuestMemory | None = None, guest_memfd_offset: int = 0,
    ) -> None:
        """KVM_SET_USER_MEMORY_REGION2; *memory_size* 0 deletes the slot. A closed file is EBADF."""
        region = uapi.UserspaceMemoryRegion2(
            slot=slot, flags=flags, guest_phys_addr=guest_phys_addr, memory_size=memory_size,
            userspace_addr=userspace_addr, guest_memfd_offset=guest_memfd_offset, guest_memfd=number_of(guest_memfd))
        syscall.ioctl(self.fileno(), uapi.SET_USER_MEMORY_REGION2, region, call="KVM_SET_USER_MEMORY_REGION2",
                      why=f"slot {slot:#x}, {memory_size:#x} bytes at {guest_phys_addr:#x}")

    def set_user_memory_region(self, slot: int, flags: int, guest_phys_addr: Ipa, memory_size: int,
                               userspace_addr: Va = NULL) -> None:
        """KVM_SET_USER_MEMORY_REGION: plain memory of this process; *memory_size* 0 deletes the slot."""
        region = uapi.UserspaceMemoryRegion(slot, flags, guest_phys_addr, memory_size, userspace_addr)
        syscall.ioctl(self.fileno(), uapi.SET_USER_MEMORY_REGION, region, call="KVM_SET_USER_MEMORY_REGION",
                      why=f"slot {slot:#x}, {memory_size:#x} bytes at {guest_phys_addr:#x}")

    def set_memory_attributes(self, address: Ipa, size: int, attributes: int, flags: int = 0) -> None:
        """KVM_SET_MEMORY_ATTRIBUTES; ENOTTY (arm64: EINVAL) where attributes belong to the file, or there are none."""
        syscall.ioctl(self.fileno(), uapi.SET_MEMORY_ATTRIBUTES, uapi.MemoryAttributes(address, size, attributes, flags),
                      call="KVM_SET_MEMORY_ATTRIBUTES", why=f"{size:#x} bytes at {address:#x}")

    def get_dirty_log(self, slot: int, memory_size: int) -> bytes:
        """KVM_GET_DIRTY_LOG of a slot of *memory_size* bytes: one bit per page; ENOENT for one of a guest_memfd."""
        # The kernel writes whole words of 64 bits.
        bitmap = ctypes.create_string_buffer(-(-memory_size // PAGE // 64) * 8)
        syscall.ioctl(self.fileno(), uapi.GET_DIRTY_LOG, uapi.DirtyLog(slot, 0, ctypes.addressof(bitmap)),
                      call="KVM_GET_DIRTY_LOG", why=f"slot {slot:#x}")
        return bitmap.raw

    def create_vcpu(self, vcpu_id: int = 0) -> LinuxVcpu:
        """KVM_CREATE_VCPU; what it is depends on the machine. Raises HostUnavailable where that is not known here."""
        machine = platform.machine()
        if machine not in _VCPUS:
            raise HostUnavailable(f"vCPUs of {machine} are not known here, only {', '.join(_VCPUS)}")
        fd = syscall.ioctl(self.fileno(), uapi.CREATE_VCPU, vcpu_id, call="KVM_CREATE_VCPU", why=f"id {vcpu_id}")
        return _VCPUS[machine](self, fd, vcpu_id)

    def statistics(self) -> Map[str, int]:
        """KVM_GET_STATS_FD: counters by name."""
        return stats.read(self)

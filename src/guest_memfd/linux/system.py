"""/dev/kvm. An absent or unusable device is HostUnavailable, with what to do about it."""

from __future__ import annotations

import os
from errno import EACCES, ENODEV, ENOENT, ENXIO, EPERM

from guest_memfd.errors import HostUnavailable, SyscallFailed
from guest_memfd.linux import syscall
from guest_memfd.linux.fd import Descriptor
from guest_memfd.linux.vm import LinuxVm
from guest_memfd.uapi import kvm as uapi
from guest_memfd.uapi.kvm import PATH

_HELP = {
    ENOENT: "load kvm_intel, kvm_amd or kvm_pvm, or start this machine with nested virtualisation",
    ENODEV: "the module is loaded but the processor's virtualisation is switched off",
    ENXIO: "the device node is there but no module serves it",
    EACCES: "become a member of the group that owns it, usually kvm",
    EPERM: "a device policy (a container's, for example) forbids it",
}


def open_device(path: str, helps: dict[int, str]) -> int:
    """open(2) of a device node; raises HostUnavailable, with *helps* by errno."""
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        words = helps.get(error.errno or 0)
        raise HostUnavailable(f"{path}: {error.strerror}{f'; {words}' if words else ''}") from error


class System(Descriptor):
    """uapi/kvm.py KvmSystem. Raises HostUnavailable."""

    def __init__(self, path: str = PATH) -> None:
        # Of a path that someone has written: he knows what should be there.
        helps = {errno: words for errno, words in _HELP.items() if errno != ENOENT or path == PATH}
        super().__init__(open_device(path, helps), path)
        try:
            version = self.get_api_version()
            self.vcpu_mmap_size = syscall.ioctl(self.fileno(), uapi.GET_VCPU_MMAP_SIZE, call="KVM_GET_VCPU_MMAP_SIZE")
        except SyscallFailed as error:
            self.close()
            raise HostUnavailable(f"{path} is no KVM: {error}") from error
        # It has not changed since 2.6.22, and api.rst wants every other one refused.
        if version != uapi.API_VERSION:
            self.close()
            raise HostUnavailable(f"{path} has API version {version}, not {uapi.API_VERSION}")

    def get_api_version(self) -> int:
        """KVM_GET_API_VERSION: 12 on every kernel since 2.6.22. Raises SyscallFailed."""
        return syscall.ioctl(self.fileno(), uapi.GET_API_VERSION, call="KVM_GET_API_VERSION")

    def check_extension(self, cap: int) -> int:
        """KVM_CHECK_EXTENSION; 0 for what there is not."""
        return syscall.ioctl(self.fileno(), uapi.CHECK_EXTENSION, cap, call="KVM_CHECK_EXTENSION")

    def lacks_shared(self) -> str:
        """Why files cannot be made with `uapi.kvm.SHARED`, "" if they can: the capability is asked, not the release."""
        flags = self.check_extension(uapi.Cap.GUEST_MEMFD_FLAGS)
        if flags & uapi.SHARED == uapi.SHARED:
            return ""
        there = "a guest_memfd that cannot be mapped" if self.check_extension(uapi.Cap.GUEST_MEMFD) else "no guest_memfd"
        return f"/dev/kvm has {there} (KVM_CAP_GUEST_MEMFD_FLAGS is {flags:#x}); Linux 6.18 and later have one that can be"

    def create_vm(self, vm_type: int = 0) -> LinuxVm:
        """KVM_CREATE_VM, again after a signal, which may hit it while it takes the locks of an address space."""
        fd = syscall.until_done(lambda: syscall.ioctl(self.fileno(), uapi.CREATE_VM, vm_type, call="KVM_CREATE_VM",
                                                      why=f"type {vm_type:#x}"))
        return LinuxVm(fd, self.vcpu_mmap_size)


_KEPT: type[uapi.KvmSystem] = System
# For the type checker: System, and through it VMs, vCPUs, files and mappings, keep what uapi/ promises.

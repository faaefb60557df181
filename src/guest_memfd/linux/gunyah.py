"""/dev/gunyah, series v17. Each method is one ioctl, with the argument as `uapi.gunyah` lays it out.

Arguments that the driver refuses go to it as they are; so does a closed descriptor, as -1.
"""

from __future__ import annotations

import ctypes
from errno import EACCES, ENODEV, ENOENT, ENXIO, EPERM
from mmap import MAP_SHARED, PROT_READ, PROT_WRITE

from guest_memfd.compat import override
from guest_memfd.errors import SyscallFailed
from guest_memfd.linux import syscall
from guest_memfd.linux.fd import Descriptor, number_of
from guest_memfd.linux.guest_memfd import MemoryFile
from guest_memfd.linux.system import open_device
from guest_memfd.uapi.gunyah import (
    PATH,
    CreateMemArgs,
    Exit,
    FnDesc,
    FnType,
    FnVcpuArg,
    GunyahDevice,
    GunyahMemFlag,
    Ioctl,
    MapMemArgs,
    VcpuRun,
    VmBootContext,
    VmDtbConfig,
)
from guest_memfd.uapi.memory import GuestMemory
from guest_memfd.words.units import Ipa

_HELP = {
    ENOENT: "this is no Gunyah host, or its kernel lacks the Gunyah driver",
    ENODEV: "the driver found no Gunyah hypervisor below it",
    ENXIO: "the device node is there but no driver serves it",
    EACCES: "become root, or a member of the group that owns it",
    EPERM: "a device policy (a container's, for example) forbids it",
}


class LinuxGunyahDevice(Descriptor):
    """uapi/gunyah.py GunyahDevice. Raises HostUnavailable."""

    def __init__(self, path: str = PATH) -> None:
        super().__init__(open_device(path, _HELP), path)

    def create_vm(self, arg: int = 0) -> LinuxGunyahVm:
        """GUNYAH_CREATE_VM; raises SyscallFailed, EINVAL unless *arg* is 0."""
        fd = syscall.ioctl(self.fileno(), Ioctl.CREATE_VM, arg, call="GUNYAH_CREATE_VM", why=f"argument {arg}")
        return LinuxGunyahVm(fd)

    def create_guest_mem(self, size: int, flags: int = GunyahMemFlag.CLOEXEC) -> MemoryFile:
        """CREATE_GUEST_MEM, bytes; close-on-exec is set whatever *flags* say."""
        fd = syscall.ioctl(self.fileno(), Ioctl.CREATE_GUEST_MEM, CreateMemArgs(flags, size),
                           call="GUNYAH_CREATE_GUEST_MEM", why=f"{size:#x} bytes, flags {flags:#x}")
        return MemoryFile(fd, "gunyah-guest-mem", size)


class LinuxGunyahVm(Descriptor):
    """uapi/gunyah.py GunyahVm, of *fd*."""

    def __init__(self, fd: int) -> None:
        super().__init__(fd, "gunyah-vm")

    def map_mem(self, memory: GuestMemory, guest_addr: Ipa, offset: int, size: int, flags: int) -> None:
        """MAP_MEM, also to unmap."""
        syscall.ioctl(self.fileno(), Ioctl.MAP_MEM, MapMemArgs(guest_addr, flags, number_of(memory), offset, size),
                      call="GUNYAH_VM_MAP_MEM", why=f"{size:#x} bytes at {guest_addr:#x}, flags {flags:#x}")

    def set_dtb_config(self, guest_phys_addr: Ipa, size: int) -> None:
        """GUNYAH_VM_SET_DTB_CONFIG: *size* bytes of device tree at a guest physical address; raises SyscallFailed."""
        syscall.ioctl(self.fileno(), Ioctl.SET_DTB_CONFIG, VmDtbConfig(guest_phys_addr, size),
                      call="GUNYAH_VM_SET_DTB_CONFIG", why=f"{size:#x} bytes at {guest_phys_addr:#x}")

    def set_boot_context(self, reg: int, value: int, reserved: int = 0) -> None:
        """SET_BOOT_CONTEXT; again after a signal, which may hit it while it waits for the VM's lock."""
        argument = VmBootContext(reg, reserved, value)
        syscall.until_done(lambda: syscall.ioctl(self.fileno(), Ioctl.SET_BOOT_CONTEXT, argument,
                                                 call="GUNYAH_VM_SET_BOOT_CONTEXT", why=f"register {reg:#x}"))

    def start(self) -> None:
        """GUNYAH_VM_START; raises SyscallFailed as `uapi.gunyah.GunyahVm.start` says."""
        syscall.ioctl(self.fileno(), Ioctl.START, call="GUNYAH_VM_START")

    def add_function(self, kind: int, arg: bytes) -> LinuxGunyahVcpu | None:
        """ADD_FUNCTION; a Vcpu for that kind."""
        fd = self._function(Ioctl.ADD_FUNCTION, "GUNYAH_VM_ADD_FUNCTION", kind, arg)
        return LinuxGunyahVcpu(fd) if kind == FnType.VCPU else None

    def remove_function(self, kind: int, arg: bytes) -> None:
        """GUNYAH_VM_REMOVE_FUNCTION, with the argument that it was added with; raises SyscallFailed, ENOENT."""
        self._function(Ioctl.REMOVE_FUNCTION, "GUNYAH_VM_REMOVE_FUNCTION", kind, arg)

    def _function(self, request: int, call: str, kind: int, arg: bytes) -> int:
        data = ctypes.create_string_buffer(arg, len(arg))
        return syscall.ioctl(self.fileno(), request, FnDesc(kind, len(arg), ctypes.addressof(data)),
                             call=call, why=f"function {kind}, {len(arg)} bytes")

    def add_vcpu(self, index: int) -> LinuxGunyahVcpu:
        """ADD_FUNCTION of a vCPU."""
        made = self.add_function(FnType.VCPU, bytes(FnVcpuArg(index)))
        assert made is not None
        return made


class LinuxGunyahVcpu(Descriptor):
    """uapi/gunyah.py GunyahVcpu, of *fd*; `page` is what the driver shows, not a copy."""

    def __init__(self, fd: int) -> None:
        super().__init__(fd, "gunyah-vcpu")
        try:
            self._size = syscall.ioctl(fd, Ioctl.VCPU_MMAP_SIZE, call="GUNYAH_VCPU_MMAP_SIZE")
            self._address = syscall.mmap(fd, 0, self._size, PROT_READ | PROT_WRITE, MAP_SHARED)
        except SyscallFailed:
            self.closed = True
            super()._release()
            raise
        self.page = VcpuRun.from_address(self._address)

    def run(self) -> Exit:
        """GUNYAH_VCPU_RUN; the exit is read off the shared page. Raises SyscallFailed."""
        syscall.ioctl(self.fileno(), Ioctl.VCPU_RUN, call="GUNYAH_VCPU_RUN")
        return self.page.exit

    @override
    def _release(self) -> None:
        del self.page                       # a stray use is an AttributeError, not a SIGSEGV
        syscall.munmap(self._address, self._size)
        super()._release()


_KEPT: type[GunyahDevice] = LinuxGunyahDevice
# For the type checker: Device, and through it VMs, vCPUs, files and mappings, keep what uapi/ promises.

"""/dev/gunyah: numbers, layouts and promises of the Gunyah driver, series v17 (include/uapi/linux/gunyah.h).

The bytes of a structure are those that the driver copies from user space; the page that a vCPU shares with user space is
`VcpuRun`. Patches 08, 10, 13, 15, 23, 24, 26, 30 and 33 of the series.
"""

from __future__ import annotations

import ctypes
from ctypes import c_int32, c_uint8, c_uint16, c_uint32, c_uint64, sizeof
from enum import IntEnum, IntFlag
from typing import NamedTuple, Protocol

from guest_memfd.distinct import distinct
from guest_memfd.uapi.ioctl import io, iow
from guest_memfd.uapi.memory import GuestMemory, Owner
from guest_memfd.uapi.words import Words
from guest_memfd.words.units import Ipa

PATH = "/dev/gunyah"
_KIND = "G"


# -- structures ------------------------------------------------------------------------------------------------------

class CreateMemArgs(Words):
    """struct gunyah_create_mem_args: GHMF_* flags, size in bytes; no one looks at `reserved`."""

    _fields_ = [("flags", c_uint64), ("size", c_uint64), ("reserved", c_uint64 * 6)]


class MapMemArgs(Words):
    """struct gunyah_map_mem_args: guest address, `MapFlag` bits, descriptor, offset and size in bytes."""

    _fields_ = [("guest_addr", c_uint64), ("flags", c_uint32), ("guest_mem_fd", c_uint32), ("offset", c_uint64),
                ("size", c_uint64)]


class VmDtbConfig(Words):
    """struct gunyah_vm_dtb_config: where the device tree is, guest address and bytes."""

    _fields_ = [("guest_phys_addr", c_uint64), ("size", c_uint64)]


class FnDesc(Words):
    """struct gunyah_fn_desc: `FnType`, bytes of the argument, its address in user space."""

    _fields_ = [("type", c_uint32), ("arg_size", c_uint32), ("arg", c_uint64)]


class VmBootContext(Words):
    """struct gunyah_vm_boot_context: register (see `boot_register`), its value; `reserved` has to be 0."""

    _fields_ = [("reg", c_uint32), ("reserved", c_uint32), ("value", c_uint64)]


class FnVcpuArg(Words):
    """struct gunyah_fn_vcpu_arg, what `FnDesc` points to: the number of the vCPU to add or remove."""

    _fields_ = [("id", c_uint32)]


class FnIrqfdArg(Words):
    """struct gunyah_fn_irqfd_arg: an eventfd, the label of the interrupt that it raises, flags (`IRQFD_LEVEL`)."""

    _fields_ = [("fd", c_uint32), ("label", c_uint32), ("flags", c_uint32), ("padding", c_uint32)]


class FnIoeventfdArg(Words):
    """struct gunyah_fn_ioeventfd_arg: a store of `len` bytes at guest address `addr` signals the eventfd.

    With `IOEVENTFD_DATAMATCH` only a store of `datamatch` does.
    """

    _fields_ = [("datamatch", c_uint64), ("addr", c_uint64), ("len", c_uint32), ("fd", c_int32), ("flags", c_uint32),
                ("padding", c_uint32)]


# -- numbers ---------------------------------------------------------------------------------------------------------

class Ioctl(IntEnum):
    """Commands. Anything else is -ENOTTY; 0x1 is not used by this series."""

    CREATE_VM = io(_KIND, 0x0)
    SET_DTB_CONFIG = iow(_KIND, 0x2, sizeof(VmDtbConfig))
    START = io(_KIND, 0x3)
    ADD_FUNCTION = iow(_KIND, 0x4, sizeof(FnDesc))
    VCPU_RUN = io(_KIND, 0x5)
    VCPU_MMAP_SIZE = io(_KIND, 0x6)
    REMOVE_FUNCTION = iow(_KIND, 0x7, sizeof(FnDesc))
    CREATE_GUEST_MEM = iow(_KIND, 0x8, sizeof(CreateMemArgs))
    MAP_MEM = iow(_KIND, 0x9, sizeof(MapMemArgs))
    SET_BOOT_CONTEXT = iow(_KIND, 0xA, sizeof(VmBootContext))


class GunyahMemFlag(IntFlag):
    """Flags of CREATE_GUEST_MEM (GHMF_*)."""

    CLOEXEC = 0x1
    ALLOW_HUGEPAGE = 0x2


class MapFlag(IntFlag):
    """Flags of MAP_MEM: access in bits 2:0, what the guest may do, and whether to unmap."""

    DEFAULT_ACCESS = 0
    FORCE_LEND = 1
    FORCE_SHARE = 2
    ALLOW_READ = 0x10
    ALLOW_WRITE = 0x20
    ALLOW_EXEC = 0x40
    ALLOW_RWX = 0x70
    UNMAP = 0x100


ACCESS_MASK = 0x7
"""The access field of `MapFlag`."""


class FnType(IntEnum):
    """Functions a VM can be given."""

    VCPU = 1
    IRQFD = 2
    IOEVENTFD = 3


FN_MAX_ARG_SIZE = 256
IRQFD_LEVEL = 1
IOEVENTFD_DATAMATCH = 1


class GunyahExitReason(IntEnum):
    """gunyah_vcpu_run.exit_reason: which member of the union is valid."""

    UNKNOWN = 0
    MMIO = 1
    STATUS = 2
    PAGE_FAULT = 3


class ResumeAction(IntEnum):
    """What user space wants done about an MMIO exit."""

    HANDLED = 0
    FAULT = 1
    RETRY = 2


class VmStatus(IntEnum):
    """gunyah_vcpu_run.status.status: how the VM came to its end."""

    LOAD_FAILED = 1
    EXITED = 2
    CRASHED = 3


class RegisterSet(IntEnum):
    """Sets of boot registers; `REGISTERS` says how many each has."""

    X = 0
    PC = 1
    SP = 2


REGISTERS = {RegisterSet.X: 32, RegisterSet.PC: 1, RegisterSet.SP: 3}


def boot_register(which: RegisterSet, index: int) -> int:
    """vm_boot_context.reg of register *index* of a set."""
    return (which & 0xFF) << 8 | index


# -- the page a vCPU shares ------------------------------------------------------------------------------------------

@distinct
class MmioExit(NamedTuple):
    """The guest touched a device: address, bytes written (or room for those read), whether it wrote."""

    phys_addr: Ipa
    data: bytes
    is_write: bool


@distinct
class StatusExit(NamedTuple):
    """The VM no longer runs; type and reason as the Resource Manager reported them."""

    status: VmStatus
    type: int
    reason: bytes


@distinct
class PageFaultExit(NamedTuple):
    """Memory could not be given to the guest: address, and -errno of the attempt."""

    phys_addr: Ipa
    attempt: int


Exit = MmioExit | StatusExit | PageFaultExit | None
"""What VCPU_RUN came back with; None: no reason is set (UNKNOWN)."""


class VcpuRunMmio(Words):
    """gunyah_vcpu_run.mmio: a guest access of `len` bytes; `resume_action` is read by the next VCPU_RUN."""

    _fields_ = [("phys_addr", c_uint64), ("data", c_uint8 * 8), ("len", c_uint32), ("is_write", c_uint8),
                ("resume_action", c_uint8)]


class VcpuRunStatus(Words):
    """gunyah_vcpu_run.status; all but `status` is what the kernel calls exit_info."""

    _fields_ = [("status", c_uint32), ("type", c_uint16), ("padding", c_uint16), ("reason_size", c_uint32),
                ("reason", c_uint8 * 8)]


class VcpuRunPageFault(Words):
    """gunyah_vcpu_run.page_fault: a guest address that could not be given, and -errno of the attempt."""

    _fields_ = [("phys_addr", c_uint64), ("attempt", c_int32), ("resume_action", c_uint8)]


class VcpuRunUnion(ctypes.Union):
    """What an exit says; which member is valid is `VcpuRun.exit_reason`'s."""

    _fields_ = [("mmio", VcpuRunMmio), ("status", VcpuRunStatus), ("page_fault", VcpuRunPageFault)]


class VcpuRun(Words):
    """struct gunyah_vcpu_run, the beginning of the page that mmap() of a vCPU shows.

    `immediate_exit` not 0: VCPU_RUN returns -EINTR instead of entering the guest.
    """

    _anonymous_ = ("says",)
    _fields_ = [("immediate_exit", c_uint8), ("padding", c_uint8 * 7), ("exit_reason", c_uint32), ("says", VcpuRunUnion)]

    @property
    def exit(self) -> Exit:
        """The exit that the page describes, decoded; None when no reason is set."""
        match GunyahExitReason(self.exit_reason):
            case GunyahExitReason.MMIO:
                return MmioExit(self.mmio.phys_addr, self.data[:self.mmio.len], bool(self.mmio.is_write))
            case GunyahExitReason.STATUS:
                status = self.status
                return StatusExit(VmStatus(status.status), status.type, bytes(status.reason)[:status.reason_size])
            case GunyahExitReason.PAGE_FAULT:
                return PageFaultExit(self.page_fault.phys_addr, self.page_fault.attempt)
        return None

    def set_mmio(self, phys_addr: int, data: bytes, length: int, is_write: bool) -> None:
        """The driver: an MMIO exit; resume_action keeps what it was."""
        self.says.mmio = VcpuRunMmio(phys_addr, _eight(data), length, is_write, self.mmio.resume_action)
        self.exit_reason = GunyahExitReason.MMIO

    def set_status(self, status: VmStatus, kind: int, reason: bytes) -> None:
        """The driver: a STATUS exit."""
        self.says.status = VcpuRunStatus(status, kind, 0, len(reason), _eight(reason))
        self.exit_reason = GunyahExitReason.STATUS

    def set_page_fault(self, phys_addr: int, attempt: int) -> None:
        """The driver: a PAGE_FAULT exit; resume_action is preset to FAULT."""
        self.says.page_fault = VcpuRunPageFault(phys_addr, attempt, ResumeAction.FAULT)
        self.exit_reason = GunyahExitReason.PAGE_FAULT

    @property
    def data(self) -> bytes:
        """mmio.data: eight bytes, for a read what the guest is to find."""
        return bytes(self.mmio.data)

    @data.setter
    def data(self, value: bytes) -> None:
        self.mmio.data = _eight(value)


def _eight(data: bytes) -> ctypes.Array[c_uint8]:
    return (c_uint8 * 8)(*data[:8])


# -- what the descriptors do -----------------------------------------------------------------------------------------

class GunyahVcpu(Owner, Protocol):
    """A vCPU's descriptor; it holds the VM. `page` is its mmap'ed run structure."""

    page: VcpuRun

    def run(self) -> Exit:
        """VCPU_RUN: enter the guest until user space has something to do.

        ENODEV before START, and once the function has been removed; EINTR with immediate_exit; EINVAL when the last exit was
        MMIO and resume_action is none of `ResumeAction`; otherwise what the hypervisor's error maps to. A VM that does not
        run is no error: a STATUS exit. Source: gunyah_vcpu_run(), patches 15 and 28.
        """


class GunyahVm(Owner, Protocol):
    """A VM's descriptor. All calls raise SyscallFailed."""

    def map_mem(self, memory: GuestMemory, guest_addr: Ipa, offset: int, size: int, flags: int) -> None:
        """MAP_MEM: let [offset, offset+size) of *memory* appear at *guest_addr*; with UNMAP, take that away again. Bytes.

        In this order, EINVAL: *memory* closed; no guest memory of this driver; unknown bits; none of R, W and X; access
        3..7; anything not page aligned. Mapping: EINVAL not aligned to 2 MiB for a file with ALLOW_HUGEPAGE, or lending
        without a direct map that can be changed; EEXIST that part of the file, or of the VM, is bound already; EINVAL size
        0. Unmapping: ENOENT unless flags, VM and distance agree and one binding contains the range; EINVAL from its middle;
        EBUSY while the guest holds on to a page, and the binding stays. Source: gunyah_gmem_modify_binding(), patch 24.
        """

    def set_dtb_config(self, guest_phys_addr: Ipa, size: int) -> None:
        """SET_DTB_CONFIG: where START finds the device tree; any time, any value."""

    def set_boot_context(self, reg: int, value: int, reserved: int = 0) -> None:
        """SET_BOOT_CONTEXT: EINVAL for registers that do not exist, a reserved word that is not 0, or after START."""

    def start(self) -> None:
        """START: 0 if it runs already; ENODEV after a START that failed, or once the VM has exited; EINVAL without a device
        tree; ENOENT when that is in no binding; EPERM when the VMM maps it; otherwise what the Resource Manager said.
        Memory of a VM that failed to start comes back when its last descriptor goes.
        """

    def add_function(self, kind: int, arg: bytes) -> GunyahVcpu | None:
        """ADD_FUNCTION: EINVAL more than 256 bytes, or of the wrong size; ENOENT no such function; EEXIST it is there."""

    def remove_function(self, kind: int, arg: bytes) -> None:
        """REMOVE_FUNCTION, by the argument that it was added with: ENOENT when there is none, EINVAL more than 256 bytes."""

    def add_vcpu(self, index: int) -> GunyahVcpu:
        """ADD_FUNCTION of a vCPU."""


class GunyahDevice(Owner, Protocol):
    """What open("/dev/gunyah") gives. All calls raise SyscallFailed."""

    def create_vm(self, arg: int = 0) -> GunyahVm:
        """CREATE_VM: EINVAL unless *arg* is 0; ENOMEM."""

    def create_guest_mem(self, size: int, flags: int = 0) -> GuestMemory:
        """CREATE_GUEST_MEM: EINVAL unless *size* is a multiple of the page size (0 is one), or for unknown flags; ENOMEM."""

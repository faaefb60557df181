"""/dev/gunyah: numbers, layouts and promises of the Gunyah driver, series v17 (include/uapi/linux/gunyah.h).

Little endian throughout. Every structure packs to exactly the bytes that the driver copies from user space; the page that a
vCPU shares with user space is `VcpuRun`. Patches 08, 10, 13, 15, 23, 24, 26, 30 and 33 of the series.
"""

from __future__ import annotations

import struct
from enum import IntEnum, IntFlag
from typing import ClassVar, NamedTuple, Protocol, Self

from guest_memfd.distinct import distinct
from guest_memfd.uapi.ioctl import io, iow
from guest_memfd.uapi.memory import GuestMemory, Owner
from guest_memfd.uapi.words import packed
from guest_memfd.words.units import Ipa

PATH = "/dev/gunyah"
_KIND = "G"


# -- structures ------------------------------------------------------------------------------------------------------

class CreateMemArgs(NamedTuple):
    """struct gunyah_create_mem_args: GHMF_* flags, size in bytes; six reserved words that no one checks."""

    flags: int
    size: int

    def pack(self) -> bytes:
        """The 64 bytes for the ioctl, reserved words 0; raises BadInput for a number that does not fit its field."""
        return packed("<QQ48x", type(self).__name__, *self)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """The reverse of `pack`, of exactly 64 bytes; the reserved words are dropped."""
        return cls(*struct.unpack("<QQ48x", data))


class MapMemArgs(NamedTuple):
    """struct gunyah_map_mem_args: guest address, `MapFlag` bits, descriptor, offset and size in bytes."""

    guest_addr: Ipa
    flags: int
    guest_mem_fd: int
    offset: int
    size: int

    def pack(self) -> bytes:
        """The 32 bytes for the ioctl; raises BadInput for a number that does not fit its field."""
        return packed("<QIIQQ", type(self).__name__, *self)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """The reverse of `pack`, of exactly 32 bytes."""
        return cls(*struct.unpack("<QIIQQ", data))


class VmDtbConfig(NamedTuple):
    """struct gunyah_vm_dtb_config: where the device tree is, guest address and bytes."""

    guest_phys_addr: Ipa
    size: int

    def pack(self) -> bytes:
        """The 16 bytes for the ioctl; raises BadInput for a number that does not fit its field."""
        return packed("<QQ", type(self).__name__, *self)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """The reverse of `pack`, of exactly 16 bytes."""
        return cls(*struct.unpack("<QQ", data))


class FnDesc(NamedTuple):
    """struct gunyah_fn_desc: `FnType`, bytes of the argument, its address in user space."""

    type: int
    arg_size: int
    arg: int

    def pack(self) -> bytes:
        """The 16 bytes for the ioctl; raises BadInput for a number that does not fit its field."""
        return packed("<IIQ", type(self).__name__, *self)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """The reverse of `pack`, of exactly 16 bytes."""
        return cls(*struct.unpack("<IIQ", data))


class VmBootContext(NamedTuple):
    """struct gunyah_vm_boot_context: register (see `boot_register`), a reserved word, value."""

    reg: int
    reserved: int
    value: int

    def pack(self) -> bytes:
        """The 16 bytes for the ioctl; raises BadInput for a number that does not fit its field."""
        return packed("<IIQ", type(self).__name__, *self)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """The reverse of `pack`, of exactly 16 bytes."""
        return cls(*struct.unpack("<IIQ", data))


class FnVcpuArg(NamedTuple):
    """struct gunyah_fn_vcpu_arg: which vCPU."""

    id: int

    def pack(self) -> bytes:
        """The 4 bytes that `FnDesc` points to; raises BadInput for a number that does not fit."""
        return packed("<I", type(self).__name__, *self)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """The reverse of `pack`, of exactly 4 bytes."""
        return cls(*struct.unpack("<I", data))


class FnIrqfdArg(NamedTuple):
    """struct gunyah_fn_irqfd_arg: eventfd, label of the interrupt, flags (`IRQFD_LEVEL`), padding."""

    fd: int
    label: int
    flags: int = 0
    padding: int = 0

    def pack(self) -> bytes:
        """The 16 bytes that `FnDesc` points to; raises BadInput for a number that does not fit its field."""
        return packed("<IIII", type(self).__name__, *self)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """The reverse of `pack`, of exactly 16 bytes."""
        return cls(*struct.unpack("<IIII", data))


class FnIoeventfdArg(NamedTuple):
    """struct gunyah_fn_ioeventfd_arg: value and guest address to match, bytes, eventfd, flags, padding."""

    datamatch: int
    addr: int
    len: int
    fd: int
    flags: int = 0
    padding: int = 0

    def pack(self) -> bytes:
        """The 32 bytes that `FnDesc` points to; raises BadInput for a number that does not fit its field."""
        return packed("<QQIiII", type(self).__name__, *self)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """The reverse of `pack`, of exactly 32 bytes."""
        return cls(*struct.unpack("<QQIiII", data))


# -- numbers ---------------------------------------------------------------------------------------------------------

class Ioctl(IntEnum):
    """Commands. Anything else is -ENOTTY; 0x1 is not used by this series."""

    CREATE_VM = io(_KIND, 0x0)
    SET_DTB_CONFIG = iow(_KIND, 0x2, 16)
    START = io(_KIND, 0x3)
    ADD_FUNCTION = iow(_KIND, 0x4, 16)
    VCPU_RUN = io(_KIND, 0x5)
    VCPU_MMAP_SIZE = io(_KIND, 0x6)
    REMOVE_FUNCTION = iow(_KIND, 0x7, 16)
    CREATE_GUEST_MEM = iow(_KIND, 0x8, 64)
    MAP_MEM = iow(_KIND, 0x9, 32)
    SET_BOOT_CONTEXT = iow(_KIND, 0xA, 16)


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


class VcpuRun:
    """struct gunyah_vcpu_run, 40 bytes at the start of the page that mmap() of a vCPU shows; `raw` is what both sides see.

    The three kinds of exit overlay each other from byte 16 on.
    """

    SIZE: ClassVar[int] = 40
    MMIO: ClassVar[struct.Struct] = struct.Struct("<Q8sIBB")            # @16
    STATUS: ClassVar[struct.Struct] = struct.Struct("<IHHI8s")          # @16
    PAGE_FAULT: ClassVar[struct.Struct] = struct.Struct("<QiB")         # @16
    UNION: ClassVar[int] = 16

    def __init__(self, raw: bytearray | None = None) -> None:
        self.raw = bytearray(4096) if raw is None else raw

    @property
    def immediate_exit(self) -> int:
        """Non-zero: VCPU_RUN returns -EINTR instead of entering the guest."""
        return self.raw[0]

    @immediate_exit.setter
    def immediate_exit(self, value: int) -> None:
        self.raw[0] = value

    @property
    def exit_reason(self) -> GunyahExitReason:
        """Which of the three is valid."""
        return GunyahExitReason(struct.unpack_from("<I", self.raw, 8)[0])

    @exit_reason.setter
    def exit_reason(self, value: GunyahExitReason) -> None:
        struct.pack_into("<I", self.raw, 8, value)

    @property
    def exit(self) -> Exit:
        """The exit that the page describes, decoded; None when no reason is set."""
        reason = self.exit_reason
        if reason == GunyahExitReason.MMIO:
            address, data, length, is_write, _ = self.MMIO.unpack_from(self.raw, self.UNION)
            return MmioExit(address, data[:length], bool(is_write))
        if reason == GunyahExitReason.STATUS:
            status, kind, _, size, words = self.STATUS.unpack_from(self.raw, self.UNION)
            return StatusExit(VmStatus(status), kind, words[:size])
        if reason == GunyahExitReason.PAGE_FAULT:
            address, attempt, _ = self.PAGE_FAULT.unpack_from(self.raw, self.UNION)
            return PageFaultExit(address, attempt)
        return None

    def set_mmio(self, phys_addr: int, data: bytes, length: int, is_write: bool) -> None:
        """The driver: an MMIO exit; resume_action keeps what it was."""
        action = self.raw[37]
        self.MMIO.pack_into(self.raw, self.UNION, phys_addr, data, length, is_write, action)
        self.exit_reason = GunyahExitReason.MMIO

    def set_status(self, status: VmStatus, kind: int, reason: bytes) -> None:
        """The driver: a STATUS exit."""
        self.STATUS.pack_into(self.raw, self.UNION, status, kind, 0, len(reason), reason)
        self.exit_reason = GunyahExitReason.STATUS

    def set_page_fault(self, phys_addr: int, attempt: int) -> None:
        """The driver: a PAGE_FAULT exit; resume_action is preset to FAULT."""
        self.PAGE_FAULT.pack_into(self.raw, self.UNION, phys_addr, attempt, ResumeAction.FAULT)
        self.exit_reason = GunyahExitReason.PAGE_FAULT

    @property
    def data(self) -> bytes:
        """mmio.data: eight bytes, for a read what the guest is to find."""
        return bytes(self.raw[24:32])

    @data.setter
    def data(self, value: bytes) -> None:
        self.raw[24:32] = value.ljust(8, b"\0")[:8]

    @property
    def is_write(self) -> bool:
        """mmio.is_write: the guest stores, and `data` is what it wrote."""
        return bool(self.raw[36])

    @property
    def resume_action(self) -> int:
        """mmio.resume_action, read by the next VCPU_RUN after an MMIO exit."""
        return self.raw[37]

    @resume_action.setter
    def resume_action(self, value: int) -> None:
        self.raw[37] = value


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

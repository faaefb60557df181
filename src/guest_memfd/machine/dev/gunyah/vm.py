"""A VM's descriptor. Every check of every ioctl is here, in the driver's order; what follows is done elsewhere.

Source: drivers/virt/gunyah/vm_mgr.c, guest_memfd.c (series v17, patches 10, 13, 24, 26 and 30).
"""

from __future__ import annotations

import ctypes
import struct
from errno import EEXIST, EINVAL, ENOENT, ENOMEM
from typing import TYPE_CHECKING, Any

from guest_memfd.compat import override
from guest_memfd.errors import SyscallFailed
from guest_memfd.machine.dev.file import Serialised
from guest_memfd.machine.dev.gunyah import start, teardown
from guest_memfd.machine.dev.gunyah.binding import Binding
from guest_memfd.machine.dev.gunyah.ioevent import Ioeventfd, Irqfd
from guest_memfd.machine.dev.gunyah.memory import PMD_ORDER, GunyahMemoryFile, Parcelled
from guest_memfd.machine.dev.gunyah.vcpu import VcpuFile
from guest_memfd.machine.el2.gunyah.rm.client import RmClient
from guest_memfd.machine.el2.gunyah.rm.lifecycle import VmState
from guest_memfd.machine.el2.gunyah.rm.payloads import EXITED, Id
from guest_memfd.machine.hypcalls.gunyah import DeviceVm, GunyahDriver
from guest_memfd.uapi.gunyah import (
    ACCESS_MASK,
    FN_MAX_ARG_SIZE,
    REGISTERS,
    FnIoeventfdArg,
    FnIrqfdArg,
    FnType,
    FnVcpuArg,
    GunyahMemFlag,
    MapFlag,
    MapMemArgs,
    RegisterSet,
    VmBootContext,
    VmDtbConfig,
)
from guest_memfd.words.units import PAGE, Gfn, Ipa, gpa_to_gfn, page_index

if TYPE_CHECKING:
    from guest_memfd.machine.dev.gunyah.device import GunyahDeviceFile

_KNOWN = int(MapFlag.ALLOW_RWX | MapFlag.UNMAP) | ACCESS_MASK
_OVER = (VmState.EXITED, VmState.RESETTING, VmState.RESET)


class VmFile(Serialised):
    """uapi/gunyah.py GunyahVm. `references`: its descriptor, and one for every vCPU's."""

    def __init__(self, device: GunyahDeviceFile) -> None:
        self.machine, self.posted = device.machine, device.posted
        self._lock = self.machine.lock
        driver = self.machine.driver
        assert isinstance(driver, GunyahDriver)
        self.driver = driver
        self.linux = DeviceVm(None, -1, posted=self.posted, writable=self._writable)
        self.references = 1
        self._status = VmState.NO_STATE
        self.vmid = 0
        self.bindings: list[Binding] = []
        self.dtb = VmDtbConfig(Ipa(0), 0)
        self.boot: dict[tuple[int, int], int] = {}
        self.functions: dict[tuple[int, Any], VcpuFile | Irqfd | Ioeventfd] = {}
        self.parcel: tuple[Binding, Parcelled, int] | None = None       # what RM has as an image, and its handle
        self.machine.module.try_get()

    @property
    def rm(self) -> RmClient:
        """The channel to the Resource Manager."""
        return self.driver.rm_client

    @property
    def status(self) -> VmState:
        """As the driver keeps it: set by START, and by what the Resource Manager notifies of a VM that ran."""
        self.rm.receive()
        told = self.rm.status.get(self.vmid)
        if self._status == VmState.RUNNING and told in _OVER:
            self._status = VmState.EXITED
        return self._status

    @status.setter
    def status(self, value: VmState) -> None:
        self._status = value

    def exit_info(self) -> tuple[int, bytes]:
        """Type and reason of VM_EXITED."""
        told = [x.body for x in self.rm.notifications
                if x.id == Id.VM_EXITED and struct.unpack_from(EXITED, x.body)[0] == self.vmid]
        if not told:
            return 0, b""
        size = struct.calcsize(EXITED)
        return struct.unpack_from(EXITED, told[-1])[1], told[-1][size:size + 8]

    # -- memory --------------------------------------------------------------------------------------------------

    def binding_at(self, gfn: Gfn, nr: int = 1) -> Binding | None:
        """The binding that has all of these gfns."""
        return next((b for b in self.bindings if b.has(gfn, nr)), None)

    def _writable(self, gfn: Gfn) -> bool:
        binding = self.binding_at(gfn)
        return binding is not None and binding.writable

    def map_mem(self, memory: Any, guest_addr: Ipa, offset: int, size: int, flags: int) -> None:
        """MAP_MEM; addresses and sizes in bytes. Raises SyscallFailed as uapi/gunyah.py says, in the driver's order."""
        call = "MAP_MEM"
        self._in_use(call)
        asked = MapMemArgs(guest_addr, flags, 0, offset, size)
        guest_addr, flags, offset, size = asked.guest_addr, asked.flags, asked.offset, asked.size
        if getattr(memory, "closed", False):
            raise SyscallFailed(EINVAL, call, "guest_mem_fd is not open")
        if not isinstance(memory, GunyahMemoryFile):
            raise SyscallFailed(EINVAL, call, "guest_mem_fd is no guest memory")
        if flags & ~_KNOWN:
            raise SyscallFailed(EINVAL, call, f"flags {flags:#x}")
        if not flags & MapFlag.ALLOW_RWX:
            raise SyscallFailed(EINVAL, call, "none of ALLOW_READ, ALLOW_WRITE, ALLOW_EXEC")
        if flags & ACCESS_MASK > MapFlag.FORCE_SHARE:
            raise SyscallFailed(EINVAL, call, f"access {flags & ACCESS_MASK}")
        if (guest_addr | offset | size) % PAGE:
            raise SyscallFailed(EINVAL, call, f"{guest_addr:#x}, {offset:#x} or {size:#x} is not page aligned")
        gfn, first, nr = gpa_to_gfn(guest_addr), page_index(offset), size // PAGE
        if flags & MapFlag.UNMAP:
            self._unmap(memory, gfn, first, nr, MapFlag(flags & ~MapFlag.UNMAP))
        else:
            self._map(Binding(self.linux, memory, gfn, first, nr, MapFlag(flags)))

    def _map(self, new: Binding) -> None:
        call, memory = "MAP_MEM", new.file
        if self.machine.slab_fails():
            raise SyscallFailed(ENOMEM, call)
        if memory.flags & GunyahMemFlag.ALLOW_HUGEPAGE and (new.gfn | new.start | new.nr) % (1 << PMD_ORDER):
            raise SyscallFailed(EINVAL, call, "a file with ALLOW_HUGEPAGE is bound in multiples of 2 MiB")
        if new.lend and memory.needs_direct_map and not self.machine.linear_map.can_set_direct_map():
            raise SyscallFailed(EINVAL, call, "the direct map cannot be changed (rodata=full)")
        if any(b.covers(new.start, new.nr) for b in memory.bindings):
            raise SyscallFailed(EEXIST, call, "that part of the file is bound")
        if any(b.meets(new.gfn, new.nr) for b in self.bindings):
            raise SyscallFailed(EEXIST, call, "those guest addresses are bound")
        if not new.nr:
            raise SyscallFailed(EINVAL, call, "0 bytes")
        memory.bindings.append(new)
        self.bindings.append(new)
        try:
            memory.check(memory.bind(new), call)
        except SyscallFailed:
            self._forget(new)
            raise

    def _forget(self, binding: Binding) -> None:
        binding.file.bindings.remove(binding)
        self.bindings.remove(binding)

    def _unmap(self, memory: GunyahMemoryFile, gfn: Gfn, first: int, nr: int, flags: MapFlag) -> None:
        call, found = "MAP_MEM", self.binding_at(gfn, nr)
        if not nr or found is None or found.file is not memory or found.flags != flags or found.index(gfn) != first:
            raise SyscallFailed(ENOENT, call, "no such binding")
        if gfn != found.gfn and gfn + nr != found.end:
            raise SyscallFailed(EINVAL, call, "a binding loses an edge, or all of it")
        memory.check(memory.unbind(found, gfn, nr), call)
        if nr == found.nr:
            self._forget(found)
        else:
            found.trim(gfn, nr)

    # -- configuration, START ------------------------------------------------------------------------------------

    def set_dtb_config(self, guest_phys_addr: Ipa, size: int) -> None:
        """SET_DTB_CONFIG: guest address and bytes of the device tree; START checks them, not this call."""
        self._in_use("SET_DTB_CONFIG")
        self.dtb = VmDtbConfig(guest_phys_addr, size)

    def set_boot_context(self, reg: int, value: int, reserved: int = 0) -> None:
        """SET_BOOT_CONTEXT; raises SyscallFailed(EINVAL): no such register, reserved bits, or after START."""
        call = "SET_BOOT_CONTEXT"
        self._in_use(call)
        asked = VmBootContext(reg, reserved, value)
        reg, reserved, value = asked.reg, asked.reserved, asked.value
        which, index = reg >> 8 & 0xFF, reg & 0xFF
        if reserved or reg >> 16 or which not in tuple(RegisterSet) or index >= REGISTERS[RegisterSet(which)]:
            raise SyscallFailed(EINVAL, call, f"register {reg:#x}, reserved word {reserved:#x}")
        if self.status != VmState.NO_STATE:
            raise SyscallFailed(EINVAL, call, f"the VM is in state {self.status.name}")
        self.boot[which, index] = value

    def start(self) -> None:
        """START: build and run the VM (start.py); raises SyscallFailed as uapi/gunyah.py says."""
        self._in_use("START")
        start.start(self)

    # -- functions -----------------------------------------------------------------------------------------------

    def add_vcpu(self, index: int) -> VcpuFile:
        """ADD_FUNCTION of a vCPU."""
        vcpu = self.add_function(FnType.VCPU, bytes(FnVcpuArg(index)))
        assert isinstance(vcpu, VcpuFile)
        return vcpu

    def add_function(self, kind: int, arg: bytes) -> VcpuFile | None:
        """ADD_FUNCTION; the file of a vCPU, None for others. Raises SyscallFailed: EINVAL, ENOENT, EEXIST, ENOMEM."""
        call = "ADD_FUNCTION"
        self._in_use(call)
        key = self._key(call, kind, arg)
        if self.machine.slab_fails():
            raise SyscallFailed(ENOMEM, call)
        if kind == FnType.VCPU:
            made: VcpuFile | Irqfd | Ioeventfd = VcpuFile(self, key[1])
        elif kind == FnType.IRQFD:
            made = Irqfd(FnIrqfdArg.from_buffer_copy(arg))
        else:
            made = Ioeventfd(FnIoeventfdArg.from_buffer_copy(arg))
        if key in self.functions:
            raise SyscallFailed(EEXIST, call, f"{FnType(kind).name} {key[1]} exists")
        self.functions[key] = made
        if isinstance(made, VcpuFile):
            self.references += 1
            start.populate(self, made)
            return made
        return None

    # What tells functions of a type apart.
    @staticmethod
    def _key(call: str, kind: int, arg: bytes) -> tuple[int, Any]:
        if len(arg) > FN_MAX_ARG_SIZE:
            raise SyscallFailed(EINVAL, call, f"an argument of {len(arg)} bytes")
        arguments = {FnType.VCPU: FnVcpuArg, FnType.IRQFD: FnIrqfdArg, FnType.IOEVENTFD: FnIoeventfdArg}
        if kind not in tuple(FnType):
            raise SyscallFailed(ENOENT, call, f"function {kind}")
        if len(arg) != ctypes.sizeof(arguments[FnType(kind)]):
            raise SyscallFailed(EINVAL, call, f"an argument of {len(arg)} bytes")
        if kind == FnType.VCPU:
            return kind, FnVcpuArg.from_buffer_copy(arg).id
        if kind == FnType.IRQFD:
            return kind, FnIrqfdArg.from_buffer_copy(arg).label
        event = FnIoeventfdArg.from_buffer_copy(arg)
        return kind, (event.addr, event.len, event.datamatch if event.flags else None)

    def remove_function(self, kind: int, arg: bytes) -> None:
        """REMOVE_FUNCTION; a vCPU that is removed runs no more. Raises SyscallFailed: EINVAL, ENOENT."""
        call = "REMOVE_FUNCTION"
        self._in_use(call)
        if len(arg) > FN_MAX_ARG_SIZE:
            raise SyscallFailed(EINVAL, call, f"an argument of {len(arg)} bytes")
        try:
            gone = self.functions.pop(self._key(call, kind, arg))
        except (KeyError, SyscallFailed):
            raise SyscallFailed(ENOENT, call, "no such function") from None
        gone.removed = True

    # -- references ------------------------------------------------------------------------------------------------

    @override
    def _release(self) -> None:
        self.put()

    def put(self) -> None:
        """A descriptor goes; with the last one the VM."""
        self.references -= 1
        if not self.references:
            teardown.teardown(self)

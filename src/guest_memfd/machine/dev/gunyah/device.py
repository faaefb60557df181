"""/dev/gunyah: new VMs and new memory files (gunyah_dev_ioctl(), series v17, patches 08, 10 and 23)."""

from __future__ import annotations

from errno import EINVAL, ENOMEM
from typing import TYPE_CHECKING

from guest_memfd.compat import override
from guest_memfd.designs import Design
from guest_memfd.designs.gunyah_v17 import GunyahV17
from guest_memfd.errors import BadInput, SyscallFailed
from guest_memfd.machine.dev.file import Serialised
from guest_memfd.machine.dev.gunyah.lent import LentFile
from guest_memfd.machine.dev.gunyah.memory import GunyahMemoryFile
from guest_memfd.machine.dev.gunyah.posted import PostedDriver, PostedFile
from guest_memfd.machine.dev.gunyah.vm import VmFile
from guest_memfd.uapi.gunyah import CreateMemArgs, GunyahMemFlag
from guest_memfd.words.units import PAGE

if TYPE_CHECKING:
    from guest_memfd.machine.board.board import Board


class GunyahDeviceFile(Serialised):
    """uapi/gunyah.py GunyahDevice; *design* serves its files. Raises BadInput for one that cannot convert in place."""

    def __init__(self, machine: Board, design: type[Design]) -> None:
        if not design.converts and not issubclass(design, GunyahV17):
            raise BadInput(f"design {design.name!r} has no conversion, so it cannot lend and take back for /dev/gunyah")
        self.machine, self.design = machine, design
        self._lock = machine.lock

    @property
    def posted(self) -> bool:
        """Whether the driver is the posted one, mistakes and all."""
        return issubclass(self.design, GunyahV17)

    def create_vm(self, arg: int = 0) -> VmFile:
        """CREATE_VM; raises SyscallFailed: EINVAL unless *arg* is 0, ENOMEM."""
        self._in_use("CREATE_VM")
        if arg:
            raise SyscallFailed(EINVAL, "CREATE_VM", f"argument {arg}")
        if self.machine.slab_fails():
            raise SyscallFailed(ENOMEM, "CREATE_VM")
        return VmFile(self)

    def create_guest_mem(self, size: int, flags: int = 0) -> GunyahMemoryFile:
        """CREATE_GUEST_MEM of *size* bytes; raises SyscallFailed: EINVAL no whole pages or unknown flags."""
        self._in_use("CREATE_GUEST_MEM")
        asked = CreateMemArgs(flags, size)
        flags, size = asked.flags, asked.size
        if size % PAGE or size >> 63:
            raise SyscallFailed(EINVAL, "CREATE_GUEST_MEM", f"{size:#x} bytes are no whole pages")
        if flags & ~int(GunyahMemFlag.CLOEXEC | GunyahMemFlag.ALLOW_HUGEPAGE):
            raise SyscallFailed(EINVAL, "CREATE_GUEST_MEM", f"flags {flags:#x}")
        ops, pages = self.machine.hypervisor.ops(), max(size // PAGE, 1)
        if self.posted:
            return PostedFile(self.machine, PostedDriver(ops, pages), size, GunyahMemFlag(flags))
        return LentFile(self.machine, self.design(ops, pages), size, GunyahMemFlag(flags))

    @override
    def _release(self) -> None:
        pass

"""A VM of /dev/gunyah with a guest that does what a test asks: every load and store below is an instruction of that guest.

The guest fetches its orders from a device, word by word, and writes its results there: VCPU_RUN comes back for each.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from judged import judged

from guest_memfd.asm.arm64.asm import assemble
from guest_memfd.machine.boot import Config, Machine
from guest_memfd.uapi.gunyah import Exit, MapFlag, MmioExit, RegisterSet, ResumeAction, boot_register

PAGE = 4096
RAM, RAM_PAGES, DTB_PAGE = 0x8000_0000, 16, 8
ORDERS = 0x0900_0000
RESULT = ORDERS + 24
LEND, SHARE, DEFAULT = MapFlag.FORCE_LEND, MapFlag.FORCE_SHARE, MapFlag.DEFAULT_ACCESS
RW, RWX = MapFlag.ALLOW_READ | MapFlag.ALLOW_WRITE, MapFlag.ALLOW_RWX
UNLOCK, SANITISE = 1, 2

READ, WRITE, MODIFY, SPIN, OFF, CALL = range(1, 7)

MONITOR = """
_start:
        movz    x20, #0x0900, lsl #16
next:
        ldr     x10, [x20]
        ldr     x11, [x20, #8]
        ldr     x12, [x20, #16]
        cmp     x10, #1
        b.eq    read
        cmp     x10, #2
        b.eq    write
        cmp     x10, #3
        b.eq    modify
        cmp     x10, #4
        b.eq    spin
        cmp     x10, #6
        b.eq    call
        movz    x0, #0x0008
        movk    x0, #0x8400, lsl #16
        hvc     #0
read:
        ldr     x13, [x11]
        b       tell
write:
        str     x12, [x11]
        mov     x13, #0
        b       tell
modify:
        movz    x0, #0x8069
        movk    x0, #0xc600, lsl #16
        mov     x1, #0
        and     x2, x11, #-4096
        and     x4, x11, #0xfff
        mov     x3, x12
        hvc     #0
        mov     x13, x0
        b       tell
spin:
        str     x12, [x11]
        add     x12, x12, #1
        b       spin
call:
        blr     x11
        mov     x13, x0
tell:
        str     x13, [x20, #24]
        b       next
"""


class Scene:
    """A machine, its /dev/gunyah with *design*, and a VM with lent RAM, a device tree and one vCPU.

    The laws are judged all the time; under the library `close` fails if one has broken.
    """

    def __init__(self, design: str, *, ram_access: MapFlag = LEND, ram_base: int = RAM, **config: Any) -> None:
        self.design = design
        self.machine = Machine("gunyah", Config(**{"ram": 64 << 20, "slice": 2.0, **config}))
        self.watch = judged(self.machine)
        self.known: set[str] = set()                    # laws that the library is known to break here
        self.device = self.machine.open("/dev/gunyah", design)
        self.vm = self.device.create_vm()
        self.ram = self.device.create_guest_mem(RAM_PAGES * PAGE)
        self.ram_base = ram_base
        with self.ram.mmap() as mapping:
            mapping.write(0, assemble(MONITOR, ram_base).data)
            mapping.write(DTB_PAGE * PAGE, b"\xd0\x0d\xfe\xed")
        self.vm.map_mem(self.ram, ram_base, 0, RAM_PAGES * PAGE, ram_access | RWX)
        self.vm.set_dtb_config(ram_base + DTB_PAGE * PAGE, PAGE)
        self.vm.set_boot_context(boot_register(RegisterSet.PC, 0), ram_base)
        self.vcpu = self.vm.add_vcpu(0)
        self.owned: list[Any] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """The VMM ends: every descriptor and mapping goes, in the order they came."""
        for owner in (*self.owned, self.vcpu, self.vm, self.ram, self.device):
            owner.close()
        assert self.design != "library" or set(self.watch.broken) == self.known

    def memory(self, size: int, flags: int = 0) -> Any:
        """A guest memory file, closed at the end."""
        file = self.device.create_guest_mem(size, flags)
        self.owned.append(file)
        return file

    def bound(self, where: int, size: int, flags: int, file_flags: int = 0) -> Any:
        """A file, all of it bound at *where*."""
        file = self.memory(size, file_flags)
        self.vm.map_mem(file, where, 0, size, flags)
        return file

    # -- the guest ---------------------------------------------------------------------------------------------------

    def order(self, op: int, first: int = 0, second: int = 0, run: Callable[[], Exit] | None = None) -> int | Exit:
        """One order: its result, or the exit that came instead; the guest is still there then."""
        while True:
            got = (run or self.vcpu.run)()
            if not isinstance(got, MmioExit) or not ORDERS <= got.phys_addr <= RESULT:
                return got
            self.vcpu.page.mmio.resume_action = ResumeAction.HANDLED
            if got.is_write:
                return int.from_bytes(got.data, "little")
            word = (op, first, second)[(got.phys_addr - ORDERS) // 8]
            self.vcpu.page.data = word.to_bytes(8, "little")

    def read(self, ipa: int) -> int | Exit:
        """The guest loads a doubleword."""
        return self.order(READ, ipa)

    def write(self, ipa: int, value: int) -> int | Exit:
        """The guest stores one; 0."""
        return self.order(WRITE, ipa, value)

    def unlock(self, ipa: int, size: int, flags: int = UNLOCK) -> int | Exit:
        """The guest gives pages up: the hypervisor's error, 0 for none."""
        return self.order(MODIFY, ipa | flags, size)


def peek(file: Any, at: int = 0) -> int:
    """The VMM maps the file, loads a doubleword and unmaps it."""
    with file.mmap() as mapping:
        return int.from_bytes(mapping.read(at, 8), "little")


def poke(file: Any, value: int, at: int = 0) -> None:
    """The VMM maps the file, stores a doubleword and unmaps it."""
    with file.mmap() as mapping:
        mapping.write(at, value.to_bytes(8, "little"))

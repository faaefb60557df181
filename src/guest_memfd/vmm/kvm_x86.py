"""A guest by way of the kernel's /dev/kvm on x86. All its memory is guest_memfd, mapped here as well.

Each slot names the mapping as its userspace_addr, so that whatever KVM reads by itself (instructions that it emulates, all
of a guest that it does not run natively) is the same memory.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping as Map
from contextlib import ExitStack
from errno import EINVAL

from guest_memfd.errors import BadInput, Signalled, SyscallFailed
from guest_memfd.guests import CONSOLE, CONSOLE_PORT, CONTROL, CONTROL_PORT, SHARED_BASE
from guest_memfd.guests.bootinfo import BootHypervisor
from guest_memfd.guests.loader import GuestImage
from guest_memfd.linux.guest_memfd import GuestMemfd
from guest_memfd.linux.guest_x86 import IdentityMap, x86_vcpu
from guest_memfd.linux.mapping import LinuxMapping
from guest_memfd.linux.system import System
from guest_memfd.uapi import kvm_run
from guest_memfd.uapi.kvm import SHARED, MemFlag
from guest_memfd.vmm.devices import Balloon, Console, MmioDevice, Nobody
from guest_memfd.vmm.layout import Layout
from guest_memfd.vmm.loop import Debugger, LoopEnded
from guest_memfd.words.units import PAGE, Ipa

_MEMORY, _WINDOW, _TABLES = 0, 1, 2
"""Slots."""
_TABLES_BASE = Ipa(0x1000_0000)
_GIB, _MOST_GIB = 1 << 30, 64
"""A vCPU whose CPUID was never set has 36 bits of address: cpuid_query_maxphyaddr() in arch/x86/kvm/cpuid.c."""
_REAL_MODE_END = 1 << 20
_CODE_BYTES = 15
"""An instruction is no longer."""


class X86Guest:
    """*image* in a VM of *system*, up to its first instruction; leaving *stack* gives everything back.

    *log* is told in words of exits and of pages that come back. Raises SyscallFailed, BadInput.
    """

    aborts = 0
    """x86 has nothing that could be delivered."""

    def __init__(
        self, system: System, layout: Layout, image: GuestImage, real_mode: bool, console: Console, stack: ExitStack,
        log: Callable[[str], None],
    ) -> None:
        self.layout, self.console, self.log = layout, console, log
        self.debugger: Debugger = self
        self.exits = 0
        balloon = Balloon(self._take)
        self.devices: Map[int, MmioDevice] = {CONSOLE: console, CONTROL + 8: balloon}
        self.ports: Map[int, MmioDevice] = {CONSOLE_PORT: console, CONTROL_PORT: balloon}
        boot_info, gib = fit(layout, image, real_mode)
        self.vm = stack.enter_context(system.create_vm())
        self.memory, self.mapping = self._slot(stack, _MEMORY, layout.base, layout.private)
        self.shared = self._slot(stack, _WINDOW, SHARED_BASE, layout.shared)[1] if layout.shared else None
        for offset, data in layout.contents(image, BootHypervisor.KVM):
            self.mapping.write(offset, data)
        self.vcpu = stack.enter_context(x86_vcpu(self.vm))
        if real_mode:
            # As a segment, in units of 16 bytes: an address in one register would reach 64 KiB only.
            self.vcpu.enter_real_mode(image.entry, boot_info >> 4, rsp=PAGE)
            return
        stack.enter_context(IdentityMap(self.vm, _TABLES, _TABLES_BASE, gib))
        # As if it had been called: a function compiled for the System V ABI finds its stack where it expects it.
        self.vcpu.enter_user_mode(_TABLES_BASE, image.entry, rdi=boot_info, rsp=boot_info + PAGE - 8)

    def _slot(self, stack: ExitStack, number: int, base: Ipa, size: int) -> tuple[GuestMemfd, LinuxMapping]:
        file = stack.enter_context(self.vm.create_guest_memfd(size, SHARED))
        mapping = stack.enter_context(file.mmap())
        self.vm.set_user_memory_region2(number, MemFlag.GUEST_MEMFD, base, size, guest_memfd=file,
                                        userspace_addr=mapping.address)
        self.log(f"slot {number}: {base:#x}, {size:#x} bytes of guest_memfd, mapped")
        return file, mapping

    def step(self, seconds: float) -> LoopEnded | None:
        """KVM_RUN once, and whatever the guest wants of us."""
        out = self.vcpu.run(seconds)
        self.exits += 1
        match out:
            case kvm_run.Mmio(where, _, True) if where == CONTROL:
                self.log("exit MMIO: power off")
                return LoopEnded("off")
            case kvm_run.Halt():
                self.log("exit HLT")
                return LoopEnded("off")
            case kvm_run.Mmio(where, size, is_write, data):
                self._access(self.devices.get(where), f"MMIO at {where:#x}", size, 1, data if is_write else None)
            case kvm_run.Io(port, size, times, is_write, data):
                self._access(self.ports.get(port), f"IO at port {port:#x}", size, times, data if is_write else None)
            # The time of this look is over, or a signal came. The loop asks again while there is time.
            case kvm_run.Intr():
                pass
            case _:
                self.log(f"exit {out}")
                return LoopEnded("crash", f"{_words(out)}{self._code()}", self.registers())
        return None

    # *data*: what is stored, all of it (REP OUTS stores more than once); None for a load.
    def _access(self, device: MmioDevice | None, words: str, size: int, times: int, data: bytes | None) -> None:
        if device is None:
            device = Nobody()
            self.log(f"exit {words}, {'load' if data is None else 'store'}: nothing there")
        if data is None:
            self.vcpu.answer(device.get()[:size] * times)
            return
        for at in range(0, size * times, size):
            device.put(data[at:at + size])

    # The guest can do without a page: its frame goes back to the host, and the next touch finds zeros. 0 or an errno.
    def _take(self, gpa: Ipa) -> int:
        offset = gpa - self.layout.base
        if gpa % PAGE or not 0 <= offset < self.layout.private:
            self.log(f"the guest gives up {gpa:#x}, which is no page of its memory")
            return EINVAL
        self.memory.punch_hole(offset, PAGE)
        # Read back at once: a punch that did not reach the mapping would be a
        # bug of the kernel's, and this is where it shows.
        reads = "something else" if any(self.mapping.read(offset, PAGE)) else "zeros"
        self.log(f"the guest gives up {gpa:#x}: punched; the host's mapping reads {reads}")
        return 0

    # -- looking at it -------------------------------------------------------------------------------------------

    def pc(self) -> int:
        """Where it is: rip, from the segment's base on."""
        return int(self.vcpu.get_sregs().cs.base + self.vcpu.get_regs().rip)

    # What lies at pc, where that is memory of the guest's: most often the instruction that could not be executed.
    def _code(self) -> str:
        pc = self.pc()
        offset = pc - self.layout.base
        if not 0 <= offset < self.layout.private:
            return ""
        try:
            code = self.mapping.read(offset, min(_CODE_BYTES, self.layout.private - offset))
        except (Signalled, SyscallFailed):
            return ""
        return f"; code at {pc:#x}: {code.hex(' ')}"

    def registers(self) -> Map[str, int]:
        """General registers, segments' selectors, and what the last exception left."""
        regs, sregs = self.vcpu.get_regs(), self.vcpu.get_sregs()
        return {name: int(getattr(regs, name)) for name, *_ in regs._fields_} | {
            name: int(getattr(sregs, name).selector) for name in ("cs", "ds", "es", "ss")} | {
            name: int(getattr(sregs, name)) for name in ("cr0", "cr2", "cr3", "cr4", "efer")}

    def window(self) -> bytes | None:
        """The shared window's beginning as the host reads it; None without one."""
        return None if self.shared is None else self.shared.read(0, 64)


def fit(layout: Layout, image: GuestImage, real_mode: bool) -> tuple[int, int]:
    """Where the boot info of *image* goes, and how many GiB of addresses are needed; raises BadInput if there is no room."""
    boot_info, gib = layout.boot_info(image), -(-layout.end // _GIB)
    if real_mode and boot_info >= _REAL_MODE_END:
        raise BadInput(f"{image.name}: its end, {image.end:#x}, is beyond what real mode reaches, {_REAL_MODE_END:#x}")
    if gib > _MOST_GIB:
        most = (_MOST_GIB * _GIB - layout.base) // _GIB
        raise BadInput(f"--memory {layout.private:#x}: it begins at {layout.base:#x} and would end at {layout.end:#x}, "
                       f"beyond the {_MOST_GIB} GiB that this vCPU can address; {most}G is the most")
    return boot_info, gib


def _words(out: kvm_run.Exit) -> str:
    match out:
        case kvm_run.MemoryFault(_, gpa, _, errno):
            return str(SyscallFailed(errno, "KVM_RUN", f"the guest's page at {gpa:#x} is gone"))
        case kvm_run.Shutdown():
            return "a triple fault: an exception without a handler"
        case kvm_run.KvmInternalError(why):
            return f"KVM cannot go on with an instruction: {why}"
        case kvm_run.FailEntry(reason):
            return f"the processor refuses the vCPU's state: {reason:#x}"
        case kvm_run.Unknown(reason, errno):
            return f"KVM_RUN ends with reason {reason}, errno {errno}"
        case _:
            return f"an exit that no one here expects: {out}"

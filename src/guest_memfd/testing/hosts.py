"""The hosts a VMM can be tested on. They have one interface, and a reason in words for whatever a host cannot do.

What comes from `open` keeps the promises of uapi on every host. A guest's code cannot be the same everywhere, so a
test gives it for each architecture, and `enter` does what an architecture wants done before its first instruction.
"""

from __future__ import annotations

import os
import platform
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from errno import ENOTTY
from pathlib import Path
from typing import Any

from guest_memfd.compat import override
from guest_memfd.errors import BadInput, SyscallFailed
from guest_memfd.linux import fd
from guest_memfd.uapi import kvm as uapi
from guest_memfd.uapi import kvm_arm64
from guest_memfd.uapi.gunyah import PATH as GUNYAH
from guest_memfd.uapi.kvm import KvmVcpu, KvmVm, MemoryAttributes2
from guest_memfd.words.units import Ipa

KVM = "/dev/kvm"
NEEDS = {
    "vcpu": "vCPUs run code that `assemble` makes",
    "mmap": "GUEST_MEMFD_FLAG_MMAP and INIT_SHARED: a file that the host can map, and a guest can run in",
    "convert": "KVM_SET_MEMORY_ATTRIBUTES2: a page of a plain VM's file changes between private and shared",
    "protected": "VMs of the type for protected guests, whose files convert, too",
    "fail": "`machine.kernel_pages.fail_at` and its like: memory runs out where a test wants it to",
}
"""What a test may need, beyond a device to open."""

PAGE_TABLES = Ipa(0x1000_0000)
"""Guest address of the page tables that `GmemHost.enter` needs on x86: six pages."""

_GIB_MAPPED = 4
_MOST = 5
"""Lines about what is left."""
_ARGUMENTS = ("rdi", "rsi", "rdx", "rcx", "r8", "r9")
_GUESTS_OF = ("x86_64", "arm64")
_NO_GUESTS = "under Gunyah a guest's registers are set with GUNYAH_VM_SET_BOOT_CONTEXT"


def _quiet(_line: str) -> None:
    pass


class GmemHost(ABC):
    """A host called *name*, with *device* to open, whose guests run *architecture*'s code (as `guests.target` calls it)."""

    name: str
    device: str
    architecture: str

    def __init__(self) -> None:
        self._stack = ExitStack()

    @abstractmethod
    def open(self) -> Any:
        """The device: a `KvmSystem`, or a `GunyahDevice`. It is closed at the end. Raises HostUnavailable, SyscallFailed."""

    @abstractmethod
    def lacks(self, need: str) -> str:
        """Why it does not have *need*, one of `NEEDS`; "" if it has it. Raises HostUnavailable."""

    @abstractmethod
    def left(self) -> list[str]:
        """What is still there of all that was opened, in words; laws that were broken on the way."""

    def assemble(self, sources: Mapping[str, str], at: int) -> bytes:
        """The code of this host's architecture among *sources*, for guest address *at*; GNU as's syntax, Intel's on x86.

        Raises BadInput.
        """
        if self.architecture not in sources:
            raise BadInput(f"{self.name} runs {self.architecture}; there is code for {', '.join(sources) or 'nothing'}")
        from guest_memfd.guests.target import ARM64, X86_64

        target = {each.architecture: each for each in (ARM64, X86_64)}[self.architecture]
        return target.assemble(sources[self.architecture], at, self.name).data

    def enter(self, vm: KvmVm, vcpu: KvmVcpu, pc: int, *arguments: int) -> None:
        """The next run of *vcpu* starts at *pc* with *arguments* in x0, x1, ... or rdi, rsi, rdx, rcx, r8, r9.

        arm64: EL1, MMU off. x86: 64-bit mode at CPL 3 without a stack, the first 4 GiB mapped to themselves; the tables lie
        in the last memory slot, at PAGE_TABLES. Raises BadInput, SyscallFailed.
        """
        raise BadInput(_NO_GUESTS)

    def end(self) -> None:
        """Close what `open` and `enter` opened."""
        self._stack.close()


class Emulated(GmemHost):
    """An emulated arm64 machine under *hypervisor*, whose files *design* serves; all laws are judged all the way.

    `machine`: to look at it, and to make its memory run out. *ram*: bytes; *more*: of machine/board/config.py Config.
    """

    architecture = "arm64"

    def __init__(self, hypervisor: str, design: str = "library", ram: int = 64 << 20, **more: Any) -> None:
        super().__init__()
        from guest_memfd.machine.boot import Config, Machine
        from guest_memfd.vmm.ghosts import ProgramTracer
        from guest_memfd.vmm.watch import Watch

        self.name, self.design = f"emulated:arm64/{hypervisor}", design
        self.device = GUNYAH if hypervisor == "gunyah" else KVM
        self.machine = Machine(hypervisor, Config(ram=ram, **more))
        self.machine.tracer = ProgramTracer(self.machine)
        self._watch = Watch(0, _quiet)
        self.machine.judge = self._watch

    @override
    def open(self) -> Any:
        """The emulated /dev/kvm or /dev/gunyah; closed at the end. Raises SyscallFailed."""
        return self._stack.enter_context(self.machine.open(self.device, self.design))

    @override
    def lacks(self, need: str) -> str:
        """Why the emulated machine does not have *need*; "" if it has it."""
        if self.device == GUNYAH and need != "fail":
            return _NO_GUESTS if need == "vcpu" else f"that is KVM's, and {self.name} has {GUNYAH}"
        if need == "convert" and self.name.endswith("pkvm"):
            return "under pKVM only a protected VM has private memory"
        return f"{self.name} is not in protected mode" if need == "protected" and not self.name.endswith("pkvm") else ""

    @override
    def enter(self, vm: KvmVm, vcpu: KvmVcpu, pc: int, *arguments: int) -> None:
        """Set the argument registers and PC; the guest starts at EL1 with its MMU off. Raises BadInput, SyscallFailed."""
        if self.device == GUNYAH:
            raise BadInput(_NO_GUESTS)
        _enter_el1(vcpu, pc, arguments)

    @override
    def left(self) -> list[str]:
        """As every host's; the audit of the machine, and the laws."""
        broken = [f"law {each.law} is broken: {each.evidence} (in {each.where})" for each in self._watch.broken.values()]
        if self.machine.dead is not None:
            return [*broken, self.machine.dead.text.splitlines()[0]]
        # Whatever a VM keeps is lost with it: first the words that are not about addresses.
        lost = sorted(self.machine.audit(), key=lambda line: "0x" in line.partition(" is ")[0])
        return broken + lost[:_MOST] + ([f"and {len(lost) - _MOST} more"] if len(lost) > _MOST else [])

    @override
    def __repr__(self) -> str:
        return f"<Emulated {self.name}, design {self.design}>"


# After a reset a vCPU is at EL1, and its MMU is off.
def _enter_el1(vcpu: KvmVcpu, pc: int, arguments: tuple[int, ...]) -> None:
    if len(arguments) > len(kvm_arm64.X):
        raise BadInput(f"{len(arguments)} arguments; there are registers for {len(kvm_arm64.X)}")
    for number, value in enumerate(arguments):
        vcpu.set_one_reg(kvm_arm64.X[number], value)
    vcpu.set_one_reg(kvm_arm64.PC, pc)


class Linux(GmemHost):
    """The kernel of this machine, by way of its *device*."""

    architecture = {"aarch64": "arm64"}.get(platform.machine(), platform.machine())

    def __init__(self) -> None:
        super().__init__()
        self._dropped: list[str] = []
        self._before = self._open_files()
        fd.dropped = self._dropped.append
        self._stack.callback(setattr, fd, "dropped", None)

    @override
    def left(self) -> list[str]:
        """As every host's; descriptors and mappings of this process, and what only the garbage collector closed."""
        opened = [f"{name} is still open" for name in (self._open_files() - self._before).elements()]
        return opened + [f"{name} was never closed" for name in self._dropped]

    # Descriptors of devices, VMs and their files, and mappings of them: how many there are of each.
    @staticmethod
    def _open_files() -> Counter[str]:
        names = []
        for number in os.listdir("/proc/self/fd"):
            with suppress(FileNotFoundError):           # that of the folder itself
                names.append(os.readlink(f"/proc/self/fd/{number}"))
        maps = [line.split(maxsplit=5)[5:] for line in Path("/proc/self/maps").read_text().splitlines()]
        names += [f"a mapping of {path[0]}" for path in maps if path]
        return Counter(name for name in names if any(kind in name for kind in ("kvm", "gunyah", "secretmem")))


class LinuxKvm(Linux):
    """This kernel's /dev/kvm. On x86 guests run at CPL 3 on page tables of ours, on arm64 at EL1."""

    name, device = "kvm", KVM

    def __init__(self) -> None:
        super().__init__()
        self._maps: dict[KvmVm, Any] = {}

    @override
    def open(self) -> Any:
        """/dev/kvm; closed at the end. Raises HostUnavailable."""
        from guest_memfd.linux.system import System

        return self._stack.enter_context(System())

    @override
    def lacks(self, need: str) -> str:
        """As every host's; the kernel is asked."""
        if need == "fail":
            return "a real kernel does not run out of memory when it is told to"
        if need == "vcpu":
            known = f"how to start a guest is known for {' and '.join(_GUESTS_OF)}, not for {self.architecture}"
            return "" if self.architecture in _GUESTS_OF else known
        from guest_memfd.linux.system import System

        with System() as system:
            if need == "mmap":
                return system.lacks_shared()
            if need == "convert":
                return self._converts(system)
        return "protected guests are arm64's, and this host starts none"

    # The number of the capability differs from tree to tree; the ioctl's does not.
    @staticmethod
    def _converts(system: uapi.KvmSystem) -> str:
        try:
            with system.create_vm() as vm, vm.create_guest_memfd(4096) as file:
                file.set_memory_attributes2(MemoryAttributes2(0, 0, 0))
        except SyscallFailed as error:
            return f"conversion in place is not in this kernel: {error}" if error.errno == ENOTTY else ""
        return ""

    @override
    def enter(self, vm: KvmVm, vcpu: KvmVcpu, pc: int, *arguments: int) -> None:
        """As every host's; on x86 the identity map is built once a VM. Raises BadInput, SyscallFailed."""
        if self.architecture == "arm64":
            _enter_el1(vcpu, pc, arguments)
            return
        from guest_memfd.linux.guest_x86 import IdentityMap
        from guest_memfd.linux.vcpu_x86 import X86Vcpu
        from guest_memfd.linux.vm import LinuxVm

        if not (isinstance(vm, LinuxVm) and isinstance(vcpu, X86Vcpu)):
            raise BadInput(self.lacks("vcpu") or f"{vm!r} and {vcpu!r} are not this host's")
        if len(arguments) > len(_ARGUMENTS):
            raise BadInput(f"{len(arguments)} arguments; there are registers for {len(_ARGUMENTS)}")
        if vm not in self._maps:
            # The last slot: tests number theirs from 0.
            last = vm.check_extension(uapi.Cap.NR_MEMSLOTS) - 1
            self._maps[vm] = self._stack.enter_context(IdentityMap(vm, last, PAGE_TABLES, _GIB_MAPPED))
        vcpu.enter_user_mode(PAGE_TABLES, pc, **dict(zip(_ARGUMENTS, arguments, strict=False)))


class LinuxGunyah(Linux):
    """This kernel's /dev/gunyah, which lends memory but runs no guests here."""

    name, device = "gunyah", GUNYAH

    @override
    def open(self) -> Any:
        """/dev/gunyah; closed at the end. Raises HostUnavailable."""
        from guest_memfd.linux.gunyah import LinuxGunyahDevice

        return self._stack.enter_context(LinuxGunyahDevice())

    @override
    def lacks(self, need: str) -> str:
        """Why /dev/gunyah does not have *need*; "" if it has it. Guests, and what is KVM's, it has not."""
        return _NO_GUESTS if need == "vcpu" else f"that is KVM's, and {self.name} has {GUNYAH}"

"""What a hypervisor's driver and its EL2 are to the machine, and single accesses of a guest.

A guest access is an instruction on a CPU, translated by that CPU's TLB and the VM's stage 2.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from guest_memfd.core.hypervisor import Hypervisor
from guest_memfd.machine.hw.arm64 import cpu as c
from guest_memfd.machine.hw.arm64.fault import Fault
from guest_memfd.machine.hw.arm64.mmu import Mmu
from guest_memfd.machine.hw.arm64.permission import Access
from guest_memfd.machine.hw.arm64.registers import Tcr
from guest_memfd.machine.hw.arm64.tables import PageTable
from guest_memfd.machine.hw.arm64.walk import Stage1, Stage2
from guest_memfd.machine.hypcalls.hardware import Hardware
from guest_memfd.machine.hypcalls.vm import Vm
from guest_memfd.words.primitives import Folio
from guest_memfd.words.units import PAGE, Gfn, Ipa, Pa, Va, gpa_to_gfn, pfn_to_pa

MMU_OFF = Stage1(Tcr(), 0, 0, enabled=False)
"""A guest that has not turned its MMU on: virtual addresses are IPAs."""

# ldr x1, [x0]; str x1, [x0]
_CODE = (0xF9400001).to_bytes(4, "little") + (0xF9000001).to_bytes(4, "little")


NOWHERE = Pa(0)
"""Where an access has arrived that did not arrive."""


@dataclass(frozen=True)
class GuestRan:
    """A guest access: where it arrived, or what became of it (``fault``, ``poisoned``)."""

    pa: Pa = NOWHERE
    exit: str | None = None


class Accessor:
    """A vCPU that executes one load or store after the other.

    Its instructions come from a ROM that is not part of guest memory: no law is about them.
    """

    def __init__(self, hardware: Hardware) -> None:
        self._rom = hardware.kernel_pages.alloc()
        hardware.ram.write(self._rom, _CODE)
        self.mmus = [Mmu(hardware.ram, tlb) for tlb in hardware.tlbs]
        self._core = c.Cpu(hardware.ram, self._translate)
        self._mmu, self._stage2, self._reached = self.mmus[0], None, NOWHERE

    _stage2: Stage2 | None

    def _translate(self, va: Va, access: Access, el: int) -> tuple[Pa, int, bool, bool, bool]:
        # Instructions come from outside of the guest's memory, so that an access has exactly one effect: its own.
        if access == "x":
            return self._rom, PAGE, True, False, True
        found = self._mmu.translate(va, access, el, MMU_OFF, self._stage2)
        self._reached = found.pa
        return found.pa, found.size, found.readable, found.writable, False

    def access(self, cpu: int, stage2: Stage2, ipa: Ipa, write: bool, token: bytes) -> Pa | Fault:
        """One access of the guest on CPU number *cpu*: the physical address reached, or the fault EL2 takes."""
        core = self._core
        self._mmu, self._stage2 = self.mmus[cpu], stage2
        core.set_x(0, ipa)
        core.set_x(1, int.from_bytes(token, "little"))
        core.pc = 4 if write else 0
        # One instruction is one access. Anything else that stops the CPU is a mistake of ours.
        stop = core.run(instructions=1)
        if isinstance(stop, c.CpuAbort):
            return stop.fault
        if not isinstance(stop, c.Counted):
            raise AssertionError(f"a single guest access stops with {stop!r}")
        return self._reached


class Driver(ABC):
    """One hypervisor: its EL2, and the Linux side of its hypercalls.

    rules: (hypercall, -errno) that are refusals by rule and not failures. forgets: a guest that gives a page up no longer
    relies on what it holds. cpu_of_guest: on which CPU the guest's next access runs, by its VM and the IPA.
    """

    el2: Any
    host_vmid: int = 0
    rules: frozenset[tuple[str, int]] = frozenset()
    forgets = False

    def __init__(self, hardware: Hardware, hypervisor: Hypervisor) -> None:
        self.hardware, self.hypervisor = hardware, hypervisor
        self.cpu_of_guest: Callable[[Vm, Ipa], int] = lambda _vm, _ipa: 0
        self._accessor: Accessor | None = None
        self.sanitised = False
        """Whether the last hypercall zeroed what it took back (`may_sanitise`)."""
        self.refuse_next: int | None = None             # injected: what the next hypercall returns, having done nothing
        self.stuck: set[Pa] = set()                     # injected: pages that EL2 will never give back

    # -- hypercalls ----------------------------------------------------------------------------------------------

    def hypercall(self, vm: Vm, name: str, args: tuple[Any, ...]) -> int:
        """Issue hypercall *name*: 0 or -errno."""
        self.sanitised = False
        # Before an injected failure: what is refused for good is refused whatever else goes wrong.
        if self.keeps(name, args):
            return self.hypervisor.final[name]
        if self.refuse_next is not None:
            refused, self.refuse_next = self.refuse_next, None
            return refused
        return self.call(vm, name, args)

    def call(self, vm: Vm, name: str, args: tuple[Any, ...]) -> int:
        """What *name* does when nothing is injected: the method of that name, with an underscore."""
        code = getattr(self, f"_{name}", None)
        if code is None:
            raise LookupError(f"{type(self).__name__} has no hypercall {name!r}")
        return int(code(vm, *args))

    def keeps(self, name: str, args: tuple[Any, ...]) -> bool:
        """Whether EL2 refuses *name* because it will never give that page back."""
        folios = [arg for arg in args if isinstance(arg, Folio)] if name in self.hypervisor.final else []
        return any(0 <= pa - pfn_to_pa(folio.pfn) < folio.nr * PAGE for folio in folios for pa in self.stuck)

    def force_reclaim(self, pa: Pa) -> int:
        """Take a page from its guest because the host has touched it: 0 or -errno."""
        return -1

    # -- records and tables --------------------------------------------------------------------------------------

    @abstractmethod
    def owner(self, pa: Pa) -> str:
        """host, guest, shared or borrowed: EL2's record of the page."""

    def host_may(self, pa: Pa) -> bool:
        """Whether the host's stage 2 has the page for the host, or gives it at the first fault; True where there is none."""
        return bool(self.el2.host_may(pa))

    @abstractmethod
    def not_the_hosts(self) -> Iterator[tuple[Pa, Pa, str]]:
        """Ranges of RAM that are not wholly the host's, [start, end) each, and how; EL2's own pool left out."""

    @property
    @abstractmethod
    def guest_splits(self) -> int:
        """How many leaves of stage 2 of the VMs that there are have been made smaller ones."""

    @property
    def host_splits(self) -> int:
        """How many of the host's stage 2, if there is one."""
        return 0

    def host_tables(self) -> Sequence[PageTable]:
        """The table of the host's stage 2, if there is one."""
        return ()

    def host_order(self, pa: Pa) -> int | None:
        """The order of the entry of the host's stage 2 that decides *pa*, None where there is no such stage."""
        return None

    @abstractmethod
    def guest_order(self, vm: Vm, ipa: Ipa) -> int:
        """The order of the entry of *vm*'s stage 2 that decides *ipa*."""

    def leftovers(self) -> Iterator[str]:
        """What EL2 should have forgotten, in words."""
        yield from ()

    def host_touches(self, pa: Pa) -> None:  # noqa: B027 - most have nothing to do
        """The host stores to its page: a stage 2 that is filled by faults maps it."""

    def ipa_of(self, vm: Vm, pa: Pa) -> Ipa | None:
        """The IPA at which *vm* maps the page."""
        found: Ipa | None = vm.handle.ipa_of(pa)
        return found

    @abstractmethod
    def lookup(self, vm: Vm, ipa: Ipa) -> Pa | None:
        """The physical address that *vm*'s stage 2 has for *ipa*."""

    def may_sanitise(self, vm: Vm, pa: Pa) -> bool:
        """Whether a call that zeroes what it takes back zeroes the page, as it is now."""
        return True

    @abstractmethod
    def locked_in(self, vm: Vm, pa: Pa) -> bool:
        """Whether the guest holds on to the page."""

    def poisoned(self, vm: Vm, gfn: Gfn) -> bool:
        """Whether the guest's entry says that its page was taken by force."""
        return False

    @abstractmethod
    def guest_stage2(self, vm: Vm) -> Stage2:
        """VTCR and VTTBR while the guest runs."""

    @abstractmethod
    def guest_table(self, vm: Vm) -> PageTable:
        """The tables that VTTBR leads to then."""

    # -- the guest acts ------------------------------------------------------------------------------------------

    def guest_access(self, vm: Vm, ipa: Ipa, write: bool, token: bytes) -> GuestRan:
        """One load or store of the guest, on the CPU where a TLB entry may mislead it, if there is one."""
        accessor = self.accessor()
        # The guest may run on any CPU. Lock step chooses the one on which it goes most wrong.
        cpu = self.cpu_of_guest(vm, ipa)
        while True:
            reached = accessor.access(cpu, self.guest_stage2(vm), ipa, write, token)
            if not isinstance(reached, Fault):
                return GuestRan(reached)
            # EL2 has repaired it and the guest tries again: the host is not asked, as on hardware.
            if not self.handles(vm, reached):
                return GuestRan(exit="poisoned" if self.poisoned(vm, gpa_to_gfn(ipa)) else "fault")

    def prefetch(self, cpu: int, vm: Vm, ipa: Ipa) -> None:
        """CPU number *cpu* caches the translation of *ipa* without being asked to."""
        self.accessor().mmus[cpu].prefetch(Va(ipa), MMU_OFF, self.guest_stage2(vm))

    def accessor(self) -> Accessor:
        """The vCPU for single accesses, made when first needed."""
        if self._accessor is None:
            self._accessor = Accessor(self.hardware)
        return self._accessor

    def handles(self, vm: Vm, fault: Fault) -> bool:
        """Whether EL2 deals with a guest's stage-2 fault itself, so that the guest goes on."""
        return False

    def guest_consents(self, vm: Vm, ipa: Ipa) -> bool:
        """The guest gives the page at *ipa* up, by its own hypercall; False when EL2 refuses that."""
        raise LookupError(f"guests of {type(self).__name__} cannot give pages up")

    # -- VMs -----------------------------------------------------------------------------------------------------

    @abstractmethod
    def create_vm(self, frames: int) -> Vm:
        """A VM with *frames* guest page frames from 0 on."""

    @abstractmethod
    def vm_kill(self, vm: Vm) -> None:
        """Its vCPUs never run again."""

    @abstractmethod
    def vm_destroyed(self, vm: Vm) -> None:
        """Its tables go, and its TLB entries."""



"""The machine's EL2 under protected KVM. It is the one object that the machine talks to, and has no rules of its own.

Hypervisor stage-1 tables are not modelled: what EL2 itself maps follows from the hypervisor's state in the vmemmap.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from guest_memfd.errors import BadInput
from guest_memfd.machine.el2.kvm.guest import IPA_BITS, first_tables, next_vmid
from guest_memfd.machine.el2.pkvm import hypercalls, transitions
from guest_memfd.machine.el2.pkvm.annotation import PageOwner, Release
from guest_memfd.machine.el2.pkvm.host_stage2 import HostStage2, Region
from guest_memfd.machine.el2.pkvm.states import ORDERS, HypPage, PkvmState, Vmemmap
from guest_memfd.machine.el2.pkvm.vm import PkvmHypVm, PkvmVcpu
from guest_memfd.machine.hw.arm64.access import Transfer
from guest_memfd.machine.hw.arm64.fault import Fault, Inject
from guest_memfd.machine.hw.arm64.pages import PageSource
from guest_memfd.machine.hw.arm64.tlb import Tlb
from guest_memfd.machine.hw.arm64.walk import Stage2
from guest_memfd.machine.hw.ram import Ram
from guest_memfd.words.units import PAGE, PAGE_SHIFT, Ipa, Pa, Pfn, pa_to_pfn

_FIRST_HANDLE = 0x1000


class El2:
    """Protected KVM on *ram*; *source* is its pool of table pages for the host's stage 2.

    *regions* are the memblocks (default: all of RAM is one). *reserved*, (address, bytes) pairs, is EL2's own memory
    from the start, the pool among it. *release* decides the format of annotations and whether the host survives an
    access to a page it has given away.
    """

    def __init__(self, ram: Ram, source: PageSource, tlbs: Sequence[Tlb], regions: Sequence[Region] = (),
                 reserved: Sequence[tuple[Pa, int]] = (), pa_bits: int = 48, release: Release = "7.3") -> None:
        self.ram, self.release = ram, release
        self.vmemmap = Vmemmap()
        self.host = HostStage2(ram, source, tlbs, regions or [Region(ram.base, ram.size)], pa_bits, release)
        self.vms: dict[int, PkvmHypVm] = {}
        self.loaded: dict[int, PkvmVcpu] = {}
        self._created = self._last = 0
        for base, size in reserved:
            self._reserve(pa_to_pfn(base), size >> PAGE_SHIFT)

    # In leaves as large as fit: no one ever asks for part of it back.
    def _reserve(self, pfn: Pfn, nr: int) -> None:
        while nr:
            order = max(o for o in ORDERS if not pfn & (1 << o) - 1 and 1 << o <= nr)
            self.host.give_away(pfn, order, PageOwner.HYP)
            self.vmemmap.set(pfn, order, HypPage(host=PkvmState.NOPAGE, hyp=PkvmState.OWNED))
            pfn, nr = pfn + (1 << order), nr - (1 << order)

    # -- the machine's questions -------------------------------------------------------------------------------

    def stage2(self) -> Stage2 | None:
        """The registers of stage 2 while the host runs."""
        return self.host.registers()

    def hvc(self, regs: list[int], cpu: int = 0) -> None:
        """HVC or SMC of the host on *cpu*: SMCCC registers x0..x17, in place."""
        hypercalls.dispatch(self, regs, cpu)

    def host_abort(self, fault: Fault, el: int, transfer: Transfer | None = None) -> Inject | None:
        """A stage-2 fault of the host, taken from *el*; None: run the instruction again. Raises MachineDead."""
        return self.host.abort(fault, el, transfer)

    # -- VMs -----------------------------------------------------------------------------------------------------

    def create_vm(self, pgd: Pa, bound: Callable[[Ipa], bool], *, protected: bool = True,
                  ipa_bits: int = IPA_BITS) -> PkvmHypVm:
        """__pkvm_init_vm(): the host donates its pages at *pgd* (first_tables() of them, aligned) for the first tables.

        Raises BadInput when they are not the host's to give.
        """
        nr = first_tables(ipa_bits)
        # The tables of a protected VM are EL2's memory: the host must not be able to write a descriptor.
        if pgd % (nr * PAGE) or transitions.donate_hyp(self, pa_to_pfn(pgd), nr):
            raise BadInput(f"{nr} pages at {pgd:#x} cannot become first-level tables of a VM")
        self._created += 1
        self._last = next_vmid(self._last, {vm.vmid for vm in self.vms.values()})
        vm = PkvmHypVm(self, _FIRST_HANDLE + self._created - 1, self._last, pgd, protected, bound, ipa_bits)
        self.vms[vm.handle] = vm
        return vm

    # -- queries -------------------------------------------------------------------------------------------------

    def owner(self, pa: Pa) -> str:
        """``host``, ``guest`` (donated), ``shared`` (a guest borrows it), ``borrowed`` (a guest's), or ``hyp``."""
        page = self.vmemmap.page(pa_to_pfn(pa))
        # The host's state alone tells whose the page is: OWNED and SHARED_OWNED the host's, SHARED_BORROWED a
        # guest's, NOPAGE someone's whom the host cannot reach.
        if page.host is PkvmState.NOPAGE:
            return "hyp" if page.hyp is PkvmState.OWNED else "guest"
        if page.host is PkvmState.SHARED_BORROWED:
            return "borrowed"
        return "shared" if page.guests else "host"

    def host_may(self, pa: Pa) -> bool:
        """Whether the host reaches the byte at *pa*: mapped, or mapped by its first fault."""
        return self.host.may(pa)

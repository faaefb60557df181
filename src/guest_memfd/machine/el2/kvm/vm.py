"""Plain KVM on VHE: a default VM. The host maps and unmaps its guests, and no one owns a page.

The host runs at EL2 without a stage 2 of its own, so no host access ever aborts there and there is no hypercall to
make. arch/arm64/kvm/mmu.c; every change happens under mmu_lock and ends with its TLB maintenance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from errno import EINVAL, ENOMEM

from guest_memfd.machine.el2.kvm.guest import IPA_BITS, GuestStage2, next_vmid
from guest_memfd.machine.el2.kvm.pgtable import leaf_attributes
from guest_memfd.machine.el2.kvm.vcpu import VheGuestCpu, VheVcpu
from guest_memfd.machine.hw.arm64.fault import Fault, Inject
from guest_memfd.machine.hw.arm64.pages import PageSource
from guest_memfd.machine.hw.arm64.tlb import Tlb
from guest_memfd.machine.hw.arm64.walk import Stage2
from guest_memfd.machine.hw.buddy import OutOfMemory
from guest_memfd.machine.hw.ram import Ram
from guest_memfd.words.units import PAGE, Gfn, Ipa, Pa, Pfn, gfn_to_gpa, pa_to_pfn, pfn_to_pa

_ORDER_OF = {1: 0, 1 << 9: 9, 1 << 18: 18}


class VheVm(GuestStage2):
    """One VM. *bound* says whether a memslot covers an IPA."""

    def __init__(self, ram: Ram, source: PageSource, tlbs: Sequence[Tlb], vmid: int,
                 bound: Callable[[Ipa], bool], ipa_bits: int = IPA_BITS) -> None:
        super().__init__(ram, source, tlbs, vmid, ipa_bits)
        self.bound = bound
        self.vcpus: list[VheVcpu] = []

    def add_vcpu(self, cpu: VheGuestCpu) -> VheVcpu:
        """A vCPU that *cpu* executes."""
        self.vcpus.append(VheVcpu(cpu, self.bound))
        return self.vcpus[-1]

    def map(self, gfn: Gfn, pfn: Pfn, nr: int = 1, prot: str = "rwx") -> int:
        """kvm_pgtable_stage2_map(): *nr* pages, one leaf, over whatever was there; 0, -EINVAL or -ENOMEM."""
        order = _ORDER_OF.get(nr)
        if order is None or (gfn | pfn) & nr - 1 or not self.in_range(gfn, nr):
            return -EINVAL
        # Read before it is replaced: the reverse map must forget what was there.
        before = self.pgt.leaf(gfn_to_gpa(gfn))
        try:
            self.pgt.map(gfn_to_gpa(gfn), order, pfn_to_pa(pfn), leaf_attributes(prot))
        except OutOfMemory:
            return -ENOMEM
        if before.valid:
            self.unmapped(gfn & -1 << before.order, pa_to_pfn(before.oa))
        self.mapped(gfn, pfn)
        return 0

    def unmap(self, gfn: Gfn, nr: int = 1) -> int:
        """kvm_unmap_gfn_range(), then kvm_flush_remote_tlbs_range(): flushed even where nothing was mapped; 0."""
        at = gfn
        while at < gfn + nr:
            entry = self.pgt.unmap(gfn_to_gpa(at))
            head = at & -1 << entry.order
            if entry.valid:
                self.unmapped(head, pa_to_pfn(entry.oa))
            at = head + (1 << entry.order)
        # Once for the range, as the kernel does at the end of an invalidation, whatever was mapped in it.
        self.pgt.tlbs.flush_range(gfn_to_gpa(gfn), nr * PAGE)
        return 0

    def destroy(self) -> None:
        """The VM is gone: its tables are free but for the first, and no TLB knows the VMID any more."""
        self._gfns.clear()
        self.pgt.destroy()
        self.pgt.tlbs.flush_all()


class Kvm:
    """The EL2 of a machine whose host runs there: the machine asks it the same things as any other."""

    def __init__(self, ram: Ram, source: PageSource, tlbs: Sequence[Tlb]) -> None:
        self.ram, self.source, self.tlbs = ram, source, list(tlbs)
        self.vms: dict[int, VheVm] = {}
        self._last = 0

    def create_vm(self, bound: Callable[[Ipa], bool], ipa_bits: int = IPA_BITS) -> VheVm:
        """KVM_CREATE_VM; raises OutOfMemory without a first table."""
        self._last = next_vmid(self._last, self.vms)
        vm = self.vms[self._last] = VheVm(self.ram, self.source, self.tlbs, self._last, bound, ipa_bits)
        return vm

    def stage2(self) -> Stage2 | None:
        """The host has none."""
        return None

    def hvc(self, regs: list[int], cpu: int = 0) -> None:
        """No one is there to answer: SMCCC NOT_SUPPORTED."""
        regs[0] = (1 << 64) - 1

    def host_abort(self, fault: Fault, el: int) -> Inject | None:
        """Raises LookupError: without a stage 2 there is no fault of stage 2."""
        raise LookupError(f"a stage-2 fault of a host that has no stage 2: {fault!r}")

    def owner(self, pa: Pa) -> str:
        """No one keeps ownership: always ``host``."""
        return "host"

    def host_may(self, pa: Pa) -> bool:
        """No one withholds memory from the host."""
        return True

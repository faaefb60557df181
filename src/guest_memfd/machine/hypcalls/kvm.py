"""Plain KVM: the driver is the hypervisor, so a hypercall is a call into its MMU code (arch/arm64/kvm/mmu.c)."""

from __future__ import annotations

from collections.abc import Iterator

from guest_memfd.compat import override
from guest_memfd.core.hypervisor import Hypervisor
from guest_memfd.machine.el2.kvm.guest import first_tables
from guest_memfd.machine.el2.kvm.vm import Kvm
from guest_memfd.machine.hw.arm64.tables import PageTable
from guest_memfd.machine.hw.arm64.walk import Stage2
from guest_memfd.machine.hw.buddy import Buddy
from guest_memfd.machine.hypcalls.driver import Driver
from guest_memfd.machine.hypcalls.hardware import Hardware
from guest_memfd.machine.hypcalls.vm import Vm
from guest_memfd.words.primitives import Folio
from guest_memfd.words.units import PAGE, Gfn, Ipa, Pa, gfn_to_gpa, pfn_to_pa


class KvmGuests(Driver):
    """Guests whose stage 2 is KVM's own, whatever runs at EL2 (el2/kvm/guest.py)."""

    @override
    def owner(self, pa: Pa) -> str:
        """By EL2's record; under plain KVM the host's, all of it."""
        return str(self.el2.owner(pa))

    @override
    def lookup(self, vm: Vm, ipa: Ipa) -> Pa | None:
        """By the guest's table."""
        leaf = vm.handle.pgt.leaf(ipa)
        return leaf.oa + ipa % (PAGE << leaf.order) if leaf.valid else None

    @property
    @override
    def guest_splits(self) -> int:
        """By the tables of the guests."""
        return sum(vm.pgt.splits for vm in self.el2.vms.values())

    @override
    def guest_order(self, vm: Vm, ipa: Ipa) -> int:
        """By the guest's table."""
        return int(vm.handle.pgt.leaf(ipa).order)

    @override
    def guest_stage2(self, vm: Vm) -> Stage2:
        """The stage-2 registers of the VM, VTTBR and VTCR, for a walk of the guest's tables."""
        registers: Stage2 = vm.handle.registers()
        return registers

    @override
    def guest_table(self, vm: Vm) -> PageTable:
        """The VM's stage-2 table, to be read entry by entry."""
        table: PageTable = vm.handle.page_table
        return table


class KvmVms(KvmGuests):
    """VMs whose vCPUs KVM's own code runs (el2/kvm/vm.py); *tables* gives the pages of their tables."""

    tables: Buddy

    @override
    def create_vm(self, frames: int) -> Vm:
        """KVM_CREATE_VM; guest addresses from *frames* pages on are not memory of this VM."""
        handle = self.el2.create_vm(lambda ipa: ipa < frames * PAGE)
        return Vm(handle, handle.vmid)

    @override
    def vm_kill(self, vm: Vm) -> None:
        """Nothing to tell anybody."""

    @override
    def vm_destroyed(self, vm: Vm) -> None:
        """kvm_free_stage2_pgd(): unmap, flush, and give the first-level tables back."""
        vm.handle.destroy()
        del self.el2.vms[vm.vmid]
        self.tables.free(vm.handle.pgt.root, (first_tables() - 1).bit_length())


class KvmDriver(KvmVms):
    """VHE: no host stage 2, no one owns pages."""

    def __init__(self, hardware: Hardware, hypervisor: Hypervisor) -> None:
        super().__init__(hardware, hypervisor)
        self.tables = hardware.kernel_pages
        self.el2 = Kvm(hardware.ram, self.tables, hardware.tlbs)

    def _mmu_map(self, vm: Vm, gfn: Gfn, folio: Folio) -> int:
        return int(vm.handle.map(gfn, folio.pfn, folio.nr))

    def _mmu_unmap(self, vm: Vm, gfn: Gfn, folio: Folio) -> int:
        # Another page may be mapped there by now, and that one is not asked for.
        return int(vm.handle.unmap(gfn, folio.nr)) if self.ipa_of(vm, pfn_to_pa(folio.pfn)) == gfn_to_gpa(gfn) else 0

    @override
    def not_the_hosts(self) -> Iterator[tuple[Pa, Pa, str]]:
        """No one but the host owns anything."""
        yield from ()

    @override
    def locked_in(self, vm: Vm, pa: Pa) -> bool:
        """Guests of plain KVM hold on to nothing."""
        return False

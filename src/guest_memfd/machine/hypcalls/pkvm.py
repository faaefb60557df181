"""Protected KVM: kvm_call_hyp_nvhe(), with the arguments of arch/arm64/kvm/pkvm.c (7.3).

The vCPU stays loaded from creation on, also while the VM is dying: a thread may still be handling the fault that its
guest took before. (KVM itself waits for its vCPUs before it tears a VM down.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from errno import E2BIG, EBUSY, ENOMEM, EPERM

from guest_memfd.compat import override
from guest_memfd.core.hypervisor import Hypervisor
from guest_memfd.machine.el2.kvm.guest import first_tables
from guest_memfd.machine.el2.kvm.pgtable import tables_to_split
from guest_memfd.machine.el2.pkvm import hypercalls as n
from guest_memfd.machine.el2.pkvm import transitions
from guest_memfd.machine.el2.pkvm.el2 import El2
from guest_memfd.machine.hw.arm64.fault import TRANSLATION, Fault
from guest_memfd.machine.hw.arm64.tables import PageTable
from guest_memfd.machine.hw.buddy import OutOfMemory
from guest_memfd.machine.hypcalls.hardware import Hardware
from guest_memfd.machine.hypcalls.kvm import KvmGuests
from guest_memfd.machine.hypcalls.vm import Vm
from guest_memfd.words.primitives import Folio
from guest_memfd.words.units import PAGE, Gfn, Ipa, Pa, Va, gfn_to_gpa, gpa_to_gfn, identity_ipa, pa_to_pfn, pfn_to_pa

_RWX = 7
_SIGN = 1 << 63


class PkvmDriver(KvmGuests):
    """EL2 owns the host's stage 2."""

    rules = frozenset({("check_consent", -EBUSY), ("reclaim_dying_guest_page", -EPERM)})

    def __init__(self, hardware: Hardware, hypervisor: Hypervisor) -> None:
        super().__init__(hardware, hypervisor)
        pool = hardware.el2_pool
        self.el2 = El2(hardware.ram, pool, hardware.tlbs, reserved=[(pool.start, pool.size)])

    # x0 is the number, x1 comes back as the function's result.
    def _call(self, number: int, *args: int) -> int:
        regs = [n.BASE + number, *args] + [0] * (17 - len(args))
        self.el2.hvc(regs, 0)
        assert regs[0] == 0, f"EL2 does not know hypercall {number}"
        return regs[1] - (regs[1] & _SIGN) * 2

    # -ENOMEM of EL2 means that the vCPU's memcache is empty: topup_hyp_memcache().
    def _topup(self, vm: Vm, tables: int = 0) -> int:
        memcache, source = vm.handle.memcache, self.hardware.kernel_pages
        missing = (tables or vm.handle.min_pages) - len(memcache.pages) - len(memcache.offered)
        try:
            vm.handle.topup([source.alloc() for _ in range(missing)])
        except OutOfMemory:
            return -ENOMEM
        return 0

    def _donate_guest(self, vm: Vm, gfn: Gfn, folio: Folio) -> int:
        return self._topup(vm) or self._call(n.DONATE_GUEST, folio.pfn, gfn, folio.nr)

    def _share_guest(self, vm: Vm, gfn: Gfn, folio: Folio) -> int:
        return self._topup(vm) or self._call(n.SHARE_GUEST, folio.pfn, gfn, folio.nr, _RWX)

    def _split_guest(self, vm: Vm, gfn: Gfn, folio: Folio) -> int:
        return self._topup(vm, tables_to_split(folio.order)) or self._call(n.SPLIT_GUEST, vm.handle.handle, gfn)

    def _unshare_guest(self, vm: Vm, gfn: Gfn, folio: Folio) -> int:
        return self._call(n.UNSHARE_GUEST, vm.handle.handle, gfn, folio.nr)

    def _unshare(self, vm: Vm, gfn: Gfn, folio: Folio) -> int:
        return self._call(n.UNSHARE, vm.handle.handle, gfn)

    def _check_consent(self, vm: Vm, gfn: Gfn, folio: Folio, converting: bool) -> int:
        return self._call(n.CHECK_CONSENT, vm.handle.handle, gfn, folio.nr, int(converting))

    def _reclaim_dying_guest_page(self, vm: Vm, gfn: Gfn, folio: Folio) -> int:
        ret = self._call(n.RECLAIM_DYING, vm.handle.handle, gfn, folio.nr)
        self.sanitised = not ret
        return ret

    @override
    def force_reclaim(self, pa: Pa) -> int:
        """__pkvm_force_reclaim_guest_page() of physical address *pa*: 0 or -errno; the guest's entry is poisoned."""
        return self._call(n.FORCE_RECLAIM, pa)

    # -- records and tables --------------------------------------------------------------------------------------

    @override
    def not_the_hosts(self) -> Iterator[tuple[Pa, Pa, str]]:
        """From hyp_vmemmap; EL2's own pool left out."""
        for pfn, order in self.el2.vmemmap.recorded():
            pa = pfn_to_pa(pfn)
            owner = self.owner(pa)
            if owner != "host" and pa < self.hardware.el2_pool.start:
                yield pa, pa + (PAGE << order), f"is {owner} by EL2's record"

    @override
    def host_touches(self, pa: Pa) -> None:
        """The first store is a stage-2 fault, which EL2 answers by mapping the page."""
        ipa = identity_ipa(pa)
        if not self.el2.host.pgt.leaf(ipa).valid:
            fault = Fault(TRANSLATION, 3, 2, va=Va(ipa), ipa=ipa, access="w")
            assert self.el2.host_abort(fault, 1) is None

    @override
    def may_sanitise(self, vm: Vm, pa: Pa) -> bool:
        """What the host does not own already."""
        return self.owner(pa) != "host"

    @property
    @override
    def host_splits(self) -> int:
        """By the host's table."""
        return int(self.el2.host.pgt.splits)

    @override
    def host_tables(self) -> Sequence[PageTable]:
        """The host's, which EL2 has."""
        return (self.el2.host.page_table,)

    @override
    def host_order(self, pa: Pa) -> int:
        """By the host's table, in which an entry of any size may be empty, or a note."""
        return int(self.el2.host.pgt.leaf(identity_ipa(pa)).order)

    @override
    def locked_in(self, vm: Vm, pa: Pa) -> bool:
        """Not shared with the host."""
        return self.owner(pa) == "guest"

    @override
    def poisoned(self, vm: Vm, gfn: Gfn) -> bool:
        """The guest's entry is annotated POISONED."""
        return bool(vm.handle.poisoned(gfn_to_gpa(gfn)))

    # -- the guest acts, VMs ---------------------------------------------------------------------------------------

    @override
    def guest_consents(self, vm: Vm, ipa: Ipa) -> bool:
        """HVC MEM_SHARE; EL2 refuses it for a page that is not the guest's alone."""
        gfn = gpa_to_gfn(ipa)
        ret = transitions.guest_share_host(self.el2, vm.handle, gfn)
        if ret == -E2BIG and not self.split_leaf(vm, ipa):
            ret = transitions.guest_share_host(self.el2, vm.handle, gfn)
        return ret == 0

    def split_leaf(self, vm: Vm, ipa: Ipa) -> int:
        """PKVM_HYP_REQ_SPLIT: EL2 has refused a guest's share of a part of a block; 0, or -ENOMEM."""
        leaf = vm.handle.pgt.leaf(ipa)
        return self._split_guest(vm, gpa_to_gfn(ipa), Folio(pa_to_pfn(leaf.oa), leaf.order))

    @override
    def create_vm(self, frames: int) -> Vm:
        """__pkvm_init_vm() and one vCPU, loaded; raises OutOfMemory, and nothing is left."""
        pages = first_tables()
        pgd = self.hardware.kernel_pages.alloc((pages - 1).bit_length())
        handle = self.el2.create_vm(pgd, lambda ipa: ipa < frames * PAGE)
        handle.add_vcpu(None)
        self._call(n.VCPU_LOAD, handle.handle, 0)
        vm = Vm(handle, handle.vmid)
        try:
            for _ in range(2 * handle.min_pages):
                handle.topup([self.hardware.kernel_pages.alloc()])
        except OutOfMemory:
            self.vm_kill(vm)
            self.vm_destroyed(vm)
            raise
        handle.memcache.refill(2 * handle.min_pages)
        return vm

    @override
    def vm_kill(self, vm: Vm) -> None:
        """The VM is dying; see the first lines of this file for the loaded vCPU."""
        vm.handle.dying = True

    @override
    def vm_destroyed(self, vm: Vm) -> None:
        """__pkvm_finalize_teardown_vm(): EL2 gives its tables back; what it never took was the host's all along."""
        self._call(n.VCPU_PUT)
        self._call(n.FINALIZE_TEARDOWN, vm.handle.handle)
        for pa in (*vm.handle.teardown, *vm.handle.memcache.offered):
            self.hardware.kernel_pages.free(pa)

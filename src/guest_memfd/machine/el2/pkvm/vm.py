"""Guests as EL2 knows them. What a VM lives on, tables included, was the host's, and is EL2's while it lives.

A VM's tables come out of its memcache: pages that the host offers, that EL2 takes (donate_hyp) and gives back when the
VM is torn down (kvm/hyp/nvhe/pkvm.c). Upstream each vCPU has a memcache; here one serves the VM. vCPUs execute while
loaded; hypercalls of protected guests are in kvm/hyp/nvhe/pkvm.c as well.

ADDITION: MEM_SHARE and MEM_UNSHARE of a guest also exit to the host, which converts the page; MEM_UNSHARE completes,
when the vCPU runs next, only if the host has let go by then (transitions.unshare()).
"""

from __future__ import annotations

from collections.abc import Callable
from errno import E2BIG, EBUSY, ENOENT
from typing import TYPE_CHECKING

from guest_memfd.compat import override
from guest_memfd.machine.el2.kvm.guest import IPA_BITS, GuestStage2, first_tables
from guest_memfd.machine.el2.kvm.vcpu import (
    INVALID_PARAMETER,
    Exit,
    Hypercall,
    InternalErrorExit,
    MemoryFaultExit,
    SplitExit,
    VheGuestCpu,
    VheVcpu,
)
from guest_memfd.machine.el2.pkvm import checks, transitions
from guest_memfd.machine.el2.pkvm.states import PkvmState
from guest_memfd.machine.hw.buddy import OutOfMemory
from guest_memfd.uapi.kvm_arm64 import HYP_MEMINFO, MEM_SHARE, MEM_UNSHARE
from guest_memfd.words.units import PAGE, Ipa, Pa, gfn_to_gpa, gpa_to_gfn, pa_to_pfn

if TYPE_CHECKING:
    from guest_memfd.machine.el2.pkvm.el2 import El2


class Memcache:
    """A stack of EL2's pages for one VM's tables, above the first-level tables at *pgd*."""

    def __init__(self, el2: El2, pgd: Pa) -> None:
        self._el2, self._pgd = el2, pgd
        self.pages: list[Pa] = []
        self.offered: list[Pa] = []
        """Pages (physical addresses) the host offers: struct kvm_hyp_memcache of its vCPU."""

    def refill(self, nr: int) -> bool:
        """pkvm_refill_memcache(): take offered pages until there are *nr*; False: there are not."""
        while len(self.pages) < nr and self.offered:
            # The host may offer a page that is not its own, by mistake or not. Then the page stays where it is, and
            # the memcache is not full.
            if transitions.donate_hyp(self._el2, pa_to_pfn(self.offered[-1]), 1):
                break
            self.pages.append(self.offered.pop())
        return len(self.pages) >= nr

    def alloc(self, order: int = 0) -> Pa:
        """The first-level tables, for which a memcache has no pages."""
        return self._pgd

    def free(self, pa: Pa, order: int = 0) -> None:
        """They go back with the VM."""

    def alloc_table(self) -> Pa:
        """One zeroed page of EL2's; raises OutOfMemory."""
        if not self.pages:
            raise OutOfMemory("the memcache is empty")
        pa = self.pages.pop()
        # Zeroed at EL2, after the host has lost it: descriptors of the host's making would be a way into any page.
        self._el2.ram.zero(pa, PAGE)
        return pa

    def free_table(self, pa: Pa) -> None:
        """A table is no longer needed."""
        self.pages.append(pa)


class PkvmHypVm(GuestStage2):
    """A VM with *handle*; *pgd* is the physical address of its first-level tables, which EL2 owns already."""

    def __init__(self, el2: El2, handle: int, vmid: int, pgd: Pa, protected: bool, bound: Callable[[Ipa], bool],
                 ipa_bits: int = IPA_BITS) -> None:
        self.el2, self.handle, self.protected, self.bound = el2, handle, protected, bound
        self.pgd = [pgd + PAGE * i for i in range(first_tables(ipa_bits))]
        self.memcache = Memcache(el2, pgd)
        super().__init__(el2.ram, self.memcache, el2.host.pgt.tlbs.tlbs, vmid, ipa_bits, el2.host.vtcr.ps)
        self.dying = False
        self.vcpus: list[PkvmVcpu] = []
        self.teardown: list[Pa] = []
        """Pages given back to the host by `finalize_teardown`."""

    @property
    def min_pages(self) -> int:
        """kvm_mmu_cache_min_pages(): table pages that one mapping can take."""
        return 3 - self.page_table.start_level

    def memcache_ready(self) -> bool:
        """__guest_check_pgtable_memcache(), after a refill from what the host offers."""
        return self.memcache.refill(self.min_pages)

    def topup(self, pages: list[Pa]) -> None:
        """The host offers pages for tables; EL2 takes them when it needs them."""
        self.memcache.offered += pages

    def add_vcpu(self, cpu: VheGuestCpu) -> PkvmVcpu:
        """__pkvm_init_vcpu(): a new vCPU of this VM, whose instructions *cpu* executes."""
        self.vcpus.append(PkvmVcpu(self, cpu))
        return self.vcpus[-1]

    def poisoned(self, ipa: Ipa) -> bool:
        """__pkvm_vcpu_in_poison_fault() for *ipa*: the page was there, and the host took it by force."""
        return checks.guest_page_state(self.pgt.leaf(ipa)) is PkvmState.POISON

    def start_teardown(self) -> int:
        """__pkvm_start_teardown_vm(): the VM is dying and never runs again; -EBUSY while a vCPU is loaded."""
        if any(vcpu.loaded for vcpu in self.vcpus):
            return -EBUSY
        self.dying = True
        return 0

    def finalize_teardown(self) -> int:
        """__pkvm_finalize_teardown_vm(): EL2's pages go back to the host; -EBUSY for a VM that is not dying.

        Pages of the guest that the host has not reclaimed before stay withheld for good.
        """
        if not self.dying:
            return -EBUSY
        self.pgt.destroy()
        # Before the table pages go back: a walker could read them as descriptors afterwards, when the host writes to
        # them.
        self.pgt.tlbs.flush_all()
        self.teardown = sorted([*self.memcache.pages, *self.pgd])
        self.memcache.pages.clear()
        for pa in self.teardown:
            # They hold addresses of pages of the guest, which are nothing for the host to know.
            self.ram.zero(pa, PAGE)
            transitions.hyp_donate_host(self.el2, pa_to_pfn(pa), 1)
        del self.el2.vms[self.handle]
        return 0


class PkvmVcpu(VheVcpu):
    """A vCPU of a VM of EL2's."""

    def __init__(self, vm: PkvmHypVm, cpu: VheGuestCpu) -> None:
        super().__init__(cpu, vm.bound)
        self.vm = vm
        self.loaded = False
        self._unsharing: Ipa | None = None      # IPA of a MEM_UNSHARE that the host has to let go of first

    @override
    def run(self, timeout: float | None = None, instructions: int | None = None) -> Exit:
        """__kvm_vcpu_run: as for every vCPU, but -EINVAL (an InternalError) while it is not loaded."""
        if not self.loaded:
            return InternalErrorExit("-EINVAL: the vCPU is not loaded")
        if self._unsharing is not None:
            gfn, self._unsharing = gpa_to_gfn(self._unsharing), None
            # The host may have let go of the page or not. The guest learns it from the state, not from what the host
            # says.
            done = checks.guest_page_state(self.vm.pgt.leaf(gfn_to_gpa(gfn))) is PkvmState.OWNED
            self.cpu.set_x(0, 0 if done else INVALID_PARAMETER)
        return super().run(timeout, instructions)

    @override
    def _call(self, number: int) -> Exit | None:
        if number not in (HYP_MEMINFO, MEM_SHARE, MEM_UNSHARE) or not self.vm.protected:
            return super()._call(number)
        if number == HYP_MEMINFO:                       # in what sizes memory is shared; its three arguments are reserved
            self.cpu.set_x(0, INVALID_PARAMETER if any(self.cpu.x(n) for n in (1, 2, 3)) else PAGE)
            return None
        ipa = Ipa(self.cpu.x(1))
        if ipa % PAGE or self.cpu.x(2) or self.cpu.x(3) or not self.vm.in_range(gpa_to_gfn(ipa), 1):
            self.cpu.set_x(0, INVALID_PARAMETER)
            return None
        return self._share(ipa) if number == MEM_SHARE else self._unshare(ipa)

    def _share(self, ipa: Ipa) -> Exit | None:
        ret = transitions.guest_share_host(self.vm.el2, self.vm, gpa_to_gfn(ipa))
        if ret == -ENOENT:
            return self._fault_in(ipa)
        if ret == -E2BIG:
            self.cpu.pc -= 4                    # executed again when the block has been split (PKVM_HYP_REQ_SPLIT)
            return SplitExit(ipa)
        self.cpu.set_x(0, INVALID_PARAMETER if ret else 0)
        return None if ret else Hypercall(MEM_SHARE, ipa)

    def _unshare(self, ipa: Ipa) -> Exit | None:
        # What is not there is not shared either, and is not faulted in, unlike for MEM_SHARE.
        state = checks.guest_page_state(self.vm.pgt.leaf(ipa))
        if state is not PkvmState.SHARED_OWNED:
            self.cpu.set_x(0, INVALID_PARAMETER)
            return None
        self._unsharing = ipa
        return Hypercall(MEM_UNSHARE, ipa)

    # The HVC becomes a write fault of the page, and is executed again when the host has mapped it.
    def _fault_in(self, ipa: Ipa) -> Exit:
        # PC is after the HVC, which must run once more when the page is there.
        self.cpu.pc -= 4
        if not self.bound(ipa):
            return InternalErrorExit(f"the guest shares IPA {ipa:#x}, where it has no memory")
        return MemoryFaultExit(ipa, write=True, exec=False)

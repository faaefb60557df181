"""EL2 that runs a hypervisor's model: its records, and what the model may do to a page (`core.hypervisor.Stage2`).

The abstract host carries a model out on bytes; this carries it out on page tables and TLBs, with the tables of plain KVM for
guests and an identity map for the host. What the model does not say is decided here, and only here: how the host is told
of an access to a withheld page (by `Hypervisor.abort`), and where table pages come from (EL2's pool).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from guest_memfd.compat import override
from guest_memfd.core.hypervisor import SEA, Hypervisor, Owner, check_owner
from guest_memfd.machine.el2.kvm.tlb import Maintenance
from guest_memfd.machine.el2.kvm.vm import Kvm, VheVm
from guest_memfd.machine.el2.modelled.host_map import HostMap
from guest_memfd.machine.hw.arm64.fault import EXTERNAL_ABORT, Fault, Inject
from guest_memfd.machine.hw.arm64.tlb import Tlb
from guest_memfd.machine.hw.arm64.walk import Stage2 as Stage2Registers
from guest_memfd.machine.hw.buddy import Buddy, OutOfMemory
from guest_memfd.machine.hw.ram import Ram
from guest_memfd.words.units import PAGE, Gfn, Ipa, Pa, Pfn, gfn_to_gpa, gpa_to_gfn, identity_pa, pa_to_pfn, pfn_to_pa

_S1PTW = 1 << 7


class ModelledEl2(Kvm):
    """EL2 of *hypervisor*: KVM's, which has the VMs, and who has which page; *pool* gives the pages of all tables."""

    def __init__(self, hypervisor: Hypervisor, ram: Ram, pool: Buddy, tlbs: Sequence[Tlb]) -> None:
        super().__init__(ram, pool, tlbs)
        self.hypervisor = hypervisor
        self.host = HostMap(ram, pool, tlbs) if hypervisor.abort is not None else None
        self.owners: dict[Pfn, tuple[Owner, VheVm]] = {}        # pfn -> who has it and for which VM, unless it is the host's
        self.locked: set[Pfn] = set()                           # pfns that a guest holds on to
        self.poisoned: set[tuple[int, Gfn]] = set()             # (VMID, gfn) whose page was destroyed

    @override
    def stage2(self) -> Stage2Registers | None:
        """The registers while the host runs; None where the model has no stage 2 for the host."""
        return None if self.host is None else self.host.registers()

    @override
    def host_abort(self, fault: Fault, el: int) -> Inject | None:
        """A stage-2 fault of the host: None when it tries again, or what its EL1 is told, as the model's `abort` says."""
        assert self.host is not None
        assert fault.ipa is not None
        if self.host.fill(identity_pa(fault.ipa)):
            return None
        if self.hypervisor.abort == SEA:
            told = Fault(EXTERNAL_ABORT, None, 2, va=fault.va, access=fault.access, el=el)
            return Inject(told.esr_el1(), fault.va)
        return Inject(fault.esr_el1() | _S1PTW, fault.va)

    @override
    def owner(self, pa: Pa) -> str:
        """Who has the page at *pa*, by the model's record."""
        found = self.owners.get(pa_to_pfn(pa))
        return "host" if found is None else found[0]

    @override
    def host_may(self, pa: Pa) -> bool:
        """Whether the host's stage 2 lets the host touch *pa*."""
        return self.host is None or self.host.may(pa)


# A model's pages are single ones on this machine (docs/write-a-hypervisor.md).
def _single(order: int) -> None:
    if order:
        raise ValueError(f"a model maps single pages here, and no folio of order {order}")


class ModelledStage2:
    """What one hypercall about *vm* can do (`core.hypervisor.Stage2`); what it did is kept for its caller."""

    def __init__(self, el2: ModelledEl2, vm: VheVm, alive: bool) -> None:
        self._el2, self._vm, self._alive = el2, vm, alive
        self.refused = self.forgot = self.declassified = False

    # The physical address of a page of RAM.
    def _pa(self, pfn: Pfn) -> Pa:
        pa = pfn_to_pa(pfn)
        if not self._el2.ram.contains(pa, PAGE):
            raise ValueError(f"there is no page {pfn:#x} in this machine")
        return pa

    def owner(self, pfn: Pfn) -> str:
        """As recorded; ``other guest`` where it is of another VM."""
        owner, vm = self._el2.owners.get(pfn, ("host", self._vm))
        return owner if vm is self._vm else "other guest"

    def set_owner(self, pfn: Pfn, owner: Owner) -> None:
        """Record *owner*; raises ValueError for what is none."""
        check_owner(owner)
        if owner == "host":
            self._el2.owners.pop(pfn, None)
        else:
            self._el2.owners[pfn] = owner, self._vm

    def host_maps(self, pfn: Pfn, allowed: bool, order: int = 0) -> None:
        """Change the host's stage 2; taking a page away flushes both stages."""
        _single(order)
        host, pa = self._el2.host, self._pa(pfn)
        if host is not None and not allowed:
            host.withhold(pfn)
        elif host is not None and not host.may(pa):
            host.give_back(pfn)

    def guest_map(self, gfn: Gfn, pfn: Pfn, order: int = 0) -> None:
        """Map the page, in place of what *gfn* mapped. Raises OutOfMemory, ValueError for what no guest or machine has."""
        _single(order)
        if not self._vm.in_range(gfn, 1):
            raise ValueError(f"gfn {gfn:#x} is beyond {self._vm.ipa_bits} bits of guest address")
        if self._vm.map(gfn, pa_to_pfn(self._pa(pfn))):
            raise OutOfMemory("no page for a table of the guest")
        self._el2.poisoned.discard((self._vm.vmid, gfn))

    def host_leaf(self, pfn: Pfn) -> int:
        """There is no entry larger than a page."""
        return 0

    def host_split(self, pfn: Pfn, order: int) -> None:
        """There is no entry larger than a page."""
        _single(order)

    def guest_leaf(self, gfn: Gfn) -> int:
        """There is no leaf larger than a page."""
        return 0

    def guest_split(self, gfn: Gfn, order: int) -> None:
        """There is no leaf larger than a page."""
        _single(order)

    def guest_unmap(self, gfn: Gfn, pfn: Pfn, *, flush: bool = True) -> bool:
        """Unmap it; flushed, if it is to be, even where nothing was mapped."""
        if self.gfn_of(pfn) == gfn:
            with self._flushing(flush):
                self._vm.unmap(gfn)
            return True
        if flush:
            self._vm.pgt.tlbs.flush_range(gfn_to_gpa(gfn), PAGE)
        return False

    @contextmanager
    def _flushing(self, flush: bool) -> Iterator[None]:
        table = self._vm.pgt
        kept = table.tlbs
        if not flush:
            table.tlbs = _NoFlush(kept.tlbs, kept.vmid)
        try:
            yield
        finally:
            table.tlbs = kept

    def gfn_of(self, pfn: Pfn) -> Gfn | None:
        """The gfn that maps the page, by the guest's table."""
        ipa = self._vm.ipa_of(pfn_to_pa(pfn))
        return None if ipa is None else gpa_to_gfn(ipa)

    def scrub(self, pfn: Pfn) -> None:
        """Zero the page, past all stages of translation."""
        self._el2.ram.zero(self._pa(pfn), PAGE)

    def zeroed(self, pfn: Pfn) -> None:
        """Zeros, which are expected."""
        self.scrub(pfn)
        self.forget(pfn)

    def lose(self, pfn: Pfn, how: str) -> None:
        """Whether it was asked for is not looked at here."""
        self.zeroed(pfn)

    def destroy(self, pfn: Pfn, gfn: Gfn, how: str) -> None:
        """Scrub the page, and remember that the guest has lost it."""
        self.scrub(pfn)
        self._el2.poisoned.add((self._vm.vmid, gfn))

    def poisoned(self, gfn: Gfn) -> bool:
        """Whether its page was destroyed."""
        return (self._vm.vmid, gfn) in self._el2.poisoned

    def locked_in(self, pfn: Pfn) -> bool:
        """Whether the guest holds on to the page, by the model's record."""
        return pfn in self._el2.locked

    def set_locked_in(self, pfn: Pfn, locked: bool) -> None:
        """Record that the guest holds on to it, or lets go."""
        (self._el2.locked.add if locked else self._el2.locked.discard)(pfn)

    def declassify(self, pfn: Pfn) -> None:
        """The guest agrees that the host reads the page."""
        self.declassified = True

    def forget(self, pfn: Pfn) -> None:
        """No one relies on the contents any more."""
        self.forgot = True

    def vm_alive(self) -> bool:
        """Whether the VM runs."""
        return self._alive

    def refuse(self, call: str, errno: int) -> int:
        """Return -errno, and remember that this is a rule and not a failure."""
        self.refused = True
        return -errno


class _NoFlush(Maintenance):
    # NOSYNC: entries change, and no TLB is told.
    @override
    def flush_ipa(self, ipa: Ipa, level: int) -> None:
        pass

    @override
    def flush_range(self, ipa: Ipa, size: int) -> None:
        pass

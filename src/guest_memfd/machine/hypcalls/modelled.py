"""A hypervisor that is given by its model, a third party's: its hypercalls are calls of the model, by their names.

The model's code runs on real tables here (el2/modelled) as it runs on bytes on the abstract host. It is about single pages;
it has no numbers for hypercalls, so a running guest makes none, and it is not told of what a running guest touches:
`guest_consents` and `guest_touches` are for the single accesses of lock step and of schedules.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from guest_memfd.compat import override
from guest_memfd.core.hypervisor import Hypervisor
from guest_memfd.errors import BadInput, PluginError
from guest_memfd.machine.el2.modelled.el2 import ModelledEl2, ModelledStage2
from guest_memfd.machine.hw.buddy import OutOfMemory
from guest_memfd.machine.hypcalls.driver import GuestRan
from guest_memfd.machine.hypcalls.hardware import Hardware
from guest_memfd.machine.hypcalls.kvm import KvmVms
from guest_memfd.machine.hypcalls.vm import Vm
from guest_memfd.plugins.guard import Guard
from guest_memfd.words.pagestate import RUNNING
from guest_memfd.words.primitives import Folio
from guest_memfd.words.units import Gfn, Ipa, Pa, pa_to_pfn, pfn_to_pa

_TABLES = 8
"""Pages that a hypercall may need for tables: four levels of the host's, three of the guest's, and one."""


class ModelledDriver(KvmVms):
    """Raises BadInput for a hypervisor that takes pages by force: the abort of its host would need pKVM's handler."""

    def __init__(self, hardware: Hardware, hypervisor: Hypervisor) -> None:
        super().__init__(hardware, hypervisor)
        if hypervisor.force_reclaim is not Hypervisor.force_reclaim:
            raise BadInput(f"hypervisor {hypervisor.name!r} takes pages by force: no emulated machine but pkvm's can")
        if hypervisor.exports is not Hypervisor.exports:
            raise BadInput(f"hypervisor {hypervisor.name!r} exports what the host touches, which no emulated machine can")
        self.tables = hardware.el2_pool
        self.el2 = ModelledEl2(hypervisor, hardware.ram, self.tables, hardware.tlbs)

    # -- hypercalls ----------------------------------------------------------------------------------------------

    @override
    def call(self, vm: Vm, name: str, args: tuple[Any, ...]) -> int:
        """Run the model's code. Raises PluginError for what it raises, returns wrongly, or has not; BadInput."""
        code = self.hypervisor.hypercalls.get(name)
        if code is None:
            raise PluginError(f"hypervisor {self.hypervisor.name!r} has no hypercall {name!r}; it has "
                              f"{', '.join(self.hypervisor.hypercalls)}")
        large = next((arg for arg in args if isinstance(arg, Folio) and arg.order), None)
        if large is not None:
            raise BadInput(f"hypervisor {self.hypervisor.name!r} is given by a model of single pages: no {large}")
        # The model has no way back from the middle of a call, so pages for tables are looked for before it begins.
        if not self._room() and name in self.hypervisor.fallible:
            return self.hypervisor.fallible[name]
        stage2 = self._stage2(vm)
        with self._guard(f"hypercall {name!r}"):
            ret = code(stage2, *args)
            wrong = self.hypervisor.wrong_result(name, ret)
            if wrong is not None:
                raise PluginError(wrong)
        self.sanitised = stage2.forgot
        self.rules = frozenset({(name, ret)} if stage2.refused else ())
        return ret

    # Whether EL2's pool gives as many pages as any call may need; an allocation that is made to fail is one of these.
    def _room(self) -> bool:
        taken: list[Pa] = []
        try:
            taken += (self.tables.alloc() for _ in range(_TABLES))
        except OutOfMemory:
            return False
        finally:
            for pa in taken:
                self.tables.free(pa)
        return True

    def _stage2(self, vm: Vm) -> ModelledStage2:
        return ModelledStage2(self.el2, vm.handle, vm.state == RUNNING)

    def _guard(self, what: str) -> Guard:
        return Guard(f"{what} of hypervisor {self.hypervisor.name!r}", PluginError, timed=True)

    # -- records and tables --------------------------------------------------------------------------------------

    @override
    def not_the_hosts(self) -> Iterator[tuple[Pa, Pa, str]]:
        """From the model's record."""
        for pfn, (owner, _) in self.el2.owners.items():
            yield pfn_to_pa(pfn), pfn_to_pa(pfn + 1), f"is {owner} by the hypervisor's record"

    @override
    def leftovers(self) -> Iterator[str]:
        """VMs that EL2 still knows."""
        yield from (f"VM {vmid} exists" for vmid in self.el2.vms)

    @override
    def host_touches(self, pa: Pa) -> None:
        """The first store is a stage-2 fault, which maps the page."""
        if self.el2.host is not None:
            self.el2.host.fill(pa)

    @override
    def locked_in(self, vm: Vm, pa: Pa) -> bool:
        """By the model's record."""
        return pa_to_pfn(pa) in self.el2.locked

    @override
    def poisoned(self, vm: Vm, gfn: Gfn) -> bool:
        """Whether the model has destroyed the page there."""
        return (vm.vmid, gfn) in self.el2.poisoned

    # -- the guest acts ------------------------------------------------------------------------------------------

    @override
    def guest_access(self, vm: Vm, ipa: Ipa, write: bool, token: bytes) -> GuestRan:
        """As any guest's; where the table led there, the model is told."""
        ran = super().guest_access(vm, ipa, write, token)
        if ran.exit is None and self.lookup(vm, ipa) == ran.pa:
            with self._guard("guest_touches"):
                self.hypervisor.guest_touches(self._stage2(vm), pa_to_pfn(ran.pa))
        return ran

    @override
    def guest_consents(self, vm: Vm, ipa: Ipa) -> bool:
        """The model's own way of letting go; True if the guest has agreed that the host reads the page."""
        pa, stage2 = self.lookup(vm, ipa), self._stage2(vm)
        assert pa is not None
        with self._guard("guest_consents"):
            self.hypervisor.guest_consents(stage2, pa_to_pfn(pa))
        self.forgets = stage2.forgot
        return stage2.declassified

    # -- VMs -------------------------------------------------------------------------------------------------------

    @override
    def vm_destroyed(self, vm: Vm) -> None:
        """As any VM of KVM's; the model's VMID may be another's soon, so what it has destroyed is forgotten."""
        super().vm_destroyed(vm)
        self.el2.poisoned = {(vmid, gfn) for vmid, gfn in self.el2.poisoned if vmid != vm.vmid}

"""Mistakes planted in the machine, each of a kind that kernels and hypervisors really had: lock step must catch them all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from schedules import steps

from guest_memfd.lockstep import refinement
from guest_memfd.lockstep.refinement import Diverged
from guest_memfd.machine.el2.gunyah import donate, private
from guest_memfd.machine.el2.gunyah.addrspace import AddressSpace
from guest_memfd.machine.el2.gunyah.el2 import Gunyah
from guest_memfd.machine.el2.gunyah.memdb import MemDb
from guest_memfd.machine.el2.gunyah.stage2 import GunyahStage2Table as GunyahTable
from guest_memfd.machine.el2.kvm.tlb import Maintenance
from guest_memfd.machine.el2.pkvm import transitions
from guest_memfd.machine.el2.pkvm.host_stage2 import HostStage2
from guest_memfd.machine.hw.arm64 import descriptor as d
from guest_memfd.machine.hw.arm64 import tlbi
from guest_memfd.machine.hw.arm64.tlb import Tlb
from guest_memfd.machine.hw.ram import Ram
from guest_memfd.machine.hypcalls.driver import Driver
from guest_memfd.machine.linux import mm
from guest_memfd.machine.linux.direct_map import KernelTable
from guest_memfd.machine.linux.extable import ExceptionTable
from guest_memfd.machine.linux.folio import LinuxFolio
from guest_memfd.machine.linux.kernel_flush import KernelFlush
from guest_memfd.machine.linux.linear_map import LinearMap
from guest_memfd.machine.linux.maple import MapleTree
from guest_memfd.machine.linux.rwsem import Rwsem
from guest_memfd.machine.primitives import files, guest
from guest_memfd.machine.primitives.host import EmulatedHost
from guest_memfd.words.units import PAGE

SCHEDULES = 150
"""A mistake has to show within so many."""

Plant = Callable[[pytest.MonkeyPatch], None]
MISTAKES: dict[str, tuple[str, str, tuple[str, ...], str | None, Plant]] = {}


def mistake(
    hypervisor: str, *parties: str, design: str = "library", scene: str | None = None,
) -> Callable[[Plant], Plant]:
    """Register a mistake to be looked for under *hypervisor* with *parties* (none: any) in *scene* (None: the plainest)."""
    def register(plant: Plant) -> Plant:
        MISTAKES[plant.__name__] = (hypervisor, design, parties, scene, plant)
        return plant

    return register


# -- the linear map ------------------------------------------------------------------------------------------------


def _pageattr(patch: pytest.MonkeyPatch, change: Callable[[int, int, int, int], tuple[int, int, int, int]]) -> None:
    right = LinearMap._update_range_prot
    patch.setattr(LinearMap, "_update_range_prot", lambda self, *args: right(self, *change(*args)))


@mistake("kvm", "vcpu", "zeropad")
def the_hole_stays_valid(patch: pytest.MonkeyPatch) -> None:
    _pageattr(patch, lambda pa, nr, on, off: (pa, nr, on, off & ~d.VALID))


@mistake("kvm", "vcpu", "vmm")
def the_hole_is_one_page_further_on(patch: pytest.MonkeyPatch) -> None:
    _pageattr(patch, lambda pa, nr, on, off: (pa + PAGE, nr, on, off))


@mistake("gunyah", "vcpu", "vmm", "stop")
def a_restored_page_is_read_only(patch: pytest.MonkeyPatch) -> None:
    _pageattr(patch, lambda pa, nr, on, off: (pa, nr, on | d.AP_RO if on & d.VALID else on, off & ~d.AP_RO))


@mistake("kvm", "vcpu", "vmm")
def a_restored_page_has_no_access_flag(patch: pytest.MonkeyPatch) -> None:
    _pageattr(patch, lambda pa, nr, on, off: (pa, nr, on, off | d.AF if on & d.VALID else off))


@mistake("kvm", "vcpu", "vmm")
def the_kernel_flush_is_forgotten(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(KernelFlush, "__call__", lambda self, start, end: None)


@mistake("kvm", "vcpu", "vmm")
def the_kernel_flush_ends_a_page_early(patch: pytest.MonkeyPatch) -> None:
    right = KernelFlush.__call__
    patch.setattr(KernelFlush, "__call__", lambda self, start, end: right(self, start, end - PAGE))


@mistake("kvm", "vcpu", "vmm")
def the_kernel_flush_stays_on_one_cpu(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(tlbi, "vaale1is", lambda tlbs, va, vmid, level=None: tlbi.vaale1(tlbs[1], va, vmid, level))
    patch.setattr(tlbi, "rvaale1is", lambda tlbs, start, size, vmid, level=None: None)


@mistake("gunyah", "vcpu", "vmm", design="secretmem")
def the_kernel_flush_is_for_another_vmid(patch: pytest.MonkeyPatch) -> None:
    right = LinearMap.__init__
    patch.setattr(LinearMap, "__init__", lambda self, *args, **kw: right(self, *args, **kw | {"vmid": lambda: 0}))


@mistake("kvm", "vcpu", "vcpu2")
def a_split_shifts_the_new_table_by_one(patch: pytest.MonkeyPatch) -> None:
    right = KernelTable.fill
    patch.setattr(KernelTable, "fill", lambda self, table, index, values: right(
        self, table, index, values[1:] + values[:1] if len(values) == 512 and values[0] & 3 == 3 else values))


@mistake("kvm", "vcpu", "vcpu2", "zeropad")
def the_zeropad_load_has_no_table_entry(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ExceptionTable, "search", lambda self, pc: None)


# -- user mappings -------------------------------------------------------------------------------------------------


@mistake("kvm", "vmm", "device")
def user_entries_go_and_their_tlb_entries_stay(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(tlbi, "vae1is", lambda *args: None)


@mistake("kvm", "vmm", "vmm2", "device")
def only_the_first_vma_is_flushed(patch: pytest.MonkeyPatch) -> None:
    right, second = tlbi.vae1is, mm.FIRST + mm.CHUNK * PAGE
    patch.setattr(tlbi, "vae1is", lambda tlbs, va, asid, vmid: right(tlbs, va, asid, vmid) if va < second else None)


@mistake("kvm", "vmm")
def unmapping_leaves_out_the_last_page(patch: pytest.MonkeyPatch) -> None:
    right = mm.FileMapping.zap
    patch.setattr(mm.FileMapping, "zap", lambda self, start, nr: right(self, start, nr - 1) if nr > 1 else [])


@mistake("kvm", "vmm")
def user_pages_are_read_only(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(mm, "USER_PAGE", mm.USER_PAGE | d.AP_RO)


# -- KVM's and pKVM's stage 2 --------------------------------------------------------------------------------------


@mistake("kvm", "vcpu", "vmm")
def a_guest_page_is_unmapped_without_a_flush(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Maintenance, "flush_ipa", lambda self, ipa, level: None)
    patch.setattr(Maintenance, "flush_range", lambda self, ipa, size: None)


@mistake("pkvm", "vcpu", "kcore", design="none")
def combined_entries_outlive_the_donation(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Maintenance, "flush_ipa", lambda self, ipa, level: tlbi.ipas2e1is(self.tlbs, ipa, self.vmid, level))
    patch.setattr(Maintenance, "flush_range", lambda self, ipa, size: tlbi.ripas2e1is(self.tlbs, ipa, size, self.vmid))


@mistake("pkvm", "vcpu", "zeropad", design="none")
def a_donated_page_is_not_annotated(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(HostStage2, "give_away", lambda self, pfn, order, owner, handle=0, gfn=0: None)


@mistake("pkvm", "vcpu", "stop")
def a_reclaimed_page_is_not_zeroed(patch: pytest.MonkeyPatch) -> None:
    right = Ram.zero
    patch.setattr(transitions, "reclaim_dying_guest_page", _without_zero(transitions.reclaim_dying_guest_page, right))


def _without_zero(call: Callable[..., int], zero: Callable[..., None]) -> Callable[..., int]:
    def run(el2: Any, *args: Any) -> int:
        Ram.zero = lambda self, pa, nr: None  # type: ignore[method-assign]
        try:
            return call(el2, *args)
        finally:
            Ram.zero = zero  # type: ignore[method-assign]

    return run


@mistake("pkvm", "vcpu", "vmm")
def sharing_with_the_host_does_not_let_it_in(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(HostStage2, "take_back", lambda self, pfn, order: None)


@mistake("pkvm", "vcpu", "vmm")
def a_page_is_given_to_the_guest_twice(patch: pytest.MonkeyPatch) -> None:
    right = transitions._set
    patch.setattr(transitions, "_set", lambda el2, pfn, order, host, *rest, **kw: None if host.name == "NOPAGE" else right(
        el2, pfn, order, host, *rest, **kw))


# -- Gunyah --------------------------------------------------------------------------------------------------------


@mistake("gunyah", "vcpu", "zeropad")
def the_host_keeps_its_mapping_of_a_lent_page(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(AddressSpace, "withdraw", lambda self, start, end, distance, stock: None)


@mistake("gunyah", "vcpu", "vcpu2", "vmm", design="none")
def the_host_keeps_its_tlb_entries_of_a_lent_page(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(GunyahTable, "sync_all", lambda self: None)


@mistake("gunyah", "vcpu", "vmm")
def a_guest_page_is_unmapped_and_not_synchronised(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(GunyahTable, "sync", lambda self, start, end: None)


@mistake("gunyah", "vcpu", "vmm", design="gunyah-v17")
def nosync_synchronises_nevertheless(patch: pytest.MonkeyPatch) -> None:
    right = AddressSpace._unmap_partial
    patch.setattr(AddressSpace, "_unmap_partial", lambda self, extent, vbase, kind, start, end, sync: right(
        self, extent, vbase, kind, start, end, True))


@mistake("gunyah", "vcpu", "vmm")
def unlocking_leaves_the_page_locked(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(private, "unlock", lambda value, keep, relock: value)


@mistake("gunyah", "vcpu", "stop")
def a_page_of_a_dead_guest_is_not_sanitised(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(AddressSpace, "sanitise", lambda self, gone: None)


@mistake("gunyah", "vcpu", "vmm")
def a_donation_changes_no_owner(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(MemDb, "change", lambda self, start, end, old, new: None)


@mistake("gunyah", "vcpu", "stop")
def a_mapped_page_is_taken_back(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(AddressSpace, "maps_any", lambda self, start, end: False)
    patch.setattr(AddressSpace, "unmap", lambda self, *args: None)


@mistake("gunyah", "vcpu", "vcpu2", "zeropad", design="none")
def the_abort_is_of_the_other_kind(patch: pytest.MonkeyPatch) -> None:
    right = Gunyah.__init__
    patch.setattr(Gunyah, "__init__", lambda self, *args, **kw: right(self, *args, **kw | {"inject": "fixable"}))


@mistake("gunyah", "vcpu", "zeropad")
def a_donation_is_one_page_too_long(patch: pytest.MonkeyPatch) -> None:
    right = donate._move_mappings
    patch.setattr(donate, "_move_mappings", lambda pages, spaces, source, to, start, end, options: right(
        pages, spaces, source, to, start + PAGE, end + PAGE, options))


# -- Linux's books -------------------------------------------------------------------------------------------------


@mistake("kvm", "device", "vmm")
def a_speculative_reference_is_kept(patch: pytest.MonkeyPatch) -> None:
    right = LinuxFolio.drop
    patch.setattr(LinuxFolio, "drop", lambda self, kind, nr=1: False if kind == "spec" else right(self, kind, nr))


@mistake("kvm", "vmm", "vcpu")
def draining_forgets_a_batch(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(EmulatedHost, "lru_add_drain_all", lambda self: None)


@mistake("kvm", "vmm", "vcpu", "vcpu2", "device")
def readers_overtake_a_queued_writer(patch: pytest.MonkeyPatch) -> None:
    def down_read(self: Rwsem) -> bool:
        if self.writer is not None:
            return False
        self.readers += 1
        return True

    patch.setattr(Rwsem, "down_read", down_read)


@mistake("kvm", "vmm")
def a_range_store_is_one_entry_short(patch: pytest.MonkeyPatch) -> None:
    from guest_memfd.words.primitives import Entries

    right = MapleTree.store
    patch.setattr(MapleTree, "store", lambda self, start, values: right(
        self, start, Entries(values.first, max(len(values) - 1, 1), values.step)))


@mistake("kvm", "vcpu", "vmm")
def by_address_removes_no_combined_entry(patch: pytest.MonkeyPatch) -> None:
    right = Tlb.drop_va

    def drop_va(self: Tlb, vmid: int, asid: int | None, start: int, size: int, level: int | None, last_only: bool) -> None:
        kept = [e for e in self.entries() if e.kind == "combined"]
        right(self, vmid, asid, start, size, level, last_only)
        for entry in kept:
            self.insert(entry)

    patch.setattr(Tlb, "drop_va", drop_va)


# -- what only some scenes have --------------------------------------------------------------------------------------


@mistake("gunyah", "vcpu", "vcpu2", design="gunyah-v17", scene="crossed")
def what_is_provided_ends_with_the_file(patch: pytest.MonkeyPatch) -> None:
    right = files._store
    patch.setattr(files, "_store", lambda host, tree, start, values: (
        right(host, tree, start, values) if start < host.inode.size else None))


@mistake("kvm", "vcpu", "vmm-pages", scene="both-shared")
def only_the_first_folio_of_a_batch_is_flushed(patch: pytest.MonkeyPatch) -> None:
    right = EmulatedHost.flush_tlb_kernel_range
    patch.setattr(EmulatedHost, "flush_tlb_kernel_range", lambda self, folios: right(self, folios[:1]))


@mistake("kvm", "vmm-any", "vmm2", scene="unbound")
def a_vm_hears_of_files_that_it_has_not_bound(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(guest, "_is_bound", lambda host, what: True)


@mistake("kvm", "creator", "stop", scene="nothing-yet")
def a_vm_that_has_stopped_is_bound_all_the_same(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(EmulatedHost, "vm_state", lambda self: "running")


@mistake("gunyah", "vcpu", "vcpu2", "stop", scene="for-good")
def what_was_refused_for_good_is_given_back_in_the_end(patch: pytest.MonkeyPatch) -> None:
    right = Driver.hypercall

    def hypercall(self: Driver, vm: Any, name: str, args: tuple[Any, ...]) -> int:
        refused = self.keeps(name, args)
        ret = right(self, vm, name, args)
        if refused:
            self.stuck.clear()
        return ret

    patch.setattr(Driver, "hypercall", hypercall)


@mistake("gunyah", "vcpu", "vcpu2", "stop", scene="for-good")
def a_leaked_page_is_not_counted(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(EmulatedHost, "leak_folio", lambda self, folio: self.page(folio).take("kept"))


@mistake("kvm", "creator", "vcpu", scene="no-direct-map-changes")
def the_setters_work_after_all(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(LinearMap, "can_set_direct_map", lambda self: True)


@mistake("kvm", "vmm", "drainer", scene="quiet-free")
def the_allocator_writes_to_what_it_frees(patch: pytest.MonkeyPatch) -> None:
    right = refinement.kernel_of
    patch.setattr(refinement, "kernel_of", lambda scene: {**right(scene), "on_free": "poison"})


@mistake("kvm", "vcpu", "vcpu2", "memory-failure")
def memory_failure_is_never_done_with_a_page(patch: pytest.MonkeyPatch) -> None:
    right = EmulatedHost.memory_failure_done

    def memory_failure_done(self: EmulatedHost, folio: Any, result: str) -> None:
        right(self, folio, result)
        self.page(folio).handled = set()

    patch.setattr(EmulatedHost, "memory_failure_done", memory_failure_done)


@pytest.mark.parametrize("name", MISTAKES)
def test_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hypervisor, design, parties, scene, plant = MISTAKES[name]
    plant(monkeypatch)
    with pytest.raises(Diverged):
        steps(hypervisor, design, range(SCHEDULES), parties or None, scene)


def test_there_are_enough_of_them() -> None:
    assert len(MISTAKES) >= 40

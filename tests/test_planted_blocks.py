"""Mistakes planted in what the machine does to large folios and large leaves: lock step, or the audit, must catch them all.

The form is that of test_planted_machine.py. A schedule that shows each is named, so that few have to be tried.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
from schedules import steps

from guest_memfd.lockstep.refinement import Diverged
from guest_memfd.machine.el2.gunyah import donate, private
from guest_memfd.machine.el2.gunyah.addrspace import AddressSpace
from guest_memfd.machine.el2.gunyah.stage2 import GunyahStage2Table, Stock
from guest_memfd.machine.el2.kvm import pgtable
from guest_memfd.machine.el2.kvm.pgtable import KvmStage2Table
from guest_memfd.machine.el2.kvm.tlb import Maintenance
from guest_memfd.machine.el2.pkvm import transitions
from guest_memfd.machine.el2.pkvm.host_stage2 import HostStage2
from guest_memfd.machine.hw.arm64 import descriptor as d
from guest_memfd.machine.hw.arm64 import tlbi
from guest_memfd.machine.hw.arm64.tlb import Tlb
from guest_memfd.machine.hw.buddy import Buddy
from guest_memfd.machine.hw.ram import Ram
from guest_memfd.machine.linux import direct_map as dm
from guest_memfd.machine.linux.folio import LinuxFolio
from guest_memfd.machine.linux.leaf_split import SplitTable
from guest_memfd.machine.linux.linear_map import LinearMap
from guest_memfd.machine.primitives import pagecache
from guest_memfd.machine.primitives.host import EmulatedHost
from guest_memfd.words.units import PAGE

BLOCK = PAGE << 9
TRIED = 3
"""Within so many schedules a mistake has to show, from the one that is named on."""

Plant = Callable[[pytest.MonkeyPatch], None]


class Planted(NamedTuple):
    """A mistake, and the schedules that show it."""

    plant: Plant
    hypervisor: str
    scene: str
    seed: int
    parties: tuple[str, ...]


MISTAKES: dict[str, Planted] = {}


def mistake(hypervisor: str, scene: str, seed: int, *parties: str) -> Callable[[Plant], Plant]:
    """Register a mistake that schedules of *parties* (none: any) in *scene* show, from *seed* on."""
    def register(plant: Plant) -> Plant:
        MISTAKES[plant.__name__] = Planted(plant, hypervisor, scene, seed, parties)
        return plant

    return register


# -- the linear map ------------------------------------------------------------------------------------------------


@mistake("kvm", "large-folio", 7, "vcpu", "vmm")
def a_split_shifts_the_pages_of_the_linear_map(patch: pytest.MonkeyPatch) -> None:
    right = SplitTable.fill
    patch.setattr(SplitTable, "fill", lambda self, table, index, values: right(
        self, table, index, values[1:] + values[:1] if len(values) == 512 else values))


@mistake("kvm", "large-folio", 7, "vcpu", "vmm")
def a_split_hole_is_mapped_again(patch: pytest.MonkeyPatch) -> None:
    right = SplitTable.fill
    patch.setattr(SplitTable, "fill", lambda self, table, index, values: right(
        self, table, index, [value | dm.VALID for value in values] if len(values) == 512 else values))


@mistake("kvm", "large-folio", 7, "vcpu", "vmm")
def a_split_leaves_the_second_half_out(patch: pytest.MonkeyPatch) -> None:
    right = SplitTable.fill
    patch.setattr(SplitTable, "fill", lambda self, table, index, values: right(
        self, table, index, values[:256] + [0] * 256 if len(values) == 512 else values))


@mistake("kvm", "large-folio", 0, "vcpu", "vmm")
def the_hole_of_a_block_is_one_page(patch: pytest.MonkeyPatch) -> None:
    right = LinearMap.set_direct_map_invalid_noflush
    patch.setattr(LinearMap, "set_direct_map_invalid_noflush", lambda self, pa, nr=1: right(self, pa, 1))


@mistake("kvm", "large-folio", 2, "vcpu", "vmm", "stop")
def half_of_a_block_is_put_back(patch: pytest.MonkeyPatch) -> None:
    right = LinearMap.set_direct_map_default_noflush
    patch.setattr(LinearMap, "set_direct_map_default_noflush", lambda self, pa, nr=1: right(self, pa, max(nr // 2, 1)))


@mistake("kvm", "large-folio", 7, "vcpu", "vmm")
def the_direct_map_is_not_split_with_the_folio(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(LinearMap, "split_to_pages", lambda self, pa, nr: 0)


@mistake("kvm", "large-folio", 0, "vcpu", "vmm")
def the_flush_of_a_block_stays_on_one_cpu(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(tlbi, "vaale1is", lambda tlbs, va, vmid, level=None: tlbi.vaale1(tlbs[1], va, vmid, level))
    patch.setattr(tlbi, "rvaale1is", lambda tlbs, start, size, vmid, level=None: None)
    patch.setattr(tlbi, "vmalle1is", lambda tlbs, vmid: None)


@mistake("kvm", "large-folio", 21, "vcpu", "vmm")
def the_entry_of_a_block_outlives_the_flush_of_a_page(patch: pytest.MonkeyPatch) -> None:
    right = Tlb.drop_va

    def drop_va(self: Tlb, vmid: int, asid: int | None, start: int, size: int, level: int | None, last_only: bool) -> None:
        kept = [entry for entry in self.entries() if entry.kind != "stage2" and size < BLOCK <= entry.size]
        right(self, vmid, asid, start, size, level, last_only)
        for entry in kept:
            self.insert(entry)

    patch.setattr(Tlb, "drop_va", drop_va)


# -- folios --------------------------------------------------------------------------------------------------------


@mistake("kvm", "large-folio", 14, "vcpu", "vmm")
def a_split_marks_the_first_page_alone(patch: pytest.MonkeyPatch) -> None:
    right = pagecache.split_folio

    def split_folio(self: EmulatedHost, folio: Any) -> int:
        ret = right(self, folio)
        for at in range(1, folio.nr if not ret else 1):
            self.machine.pages[folio.pfn + at].no_direct_map = False
        return ret

    patch.setattr(EmulatedHost, "split_folio", split_folio)


@mistake("kvm", "large-folio", 14, "vcpu", "vmm")
def a_split_forgets_that_pages_are_zeroed(patch: pytest.MonkeyPatch) -> None:
    right = pagecache.split_folio

    def split_folio(self: EmulatedHost, folio: Any) -> int:
        ret = right(self, folio)
        for at in range(folio.nr // 2, folio.nr if not ret else 0):
            self.machine.pages[folio.pfn + at].uptodate = False
        return ret

    patch.setattr(EmulatedHost, "split_folio", split_folio)


@mistake("kvm", "large-folio", 2, "vcpu", "memory-failure", "vmm")
def a_folio_that_someone_refers_to_is_split(patch: pytest.MonkeyPatch) -> None:
    right = pagecache.split_folio

    def split_folio(self: EmulatedHost, folio: Any) -> int:
        page = self.page(folio)
        held, page.refcount = page.refcount, page.nr + 1
        ret = right(self, folio)
        page.refcount = held
        return ret

    patch.setattr(EmulatedHost, "split_folio", split_folio)


@mistake("kvm", "mixed-block", 10, "vmm-pages", "memory-failure", "vcpu")
def pages_that_someone_refers_to_are_merged(patch: pytest.MonkeyPatch) -> None:
    def can_be_one(pages: list[LinuxFolio], order: int) -> bool:
        first = pages[0]
        return not first.pa % (PAGE << order) and all(
            page.pa == first.pa + at * PAGE and not page.order and page.lock is None for at, page in enumerate(pages))

    patch.setattr(pagecache, "_can_be_one", can_be_one)


@mistake("kvm", "mixed-block", 23, "vcpu", "vmm-pages")
def a_merged_folio_is_in_the_page_cache_once(patch: pytest.MonkeyPatch) -> None:
    right = pagecache.merge_folio

    def merge_folio(self: EmulatedHost, index: Any, order: int) -> bool:
        done = right(self, index, order)
        if done:
            self.inode.pages[index].drop("cache", (1 << order) - 1)
        return done

    patch.setattr(EmulatedHost, "merge_folio", merge_folio)


@mistake("kvm", "large-folio", 2, "vcpu", "memory-failure", "vmm")
def the_first_page_is_broken_whichever_is_reported(patch: pytest.MonkeyPatch) -> None:
    right = EmulatedHost.hwpoison

    def hwpoison(self: EmulatedHost, index: Any) -> Any:
        page = self.inode.find(index)
        return right(self, page.index if page is not None else index)

    patch.setattr(EmulatedHost, "hwpoison", hwpoison)


@mistake("kvm", "large-folio", 2, "vcpu", "memory-failure", "vmm")
def a_block_of_which_a_page_is_broken_is_kept(patch: pytest.MonkeyPatch) -> None:
    def free_the_others(host: Any, page: LinuxFolio) -> None:
        page.retired = True

    patch.setattr(pagecache, "_free_the_others", free_the_others)


@mistake("kvm", "mixed-block", 0, "vcpu", "vmm-pages")
def of_a_block_one_page_is_freed(patch: pytest.MonkeyPatch) -> None:
    right = Buddy.free
    patch.setattr(Buddy, "free", lambda self, pa, order=0: right(self, pa, 0 if order == 9 and self.by_address else order))


# -- KVM's and pKVM's stage 2 --------------------------------------------------------------------------------------


@mistake("kvm", "large-folio", 1, "vcpu", "vmm")
def the_flush_of_a_guest_block_names_the_wrong_level(patch: pytest.MonkeyPatch) -> None:
    right = Maintenance.flush_ipa
    patch.setattr(Maintenance, "flush_ipa", lambda self, ipa, level: right(self, ipa, 3))
    patch.setattr(Maintenance, "flush_range", lambda self, ipa, size: None)


@mistake("pkvm", "large-folio", 1, "vcpu", "vmm")
def a_guest_block_is_split_one_page_off(patch: pytest.MonkeyPatch) -> None:
    right = pgtable.page_of
    patch.setattr(transitions, "page_of", lambda entry, number: right(entry, number ^ 1))


@mistake("pkvm", "large-folio", 0, "vcpu", "vmm")
def a_guest_block_is_split_without_a_break(patch: pytest.MonkeyPatch) -> None:
    right = KvmStage2Table._replace

    def replace(self: KvmStage2Table, ia: Any, entry: Any, value: int) -> None:
        if entry.valid and entry.order and d.kind(value, entry.level) == "table":
            self._write(ia, entry, value)
        else:
            right(self, ia, entry, value)

    patch.setattr(KvmStage2Table, "_replace", replace)


@mistake("pkvm", "large-folio", 1, "vcpu", "vmm")
def a_split_guest_block_forgets_who_owns_its_pages(patch: pytest.MonkeyPatch) -> None:
    right = pgtable.page_of
    state = 3 << pgtable.STATE_SHIFT
    patch.setattr(transitions, "page_of", lambda entry, number: right(entry, number) & ~state | 2 << pgtable.STATE_SHIFT)


@mistake("pkvm", "large-folio", 1, "vcpu", "vmm")
def the_note_of_a_block_is_lost_in_a_split(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(HostStage2, "_note_of", lambda self, entry, number: 0)


@mistake("pkvm", "large-folio", 2, "vcpu", "stop")
def of_a_reclaimed_block_the_first_page_is_zeroed(patch: pytest.MonkeyPatch) -> None:
    right = Ram.zero
    patch.setattr(Ram, "zero", lambda self, pa, nr: right(self, pa, PAGE if nr == BLOCK else nr))


@mistake("pkvm", "large-folio", 2, "vcpu", "stop")
def of_a_donated_block_one_page_is_recorded(patch: pytest.MonkeyPatch) -> None:
    right = transitions._set
    patch.setattr(transitions, "_set", lambda el2, pfn, order, *args, **kw: right(el2, pfn, 0, *args, **kw))


# -- Gunyah --------------------------------------------------------------------------------------------------------


def _split(patch: pytest.MonkeyPatch, change: Callable[[int, int], int]) -> None:
    right = GunyahStage2Table._split

    def split(self: GunyahStage2Table, block: Any, stock: Stock) -> None:
        right(self, block, stock)
        table = self._ram.read64(block.address) & d.ADDRESS
        for at in range(512):
            value = self._ram.read64(table + 8 * at)
            self._ram.write64(table + 8 * at, change(at, value))

    patch.setattr(GunyahStage2Table, "_split", split)


@mistake("gunyah", "large-folio", 3, "vcpu", "vmm")
def a_split_block_of_gunyah_is_not_locked(patch: pytest.MonkeyPatch) -> None:
    _split(patch, lambda at, value: value & ~private.LOCKED)


@mistake("gunyah", "large-folio", 3, "vcpu", "vmm")
def a_split_block_of_gunyah_is_private_in_part(patch: pytest.MonkeyPatch) -> None:
    _split(patch, lambda at, value: value & ~private.PRIVATE if at >= 256 else value)


@mistake("gunyah", "large-folio", 3, "vcpu", "vmm")
def a_split_block_of_gunyah_is_one_page_off(patch: pytest.MonkeyPatch) -> None:
    _split(patch, lambda at, value: value ^ PAGE)


@mistake("gunyah", "large-folio", 7, "vcpu", "vmm")
def all_of_a_block_goes_with_one_page(patch: pytest.MonkeyPatch) -> None:
    def unmap(self: AddressSpace, extent: Any, vbase: Any, kind: str, start: Any, end: Any, sync: bool) -> None:
        head = vbase & -BLOCK
        if self.table.leaf(vbase).size == BLOCK:
            vbase, start, end = head, start - (vbase - head), start - (vbase - head) + BLOCK
        right(self, extent, vbase, kind, start, end, sync)

    right = AddressSpace._unmap_partial
    patch.setattr(AddressSpace, "_unmap_partial", unmap)


@mistake("gunyah", "large-folio", 3, "vcpu", "vmm")
def all_of_a_block_is_unlocked_with_one_page(patch: pytest.MonkeyPatch) -> None:
    right = AddressSpace.modify

    def without_cut(*args: Any) -> None:
        with pytest.MonkeyPatch.context() as while_it_is_modified:
            while_it_is_modified.setattr(GunyahStage2Table, "cut", lambda self, start, end, stock: None)
            right(*args)

    patch.setattr(AddressSpace, "modify", without_cut)


@mistake("gunyah", "large-folio", 2, "vcpu", "stop")
def of_a_dead_guests_block_one_page_is_sanitised(patch: pytest.MonkeyPatch) -> None:
    right = Ram.zero
    patch.setattr(Ram, "zero", lambda self, pa, nr: right(self, pa, PAGE if nr == BLOCK else nr))


@mistake("gunyah", "large-folio", 1, "vcpu", "vmm")
def half_of_a_donated_block_leaves_the_host(patch: pytest.MonkeyPatch) -> None:
    right = donate._move_mappings
    patch.setattr(donate, "_move_mappings", lambda pages, spaces, source, to, start, end, options: right(
        pages, spaces, source, to, start, start + max((end - start) // 2, PAGE), options))


@pytest.mark.parametrize("name", MISTAKES)
def test_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    planted = MISTAKES[name]
    planted.plant(monkeypatch)
    seeds = range(planted.seed, planted.seed + TRIED)
    with pytest.raises(Diverged):
        steps(planted.hypervisor, "library", seeds, planted.parties or None, planted.scene)


def test_there_are_enough_of_them() -> None:
    assert len(MISTAKES) >= 30

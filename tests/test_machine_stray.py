"""Ways to memory that is free, or that its file has given up: found while the machine runs, and by the audit at the end.

Each mistake is planted in the library or in the machine, beside the library and the machine as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from errno import EAGAIN
from typing import Any

import pytest
import schedules
from hypothesis import given
from hypothesis import strategies as given_by
from leave_out import without

from guest_memfd.core.gmem import Conversion, Held
from guest_memfd.core.ops import Reason
from guest_memfd.designs.design import Design
from guest_memfd.designs.ours import OurLibrary
from guest_memfd.hypervisors import HYPERVISORS
from guest_memfd.machine.boot import Config, Machine
from guest_memfd.machine.el2.kvm.tlb import Maintenance
from guest_memfd.machine.hw.arm64 import tlbi
from guest_memfd.machine.hw.arm64.reached import reached
from guest_memfd.machine.hw.arm64.tables import PageTable
from guest_memfd.machine.hw.buddy import Buddy
from guest_memfd.machine.hw.ram import Ram
from guest_memfd.machine.linux.mm import Mm
from guest_memfd.machine.primitives.host import EmulatedHost
from guest_memfd.uapi.kvm import SHARED
from guest_memfd.words.facts import Ended, StrayGuest
from guest_memfd.words.primitives import Folio, Primitive, Steps
from guest_memfd.words.units import PAGE

MIB = 1 << 20


class Punch(OurLibrary):
    """The library with something left out of its punch."""

    forgets: tuple[str, ...] = ()

    def remove_range(self, start: int, nr: int, reason: Reason) -> Steps[Conversion]:
        return (yield from without(super().remove_range(start, nr, reason), *self.forgets))


class LeavesUserEntries(Punch):
    forgets = ("unmap_mapping_pages",)


class LeavesCaches(Punch):
    forgets = ("gmem_invalidate_begin", "gmem_invalidate_end")


class LeavesTheGuest(Punch):
    forgets = ("hyp_call",)


class LeavesHoles(OurLibrary):
    """Neither flushes the hole it makes nor fills it."""

    def flush(self, folios: tuple[Folio, ...]) -> Steps[None]:
        yield from ()

    def return_to_kernel(self, held: Held, marked: bool) -> Steps[None]:
        if marked:
            yield from self.account(-held.folio.nr)


class Bound:
    """A file of two pages, page 1 shared, mapped by the VMM, bound at gfn 0; *design* serves it."""

    def __init__(self, design: type[Design], hypervisor: str = "kvm", **config: Any) -> None:
        self.machine = Machine(hypervisor, Config(ram=16 * MIB, **config))
        self.library = design(HYPERVISORS[hypervisor].ops(), 2)
        self.host = EmulatedHost(self.machine, self.machine.create_vm(2), 2)
        for procedure in (self.library.create(2, (1,)), self.library.bind(0, 0, 2), self.library.mmap()):
            assert self.host.run(procedure) == 0

    def touched(self) -> Folio:
        """The VMM has written to page 1."""
        assert self.host.run(self.library.user_fault(1)) == "ok"
        assert self.host.perform_by_name("user_access", 1, True) == "ok"
        page = self.host.inode.find(1)
        assert page is not None
        self.host.perform_by_name("lru_add_drain_all", caller="mm")
        return Folio(page.pa // PAGE)

    def given(self, index: int) -> Folio:
        """The guest has written to page *index*."""
        assert self.host.run(self.library.guest_fault(index, index)) == 0
        assert self.host.perform_by_name("guest_access", index, True, caller="guest") == "ok"
        self.host.perform_by_name("lru_add_drain_all", caller="mm")
        page = self.host.inode.find(index)
        assert page is not None
        return Folio(page.pa // PAGE)

    def punched(self, index: int) -> list[str]:
        """What is stray after page *index* has been punched out."""
        assert self.host.run(self.library.punch_hole(index, 1)) == (0, None)
        return self.machine.stray_mappings()


@pytest.mark.parametrize(("gfn", "stray"), [(0, False), (1, True)])
def test_a_guest_that_reaches_a_page_of_the_file_elsewhere_than_it_is_bound_is_stray(gfn: int, stray: bool) -> None:
    bound = Bound(OurLibrary)
    folio = bound.given(0)
    assert bound.host.perform_by_name("hyp_call", "mmu_map", gfn, folio, caller="kvm") == 0
    assert bound.host.perform_by_name("guest_access", gfn, True, caller="guest") == "ok"
    assert [note for note in bound.host.notes if isinstance(note, StrayGuest)] == (
        [StrayGuest(bound.machine.number(folio.pfn * PAGE), "guest mapping")] * stray)


def test_an_access_beside_every_vma_is_a_segmentation_fault() -> None:
    bound = Bound(OurLibrary)
    bound.touched()
    bound.host.run(bound.library.munmap())
    assert bound.host.perform_by_name("user_access", 1, False) == "SIGSEGV"
    bound.machine.vmm.mmap(bound.host.inode, 0, 1)
    assert bound.host.perform_by_name("user_access", 1, False) == "SIGSEGV"


def test_an_invalidation_of_one_file_leaves_a_cache_of_another_s_page() -> None:
    bound = Bound(OurLibrary)
    folio = bound.touched()
    other = EmulatedHost(bound.machine, bound.host.vm, 2)
    assert other.run(bound.library.create(2)) == 0
    assert other.run(bound.library.bind(2, 0, 2)) == 0
    assert bound.host.perform_by_name("gpc_begin", 1, caller="mm")
    assert bound.host.perform_by_name("gpc_commit", folio, caller="mm")
    for host, there in ((other, True), (bound.host, False)):
        host.perform_by_name("gmem_invalidate_begin", 1, 1, caller="mm")
        assert (bound.host.vm.gpc is not None) is there
        host.perform_by_name("gmem_invalidate_end", caller="mm")


def test_a_trylock_takes_it_now_or_says_what_stands_against_it() -> None:
    bound = Bound(OurLibrary)
    bound.host.perform_by_name("begin_op", "fault", 0, 1, 0, caller="library")
    assert bound.host.perform_by_name("down_read_trylock", "invalidate", caller="library") is True
    bound.host.perform_by_name("up_read", "invalidate", caller="library")
    bound.host.perform_by_name("down_write", "invalidate", caller="library")
    assert bound.host.perform_by_name("down_read_trylock", "invalidate", caller="library") is False
    bound.host.perform_by_name("end_op", -EAGAIN, None, caller="library")
    (ended,) = (note for note in bound.host.notes if isinstance(note, Ended))
    assert ended.reasons == ("somebody else",)


def free(folio: Folio) -> str:
    return f"to {folio.pfn * PAGE:#x}, which is free"


# -- the VMM's mappings ----------------------------------------------------------------------------------------------


def test_a_punch_leaves_no_user_entry() -> None:
    bound = Bound(OurLibrary)
    bound.touched()
    assert bound.machine.stray_mappings() == []
    assert bound.punched(1) == []
    assert bound.host.perform_by_name("user_access", 1, False) == "fault"


def test_a_punch_that_leaves_user_entries_is_told() -> None:
    bound = Bound(LeavesUserEntries, on_free="nothing")
    folio = bound.touched()
    told = bound.punched(1)
    va = bound.host.inode.mapping.vmas[0].va(1)                     # type: ignore[union-attr]
    assert told == [f"the VMM's page table leads from {va:#x} {free(folio)}",
                    f"an entry in the TLB of CPU 0, VMID 0x0, leads from {va:#x} {free(folio)}"]
    assert set(told) <= set(bound.machine.audit())
    assert bound.host.perform_by_name("user_access", 1, False) == "ok"      # and reads what it wrote before
    assert bound.machine.cpu.user(va, False).x0 == int.from_bytes(b"VMM-USER", "little")


def test_an_entry_for_a_page_that_its_file_has_given_up_is_told() -> None:
    """A pin keeps the page from being freed; the entry leads to memory of no file all the same."""
    for design, nr in ((OurLibrary, 0), (LeavesUserEntries, 2)):
        bound = Bound(design)
        folio = bound.touched()
        assert bound.host.perform_by_name("gup_try_get", folio, caller="mm")
        assert bound.host.perform_by_name("gup_recheck", 1, folio, True, caller="mm")
        told = bound.punched(1)
        assert len(told) == nr
        assert all(line.endswith(f"to {folio.pfn * PAGE:#x}, which its file does not hold as page 1") for line in told)


@pytest.mark.parametrize("design", [OurLibrary, LeavesUserEntries])
def test_a_device_is_audited_while_it_is_open(design: type[Design]) -> None:
    machine = Machine("kvm", Config(ram=32 * MIB, on_free="nothing"))
    with machine.open("/dev/kvm") as system:
        system.design = design
        with system.create_vm() as vm, vm.create_guest_memfd(4 * PAGE, SHARED) as file, file.mmap() as mapping:
            mapping.write(PAGE, b"old data")
            file.host.perform_by_name("lru_add_drain_all", caller="mm")
            file.punch_hole(PAGE, PAGE)
            left = design is not OurLibrary
            assert mapping.read(PAGE, 8) == (b"old data" if left else bytes(8))
            assert bool(machine.stray_mappings()) == left
    assert machine.audit() == []                                    # the mapping went, and its entries with it


def test_a_tlb_entry_alone_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tlbi, "vae1is", lambda *args: None)
    bound = Bound(OurLibrary)
    folio = bound.touched()
    (line,) = bound.punched(1)
    assert line.startswith("an entry in the TLB of CPU 0") and line.endswith(free(folio))  # noqa: PT018


def test_an_entry_that_outlives_its_vma_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Mm._write
    monkeypatch.setattr(Mm, "_write", lambda self, *args: right(self, *args) if args[-1] else None)
    bound = Bound(OurLibrary)
    bound.touched()
    bound.host.run(bound.library.munmap())
    assert any("a table that is free" in line for line in bound.machine.stray_mappings())
    monkeypatch.undo()
    kept = Bound(OurLibrary)
    kept.touched()
    kept.host.run(kept.library.munmap())
    assert kept.machine.stray_mappings() == []


# -- the guest's -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("hypervisor", "index"), [("kvm", 0), ("kvm", 1), ("pkvm", 1), ("gunyah", 0), ("gunyah", 1)])
def test_a_punch_leaves_no_guest_entry(hypervisor: str, index: int) -> None:
    bound = Bound(OurLibrary, hypervisor)
    bound.given(index)
    if hypervisor == "gunyah":
        bound.host.perform_by_name("guest_consents", index, caller="guest")
    assert bound.punched(index) == []


def test_a_punch_that_leaves_the_page_with_the_guest_is_told() -> None:
    bound = Bound(LeavesTheGuest)
    folio = bound.given(1)
    assert bound.punched(1) == [f"stage 2 of VMID 0x1 leads from 0x1000 {free(folio)}",
                                f"an entry in the TLB of CPU 0, VMID 0x1, leads from 0x1000 {free(folio)}"]


def test_a_guest_that_keeps_a_tlb_entry_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Maintenance, "flush_ipa", lambda self, ipa, level: None)
    monkeypatch.setattr(Maintenance, "flush_range", lambda self, ipa, size: None)
    bound = Bound(OurLibrary)
    folio = bound.given(1)
    entry, *walks = bound.punched(1)
    assert entry == f"an entry in the TLB of CPU 0, VMID 0x1, leads from 0x1000 {free(folio)}"
    assert walks                                                    # and remembers the way, through tables that are free
    assert all(line.startswith("a walk in the TLB of CPU 0, VMID 0x1, goes on at") for line in walks)


@pytest.mark.parametrize(("design", "nr"), [(OurLibrary, 0), (LeavesCaches, 1)])
def test_a_cache_of_the_kernel_is_told(design: type[Design], nr: int) -> None:
    bound = Bound(design)
    folio = bound.touched()
    bound.host.perform_by_name("gpc_begin", 1, caller="mm")
    assert bound.host.perform_by_name("gpc_commit", folio, caller="mm")
    assert bound.machine.stray_mappings() == []
    told = bound.punched(1)
    assert len(told) == nr
    assert all(line.startswith("the gfn_to_pfn_cache of VMID 0x1 leads to") for line in told)


# -- the kernel's ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("design", "nr"), [(OurLibrary, 0), (LeavesHoles, 1)])
def test_a_kernel_entry_that_outlives_a_hole_is_told(design: type[Design], nr: int) -> None:
    bound = Bound(design, on_free="nothing")
    folio = bound.given(0)
    assert bound.machine.stray_mappings() == []
    va = bound.machine.linear_map.va(folio.pfn * PAGE)
    assert bound.punched(0) == [
        f"an entry in the TLB of CPU 0, VMID 0x0, leads from {va:#x} {free(folio)} and no longer mapped there"][:nr]


# -- at any time -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hypervisor", ["kvm", "pkvm", "gunyah"])
def test_the_library_leaves_none_at_any_time(hypervisor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[str] = []
    looked = 0
    right = Machine.__init__

    def watch(machine: Machine) -> Callable[[Primitive, list[Any]], None]:
        def judge(primitive: Primitive, notes: list[Any]) -> None:
            nonlocal looked
            looked += 1
            found.extend(f"after {primitive}: {line}" for line in machine.stray_mappings())

        return judge

    def init(machine: Machine, *args: Any) -> None:
        right(machine, *args)
        machine.judge = watch(machine)

    monkeypatch.setattr(Machine, "__init__", init)
    schedules.steps(hypervisor, "library", range(40, 50))
    assert looked > 500
    assert found == []


# -- parts -----------------------------------------------------------------------------------------------------------


@given(given_by.lists(given_by.integers(0, 255), max_size=40), given_by.integers(0, 255), given_by.integers(1, 256))
def test_the_first_free_page_of_a_range(held: list[int], start: int, nr: int) -> None:
    ram = Ram(MIB)
    buddy = Buddy(ram, ram.base, MIB)
    pages = [buddy.alloc() for _ in range(256)]
    for number in set(range(256)) - set(held):
        buddy.free(pages[number])
    nr = min(nr, 256 - start)
    expected = next((pages[i] for i in range(start, start + nr) if i not in held), None)
    assert buddy.first_free(pages[start], nr * PAGE) == expected


def test_everything_that_a_tree_leads_to() -> None:
    ram = Ram(64 * MIB)
    source = Buddy(ram, ram.base, ram.size)
    tree = PageTable(ram, source, 2, ia_bits=40, start_level=1, concatenated=2)
    tree.map(5 << 30, 4 * MIB + PAGE, 1 << 32, 1 << 10)
    tree.map(513 << 30, PAGE, 3 << 32, 1 << 10)
    found = list(reached(ram, tree))
    assert [(e.ia, e.pa, e.size) for e in found if not e.table] == [
        (5 << 30, 1 << 32, 2 * MIB), ((5 << 30) + 2 * MIB, (1 << 32) + 2 * MIB, 2 * MIB),
        ((5 << 30) + 4 * MIB, (1 << 32) + 4 * MIB, PAGE), (513 << 30, 3 << 32, PAGE)]
    assert {e.pa for e in found if e.table} == tree.tables

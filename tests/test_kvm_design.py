"""KVM's guest_memfd: earlier states of it and mistakes are refuted, with law and length, and a repaired twin is not by it.

docs/bugs.md has the rows with a number; docs/findings.md has those of `kvm-7.4` itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import mistakes_kvm
import pytest
import rows
from driver import Bench

from guest_memfd.abstract import show
from guest_memfd.core.hypervisor import Hypervisor
from guest_memfd.designs import DESIGNS, Design
from guest_memfd.designs.filled import Populated
from guest_memfd.explore.world.scenario import World
from guest_memfd.hypervisors import HYPERVISORS
from guest_memfd.machine.linux.maple import MapleTree
from guest_memfd.scenarios import PARTIES
from guest_memfd.scenarios.party import Party
from guest_memfd.scenarios.vmm import close, map_pages
from guest_memfd.words import facts
from guest_memfd.words.pagestate import SLOT_INVALID
from guest_memfd.words.primitives import Entries, Primitive, Steps
from guest_memfd.words.scene import Scene, Slot
from guest_memfd.words.units import FIRST_GFN, FIRST_PAGE, Index


def closer(design: Design, hypervisor: Hypervisor) -> Steps[None]:
    yield from close(design)


def in_place(design: Design, hypervisor: Hypervisor) -> Steps[None]:
    if isinstance(design, Populated) and not (yield from map_pages(design, FIRST_PAGE, design.scene.pages)):
        yield from design.populate(FIRST_PAGE)
        yield from design.munmap()


OF_THEIR_OWN = {
    "closer": Party("closer", "a VMM that closes the descriptor", closer, role="vmm", fd=False),
    "in-place-launcher": Party("in-place-launcher", "a VMM that maps the file, and populates a page of it", in_place),
}
ONE_PAGE = Scene("one-page", "a shared page, allocated before anybody begins", pages=1, frames=2, shared=(0,),
                 slots=(Slot(FIRST_GFN, FIRST_PAGE, 1),), populated=True)
HALF_PRIVATE = Scene("half-private", "a private page and a shared one, both allocated before anybody begins", pages=2,
                     frames=3, shared=(Index(1),), slots=(Slot(FIRST_GFN, FIRST_PAGE, 2),), populated=True)
OWN_SCENES = {scene.name: scene for scene in (ONE_PAGE, HALF_PRIVATE)}


class Row(NamedTuple):
    """*design* breaks *law* in *steps*, and *twin* does not by this evidence. number: of docs/bugs.md, or none.

    fails: whether something may be made to fail.
    """

    number: str
    design: str
    scene: str
    parties: str
    law: str
    steps: int
    evidence: str
    twin: str = "kvm-7.4"
    hypervisor: str = "kvm"
    fails: bool = True


LEFT = "the guest maps a page that the file no longer holds"
WAIT = "deadlock: down_read invalidate, lock_folio"

ROWS = [
    Row("N3", "kvm-7.4", "both-shared", "vmm2 memory-failure", "progress", 12, WAIT, twin="UnlocksTheFolio"),
    Row("N4", "kvm-7.4", "both-shared", "vmm2 memory-failure", "poison-contained", 12,
        "allocate of a page whose memory is broken returns 0", twin="BrokenIsNotFound"),
    Row("N5", "kvm-7.4", "two-pages", "vcpu2 drainer", "nothing-lost", 67, "a page is freed with the guest's data in it",
        twin="ScrubsWhatGoes"),
    Row("N7", "kvm-7.4", "half-private", "vmm memory-failure", "all-or-nothing", 13,
        "to_private is refused for page 0, of which it has nothing to change", twin="AsksOfWhatChanges"),
    Row("2", "SumIsSigned", "two-pages", "vmm-odd", "no-false-refusal", 11,
        "bind of what is no range of the file returns 0 and not -EINVAL"),
    Row("3", "OverlapIsInvalid", "two-pages", "vmm2", "all-or-nothing", 3, "bind returns errno 22, which is not documented"),
    Row("5", "ErrorIsNoNull", "two-pages", "vcpu2", "host-survives", 10, "an error pointer from kvm_gmem_get_folio()"),
    Row("8", "PunchIsForPrivatePages", "both-shared", "vcpu2 vmm2", "no-stale-mapping", 29, LEFT),
    Row("14", "FaultsUnderTheLock", "two-pages", "in-place-launcher", "progress", 7, "deadlock: down_read invalidate",
        twin="FaultsBeforeTheLock"),
    Row("16", "MoveLeavesTheBinding", "two-pages", "vmm-move", "all-or-nothing", 5,
        "unbind returns 0 and a page is still bound"),
    Row("17", "StoreIsNotLookedAt", "two-pages", "vmm-move", "all-or-nothing", 23,
        "bind returns 0 and a page is not bound to its gfn"),
    Row("19", "DrainsNothing", "both-shared", "vmm2", "all-or-nothing", 12,
        "to_private is refused for a reference that draining the lru_add batches would have dropped"),
    Row("21", "CursorIsTheStart", "two-pages", "pinner", "all-or-nothing", 25,
        "to_private names page 2 as the one that refused, outside of its range"),
    Row("23", "PopulatesWhatIsThere", "two-pages", "vcpu2 launcher", "no-stale-data", 28,
        "the guest receives a page with somebody else's data"),
    Row("24", "HoleIsShared", "nothing-yet", "creator", "all-or-nothing", 4,
        "create returns 0 and a page is neither private nor shared"),
    Row("26", "BelievesWhatItHasRead", "two-pages", "vcpu2 vmm2", "one-owner", 30,
        "the hypervisor says guest, the library says shared", twin="OnTdx", hypervisor="tdx", fails=False),
    Row("28", "DyingNeedsNoLock", "one-page", "closer stop memory-failure", "nothing-lost", 52,
        "an invalidation is held for ever", twin="UnlocksTheFolio", fails=False),
    Row("K1", "DyingIsDead", "one-page", "closer stop", "lifetimes", 12, "use after free of the memslot"),
    Row("", "MapsBlindly", "two-pages", "vcpu2 vmm2", "no-stale-mapping", 28, LEFT),
    Row("", "LooksBeforeTheLock", "two-pages", "vcpu2 vmm2", "no-stale-mapping", 29, LEFT),
    Row("", "ComparesTheSequenceAlone", "two-pages", "vcpu2 vmm2", "no-stale-mapping", 31, LEFT),
    Row("", "SamplesTooLate", "two-pages", "vcpu2 vmm2", "no-stale-mapping", 35, LEFT),
    Row("", "FileIsNotHeld", "one-page", "vcpu2 closer", "lifetimes", 23, "use after free of the inode"),
    Row("", "EndsTheFileInTheFault", "one-page", "vcpu2 closer stop", "progress", 11,
        "deadlock: mutex_lock slots, synchronize_srcu", fails=False),
    Row("", "DeletesAtOnce", "two-pages", "vcpu2 vmm2", "lifetimes", 25, "use after free of the memslot"),
    Row("", "InstallsFirst", "nothing-yet", "vcpu2 creator", "no-false-refusal", 20, "fault returns -EIO"),
    Row("", "MappedIsNotAsked", "two-pages", "vmm2 device", "pins-respected", 28,
        "a page is converted while somebody holds a reference to reach it by"),
    Row("", "FaultsWithoutTheLock", "two-pages", "vmm2 device", "one-owner", 21,
        "the VMM's page table maps a page that is private to the guest"),
    Row("", "StoresAfterTheEnd", "two-pages", "vcpu2 vmm2", "all-or-nothing", 12,
        "to_shared changes the attribute, which no gmem_invalidate_begin() of its own has announced"),
]

LONG = [
    Row("4", "LeaksPoisoned", "one-page", "vcpu2 repeater memory-failure", "progress", 8,
        "from here on no operation ever ends", twin="UnlocksTheFolio", fails=False),
    Row("N3a", "kvm-7.4", "one-page", "vcpu2 vmm2 memory-failure", "progress", 13,
        "deadlock: down_read invalidate, down_write invalidate, lock_folio", twin="UnlocksTheFolio", fails=False),
]
"""Those of a second and more."""


BENCH = rows.Bench(mistakes_kvm, OF_THEIR_OWN, OWN_SCENES, most=200_000)


@pytest.mark.parametrize("row", [*ROWS, *(pytest.param(row, marks=pytest.mark.long) for row in LONG)],
                         ids=lambda row: f"{row.number}-{row.design}")
def test_it_is_broken_and_its_twin_is_not(row: Row) -> None:
    assert min(BENCH.lengths(row, row.design, row.steps if row in ROWS else rows.ALL), default=None) == row.steps
    assert BENCH.lengths(row, row.twin) == []


def test_every_mistake_has_a_row() -> None:
    assert rows.made_in(mistakes_kvm) == {name for row in (*ROWS, *LONG) for name in (row.design, row.twin)} - {*DESIGNS}


@pytest.mark.parametrize("row", [row for row in (*ROWS, *LONG) if row.number], ids=lambda row: row.number)
def test_it_is_in_the_list_of_bugs(row: Row) -> None:
    page = (Path(__file__).parent.parent / "docs" / "bugs.md").read_text(encoding="utf-8")
    begin, end = rows.line_of(row)
    assert any(line.startswith(begin) and line.endswith(end) for line in page.splitlines()), (
        f"docs/bugs.md lacks {begin} ... {end}")


# -- what the hosts keep for it --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("field", "number", "words"), [
    ("gfn0.memslot", 0, "none"), ("gfn0.memslot", 4, "page 1"), ("gfn0.memslot", 4 | SLOT_INVALID, "page 1, INVALID"),
    ("vm0.range", 0, "none"), ("vm0.range", 0b110, "gfn1, gfn2"), ("gfn0.gmem_file", 1, "yes"),
    ("vm0.slots_lock", 1, "vmm2")])
def test_what_is_kept_of_a_vm_is_said_in_words(field: str, number: int, words: str) -> None:
    assert show.value(field, number, {0: "vmm2"}) == words


def test_one_range_is_kept_for_all_that_are_under_way() -> None:
    tree = MapleTree()
    assert tree.load(0, 10).ends() is None
    tree.store(2, Entries(5, 3, 1))
    assert tree.load(0, 1 << 40).ends() == (5, 7)
    assert tree.load(3, 1).ends() == (6, 6)
    tree.store(8, Entries(1, 1, 1))
    assert tree.load(0, 10).ends() == (1, 7)


def test_who_forgets_a_lock_of_kvm_is_told() -> None:
    there = World(DESIGNS["kvm-7.4"], HYPERVISORS["kvm"], [PARTIES["vcpu2"]])
    for primitive, said in (("mutex_unlock", "mutex_unlock of slots_lock, which this task does not hold"),
                            ("srcu_read_unlock", "srcu_read_unlock without a reader")):
        args = ("slots",) if primitive == "mutex_unlock" else ()
        (end,) = there.machine.outcomes(there.initial, 0, Primitive(primitive, args, "library"))
        assert end.notes == (facts.Broken(said),)


def test_the_sequence_moves_on_from_what_has_been_sampled_only() -> None:
    def invalidate(design: Design) -> Steps[None]:
        yield from design.host.gmem_invalidate_begin(FIRST_PAGE, 1)
        yield from design.host.gmem_invalidate_end()

    def look(design: Design) -> Steps[list[int]]:
        host = design.host
        yield from host.srcu_read_lock()
        yield from invalidate(design)
        first = yield from host.mmu_invalidate_seq()
        seen = yield from host.mmu_invalidate_retry(first, FIRST_GFN)
        for _ in range(3):
            yield from invalidate(design)
        second = yield from host.mmu_invalidate_seq()
        yield from invalidate(design)
        of_the_first = yield from host.mmu_invalidate_retry(first, FIRST_GFN)
        of_the_second = yield from host.mmu_invalidate_retry(second, FIRST_GFN)
        yield from host.srcu_read_unlock()
        return [seen, second - first, of_the_first, of_the_second]

    bench = Bench("kvm", DESIGNS["kvm-7.4"], scene=ONE_PAGE)
    assert bench.do(look) == [False, 1, True, True]
    assert (bench.state.vm(0).seq, bench.state.vm(0).sampled) == (0, 0)

"""Refinement in scenes with large folios: a folio of two pages is a block of 2 MiB on the machine (lockstep/blocks.py).

GUEST_MEMFD_STEPS=100000 pytest -m long tests/test_refinement_blocks.py takes at least so many steps in one run.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import replace
from inspect import get_annotations
from itertools import count, product
from typing import Any

import pytest
from schedules import HYPERVISORS, LARGE, built, machine, schedule, steps

from guest_memfd.errors import BadInput
from guest_memfd.lockstep import blocks, refinement
from guest_memfd.lockstep.halves import SCALED, SHARE
from guest_memfd.lockstep.refinement import Diverged
from guest_memfd.machine.primitives.host import EmulatedHost
from guest_memfd.scenarios import SCENES
from guest_memfd.words.primitives import Host as HostPrimitives
from guest_memfd.words.units import PAGE, Index, Pfn, pa_to_pfn

LONG = int(os.environ.get("GUEST_MEMFD_STEPS", "6000"))
"""Steps that the long test takes at least, over all scenes and hypervisors."""

FOUND = {
    ("gunyah", "large-folio", 20): "abstract: a guest that unlocks a page of a block has the block split",
    ("gunyah", "large-folio", 35): "machine: of a folio with a broken page all pages were kept",
    ("gunyah", "large-folio", 8): "machine: a hole of the host's stage 2 that comes apart was not counted as a split",
    ("pkvm", "large-folio", 3): "abstract: a block that is reclaimed as one is one for the host, too",
    ("pkvm", "large-beside-small", 125): "abstract: a guest's block that pKVM splits is split in the host's table, too",
    ("pkvm", "mixed-block", 30): "machine: what the host had back already was taken for sanitised",
}
"""Schedules that diverged, and which side was wrong."""

SCHEDULES = (*FOUND, *((hypervisor, scene, 1) for hypervisor, scene in product(HYPERVISORS, LARGE)
                       if (hypervisor, scene) not in {known[:2] for known in FOUND}))


@pytest.mark.parametrize(("hypervisor", "scene", "seed"), SCHEDULES)
def test_the_library_with_blocks(hypervisor: str, scene: str, seed: int) -> None:
    taken, broken = steps(hypervisor, "library", [seed], scene=scene)
    assert taken > 3
    assert not broken, broken


@pytest.mark.parametrize("scene", LARGE)
def test_both_hosts_begin_where_the_explorer_begins(scene: str) -> None:
    there = built("gunyah", "library", scene)
    both = refinement.pair(there, machine(there, random.Random(0)), there.scene.failures)
    assert both.shared == there.initial
    assert not both.broken


def test_what_no_machine_has_is_refused() -> None:
    assert {name for name, scene in SCENES.items() if scene.order} - {*LARGE} == {"larger-leaves"}
    with pytest.raises(BadInput, match="scene 'larger-leaves' is none for a machine: a machine has no folios, and no "
                                       "leaves, between 2M and 1G"):
        schedule("kvm", "library", 0, scene="larger-leaves")
    with pytest.raises(BadInput, match="scene 'large-folio' is one of large folios, and design 'none' has none"):
        schedule("kvm", "none", 0, scene="large-folio")


def test_a_load_that_runs_into_a_page_is_refused() -> None:
    with pytest.raises(BadInput, match="begins in the one before, which must be the host's"):
        schedule("kvm", "library", 0, ("zeropad",), "large-folio")


@pytest.mark.long
def test_thousands_of_steps(capsys: pytest.CaptureFixture[str]) -> None:
    taken, last = 0, 0
    for last in count(100):
        for hypervisor, scene in product(HYPERVISORS, LARGE):
            more, broken = steps(hypervisor, "library", [last], scene=scene)
            taken += more
            assert not broken, broken
        if taken >= LONG:
            break
    with capsys.disabled():
        print(f"\nblocks: {taken} steps, seeds 100 to {last} under {len(HYPERVISORS)} hypervisors in {len(LARGE)} scenes")


# Primitives about a VM's or a module's own numbers, or about none that lock step has in these scenes.
NOT_THESE = {"filemap_add_folio", "filemap_add_pages", "filemap_alloc_folio", "filemap_insert_folio", "write_folio"}


def test_every_number_of_a_primitive_is_translated() -> None:
    """What has a page index, a gfn or a frame number among its arguments is in a table, and tables name nothing else."""
    primitives = {name: list(get_annotations(method).values()) for name, method in vars(HostPrimitives).items()
                  if callable(method) and not name.startswith("_")}
    tables = {*SCALED, *blocks.BY_INDEX, *blocks.BY_GFN, *blocks.BY_PFN}
    assert tables | blocks.OF_THE_FOLIO | blocks.OF_ONE | blocks.ACCESSES <= {*primitives}
    numbers = {name for name, kinds in primitives.items() if {str(kind).partition(" ")[0] for kind in kinds[:-1]} & {
        "Index", "Gfn", "Pfn"}}
    assert numbers - tables <= {*NOT_THESE, "load_unaligned_zeropad"}


# -- what is compared --------------------------------------------------------------------------------------------------

# A machine on which the guest has a block, in the first that there is.
def lent(hypervisor: str = "kvm", scene: str = "large-folio") -> refinement.Pair:
    there = built(hypervisor, "library", scene)
    both = refinement.pair(there, machine(there, random.Random(0)), failures=0)
    refinement.alone(both, refinement.Runner(there.programs["vcpu2"].number, there.programs["vcpu2"].start()))
    return both


def to_shared(both: refinement.Pair, index: int) -> None:
    program = both.world.programs["vmm2"].number
    refinement.alone(both, refinement.Runner(program, both.world.library.make_shared(Index(index), 1)))


@pytest.mark.parametrize("hypervisor", HYPERVISORS)
def test_a_page_of_the_scene_is_half_a_block(hypervisor: str) -> None:
    both = lent(hypervisor)
    host, first = both.host, both.host.machine.watched[0] & -(2 * SHARE * PAGE)
    page = host.machine.pages[pa_to_pfn(first)]
    assert (page.order, page.nr, host.inode.size) == (9, 2 * SHARE, 2 * SHARE)
    assert host.machine.driver.guest_order(host.vm, host.machine.driver.ipa_of(host.vm, first)) == 9
    assert host.machine.linear_map.leaf(first).level == 2
    assert host.machine.driver.host_order(first) == (None if hypervisor == "kvm" else 9)


def test_the_others_do_as_the_one_that_is_compared() -> None:
    both = lent()
    to_shared(both, 1)
    machine = both.host.machine
    first = pa_to_pfn(machine.watched[0] & -(2 * SHARE * PAGE))
    assert {machine.pages[first + at].order for at in range(2 * SHARE)} == {0}
    assert both.host.inode.trees["attributes"].load(0, 2 * SHARE).count(1) == SHARE
    both.all_alike()


@pytest.mark.parametrize("at", [0, 100, SHARE - 1])
def test_one_that_is_not_like_it_is_found_in_the_end(at: int) -> None:
    both = lent()
    to_shared(both, 1)
    pfn = pa_to_pfn(both.host.machine.watched[0] & -(2 * SHARE * PAGE)) + at
    both.host.machine.pages[pfn].uptodate = False
    with pytest.raises(Diverged, match=rf"in the end:\n  pfn0.uptodate: 1 of the page that stands for all, 0 of page {at}"):
        both.all_alike()


def test_one_that_answers_otherwise_is_found_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    right = EmulatedHost.folio_ref_count
    both = lent()
    to_shared(both, 1)
    odd = Pfn(pa_to_pfn(both.host.machine.watched[1]) ^ 1)
    monkeypatch.setattr(EmulatedHost, "folio_ref_count", lambda self, folio: right(self, folio) + (folio.pfn == odd))
    again = refinement.Runner(both.world.programs["vmm2"].number, both.world.library.make_private(Index(1), 1))
    with pytest.raises(Diverged, match=r"folio_ref_count\(pfn\d+\) returns 3, and for the page that stands for it 2"):
        refinement.alone(both, again)


# Whether some CPU has an entry for a whole block of the linear map, and whether the linear map has that block.
def holds(both: refinement.Pair, index: int = 0) -> tuple[bool, bool]:
    machine = both.host.machine
    pa = machine.watched[index]
    va = machine.linear_map.va(pa)
    return (any(entry.size == 2 * SHARE * PAGE and tlb.holds_stage1(va, None, machine.driver.host_vmid)
                for tlb in machine.tlbs for entry in tlb.entries() if not (entry.ia ^ va) & 0xFFFF_FFE0_0000),
            machine.linear_map.leaf(pa).level == 2)


def test_a_tlb_holds_the_entry_of_a_block_across_its_split(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two pages side by side one is taken out of the direct map, and the other is not."""
    there = built("kvm", "library", "mixed-block")
    both = refinement.pair(there, machine(there, random.Random(0)), failures=0)
    seen = []

    def watched(right: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: EmulatedHost, what: Any) -> Any:
            before = holds(both)
            result = right(self, what)
            seen.append((before, holds(both)))
            return result

        return call

    for name in ("set_direct_map_invalid_noflush", "flush_tlb_kernel_range"):
        monkeypatch.setattr(EmulatedHost, name, watched(getattr(EmulatedHost, name)))
    refinement.alone(both, refinement.Runner(there.programs["vcpu2"].number, there.programs["vcpu2"].start()))
    split, flush = seen[0], seen[-1]
    assert split == ((True, True), (True, False)), "the block has gone, and its entry has not"
    assert flush == ((True, False), (False, False))


def test_the_machine_of_a_scene_has_frames_or_blocks() -> None:
    assert refinement.kernel_of(SCENES["two-pages"])["scattered"] == 3
    assert refinement.kernel_of(replace(SCENES["large-folio"], frames=6)) == {
        "blocks": 3, "release": "7.3", "bbml3": True, "rodata": "full", "on_free": "poison"}

"""Nobody is in the suite for nothing: for each party, a mistake that is seen with it and is not without it.

The same of scenes is in test_scenes.py, of laws in test_violators.py: whichever is emptied, a test fails.
"""

from __future__ import annotations

import mistakes
import mistakes_direct_map
import planted
import pytest

from guest_memfd.designs import DESIGNS
from guest_memfd.designs.ours import OurLibrary
from guest_memfd.explore.suite.plan import plan
from guest_memfd.explore.world.scenario import World, world
from guest_memfd.hypervisors import HYPERVISORS
from guest_memfd.scenarios import PARTIES, SCENES

NEEDED = {
    "vcpu": ("NoFlush", "kvm", "two-pages", "vcpu", "one-owner"),
    "vcpu2": ("ZapFailureLeavesMark", "kvm", "two-pages", "vcpu vcpu2", "one-owner"),
    "patient-vcpu": ("gunyah-v17", "gunyah", "two-pages", "vcpu2 patient-vcpu", "no-false-refusal"),
    "other-vcpu": ("NoFlush", "kvm", "two-vms", "other-vcpu", "one-owner"),
    "vmm": ("UserMappingStays", "kvm", "two-pages", "vmm", "one-owner"),
    "vmm-life": ("UnbindNotHeld", "kvm", "two-pages", "vmm-life stop", "lifetimes"),
    "vmm-pages": ("AllocateDonates", "pkvm", "two-pages", "vmm-pages", "no-false-refusal"),
    "vmm-mapped": ("PunchLeavesUserEntries", "kvm", "two-pages", "vmm-mapped", "no-stale-mapping"),
    "vmm-any": ("AllocateDonates", "pkvm", "two-pages", "vmm-any", "bounded-cost"),
    "vmm-move": ("BoundAnywhere", "kvm", "two-pages", "vcpu2 vmm-move", "one-owner"),
    "vmm-odd": ("gunyah-v17", "gunyah", "two-pages", "vmm-odd", "all-or-nothing"),
    "creator": ("CreateKeepsTheModule", "kvm", "nothing-yet", "creator", "nothing-lost"),
    "pinner": ("ReferencesIgnored", "kvm", "two-pages", "pinner", "pins-respected"),
    "vmm2": ("PunchTellsNoCache", "kvm", "two-pages", "vmm2 pfn-cache", "no-stale-mapping"),
    "repeater": ("ReferencesIgnored", "kvm", "both-shared", "repeater device", "pins-respected"),
    "device": ("OnlyPinsCounted", "kvm", "two-pages", "vmm device", "all-or-nothing"),
    "zeropad": ("none", "gunyah", "two-pages", "vcpu2 zeropad", "host-survives"),
    "kcore": ("AnyKernelWillDo", "kvm", "no-direct-map-changes", "vcpu2 kcore", "guest-private"),
    "page-cache-reader": ("ReadersWelcome", "kvm", "two-pages", "vcpu2 page-cache-reader", "host-survives"),
    "memory-failure": ("PoisonStays", "kvm", "two-pages", "vcpu2 memory-failure", "poison-contained"),
    "pfn-cache": ("KernelMappingStays", "kvm", "two-pages", "vmm pfn-cache", "pins-respected"),
    "power": ("NoVeto", "kvm", "two-pages", "vcpu power", "guest-private"),
    "unloader": ("ModuleNotHeld", "kvm", "two-pages", "unloader stop", "host-survives"),
    "stop": ("BindsToTheDead", "kvm", "two-pages", "vmm-life stop", "lifetimes"),
    "other-stop": ("ModuleNotHeld", "kvm", "two-vms", "unloader stop other-stop", "host-survives"),
    "drainer": ("PunchTellsNoCache", "kvm", "two-pages", "vmm2 pfn-cache drainer", "free-memory"),
    "writer": ("WritesPlainly", "kvm", "two-pages", "writer", "host-survives"),
    "launcher": ("PopulatesNothing", "kvm", "two-pages", "vcpu2 launcher", "no-stale-data"),
    "uffd": ("CopyIsInverted", "kvm", "two-pages", "uffd", "no-direct-map"),
    "pfn-cache-v2": ("CachesPrivatePages", "kvm", "both-private", "vcpu pfn-cache-v2", "guest-private"),
}
"""Party -> a mistake (or a posted design), where it is made, the parties that show it, and the law."""


def broken(mistake: str, hypervisor: str, scene: str, parties: list[str]) -> set[str]:
    where = (mistakes, planted, mistakes_direct_map)
    design = next((getattr(each, mistake) for each in where if hasattr(each, mistake)), None) or DESIGNS[mistake]
    there = World(design, HYPERVISORS[hypervisor], [PARTIES[name] for name in parties], scene=SCENES[scene])
    return {finding.law for finding in there.explorer(parties).run(max_states=60_000).findings} if parties else set()


def test_every_party_is_needed_by_somebody() -> None:
    assert [*NEEDED] == [*PARTIES]


@pytest.mark.parametrize("party", NEEDED)
def test_it_is_seen_with_the_party(party: str) -> None:
    mistake, hypervisor, scene, parties, law = NEEDED[party]
    assert party in parties.split()
    assert law in broken(mistake, hypervisor, scene, parties.split())


@pytest.mark.parametrize("party", NEEDED)
def test_and_not_without_it(party: str) -> None:
    mistake, hypervisor, scene, parties, law = NEEDED[party]
    assert law not in broken(mistake, hypervisor, scene, [name for name in parties.split() if name != party])


@pytest.mark.parametrize("hypervisor", [*HYPERVISORS])
def test_the_suite_has_every_party_and_every_scene(hypervisor: str) -> None:
    there = in_the_suite("library", hypervisor)
    caches = {"pfn-cache"} if not HYPERVISORS[hypervisor].pfn_cache else set()
    assert {name for name, _ in there} == set(PARTIES) - caches - OF_SOME_DESIGNS
    assert {scene for _, scene in there} == set(SCENES)


OF_SOME_DESIGNS = {"writer", "launcher", "uffd", "pfn-cache-v2"}
"""Parties that are there for what a design has beside the library's operations."""


def in_the_suite(design: str, hypervisor: str) -> set[tuple[str, str]]:
    return {(name, scene) for scene in SCENES for scenario in plan(world(design, hypervisor, scene=scene))
            for name in scenario}


@pytest.mark.parametrize(("design", "parties"), [
    ("direct-map-v12", {"writer"}), ("firecracker-2026", {"writer", "uffd", "pfn-cache-v2"}),
    ("filemap-hook", OF_SOME_DESIGNS), ("alloc-unmapped", OF_SOME_DESIGNS), ("guestmem-v6", {"writer", "launcher"})])
def test_a_design_has_the_parties_for_what_it_does(design: str, parties: set[str]) -> None:
    there = in_the_suite(design, "kvm")
    assert {name for name, _ in there} & OF_SOME_DESIGNS == parties
    assert {scene for name, scene in there if name in parties} == {*SCENES}


def test_no_scenario_has_one_task_twice() -> None:
    for scene in SCENES:
        there = world(OurLibrary, "kvm", scene=scene)
        assert all(there.apart(scenario) for scenario in plan(there))

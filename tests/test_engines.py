"""Two engines, one count: the tabulating explorer against the reference that executes every path anew.

Every design there is, under every hypervisor it was posted for, on scenarios small enough for the reference.
"""

from __future__ import annotations

import itertools

import pytest

from guest_memfd.abstract import AbstractHost
from guest_memfd.designs import DESIGNS, SETS
from guest_memfd.explore.engine.explorer import Explorer
from guest_memfd.explore.engine.finding import Result
from guest_memfd.explore.engine.naive import explore
from guest_memfd.explore.engine.tables import Tables
from guest_memfd.explore.world.scenario import World, world
from guest_memfd.hypervisors import HYPERVISORS
from guest_memfd.scenarios import SCENES

LATER = {*itertools.chain.from_iterable(SETS.values())}
WHERE = [
    (design, hypervisor) for design in DESIGNS for hypervisor in HYPERVISORS
    if hypervisor in (DESIGNS[design].hypervisors or list(HYPERVISORS))
    and (design not in LATER or hypervisor == "kvm") and (hypervisor != "cca" or design == "library")
    and (hypervisor != "s390" or design == "none")
]
"""Every design and every hypervisor; the later ones not all with all others, as one is like another to an engine."""
SMALL = [
    "vcpu", "vcpu zeropad", "vcpu2 power", "vcpu2 memory-failure", "device zeropad", "device unloader", "unloader stop",
    "vcpu2 stop", "pfn-cache power", "vcpu2 unloader zeropad", "zeropad memory-failure stop", "kcore power unloader",
]
LARGER = ["vcpu stop", "device stop", "vmm zeropad", "vcpu2 device", "vcpu2 power stop", "vcpu vcpu2", "vmm unloader power"]
FEWEST = 30
"""Models that must be compared."""


def agree(design: str, hypervisor: str, scenarios: list[str], scene: str = "two-pages") -> int:
    """How many of *scenarios* exist there; AssertionError where the engines count differently."""
    tabulated, plain = (world(design, hypervisor, scene=scene) for _ in range(2))
    machine = plainly(plain)
    compared = 0
    for parties in map(str.split, scenarios):
        if all(name in plain.programs for name in parties):
            result = tabulated.explorer(parties).run()
            programs = [plain.programs[name] for name in parties]
            assert explore(machine, programs, plain.initial) == (result.states, result.transitions), parties
            compared += 1
    return compared


def plainly(one: World) -> AbstractHost:
    """The host of *one*, without whatever makes it faster."""
    host = AbstractHost(one.hypervisor, one.scene, one.machine.sizes.parties, sea_fixup=one.design.sea_fixup,
                        tasks=one.machine.tasks, bounds=one.design.bounds, errnos=one.design.errnos,
                        resumes=one.design.resumes)
    for what in ("scene", "sizes", "fallible", "sea_fixup", "tasks", "bounds", "errnos", "resumes"):
        assert getattr(host, what) == getattr(one.machine, what)
    return host


def test_enough_models_are_compared() -> None:
    assert len(WHERE) * (len(SMALL) - 1) >= FEWEST      # one party needs KVM


@pytest.mark.parametrize(("design", "hypervisor"), WHERE)
def test_both_engines_count_the_same(design: str, hypervisor: str) -> None:
    assert agree(design, hypervisor, SMALL) >= len(SMALL) - 1


ELSEWHERE = [
    ("crossed", "kvm", ["patient-vcpu", "vcpu2 drainer"]), ("both-private", "pkvm", ["pinner", "vcpu2 drainer"]),
    ("both-shared", "gunyah", ["pinner"]), ("unbound", "kvm", ["vmm2", "vcpu2 stop"]),
    ("nothing-yet", "pkvm", ["creator", "creator vcpu2", "creator vmm2"]), ("for-good", "gunyah", ["vcpu2 stop"]),
    ("no-direct-map-changes", "kvm", ["vcpu2 kcore"]), ("quiet-free", "pkvm", ["vcpu2 stop", "vcpu2 zeropad"]),
    ("three-pages", "kvm", ["vcpu2", "vcpu2 stop"]), ("failing-twice", "kvm", ["vcpu2 stop", "vcpu2 zeropad"]),
    ("on-demand", "gunyah", ["vcpu2 pinner", "vcpu2 stop"]),
    ("two-vms", "gunyah", ["vcpu2 zeropad", "stop other-stop", "vcpu2 other-stop"]),
    ("large-folio", "pkvm", ["vcpu2 vmm2", "vcpu2 stop"]), ("two-large-folios", "kvm", ["vcpu2 stop", "vcpu2 drainer"]),
    ("large-beside-small", "gunyah", ["vcpu2 zeropad", "vcpu2 repeater"]),
    ("mixed-block", "snp", ["vcpu2 stop", "vcpu2 vmm2"]),
    ("half-bound", "tdx", ["vcpu2 stop"]), ("odd-gfn", "kvm", ["vcpu2 stop", "vcpu2 kcore"]),
    ("large-for-good", "tdx", ["vcpu2 stop", "vmm2 stop"]), ("larger-leaves", "pkvm", ["vcpu2 zeropad", "vcpu2 stop"]),
]
"""In each scene some scenarios that are about what is special there."""


@pytest.mark.parametrize(("scene", "hypervisor", "scenarios"), ELSEWHERE)
def test_both_engines_count_the_same_in_other_scenes(scene: str, hypervisor: str, scenarios: list[str]) -> None:
    assert agree("library", hypervisor, scenarios, scene) == len(scenarios)


def test_all_scenes_are_compared() -> None:
    assert ["two-pages", *(scene for scene, _, _ in ELSEWHERE)] == list(SCENES)


OTHERS = ["repeater", "patient-vcpu", "page-cache-reader", "vmm-odd", "drainer", "vmm2"]


@pytest.mark.parametrize("party", OTHERS)
def test_both_engines_count_the_same_on_the_other_parties(party: str) -> None:
    assert agree("library", "pkvm", [party]) == 1


@pytest.mark.long
@pytest.mark.parametrize(("design", "hypervisor"), WHERE)
def test_both_engines_count_the_same_on_larger_models(design: str, hypervisor: str) -> None:
    scenarios = LARGER if design == "library" else LARGER[:-2]
    assert agree(design, hypervisor, scenarios) == len(scenarios)


@pytest.mark.long
@pytest.mark.parametrize("scene", list(SCENES))
@pytest.mark.parametrize("design", ["gunyah-v17", "library"])
def test_both_engines_count_the_same_in_all_scenes(design: str, scene: str) -> None:
    some = ["vcpu2 vmm2", "vcpu2 stop", "patient-vcpu zeropad", "vcpu2 memory-failure", "pinner", "device power",
            "creator vcpu2 zeropad", "vcpu2 other-vcpu", "stop other-stop vcpu2"]
    assert agree(design, "gunyah", some, scene) >= 6


@pytest.mark.parametrize("hypervisor", list(HYPERVISORS))
def test_tables_kept_from_other_scenarios_change_no_count(hypervisor: str) -> None:
    kept = world("library", hypervisor)
    for parties in (["vcpu"], ["vcpu", "power"], ["power", "stop"], ["vcpu", "stop"], ["stop"], ["vcpu", "power"]):
        fresh = kept.explorer(parties, Tables(kept.machine, kept.laws)).run()
        again = kept.explorer(parties).run()
        assert (again.states, again.transitions) == (fresh.states, fresh.transitions)


@pytest.mark.parametrize("hypervisor", list(HYPERVISORS))
def test_tables_serve_scenarios_of_several_initial_states(hypervisor: str) -> None:
    one = world("none", hypervisor)
    initials = [world("none", hypervisor, failures=failures).initial for failures in (0, 1, 2)]
    for initial in (*initials, *initials):
        for parties in (["vcpu", "zeropad"], ["power", "stop"]):
            programs = [one.programs[name] for name in parties]
            kept, fresh = (Explorer(tables, programs, initial, one.teardown).run()
                           for tables in (one.tables, Tables(one.machine, one.laws)))
            assert (kept.states, kept.transitions, shown(kept)) == (fresh.states, fresh.transitions, shown(fresh))


def shown(result: Result) -> set[tuple[str, str, int]]:
    return {(finding.law, finding.evidence, len(finding.steps)) for finding in result.findings}


@pytest.mark.parametrize("hypervisor", list(HYPERVISORS))
def test_no_failures_are_fewer_states(hypervisor: str) -> None:
    none, one = (world("library", hypervisor, failures=n).explorer(["vcpu"]).run().states for n in range(2))
    assert none < one

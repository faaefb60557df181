"""Two engines, one count: the tabulating explorer against the reference that executes every path anew.

Every design there is, under every hypervisor it was posted for, on scenarios small enough for the reference.
"""

from __future__ import annotations

import pytest

from guest_memfd.check.explorer import Tables
from guest_memfd.check.naive import explore
from guest_memfd.check.scenario import World, world
from guest_memfd.designs import DESIGNS
from guest_memfd.hosts.abstract import AbstractHost
from guest_memfd.hypervisors import HYPERVISORS

WHERE = [
    (design, hypervisor) for design in DESIGNS for hypervisor in HYPERVISORS
    if hypervisor in (DESIGNS[design].hypervisors or list(HYPERVISORS))
]
SMALL = [
    "vcpu", "vcpu zeropad", "vcpu2 power", "vcpu2 memory-failure", "device zeropad", "device unloader", "unloader stop",
    "vcpu2 stop", "pfn-cache power", "vcpu2 unloader zeropad", "zeropad memory-failure stop", "kcore power unloader",
    "vcpu stop",
]
LARGER = ["device stop", "vmm zeropad", "vcpu vcpu2", "vcpu2 device", "vcpu2 power stop", "vmm unloader power"]
FEWEST = 30
"""Models that must be compared."""


def agree(design: str, hypervisor: str, scenarios: list[str]) -> int:
    """How many of *scenarios* exist there; AssertionError where the engines count differently."""
    tabulated, plain = world(design, hypervisor), world(design, hypervisor)
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
    return AbstractHost(one.hypervisor, sea_fixup=one.design.sea_fixup, tasks=one.machine.tasks)


def test_enough_models_are_compared() -> None:
    assert len(WHERE) * (len(SMALL) - 1) >= FEWEST      # one party needs KVM


@pytest.mark.parametrize(("design", "hypervisor"), WHERE)
def test_both_engines_count_the_same(design: str, hypervisor: str) -> None:
    assert agree(design, hypervisor, SMALL) >= len(SMALL) - 1


@pytest.mark.long
@pytest.mark.parametrize(("design", "hypervisor"), WHERE)
def test_both_engines_count_the_same_on_larger_models(design: str, hypervisor: str) -> None:
    assert agree(design, hypervisor, LARGER) == len(LARGER)


@pytest.mark.parametrize("hypervisor", list(HYPERVISORS))
def test_tables_kept_from_other_scenarios_change_no_count(hypervisor: str) -> None:
    kept = world("library", hypervisor)
    for parties in (["vcpu"], ["vcpu", "power"], ["power", "stop"], ["vcpu", "stop"], ["stop"], ["vcpu", "power"]):
        fresh = kept.explorer(parties, Tables(kept.machine, kept.laws)).run()
        again = kept.explorer(parties).run()
        assert (again.states, again.transitions) == (fresh.states, fresh.transitions)


@pytest.mark.parametrize("hypervisor", list(HYPERVISORS))
def test_no_failures_are_fewer_states(hypervisor: str) -> None:
    none, one = (world("library", hypervisor, failures=n).explorer(["vcpu"]).run().states for n in range(2))
    assert none < one

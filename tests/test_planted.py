"""Every planted mistake is caught, by the law that is pinned here, in the scenario where it shows best."""

from __future__ import annotations

import inspect
from dataclasses import replace

import planted
import pytest
from driver import MERGING

from guest_memfd.core import GuestMemfdOps
from guest_memfd.designs.ours import OurLibrary
from guest_memfd.explore.world.scenario import World
from guest_memfd.hypervisors import HYPERVISORS
from guest_memfd.scenarios import PARTIES

ENOUGH = 1_000, 5_000, 25_000, 130_000
"""States within which each mistake shows; that the library holds in all there are is for the long tests."""

CAUGHT = {
    "NoFlush": ("kvm", "vcpu", "one-owner"),
    "FlushFirst": ("kvm", "vcpu", "one-owner"),
    "ZapFailureIgnored": ("kvm", "vcpu", "one-owner"),
    "ZapFailureLeavesMark": ("kvm", "vcpu vcpu2", "one-owner"),
    "ZapFailureLeavesCount": ("kvm", "vcpu", "nothing-lost"),
    "GivenBeforeZapped": ("kvm", "vcpu", "one-owner"),
    "NotZeroed": ("kvm", "vcpu", "no-stale-data"),
    "ZeroedTwice": ("kvm", "vcpu vcpu2", "host-survives"),
    "UserMappingStays": ("kvm", "vmm", "one-owner"),
    "KernelMappingStays": ("kvm", "vmm pfn-cache", "pins-respected"),
    "ReferencesIgnored": ("kvm", "vmm device", "pins-respected"),
    "OnlyPinsCounted": ("kvm", "vmm device", "all-or-nothing"),
    "OneReferenceTooMany": ("kvm", "vmm device", "pins-respected"),
    "NoDrain": ("kvm", "vmm", "all-or-nothing"),
    "CheckedBeforeUnmap": ("kvm", "vmm device", "pins-respected"),
    "InvalidationNotEnded": ("pkvm", "vcpu vmm", "nothing-lost"),
    "ReferencesKeptOnRefusal": ("kvm", "vcpu", "nothing-lost"),
    "SharedWithoutAsking": ("pkvm", "vcpu vmm", "one-owner"),
    "ConvertedInName": ("kvm", "vmm", "all-or-nothing"),
    "AttributeFirst": ("kvm", "vmm", "all-or-nothing"),
    "StoredWithoutReserve": ("kvm", "vmm", "host-survives"),
    "FaultWithoutLock": ("kvm", "vcpu vmm", "all-or-nothing"),
    "UserFaultWithoutLock": ("kvm", "vmm device", "all-or-nothing"),
    "PunchWithoutLock": ("kvm", "vcpu vmm", "one-owner"),
    "ConvertsUnderSharedLock": ("kvm", "vcpu vmm", "one-owner"),
    "LockKeptOnError": ("kvm", "vmm", "progress"),
    "AttributeNotAsked": ("kvm", "vmm", "one-owner"),
    "FreedWithHole": ("kvm", "vcpu", "host-survives"),
    "FreedWithSecrets": ("kvm", "vcpu", "nothing-lost"),
    "RestoredOnce": ("kvm", "vcpu vmm", "nothing-lost"),
    "NotTakenBack": ("pkvm", "vcpu", "nothing-lost"),
    "TakenBackOnce": ("pkvm", "vcpu stop", "nothing-lost"),
    "LookupLeaked": ("kvm", "vcpu", "nothing-lost"),
    "PutTwice": ("kvm", "vcpu", "host-survives"),
    "ModuleNotHeld": ("kvm", "unloader stop", "host-survives"),
    "ModuleNotPut": ("kvm", "vcpu", "nothing-lost"),
    "NoVeto": ("kvm", "vcpu power", "guest-private"),
    "DoorLeftOpen": ("kvm", "vcpu power", "guest-private"),
    "RefusalIgnored": ("pkvm", "vcpu vmm", "all-or-nothing"),
    "OnePageTooMany": ("kvm", "vcpu vmm", "all-or-nothing"),
    "BindingKeptAtTeardown": ("kvm", "vcpu", "nothing-lost"),
    "UnmapWithoutSync": ("gunyah", "vcpu vmm", "one-owner"),
    "NotUnmapped": ("kvm", "vcpu vmm", "one-owner"),
    "WrongPageNamed": ("kvm", "vmm device", "all-or-nothing"),
    "NotRestoredForHost": ("kvm", "vcpu2 vmm2 device", "host-survives"),
    "ReadThenLocked": ("kvm", "vmm device", "one-owner"),
    "WaitsUnderFolioLock": ("kvm", "vmm memory-failure", "progress"),
    "PostForgotten": ("kvm", "power", "nothing-lost"),
    "WipesOnTheWayBack": ("kvm", "vcpu vmm", "no-stale-data"),
    "ReferencePerBinding": ("kvm", "stop", "nothing-lost"),
    "RestoredBeforeScrub": ("kvm", "vcpu vmm zeropad", "guest-private"),
}
"""Mistake -> (hypervisor, parties, law)."""


@pytest.mark.parametrize("name", CAUGHT)
def test_caught(name: str) -> None:
    hypervisor_name, parties, law = CAUGHT[name]
    mistake, hypervisor, design = getattr(planted, name), HYPERVISORS[hypervisor_name], OurLibrary
    if issubclass(mistake, GuestMemfdOps):
        hypervisor = replace(hypervisor, ops=mistake)
    else:
        design = mistake
    names = parties.split()
    # Restoring can fail only where leaves are merged again, and the library is to be ready for that, too.
    world = World(design, hypervisor, [PARTIES[n] for n in names], scene=MERGING if name == "RestoredOnce" else None)
    # Most show soon, and then the rest needs no look.
    found = (world.explorer(names).run(max_states=states).findings for states in ENOUGH)
    assert any(law in {finding.law for finding in findings} for findings in found)


@pytest.mark.long
@pytest.mark.parametrize(("hypervisor", "parties"), sorted({(h, p) for h, p, _ in CAUGHT.values()}))
def test_library_holds_where_mistakes_are_caught(hypervisor: str, parties: str) -> None:
    names = parties.split()
    world = World(OurLibrary, HYPERVISORS[hypervisor], [PARTIES[n] for n in names], scene=MERGING)
    assert world.explorer(names).run(max_states=ENOUGH[-1]).findings == []


def test_every_mistake_is_listed() -> None:
    mistakes = {name for name, thing in vars(planted).items()
                if inspect.isclass(thing) and thing.__module__ == "planted"}
    assert mistakes == set(CAUGHT)
    assert len(mistakes) >= 25

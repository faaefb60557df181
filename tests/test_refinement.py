"""Refinement: whatever the machine does, its abstraction is what the abstract host says, step by step."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import product

import pytest
from schedules import HYPERVISORS, LARGE, PAIRS, SCENES, built, machine, steps

from guest_memfd.errors import BadInput
from guest_memfd.lockstep import refinement
from guest_memfd.lockstep.refinement import Diverged
from guest_memfd.machine.linux.kernel_flush import KernelFlush
from guest_memfd.scenarios import SCENES as ALL_SCENES
from guest_memfd.words.scene import Kernel

LONG = 100_000
"""Steps that the long test takes at least, over all designs and hypervisors."""


@pytest.mark.parametrize(("hypervisor", "design"), PAIRS)
def test_every_step_is_the_abstract_step(hypervisor: str, design: str) -> None:
    taken, broken = steps(hypervisor, design, range(12))
    assert taken > 200
    if design == "library":
        assert not broken, broken


@pytest.mark.parametrize("scene", SCENES)
@pytest.mark.parametrize("hypervisor", HYPERVISORS)
def test_the_library_in_every_scene(hypervisor: str, scene: str) -> None:
    taken, broken = steps(hypervisor, "library", range(3), scene=scene)
    assert taken > 3
    assert not broken, broken


def test_the_scenes_left_out_are_those_that_no_machine_can_be_put_into() -> None:
    left_out = {name: refinement.unfit(scene) for name, scene in ALL_SCENES.items() if name not in (*SCENES, *LARGE)}
    assert left_out.pop("two-vms") == "a machine beside the abstract host has one file and one VM"
    assert left_out == {"larger-leaves": "a machine has no folios, and no leaves, between 2M and 1G"}
    with pytest.raises(BadInput, match="scene 'two-vms' is none for a machine: a machine beside"):
        steps("kvm", "library", range(1), scene="two-vms")
    asks_nobody = replace(ALL_SCENES["two-pages"], kernel=Kernel(asks_mapping=False))
    assert refinement.unfit(asks_nobody) == "readers of the emulated kernel ask AS_NO_DIRECT_MAP"


@pytest.mark.parametrize("scene", SCENES)
def test_both_hosts_begin_where_the_explorer_begins(scene: str) -> None:
    there = built("pkvm", "library", scene)
    both = refinement.pair(there, machine(there, random.Random(0)), there.scene.failures)
    assert both.shared == there.initial
    assert not both.broken


@pytest.mark.long
def test_a_hundred_thousand_steps(capsys: pytest.CaptureFixture[str]) -> None:
    taken, first = 0, 100
    while taken < LONG:
        for (hypervisor, design), scene in product(PAIRS, SCENES):
            more, broken = steps(hypervisor, design, range(first, first + 3), scene=scene)
            taken += more
            assert design != "library" or not broken, broken
        first += 3
    with capsys.disabled():
        print(f"\nrefinement: {taken} steps, seeds 100 to {first - 1} of each of {len(PAIRS)} pairs in {len(SCENES)} scenes")


def test_a_divergence_names_the_seed_the_step_and_the_field(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KernelFlush, "__call__", lambda self, start, end: None)
    with pytest.raises(Diverged, match=r"seed \d+, scene \S+, .*flush_tlb_kernel_range.*\n.*stale: abstract 0, emulated 1"):
        steps("kvm", "library", range(50), ("vcpu", "vmm"))

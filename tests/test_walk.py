"""All parties of a scene at once, at random: the library breaks nothing in a million steps, a mistake is found."""

from __future__ import annotations

import mistakes
import pytest

from guest_memfd.explore.world.scenario import world
from guest_memfd.explore.world.walk import walk
from guest_memfd.hypervisors import HYPERVISORS
from guest_memfd.scenarios import SCENES

SEED = 20_261_126


@pytest.mark.parametrize("hypervisor", [*HYPERVISORS])
def test_library_breaks_nothing_in_a_short_walk(hypervisor: str) -> None:
    for scene in SCENES:
        walked = walk(world("library", hypervisor, scene=scene), 2_000, SEED)
        assert walked.broken == [], scene


@pytest.mark.parametrize(("mistake", "law"), [
    ("PunchTellsNoCache", "no-stale-mapping"), ("FileNotHeld", "lifetimes"), ("PoisonRestored", "poison-contained"),
])
def test_a_walk_comes_across_mistakes(mistake: str, law: str) -> None:
    walked = walk(world(getattr(mistakes, mistake), "kvm"), 40_000, SEED)
    assert law in {broken for _, broken, _ in walked.broken}


def test_a_schedule_is_found_again_by_its_seed() -> None:
    there = world(mistakes.PoisonRestored, "kvm")
    seed, law, evidence = walk(there, 40_000, SEED).broken[0]
    assert walk(there, 1, seed).broken == [(seed, law, evidence)]


@pytest.mark.long
@pytest.mark.parametrize("hypervisor", [*HYPERVISORS])
def test_library_breaks_nothing_in_a_million_steps(hypervisor: str) -> None:
    taken = 0
    for number, scene in enumerate(SCENES):
        walked = walk(world("library", hypervisor, scene=scene), 1_000_000 // (3 * len(SCENES)), SEED + 1_000_000 * number)
        print(f"{hypervisor}, {scene}: {walked.steps:,} steps, {walked.schedules:,} schedules from seed "
              f"{SEED + 1_000_000 * number}")
        assert walked.broken == [], scene
        taken += walked.steps
    assert taken >= 1_000_000 // 3 - len(SCENES)

"""Random schedules on the abstract host and an emulated machine in lock step."""

from __future__ import annotations

import random
from collections.abc import Iterable
from functools import cache

from guest_memfd.abstract import state as st
from guest_memfd.designs import DESIGNS
from guest_memfd.explore.world.scenario import World, world
from guest_memfd.lockstep import refinement
from guest_memfd.machine.boot import Config, Machine
from guest_memfd.scenarios import SCENES as ALL_SCENES

HYPERVISORS = ("kvm", "pkvm", "gunyah")
PAIRS = [(h, name) for h in HYPERVISORS for name in DESIGNS if h in (DESIGNS[name].hypervisors or HYPERVISORS)]
"""Every design under every hypervisor it was posted for."""


SCENES = tuple(scene.name for scene in ALL_SCENES.values() if refinement.unfit(scene) is None and not scene.order)
"""Scenes that an emulated machine can be put into, all folios of which are single pages."""
LARGE = tuple(scene.name for scene in ALL_SCENES.values() if refinement.unfit(scene) is None and scene.order)
"""Those in which there are blocks."""


@cache
def built(hypervisor: str, design: str, scene: str = "two-pages") -> World:
    return world(design, hypervisor, scene=scene)


def machine(there: World, rng: random.Random) -> Machine:
    """A machine for a scene, whose kernel, CPU and layout are any of those that the linear map knows."""
    release = rng.choice(("7.3", "7.3", "6.12"))
    of_any = {"ram": 16 << 20, "apart": rng.choice((2, 2, 16, 512)), "release": release,
              "bbml3": release == "7.3" and rng.random() < 0.5, "tlb_range": rng.random() < 0.5}
    if there.scene.order:
        of_any |= {"ram": 32 << 20, "spot": rng.randint(1, 255)}
    return Machine(there.hypervisor.name, Config(**{
        **of_any, "sea_fixup": there.design.sea_fixup, **refinement.kernel_of(there.scene)}))


def schedule(
    hypervisor: str, design: str, seed: int, parties: tuple[str, ...] | None = None, scene: str | None = None,
) -> refinement.Pair:
    """One schedule of some parties in some scene and the end of the world; raises refinement.Diverged with the seed."""
    rng = random.Random(seed)
    there = built(hypervisor, design, scene or ("two-pages" if parties else rng.choice(SCENES)))
    both = refinement.pair(there, machine(there, rng), failures=1)
    names = parties or drawn(there, rng)
    try:
        refinement.run(both, names, rng)
    except refinement.Diverged as diverged:
        raise refinement.Diverged(
            f"seed {seed}, scene {there.scene.name}, parties {','.join(names)}: {diverged}") from diverged
    return both


def drawn(there: World, rng: random.Random) -> tuple[str, ...]:
    """One to four parties, no two of which are the same task; somebody who makes a file if there is none yet."""
    names = rng.sample(list(there.programs), len(there.programs))
    chosen = [] if there.scene.made else ["creator"]
    # The page before the one of a block that is compared is not the host's, as that which such a load begins in must be.
    names = [name for name in names if name != "zeropad" or not there.scene.order]
    for name in names:
        if there.apart([*chosen, name]):
            chosen.append(name)
    return tuple(chosen[:rng.randint(1, 4)])


def steps(
    hypervisor: str, design: str, seeds: Iterable[int], parties: tuple[str, ...] | None = None, scene: str | None = None,
) -> tuple[int, dict[str, str]]:
    """How many steps the schedules of *seeds* took together, and the laws that broke on the machine."""
    taken, broken = 0, {}
    for seed in seeds:
        both = schedule(hypervisor, design, seed, parties, scene)
        taken += len(both.steps)
        broken |= {law: f"seed {seed}: {words}" for law, words in both.broken.items()}
    return taken, broken


def seen(both: refinement.Pair, sizes: st.Sizes | None = None) -> dict[str, int]:
    """The state of the abstract host that *both*'s machine is in, field by field."""
    return st.fields_of(refinement.abstraction(both.host, sizes or both.world.machine.sizes))


def lent(scene: str = "two-pages") -> refinement.Pair:
    """A machine on which the guest has its first page, in the first frame that is watched."""
    there = built("kvm", "library", scene)
    both = refinement.pair(there, machine(there, random.Random(0)), failures=0)
    vcpu = refinement.Runner(there.programs["vcpu"].number, there.programs["vcpu"].start())
    vcpu.resume(None, min)
    while not seen(both)["pfn0.gmap"]:
        assert vcpu.pending is not None
        vcpu.resume(both.step(vcpu.number, vcpu.pending, both.outcomes(vcpu.number, vcpu.pending)[0]), min)
    return both

"""Random schedules on the abstract host and an emulated machine in lock step."""

from __future__ import annotations

import random
from collections.abc import Iterable
from functools import cache

from guest_memfd.check import refine
from guest_memfd.check.scenario import World, world
from guest_memfd.designs import DESIGNS
from guest_memfd.hosts.emulated.machine import Config, Machine

HYPERVISORS = ("kvm", "pkvm", "gunyah")
PAIRS = [(h, name) for h in HYPERVISORS for name in DESIGNS if h in (DESIGNS[name].hypervisors or HYPERVISORS)]
"""Every design under every hypervisor it was posted for."""


@cache
def built(hypervisor: str, design: str) -> World:
    return world(design, hypervisor)


def machine(hypervisor: str, rng: random.Random, *, sea_fixup: bool = False) -> Machine:
    """A machine whose kernel, CPU and layout are any of those that the linear map knows."""
    release = rng.choice(("7.3", "7.3", "6.12"))
    return Machine(hypervisor, Config(
        ram=16 << 20, on_free="poison", scattered=3, apart=rng.choice((2, 2, 16, 512)), release=release,
        bbml3=release == "7.3" and rng.random() < 0.5, tlb_range=rng.random() < 0.5, sea_fixup=sea_fixup))


def schedule(hypervisor: str, design: str, seed: int, parties: tuple[str, ...] | None = None) -> refine.Pair:
    """One schedule of some parties and the end of the world; raises refine.Diverged with the seed in its message."""
    rng = random.Random(seed)
    there = built(hypervisor, design)
    both = refine.pair(there, machine(hypervisor, rng, sea_fixup=there.design.sea_fixup), failures=1)
    names = parties or tuple(rng.sample(list(there.programs), rng.randint(1, 4)))
    try:
        refine.run(both, names, rng)
    except refine.Diverged as diverged:
        raise refine.Diverged(f"seed {seed}, parties {','.join(names)}: {diverged}") from diverged
    return both


def steps(
    hypervisor: str, design: str, seeds: Iterable[int], parties: tuple[str, ...] | None = None,
) -> tuple[int, dict[str, str]]:
    """How many steps the schedules of *seeds* took together, and the laws that broke on the machine."""
    taken, broken = 0, {}
    for seed in seeds:
        both = schedule(hypervisor, design, seed, parties)
        taken += len(both.steps)
        broken |= {law: f"seed {seed}: {words}" for law, words in both.broken.items()}
    return taken, broken

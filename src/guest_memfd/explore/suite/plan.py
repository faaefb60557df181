"""What the suite puts into each scene: every party alone, every pair, and the triples that matter.

It is data. Parties of a long life (three operations, one after the other) are in the scenes that show what they do, with
the partners that race with them; everybody else is everywhere. docs/scenes.md has what each is there to see, and
tests/test_vacuity.py a mistake for each that goes unnoticed without it.
"""

from __future__ import annotations

import itertools

from guest_memfd.explore.engine.scenario import World

Scenario = tuple[str, ...]

NAMED: dict[str, Scenario] = {
    "zero-padding-load": ("vcpu", "zeropad"),
    "two-vcpus": ("vcpu", "vcpu2", "vmm"),
    "pin-and-convert": ("vcpu", "vmm", "device"),
    "kcore-scan": ("vcpu", "vmm", "kcore"),
    "memory-failure": ("vcpu", "vmm", "memory-failure"),
    "pfn-cache": ("vcpu", "vmm", "pfn-cache"),
    "hibernate": ("vcpu", "vmm", "power"),
    "unload": ("vcpu", "vmm", "unloader"),
    "unload-while-stopping": ("vcpu", "unloader", "stop"),
    "stop-and-reclaim": ("vcpu", "vmm", "stop"),
    "drained": ("vcpu", "vmm", "drainer"),
    "life-and-death": ("vmm-life", "vmm2", "stop"),
    "two-vcpus-and-a-call": ("vcpu", "vcpu2", "vmm2"),
    "pin-and-a-call": ("vcpu2", "vmm2", "device"),
    "cache-and-a-call": ("vcpu2", "vmm2", "pfn-cache"),
    "cache-while-stopping": ("vmm2", "pfn-cache", "stop"),
    "poison-and-a-call": ("vcpu2", "vmm2", "memory-failure"),
    "scan-and-a-call": ("vcpu2", "vmm2", "kcore"),
}
"""Hazards people ask for by name."""

ON_REQUEST = ("two-vcpus", "pin-and-convert", "pfn-cache")
"""Named triples that are not in the suite: the same with one call of a VMM in place of two things are a tenth of them."""

QUICK = ("unload-while-stopping", "scan-and-a-call")
"""Named triples for a first look: the others take ten times as long as all the rest of it."""

QUICK_PARTNER, QUICK_WITHOUT = "vcpu2", ("vmm",)
"""A first look at a scene without triples: everybody alone and with this vCPU, which touches one page; but for the VMM that
does two things one after the other, since half of the time would be its. One call at a time is there: vmm2, pinner."""

QUICK_PARTNERS = {"both-shared": (QUICK_PARTNER, "repeater")}
"""Where it is not that vCPU alone: what is there to be converted, all of it at once, meets everybody, too."""

LONG = {
    "vmm-life": ("vcpu", "vmm2", "stop", "memory-failure"),
    "vmm-pages": ("vcpu2", "vmm2", "drainer", "stop", "power"),
    "vmm-mapped": ("vcpu2", "drainer", "pfn-cache", "device"),
    "vmm-any": ("stop",),
}
"""A VMM of three operations -> who else is in its pairs."""

WHERE = {
    "vmm-life": ("two-pages", "unbound"), "vmm-pages": ("two-pages", "both-private"), "vmm-mapped": ("both-shared",),
    "vmm-any": ("two-pages", "crossed"),
}
"""A VMM of three operations -> scenes in which it has pairs."""

TRIPLES = ("two-pages",)
"""Scenes with triples."""


def plan(world: World, *, full: bool = True) -> list[Scenario]:
    """The scenarios of *world*, in their order; without *full* those that are enough for a first look."""
    names = list(world.programs)
    usual = [name for name in names if name not in LONG]
    long = [name for name in names if name in LONG] if full else []
    brief = not full and world.scene.name not in TRIPLES
    if brief:
        usual = [name for name in usual if name not in QUICK_WITHOUT]
    partners = {*QUICK_PARTNERS.get(world.scene.name, (QUICK_PARTNER,))}
    pairs = [*(pair for pair in itertools.combinations(usual, 2) if not brief or partners.intersection(pair)),
             *_long_pairs(world, long)]
    triples = _triples(world, full=full)
    # Of two equally short traces the earlier scenario is reported, and one of fewer parties is easier to read.
    chosen = [*((name,) for name in (*usual, *long)), *(_ordered(names, pair) for pair in pairs), *triples]
    return [scenario for scenario in dict.fromkeys(chosen) if world.apart(scenario)]


def _long_pairs(world: World, long: list[str]) -> list[Scenario]:
    return [(name, other) for name in long if world.scene.name in WHERE[name] or world.scene.name not in _SHIPPED
            for other in LONG[name] if other in world.programs]


_SHIPPED = frozenset(itertools.chain.from_iterable(WHERE.values()))


def _triples(world: World, *, full: bool) -> list[Scenario]:
    scene = world.scene.name
    if scene not in TRIPLES:
        return []
    names = [name for name, parties in NAMED.items() if len(parties) > 2 and name not in ON_REQUEST] if full else QUICK
    there = list(world.programs)
    return [_ordered(there, NAMED[name]) for name in names if all(party in there for party in NAMED[name])]


def _ordered(names: list[str], parties: Scenario) -> Scenario:
    # One order for one set of parties, or the same scenario would be run twice under two names.
    return tuple(sorted(parties, key=names.index))

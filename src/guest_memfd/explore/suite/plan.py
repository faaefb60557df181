"""What the suite puts into each scene: every party alone, every pair, and the triples that matter.

It is data. VMMs of several operations, one after the other, are in the scenes that show what they do, with the partners
that race with them; everybody else is everywhere. docs/scenes.md has what each is there to see, and tests/test_vacuity.py
a mistake for each that goes unnoticed without it.
"""

from __future__ import annotations

import itertools

from guest_memfd.explore.world.scenario import World

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
    "scan-while-stopping": ("vcpu2", "kcore", "stop"),
    "scan-and-a-life": ("vcpu2", "vmm-life", "kcore"),
    "lend-while-stopping": ("vcpu2", "vmm2", "stop"),
    "read-while-created": ("vcpu", "creator", "page-cache-reader"),
    "merge-and-fault": ("vcpu2", "patient-vcpu", "vmm2"),
}
"""Hazards people ask for by name."""

TRIPLES: dict[str, Scenario] = {
    "two-pages": (
        "kcore-scan", "memory-failure", "hibernate", "unload", "unload-while-stopping", "stop-and-reclaim", "drained",
        "life-and-death", "two-vcpus-and-a-call", "pin-and-a-call", "cache-and-a-call", "cache-while-stopping",
        "poison-and-a-call", "scan-and-a-call", "scan-while-stopping", "scan-and-a-life",
    ),
    "nothing-yet": ("read-while-created",),
    "failing-twice": ("pin-and-a-call",),
    "on-demand": ("lend-while-stopping",),
    "mixed-block": ("merge-and-fault",),
}
"""Scene -> its triples. Those that are in none are there for who asks: the same with one call of a VMM in place of two
things are a tenth of them."""

QUICK: dict[str, Scenario] = {
    "two-pages": ("unload-while-stopping", "scan-and-a-call", "scan-while-stopping"),
    "nothing-yet": ("read-while-created",),
    "failing-twice": ("pin-and-a-call",),
}
"""Those of a first look: the others take ten times as long as all the rest of it."""

PARTNER = "vcpu2"
"""The vCPU that touches one page. Where not every pair is explored, everybody is alone and with it."""

FEW: dict[str, Scenario] = {
    "three-pages": (PARTNER,), "failing-twice": (PARTNER,), "on-demand": (PARTNER, "vmm"), "two-large-folios": (PARTNER,),
    "large-beside-small": (PARTNER,), "mixed-block": (PARTNER,), "half-bound": (PARTNER,), "odd-gfn": (PARTNER,),
    "large-for-good": (PARTNER,), "larger-leaves": (PARTNER,),
}
"""Scenes in which that is so in the whole suite, and with whom everybody is: larger than the others, and for what one
operation makes of them, or one driver."""

WHOLE = ("two-pages",)
"""Scenes in which it is not so in a first look. In the others the VMM that does two things one after the other is left out,
too, since half of the time would be its. One call at a time is there: vmm2, pinner."""

QUICK_WITHOUT = ("vmm",)
QUICK_PARTNERS: dict[str, Scenario] = {
    "both-shared": (PARTNER, "repeater"), "three-pages": (), "two-large-folios": (), "larger-leaves": (),
}
"""Scene -> partners in a first look, where they are not that vCPU alone: what is there to be converted, all of it at once,
meets everybody, too."""

LONG: dict[str, dict[str, Scenario]] = {
    "vmm-life": {
        "two-pages": ("vcpu", "vmm2", "stop", "memory-failure"), "unbound": ("vcpu", "vmm2", "stop", "memory-failure"),
        "both-shared": ("memory-failure",), "for-good": ("vcpu", "stop"), "quiet-free": ("vcpu",),
        "on-demand": ("page-cache-reader",), "large-folio": ("vcpu2", "stop"), "half-bound": ("vcpu2",),
    },
    "vmm-pages": {
        "two-pages": ("vcpu2", "vmm2", "drainer", "stop", "power"),
        "both-private": ("vcpu", "vcpu2", "vmm2", "drainer", "stop", "power"), "for-good": ("vcpu2", "stop"),
        "quiet-free": ("vcpu2",), "three-pages": (), "failing-twice": ("vcpu",), "large-folio": ("vcpu2", "vmm2"),
        "larger-leaves": (), "large-beside-small": (),
    },
    "vmm-mapped": {"both-shared": ("vcpu2", "drainer", "pfn-cache", "device"), "quiet-free": ("device",)},
    "vmm-any": {"two-pages": ("stop",), "crossed": ("stop",), "failing-twice": ("vcpu2",), "on-demand": (), "half-bound": (),
                "odd-gfn": (), "two-large-folios": ()},
    "vmm-move": {
        "two-pages": ("vcpu2", "patient-vcpu", "vmm2", "pfn-cache", "memory-failure", "stop"), "crossed": ("vcpu2",),
        "for-good": ("stop",), "failing-twice": (), "large-folio": ("vcpu2",), "two-large-folios": (), "odd-gfn": ("vcpu2",),
    },
}
"""A VMM of several operations -> scene -> who else is in its pairs; in a scene that none of them names, all of them.

In scenes with large folios such a VMM is only where it is named.
"""


def plan(world: World, *, full: bool = True, size: int | None = None) -> list[Scenario]:
    """The scenarios of *world*, in their order; without *full* those that are enough for a first look.

    size: in place of these, every so many different tasks together, without VMMs of several operations.
    """
    names, scene = list(world.programs), world.scene.name
    if size is not None:
        some = itertools.combinations((name for name in names if name not in LONG), size)
        return [scenario for scenario in some if world.apart(scenario)]
    # Without a driver that lends, or without large folios, the scene has nothing of its own.
    if (world.scene.lends and world.library.lender is None) or (world.scene.order and not world.library.order):
        return [(name,) for name in names if full or name not in LONG]
    brief = not full and scene not in WHOLE
    usual = [name for name in names if name not in LONG and not (brief and name in QUICK_WITHOUT)]
    long = [name for name in names if name in LONG and (not world.scene.order or scene in LONG[name])] if full else []
    pairs = [*itertools.combinations(usual, 2)]
    if brief or scene in FEW:
        partners = FEW[scene] if full else QUICK_PARTNERS.get(scene, (PARTNER,))
        pairs = [pair for pair in pairs if {*pair} & {*partners}]
    pairs += [(name, other) for name in long for other in partners_of(name, scene) if other in names]
    triples = (NAMED[name] for name in (TRIPLES if full else QUICK).get(scene, ()))
    # Of two equally short traces the earlier scenario is reported, and one of fewer parties is easier to read.
    chosen = [*((name,) for name in (*usual, *long)), *(_ordered(names, pair) for pair in pairs),
              *(_ordered(names, triple) for triple in triples if {*triple} <= {*names})]
    return [scenario for scenario in dict.fromkeys(chosen) if world.apart(scenario)]


def partners_of(name: str, scene: str) -> Scenario:
    """Who is in a pair with the VMM of several operations *name* in *scene*."""
    if any(scene in places for places in LONG.values()):
        return LONG[name].get(scene, ())
    return tuple(dict.fromkeys(itertools.chain.from_iterable(LONG[name].values())))


def _ordered(names: list[str], parties: Scenario) -> Scenario:
    # One order for one set of parties, or the same scenario would be run twice under two names.
    return tuple(sorted(parties, key=names.index))

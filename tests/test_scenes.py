"""Scenes are data that make sense, each shows a mistake that the same parties do not show elsewhere, and all are told."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import mistaken_drivers
import mistakes
import mistakes_large
import pytest

from guest_memfd.abstract import state as st
from guest_memfd.core.hypervisor import Hypervisor
from guest_memfd.errors import BadInput
from guest_memfd.explore.suite.plan import plan
from guest_memfd.explore.world.scenario import World, world
from guest_memfd.hypervisors import HYPERVISORS
from guest_memfd.scenarios import PARTIES, SCENES
from guest_memfd.words.scene import MOST, Scene, Slot

PAGE = (Path(__file__).parent.parent / "docs" / "scenes.md").read_text(encoding="utf-8")


class Shown(NamedTuple):
    mistake: str
    hypervisor: str
    parties: str
    law: str


SHOWN = {
    "crossed": Shown("GfnIsIndex", "kvm", "vcpu", "no-false-refusal"),
    "both-private": Shown("OnlyTheFirstComesBack", "pkvm", "vcpu stop", "nothing-lost"),
    "both-shared": Shown("CountsTheFirst", "kvm", "repeater device", "pins-respected"),
    "unbound": Shown("AsksForTheUnbound", "kvm", "vmm-pages", "host-survives"),
    "nothing-yet": Shown("CreateKeepsTheModule", "kvm", "creator", "nothing-lost"),
    "for-good": Shown("LeaksTwice", "pkvm", "vcpu2 stop", "nothing-lost"),
    "no-direct-map-changes": Shown("AnyKernelWillDo", "kvm", "vcpu2 kcore", "guest-private"),
    "quiet-free": Shown("RestoresOnce", "kvm", "vcpu vmm2", "nothing-lost"),
    "three-pages": Shown("LooksAtBothEnds", "kvm", "vmm2", "all-or-nothing"),
    "failing-twice": Shown("IgnoresRestore", "kvm", "vcpu2 vmm2 device", "host-survives"),
    "on-demand": Shown("LendsWithoutLock", "gunyah", "vcpu2 pinner", "guest-private"),
    "two-vms": Shown("VetoesForOneFile", "kvm", "vcpu power", "guest-private"),
    "two-large-folios": Shown("SplitsTheFirst", "kvm", "vmm-any", "all-or-nothing"),
    "large-beside-small": Shown("CountsAll", "kvm", "vcpu2 vmm2", "all-or-nothing"),
    "mixed-block": Shown("ASKS_FOR_ALL", "gunyah", "vcpu2 vmm2", "nothing-lost"),
    "half-bound": Shown("AnyGfn", "kvm", "vcpu2", "host-survives"),
    "odd-gfn": Shown("AnyGfn+ROUNDS_DOWN", "kvm", "vcpu2", "one-owner"),
    "large-for-good": Shown("LeaksTheFolio", "tdx", "vcpu2 stop", "nothing-lost"),
    "larger-leaves": Shown("SPLITS_AROUND_THE_FIRST", "pkvm", "vcpu2 vmm2", "all-or-nothing"),
}
"""Scene -> a mistake that it shows, and the other scenes in which the suite has the same parties do not.

two-pages is the plainest, and large-folio the plainest with large folios: everybody meets everybody there, and the others
are compared with them.
"""

PLAINEST = ("two-pages", "large-folio")


def laws_broken(shown: Shown, scene: Scene) -> set[str]:
    parties = [PARTIES[name] for name in shown.parties.split()]
    design, hypervisor = mistakes.OurLibrary, HYPERVISORS[shown.hypervisor]
    for name in shown.mistake.split("+"):
        where = next(module for module in (mistakes, mistakes_large, mistaken_drivers) if hasattr(module, name))
        mistake = getattr(where, name)
        if isinstance(mistake, Hypervisor):
            hypervisor = mistake
        elif where is mistaken_drivers:
            hypervisor = replace(hypervisor, driver=mistake())
        else:
            design = mistake
    there = World(design, hypervisor, parties, scene=scene)
    names = list(there.programs)
    if len(names) < len(parties):                       # somebody cannot exist there
        return set()
    return {finding.law for finding in there.explorer(names).run(max_states=100_000).findings}


def test_every_scene_has_something_to_show() -> None:
    assert [*SHOWN] == [name for name in SCENES if name not in PLAINEST]


@pytest.mark.parametrize("scene", SHOWN)
def test_scene_shows_a_mistake(scene: str) -> None:
    assert SHOWN[scene].law in laws_broken(SHOWN[scene], SCENES[scene])


@pytest.mark.parametrize("scene", SHOWN)
def test_and_no_other_shows_it(scene: str) -> None:
    asked = frozenset(SHOWN[scene].parties.split())
    # Scenes with large folios have all that single pages have, and more: each kind is compared with its own.
    others = [other for other in SCENES if other != scene and bool(SCENES[scene].order) == bool(SCENES[other].order)
              and asked in map(frozenset, plan(world("library", SHOWN[scene].hypervisor, scene=other)))]
    elsewhere = {other: laws_broken(SHOWN[scene], SCENES[other]) for other in others}
    assert {other: laws for other, laws in elsewhere.items() if SHOWN[scene].law in laws} == {}


def test_the_page_tells_of_every_scene() -> None:
    told = dict(re.findall(r"^\| `([\w-]+)` \| [^|]+ \| [^|]+ \| (.+) \|$", PAGE, re.M))
    assert [*told] == [*SCENES]
    for scene, shown in SHOWN.items():
        assert all(f"`{name}`" in told[scene] for name in shown.mistake.split("+"))


def test_sizes_are_the_scenes() -> None:
    scene = Scene(pages=4, frames=6, shared=(1, 3), slots=(Slot(4, 0, 2), Slot(0, 2, 2)), files=2, vms=2)
    there = World(mistakes.OurLibrary, HYPERVISORS["pkvm"], [PARTIES["vcpu"]], scene=scene)
    assert st.layout_of(there.initial).counts == {"pfn": 6, "folio": 0, "page": 8, "gfn": 16, "file": 2, "vm": 2, "party": 3}
    assert [page.attr for page in st.State(there.initial).pages()] == [2, 1, 2, 1] * 2
    assert [page.binding for page in st.State(there.initial).pages()] == [5, 6, 1, 2] * 2
    assert scene.gfns == (0, 1, 4, 5)
    assert [scene.index(gfn) for gfn in range(7)] == [2, 3, None, None, 0, 1, None]


@pytest.mark.parametrize(("wrong", "words"), [
    ({"pages": 5}, "pages must be 1 to 4, not 5"),
    ({"frames": 0}, "frames must be 1 to 6, not 0"),
    ({"vms": 2}, "2 VMs need as many files, not 1"),
    ({"files": 2}, "1 VMs need as many files, not 2"),
    ({"shared": (2,)}, "page 2 cannot be shared, the file has 2 pages"),
    ({"slots": (Slot(0, 1, 2),)}, r"its slots bind pages \[1, 2\] of a file of 2 pages"),
    ({"slots": (Slot(0, 0, 1), Slot(0, 1, 1))}, r"its slots have gfns \[0, 0\]"),
    ({"frames": 1, "populated": True}, "2 pages of files that are there have to fit into 1 frames to be populated"),
    ({"made": False, "populated": True}, "have to fit into 3 frames to be populated"),
    ({"failures": 256}, "failures must be 0 to 255, not 256"),
    ({"pages": True}, "pages must be 1 to 4, not True"),
])
def test_a_scene_that_cannot_be(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        replace(Scene(), **wrong)


def test_largest_sizes_are_told() -> None:
    for what, most in (("pages", MOST["pages"]), ("frames", MOST["frames"])):
        assert f"{most} {what}" in PAGE

"""Large folios: each mistake is refuted, with law and length of the shortest trace; the library holds beside it.

docs/bugs.md has the mistakes of posted series, by the same numbers.
"""

from __future__ import annotations

from dataclasses import fields
from itertools import pairwise
from typing import Any, NamedTuple

import mistakes_large
import pytest
from spots import Spot, seen, shortest

from guest_memfd.abstract import AbstractHost, show
from guest_memfd.abstract.state import State
from guest_memfd.core.hypervisor import Hypervisor
from guest_memfd.designs import DESIGNS, Design
from guest_memfd.designs.ours import OurLibrary
from guest_memfd.errors import BadInput
from guest_memfd.explore.engine.finding import Finding
from guest_memfd.explore.world import scenario
from guest_memfd.explore.world.scenario import World, world
from guest_memfd.hypervisors import HYPERVISORS
from guest_memfd.scenarios import PARTIES, SCENES, Party
from guest_memfd.scenarios.vmm import change
from guest_memfd.words.primitives import Steps
from guest_memfd.words.scene import Kernel, Scene, Slot

ODD_SIZE = Scene("three-of-two", "a file that ends inside of a folio", pages=3, frames=4, shared=(), slots=(Slot(0, 0, 3),),
                 order=1)
TWICE = Scene("large-failing-twice", "what fails, fails again", frames=2, shared=(), failures=2, order=1,
              kernel=Kernel(init_on_free=False, merges_leaves=True))
SCENES_OF_THEIR_OWN = {scene.name: scene for scene in (ODD_SIZE, TWICE)}
STAGES = (1_000, 6_000, 30_000)
MANY = (700_000,)


SPOTS = [
    Spot("ZeroesTheFirstPage", "kvm", "large-folio", "vmm2", "no-stale-data", 7, "a page of the file holds junk where zero"),
    Spot("TakesAnySize", "kvm", "three-of-two", "vmm2", "host-survives", 10, "page 3 is used, of a file of 3 pages"),
    Spot("ScrubsTheFirstPage", "kvm", "large-folio", "vcpu vmm2", "nothing-lost", 31, "a page is freed with the guest's da"),
    Spot("ZeroesWhatIsCut", "kvm", "large-folio", "vcpu2 vmm", "host-survives", 23, "clear_folio takes a translation fault"),
    Spot("PunchZeroes", "kvm", "large-folio", "vmm-pages", "all-or-nothing", 13, "punch returns 0 and a page of the hole i"),
    Spot("TellsTheHead", "kvm", "large-folio", "vcpu2 vmm2", "all-or-nothing", 26, "unbind names page 0 as the one that"),
    Spot("AnnouncesLate", "kvm", "large-folio", "vmm2", "all-or-nothing", 8, "to_shared changes the attribute, which no gm"),
    Spot("ConvertsTheFolio", "kvm", "large-folio", "vmm-pages", "all-or-nothing", 25, "to_shared changes the attribute out"),
    Spot("SplitsAfterTheStore", "kvm", "large-folio", "vcpu2 vmm2", "all-or-nothing", 27, "to_shared is refused and has ch"),
    Spot("TakesBackFirst", "tdx", "large-folio", "vcpu2 vmm", "no-stale-data", 24, "the guest's data is lost: removed from"),
    Spot("NeverSplits", "kvm", "large-folio", "vmm-pages", "all-or-nothing", 16, "punch removes the folio outside of its"),
    Spot("SplitsPinned", "kvm", "large-folio", "vcpu2 vmm2", "all-or-nothing", 26, "unbind takes the page from the guest o"),
    Spot("LeavesTheHole", "kvm", "large-folio", "vcpu2 vmm", "bounded-cost", 41, "user_fault of 2 pages takes 1 leaf split"),
    Spot("LeavesTheGuestsLeaf", "pkvm", "large-folio", "vcpu2 vmm2", "nothing-lost", 54, "a page is never freed (cache 1)"),
    Spot("AnyGfn", "kvm", "half-bound", "vcpu2", "host-survives", 12, "gfn -1 is used, of a VM of 3 guest frames"),
    Spot("AnyGfn+ROUNDS_DOWN", "kvm", "odd-gfn", "vcpu2", "one-owner", 17, "the guest reaches a page that it no longer"),
    Spot("MixedFolios", "kvm", "large-beside-small", "vcpu", "one-owner", 13, "a leaf of the guest maps private pages and"),
    Spot("HeadsGfn", "kvm", "large-folio", "vcpu2", "fault-served", 15, "a fault returns 0, and the guest does not map"),
    Spot("PageByPage", "kvm", "large-failing-twice", "vcpu2 vmm2", "all-or-nothing", 14, "to_shared is refused and has cha"),
    Spot("UndoesOneMore", "kvm", "large-failing-twice", "vcpu2 vmm2", "host-survives", 6, "page -1 is used, of a file of"),
    Spot("DONATES_THE_FIRST", "pkvm", "large-folio", "vcpu", "fault-served", 15, "a fault returns 0, and the guest does no"),
    Spot("KEEPS_THE_LEAF", "pkvm", "large-folio", "vcpu2 vmm2", "nothing-lost", 55, "a page is never freed (cache 1)"),
    Spot("GOES_ON", "tdx", "large-for-good", "vcpu2 vmm2", "one-owner", 37, "the hypervisor says guest, the library says s"),
    Spot("none+SPLITS_NOTHING", "snp", "large-folio", "vcpu vmm2", "host-survives", 13, "clear_folio takes a page fault of"),
    Spot("SMASHES_NOTHING", "snp", "large-folio", "vcpu2 vmm2", "no-false-refusal", 34, "unbind returns -EIO, and nothing"),
]

DEEP = [
    Spot("ZapsUnzeroed", "kvm", "mixed-block", "vcpu2 patient-vcpu vmm2", "host-survives", 44, "clear_folio takes a transl"),
    Spot("GOES_BY_THE_FIRST", "pkvm", "mixed-block", "vcpu2 patient-vcpu vmm2", "fault-served", 50, "a fault returns 0, an"),
    Spot("PREPARED_IS_INVERTED", "pkvm", "mixed-block", "vcpu2 patient-vcpu vmm2", "fault-served", 53, "a fault returns 0,"),
    Spot("OneFlag", "kvm", "mixed-block", "vmm-pages memory-failure", "poison-contained", 91, "the library reaches a page"),
]
"""Those that take a merge."""


class Planted(NamedTuple):
    design: type[Design]
    hypervisor: Hypervisor
    host: type[AbstractHost]


def planted(spot: Spot) -> Planted:
    """Design, hypervisor and host of *spot*, one or two of them with its mistake."""
    found = Planted(OurLibrary, HYPERVISORS[spot.hypervisor], AbstractHost)
    for name in spot.mistake.split("+"):
        mistake: Any = DESIGNS[name] if name in DESIGNS else getattr(mistakes_large, name)
        if isinstance(mistake, Hypervisor):
            found = found._replace(hypervisor=mistake)
        elif issubclass(mistake, AbstractHost):
            found = found._replace(host=mistake)
        else:
            found = found._replace(design=mistake)
    return found


def findings(spot: Spot, monkeypatch: pytest.MonkeyPatch, stages: tuple[int, ...]) -> list[Finding]:
    """What breaks where *spot* is."""
    there = planted(spot)
    monkeypatch.setattr(scenario, "AbstractHost", there.host)
    names = spot.parties.split()
    scene = SCENES_OF_THEIR_OWN.get(spot.scene) or SCENES[spot.scene]
    parties = [PARTIES[name] for name in names]
    return seen(World(there.design, there.hypervisor, parties, scene=scene).explorer(names), spot, stages)


@pytest.mark.parametrize("spot", SPOTS, ids=lambda spot: spot.mistake)
def test_mistake_is_seen(spot: Spot, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shortest(findings(spot, monkeypatch, STAGES), spot.law, spot.evidence) == spot.steps


@pytest.mark.long
@pytest.mark.parametrize("spot", DEEP, ids=lambda spot: spot.mistake)
def test_mistake_that_takes_more_is_seen(spot: Spot, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shortest(findings(spot, monkeypatch, MANY), spot.law, spot.evidence) == spot.steps


def rebinds(design: Design, hypervisor: Hypervisor) -> Steps[None]:
    """Unbind the page that is bound, allocate all of the file, bind the page again: a folio is there, and is cut."""
    yield from change(design, "unbind", 1, 1)
    yield from change(design, "allocate", 0, 2)
    yield from change(design, "bind", 1, 1)


@pytest.mark.parametrize(("design", "steps"), [(mistakes_large.BindsWhatIsCut, [32]), (OurLibrary, [])])
def test_a_folio_that_is_there_is_split_by_who_binds_a_part_of_it(design: type[Design], steps: list[int]) -> None:
    parties = [PARTIES["vcpu2"], Party("vmm", "unbinds, allocates, binds", rebinds, fd=False)]
    there = World(design, HYPERVISORS["kvm"], parties, scene=SCENES["half-bound"], engine="python")
    found = there.explorer(["vcpu2", "vmm"]).run().findings
    assert [len(f.steps) for f in found if f.evidence == "gfn -1 is used, of a VM of 3 guest frames"] == steps
    assert {State(shared).folio(0).order for shared in there.tables.shared} == {0, 1}


WHERE = sorted({(spot.hypervisor, spot.scene, spot.parties) for spot in SPOTS if spot.scene in SCENES})


@pytest.mark.parametrize("where", WHERE, ids="-".join)
def test_the_library_holds_there(where: tuple[str, str, str]) -> None:
    hypervisor, scene, parties = where
    assert world("library", hypervisor, scene=scene).explorer(parties.split()).run(max_states=STAGES[1]).findings == []


# -- what has happened in these scenes: else nothing has been shown --------------------------------------------------------


@pytest.mark.parametrize("hypervisor", [name for name in HYPERVISORS if HYPERVISORS[name].large])
def test_folios_are_split_and_merged_and_leaves_with_them(hypervisor: str) -> None:
    there = world("library", hypervisor, scene="large-folio", engine="python")
    there.explorer(["vcpu2", "vmm2"]).run()
    seen = [State(shared) for shared in there.tables.shared]
    # By order of the folio and of the leaves that map its first page, of a page that the guest has.
    mapped = {(state.folio(0).order, state.folio(0).s1_leaf, state.folio(0).guest_leaf)
              for state in seen if state.frame(0).gmap}
    assert {(1, 1, 1), (0, 0, 0)} <= mapped


def test_pages_become_one_folio_again() -> None:
    there = world("library", "kvm", scene="mixed-block", engine="python")
    there.explorer(["vcpu2", "vmm2"]).run()
    assert {State(shared).folio(0).order for shared in there.tables.shared} == {0, 1}


# -- what a scene, a design and a hypervisor have ---------------------------------------------------------------------------


class LargerThanThere(OurLibrary):
    """Folios of an order that no scene has."""

    large, order = False, 3


def test_an_order_that_the_scene_does_not_have_is_refused() -> None:
    with pytest.raises(BadInput, match="has folios of order 3; scene 'large-folio' has order 1 at most"):
        World(LargerThanThere, HYPERVISORS["kvm"], [PARTIES["vcpu"]], scene=SCENES["large-folio"])


@pytest.mark.parametrize(("order", "frames", "wrong"), [(3, 8, "order must be 0 to 2"), (-1, 4, "order must be 0 to 2"),
                                                        (1, 3, "3 frames are no whole number of folios of order 1")])
def test_a_scene_whose_folios_do_not_fit(order: int, frames: int, wrong: str) -> None:
    with pytest.raises(BadInput, match=wrong):
        Scene(order=order, frames=min(frames, 6))


@pytest.mark.parametrize(("design", "hypervisor"), [("none", "kvm"), ("secretmem", "kvm")])
def test_designs_of_single_pages_take_single_pages(design: str, hypervisor: str) -> None:
    there = world(design, hypervisor, scene="large-folio")
    assert (there.library.order, there.library.splits) == (0, False)


def test_a_hypervisor_that_says_nothing_of_large_folios_is_given_single_pages() -> None:
    tiny = HYPERVISORS["kvm"]
    said = {field.name: getattr(tiny, field.name) for field in fields(tiny) if field.init and field.name != "large"}
    there = world("library", Hypervisor(**said), scene="large-folio")
    assert (there.library.order, there.library.splits) == (0, False)


# -- as it is told ---------------------------------------------------------------------------------------------------------


def test_a_counterexample_tells_folios_and_leaves_in_words() -> None:
    parties = ["vcpu2", "vmm2"]
    there = World(mistakes_large.LeavesTheGuestsLeaf, HYPERVISORS["pkvm"], [PARTIES[name] for name in parties],
                  scene=SCENES["large-folio"])
    found = there.explorer(parties).run(max_states=STAGES[-1]).findings
    (finding,) = (f for f in found if f.law == "nothing-lost" and f.evidence.startswith("a page is never freed"))
    states = [finding.initial, *(step.shared for step in finding.steps)]
    told = [words for before, after in pairwise(states) for words in show.changed(before, after)]
    assert any("folio of order 0 -> 1" in words for words in told)
    assert any("direct-map leaf of order 1 -> 0" in words for words in told)
    assert not any(words.startswith("folio") for words in told)
    assert "guest leaf of order 1" in show.frame(show.fields_of(states[20]), 0)

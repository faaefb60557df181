"""What the laws and the scenes once did not see, each as a test: the mistake is refuted, the library holds beside it.

Law and length of the shortest trace are pinned; docs/bugs.md has the same in words.
"""

from __future__ import annotations

from dataclasses import replace
from errno import EIO, EOPNOTSUPP

import mistakes
import mistakes_found
import pytest
from spots import Spot, seen, shortest

from guest_memfd.abstract.state import State
from guest_memfd.core.hypervisor import Hypervisor
from guest_memfd.designs import Design
from guest_memfd.designs.ours import OurLibrary
from guest_memfd.errors import DesignRaised
from guest_memfd.explore.engine.finding import Finding
from guest_memfd.explore.world.scenario import World, world
from guest_memfd.hypervisors import HYPERVISORS
from guest_memfd.hypervisors.kvm import pkvm
from guest_memfd.laws import LAWS
from guest_memfd.scenarios import PARTIES, SCENES, Party
from guest_memfd.scenarios.vmm import change
from guest_memfd.words.primitives import Host, Steps
from guest_memfd.words.scene import Kernel, Scene

USER = Host("user")
ENOUGH = 100_000
STAGES = (1_000, 10_000, ENOUGH)


class GoesRound(OurLibrary):
    """Tries to create a file until the kernel changes."""

    def create(self, size: int, shared: tuple[int, ...] = ()) -> Steps[int]:
        while (yield from self.host.can_set_direct_map()):
            pass
        return 0


SPOTS = [
    Spot("FileNotHeld", "kvm", "two-pages", "vcpu2 vmm-life", "lifetimes", 15, "use after free of the inode, in down_read"),
    Spot("UnbindNotHeld", "kvm", "two-pages", "vmm-life stop", "lifetimes", 15, "use after free of the inode, in down_w"),
    Spot("BindsToTheDead", "kvm", "two-pages", "vmm-life stop", "lifetimes", 18, "use after free of the VM, in gmem_inval"),
    Spot("PunchLeavesUserEntries", "kvm", "two-pages", "vmm", "no-stale-mapping", 18, "the VMM's page table maps a page"),
    Spot("PunchTellsNoCache", "kvm", "two-pages", "vmm2 pfn-cache", "no-stale-mapping", 23, "a gfn_to_pfn_cache maps a"),
    Spot("PunchTellsNoCache", "kvm", "two-pages", "vmm2 pfn-cache drainer", "free-memory", 29, "gfn_to_pfn_cache user writ"),
    Spot("FaultMapsNothing", "kvm", "two-pages", "vcpu2", "fault-served", 10, "a fault returns 0, and the guest does not"),
    Spot("PoisonServed", "kvm", "two-pages", "vcpu2 memory-failure", "poison-contained", 39, "fault of a page whose memory"),
    Spot("PoisonStays", "kvm", "two-pages", "vcpu2 memory-failure", "poison-contained", 22, "memory_failure() is told tha"),
    Spot("DelayedIsFailure", "kvm", "two-pages", "vcpu2 memory-failure", "poison-contained", 28, "memory_failure() is tol"),
    Spot("OnlyTriesTheLock", "kvm", "two-pages", "vcpu2 vmm2 memory-failure", "poison-contained", 19, "memory_failure() i"),
    Spot("PoisonRestored", "kvm", "two-pages", "vcpu2 vmm2 memory-failure", "poison-contained", 41, "a page whose memory"),
    Spot("AllocateDonates", "pkvm", "two-pages", "vmm-pages", "no-false-refusal", 21, "punch returns -EBUSY, and nothing"),
    Spot("AllocateDonates", "gunyah", "two-pages", "vmm-pages", "no-false-refusal", 22, "punch returns -EBUSY, and nothing"),
    Spot("FreesWhatIsRefused", "pkvm", "for-good", "vcpu2 stop", "nothing-lost", 50, "a page is freed while it is the gues"),
    Spot("LeaksTwice", "pkvm", "for-good", "vcpu2 stop", "nothing-lost", 53, "a page that the hypervisor keeps is not give"),
    Spot("LeaksAtOnce", "pkvm", "two-pages", "vcpu2 stop", "nothing-lost", 52, "a page is kept out of use for ever, and th"),
    Spot("AnyKernelWillDo", "kvm", "no-direct-map-changes", "vcpu2 kcore", "guest-private", 18, "copy_from_kernel_nofault"),
    Spot("UnmapsTheLast", "kvm", "both-shared", "vmm2 device", "one-owner", 37, "the VMM's page table maps a page that is"),
    Spot("SharesUnannounced", "kvm", "both-private", "vmm2", "all-or-nothing", 6, "to_shared changes the attribute, wh"),
    Spot("ReadersWelcome", "kvm", "two-pages", "vcpu2 page-cache-reader", "host-survives", 15, "read_folio takes a transl"),
    Spot("BoundAnywhere", "kvm", "two-pages", "vcpu2 vmm-move", "one-owner", 30, "the guest reaches a page that it no"),
    Spot("BindOverwrites", "kvm", "two-pages", "vmm2", "all-or-nothing", 5, "bind takes a page that is bound already"),
    Spot("BindLooksAtBothEnds", "kvm", "three-pages", "vmm-life", "all-or-nothing", 20, "bind takes a page that is bound"),
    Spot("LooksAtBothEnds", "kvm", "three-pages", "vmm-pages", "all-or-nothing", 2, "to_private returns 0 and a page has"),
    Spot("ReleasesEarly", "pkvm", "two-pages", "vcpu stop", "lifetimes", 10, "use after free of what the hypervisor keeps"),
    Spot("ReleasesTwice", "kvm", "two-pages", "stop", "lifetimes", 12, "use after free of what the hypervisor keeps of the"),
    Spot("FlagAfterInstall", "kvm", "nothing-yet", "vcpu creator page-cache-reader", "host-survives", 27, "read_folio tak"),
    Spot("TeardownRestores", "kvm", "two-pages", "vcpu2 stop kcore", "guest-private", 27, "copy_from_kernel_nofault rea"),
    Spot("EvictRestoresFirst", "kvm", "two-pages", "vcpu2 vmm-life kcore", "guest-private", 22, "copy_from_kernel_nof"),
    Spot("UserFaultMapsNothing", "kvm", "two-pages", "device", "fault-served", 9, "a fault returns 0, and the VMM does"),
    Spot("ErrorHoldsNothing", "kvm", "both-shared", "vmm-life memory-failure", "lifetimes", 25, "use after free of the"),
    Spot("CreateIgnoresShared", "kvm", "nothing-yet", "creator", "all-or-nothing", 6, "create returns 0 and a page is"),
    Spot("CreateSharesAll", "gunyah", "nothing-yet", "creator", "all-or-nothing", 7, "create returns 0 and a page is not"),
    Spot("CreateLosesAnError", "pkvm", "nothing-yet", "creator", "all-or-nothing", 7, "create returns 0 and a page is"),
    Spot("LastBeforeTheLock", "kvm", "two-pages", "vmm vmm2", "nothing-lost", 29, "the inode is held for ever"),
    Spot("IgnoresRestore", "kvm", "failing-twice", "vcpu2 vmm2 device", "host-survives", 40, "copy through a GUP refer"),
    Spot("ToSharedTruncates", "kvm", "two-pages", "vcpu vmm", "no-stale-data", 29, "the guest's data is lost: to_shared"),
    Spot("ToPrivateTruncates", "kvm", "two-pages", "vcpu vmm", "no-stale-data", 34, "the guest's data is lost: to_priva"),
    Spot("FailureTruncates", "kvm", "two-pages", "vmm vmm2", "no-stale-data", 29, "the guest's data is lost: to_privat"),
    Spot("UnbindTruncates", "kvm", "two-pages", "vcpu2 vmm2", "no-stale-data", 33, "the guest's data is lost: unbind t"),
    Spot("TeardownTruncates", "kvm", "two-pages", "vcpu2 stop", "no-stale-data", 33, "the guest's data is lost: teardow"),
    Spot("UnbindScrubs", "kvm", "two-pages", "vcpu2 vmm2", "no-stale-data", 31, "a page of the file holds zero where s"),
    Spot("PoisonTruncates", "kvm", "two-pages", "vcpu2 memory-failure", "no-stale-data", 31, "the guest's data is lost"),
    Spot("PoisonScrubbed", "kvm", "two-pages", "vcpu memory-failure", "poison-contained", 56, "the library reaches a p"),
    Spot("SCRUBS", "gunyah", "two-pages", "vcpu vmm2", "no-stale-data", 32, "a page of the file holds zero where data"),
    Spot("PartlyUnbound", "gunyah", "both-private", "vcpu vmm", "all-or-nothing", 28, "unbind is refused and has chang"),
    Spot("BindLeavesPart", "kvm", "nothing-yet", "creator", "all-or-nothing", 13, "bind is refused and has changed a"),
    Spot("RemovesBackwards", "pkvm", "for-good", "vcpu2 vmm-pages", "all-or-nothing", 32, "punch stops at page 0, and"),
    Spot("NeverReleases", "kvm", "two-pages", "stop", "nothing-lost", 27, "what the hypervisor keeps of the file is he"),
    Spot("NEVER_RELEASES", "gunyah", "two-pages", "stop", "nothing-lost", 27, "what the hypervisor keeps of the file"),
    Spot("UnbindTellsNoCache", "kvm", "two-pages", "vmm2", "all-or-nothing", 5, "unbind changes the binding, which no "),
    Spot("ErrorWantsTheFile", "kvm", "both-shared", "vmm-life memory-failure", "poison-contained", 24, "memory_failure()"),
    Spot("MunmapEvictsBare", "kvm", "failing-twice", "vcpu2 vmm-any", "nothing-lost", 56, "a page is freed with the gue"),
    Spot("NeverHibernates", "kvm", "two-pages", "power", "no-false-refusal", 3, "hibernation is refused, and nothing stan"),
    Spot("EnomemIsEagain", "kvm", "two-pages", "vmm2", "all-or-nothing", 4, "to_shared is refused and does not say whe"),
    Spot("ConvertsTheFirst", "kvm", "both-shared", "vmm2", "no-false-refusal", 14, "to_private has been about other page"),
    Spot("PunchesFromZero", "kvm", "two-pages", "vmm", "no-false-refusal", 7, "punch has been about other pages than it"),
    Spot("FaultsPageZero", "kvm", "both-shared", "device", "no-false-refusal", 9, "user_fault has been about other pages"),
    Spot("FaultLies", "kvm", "both-shared", "device", "no-false-refusal", 9, "user_fault has ended with 0 and user_fault"),
    Spot("FaultTriesTheLock", "kvm", "both-shared", "vmm2 device", "no-false-refusal", 5, "user_fault returns -EFAULT"),
    Spot("BindsBeside", "kvm", "two-pages", "vmm-life", "no-false-refusal", 5, "bind has been about gfn 2, and was asked"),
    Spot("LosesTheIndex", "kvm", "both-shared", "vmm2 device", "no-false-refusal", 18, "to_private has ended at page N"),
    Spot("EnomemBlamesAPage", "kvm", "two-pages", "vmm2", "all-or-nothing", 4, "to_shared names page 0 as the one that"),
    Spot("AsksForWhatIsSo", "pkvm", "two-pages", "vcpu vcpu2 vmm2", "all-or-nothing", 30, "to_private is refused for "),
    Spot("PunchMindsPins", "kvm", "two-pages", "vmm device", "no-false-refusal", 17, "punch returns -EBUSY, and nothing "),
]

DEEP = Spot("AsksOneByOne", "gunyah", "both-private", "vcpu vmm-pages", "all-or-nothing", 39, "punch is refused and has")


def planted(spot: Spot) -> tuple[type[Design], Hypervisor]:
    """The design and the hypervisor of *spot*: the mistake is one of either."""
    mistake = getattr(mistakes, spot.mistake, None) or getattr(mistakes_found, spot.mistake)
    return (mistake, HYPERVISORS[spot.hypervisor]) if isinstance(mistake, type) else (OurLibrary, mistake)


def findings(
    design: type[Design], hypervisor: Hypervisor, scene: Scene, parties: list[Party], most: int = ENOUGH,
) -> list[Finding]:
    """What breaks in one scenario."""
    there = World(design, hypervisor, parties, scene=scene)
    return there.explorer([p.name for p in parties]).run(max_states=most).findings


ELSEWHERE = [
    # A cache that is filled where nothing is bound is told of no invalidation: it must not be filled.
    ("kvm", "two-pages", "vmm2 pfn-cache stop"), ("pkvm", "two-pages", "vmm2 pfn-cache stop"),
]
"""What broke the library in scenarios that need no mistake."""


@pytest.mark.parametrize("spot", SPOTS, ids=lambda s: f"{s.mistake}-{s.hypervisor}-{s.law}")
def test_mistake_is_seen(spot: Spot) -> None:
    there = World(*planted(spot), [PARTIES[name] for name in spot.parties.split()], scene=SCENES[spot.scene])
    found = seen(there.explorer(spot.parties.split()), spot, STAGES)
    assert shortest(found, spot.law, spot.evidence) == spot.steps


@pytest.mark.long
def test_a_mistake_that_takes_a_guest_with_one_page_and_two_operations_of_its_vmm() -> None:
    parties = [PARTIES[name] for name in DEEP.parties.split()]
    found = findings(*planted(DEEP), SCENES[DEEP.scene], parties, most=10 * ENOUGH)
    assert shortest(found, DEEP.law, DEEP.evidence) == DEEP.steps


@pytest.mark.long
@pytest.mark.parametrize("where", sorted({*((s.hypervisor, s.scene, s.parties) for s in SPOTS), *ELSEWHERE}), ids="-".join)
def test_library_holds_there(where: tuple[str, str, str]) -> None:
    hypervisor, scene, parties = where
    there = [PARTIES[name] for name in parties.split()]
    # As far as mistakes there have shown; the whole is in tests/test_verdicts.py, and in `gmem check library`.
    assert findings(OurLibrary, HYPERVISORS[hypervisor], SCENES[scene], there, most=STAGES[-1] // 4) == []


@pytest.mark.parametrize(("hypervisor", "parties"), [("kvm", "vmm-pages"), ("pkvm", "vcpu vmm")])
def test_an_invalidation_inside_of_another_is_right(hypervisor: str, parties: str) -> None:
    there = [PARTIES[name] for name in parties.split()]
    assert findings(mistakes_found.NestedInvalidation, HYPERVISORS[hypervisor], SCENES["two-pages"], there) == []


def test_a_create_that_goes_round_for_ever() -> None:
    with pytest.raises(DesignRaised, match=r"'scene' of design .* goes round for ever, at can_set_direct_map"):
        World(GoesRound, HYPERVISORS["kvm"], [PARTIES["vcpu"]])


# -- pKVM ----------------------------------------------------------------------------------------------------------


def shares_and_punches(design: Design, hypervisor: Hypervisor) -> Steps[None]:
    """Convert the first page to shared, then punch it."""
    yield from change(design, "to_shared", 0, 1)
    yield from change(design, "punch", 0, 1)


def gives_up(design: Design, hypervisor: Hypervisor) -> Steps[None]:
    """A guest that touches the first page and shares it with the host."""
    guest = Host("guest")
    if (yield from guest.guest_access(0, True)) == "fault":
        yield from design.guest_fault(0, 0)
        yield from guest.guest_access(0, True)
    yield from guest.guest_consents(0)


SHARING = [Party("vcpu", "a guest that shares its page", gives_up, fd=False),
           Party("vmm", "to_shared, punch", shares_and_punches, fd=False),
           PARTIES["stop"]]


def test_a_borrowed_page_of_a_guest_that_dies() -> None:
    found = findings(OurLibrary, mistakes.ASKS_THEN_ACTS, SCENES["two-pages"], SHARING)
    assert shortest(found, "nothing-lost", "a page is freed while it is the guest's (owner borrowed)") == 70
    assert findings(OurLibrary, pkvm.PKVM, SCENES["two-pages"], SHARING) == []


def test_a_consent_that_outlives_the_conversion_to_private() -> None:
    parties = [PARTIES["vcpu"], PARTIES["vmm-pages"]]
    found = findings(OurLibrary, mistakes.KEEPS_CONSENT, SCENES["failing-twice"], parties)
    assert shortest(found, "one-owner", "a page has become private, and by the hypervisor's record the guest still") == 42


def test_half_done_donation() -> None:
    parties = [PARTIES["vcpu"], PARTIES["vcpu2"]]
    found = findings(OurLibrary, mistakes.HALF_DONE, SCENES["two-pages"], parties)
    assert shortest(found, "fault-served", "a fault returns 0, and the guest does not map the page") == 23


# -- right outcomes ------------------------------------------------------------------------------------------------


def at_end(there: World) -> set[int]:
    """How many pages are counted as leaked in the states that were seen."""
    return {State(shared).leaked for shared in there.tables.shared}


@pytest.mark.parametrize("hypervisor", ["pkvm", "gunyah"])
@pytest.mark.parametrize("parties", ["vcpu stop", "vcpu vmm", "vmm2 stop"])
def test_what_never_comes_back_is_given_up(hypervisor: str, parties: str) -> None:
    there = world("library", hypervisor, scene="for-good", engine="python")     # which lists the states
    assert there.explorer(parties.split()).run().findings == []
    leaked = at_end(there)
    assert leaked == {0, 1} or parties == "vmm2 stop"       # without a guest nothing can be refused


@pytest.mark.parametrize("hypervisor", ["kvm", "pkvm", "gunyah"])
def test_library_refuses_a_kernel_that_cannot_change_its_direct_map(hypervisor: str) -> None:
    there = world("library", hypervisor, scene="no-direct-map-changes")
    assert there.refused == -EOPNOTSUPP
    assert there.explorer(["vcpu", "vmm"]).run().findings == []


def test_readers_on_a_kernel_that_does_not_ask() -> None:
    """AS_NO_DIRECT_MAP helps only where readers look at it."""
    scene = Scene(name="old-readers", title="readers of page-cache folios ask no one", kernel=Kernel(asks_mapping=False))
    parties = [PARTIES["vcpu2"], PARTIES["page-cache-reader"]]
    found = findings(OurLibrary, HYPERVISORS["kvm"], scene, parties)
    assert shortest(found, "host-survives", "read_folio takes a translation fault") == 15


def test_a_hypervisor_adds_its_own_errno() -> None:
    """As SNP has -EIO for what its firmware refuses."""
    def refused(*_: object) -> int:
        return -EIO

    kvm = HYPERVISORS["kvm"]
    strict = replace(kvm, hypercalls={**kvm.hypercalls, "mmu_map": refused})
    evidence = f"fault returns errno {EIO}, which is not documented for it"
    laws = [LAWS["all-or-nothing"]]

    def broken(hypervisor: Hypervisor) -> list[str]:
        there = World(OurLibrary, hypervisor, [PARTIES["vcpu2"]], laws=laws)
        return [f.evidence for f in there.explorer(["vcpu2"]).run().findings]

    assert broken(strict) == [evidence]
    assert broken(replace(strict, errnos={"fault": (EIO,)})) == []


def test_two_hundred_parties() -> None:
    def nothing(design: Design, hypervisor: Hypervisor) -> Steps[None]:
        yield from USER.fdget()
        yield from design.close()

    many = [Party(f"plugin{n}", "one of many", nothing) for n in range(200)]
    there = World(OurLibrary, HYPERVISORS["kvm"], many)
    assert there.explorer(["plugin3", "plugin199"]).run().verdict == "holds"

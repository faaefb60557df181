"""s390: the library holds there, each mistake is refuted; what an export leaves, and what an import looks at."""

from __future__ import annotations

from errno import EBUSY, EPERM
from typing import Any

import mistakes_s390
import pytest
from driver import Bench
from spots import Spot, shortest

from guest_memfd.abstract import state as st
from guest_memfd.cli.main import main as gmem
from guest_memfd.designs.none import NoDesign
from guest_memfd.designs.ours import OurLibrary
from guest_memfd.errors import BadInput
from guest_memfd.explore.engine.finding import Finding
from guest_memfd.explore.suite.check import check
from guest_memfd.explore.world.scenario import World
from guest_memfd.hypervisors.kvm.s390 import S390
from guest_memfd.machine.boot import boot
from guest_memfd.scenarios import PARTIES, SCENES
from guest_memfd.words import facts
from guest_memfd.words.pagestate import GUEST, SECRET, ZERO
from guest_memfd.words.primitives import Folio, Primitive
from guest_memfd.words.scene import Scene

ON_OUR_LIBRARY = [
    Spot("FORGETS_THE_EXPORT", "s390", "two-pages", "vcpu2 vmm2", "nothing-lost", 58,
         "a page is freed while it is the guest's"),
    Spot("DESTROYS_FOR_AN_EXPORT", "s390", "for-good", "vcpu2 vmm", "no-stale-data", 28,
         "a page of the file holds zero where secret should be"),
]
IN_THE_DIRECT_MAP = [
    Spot("DESTROYS_WHAT_IS_TOUCHED", "s390", "two-pages", "vcpu2 zeropad", "no-stale-data", 9,
         "the guest's data is lost: destroyed because the host touched it"),
    Spot("NEVER_EXPORTS", "s390", "two-pages", "vcpu2 page-cache-reader", "host-survives", 12,
         "read_folio takes a secure storage access exception"),
    Spot("IMPORTS_ONCE", "s390", "two-pages", "patient-vcpu zeropad", "fault-served", 22, "a fault returns 0"),
]
TRUSTING = [
    Spot("COUNTS_NO_REFERENCES", "s390", "two-pages", "vmm2 device", "pins-respected", 24,
         "a page is converted while somebody holds a reference"),
]
DESIGN = {**dict.fromkeys(ON_OUR_LIBRARY, OurLibrary), **dict.fromkeys(IN_THE_DIRECT_MAP, NoDesign),
          **dict.fromkeys(TRUSTING, mistakes_s390.TrustsTheDriver)}


def findings(spot: Spot, *, repaired: bool = False) -> list[Finding]:
    hypervisor = S390 if repaired else getattr(mistakes_s390, spot.mistake)
    names = spot.parties.split()
    there = World(DESIGN[spot], hypervisor, [PARTIES[name] for name in names], scene=SCENES[spot.scene])
    # A mistake is looked for as far as it is known to be, and what is repaired everywhere.
    result = there.explorer(names).run(max_states=60_000, max_steps=1 << 40 if repaired else spot.steps)
    assert result.limit is None or not repaired
    return result.findings


@pytest.mark.parametrize("spot", DESIGN, ids=lambda spot: spot.mistake)
def test_mistake_is_seen(spot: Spot) -> None:
    assert shortest(findings(spot), spot.law, spot.evidence) == spot.steps


@pytest.mark.parametrize("spot", DESIGN, ids=lambda spot: spot.mistake)
def test_without_it_the_law_holds_there(spot: Spot) -> None:
    broken = {finding.law for finding in findings(spot, repaired=True)}
    # A design that trusts the driver drains nothing, which two other laws say of it.
    assert spot.law not in broken if spot in TRUSTING else broken == set()


def test_where_the_uv_keeps_a_page_a_plain_read_stops_the_kernel_and_a_stray_load_does_not() -> None:
    for party, survives in (("page-cache-reader", False), ("zeropad", True)):
        names = ["vcpu2", "vmm2", party]
        there = World(NoDesign, S390, [PARTIES[name] for name in names], scene=SCENES["for-good"])
        found = there.explorer(names).run().findings
        assert {finding.law for finding in found} == (set() if survives else {"host-survives"})


@pytest.mark.long
def test_the_library_holds_in_a_first_look_at_every_scene() -> None:
    report = check("library", "s390", full=False, jobs=1)
    assert (report.verdict, report.findings) == ("holds", ())


# -- the Ultravisor ---------------------------------------------------------------------------------------------------------


class Host:
    """An abstract host with a page that its guest has written, in the direct map."""

    def __init__(self) -> None:
        self.bench = Bench("s390", NoDesign, scene=Scene())
        assert self.bench.do(lambda library: library.guest_fault(0, 0)) == 0
        self.bench._perform(Primitive("guest_access", (0, True), "guest"))

    def call(self, name: str, *args: Any) -> int:
        return int(self.bench._perform(Primitive("hyp_call", (name, *args), "kvm")))

    @property
    def frame(self) -> st.Frame:
        return self.bench.state.frame(0)

    @property
    def secure(self) -> tuple[int, int]:
        """Whether the host is kept out, and whether the guest maps the page."""
        return 1 - self.frame.s2, int(self.frame.gmap)


def test_what_is_exported_is_imported_with_its_contents() -> None:
    host = Host()
    assert (host.secure, host.frame.content) == ((1, 1), SECRET)
    assert host.call("convert_from_secure", 0, Folio(0)) == 0
    assert (host.secure, host.frame.owner, host.frame.content) == ((0, 0), GUEST, SECRET)
    assert host.frame.asked                                     # its guest has not let go of it
    assert host.call("convert_to_secure", 0, Folio(0)) == 0
    assert (host.secure, host.frame.content) == ((1, 1), SECRET)


def test_a_read_of_the_host_exports_the_page_and_is_repeated() -> None:
    host = Host()
    for _ in range(2):                          # of an exported page nothing has to be exported
        assert host.bench._perform(Primitive("read_folio", (Folio(0),), "mm")) == "ok"
    seen = [note for note in host.bench.notes if isinstance(note, facts.Access) and note.who == "kernel"]
    aborts = [note for note in host.bench.notes if isinstance(note, facts.Abort)]
    assert [(note.content, note.write) for note in seen] == [("ciphertext", False)] * 2
    assert [(note.kind, note.survived) for note in aborts] == [("secure storage access exception", True)]
    assert (host.secure, bool(host.frame.asked)) == ((0, 0), True)
    assert host.bench.do(lambda library: library.guest_fault(0, 0)) == 0
    assert (host.secure, host.frame.content) == ((1, 1), SECRET)


@pytest.mark.parametrize("exported_before", [True, False])
def test_what_the_host_has_written_to_is_not_imported(exported_before: bool) -> None:
    host = Host()
    if exported_before:
        assert host.call("convert_from_secure", 0, Folio(0)) == 0
    host.bench._perform(Primitive("write_folio", (Folio(0), False), "library"))
    assert any(isinstance(note, facts.Destroyed) for note in host.bench.notes)
    assert host.call("convert_to_secure", 0, Folio(0)) == -EPERM
    assert host.bench._perform(Primitive("guest_access", (0, True), "guest")) == "poisoned"


def test_a_page_is_shared_with_its_contents_when_the_guest_says_so_and_destroyed_without() -> None:
    host = Host()
    assert host.call("check_shared", Folio(0)) == -EBUSY
    assert host.bench._perform(Primitive("guest_consents", (0,), "guest")) == "ok"
    assert host.call("check_shared", Folio(0)) == 0
    assert host.secure == (0, 1)
    assert host.call("map_shared", 0, Folio(0)) == 0            # of another vCPU, which was later
    assert host.call("remove_shared", Folio(0)) == 0
    assert (host.secure, host.frame.owner) == ((1, 1), GUEST)
    assert host.call("destroy_secure", 0, Folio(0)) == 0
    assert (host.secure, host.frame.owner, host.frame.content) == ((0, 0), 0, ZERO)


def test_no_emulated_machine_is_an_s390(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BadInput, match="keeps its guests' memory encrypted"):
        boot("s390")
    assert gmem(["run", "hello", "--on", "emulated:arm64/s390"]) == 4
    assert capsys.readouterr().err.count("\n") == 1

"""Arm CCA: the library holds there, each mistake is refuted; and what a stray access does under each hypervisor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mistakes_cca
import pytest
from driver import Bench
from spots import Spot, shortest

from guest_memfd.abstract import state as st
from guest_memfd.designs import DESIGNS
from guest_memfd.designs.none import NoDesign
from guest_memfd.designs.ours import OurLibrary
from guest_memfd.explore.engine.finding import Finding
from guest_memfd.explore.suite.check import check
from guest_memfd.explore.world.scenario import World
from guest_memfd.hypervisors import HYPERVISORS
from guest_memfd.hypervisors.kvm.cca import CCA, data_map, data_unmap, undelegate
from guest_memfd.scenarios import PARTIES, SCENES
from guest_memfd.words import facts
from guest_memfd.words.outcome import Outcome
from guest_memfd.words.primitives import Folio, Primitive
from guest_memfd.words.scene import Scene

SPOTS = [
    Spot("WARNS_ONLY", "cca", "for-good", "vcpu2 stop", "nothing-lost", 57, "a page is freed while it is the guest's"),
    Spot("GIVES_UP_IN_THE_ZAP", "cca", "large-folio", "vcpu2 vmm2", "all-or-nothing", 29, "punch returns errno 1"),
    Spot("FORGETS_THE_UNDELEGATION", "cca", "two-pages", "vcpu2 vmm2", "one-owner", 26, "the hypervisor says guest"),
    Spot("WITHOUT_A_WIPE", "cca", "two-pages", "vcpu2 vmm2 kcore", "guest-private", 28, "copy_from_kernel_nofault reads"),
    Spot("none", "cca", "two-pages", "vcpu2 page-cache-reader", "host-survives", 12, "read_folio takes a granule"),
]


def findings(spot: Spot, *, repaired: bool = False) -> list[Finding]:
    design = DESIGNS[spot.mistake] if spot.mistake in DESIGNS and not repaired else OurLibrary
    hypervisor = CCA if repaired or spot.mistake in DESIGNS else getattr(mistakes_cca, spot.mistake)
    names = spot.parties.split()
    there = World(design, hypervisor, [PARTIES[name] for name in names], scene=SCENES[spot.scene])
    result = there.explorer(names).run(max_states=60_000)
    assert result.limit is None
    return result.findings


@pytest.mark.parametrize("spot", SPOTS, ids=lambda spot: spot.mistake)
def test_mistake_is_seen(spot: Spot) -> None:
    assert shortest(findings(spot), spot.law, spot.evidence) == spot.steps


@pytest.mark.parametrize("spot", SPOTS, ids=lambda spot: spot.mistake)
def test_the_library_holds_there(spot: Spot) -> None:
    assert findings(spot, repaired=True) == []


def test_a_stray_load_is_fixed_up() -> None:
    assert "host-survives" not in {f.law for f in check("none", "cca", parties=["vcpu2", "zeropad"], jobs=1).findings}


@pytest.mark.long
def test_the_library_holds_in_a_first_look_at_every_scene() -> None:
    report = check("library", "cca", full=False, jobs=1)
    assert (report.verdict, report.findings) == ("holds", ())


# -- the RMM ---------------------------------------------------------------------------------------------------------------


class Host:
    """An abstract host whose VM the calls below are about."""

    def __init__(self) -> None:
        self.bench = Bench("cca", scene=Scene())

    def call(self, code: Any, *args: Any) -> int:
        machine = self.bench.machine
        machine._look_at(self.bench.shared, 0, Primitive("hyp_call", (), "kvm"))
        ret = code(machine, *args)
        self.bench.shared = machine.state.save()
        return int(ret)

    @property
    def frame(self) -> st.Frame:
        return self.bench.state.frame(0)


def test_a_granule_goes_to_the_realm_and_comes_back_empty() -> None:
    host = Host()
    assert host.call(data_map, 0, Folio(0)) == 0
    assert (host.frame.s2, host.frame.gmap) == (0, 1)
    assert host.call(data_map, 0, Folio(0)) == 0                        # another vCPU was faster
    assert host.call(undelegate, Folio(0)) == -1                        # EPERM: the realm maps it
    assert host.call(data_unmap, 0, Folio(0)) == 0
    assert (host.frame.s2, host.frame.gmap, host.frame.content) == (0, 0, 0)
    assert host.call(undelegate, Folio(0)) == 0
    assert (host.frame.s2, host.frame.owner) == (1, 0)


def test_what_the_host_shares_is_not_delegated() -> None:
    host = Host()
    assert host.call(CCA.hypercalls["map_shared"], 0, Folio(0)) == 0
    assert host.call(data_map, 0, Folio(0)) == -1                       # EPERM
    assert host.frame.s2 == 1


# -- what a stray access does ----------------------------------------------------------------------------------------------

ACCESSES = {
    "load": Primitive("load_unaligned_zeropad", (0,), "mm"), "read": Primitive("read_folio", (Folio(0),), "mm"),
    "write": Primitive("write_folio", (Folio(0), False), "library"),
}


def becomes(design: Any, hypervisor: str, access: str) -> str:
    """What an access of the kernel to a page of the guest's comes to, in the words of README's table."""
    bench = Bench(hypervisor, design, scene=Scene())
    assert bench.do(lambda library: library.guest_fault(0, 0)) == 0
    bench._perform(Primitive("guest_access", (0, True), "guest"))
    (outcome, *_) = bench.machine.outcomes(bench.shared, 0, ACCESSES[access])
    exported = any(isinstance(note, facts.Abort) and note.why == "the page is exported" for note in outcome.notes)
    return f"{'exported: ' * exported}{_comes_to(bench, outcome, access)}"


def _comes_to(bench: Bench, outcome: Outcome, access: str) -> str:
    notes = outcome.notes
    if any(isinstance(note, facts.Destroyed) for note in notes):
        return "the guest loses the page"
    if bench.machine.halted(outcome.shared):
        return "the kernel stops"
    if not any(isinstance(note, facts.Access) for note in notes):
        return "fixed up"
    (seen,) = (note for note in notes if isinstance(note, facts.Access))
    return "overwrites the guest's data" if access == "write" else "reads " + (
        "the guest's data" if seen.content == "secret" else seen.content)


@pytest.mark.parametrize("hypervisor", [*HYPERVISORS, "any of these"])
def test_readme_has_what_a_stray_access_does(hypervisor: str) -> None:
    page = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    row = next(line for line in page.splitlines() if line.startswith((f"| `{hypervisor}`", f"| {hypervisor}")))
    told = [cell.strip() for cell in row.strip("|").split("|")][1:]
    hosts = [*HYPERVISORS] if hypervisor == "any of these" else [hypervisor]
    design = OurLibrary if hypervisor == "any of these" else NoDesign
    for host in hosts:
        assert told == [becomes(design, host, access) for access in ACCESSES], host

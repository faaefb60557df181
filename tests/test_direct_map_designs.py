"""Four ways to empty the direct map: each mistake is refuted, with law and length, and its repaired twin is not by it.

docs/bugs.md has the rows with a number; docs/findings.md has three of them step by step.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import mistakes_direct_map
import pytest
import rows
from rows import Row

from guest_memfd.abstract import AbstractHost
from guest_memfd.abstract import state as st
from guest_memfd.designs import DESIGNS, SETS
from guest_memfd.designs.ours import OurLibrary
from guest_memfd.errors import BadInput
from guest_memfd.explore.suite.check import check
from guest_memfd.explore.world import scenario
from guest_memfd.explore.world.cost import cost
from guest_memfd.explore.world.scenario import World
from guest_memfd.hypervisors import HYPERVISORS
from guest_memfd.laws import LAWS, judging
from guest_memfd.scenarios import PARTIES
from guest_memfd.words.scene import Kernel, Scene

MERGING = Scene("merging", "a kernel that merges leaves, and writes to what is freed", kernel=Kernel(merges_leaves=True))
OF_THEIR_OWN = {"writer2": replace(PARTIES["writer"], name="writer2")}
"""A second thread that writes."""

MOST = 60_000

PROMISING = [name for name in SETS["2026"] if DESIGNS[name].promises]
"""Those of 2026 that are about the direct map; the other is KVM's own, which leaves it alone."""

IN = "a page of the file is in the direct map"
TLB = "a page of the file is in a TLB by its entry"
STALE = "load_unaligned_zeropad reads a page that is private to the guest, through a stale TLB entry"

ROWS = [
    Row("F1", "FlushIsOff", "Upright", "kvm", "two-pages", "vcpu zeropad", "guest-private", 16, STALE),
    Row("F1a", "FlushIsOff", "Upright", "kvm", "two-pages", "vcpu2", "no-direct-map", 11, TLB),
    Row("F1b", "SecretmemFlushIsOff", "secretmem", "kvm", "two-pages", "vcpu zeropad", "guest-private", 16, STALE),
    Row("F2", "WriteEndIsInverted", "Upright", "kvm", "two-pages", "writer", "no-direct-map", 8, IN, fails=False),
    Row("F3", "CopyIsInverted", "Upright", "kvm", "two-pages", "uffd", "no-direct-map", 9, IN),
    Row("F4", "CopyLeavesThePage", "Upright", "kvm", "two-pages", "uffd", "no-direct-map", 10, IN),
    Row("F5", "PreparesFirst", "V12Anywhere", "gunyah", "two-pages", "vcpu zeropad", "host-survives", 9,
        "load_unaligned_zeropad takes a synchronous external abort"),
    Row("39", "MarkIsNeverSet", "direct-map-v12", "kvm", "two-pages", "vcpu2", "host-survives", 49,
        "free-time poisoning takes a translation fault"),
    Row("41", "direct-map-v12", "filemap-hook", "kvm", "merging", "vcpu2 vmm2", "host-survives", 59,
        "free-time poisoning takes a translation fault"),
    Row("48", "direct-map-v12", "filemap-hook", "kvm", "two-pages", "vmm2", "no-direct-map", 7, IN),
    Row("48a", "direct-map-v12", "filemap-hook", "kvm", "two-pages", "device", "no-direct-map", 9, IN),
    Row("50", "RemapsWithoutLock", "RemapsUnderLock", "kvm", "two-pages", "writer writer2", "host-survives", 21,
        "write_folio takes a translation fault"),
    Row("50a", "WindowNotFlushed", "RemapsUnderLock", "kvm", "two-pages", "writer", "no-direct-map", 13, TLB),
    Row("50b", "RemapsUnderLock", "filemap-hook", "kvm", "two-pages", "writer", "no-direct-map", 14, IN),
    Row("23", "PopulatesNothing", "filemap-hook", "kvm", "two-pages", "vcpu2 launcher", "no-stale-data", 22,
        "the guest receives a page with somebody else's data"),
    Row("R4", "direct-map-v12", "filemap-hook", "kvm", "two-pages", "vcpu power", "guest-private", 18,
        "safe_copy_page reads a page that is private to the guest"),
    Row("N1", "direct-map-v12", "filemap-hook", "kvm", "two-pages", "vcpu2 vmm2 kcore", "guest-private", 26,
        "copy_from_kernel_nofault reads a page that is private to the guest, through the direct map"),
    Row("N2", "direct-map-v12", "filemap-hook", "kvm", "two-pages", "vcpu2 drainer", "nothing-lost", 48,
        "a page is freed with the guest's data in it"),
    Row("", "HookWithoutFlush", "filemap-hook", "kvm", "two-pages", "vcpu2", "no-direct-map", 11, TLB),
    Row("", "HookIgnoresFailure", "filemap-hook", "kvm", "two-pages", "vcpu2", "no-direct-map", 11, IN),
    Row("", "LoserKeepsTheHole", "filemap-hook", "kvm", "two-pages", "vcpu2", "host-survives", 12,
        "free-time poisoning takes a translation fault"),
    Row("", "WritesPlainly", "filemap-hook", "kvm", "two-pages", "writer", "host-survives", 10,
        "write_folio takes a translation fault"),
    Row("", "CachesPrivatePages", "filemap-hook", "kvm", "both-private", "vcpu pfn-cache-v2", "guest-private", 19,
        "gfn_to_pfn_cache user writes a page that is private to the guest, through a vmap"),
    Row("", "ScrubsNothing", "filemap-hook", "kvm", "two-pages", "vcpu2 vmm2 kcore", "guest-private", 27,
        "copy_from_kernel_nofault reads a page"),
    Row("", "ClearsPlainly", "alloc-unmapped", "kvm", "two-pages", "vcpu2", "host-survives", 6,
        "clear_folio takes a translation fault"),
    Row("", "TakesMappedPages", "alloc-unmapped", "kvm", "two-pages", "vcpu2", "no-direct-map", 10, IN),
]


BENCH = rows.Bench(mistakes_direct_map, OF_THEIR_OWN, {MERGING.name: MERGING})


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.number}-{row.design}")
def test_it_is_broken_and_its_twin_is_not(row: Row) -> None:
    assert min(BENCH.lengths(row, row.design), default=None) == row.steps
    assert BENCH.lengths(row, row.twin) == []


def test_every_mistake_has_a_row() -> None:
    assert rows.made_in(mistakes_direct_map) == {name for row in ROWS for name in (row.design, row.twin)} - {*DESIGNS}


@pytest.mark.parametrize("row", [row for row in ROWS if row.number], ids=lambda row: row.number)
def test_it_is_in_the_list_of_bugs(row: Row) -> None:
    page = (Path(__file__).parent.parent / "docs" / "bugs.md").read_text(encoding="utf-8")
    where = row.hypervisor if row.scene == "two-pages" else f"{row.hypervisor}, {row.scene}"
    told = next((line for line in page.splitlines() if line.startswith(f"| {row.number} |") and row.parties.replace(
        " ", " + ") in line and f"| {row.law} | {row.steps} |" in line), None)
    assert told is not None, f"docs/bugs.md lacks | {row.number} | ... | {where}, ... | {row.law} | {row.steps} |"
    assert where in told


@pytest.mark.parametrize("number", ["F2", "F3", "F4", "F1b", "F5", "N1"])
def test_a_finding_is_told_with_its_length(number: str) -> None:
    page = (Path(__file__).parent.parent / "docs" / "findings.md").read_text(encoding="utf-8")
    told = page.split(f"\n## {number}: ")[1].split("\n## ")[0]
    steps = next(row.steps for row in ROWS if row.number == number)
    assert f" {steps} steps" in told
    assert all(f"*{part}" in told for part in ("Claim.", "Sequence", "Source.", "Assumed.")) or number == "F5"


class ForgetsTheLocalFlush(AbstractHost):
    """A kernel whose mappings of the moment stay in the TLB of the CPU that has had them."""

    def _write_local(self, frame: st.Frame, what: str) -> None:
        super()._write_local(frame, what)
        frame.stale = 1


@pytest.mark.parametrize(("design", "parties", "law", "evidence"), [
    ("alloc-unmapped", "vcpu2", "no-direct-map", TLB), ("alloc-unmapped", "vcpu zeropad", "guest-private", STALE),
    ("filemap-hook", "writer", "no-direct-map", TLB)])
@pytest.mark.parametrize("host", [AbstractHost, ForgetsTheLocalFlush])
def test_a_window_ends_with_a_flush_of_its_cpu(
    host: type[AbstractHost], design: str, parties: str, law: str, evidence: str, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scenario, "AbstractHost", host)
    names = parties.split()
    there = World(DESIGNS[design], HYPERVISORS["kvm"], [PARTIES[name] for name in names])
    found = {f.law: f.evidence for f in there.explorer(names).run(max_states=MOST).findings}
    assert found.get(law, "").startswith(evidence) == (host is ForgetsTheLocalFlush)


# -- the set, and the promise ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("design", PROMISING)
def test_each_promises_what_only_some_keep(design: str) -> None:
    broken = check(design, "kvm", parties=["vmm2"], laws=["no-direct-map"], jobs=1).verdict == "refuted"
    assert broken == (design in ("direct-map-v12", "firecracker-2026"))


def test_the_promise_is_asked_of_nobody_else() -> None:
    law = LAWS["no-direct-map"]
    assert {name for name in DESIGNS if law in judging(DESIGNS[name], [law])} == {*PROMISING, "guestmem-v6"}
    assert "no-direct-map" not in check("none", "kvm", parties=["vmm2"], jobs=1).laws
    with pytest.raises(BadInput, match=r"^design 'library' does not promise no-direct-map, and is not judged by it$"):
        check("library", "kvm", parties=["vmm2"], laws=["no-direct-map"], jobs=1)


class Promising(OurLibrary):
    """A design with a slip of the pen."""

    name = "promising"
    promises = ("no-direct-mop",)


def test_a_promise_of_what_is_no_law_is_refused() -> None:
    said = r"^design 'promising' promises what is no law: unknown law 'no-direct-mop'; did you mean 'no-direct-map'\?"
    with pytest.raises(BadInput, match=said):
        check(Promising, "kvm", parties=["vmm2"], jobs=1)


@pytest.mark.parametrize("design", ["firecracker-2026", "filemap-hook", "alloc-unmapped"])
def test_files_are_filled_on_the_machine_as_on_the_abstract_host(design: str) -> None:
    pytest.importorskip("unicorn")
    from schedules import steps

    parties = ("writer", "uffd", "pfn-cache-v2", "zeropad", *(("launcher",) if design != "firecracker-2026" else ()))
    taken, broken = steps("kvm", design, range(8), parties)
    assert taken > 100
    assert bool(broken) == (design == "firecracker-2026")


def test_what_it_costs_to_lend_a_page_and_to_take_it_back() -> None:
    counted = {name: cost(DESIGNS[name], HYPERVISORS["kvm"]) for name in PROMISING}
    assert {name: (c.direct_map_writes, c.flushes) for name, c in counted.items() if c} == {
        "direct-map-v12": (2, 1), "firecracker-2026": (2, 0), "filemap-hook": (2, 1), "alloc-unmapped": (0, 0)}


@pytest.mark.long
@pytest.mark.parametrize("hypervisor", ["kvm", "pkvm", "gunyah"])
@pytest.mark.parametrize("design", ["filemap-hook", "alloc-unmapped"])
def test_what_is_never_mapped_holds_in_a_first_look(design: str, hypervisor: str) -> None:
    report = check(design, hypervisor, scenes=["two-pages", "crossed", "failing-twice", "nothing-yet"], full=False, jobs=1)
    assert (report.verdict, report.findings) == ("holds", ())

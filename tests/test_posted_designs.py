"""The library as it was posted after the first time, and what reviewers said of it: each refuted, its twin not by it.

docs/bugs.md has the rows; docs/findings.md has those that nobody had reported.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import mistakes_direct_map
import mistakes_kvm
import mistakes_large
import mistakes_posted
import pytest
from named import mistakes
from rows import Bench, Row, line_of, made_in

from guest_memfd.core.hypervisor import Hypervisor
from guest_memfd.designs import DESIGNS, SETS, Design
from guest_memfd.designs.names import lacks
from guest_memfd.explore.replay import replay
from guest_memfd.explore.suite.check import check
from guest_memfd.explore.suite.verdict import Limits
from guest_memfd.explore.trace import dumps, loads, trace_of
from guest_memfd.laws import LAWS
from guest_memfd.scenarios.party import Party
from guest_memfd.scenarios.vmm import close
from guest_memfd.words.primitives import Steps


def closer(design: Design, hypervisor: Hypervisor) -> Steps[None]:
    yield from close(design)


BENCH = Bench(mistakes_posted, {"closer": Party("closer", "a VMM that closes the file", closer, role="vmm", fd=False)})

TLB = "load_unaligned_zeropad reads a page that is private to the guest, through a stale TLB entry"
SEA = "load_unaligned_zeropad takes a synchronous external abort (stage 2)"
BUSY = "fault returns -EBUSY, and nothing stands against it"
TOLD = "memory_failure() is told of a failure, and nothing has failed"
FREED = "a page is freed while it is the guest's"

ROWS = [
    Row("R1", "none", "library", "gunyah", "two-pages", "vcpu zeropad", "host-survives", 9, SEA),
    Row("R13", "UnmappedIsUnused", "library", "kvm", "two-pages", "vmm2 device", "pins-respected", 29,
        "a page is converted while somebody holds a reference to reach it by", fails=False),
    Row("R16", "DrainsFirst", "library", "gunyah", "both-shared", "vcpu vcpu2", "no-false-refusal", 14, BUSY),
    Row("R17", "CountsBeforeItUnmaps", "library", "kvm", "two-pages", "vmm2 device", "pins-respected", 34,
        "a page is converted while somebody holds a reference to reach it by", fails=False),
    Row("R18", "PunchAsksNobody", "library", "kvm", "two-pages", "vcpu2 vmm2", "no-stale-mapping", 27,
        "the guest maps a page that the file no longer holds", fails=False),
    Row("R19", "ZapsWhatIsThere", "ZapsNewPagesOnly", "kvm", "both-shared", "vcpu2 writer", "host-survives", 14,
        "write_folio takes a translation fault"),
    Row("R21", "CacheIsNoReference", "library", "kvm", "two-pages", "vmm2 pfn-cache", "pins-respected", 33,
        "a page is converted while a gfn_to_pfn_cache maps it", fails=False),
    Row("R23", "UptodateIsPrepared", "library", "kvm", "both-shared", "vcpu2", "fault-served", 8,
        "a fault returns 0, and the guest does not map the page"),
    Row("R25", "guestmem-rfc2", "Flushes", "kvm", "two-pages", "vcpu2 zeropad", "guest-private", 16, TLB),
    Row("R29d", "FreesSilently", "OnSnp", "snp", "both-private", "vcpu2 vmm2", "nothing-lost", 72, FREED, fails=False),
    Row("R29e", "PopulatesAgain", "kvm-7.4", "kvm", "two-pages", "vcpu2 launcher", "guest-private", 24,
        "clear_folio writes a page that is private to the guest"),
    Row("R30", "guestmem-rfc2", "DrainsFirst", "gunyah", "both-shared", "vcpu2", "no-false-refusal", 9, BUSY),
    Row("R39", "OneHookForBoth", "library", "kvm", "two-pages", "vcpu2 vmm2", "no-stale-data", 29,
        "a page of the file holds zero where secret should be", fails=False),
    Row("S40", "guestmem-rfc2", "PunchTells", "gunyah", "two-pages", "vcpu2 vmm2", "all-or-nothing", 24,
        "punch returns 0 and a page of the hole is still there", fails=False),
    Row("S41", "guestmem-rfc2", "AllocateTells", "kvm", "two-pages", "vmm2", "host-survives", 5,
        "an error pointer from guest_memfd_grab_folio() is dereferenced in fallocate"),
    Row("S45", "guestmem-rfc2", "LeavesBrokenMemoryAlone", "gunyah", "two-pages", "vcpu2 memory-failure zeropad",
        "host-survives", 22, SEA),
    Row("S49", "guestmem-v5", "TellsTheOutcome", "kvm", "both-shared", "memory-failure", "poison-contained", 13, TOLD),
    Row("S50a", "guestmem-v6", "LooksAtTheZap", "kvm", "two-pages", "vcpu2 zeropad", "guest-private", 23,
        "load_unaligned_zeropad reads a page that is private to the guest, through the direct map"),
    Row("S50b", "guestmem-v6", "TellsTheOutcomeToo", "kvm", "both-shared", "memory-failure", "poison-contained", 13, TOLD),
    Row("S50c", "guestmem-v6", "FlushesAfterTheZap", "kvm", "two-pages", "vcpu2 zeropad", "guest-private", 23, TLB),
    Row("L4", "DetachesFirst", "OnSnp", "snp", "both-private", "vcpu2 closer", "nothing-lost", 62, FREED, fails=False),
    Row("N6", "guestmem-rfc2", "AsksBeforeItMaps", "gunyah", "two-pages", "vcpu2 device zeropad drainer", "host-survives",
        21, SEA, fails=False),
]

FIRST = [
    Row("", "guestmem-rfc2", "", "kvm", "two-pages", "vmm", "host-survives", 4, ""),
    Row("", "guestmem-rfc2", "", "kvm", "both-shared", "vcpu2 zeropad", "guest-private", 12, ""),
    Row("", "guestmem-rfc2", "", "kvm", "both-shared", "vcpu", "one-owner", 7, ""),
    Row("", "guestmem-rfc2", "", "kvm", "failing-twice", "vcpu2 drainer", "nothing-lost", 45, ""),
    Row("", "guestmem-rfc2", "", "kvm", "both-shared", "memory-failure", "poison-contained", 10, ""),
    Row("", "guestmem-rfc2", "", "pkvm", "two-pages", "vmm", "host-survives", 4, ""),
    Row("", "guestmem-rfc2", "", "pkvm", "both-shared", "vcpu2 power", "no-stale-data", 11, ""),
    Row("", "guestmem-rfc2", "", "pkvm", "both-shared", "memory-failure", "poison-contained", 10, ""),
    Row("", "guestmem-rfc2", "", "pkvm", "both-shared", "vcpu2 vmm-odd", "all-or-nothing", 19, ""),
    Row("", "guestmem-rfc2", "", "gunyah", "two-pages", "vmm", "host-survives", 4, ""),
    Row("", "guestmem-rfc2", "", "gunyah", "both-shared", "memory-failure", "poison-contained", 11, ""),
    Row("", "guestmem-rfc2", "", "gunyah", "failing-twice", "vcpu2 vmm2 device", "all-or-nothing", 20, ""),
    Row("", "guestmem-rfc2", "", "gunyah", "both-shared", "vcpu", "no-false-refusal", 9, ""),
    Row("", "guestmem-rfc2", "", "gunyah", "two-pages", "vmm memory-failure", "progress", 20, ""),
    Row("", "guestmem-v5", "", "kvm", "two-pages", "vcpu zeropad", "guest-private", 22, ""),
    Row("", "guestmem-v5", "", "kvm", "two-pages", "vcpu", "one-owner", 18, ""),
    Row("", "guestmem-v5", "", "kvm", "failing-twice", "vcpu2 drainer", "nothing-lost", 56, ""),
    Row("", "guestmem-v5", "", "kvm", "both-shared", "memory-failure", "poison-contained", 13, ""),
    Row("", "guestmem-v6", "", "kvm", "two-pages", "vcpu zeropad", "guest-private", 23, ""),
    Row("", "guestmem-v6", "", "kvm", "two-pages", "vcpu", "one-owner", 19, ""),
    Row("", "guestmem-v6", "", "kvm", "failing-twice", "vcpu2 drainer", "nothing-lost", 58, ""),
    Row("", "guestmem-v6", "", "kvm", "both-shared", "memory-failure", "poison-contained", 13, ""),
    Row("", "guestmem-v6", "", "kvm", "two-pages", "vmm memory-failure", "progress", 23, ""),
    Row("", "guestmem-v6", "", "kvm", "both-shared", "vcpu", "no-direct-map", 0, ""),
]
"""The shortest run to each law that a first look finds broken (`gmem compare --designs posted`)."""

COLUMNS = [*dict.fromkeys((row.design, row.hypervisor) for row in FIRST)]


LONG = {"R13", "R17", "R21", "R29d", "N6"}
"""Those of half a second and more."""


@pytest.mark.parametrize("row", [pytest.param(row, marks=[pytest.mark.long] if row.number in LONG else []) for row in ROWS],
                         ids=lambda row: f"{row.number}-{row.design}")
def test_it_is_broken_and_its_twin_is_not(row: Row) -> None:
    assert min(BENCH.lengths(row, row.design, row.steps), default=None) == row.steps
    assert BENCH.lengths(row, row.twin) == []


@pytest.mark.long
@pytest.mark.parametrize("row", [row for row in ROWS if "closer" not in row.parties], ids=lambda row: row.number)
def test_its_trace_replays(row: Row) -> None:
    design = BENCH.design(row.design)
    report = check(design, row.hypervisor, parties=row.parties.split(), scenes=[row.scene], laws=[row.law], jobs=1,
                   limits=Limits(failures=None if row.fails else 0))
    (found,) = [found for found in report.findings if len(found.finding.steps) == row.steps][:1]
    assert replay(loads(dumps(trace_of(report, found))), design=design).same


def test_every_mistake_has_a_row() -> None:
    assert made_in(mistakes_posted) == {
        name for row in ROWS for name in (row.design, row.twin) if hasattr(mistakes_posted, name)}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.number)
def test_it_is_in_the_list_of_bugs(row: Row) -> None:
    page = (Path(__file__).parent.parent / "docs" / "bugs.md").read_text(encoding="utf-8")
    begin, end = line_of(row)
    assert any(line.startswith(begin) and line.endswith(end) for line in page.splitlines()), (
        f"docs/bugs.md lacks {begin} ... {end}")


@pytest.mark.parametrize("module", [mistakes_direct_map, mistakes_kvm, mistakes_large, mistakes_posted])
def test_each_mistake_can_be_run_by_its_name(module: ModuleType) -> None:
    there = mistakes(vars(module))
    assert len({design.name for design in there} - {*DESIGNS}) == len(there) > 20
    assert {design.name: lacks(design) for design in there} == dict.fromkeys(design.name for design in there)


# -- the set -----------------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("row", FIRST, ids=lambda row: f"{row.design}-{row.hypervisor}-{row.law}")
def test_the_first_verdict_of_each_law(row: Row) -> None:
    assert min(BENCH.lengths(row, row.design, row.steps), default=None) == row.steps


def test_each_is_said_in_the_readme() -> None:
    """Also which laws are kept: those that have no row there."""
    page = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    assert {design for design, _ in COLUMNS} == {*SETS["posted"]}
    for law in LAWS:
        broken = [row for row in FIRST if row.law == law]
        cells = {(row.design, row.hypervisor): f"{row.steps} {row.parties.replace(' ', ' + ')}" for row in broken}
        line = f"| {law} | {' | '.join(cells.get(column, '') for column in COLUMNS)} |"
        assert (line in page.splitlines()) == bool(cells), line

"""The posted designs with huge folios: what refutes each, with law and length, and its repaired twin, which is not.

docs/bugs.md has the rows with a number.
"""

from __future__ import annotations

from errno import EINVAL
from pathlib import Path

import mistakes_huge
import pytest
import rows
from driver import Bench
from rows import Row
from test_large_folios import TWICE

from guest_memfd.designs import DESIGNS, SETS
from guest_memfd.scenarios import SCENES
from guest_memfd.words.pagestate import PRIVATE_PAGE, SHARED_PAGE
from guest_memfd.words.scene import Scene

THERE = Scene("large-there", "a large folio that is there before anybody begins", frames=2, shared=(), populated=True,
              order=1)
SCENES_OF_THEIR_OWN = {scene.name: scene for scene in (TWICE, THERE)}

ROWS = [
    Row("1", "hugetlb-rfc2", "CountsToZero", "kvm", "large-folio", "vmm2", "host-survives", 7,
        "the loop that undoes counts"),
    Row("2", "CountsToZero", "StoresInTime", "kvm", "large-failing-twice", "vcpu2 vmm2", "all-or-nothing", 27,
        "to_shared is refused and has changed a page"),
    Row("12", "NotesTheFolio", "gmem-2m", "kvm", "large-folio", "vcpu launcher", "no-stale-data", 21,
        "the guest receives a page with somebody else's data"),
    Row("13", "hugetlb-2026", "StoresInTime", "kvm", "large-folio", "vmm2", "all-or-nothing", 8,
        "to_shared changes the attribute, which no gmem_invalidate_begin()"),
    Row("H1", "hugetlb-2026", "StoresInTime", "kvm", "large-there", "vmm2 memory-failure", "progress", 3,
        "from here on no operation ever ends", fails=False),
    Row("H1", "hugetlb-rfc2", "SplitsOrRefusesRfc2", "kvm", "large-there", "vmm2 memory-failure", "progress", 3,
        "from here on no operation ever ends", fails=False),
    Row("", "NamesTheRequest", "StoresInTime", "kvm", "two-large-folios", "vmm2", "all-or-nothing", 10,
        "to_shared is to go on at page 0, and has changed a page from there on"),
    Row("", "NamesNothing", "StoresInTime", "kvm", "two-large-folios", "vmm2", "all-or-nothing", 10,
        "to_shared is refused, has changed a page, and does not say where to go on"),
    Row("", "NamesTheNext", "StoresInTime", "kvm", "two-large-folios", "vmm2", "all-or-nothing", 4,
        "to_shared is to go on at page 1, and has left out a page before it"),
]
LONG = [
    Row("6", "hugetlb-rfc2", "FreesItsPart", "kvm", "large-folio", "vcpu2 vmm", "all-or-nothing", 16,
        "punch returns 0 and a page of the hole is still there"),
    Row("6", "hugetlb-rfc2", "FreesItsPart", "kvm", "large-folio", "vcpu2 vmm", "no-stale-data", 18,
        "a page of the file holds zero where secret should be"),
    Row("19", "gmem-2m", "FillsEveryGap", "snp", "larger-leaves", "vcpu vcpu2 launcher", "fault-served", 34,
        "a fault returns 0, and the guest does not map the page", fails=False),
    Row("23", "gmem-2m", "RefusesThePart", "snp", "large-folio", "vcpu2 vmm", "host-survives", 20,
        "clear_folio takes a page fault of the RMP check"),
]


BENCH = rows.Bench(mistakes_huge, scenes=SCENES_OF_THEIR_OWN, most=130_000)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.number}-{row.design}-{row.law}")
def test_it_is_broken_and_its_twin_is_not(row: Row) -> None:
    assert min(BENCH.lengths(row, row.design), default=None) == row.steps
    assert BENCH.lengths(row, row.twin) == []


@pytest.mark.long
@pytest.mark.parametrize("row", LONG, ids=lambda row: f"{row.number}-{row.design}-{row.law}")
def test_what_takes_more_is_broken_and_its_twin_is_not(row: Row) -> None:
    test_it_is_broken_and_its_twin_is_not(row)


def test_every_mistake_has_a_row() -> None:
    assert rows.made_in(mistakes_huge) - {"SplitsOrRefuses"} == {
        name for row in [*ROWS, *LONG] for name in (row.design, row.twin)} - {*DESIGNS}


@pytest.mark.parametrize("row", [row for row in [*ROWS, *LONG] if row.number], ids=lambda row: f"{row.number}-{row.design}")
def test_it_is_in_the_list_of_bugs(row: Row) -> None:
    page = (Path(__file__).parent.parent / "docs" / "bugs.md").read_text(encoding="utf-8")
    parties = row.parties.replace(" ", " + ")
    told = [line for line in page.splitlines() if line.startswith(f"| {row.number} |") and parties in line]
    assert any(f"| {row.law} | {row.steps} |" in line for line in told), (row.number, row.parties, row.law, row.steps)


def test_every_design_of_the_set_is_refuted() -> None:
    assert {*SETS["huge"]} <= {row.design for row in [*ROWS, *LONG]}


# -- bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["hugetlb-rfc2", "hugetlb-2026"])
def test_a_file_is_whole_huge_pages(name: str) -> None:
    bench = Bench("kvm", DESIGNS[name], opened=False, scene=Scene(pages=3, frames=4, shared=(), slots=(), order=1))
    assert bench.do(lambda library: library.create(3)) == -EINVAL
    assert not any(bench.state.frame(pfn).allocated for pfn in range(4))


@pytest.mark.parametrize("start", [0, 1])
def test_the_rework_takes_and_frees_whole_huge_pages(start: int) -> None:
    bench = Bench("kvm", DESIGNS["hugetlb-2026"], scene=SCENES["large-folio"])
    assert bench.do(lambda library: library.allocate(start, 1)) == -EINVAL
    assert bench.do(lambda library: library.allocate(0, 2)) == 0
    assert bench.do(lambda library: library.punch_hole(start, 1)).ret == -EINVAL
    assert bench.state.folio(0).order == 1
    assert bench.do(lambda library: library.punch_hole(0, 2)).ret == 0


def test_a_conversion_goes_on_where_it_has_stopped() -> None:
    bench = Bench("kvm", BENCH.design("StoresInTime"), scene=SCENES["two-large-folios"])
    assert bench.do(lambda library: library.allocate(0, 4)) == 0
    stopped = 0
    for fail_at in range(9):
        before = bench.shared
        bench.fail_at = fail_at
        result = bench.do(lambda library: library.make_shared(1, 3))
        if result.ret:
            assert all(bench.state.page(i).attr == SHARED_PAGE for i in range(1, result.error_index))
            bench.fail_at = -1
            again = bench.do(lambda library, at=result.error_index: library.make_shared(at, 4 - at))
            assert again.ret == 0
            stopped += 1
        assert [bench.state.page(i).attr for i in range(4)] == [PRIVATE_PAGE, *[SHARED_PAGE] * 3]
        bench.shared = before
    assert stopped >= 3

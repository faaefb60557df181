"""docs/bugs.md has nothing that is not pinned: each row with a number is that of a test, by hypervisor, law and length.

The other way round, that each test's row is in the list, is for the tests that have them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import test_bugs
import test_direct_map_designs
import test_kvm_design
import test_large_folios

PAGE = (Path(__file__).parent.parent / "docs" / "bugs.md").read_text(encoding="utf-8")


class Told(NamedTuple):
    """A row of a table: its number, and where it says that what breaks in how many steps."""

    number: str
    hypervisor: str
    law: str
    steps: int


def told(page: str) -> Iterator[Told]:
    """The rows with a number of all tables of *page*."""
    head: list[str] = []
    for line in page.splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if not cells:
            head = []
        elif not head:
            head = cells
        elif head[0] in ("#", "bug") and not set(line) <= {"|", "-", " "}:
            row = dict(zip(head, cells, strict=True))
            where = row.get("hypervisor") or row["where, parties"].partition(",")[0]
            yield Told(cells[0], where, row["law"], int(row["steps"]))


PINNED = {
    *((row.hypervisor, row.law, row.steps) for row in (
        *test_bugs.BUGS, *test_direct_map_designs.ROWS, *test_kvm_design.ROWS, *test_kvm_design.LONG)),
    *((spot.hypervisor, spot.law, spot.steps) for spot in (*test_large_folios.SPOTS, *test_large_folios.DEEP)),
}


def test_every_row_is_pinned_by_a_test() -> None:
    rows = [*told(PAGE)]
    assert len(rows) >= 70
    assert [row for row in rows if (row.hypervisor, row.law, row.steps) not in PINNED] == []


@pytest.mark.parametrize("line", [
    "| 2 | what | who | kvm, vmm2 | progress | 7 |", "| 2 | a \\| b | who | kvm, two-pages, vmm2 | progress | 7 |"])
def test_a_row_is_read(line: str) -> None:
    table = f"| # | what is wrong | who saw it | where, parties | law | steps |\n|---|---|---|---|---|---|\n{line}\n"
    assert [*told(table)] == [Told("2", "kvm", "progress", 7)]
    assert [*told(table.replace("| # |", "| where |"))] == []

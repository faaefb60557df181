"""docs/bugs.md has nothing that is not pinned, and its sums are right: each number of a list is found again or out of reach.

Each row with a number is that of a test, by hypervisor, parties, law and length. The other way round, that each test's row
is in the list, is for the tests that have them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import test_bugs
import test_direct_map_designs
import test_huge_designs
import test_kvm_design
import test_large_folios
import test_posted_designs

PAGE = (Path(__file__).parent.parent / "docs" / "bugs.md").read_text(encoding="utf-8")


class Told(NamedTuple):
    """A row of a table: its section and number, and where it says that what breaks in how many steps."""

    section: str
    number: str
    hypervisor: str
    parties: str
    law: str
    steps: int


def tables(page: str) -> Iterator[tuple[str, list[str], list[str]]]:
    """Of each line of each table of *page*: its section, the head of the table, and its cells."""
    head: list[str] = []
    section = ""
    for line in page.splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if line.startswith("## "):
            section = line[3:]
        if not cells:
            head = []
        elif not head:
            head = cells
        elif not set(line) <= {"|", "-", " "}:
            yield section, head, cells


def told(page: str) -> Iterator[Told]:
    """The rows with a number of all tables of *page* that say how a law breaks."""
    for section, head, cells in tables(page):
        if head[0] in ("#", "bug") and "steps" in head:
            row = dict(zip(head, cells, strict=True))
            place = row.get("where, parties") or f"{row['hypervisor']}, {row['parties']}"
            where, *_, parties = (part.strip() for part in place.split(","))
            yield Told(section, cells[0], where, parties, row["law"], int(row["steps"]))


PINNED = {
    *((row.hypervisor, row.parties.replace(" ", " + "), row.law, row.steps) for row in (
        *test_bugs.BUGS, *test_posted_designs.ROWS, *test_direct_map_designs.ROWS, *test_kvm_design.ROWS,
        *test_kvm_design.LONG, *test_large_folios.SPOTS, *test_large_folios.DEEP, *test_huge_designs.ROWS,
        *test_huge_designs.LONG)),
}


def test_every_row_is_pinned_by_a_test() -> None:
    rows = [*told(PAGE)]
    assert len(rows) >= 90
    assert [row for row in rows if (row.hypervisor, row.parties, row.law, row.steps) not in PINNED] == []


@pytest.mark.parametrize("line", [
    "| 2 | what | who | kvm, vmm2 | progress | 7 |", "| 2 | a \\| b | who | kvm, two-pages, vmm2 | progress | 7 |"])
def test_a_row_is_read(line: str) -> None:
    table = f"| # | what is wrong | who saw it | where, parties | law | steps |\n|---|---|---|---|---|---|\n{line}\n"
    assert [*told(table)] == [Told("", "2", "kvm", "vmm2", "progress", 7)]
    assert [*told(table.replace("| # |", "| where |"))] == []


# -- the sums ----------------------------------------------------------------------------------------------------------


def numbered(prefix: str, *numbers: int | range) -> set[str]:
    return {f"{prefix}{each}" for number in numbers for each in ([number] if isinstance(number, int) else number)}


LISTS = {
    "what reviewers said of Gunyah v1 to v17 and of the posted libraries": numbered(
        "R", range(1, 6), range(7, 20), 21, 22, 23, range(25, 32), range(33, 37), 39, 40, 41),
    "what is seen by reading these": numbered("S", range(1, 20), 21, range(23, 35), 40, 41, 45, range(47, 52)),
    "huge folios": numbered("", range(1, 8), 10, 11, 12, 13, 15, 17, 19, 21, 23, 24, 26),
    "direct-map removal": numbered("", 38, 39, 41, 42, 46, 47, 48, 50, 51, 52),
    "the branch that ships it": numbered("F", range(1, 6)),
    "KVM's guest_memfd": numbered("", range(2, 18), range(19, 37)),
}
"""The numbers that there are, of each list that docs/bugs.md goes by."""

SECTIONS = {
    "Bugs of the posted series with huge folios": "huge folios",
    "The postings with huge folios, as designs": "huge folios", "Bugs of direct-map removal": "direct-map removal",
    "Bugs of KVM's guest_memfd": "KVM's guest_memfd",
}
"""Where rows are whose numbers have no letter in front."""


def list_of(number: str, plain: str) -> str | None:
    """The list that *number* is of, or one without a letter in front, which is of *plain*; None if it is of none."""
    letter = number[0] if not number[0].isdigit() else ""
    names = {"R": 0, "S": 1, "F": 4}     # N, H, K and L are on no list
    if letter:
        return [*LISTS][names[letter]] if letter in names else None
    return plain or None


def found_again() -> dict[str, set[str]]:
    found: dict[str, set[str]] = {name: set() for name in LISTS}
    for row in told(PAGE):
        number = re.sub(r"(?<=\d)[a-z]$", "", row.number)
        name = list_of(number, SECTIONS.get(row.section, ""))
        # A bug of KVM's own that a series has as well stands there by its number in KVM's list.
        if name is not None and number not in LISTS[name]:
            name = "KVM's guest_memfd"
        if name is not None:
            found[name].add(number)
    return found


def out_of_reach() -> dict[str, set[str]]:
    found: dict[str, set[str]] = {name: set() for name in LISTS}
    for section, head, cells in tables(PAGE):
        if section.startswith("Out of reach"):
            for number in cells[0].split(", "):
                name = list_of(number, head[1])
                assert name is not None
                found[name].add(number)
    return found


@pytest.mark.parametrize("name", LISTS)
def test_each_number_is_found_again_or_out_of_reach(name: str) -> None:
    found, beyond = found_again()[name], out_of_reach()[name]
    assert not found & beyond
    assert found | beyond == LISTS[name]
    (said,) = [cells for _, head, cells in tables(PAGE) if head[0] == "list" and cells[0] == name]
    assert [int(cell) for cell in said[2:4]] == [len(found), len(beyond)]


def test_so_many_are_found_again() -> None:
    found = sum(map(len, found_again().values()))
    assert found >= 45
    assert f"\n{found} together." in PAGE

"""What `gmem compare` prints for people: designs x hypervisors x laws, a sentence on each design, what each costs."""

from __future__ import annotations

import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

from guest_memfd.explore.suite.verdict import LawReport, Report
from guest_memfd.explore.world.cost import DesignCost, FolioCost
from guest_memfd.report.style import Style
from guest_memfd.words.scene import Scene

LETTERS = {
    "vcpu": "V", "vcpu2": "W", "patient-vcpu": "X", "other-vcpu": "O", "vmm": "M", "vmm-life": "L", "vmm-pages": "G",
    "vmm-mapped": "H", "vmm-any": "A", "vmm-move": "J", "vmm-odd": "Q", "creator": "N", "pinner": "I", "vmm2": "T",
    "repeater": "R", "device": "D", "zeropad": "Z", "kcore": "K", "page-cache-reader": "B", "memory-failure": "F",
    "pfn-cache": "C", "power": "P", "unloader": "U", "stop": "S", "other-stop": "Y", "drainer": "E",
    "writer": "w", "launcher": "l", "uffd": "u", "pfn-cache-v2": "c",
}
"""Party -> the letter that stands for it in the table; parties of third parties get one that is free."""

COST_WIDTH, CASE_WIDTH = 37, 32
COST_HEADS = {"direct_map_writes": "direct-map writes", "flushes": "TLB flushes", "splits": "leaf splits",
              "hypercalls": "hypervisor calls"}
FOLIO_COST_HEADS = {**COST_HEADS, "table_pages": "table pages"}


def tables(reports: Sequence[Report], titles: Mapping[str, str], explored: str, style: Style) -> Iterator[str]:
    """One block per hypervisor: a row per law, a column per design.

    titles: what each hypervisor is, explored: which scenarios, in words.
    """
    letters, first = letters_for(reports), _first_column(reports)
    for hypervisor in dict.fromkeys(report.hypervisor for report in reports):
        block = [report for report in reports if report.hypervisor == hypervisor]
        yield from style.wrap(titles[hypervisor], f"{hypervisor}: ", "    ")
        widths = [max(len(r.design), *(len(cell(law, letters)) for law in r.laws.values())) + 2 for r in block]
        for columns in _fitting(widths, first, style.width):
            yield from _block([(block[i], widths[i]) for i in columns], first, letters, style)
            yield ""
    promises = "-: this design does not promise it.  " if _unpromised(reports) else ""
    yield from style.wrap(f"{promises}kept: in every interleaving of {explored}.  12 V+M: broken in 12 steps with V and M "
                    "there, and in no fewer.  *: some of them are injected failures.  ': in a scene that is named below.  "
                    "0: broken before anybody moves.  ?: nothing is proved: a limit was reached, or nothing happened.", "")
    if letters:
        yield from style.wrap(", ".join(f"{letter} {party}" for party, letter in letters.items()) + ".", "")
    for scene, said in elsewhere(reports):
        yield from style.wrap(f"{said}.", f"' in scene {scene}: ", "  ")


# Whether a law is judged of some designs under a hypervisor, and not of others.
def _unpromised(reports: Sequence[Report]) -> bool:
    blocks = {report.hypervisor: [r for r in reports if r.hypervisor == report.hypervisor] for report in reports}
    return any({*report.laws} != {*laws_of(block)} for block in blocks.values() for report in block)


def laws_of(reports: Sequence[Report]) -> list[str]:
    """The laws that any of *reports* is about."""
    return [*dict.fromkeys(law for report in reports for law in report.laws)]


def _first_column(reports: Sequence[Report]) -> int:
    return max(len(law) for report in reports for law in report.laws) + 1


def elsewhere(reports: Sequence[Report]) -> Iterator[tuple[str, str]]:
    """Scenes that are not the plainest, each with what breaks there, in words."""
    scenes: dict[str, dict[str, list[str]]] = {}
    for report in reports:
        for law in report.laws.values():
            if law.scene is not None and law.scene != Scene():
                broken = scenes.setdefault(law.scene.name, {})
                broken.setdefault(f"{law.law} of {report.design}", []).append(report.hypervisor)
    for scene, broken in scenes.items():
        yield scene, "; ".join(f"{what} on {', '.join(hypervisors)}" for what, hypervisors in broken.items())


def letters_for(reports: Sequence[Report]) -> dict[str, str]:
    """Party -> letter, of the parties that break a law in *reports*."""
    there = {party for report in reports for law in report.laws.values() if law.steps for party in law.parties or ()}
    letters = {party: letter for party, letter in LETTERS.items() if party in there}
    free = iter(sorted({*string.ascii_letters} - {*LETTERS.values()}))
    return letters | {party: next(free, party) for party in sorted(there - letters.keys())}


def cell(law: LawReport | None, letters: Mapping[str, str]) -> str:
    """``kept``, ``12 V+M``, ``12 V+M*``, ``12 V+M'`` in a scene that is not the plainest, ``0``, ``?``.

    ``-`` for a law that the design is not judged by.
    """
    if law is None:
        return "-"
    if law.verdict == "refuted":
        elsewhere = law.scene is not None and law.scene != Scene()
        who = f" {'+'.join(letters[party] for party in law.parties or ())}" if law.steps else ""
        return f"{law.steps}{who}{'*' * (law.injected > 0)}{chr(39) * elsewhere}"
    return "kept" if law.verdict == "holds" else "?"


# Columns of one block, as many as fit; the rest goes below.
def _fitting(widths: Sequence[int], first: int, most: int) -> Iterator[list[int]]:
    columns: list[int] = []
    for i in range(len(widths)):
        if columns and first + sum(widths[j] for j in columns) + widths[i] > most:
            yield columns
            columns = []
        columns.append(i)
    yield columns


def _block(
    columns: Sequence[tuple[Report, int]], first: int, letters: Mapping[str, str], style: Style
) -> Iterator[str]:
    yield style.head(" " * first + "".join(f"{report.design:<{width}}" for report, width in columns).rstrip())
    for name in laws_of([report for report, _ in columns]):
        cells = []
        for report, width in columns:
            law = report.laws.get(name)
            colour = {"refuted": style.bad, "holds": style.good}.get(law.verdict if law else "", style.doubt)
            words = cell(law, letters)
            cells.append(colour(words) + " " * (width - len(words)))
        yield f"{name:<{first}}{''.join(cells)}".rstrip()


def costs(counted: Mapping[tuple[str, str], DesignCost | None], style: Style) -> Iterator[str]:
    """One line per design and hypervisor, alike hypervisors together: operations per folio lent and taken back."""
    heads, widths = _cost_heads(COST_HEADS, COST_WIDTH, style)
    yield from style.lead("cost per folio of order 0, lent to the guest and taken back (operations)", style.head, "")
    yield from heads
    alike = _alike({pair: cost for pair, cost in counted.items() if cost is not None})
    for (design, cost), hypervisors in alike.items():
        yield f"{design + ' on ' + ', '.join(hypervisors):<{COST_WIDTH}}{_counts(COST_HEADS, vars(cost), widths)}"
    trusting = {design for design, cost in alike if cost.direct_map_writes and not cost.flushes}
    if trusting:
        yield from style.wrap("no flush of its own, and so safe only where the hypervisor flushes: "
                              f"{', '.join(sorted(trusting))}", "", "  ")


def folio_costs(counted: Mapping[tuple[str, str], FolioCost | None], style: Style) -> Iterator[str]:
    """One line per case and hypervisor, alike hypervisors together: (case, hypervisor) -> cost, None if refused."""
    heads, widths = _cost_heads(FOLIO_COST_HEADS, CASE_WIDTH, style)
    yield from style.lead("cost of larger folios, library, counted on the emulated machine (operations)", style.head, "")
    yield from heads
    for (case, cost), hypervisors in _alike(counted).items():
        name = f"{case} on {', '.join(hypervisors)}"
        yield f"{name:<{CASE_WIDTH}}" + ("  refused while the guest lives" if cost is None else
                                         _counts(FOLIO_COST_HEADS, vars(cost), widths))
    yield from style.wrap("1 GiB is lent to the guest and taken back; what 4K and 2M cost is carried over from two blocks "
                          "of 2 MiB. A round trip: a page becomes shared, private again, and is lent again. The direct map "
                          "is made of blocks, which split while they are in use (BBML3).", "", "  ")


C = TypeVar("C")


def _alike(counted: Mapping[tuple[str, str], C]) -> dict[tuple[str, C], list[str]]:
    alike: dict[tuple[str, C], list[str]] = {}
    for (name, hypervisor), cost in counted.items():
        alike.setdefault((name, cost), []).append(hypervisor)
    return alike


# The line, or where there is no room for it the two lines, above the columns, and how wide those are.
def _cost_heads(named: Mapping[str, str], first: int, style: Style) -> tuple[list[str], list[int]]:
    heads = list(named.values())
    if first + sum(len(head) + 2 for head in heads) <= style.width:
        rows = [heads]
    else:
        rows = [list(row) for row in zip(*(head.rsplit(" ", 1) for head in heads), strict=True)]
    widths = [max(map(len, column)) + 2 for column in zip(*rows, strict=True)]
    return [" " * first + "".join(f"{head:>{width}}" for head, width in zip(row, widths, strict=True))
            for row in rows], widths


def _counts(named: Iterable[str], counts: Mapping[str, int], widths: Sequence[int]) -> str:
    return "".join(f"{counts[what]:>{width},}" for what, width in zip(named, widths, strict=True))

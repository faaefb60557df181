"""The page of a comparison: the table, each broken cell opening its shortest run, costs, and what was explored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from guest_memfd.explore.replay import replay
from guest_memfd.explore.suite.verdict import LawReport, Report
from guest_memfd.explore.trace import trace_of
from guest_memfd.explore.world.cost import DesignCost
from guest_memfd.html.render import render
from guest_memfd.html.trace import TraceView, view
from guest_memfd.hypervisors import HYPERVISORS
from guest_memfd.laws import LAWS
from guest_memfd.laws.law import Law
from guest_memfd.report.counterexample import commands
from guest_memfd.report.sentence import injected
from guest_memfd.report.table import COST_HEADS, cell, elsewhere, laws_of, letters_for
from guest_memfd.scenarios import PARTIES, SCENES

Costs = Mapping[tuple[str, str], DesignCost | None]


class Verdict(NamedTuple):
    """A cell of the table: what it says, what became of the law, why, and the name of its run in the page."""

    text: str
    verdict: str
    why: str
    run: str


class LawRow(NamedTuple):
    """A row of a table: a law and what became of it under each design."""

    law: Law
    verdicts: list[Verdict]


class Block(NamedTuple):
    """The table of one hypervisor."""

    hypervisor: str
    title: str
    reports: list[Report]
    rows: list[LawRow]


class Bar(NamedTuple):
    """A number of operations, and how long its bar is, in percent of the longest of its column."""

    number: int
    percent: int


class CostRow(NamedTuple):
    """What a design costs under *hypervisors*."""

    design: str
    hypervisors: list[str]
    bars: list[Bar]


def page(reports: Sequence[Report], costs: Costs, sentences: Mapping[str, str], explored: str,
         loads: Sequence[str] = ()) -> str:
    """The page of *reports*; *sentences*: design -> what came of it; *explored*: which scenarios, in words.

    loads: files that have to be loaded to see a run again.
    """
    letters = letters_for(reports)
    blocks = [_block(name, [report for report in reports if report.hypervisor == name], letters)
              for name in dict.fromkeys(report.hypervisor for report in reports)]
    runs = [_run(report, law, loads) for report in reports for law in report.laws.values() if law.finding is not None]
    return render(
        "compare.html", blocks=blocks, letters={letters[name]: (name, _title(name)) for name in letters},
        elsewhere=list(elsewhere(reports)), sentences=sentences, explored=explored, injected=injected(reports[0]),
        scenes=[(name, SCENES[name].title if name in SCENES else "")
                for name in dict.fromkeys(name for report in reports for name in report.scenes)],
        reports=reports, heads=list(COST_HEADS.values()), costs=list(_costs(costs)), runs=runs,
        primitives={name: means for run in runs for name, means in run.primitives.items()})


def _block(hypervisor: str, reports: list[Report], letters: Mapping[str, str]) -> Block:
    rows = [LawRow(LAWS[name], [_verdict(report, report.laws.get(name), letters) for report in reports])
            for name in laws_of(reports)]
    return Block(hypervisor, HYPERVISORS[hypervisor].title, reports, rows)


def _verdict(report: Report, law: LawReport | None, letters: Mapping[str, str]) -> Verdict:
    if law is None:
        return Verdict(cell(law, letters), "undetermined", "this design does not promise it", "")
    run = _slug(report, law) if law.finding is not None else ""
    why = law.evidence or "; ".join((*report.limits, *report.missing) if law.verdict == "undetermined" else ())
    return Verdict(cell(law, letters), law.verdict, why, run)


# A name is of letters, digits, - and _: it is one in an address as well (plugins/fields.py).
def _slug(report: Report, law: LawReport) -> str:
    return f"{report.design}-{report.hypervisor}-{law.law}"


def _run(report: Report, law: LawReport, loads: Sequence[str]) -> TraceView:
    assert law.scene is not None
    again = commands(report.design, report.hypervisor, law.scene, law.parties or (), law.law, failures=report.failures,
                     folder=None, loads=loads)
    # Run again: a finding has the states alone. Which procedure a step was in, and what it looked at, only a run tells.
    return view(replay(trace_of(report, law)), _slug(report, law), commands=again)


def _title(party: str) -> str:
    return PARTIES[party].title if party in PARTIES else ""


# Hypervisors under which a design costs the same share a row.
def _costs(costs: Costs) -> Iterator[CostRow]:
    alike: dict[tuple[str, DesignCost], list[str]] = {}
    for (design, hypervisor), cost in costs.items():
        if cost is not None:
            alike.setdefault((design, cost), []).append(hypervisor)
    most = {head: max((getattr(cost, head) for _, cost in alike), default=0) for head in COST_HEADS}
    for (design, cost), hypervisors in alike.items():
        counts = [(getattr(cost, head), most[head]) for head in COST_HEADS]
        yield CostRow(design, hypervisors, [Bar(count, 100 * count // max(longest, 1)) for count, longest in counts])

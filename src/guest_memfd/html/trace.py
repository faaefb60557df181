"""What the page of a counterexample shows: its parties as lanes, a row for each step, and the states beside them.

Rows of one operation stand together under its name and what it came to; where another party takes its steps between, the
operation goes on below. Steps that lead to the broken law say why (report/story.py).
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import groupby
from typing import Any, NamedTuple

from guest_memfd.abstract import show
from guest_memfd.abstract import state as st
from guest_memfd.designs import DESIGNS
from guest_memfd.explore.engine.finding import Step
from guest_memfd.explore.replay import Divergence, Replay
from guest_memfd.explore.trace import TraceStep
from guest_memfd.html.cells import States, states
from guest_memfd.html.render import render
from guest_memfd.hypervisors import HYPERVISORS
from guest_memfd.laws import LAWS
from guest_memfd.laws.law import Law
from guest_memfd.report import steps as said
from guest_memfd.report.blame import offending
from guest_memfd.report.choices import sentence
from guest_memfd.report.counterexample import Counterexample, length
from guest_memfd.report.operations import OperationRun, operations
from guest_memfd.report.story import Blamed, Lead, blamed, leads
from guest_memfd.report.touched import in_order, named, touched
from guest_memfd.scenarios import PARTIES, TEARDOWN
from guest_memfd.words.primitives import Host, Primitive

MachineNotes = Mapping[int, Sequence[str]]
"""Number of a step -> what it did on the emulated machine, in lines."""

CHUNK = 100
"""Steps that a browser lays out together; what is far from the window is not laid out at all."""
LANES = 6
"""Colours that there are for parties."""


class Lane(NamedTuple):
    """A party: its name, what it is, and which colour it has."""

    name: str
    title: str
    colour: int


@dataclass(frozen=True)
class StepRow:
    """One step. *about*: what it touches; *busy*: lanes with an operation under way; *leads*: why it leads there."""

    number: int
    lane: int
    colour: int
    party: str
    chose: str
    call: str
    means: str
    answer: str
    failed: bool
    about: tuple[str, ...]
    busy: tuple[bool, ...] = ()
    changed: Sequence[str] = ()
    notes: Sequence[str] = ()
    leads: Sequence[str] = ()
    machine: Sequence[str] = ()
    breaks: bool = False
    recorded: bool = False


class RowGroup(NamedTuple):
    """Rows of one operation that stand together, or rows of none. *goes_on*: it began above."""

    operation: OperationRun | None
    colour: int
    goes_on: bool
    rows: Sequence[StepRow]


@dataclass(frozen=True)
class TraceView:
    """All that a template shows of a run; *slug* goes before the names of its steps. *chunks*: CHUNK steps or some more."""

    slug: str
    example: Counterexample
    law: Law
    design: str
    hypervisor: str
    length: str
    lanes: Sequence[Lane]
    idle: Sequence[str]
    chunks: Sequence[Sequence[RowGroup]]
    about: Sequence[str]
    states: States
    because: Sequence[Blamed]
    leads: Sequence[tuple[StepRow, Lead]]
    initially: Sequence[tuple[str, str]]
    words: Sequence[tuple[str, str]]
    primitives: Mapping[str, str]
    divergence: Divergence | None = None
    data: Mapping[str, Any] = field(default_factory=dict)

    @property
    def rows(self) -> list[StepRow]:
        """All rows, in order."""
        return [row for chunk in self.chunks for part in chunk for row in part.rows]


def view(
    again: Replay, slug: str = "", *, commands: Sequence[tuple[str, tuple[str, ...]]] = (),
    machine: MachineNotes | None = None,
) -> TraceView:
    """What is to be shown of a trace that was run *again*; what could not be taken again is shown as it was recorded."""
    trace, finding, divergence = again.trace, again.finding, again.divergence
    example = Counterexample(trace.design, trace.hypervisor, trace.scene, trace.parties, finding, tuple(commands))
    names = said.lock_holders(finding.steps, finding.initial)
    wrong = blamed(finding.initial, finding.steps, names, offending(finding) if divergence is None else ())
    every = states(finding.initial, finding.steps, names, {it.name for it in wrong})
    rest = trace.steps[len(again.steps):] if divergence else ()
    acting = [*(step.party for step in finding.steps), *(step.party for step in rest)]
    # A run can break a law before anybody moves. Then all have a lane, and none a step.
    parties = [party for party in example.parties if party in acting] or example.parties
    lanes = _lanes([*parties, *acting])
    ran = operations(again)
    # Where the run parts from its record no law breaks, so nothing leads there.
    marked = leads(again, wrong, ran) if divergence is None else []
    rows = list(_rows(example, lanes, names, machine or {}, broken=divergence is None))
    for lead in marked:
        rows[lead.step - 1] = replace(rows[lead.step - 1], leads=lead.why)
    rows += _recorded(rest, len(rows), lanes, st.layout_of(finding.initial).sizes)
    return TraceView(
        slug, example, LAWS[finding.law], DESIGNS[example.design].title, HYPERVISORS[example.hypervisor].title,
        length(finding.steps, parties), lanes, [party for party in example.parties if party not in parties],
        list(_chunks(rows, ran)),
        sorted({thing for row in rows for thing in row.about}, key=in_order), every, wrong,
        [(rows[lead.step - 1], lead) for lead in marked],
        [(f"{what} at first", words.strip()) for what, _, words in (
            line.partition(" ") for line in show.overview(finding.initial))],
        list(_words(example)),
        {name: means for row in rows if (means := row.means) and (name := row.call.partition("(")[0])}, divergence,
        {"first": every.first, "changes": every.changes, "blamed": every.blamed})


def page(
    again: Replay, commands: Sequence[tuple[str, tuple[str, ...]]] = (), machine: MachineNotes | None = None,
    machine_name: str = "",
) -> str:
    """The page of a trace that was run *again*; *machine*: what the emulated machine called *machine_name* did beside it."""
    return render("trace.html", view=view(again, commands=commands, machine=machine), trace=again.trace,
                  machine_name=machine_name)


# What readers of another hypervisor, or of another design, call something else.
def _words(example: Counterexample) -> Iterator[tuple[str, str]]:
    lending = HYPERVISORS[example.hypervisor].lending
    yield "lent", f"the guest has the page alone{'; ' + lending if lending else ''}"
    states = (example.finding.initial, *(step.shared for step in example.finding.steps[-1:]))
    if any(page.attr for state in states for page in st.State(state).pages()):
        yield "private, shared", "what the file says of each page, its attribute; to convert a page is to change that"
    elif example.scene.made:                            # of a file that is still to be made nothing can be said
        yield "private, shared", ("what the scene wants of each page; this design keeps no attribute that says so, and "
                                  "lends or shares a page when somebody faults")


def _lanes(parties: Sequence[str]) -> list[Lane]:
    return [Lane(name, _title(name), at % LANES) for at, name in enumerate(dict.fromkeys(parties))]


def _title(name: str) -> str:
    if name == TEARDOWN.name:
        return TEARDOWN.title
    return PARTIES[name].title if name in PARTIES else ""


def _rows(
    example: Counterexample, lanes: Sequence[Lane], names: show.Names, machine: MachineNotes, *, broken: bool
) -> Iterator[StepRow]:
    finding = example.finding
    numbers = {name: number for number, name in names.items()}
    before = finding.initial
    for number, step in enumerate(finding.steps, 1):
        last = broken and number == len(finding.steps)
        notes = [*said.told_of(step, before), *(said.reaches(step) if last else ())]
        ghosts = st.State(step.shared)
        busy = tuple(lane.name in numbers and ghosts.ghost(numbers[lane.name]).op > 0 for lane in lanes)
        yield _row(number, step, lanes, about=touched(step, before), busy=busy, notes=notes, breaks=last,
                   changed=show.changed(before, step.shared, names), machine=machine.get(number, ()))
        before = step.shared


# What the program did not do again has no states, and nothing is known of it but what the file says.
def _recorded(
    rest: Sequence[TraceStep], done: int, lanes: Sequence[Lane], sizes: st.Sizes
) -> Iterator[StepRow]:
    for number, step in enumerate(rest, done + 1):
        taken = Step(step.party, step.choices, step.primitive, step.result, step.failed, b"", ())
        yield _row(number, taken, lanes, about=tuple(named(taken, sizes)), recorded=True)


# A chunk ends where a part does, unless that has more rows than a chunk.
def _chunks(rows: Sequence[StepRow], ran: Sequence[OperationRun]) -> Iterator[list[RowGroup]]:
    within = {number: operation for operation in ran for number in operation.steps}
    chunk: list[RowGroup] = []
    for _, together in groupby(rows, lambda row: id(within.get(row.number))):
        for some in _batched(list(together)):
            first = some[0]
            operation = within.get(first.number)
            goes_on = operation is not None and first.number > operation.steps[0]
            chunk.append(RowGroup(operation, first.colour, goes_on, some))
            if sum(len(part.rows) for part in chunk) >= CHUNK:
                yield chunk
                chunk = []
    if chunk:
        yield chunk


def _batched(rows: Sequence[StepRow]) -> Iterator[Sequence[StepRow]]:
    return (rows[at:at + CHUNK] for at in range(0, len(rows), CHUNK))


def _row(number: int, step: Step, lanes: Sequence[Lane], **more: Any) -> StepRow:
    at = next(at for at, lane in enumerate(lanes) if lane.name == step.party)
    known = step.primitive is not None and _known(step.primitive)
    call = "done" if step.primitive is None else said.call(step.primitive) if known else str(step.primitive)
    return StepRow(number, at, lanes[at].colour, step.party, sentence(step.choices), call,
                   meaning(step.primitive.name) if step.primitive else "", said.answer(step) if known else "",
                   step.failed, **more)


@cache
def meaning(primitive: str) -> str:
    """What *primitive* does, as its host says it, without markup; empty for what no host offers."""
    does = getattr(Host, primitive, None)
    said = (inspect.getdoc(does) or "").split("\n\n")[0] if does else ""
    return re.sub(r"\*(\w+)\*", r"\1", " ".join(said.split())).replace("`", "")


def _known(primitive: Primitive) -> bool:
    return hasattr(Host, primitive.name)


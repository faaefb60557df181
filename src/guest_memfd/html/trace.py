"""What the page of a counterexample shows: its parties as lanes, a row for each step, and the states beside them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

from guest_memfd.abstract import show
from guest_memfd.abstract import state as st
from guest_memfd.designs import DESIGNS
from guest_memfd.explore.engine.finding import Step
from guest_memfd.explore.replay import Divergence, Replay
from guest_memfd.explore.trace import TraceStep
from guest_memfd.html.cells import Blamed, States, blamed, states
from guest_memfd.html.render import render
from guest_memfd.hypervisors import HYPERVISORS
from guest_memfd.laws import LAWS
from guest_memfd.laws.law import Law
from guest_memfd.report import steps as said
from guest_memfd.report.blame import offending
from guest_memfd.report.choices import sentence
from guest_memfd.report.counterexample import Counterexample, length
from guest_memfd.scenarios import PARTIES, TEARDOWN
from guest_memfd.words.primitives import Folio, Host, Lookup, Primitive
from guest_memfd.words.units import Pfn

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
    """One step. *about*: the frames, pages and guest frames that it touches; *busy*: lanes with an operation under way."""

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
    machine: Sequence[str] = ()
    breaks: bool = False
    recorded: bool = False


@dataclass(frozen=True)
class TraceView:
    """All that a template shows of a run; *slug* goes before the names of its steps."""

    slug: str
    example: Counterexample
    law: Law
    design: str
    hypervisor: str
    length: str
    lanes: Sequence[Lane]
    chunks: Sequence[Sequence[StepRow]]
    about: Sequence[str]
    states: States
    because: Sequence[Blamed]
    initially: Sequence[tuple[str, str]]
    primitives: Mapping[str, str]
    divergence: Divergence | None = None
    data: Mapping[str, Any] = field(default_factory=dict)


def view(
    example: Counterexample, slug: str = "", *, divergence: Divergence | None = None, rest: Sequence[TraceStep] = (),
    machine: MachineNotes | None = None,
) -> TraceView:
    """What is to be shown of *example*; *rest*: steps that were recorded and could not be taken, from *divergence* on."""
    finding = example.finding
    names = said.lock_holders(finding.steps, finding.initial)
    wrong = offending(finding) if divergence is None else frozenset()
    every = states(finding.initial, finding.steps, names, wrong)
    lanes = _lanes([*example.parties, *(step.party for step in finding.steps), *(step.party for step in rest)])
    rows = list(_rows(example, lanes, names, machine or {}, broken=divergence is None))
    rows += _recorded(rest, len(rows), lanes, st.layout_of(finding.initial).sizes)
    return TraceView(
        slug, example, LAWS[finding.law], DESIGNS[example.design].title, HYPERVISORS[example.hypervisor].title,
        length(finding.steps, example.parties), lanes, [rows[at:at + CHUNK] for at in range(0, len(rows), CHUNK)],
        sorted({thing for row in rows for thing in row.about}, key=_in_order), every,
        blamed(finding.initial, finding.steps, names, wrong),
        [(f"{what} at first", words.strip()) for what, _, words in (
            line.partition(" ") for line in show.overview(finding.initial))],
        {name: means for row in rows if (means := row.means) and (name := row.call.partition("(")[0])}, divergence,
        {"first": every.first, "changes": every.changes, "blamed": every.blamed})


def page(
    again: Replay, commands: Sequence[tuple[str, tuple[str, ...]]] = (), machine: MachineNotes | None = None,
    machine_name: str = "",
) -> str:
    """The page of a trace that was run *again*; *machine*: what the emulated machine called *machine_name* did beside it."""
    trace = again.trace
    example = Counterexample(trace.design, trace.hypervisor, trace.scene, trace.parties, again.finding, tuple(commands))
    rest = trace.steps[len(again.steps):] if again.divergence else ()
    shown = view(example, divergence=again.divergence, rest=rest, machine=machine)
    return render("trace.html", view=shown, trace=trace, machine_name=machine_name)


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
        yield _row(number, step, lanes, about=_about(step, before), busy=busy, notes=notes, breaks=last,
                   changed=show.changed(before, step.shared, names), machine=machine.get(number, ()))
        before = step.shared


# What the program did not do again has no states, and nothing is known of it but what the file says.
def _recorded(
    rest: Sequence[TraceStep], done: int, lanes: Sequence[Lane], sizes: st.Sizes
) -> Iterator[StepRow]:
    for number, step in enumerate(rest, done + 1):
        taken = Step(step.party, step.choices, step.primitive, step.result, step.failed, b"", ())
        yield _row(number, taken, lanes, about=tuple(_named(taken, sizes)), recorded=True)


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


# What a step touches: what it changes, what it names, and with a frame the page of the file that it holds.
def _about(step: Step, before: bytes) -> tuple[str, ...]:
    sizes = st.layout_of(before).sizes
    there = {*_named(step, sizes)}
    there.update(record.replace("folio", "pfn") for name, _, _ in st.changes(before, step.shared)
                 if (record := name.rpartition(".")[0]).startswith(("pfn", "folio", "page", "gfn")))
    there.update(f"pfn{note.pfn}" for note in step.notes if getattr(note, "pfn", None) is not None)
    frames = [number for number in range(sizes.frames) if f"pfn{number}" in there]
    for state in (st.State(before), st.State(step.shared)):
        there |= {f"page{slot - 1}" for number in frames if (slot := state.frame(Pfn(number)).slot)}
    return tuple(sorted(there, key=_in_order))


# Pages are counted on from file to file, guest frames from VM to VM.
def _named(step: Step, sizes: st.Sizes) -> Iterator[str]:
    primitive = step.primitive
    if primitive is None:
        return
    for value in (*primitive.args, step.result):
        folio = value.folio if isinstance(value, Lookup) else value
        if isinstance(folio, Folio):
            yield from (f"pfn{folio.pfn + at}" for at in range(min(folio.nr, CHUNK)))
    first = {"index": ("page", primitive.file * sizes.pages), "pfn": ("pfn", 0),
             "gfn": ("gfn", min(primitive.file, sizes.vms - 1) * sizes.gfns)}
    for name, value in zip(said.parameters(primitive.name), primitive.args, strict=False) if _known(primitive) else ():
        if type(value) is int and value >= 0 and name in first:
            yield f"{first[name][0]}{first[name][1] + value}"


def _known(primitive: Primitive) -> bool:
    return hasattr(Host, primitive.name)


def _in_order(name: str) -> tuple[str, int]:
    kind = name.rstrip("0123456789")
    return kind, int(name[len(kind):])

"""A trace as text: one numbered line per step, what it changed after it, what became of it below."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

from guest_memfd.abstract import show
from guest_memfd.abstract import state as st
from guest_memfd.errors import errno_name
from guest_memfd.explore.engine.finding import Step
from guest_memfd.report.choices import sentence
from guest_memfd.report.style import Style
from guest_memfd.words import facts
from guest_memfd.words.primitives import OPS, Entries, Folio, Host, Primitive


def lines(steps: Sequence[Step], initial: bytes, style: Style) -> Iterator[str]:
    """All steps from *initial* on, each wrapped to the width of a report."""
    names = lock_holders(steps, initial)
    before = initial
    for number, step in enumerate(steps, 1):
        head = f"{number:>3}. {step.party}: {action(step)}"
        told = "; ".join(show.changed(before, step.shared, names))
        if told and len(head) + len(told) + 4 <= style.width:
            yield f"{head}  | {told}"
        else:
            yield from style.wrap(f"{step.party}: {action(step)}", f"{number:>3}. ")
            yield from style.wrap(told, "     | ", "     | ") if told else ()
        for fact in told_of(step, before):
            yield from style.wrap(fact, "     ~ ")
        for reach in reaches(step) if number == len(steps) else ():
            yield from style.wrap(reach, "     ~ ")
        before = step.shared


def action(step: Step) -> str:
    """``[gfn 0] guest_access(gfn=0, write) -> fault`` of one step."""
    chosen = f"[{sentence(step.choices)}] " if step.choices else ""
    if step.primitive is None:
        return f"{chosen}done"
    came = answer(step)
    failed = "  (injected failure)" if step.failed else ""
    return f"{chosen}{call(step.primitive)}{f' -> {came}' if came else ''}{failed}"


def answer(step: Step) -> str:
    """What came back to who took *step*: ``none`` where something else could have, and nothing where nothing ever does."""
    if step.primitive is None:
        return ""
    return "none" if step.result is None and _may_be_none(step.primitive.name) else result(step.result)


def call(primitive: Primitive) -> str:
    """A primitive with the names of those arguments that are bare numbers or flags."""
    names = parameters(primitive.name)
    told = []
    for at, arg in enumerate(primitive.args):
        name = names[at] if at < len(names) else ""
        if isinstance(arg, bool):
            told.append(f"{name}={'yes' if arg else 'no'}" if name else str(arg))
        elif isinstance(arg, int) and name:
            told.append(f"{name}={arg}")
        elif isinstance(arg, tuple) and not isinstance(arg, Folio):
            told.append(f"[{', '.join(map(str, arg))}]")
        elif isinstance(arg, Entries):
            told.append(f"[{arg}]")
        else:
            told.append(str(arg))
    where = f"file{primitive.file}." if primitive.file else ""
    return f"{where}{primitive.name}({', '.join(told)})"


@cache
def parameters(primitive: str) -> tuple[str, ...]:
    """What the arguments of *primitive* are called."""
    named = list(inspect.signature(getattr(Host, primitive)).parameters.values())[1:]
    return tuple(p.name for p in named if p.kind is p.POSITIONAL_OR_KEYWORD)


# ``-> none`` says something only where something else could have come back.
@cache
def _may_be_none(primitive: str) -> bool:
    return "| None" in str(inspect.signature(getattr(Host, primitive)).return_annotation)


def result(value: Any) -> str:
    """What a primitive returned: errno by name, records without what is false or absent, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"-{errno_name(-value)}" if value < 0 else str(value)
    if isinstance(value, tuple) and hasattr(value, "_fields") and not isinstance(value, Folio):
        items = zip(value._fields, value, strict=True)
        return " ".join(name if item is True else f"{name}={item}" for name, item in items
                        if item is not None and item is not False)
    if isinstance(value, tuple) and not isinstance(value, Folio):
        return f"[{', '.join(map(str, value))}]"
    return str(value)


def told_of(step: Step, before: bytes) -> Iterator[str]:
    """What a step was about beyond its result: operations that begin and end, aborts, refusals, losses."""
    for field, old, new in st.changes(before, step.shared):
        if show.ghost(field) and field.endswith(".op") and new and not old:
            yield f"{OPS[new - 1]} begins"
    for note in step.notes:
        words = _fact(note)
        if words:
            yield words


def reaches(step: Step) -> Iterator[str]:
    """Who reached which page in *step*, by which way, and what was there: for the step that breaks a law."""
    for note in step.notes:
        if isinstance(note, facts.Access):
            whose = ", which is the guest's alone" if note.guests else ", which is free" if note.free else ""
            does = "writes to" if note.write else f"reads {note.content} from"
            yield f"{note.who} {does} pfn{note.pfn}{whose}, through the {note.via}"


def _fact(note: Any) -> str | None:
    if isinstance(note, facts.Abort):
        end = "survived" if note.survived else "the kernel stops"
        return f"stage-{note.stage} abort on pfn{note.pfn}, {note.kind}; {end}: {note.why}"
    if isinstance(note, facts.Refused):
        return f"{note.call} refuses by rule: {result(-note.errno)}"
    if isinstance(note, facts.Ended):
        where = "" if note.error_index is None else f" at page {note.error_index}"
        return f"{note.op} returns {result(note.ret)}{where}"
    if isinstance(note, facts.Returned):
        told = note.how is not None and note.ret == note.how.ret
        return None if told else f"{note.op} returns {result(note.ret)} to its caller"
    if isinstance(note, facts.Given):
        return f"pfn{note.pfn}, whose memory is broken, is mapped for {note.whom}"
    if isinstance(note, facts.Destroyed):
        return f"what pfn{note.pfn} held is lost: {note.how}"
    if isinstance(note, facts.Broken):
        return f"the kernel stops: {note.what}"
    if isinstance(note, facts.UseAfterFree):
        return f"use after free of {note.what}"
    if isinstance(note, facts.Contained):
        left = f"; {', '.join(note.reached)} still reaches it" if note.reached else ""
        return f"memory failure of pfn{note.pfn}: {note.result}{left}"
    return f"WARN_ON: {note.what}" if isinstance(note, facts.Warned) else None


def lock_holders(steps: Sequence[Step], initial: bytes) -> dict[int, str]:
    """Party number -> name, of those who take a lock or begin an operation in *steps*."""
    names: dict[int, str] = {}
    before = initial
    for step in steps:
        for field, old, new in st.changes(before, step.shared):
            if field.rpartition(".")[2] in show.HOLDERS and new and not old:
                names.setdefault(new - 1, step.party)
            elif show.ghost(field):                     # its own: nobody writes another's
                names.setdefault(int(field.partition(".")[0].removeprefix("party")), step.party)
        before = step.shared
    return names

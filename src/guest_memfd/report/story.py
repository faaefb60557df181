"""Which steps lead to a broken law, beside the one that breaks it: what a reader would underline.

All of it follows from the run. A step *makes* what breaks the law: since then the field holds what it must not. A step is a
*check*: within the operation that breaks the law it asks about the same page, changes nothing, and the operation goes on.
Then what it looked at is said, and what was wrong already and is not among it. A step *answers* such a check: of what the
check looks at, it was the last to change something. And a call is made to fail. All other steps are needed to get there as
well, for the run is the shortest, and are not marked.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import NamedTuple

from guest_memfd.abstract import show
from guest_memfd.abstract import state as st
from guest_memfd.explore.engine.finding import Step
from guest_memfd.explore.replay import Replay
from guest_memfd.report.operations import OperationRun
from guest_memfd.report.steps import lock_holders
from guest_memfd.report.touched import touched
from guest_memfd.words import facts

# Fields that most primitives look at, whatever they are about.
_EVERYWHERE = frozenset({"frozen", "unloaded", "failures", "panic", "given"})
ASKS = frozenset({
    "folio_mapped", "vma_covers", "folio_maybe_dma_pinned", "folio_ref_count", "page_hwpoison", "filemap_find_folio",
    "can_set_direct_map", "tree_load", "vm_state", "gup_read_pte", "mapping_no_direct_map", "open_files",
})
"""Primitives that ask and never change anything; another that changed nothing was in vain."""

_REFERENCES = ("cache", "lru", "lookup", "provided", "pin", "get", "spec", "kept")


class Blamed(NamedTuple):
    """A field that breaks the law: its name, what it is called, what it holds, and since which step; 0: all along."""

    name: str
    record: str
    label: str
    text: str
    since: int


class Lead(NamedTuple):
    """A step that leads to the broken law, and why, a sentence each."""

    step: int
    why: tuple[str, ...]


def blamed(initial: bytes, steps: Sequence[Step], names: show.Names, fields: Iterable[str]) -> list[Blamed]:
    """*fields* of the last state, in the order of the layout, each with the step that made it what it is."""
    wanted, since = set(fields), dict[str, int]()
    before = initial
    for number, step in enumerate(steps, 1):
        since.update((name, number) for name, _, _ in st.changes(before, step.shared) if name in wanted)
        before = step.shared
    return [Blamed(name, show.record(name), _label_of(name), show.value(name, held, names), since.get(name, 0))
            for name, held in st.fields_of(before).items() if name in wanted]


def _titled(it: Blamed) -> str:
    return f"{it.record} {it.label}".strip()


# A reference says which.
def _label_of(name: str) -> str:
    record, _, field = name.rpartition(".")
    if not record.startswith("pfn") or field not in _REFERENCES:
        return show.label(name)
    means = st.FRAME_FIELDS[field].removeprefix("references: ").replace(" (", ": ").removesuffix(")")
    return f"{show.label(name)} ({means})"


def leads(again: Replay, wrong: Sequence[Blamed], ran: Sequence[OperationRun]) -> list[Lead]:
    """The steps of *again* that lead to what is *wrong* in its last state, in order; *ran*: the operations of the run."""
    found: dict[int, list[str]] = {}
    for number, why in (*_made(again.steps, wrong), *_failed(again.steps), *_asked(again, wrong, ran)):
        found.setdefault(number, []).append(why)
    # The last step breaks the law. That is said of it already.
    return [Lead(number, tuple(found[number])) for number in sorted(found) if number < len(again.steps)]


def _made(steps: Sequence[Step], wrong: Sequence[Blamed]) -> Iterator[tuple[int, str]]:
    for since in sorted({it.since for it in wrong} - {0, len(steps)}):
        told = [f"{_titled(it)} is {it.text}" for it in wrong if it.since == since]
        yield since, f"since this step {', '.join(told)}: part of what breaks the law"


def _failed(steps: Sequence[Step]) -> Iterator[tuple[int, str]]:
    for number, step in enumerate(steps, 1):
        if step.failed:
            yield number, "this call is made to fail"


def _asked(again: Replay, wrong: Sequence[Blamed], ran: Sequence[OperationRun]) -> Iterator[tuple[int, str]]:
    breaking = _breaking(again, wrong, ran)
    if breaking is None:
        return
    names = lock_holders(again.steps, again.initial)
    for number in breaking.steps:
        looked = _looked(again, number)
        if number < len(again.steps) and looked and _checks(again, number, {it.name for it in wrong}):
            yield number, _check(again, number, looked, wrong)
            yield from _answers(again, number, looked, breaking, names)


# The operation in which the law breaks. A stray load, or an access of the guest, is in none: then the one that made the
# last of what is wrong.
def _breaking(again: Replay, wrong: Sequence[Blamed], ran: Sequence[OperationRun]) -> OperationRun | None:
    last = max((it.since for it in wrong if it.since < len(again.steps)), default=0)
    for number in (len(again.steps), last):
        for operation in ran:
            if number in operation.steps:
                return operation
    return None


def _before(again: Replay, number: int) -> bytes:
    return again.steps[number - 2].shared if number > 1 else again.initial


def _looked(again: Replay, number: int) -> list[str]:
    looked = again.looked[number - 1] if number <= len(again.looked) else frozenset()
    return [name for name in st.layout_of(again.initial).names
            if name in looked and name not in _EVERYWHERE and not show.ghost(name)]


def _checks(again: Replay, number: int, fields: Collection[str]) -> bool:
    step, before = again.steps[number - 1], _before(again, number)
    if step.primitive is None or step.result is None or step.primitive.name == "hyp_call":
        return False
    if any(isinstance(note, (facts.Access, facts.Abort)) for note in step.notes):
        return False
    if any(not show.ghost(name) for name, _, _ in st.changes(before, step.shared)):
        return False
    about = {name.rpartition(".")[0].replace("folio", "pfn") for name in fields}
    state = st.State(before)
    about |= {f"page{frame.slot - 1}" for frame in state.frames() if f"pfn{frame.number}" in about and frame.slot}
    return bool(about & {*touched(step, before)})


def _check(again: Replay, number: int, looked: Sequence[str], wrong: Sequence[Blamed]) -> str:
    primitive = again.steps[number - 1].primitive
    kind = "a check" if primitive is not None and primitive.name in ASKS else "changes nothing here"
    where = next((name for name in reversed(again.inside[number - 1]) if not name.startswith("_")), "")
    said = f"{kind}, in {where}(): it looks at {_named(looked)}"
    late = [at for it in wrong if it.name in looked for at in _changed(again, it.name, number)]
    missed = [it.name for it in wrong if 0 < it.since < number and it.name not in looked]
    if late:
        return f"{said}, and step {late[-1]} changes that afterwards"
    return f"{said}, and not at {_named(missed)}" if missed else said


def _changed(again: Replay, name: str, after: int) -> Iterator[int]:
    for number in range(after + 1, len(again.steps) + 1):
        if any(field == name for field, _, _ in st.changes(_before(again, number), again.steps[number - 1].shared)):
            yield number


# Of each field that the check looks at the last change by somebody else.
def _answers(
    again: Replay, number: int, looked: Sequence[str], within: OperationRun, names: show.Names,
) -> Iterator[tuple[int, str]]:
    told: dict[int, list[str]] = {}
    for name in looked:
        for earlier in range(number - 1, 0, -1):
            changed = [(old, new) for field, old, new in
                       st.changes(_before(again, earlier), again.steps[earlier - 1].shared) if field == name]
            if changed:
                if earlier not in within.steps:
                    (old, new), = changed
                    told.setdefault(earlier, []).append(
                        f"{_named([name])} {show.value(name, old, names)} -> {show.value(name, new, names)}")
                break
    for earlier, changes in told.items():
        yield earlier, f"decides what step {number} is told: {', '.join(changes)}"


def _named(fields: Sequence[str]) -> str:
    words = [f"{show.record(name)} {show.label(name)}".strip() for name in fields]
    return ", ".join(words[:4]) + (" and more" if len(words) > 4 else "")

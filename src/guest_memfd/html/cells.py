"""The states of a run as small tables: which cells there are, what is in each at first, and what every step puts there.

References are told with who holds them: of the parties that have taken one of a kind, those that have not dropped theirs.

A column is a frame, a page of the file, or a guest frame; a row is a field under the name that reports give it. A cell is
called as its field (``pfn0.owner``), but for the kinds of references, which share one (``pfn0.refs``). Where there are
large folios, each frame has rows for the folio and the leaves that it is part of (``pfn0.folio``, ``pfn0.s1_leaf``): the
frames from the first to the last, so that columns with the same words belong together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from guest_memfd.abstract import show
from guest_memfd.abstract import state as st
from guest_memfd.explore.engine.finding import Step

_REFS = {
    "cache": "page cache", "lru": "lru_add batch", "lookup": "lookup", "provided": "driver, for the guest",
    "pin": "FOLL_PIN", "get": "GUP without FOLL_PIN", "spec": "GUP-fast, not sure yet", "kept": "for good",
}
_READERS = ("invalidate_r", "bindings_r", "mmu_r", "srcu")
_HELD_BY_PARTIES = frozenset({"lookup", "pin", "get", "spec", *_READERS})
_ALWAYS = {
    "pfn": ("allocated", "slot", "folio", "owner", "s1", "s1_leaf", "stale", "s2", "s2_leaf", "gmap", "guest_leaf", "user",
            "refs", "lock", "content", "uptodate"),
    "page": ("cached", "binding"), "gfn": ("provided",),
}
_LARGE = {"folio": "folio", "s1_leaf": "direct-map leaf", "s2_leaf": "host stage-2 leaf", "guest_leaf": "guest stage-2 leaf"}
_TITLES = {"pfn": "frames", "page": "pages of the file", "gfn": "guest frames"}
_UNSEEN = ("given",)


class Cell(NamedTuple):
    """One cell: its name, what is in it after the last step, whether it is to blame there."""

    name: str
    text: str
    blamed: bool


class Line(NamedTuple):
    """A row of a table: a field, what it means in a sentence, and its cells."""

    label: str
    means: str
    cells: list[Cell]


class StateTable(NamedTuple):
    """A table with its title and the names of its columns; without columns it is a list."""

    title: str
    heads: list[str]
    lines: list[Line]


class States(NamedTuple):
    """All states of a run: tables as they are at the end, what the cells hold at first, what each step puts where."""

    tables: list[StateTable]
    first: dict[str, str]
    changes: list[dict[str, str]]
    blamed: list[str]


def states(initial: bytes, steps: Sequence[Step], names: show.Names, blamed: Iterable[str]) -> States:
    """The states from *initial* on through *steps*; *names*: party number -> name; *blamed*: fields of the last state."""
    fields = st.fields_of(initial)
    # A field that is to blame may have been 0 all along: it is shown, though nothing ever happened to it.
    ever = {field for field, number in fields.items() if number} | set(blamed)
    first = {cell: _text(cell, fields, names, Holders()) for cell in dict.fromkeys(map(_cell, fields))}
    held, changes, holders = dict(first), list[dict[str, str]](), Holders()
    before = initial
    for step in steps:
        changed = st.changes(before, step.shared)
        fields.update((field, new) for field, _, new in changed)
        holders.take(step.party, changed)
        ever.update(field for field, _, _ in changed)
        touched = dict.fromkeys(cell for field, _, _ in changed for cell in (_cell(field), *_beside(field, first))
                                if _seen(cell))
        changes.append({cell: text for cell in touched if (text := _text(cell, fields, names, holders)) != held.get(cell)})
        held.update(changes[-1])
        before = step.shared
    wrong = {_cell(field) for field in blamed}
    tables = list(_tables(st.layout_of(initial).counts, {_cell(field) for field in ever}, held, wrong))
    there = {cell.name for table in tables for line in table.lines for cell in line.cells}
    return States(tables, {cell: text for cell, text in first.items() if cell in there},
                  [{cell: text for cell, text in change.items() if cell in there} for change in changes],
                  sorted(wrong & there))


def _cell(field: str) -> str:
    record, _, name = field.rpartition(".")
    if record.startswith("folio"):
        return f"pfn{record.removeprefix('folio')}.{name if name in _LARGE else 'folio'}"
    return f"{record}.refs" if record.startswith("pfn") and name in _REFS else field


# Cells that may say something else as well when *field* has changed: a folio is told of each of its frames.
def _beside(field: str, cells: Iterable[str]) -> Iterator[str]:
    record, _, name = field.rpartition(".")
    if record.startswith("folio"):
        yield from (cell for cell in cells if cell.endswith(".folio"))
    elif name == "gmap":
        yield from (cell for cell in (f"{record}.guest_leaf",) if cell in cells)


def _seen(cell: str) -> bool:
    return not show.ghost(cell) and cell not in _UNSEEN


class Holders:
    """Who holds the references, and the shared locks, that parties take."""

    def __init__(self) -> None:
        self._parties: dict[str, list[str]] = {}

    def take(self, party: str, changed: Iterable[tuple[str, int, int]]) -> None:
        """What *party* has *changed*: (field, old, new); its own references go first, then those that were taken first."""
        for field, old, new in changed:
            if field.startswith(("pfn", "file")) and field.rpartition(".")[2] in _HELD_BY_PARTIES:
                there = self._parties.setdefault(field, [])
                there += [party] * (new - old)
                for _ in range(min(old - new, len(there))):
                    # Dropped by another party than took it: the oldest is taken to be the one.
                    there.remove(party if party in there else there[0])

    def of(self, field: str) -> str:
        """`` by device`` for ``pfn0.pin``; empty where no party has taken any."""
        there = dict.fromkeys(self._parties.get(field, ()))
        return f" by {' and '.join(there)}" if there else ""


def _text(cell: str, fields: dict[str, int], names: show.Names, holders: Holders) -> str:
    record, _, name = cell.rpartition(".")
    if name in _LARGE:
        return _part_of(int(record.removeprefix("pfn")), name, fields)
    if name == "refs":
        held = [f"{number} {words}{holders.of(f'{record}.{kind}')}" for kind, words in _REFS.items()
                if (number := fields[f"{record}.{kind}"])]
        return ", ".join(held) or "none"
    return show.value(cell, fields[cell], names) + (holders.of(cell) if name in _READERS else "")


# The frames of the folio, or of the leaf, that frame *pfn* is part of.
def _part_of(pfn: int, name: str, fields: dict[str, int]) -> str:
    if name == "folio":
        first = pfn - fields[f"folio{pfn}.tail"]
        order = fields[f"folio{first}.order"]
    elif name == "guest_leaf" and not fields[f"pfn{pfn}.gmap"]:
        return "none"
    else:
        order = fields[f"folio{pfn}.{name}"]
        first = pfn >> order << order
    return f"pfn{first}-{first + (1 << order) - 1}" if order else "single"


def _tables(counts: dict[str, int], ever: set[str], last: dict[str, str], wrong: set[str]) -> Iterator[StateTable]:
    for kind, title in _TITLES.items():
        heads = [f"{kind}{number}" for number in range(counts[kind])]
        more = [_cell(f"{kind}0.{name}").partition(".")[2] for name in st.RECORDS[kind]]
        there = [name for name in dict.fromkeys((*_ALWAYS[kind], *more)) if counts.get("folio") or name not in _LARGE]
        lines = [
            Line(_label(kind, name), _means(kind, name),
                 [Cell(cell := f"{head}.{name}", last[cell], cell in wrong) for head in heads])
            for name in there if name in _ALWAYS[kind] or any(f"{head}.{name}" in ever for head in heads)
        ]
        if kind != "gfn" or any(cell.name in ever for line in lines for cell in line.cells):
            yield StateTable(title, heads, lines)
    around = [cell for cell in last if _seen(cell) and cell in ever and not cell.startswith(tuple(_TITLES))]
    yield StateTable("around them", [], [
        Line(f"{show.record(cell)} {show.label(cell)}".strip(), _means(*_kind_of(cell)),
             [Cell(cell, last[cell], cell in wrong)]) for cell in around])


def _kind_of(cell: str) -> tuple[str, str]:
    record, _, name = cell.rpartition(".")
    return record.rstrip("0123456789"), name


def _label(kind: str, name: str) -> str:
    return (_LARGE | {"refs": "references", "allocated": "allocator"}).get(name) or show.label(f"{kind}0.{name}")


def _means(kind: str, name: str) -> str:
    if name == "refs":
        return "references on the folio, by kind"
    if name in _LARGE:
        return st.RECORDS["folio"].get(name, "the frames of the folio that this one is part of")
    return st.RECORDS[kind][name] if kind else st.GLOBALS[name]

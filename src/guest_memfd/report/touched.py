"""What a step touches: the frames, pages of files and guest frames that it changes, names, or leaves a note of."""

from __future__ import annotations

from collections.abc import Iterator

from guest_memfd.abstract import state as st
from guest_memfd.explore.engine.finding import Step
from guest_memfd.report.steps import parameters
from guest_memfd.words.primitives import Entries, Folio, Host, Lookup, Primitive
from guest_memfd.words.units import Pfn

MOST = 100
"""Frames of one folio, or pages of one range, that are named."""


def touched(step: Step, before: bytes) -> tuple[str, ...]:
    """``page0``, ``pfn1``: what *step*, taken in *before*, is about; with a frame the page of the file that it holds."""
    sizes = st.layout_of(before).sizes
    there = {*named(step, sizes)}
    there.update(record.replace("folio", "pfn") for name, _, _ in st.changes(before, step.shared)
                 if (record := name.rpartition(".")[0]).startswith(("pfn", "folio", "page", "gfn")))
    there.update(f"pfn{note.pfn}" for note in step.notes if getattr(note, "pfn", None) is not None)
    frames = [number for number in range(sizes.frames) if f"pfn{number}" in there]
    # Both: a page that is taken out of the file is in no frame afterwards, and one that is put in was in none before.
    for state in (st.State(before), st.State(step.shared)):
        there |= {f"page{slot - 1}" for number in frames if (slot := state.frame(Pfn(number)).slot)}
    return tuple(sorted(there, key=in_order))


def named(step: Step, sizes: st.Sizes) -> Iterator[str]:
    """What the arguments and the result of *step* name; pages count on from file to file, guest frames from VM to VM."""
    primitive = step.primitive
    if primitive is None:
        return
    for value in (*primitive.args, step.result):
        folio = value.folio if isinstance(value, Lookup) else value
        if isinstance(folio, Folio):
            yield from (f"pfn{folio.pfn + at}" for at in range(min(folio.nr, MOST)))
    first = {"page": primitive.file * sizes.pages, "pfn": 0, "gfn": primitive.file * sizes.gfns}
    for kind, start, nr in _numbered(primitive):
        yield from (f"{kind}{first[kind] + start + at}" for at in range(min(nr, MOST)))


# Kind, first and number of what integers name. The only tree that goes by guest frames is v17's.
def _numbered(primitive: Primitive) -> Iterator[tuple[str, int, int]]:
    given = dict(zip(parameters(primitive.name), primitive.args, strict=False)) if hasattr(Host, primitive.name) else {}
    kinds = {"index": "page", "pfn": "pfn", "gfn": "gfn", "start": "gfn" if given.get("tree") == "provided" else "page"}
    # Of a trace that could not be followed the arguments may be anything.
    values = given.get("values")
    length = values.nr if isinstance(values, Entries) else len(values) if isinstance(values, tuple) else given.get("nr", 1)
    for name, kind in kinds.items():
        number, nr = given.get(name), length if name == "start" else 1
        if type(number) is int and number >= 0 and type(nr) is int:
            yield kind, number, nr


def in_order(name: str) -> tuple[str, int]:
    """What to sort ``page0``, ``pfn1`` by."""
    kind = name.rstrip("0123456789")
    return kind, int(name[len(kind):])

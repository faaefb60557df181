"""The numbers of a scene with large folios on the machine, where a page of it is half a block: 256 times as large.

A page index, a gfn, a number of pages is multiplied on the way to the machine, and divided on the way back. What is said
there of each of 256 pages is said of one here; what is said of some of them is said of page `ASTRAY`, which no scene has.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

from guest_memfd.lockstep.abstraction import ASTRAY
from guest_memfd.words import facts
from guest_memfd.words.primitives import Entries, Primitive
from guest_memfd.words.units import Index, Pfn

HALF = 8
SHARE = 1 << HALF
"""Pages of the machine that are one of the scene."""

SCALED = {
    "begin_op": (1, 2, 3), "end_op": (1,), "op_returned": (1, 2, 4, 5), "tree_load": (1, 2), "tree_store": (1,),
    "tree_store_reserved": (1,), "tree_reserve": (1, 2), "filemap_find_folio": (0, 1), "unmap_mapping_pages": (0, 1),
    "vma_covers": (0, 1), "gmem_invalidate_begin": (0, 1), "mmu_invalidate_retry": (1,), "pm_account": (0,),
    "merge_folio": (0,),
}
"""Primitives about ranges and numbers of pages, and which of their arguments are page indexes, gfns, or such numbers."""


def scaled(primitive: Primitive) -> Primitive:
    """*primitive*, one of `SCALED`, as the machine is asked for it."""
    args = [_scaled(arg) if at in SCALED[primitive.name] or isinstance(arg, Entries) else arg
            for at, arg in enumerate(primitive.args)]
    if primitive.name == "merge_folio":
        args[1] += HALF
    return primitive._replace(args=tuple(args))


# Entries go on from page to page, or are the same of all.
def _scaled(value: Any) -> Any:
    if isinstance(value, Entries):
        first = (value.first - 1) * SHARE + 1 if value.step else value.first
        return Entries(first, len(value) * SHARE, value.step)
    return None if value is None else value * SHARE


def entries(values: Sequence[int]) -> tuple[int, ...]:
    """Entries of a tree of the machine: one for each page of the scene."""
    return tuple(_entry(values[at:at + SHARE]) for at in range(0, len(values), SHARE))


def _entry(values: Sequence[int]) -> int:
    if values.count(values[0]) == SHARE:
        return values[0]
    first, rest = divmod(values[0] - 1, SHARE)
    return first + 1 if not rest and list(values) == [*range(values[0], values[0] + SHARE)] else ASTRAY


def told(note: facts.Note, base: Pfn) -> facts.Note:
    """A fact of the machine, whose first block begins at *base*, in the scene's numbers."""
    if isinstance(note, facts.Ended):
        return note._replace(
            error_index=_down(note.error_index), scope=_whole(note.scope), toggled=_whole(note.toggled),
            removed=_whole(note.removed), left=_whole(note.left), attrs=entries(note.attrs), bound=entries(note.bound),
            batched=_whole(note.batched), mapped=_whole(note.mapped),
            places=tuple(sorted({Index(at // SHARE) for at in note.places})), gfn=_down(note.gfn),
            around=note.around // SHARE)
    if isinstance(note, facts.Returned):
        return note._replace(
            start=_down(note.start), nr=-(-note.nr // SHARE), error_index=_down(note.error_index), size=_down(note.size),
            how=_how(note.how), gfn=_down(note.gfn))
    if isinstance(note, facts.OutOfScope | facts.Unannounced | facts.Rebound):
        return note._replace(pgoff=_down(note.pgoff))
    if isinstance(note, facts.Access):
        note = note._replace(pgoff=_down(note.pgoff))
    # One of the others, of a batch that has been drained: what is said of it is what is said of the first.
    pfn = getattr(note, "pfn", None)
    return note if pfn is None or pfn < base else note._replace(pfn=Pfn((pfn - base) // SHARE))      # type: ignore[call-arg]


def _how(how: facts.HowEnded | None) -> facts.HowEnded | None:
    if how is None:
        return None
    about = range(how.about.start // SHARE, how.about.stop // SHARE)
    return how._replace(about=about, at=_down(how.at), gfn=_down(how.gfn))


# A number of the scene; what is about the middle of a page of it is about the page.
def _down(number: Any) -> Any:
    return None if number is None else number // SHARE


# The pages of the scene of which all are among *indexes*; ASTRAY stands for one of which some are.
def _whole(indexes: Collection[Index]) -> tuple[Any, ...]:
    found = Counter(index // SHARE for index in indexes)
    return tuple(page if number == SHARE else ASTRAY for page, number in sorted(found.items()))

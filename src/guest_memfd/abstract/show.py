"""The abstract host's state in words: every number of `state` under the name that a kernel developer gives it.

It only reads. A field it does not know is shown as it is stored, so a new one can never hide.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from types import MappingProxyType

from guest_memfd.abstract import state as st
from guest_memfd.words.pagestate import ANY, CONTENTS, INODE_STATES, OWNERS, SLOT_INVALID, VM_STATES

Names = Mapping[int, str]
"""Party number -> name, for lock holders."""

NOBODY: Names = MappingProxyType({})

LABELS = {
    "s1": "direct map", "s2": "host stage 2", "stale": "stale TLB entry", "gmap": "guest maps it at",
    "gstale": "stale guest TLB entry", "locked_in": "guest holds on", "user": "VMM maps it", "slot": "in the file",
    "cache": "page-cache ref", "lru": "lru_add ref", "lookup": "lookup ref", "provided": "driver's ref",
    "pin": "FOLL_PIN ref", "get": "GUP ref", "spec": "GUP-fast ref",
    "cached": "page cache", "attr": "attribute", "binding": "bound to", "gpoison": "guest entry poisoned",
    "expect": "reader expects", "lock": "folio lock", "no_direct_map": "marked no-direct-map", "poison": "hwpoison",
    "vma": "VMAs", "vm": "VM", "inodes": "inode refs", "files": "file refs", "module": "module refs",
    "unloaded": "module unloaded", "progress": "mmu_invalidate_in_progress",
    "gpc": "pfn cache", "gpc_fresh": "pfn cache fresh", "gpc_readers": "pfn cache in use", "away": "pages counted away",
    "preparing": "hibernation announced", "frozen": "tasks frozen", "reserved": "nodes preallocated",
    "failures": "failures to inject", "panic": "kernel stopped", "of": "of VM", "kept": "kept permanently",
    "handled": "memory failure handled", "stuck": "refused for good", "asked": "the guest asked for it",
    "withdrawn": "consent withdrawn", "order": "folio of order", "tail": "frames into its folio",
    "s1_leaf": "direct-map leaf of order", "s2_leaf": "host stage-2 leaf of order", "guest_leaf": "guest leaf of order",
    "inode": "inode", "evictor": "evicted by", "refuses_readers": "AS_NO_DIRECT_MAP", "released": "ops released",
    "refusals": "refusals for good left",
    "leaked": "pages counted as leaked",
    "invalidate_w": "invalidate_lock writer", "invalidate_r": "invalidate_lock readers",
    "invalidate_q": "invalidate_lock queue", "bindings_w": "bindings_lock writer",
    "bindings_r": "bindings_lock readers", "bindings_q": "bindings_lock queue",
    "slots_lock": "slots_lock", "mmu_w": "mmu_lock writer", "mmu_r": "mmu_lock readers", "mmu_q": "mmu_lock queue",
    "srcu": "srcu readers", "seq": "mmu_invalidate_seq moved on", "sampled": "mmu_invalidate_seq sampled",
    "range": "mmu_invalidate_range",
    "gmem_file": "memslot has the file",
}
"""Field -> what it is called in reports; a field that is not here goes by its own name."""

_ENUMS: dict[str, tuple[str, ...]] = {
    "allocated": ("free", "allocated", "kept"), "owner": OWNERS, "content": CONTENTS, "vm": VM_STATES,
    "s1": ("zapped", "mapped"), "s2": ("withheld", "mapped"), "attr": ("none", "shared", "private"),
    "fd": ("closed", "open"), "inode": INODE_STATES,
}
_FLAGS = frozenset({
    "stale", "locked_in", "uptodate", "no_direct_map", "poison", "gpoison", "unloaded", "gpc_fresh", "gpc_readers",
    "preparing", "frozen", "panic", "handled", "stuck", "asked", "withdrawn", "refuses_readers", "released", "gmem_file",
    "sampled",
})
HOLDERS = frozenset({"lock", "invalidate_w", "invalidate_q", "bindings_w", "bindings_q", "slots_lock", "mmu_w", "mmu_q",
                     "evictor"})
"""Fields that hold a party number + 1, 0 for no one."""

_PLUS_ONE = {"gmap": "gfn", "gstale": "gfn", "binding": "gfn", "slot": "page ", "user": "page ", "cached": "pfn",
             "gpc": "pfn"}


def value(field: str, number: int, names: Names = NOBODY) -> str:
    """The *number* stored in *field* (``pfn0.owner`` or ``owner``) in words."""
    name = field.rpartition(".")[2]
    if name == "provided" and field.startswith("gfn"):
        return f"pfn{(number - 1) // 2} {'lent' if (number - 1) % 2 else 'shared'}" if number else "none"
    if name == "memslot":
        of = f"page {(number >> 1) - 1}{', INVALID' if number & SLOT_INVALID else ''}"
        return of if number else "none"
    if name == "range":
        return ", ".join(f"gfn{gfn}" for gfn in range(number.bit_length()) if number >> gfn & 1) or "none"
    if name == "expect":
        return "anything" if number == ANY else _pick(CONTENTS, number)
    if name in _ENUMS:
        return _pick(_ENUMS[name], number)
    if name in _FLAGS:
        return _pick(("no", "yes", "by the allocator"), number)
    if name in HOLDERS:
        return names.get(number - 1, f"party {number - 1}") if number else "free"
    if name in _PLUS_ONE:
        return f"{_PLUS_ONE[name]}{number - 1}" if number else "none"
    return str(number)


def _pick(words: tuple[str, ...], number: int) -> str:
    return words[number] if number < len(words) else str(number)


def label(field: str) -> str:
    """``direct map`` for ``pfn0.s1``: what a field is called in reports."""
    name = field.rpartition(".")[2]
    if name == "provided" and field.startswith("gfn"):
        return "given to the guest"
    return LABELS.get(name, name)


fields_of = st.fields_of
_FIRST = ("file0", "vm0", "")
"""Records that go without a name: where there is one file and one VM, no one asks which."""


def record(field: str) -> str:
    """``pfn0`` for ``pfn0.owner``; empty for what is around the pages, if it is of the first file or VM."""
    name = field.rpartition(".")[0]
    return "" if name in _FIRST else name


def ghost(field: str) -> bool:
    """Whether *field* is there for the laws only and nothing of the machine."""
    return field.startswith("party")


def changed(before: bytes, after: bytes, names: Names = NOBODY) -> list[str]:
    """``pfn0: owner host -> guest, host stage 2 mapped -> withheld``: one string per thing that changed, no ghosts."""
    things: dict[str, list[str]] = {}
    for field, old, new in st.changes(before, after):
        if not ghost(field):
            thing = record(field).replace("folio", "pfn")   # what is said of a frame's folio and leaves is said of the frame
            words = f"{label(field)} {value(field, old, names)} -> {value(field, new, names)}"
            things.setdefault(thing, []).append(words)
    return [f"{thing}: {', '.join(words)}" if thing else ", ".join(words) for thing, words in things.items()]


def overview(state: bytes) -> list[str]:
    """Three lines on a state in which nothing has happened yet: pages, frames, and what is around them."""
    fields = fields_of(state)
    counts = st.layout_of(state).counts
    pages = _alike("page", counts["page"], lambda n: _page_in_short(fields, n))
    frames = _alike("pfn", counts["pfn"], lambda n: frame(fields, n))
    around = [_around(f, fields[f]) for f in fields if _is_around(f) and fields[f]]
    return [f"pages   {'; '.join(pages)}", f"frames  {'; '.join(frames)}", f"around  {', '.join(around)}"]


def _is_around(field: str) -> bool:
    return field != "given" and ("." not in field or field.startswith(("file", "vm")))


# ``file refs 2``, and ``file1: file refs 2`` where it is not the first.
def _around(field: str, number: int, names: Names = NOBODY) -> str:
    which = record(field)
    return f"{which + ': ' if which else ''}{label(field)} {value(field, number, names)}"


def _page_in_short(fields: Mapping[str, int], index: int) -> str:
    attr, binding, cached = (value(name, fields[f"page{index}.{name}"]) for name in ("attr", "binding", "cached"))
    said = [] if attr == "none" else [attr]
    said += ["unbound" if binding == "none" else f"bound to {binding}", "not allocated" if cached == "none" else cached]
    return ", ".join(said)


# ``pfn0-pfn2 free, ...`` when all are alike.
def _alike(thing: str, count: int, describe: Callable[[int], str]) -> list[str]:
    described = [describe(n) for n in range(count)]
    if len(set(described)) == 1 and count > 1:
        return [f"{thing}0-{thing}{count - 1} {described[0]}"]
    return [f"{thing}{n} {words}" for n, words in enumerate(described)]


Mark = Callable[[str], str]
"""Goes round the words of a field that is to be marked."""


def _plain(words: str) -> str:
    return words


def frame(
    fields: Mapping[str, int], pfn: int, marked: Collection[str] = (), mark: Mark = _plain, names: Names = NOBODY
) -> str:
    """One line on frame *pfn*: what it is, and everything about it that is not zero."""
    always = ("allocated", "owner", "s1", "s2", "content")
    told = [f for name in st.FRAME_FIELDS if fields[f := f"pfn{pfn}.{name}"] or f in marked or name in always]
    told += [f for name in st.FOLIO_FIELDS if fields.get(f := f"folio{pfn}.{name}") or f in marked]
    return _listed(told, fields, marked, mark, names)


def page(fields: Mapping[str, int], index: int, marked: Collection[str] = (), mark: Mark = _plain) -> str:
    """One line on page *index* of the file, as `frame`."""
    told = [f for name in st.PAGE_FIELDS if fields[f := f"page{index}.{name}"] or f in marked or name == "cached"]
    return _listed(told, fields, marked, mark, NOBODY)


def gfn(fields: Mapping[str, int], number: int, marked: Collection[str] = (), mark: Mark = _plain) -> str:
    """One line on guest frame *number*, as `frame`."""
    return _listed([f for name in st.GFN_FIELDS if fields[f := f"gfn{number}.{name}"] or f in marked], fields, marked, mark,
                   NOBODY)


def around(
    fields: Mapping[str, int], usual: Mapping[str, int], marked: Collection[str] = (), mark: Mark = _plain,
    names: Names = NOBODY,
) -> str:
    """One line on everything else that is not as *usual*, as `frame`."""
    told = [f for f in fields if _is_around(f) and (fields[f] != usual[f] or f in marked)]
    return ", ".join(mark(words) if field in marked else words
                     for field in told for words in [_around(field, fields[field], names)])


def _listed(
    told: Iterable[str], fields: Mapping[str, int], marked: Collection[str], mark: Mark, names: Names
) -> str:
    words = []
    for field in told:
        said = value(field, fields[field], names)
        if not field.endswith(".allocated"):
            said = f"{label(field)} {said}"
        words.append(mark(said) if field in marked else said)
    return ", ".join(words)

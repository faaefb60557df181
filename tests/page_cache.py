"""A page cache of the tests' own, a few lines, and an operations table that notes what it is asked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from guest_memfd.core.ops import Reason
from guest_memfd.designs.ours import OurLibrary
from guest_memfd.hypervisors.kvm.default import KvmOps
from guest_memfd.words.pagestate import PRIVATE_PAGE
from guest_memfd.words.primitives import Folio, Locked, Lookup, Primitive, Steps


class Splitting(OurLibrary):
    """Folios of two pages, single pages where those are not to be had."""

    order, splits = 1, True


class Whole(OurLibrary):
    """Folios of two pages or none."""

    order = 1


class Four(OurLibrary):
    """Folios of four pages, single pages where those are not to be had."""

    order, splits = 2, True


class Single(OurLibrary):
    """It could split, and has nothing to."""

    splits = True


class Mapped(OurLibrary):
    """Private pages stay in the direct map."""

    no_direct_map = False


@dataclass
class PageCache:
    """Folios by the page index of their head; what the trees say; references; what fails, by primitive."""

    folios: dict[int, Folio] = field(default_factory=dict)
    attributes: dict[int, int] = field(default_factory=dict)
    bound: dict[int, int] = field(default_factory=dict)
    refs: dict[Folio, int] = field(default_factory=dict)
    batched: set[Folio] = field(default_factory=set)
    private: set[Folio] = field(default_factory=set)
    fails: dict[str, list[Any]] = field(default_factory=dict)
    taken: int = 0

    def heads(self, index: int) -> Iterator[int]:
        yield from (head for head, folio in self.folios.items() if head <= index < head + folio.nr)

    def __call__(self, primitive: Primitive) -> Any:
        args = primitive.args
        if self.fails.get(primitive.name):
            return self.fails[primitive.name].pop(0)
        return getattr(self, f"_{primitive.name}", lambda *_args: 0)(*args)

    def _tree_load(self, tree: str, start: int, nr: int) -> tuple[int, ...]:
        entries, hole = (self.attributes, PRIVATE_PAGE) if tree == "attributes" else (self.bound, 0)
        return tuple(entries.get(index, hole) for index in range(start, start + nr))

    def _filemap_get_folio(self, index: int) -> Lookup | None:
        hit = next((Lookup(self.folios[head], head) for head in self.heads(index)), None)
        self.taken += hit is not None
        return hit

    def _folio_put(self, folio: Folio, kind: str) -> None:
        self.taken -= 1

    def _filemap_find_folio(self, index: int, nr: int) -> int:
        return min((head for head in self.folios if index <= head < index + nr), default=index + nr)

    def _filemap_add_folio(self, index: int, order: int) -> Lookup:
        head = index >> order << order
        self.folios[head] = Folio(100 + head, order)
        return Lookup(self.folios[head], head)

    def _lock_folio(self, folio: Folio) -> Locked:
        head = next((head for head, known in self.folios.items() if known == folio), None)
        return Locked(head, True, folio in self.private, False)

    def _folio_ref_count(self, folio: Folio) -> int:
        return self.refs.get(folio, folio.nr + 1) + (folio in self.batched)

    def _lru_add_drain_all(self) -> None:
        self.batched.clear()

    def _split_folio(self, folio: Folio) -> int:
        head = next(self.heads(next(h for h, f in self.folios.items() if f == folio)))
        del self.folios[head]
        self.folios |= {head + at: Folio(folio.pfn + at) for at in range(folio.nr)}
        return 0


def library(size: int = 64, design: type[OurLibrary] = OurLibrary) -> OurLibrary:
    return design(KvmOps(), size)


def balanced(cache: PageCache, done: list[str]) -> None:
    assert cache.taken == 0
    pfns = [step.partition("(")[2].rstrip(")").partition(",")[0].partition("/")[0] for step in done]
    for pfn in {pfn for pfn in pfns if pfn.startswith("pfn")}:
        mine = [step.partition("(")[0] for step, about in zip(done, pfns, strict=True) if about == pfn]
        assert mine.count("lock_folio") == mine.count("unlock_folio"), pfn


def alive(cache: PageCache) -> Any:
    return lambda primitive: primitive.name in ("igrab", "get_file") or cache(primitive)


class Recorded(KvmOps):
    """Says what it is asked, and answers as it is told."""

    def __init__(self, *answers: int) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.answers = list(answers)

    def _asked(self, call: str) -> Steps[int]:
        yield from ()
        self.calls.append(call)
        return self.answers.pop(0) if self.answers else 0

    def invalidate(self, gfn: int, folio: Folio, private: bool, reason: Reason) -> Steps[int]:
        return self._asked(f"invalidate {gfn} {reason}")

    def reclaim(self, gfn: int, folio: Folio) -> Steps[int]:
        return self._asked(f"reclaim {gfn}")

    def make_shared(self, gfn: int, folio: Folio) -> Steps[int]:
        return self._asked(f"make_shared {gfn}")

    def make_private(self, gfn: int, folio: Folio) -> Steps[None]:
        yield from self._asked(f"make_private {gfn}")

    def release(self) -> Steps[None]:
        yield from self._asked("release")


def two(attribute: int) -> PageCache:
    """Pages 2 and 3, bound to gfns 6 and 7."""
    return PageCache({2: Folio(2), 3: Folio(3)}, {2: attribute, 3: attribute}, {2: 7, 3: 8})

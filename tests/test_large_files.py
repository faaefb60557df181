"""Files of 2^28 pages and folios of every order: what the library costs there, and which gfn a folio has.

The host here is a sparse one: trees as runs, the page cache as a dictionary, everything else agrees at once.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from errno import EINVAL
from typing import Any, overload

import pytest

from guest_memfd.core.gmem import Conversion
from guest_memfd.core.library import Library
from guest_memfd.core.ops import GuestMemfdOps, Reason
from guest_memfd.words.primitives import Entries, Folio, Locked, Lookup, Primitive, Steps

TIB = 1 << 28
"""Pages."""


class Runs(Sequence[int]):
    """Entries of a tree by the runs that cover them; going through more than one is an error."""

    def __init__(self, parts: list[Entries]) -> None:
        self.parts = parts
        self.starts = [sum(len(part) for part in parts[:at]) for at in range(len(parts))]

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    @overload
    def __getitem__(self, at: int) -> int: ...
    @overload
    def __getitem__(self, at: slice) -> Runs: ...
    def __getitem__(self, at: int | slice) -> int | Runs:
        if isinstance(at, slice):
            first, last, _ = at.indices(len(self))
            return Runs([cut(part, first - start, last - start)
                         for start, part in zip(self.starts, self.parts, strict=True)])
        which = bisect_right(self.starts, at) - 1
        return self.parts[which][at - self.starts[which]]

    def __iter__(self) -> Iterator[int]:
        assert len(self) == 1, "somebody goes through all pages"
        yield self[0]

    def count(self, value: int) -> int:
        return sum(len(part) for part in self.parts if not part.step and part.first == value)


def cut(part: Entries, first: int, last: int) -> Entries:
    first, last = max(first, 0), min(last, len(part))
    return Entries(part.first + first * part.step, max(last - first, 0), part.step)


class SparseHost:
    """What the library asks for, answered; `asked` counts primitives, `told` has what the hypervisor was told."""

    def __init__(self) -> None:
        self.trees: dict[str, list[Entries]] = {}
        self.cache: dict[int, Folio] = {}
        self.files, self.inodes, self.next_pfn, self.order = 1, 1, 0, 0
        self.asked: Counter[str] = Counter()

    def do(self, procedure: Steps[Any]) -> Any:
        answer: Any = None
        while True:
            try:
                primitive = procedure.send(answer)
            except StopIteration as stop:
                return stop.value
            answer = self.answer(primitive)

    def answer(self, primitive: Primitive) -> Any:
        self.asked[primitive.name] += 1
        known: Callable[..., Any] | None = getattr(self, primitive.name, None)
        return known(*primitive.args) if known else 0

    def tree(self, name: str, size: int = TIB) -> Runs:
        return Runs(self.trees.setdefault(name, [Entries(0, size)]))

    def tree_load(self, name: str, start: int, nr: int) -> Runs:
        return self.tree(name)[start:start + nr]

    def tree_store(self, name: str, start: int, values: Entries) -> int:
        there = self.tree(name)
        parts = [*there[:start].parts, values, *there[start + len(values):].parts]
        self.trees[name] = [part for part in parts if len(part)]
        return 0

    tree_store_reserved = tree_store

    def filemap_get_folio(self, index: int) -> Lookup | None:
        head = index >> self.order << self.order
        return Lookup(self.cache[head], head) if head in self.cache else None

    def filemap_find_folio(self, index: int, nr: int) -> int:
        return min((at for at in self.cache if index <= at < index + nr), default=index + nr)

    def filemap_add_folio(self, index: int, order: int) -> Lookup:
        self.order, head = order, index >> order << order
        self.cache[head] = Folio(self.next_pfn, order)
        self.next_pfn += 1 << order
        return Lookup(self.cache[head], head)

    def lock_folio(self, folio: Folio) -> Locked:
        return Locked(next(head for head, there in self.cache.items() if there == folio), True, False, False)

    def filemap_remove_folio(self, folio: Folio) -> None:
        del self.cache[next(head for head, there in self.cache.items() if there == folio)]

    def folio_ref_count(self, folio: Folio) -> int:
        return folio.nr + 1

    def can_set_direct_map(self) -> bool:
        return True

    def try_module_get(self) -> bool:
        return True

    def get_file(self) -> bool:
        self.files += 1
        return True

    def fput(self) -> bool:
        self.files -= 1
        return not self.files

    def igrab(self) -> bool:
        self.inodes += 1
        return True

    def iput(self) -> bool:
        self.inodes -= 1
        return not self.inodes

    def vm_state(self) -> str:
        return "running"

    def down_read_trylock(self, sem: str) -> bool:
        return True


class Notes(GuestMemfdOps):
    """Notes what it is told, and agrees."""

    module = "notes"

    def __init__(self) -> None:
        super().__init__()
        self.told: list[tuple[str, int, Folio]] = []

    def note(self, what: str, gfn: int, folio: Folio) -> Steps[int]:
        self.told.append((what, gfn, folio))
        yield from ()
        return 0

    def prepare_private(self, gfn: int, folio: Folio) -> Steps[int]:
        return self.note("prepare_private", gfn, folio)

    def prepare_shared(self, gfn: int, folio: Folio) -> Steps[int]:
        return self.note("prepare_shared", gfn, folio)

    def invalidate(self, gfn: int, folio: Folio, private: bool, reason: Reason) -> Steps[int]:
        return self.note(f"invalidate {reason}", gfn, folio)

    def make_shared(self, gfn: int, folio: Folio) -> Steps[int]:
        return self.note("make_shared", gfn, folio)

    def make_private(self, gfn: int, folio: Folio) -> Steps[None]:
        yield from self.note("make_private", gfn, folio)

    def reclaim(self, gfn: int, folio: Folio) -> Steps[int]:
        return self.note("reclaim", gfn, folio)

    def release(self) -> Steps[None]:
        yield from ()


class Bench:
    """A file of one TiB in folios of *order*, its last half bound at *gfn*."""

    HALF = TIB // 2

    def __init__(self, order: int, gfn: int = TIB) -> None:
        self.host, self.ops, self.gfn = SparseHost(), Notes(), gfn
        self.library = type("Large", (Library,), {"order": order})(self.ops, TIB)
        assert self.do(lambda lib: lib.create(TIB)) == 0
        assert self.do(lambda lib: lib.bind(gfn, self.HALF, self.HALF)) == 0

    def do(self, procedure: Callable[[Library], Steps[Any]]) -> Any:
        return self.host.do(procedure(self.library))


def test_a_tebibyte_costs_what_its_folios_cost() -> None:
    bench = Bench(18)
    folios = TIB >> 18
    assert bench.do(lambda lib: lib.allocate(0, TIB)) == 0
    assert bench.do(lambda lib: lib.make_shared(0, TIB)) == Conversion(0)
    assert bench.do(lambda lib: lib.make_private(0, TIB)) == Conversion(0)
    assert bench.do(lambda lib: lib.make_private(0, TIB)) == Conversion(0)
    assert bench.do(lambda lib: lib.vm_teardown()) == 0
    bench.do(lambda lib: lib.close())
    assert bench.host.cache == {}
    # Looked up once each by allocate, both conversions, teardown and the end; the second make_private sees that all is so.
    assert bench.host.asked["filemap_get_folio"] == 5 * folios
    assert sum(bench.host.asked.values()) < 40 * folios


def test_shared_pages_are_stored_by_the_run() -> None:
    bench = Bench(0)
    assert bench.do(lambda lib: lib.create(TIB, (TIB - 1, 7, 3, 4, 4))) == 0
    assert bench.host.trees["attributes"] == [
        Entries(2, 3), Entries(1, 2), Entries(2, 2), Entries(1, 1), Entries(2, TIB - 9), Entries(1, 1)]


@pytest.mark.parametrize("order", [0, 9, 18])
def test_a_fault_inside_a_folio_gives_all_of_it_at_the_gfn_of_its_head(order: int) -> None:
    bench = Bench(order)
    assert bench.do(lambda lib: lib.guest_fault(TIB + (1 << 18) + 5, bench.HALF + (1 << 18) + 5)) == 0
    inside = 5 % (1 << order)
    assert bench.ops.told == [("prepare_private", TIB + (1 << 18) + 5 - inside, Folio(0, order))]


@pytest.mark.parametrize("order", [9, 18])
def test_folios_are_known_by_their_heads_wherever_one_looks(order: int) -> None:
    bench = Bench(order)
    nr = 1 << order
    assert bench.do(lambda lib: lib.allocate(bench.HALF + 1, nr)) == 0            # two folios, each in part
    assert [(h.pgoff, h.gfn) for h in bench.do(lambda lib: lib.present(bench.HALF + 3, nr))] == [
        (bench.HALF, TIB), (bench.HALF + nr, TIB + nr)]
    folio, locked = bench.host.cache[bench.HALF + nr], Locked(bench.HALF + nr, True, True, True)
    assert bench.do(lambda lib: lib.error_folio(folio, locked)) == "delayed"
    assert bench.ops.told == [("invalidate error", TIB + nr, folio)]


def test_a_folio_outside_of_every_binding_has_no_gfn() -> None:
    bench = Bench(9)
    assert bench.do(lambda lib: lib.allocate(bench.HALF - 1, 2)) == 0
    assert [h.gfn for h in bench.do(lambda lib: lib.present(bench.HALF - 512, 1024))] == [None, TIB]


RANGES: dict[str, Callable[[Library, int, int], Steps[Any]]] = {
    "make_private": lambda lib, start, nr: lib.make_private(start, nr),
    "make_shared": lambda lib, start, nr: lib.make_shared(start, nr),
    "punch_hole": lambda lib, start, nr: lib.punch_hole(start, nr),
    "unbind": lambda lib, start, nr: lib.unbind(start, nr),
}


@pytest.mark.parametrize("name", RANGES)
@pytest.mark.parametrize(("start", "nr"), [(1, 512), (0, 511), (512, 513), (511, 1)])
def test_a_range_that_cuts_a_folio_is_refused_before_anything_is_asked_for(name: str, start: int, nr: int) -> None:
    bench = Bench(9)
    bench.host.asked.clear()
    assert bench.do(lambda lib: RANGES[name](lib, bench.HALF + start, nr)) == Conversion(-EINVAL)
    assert not bench.host.asked
    assert bench.do(lambda lib: RANGES[name](lib, bench.HALF + 512, 1024)) == Conversion(0)


def test_a_punch_past_the_end_ends_with_the_last_folio() -> None:
    bench = Bench(9)
    assert bench.do(lambda lib: lib.allocate(TIB - 1, 1)) == 0
    assert bench.do(lambda lib: lib.punch_hole(TIB - 512, 700)) == Conversion(0)
    assert bench.host.cache == {}


@pytest.mark.parametrize(("gfn", "start", "nr"), [(TIB + 1, 0, 512), (TIB, 1, 512), (TIB, 0, 100)])
def test_what_cannot_be_bound_folio_by_folio_is_refused(gfn: int, start: int, nr: int) -> None:
    bench = Bench(9)
    assert bench.do(lambda lib: lib.bind(gfn, start, nr)) == -EINVAL
    assert bench.do(lambda lib: lib.bind(0, 512, 1024)) == 0


@pytest.mark.parametrize(("size", "shared"), [(TIB + 1, ()), (512, (0,)), (1024, tuple(range(1, 513)))])
def test_a_file_that_would_end_or_change_inside_a_folio_is_refused(size: int, shared: tuple[int, ...]) -> None:
    bench = Bench(9)
    assert bench.do(lambda lib: lib.create(size, shared)) == -EINVAL
    assert bench.do(lambda lib: lib.create(1024, tuple(range(512, 1024)))) == 0


def test_entries_read_as_what_they_are() -> None:
    entries = Entries(5, 3, 2)
    assert (list(entries), len(entries), entries[0], entries[-1]) == ([5, 7, 9], 3, 5, 9)
    with pytest.raises(IndexError):
        entries[3]
    assert [str(e) for e in (entries, Entries(3, 2, 1), Entries(1, 4), Entries(1, 1), Entries(1, TIB, 1))] == [
        "5,7..9", "3,4", "1 x 4", "1", f"1,2..{TIB}"]
    assert {Entries(1, 2): "a"}[Entries(1, 2, 0)] == "a"

"""core/large.py call by call: what is asked of the host, in which order, and what is made of the answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from errno import EAGAIN, EBUSY, EIO, ENOMEM
from typing import Any

import pytest
from driver import Bench
from scripted import asked, script

from guest_memfd.core.gmem import Conversion, Held
from guest_memfd.core.large import cut_off, is_cut
from guest_memfd.designs.ours import OurLibrary
from guest_memfd.hypervisors.kvm.pkvm import PkvmOps
from guest_memfd.words.pagestate import PRIVATE_PAGE, SHARED_PAGE
from guest_memfd.words.primitives import Folio, Locked, Lookup, Primitive, Steps
from guest_memfd.words.scene import Scene, Slot
from guest_memfd.words.units import Gfn, Index

SIZE = 16
LARGE = Held(Folio(8, 2), Index(4), Gfn(12), True)
NEXT = Held(Folio(12, 2), Index(8), None, True)


class Large(OurLibrary):
    order, splits = 2, True


def library(design: type[OurLibrary] = Large) -> OurLibrary:
    return design(PkvmOps(), SIZE)


def held_in(shared: Sequence[int] = ()) -> Callable[[Primitive], Any]:
    """Answers of a host whose pages are private, bound to the gfns of their index, but for those *shared*."""
    def answer(primitive: Primitive) -> Any:
        if primitive.name != "tree_load":
            return None
        tree, start, nr = primitive.args
        pages = range(start, start + nr)
        if tree == "bindings":
            return [i + 1 for i in pages]
        return [SHARED_PAGE if i in shared else PRIVATE_PAGE for i in pages]

    return answer


@pytest.mark.parametrize(("start", "nr", "heads"), [
    (4, 4, [4]), (5, 1, [4]), (7, 1, [4]), (8, 1, [8]), (7, 2, [4, 8]), (5, 6, [4, 8]), (4, 8, [4, 8]),
    (0, 16, [0, 4, 8, 12]), (3, 1, [0]), (15, 1, [12]), (4, 5, [4, 8]), (2, 3, [0, 4])])
def test_what_a_range_touches_is_merged(start: int, nr: int, heads: list[int]) -> None:
    _, said = asked(library().merge(Index(start), nr), held_in())
    assert [line for line in said if "merge" in line or "attributes" in line] == [
        line for head in heads for line in (f"tree_load(attributes, {head}, 4)", f"merge_folio({head}, 2)")]


def test_folios_of_two_pages_are_merged() -> None:
    design = type("Two", (OurLibrary,), {"order": 1, "splits": True})
    _, said = asked(library(design).merge(Index(2), 3), held_in())
    assert [line for line in said if "merge" in line] == ["merge_folio(2, 1)", "merge_folio(4, 1)"]


def test_nothing_is_merged_beyond_the_end_of_the_file() -> None:
    _, said = asked(Large(PkvmOps(), SIZE - 1).merge(Index(8), 7), held_in())
    assert [line for line in said if "merge" in line] == ["merge_folio(8, 2)"]


def test_only_what_is_one_thing_throughout_is_merged() -> None:
    _, said = asked(library().merge(Index(0), SIZE), held_in(shared=[6, 12]))
    assert [line for line in said if "merge" in line] == ["merge_folio(0, 2)", "merge_folio(8, 2)"]
    assert [line for line in said if "attributes" in line] == [f"tree_load(attributes, {head}, 4)" for head in (0, 4, 8, 12)]


@pytest.mark.parametrize(("order", "splits"), [(0, True), (0, False), (2, False)])
def test_where_folios_are_single_or_stay_as_they_are_nothing_is_merged(order: int, splits: bool) -> None:
    design = type("Small", (OurLibrary,), {"order": order, "splits": splits})
    assert asked(library(design).merge(Index(0), SIZE), held_in()) == (None, [])


@pytest.mark.parametrize(("start", "nr", "cut"), [
    (4, 4, False), (0, 16, False), (5, 3, True), (4, 3, True), (4, 5, False), (3, 5, False), (7, 1, True), (5, 9, True)])
def test_a_range_cuts_a_folio_that_reaches_beyond_it(start: int, nr: int, cut: bool) -> None:
    assert is_cut(LARGE, Index(start), nr) == cut


LOCKED = Locked(LARGE.pgoff, True, False, False)
HOLE = LOCKED._replace(no_direct_map=True)
SPLIT_GUEST, SPLIT_MAP = "hyp_call(split_guest, 12, pfn8/o2)", "split_direct_map(pfn8/o2)"
SPLIT, UNLOCK_ALL, UNLOCK_FIRST = "split_folio(pfn8/o2)", "unlock_folio(pfn8/o2)", "unlock_folio(pfn8)"


@pytest.mark.parametrize(("locked", "held", "calls", "ret"), [
    (LOCKED, LARGE, [(SPLIT_GUEST, 0), (SPLIT, 0), (UNLOCK_FIRST, None)], 0),
    (HOLE, LARGE, [(SPLIT_GUEST, 0), (SPLIT_MAP, 0), (SPLIT, 0), (UNLOCK_FIRST, None)], 0),
    (HOLE, LARGE._replace(gfn=None), [(SPLIT_MAP, 0), (SPLIT, 0), (UNLOCK_FIRST, None)], 0),
    (HOLE, LARGE, [(SPLIT_GUEST, -ENOMEM), (UNLOCK_ALL, None)], -ENOMEM),
    (HOLE, LARGE, [(SPLIT_GUEST, 0), (SPLIT_MAP, -ENOMEM), (UNLOCK_ALL, None)], -ENOMEM),
    (HOLE, LARGE, [(SPLIT_GUEST, 0), (SPLIT_MAP, 0), (SPLIT, -EBUSY), (UNLOCK_ALL, None)], -EBUSY),
])
def test_a_folio_is_split_from_the_outside_in(locked: Locked, held: Held, calls: list[tuple[str, Any]], ret: int) -> None:
    """The guest's leaf, the hole, the folio; what fails leaves it one, locked and unlocked as such."""
    said = [("lock_folio(pfn8/o2)", locked), *calls]
    assert script(library().split((held,)), *(answer for _, answer in said)) == (
        (ret, held.pgoff if ret else 0), [call for call, _ in said])


def test_the_first_that_cannot_be_split_ends_it() -> None:
    (ret, index), said = asked(library().split((LARGE, NEXT)), lambda p: {
        "lock_folio": LOCKED, "hyp_call": 0, "split_folio": -EBUSY if p.args[0] == NEXT.folio else 0}.get(p.name))
    assert (ret, index) == (-EBUSY, NEXT.pgoff)
    assert said[-1] == "unlock_folio(pfn12/o2)"


@pytest.mark.parametrize(("fails", "ret"), [(-EBUSY, -EAGAIN), (-EAGAIN, -EAGAIN), (-ENOMEM, -ENOMEM)])
@pytest.mark.parametrize(("start", "index"), [(6, 6), (4, 4), (2, 4)])
def test_who_asked_is_told_of_a_page_of_his_range(start: int, index: int, fails: int, ret: int) -> None:
    """-EBUSY of a split is a reference that passes, so he may try again; the references stay his to drop."""
    steps = library().single_pages(Index(start), 8, (LARGE, NEXT), (LARGE,))
    said, _ = asked(steps, lambda p: {"lock_folio": LOCKED, "hyp_call": 0, "split_folio": fails}.get(p.name))
    assert said == (ret, index, (LARGE, NEXT))


def test_a_conversion_whose_split_is_refused_says_where(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(_: OurLibrary, _start: Index, _nr: int, folios: tuple[Held, ...], _large: object) -> Steps[Any]:
        yield from ()
        return -EAGAIN, Index(5), folios

    monkeypatch.setattr(OurLibrary, "single_pages", refused)
    said, _ = asked(library().make_shared(Index(4), 2), lambda p: {
        "filemap_find_folio": Index(6), "tree_load": held_in()(p), "tree_reserve": 0}.get(p.name))
    assert said == Conversion(-EAGAIN, Index(5))


def test_after_a_split_the_range_is_looked_up_anew() -> None:
    steps = library().single_pages(Index(4), 2, (LARGE,), (LARGE,))
    found, said = asked(steps, lambda p: {
        "lock_folio": LOCKED, "hyp_call": 0, "split_folio": 0, "tree_load": held_in()(p),
        "filemap_get_folio": p.name == "filemap_get_folio" and Lookup(Folio(p.args[0] + 4), p.args[0])}.get(p.name))
    assert found == (0, 0, (Held(Folio(8), Index(4), Gfn(4), True), Held(Folio(9), Index(5), Gfn(5), True)))
    # What was held of the large folio goes before that.
    assert said.index("folio_put(pfn8/o2, lookup)") < said.index("filemap_get_folio(4)")


def taken_back_by_parts(split: int = 0, reclaim: int = 0) -> tuple[int, list[str]]:
    """What comes of `take_parts_back`, and what it asks for: it cannot be split, or its second page does not come back."""
    def answer(p: Primitive) -> Any:
        if p.name == "hyp_call" and p.args[0] == "reclaim_dying_guest_page":
            return reclaim if p.args[2] == Folio(9) else 0
        return {"lock_folio": LOCKED, "hyp_call": 0, "split_folio": split, "tree_load": held_in()(p),
                "filemap_get_folio": p.name == "filemap_get_folio" and Lookup(Folio(p.args[0] + 4), p.args[0])}.get(p.name)

    ret, said = asked(library().take_parts_back(LARGE), answer)
    return ret, [line for line in said if line.startswith(("filemap_get_folio", "hyp_call(reclaim", "folio_put"))]


def reclaimed(*indexes: int) -> list[str]:
    return [f"hyp_call(reclaim_dying_guest_page, {index}, pfn{index + 4})" for index in indexes]


FOUND = [f"filemap_get_folio({index})" for index in range(4, 8)]
PUT = [f"folio_put(pfn{pfn}, lookup)" for pfn in range(8, 12)]


def test_the_parts_of_a_folio_are_looked_for_where_it_was() -> None:
    """What a dying VM's hypervisor keeps of it for good may be one page of several; its gfn is another number."""
    assert taken_back_by_parts() == (0, [*FOUND, *reclaimed(4, 5, 6, 7), *PUT])


def test_a_part_that_does_not_come_back_now_ends_it() -> None:
    assert taken_back_by_parts(reclaim=-ENOMEM) == (-ENOMEM, [*FOUND, *reclaimed(4, 5, 5), *PUT])


@pytest.mark.parametrize("fails", [-EBUSY, -ENOMEM])
def test_what_cannot_be_split_now_is_tried_again(fails: int) -> None:
    assert taken_back_by_parts(split=fails) == (-EAGAIN, [])


@pytest.mark.parametrize("fails", [0, -EAGAIN])
def test_a_large_folio_that_stays_is_taken_back_by_its_parts(monkeypatch: pytest.MonkeyPatch, fails: int) -> None:
    def parts(_: OurLibrary, _held: Held) -> Steps[int]:
        yield from ()
        return fails

    monkeypatch.setattr(OurLibrary, "take_parts_back", parts)
    ret, said = asked(library().take_all_back((LARGE,), leaks=True), lambda p: {
        "lock_folio": LOCKED, "hyp_call": -EIO if p.args[0] == "reclaim_dying_guest_page" else 0}.get(p.name))
    assert ret == ((fails, LARGE.pgoff) if fails else (0, 0))
    # memory_failure() looks under the folio lock: the owner does not change beside it.
    assert said == ["lock_folio(pfn8/o2)", "hyp_call(reclaim_dying_guest_page, 12, pfn8/o2)", "unlock_folio(pfn8/o2)"]


@pytest.mark.parametrize("splits", [True, False])
def test_nothing_is_looked_up_anew_where_nothing_is_split(splits: bool) -> None:
    design = type("Some", (OurLibrary,), {"order": 2, "splits": splits})
    cut = () if splits else (LARGE,)
    assert asked(library(design).single_pages(Index(4), 4, (LARGE,), cut), lambda p: None) == ((0, 0, (LARGE,)), [])


@pytest.mark.parametrize(("start", "nr", "which"), [(4, 8, ()), (5, 7, (LARGE,)), (4, 5, (NEXT,)), (6, 3, (LARGE, NEXT))])
def test_of_a_range_the_folios_at_its_ends_are_cut(start: int, nr: int, which: tuple[Held, ...]) -> None:
    _, said = asked(cut_off(library(), Index(start), nr, (LARGE, NEXT)), lambda p: {
        "lock_folio": LOCKED, "hyp_call": -ENOMEM if p.args[1:] else 0, "split_folio": 0, "tree_load": [0] * nr,
        "filemap_find_folio": start + nr}.get(p.name))
    if which == (LARGE, NEXT):
        which = (LARGE,)                                # the first fails, at the hypervisor
    locked = [line for line in said if line.startswith("lock_folio")]
    assert locked == [f"lock_folio(pfn{held.folio.pfn}/o2)" for held in which]


# -- what of a folio a design may ask -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bound", "order"), [
    ([5, 6, 7, 8], 2), ([0, 0, 0, 0], 2), ([6, 7, 8, 9], 0), ([5, 6, 9, 8], 0), ([5, 0, 7, 8], 0), ([5, 6, 7, 0], 0),
    ([0, 6, 7, 8], 0), ([5, 6, 7, 9], 0), ([1, 2, 3, 4], 2)])
def test_one_thing_is_bound_to_one_run_of_gfns_or_to_nothing(bound: list[int], order: int) -> None:
    found, _ = asked(library().order_at(Index(6)), lambda p: bound if p.args[0] == "bindings" else [PRIVATE_PAGE] * 4)
    assert found == order


def orders(bench: Bench) -> list[int]:
    """Of the folios of the file's pages, in the order of their indexes."""
    state = bench.state
    return [state.folio(state.head(state.frame(page.cached - 1)).number).order for page in state.pages() if page.cached]


def scene(pages: int, *, shared: tuple[int, ...] = (), bound: bool = True) -> Scene:
    return Scene("large", "folios of two pages", pages=pages, frames=pages, shared=shared, order=1,
                 slots=(Slot(Gfn(0), Index(0), pages),) if bound else ())


@pytest.mark.parametrize("index", [0, 1])
def test_the_last_page_that_becomes_private_makes_its_folio_one(index: int) -> None:
    bench = Bench("kvm", scene=scene(2, shared=(index,)))
    assert bench.do(lambda lib: lib.allocate(Index(0), 2)) == 0
    assert bench.do(lambda lib: lib.guest_fault(Gfn(1 - index), Index(1 - index))) == 0      # out of the direct map
    assert orders(bench) == [0, 0]
    assert bench.do(lambda lib: lib.make_private(Index(index), 1)).ret == 0
    assert orders(bench) == [1, 1]


def test_every_folio_of_a_range_that_becomes_shared_is_split() -> None:
    bench = Bench("kvm", scene=scene(4))
    assert bench.do(lambda lib: lib.allocate(Index(0), 4)) == 0
    assert orders(bench) == [1, 1, 1, 1]
    assert bench.do(lambda lib: lib.make_shared(Index(0), 4)).ret == 0
    assert orders(bench) == [0, 0, 0, 0]


@pytest.mark.parametrize(("gfn", "start", "nr", "after"), [
    (0, 0, 4, [1, 1, 1, 1]), (2, 0, 2, [1, 1, 1, 1]), (0, 2, 2, [1, 1, 1, 1]), (1, 0, 2, [0, 0, 1, 1]),
    (1, 1, 1, [0, 0, 1, 1]), (1, 1, 2, [0, 0, 0, 0]), (1, 1, 3, [0, 0, 1, 1])])
def test_a_binding_splits_what_it_cuts_or_puts_at_an_odd_gfn(gfn: int, start: int, nr: int, after: list[int]) -> None:
    bench = Bench("kvm", scene=scene(4, bound=False))
    assert bench.do(lambda lib: lib.allocate(Index(0), 4)) == 0
    assert bench.do(lambda lib: lib.bind(Gfn(gfn), Index(start), nr)) == 0
    assert orders(bench) == after


@pytest.mark.parametrize(("gfn", "splits"), [(5, False), (1, False), (3, True), (4, True), (6, True)])
def test_where_a_folio_comes_to_lie_in_the_guest_says_whether_a_binding_splits_it(gfn: int, splits: bool) -> None:
    """Pages 1 to 8 are bound; the folio of four pages is at page 4, so at gfn + 3."""
    def answer(p: Primitive) -> Any:
        if p.name == "filemap_get_folio":
            return Lookup(LARGE.folio, LARGE.pgoff) if p.args[0] == LARGE.pgoff else None
        if p.name == "filemap_find_folio":
            return LARGE.pgoff if p.args[0] <= LARGE.pgoff else 9
        return {"lock_folio": LOCKED, "hyp_call": 0, "split_folio": 0, "tree_load": held_in()(p)}.get(p.name)

    _, said = asked(library().split_to_bind(Gfn(gfn), Index(1), 8), answer)
    assert ("split_folio(pfn8/o2)" in said) == splits

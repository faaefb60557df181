"""What the library asks the page cache for, step by step: holes, folios of more than one page, batches, races.

The page cache is the test's own, a few lines; the steps expected are those that the docstrings of core/folio.py,
core/convert.py and core/invalidate.py promise.
"""

from __future__ import annotations

from collections.abc import Iterator
from errno import EAGAIN, EBADF, EBUSY, EEXIST, EFAULT, EINVAL, ENOENT, ENOMEM
from typing import Any

import pytest
from page_cache import Four, Mapped, PageCache, Single, Splitting, Whole, alive, balanced, library, two
from scripted import asked

from guest_memfd.core.file import runs
from guest_memfd.core.gmem import Conversion, Grabbed, Held
from guest_memfd.designs.ours import OurLibrary
from guest_memfd.errors import EHWPOISON
from guest_memfd.hypervisors.kvm.default import KvmOps
from guest_memfd.words.pagestate import PRIVATE_PAGE, SHARED_PAGE
from guest_memfd.words.primitives import Folio, Locked, Lookup, Steps


def gets(*indexes: int) -> list[str]:
    return [f"filemap_get_folio({index})" for index in indexes]


LOADS = 2
"""present() begins with a look at both trees."""


# -- present -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("heads", "nr", "steps"), [
    ([], 1, gets(0)),
    ([], 14, gets(*range(14))),
    ([], 15, [*gets(*range(15)), "filemap_find_folio(15, 0)"]),
    ([], 40, [*gets(*range(15)), "filemap_find_folio(15, 25)"]),
    ([20], 40, [*gets(*range(15)), "filemap_find_folio(15, 25)", *gets(*range(20, 36)), "filemap_find_folio(36, 4)"]),
    ([14], 29, gets(*range(29))),                       # a hit: counting begins again
    ([0, 1, 2], 3, gets(0, 1, 2)),
    ([15], 16, [*gets(*range(15)), "filemap_find_folio(15, 1)", *gets(15)]),
    ([15, 40], 41, [*gets(*range(15)), "filemap_find_folio(15, 26)", *gets(*range(15, 31)), "filemap_find_folio(31, 10)",
                    *gets(40)]),
])
def test_holes_are_looked_at_one_by_one_and_then_skipped(heads: list[int], nr: int, steps: list[str]) -> None:
    cache = PageCache({head: Folio(head) for head in heads})
    found, done = asked(library().present(0, nr), cache)
    assert [held.pgoff for held in found] == heads
    assert done[LOADS:] == steps


def test_folios_are_told_by_their_heads() -> None:
    two, one = Folio(8, 1), Folio(3)
    cache = PageCache({4: two, 6: one}, {4: PRIVATE_PAGE, 5: PRIVATE_PAGE, 6: SHARED_PAGE}, {4: 11, 5: 12})
    found, done = asked(library().present(5, 3), cache)
    assert found == (Held(two, 4, 10, True), Held(one, 6, None, False))
    assert done == ["tree_load(bindings, 5, 3)", "tree_load(attributes, 5, 3)", *gets(5, 6, 7)]


# -- batches -----------------------------------------------------------------------------------------------------------


def held(*folios: Folio) -> tuple[Held, ...]:
    return tuple(Held(folio, 10 + at, at, False) for at, folio in enumerate(folios))


COUNT = "folio_ref_count(pfn{})"


@pytest.mark.parametrize(("refs", "batched", "busy", "steps"), [
    ({}, (), None, ["folio_ref_count(pfn0)", "folio_ref_count(pfn1)"]),
    ({}, (1,), None, ["folio_ref_count(pfn0)", "folio_ref_count(pfn1)", "lru_add_drain_all()", "folio_ref_count(pfn1)"]),
    ({0: 3}, (), 10, ["folio_ref_count(pfn0)", "lru_add_drain_all()", "folio_ref_count(pfn0)"]),
    ({1: 3}, (0,), 11, ["folio_ref_count(pfn0)", "lru_add_drain_all()", "folio_ref_count(pfn0)", "folio_ref_count(pfn1)"]),
    ({0: 1}, (), None, ["folio_ref_count(pfn0)", "folio_ref_count(pfn1)"]),
])
def test_batches_are_drained_once_and_only_if_somebody_seems_to_refer(
    refs: dict[int, int], batched: tuple[int, ...], busy: int | None, steps: list[str],
) -> None:
    cache = PageCache(refs={Folio(n): count for n, count in refs.items()}, batched={Folio(n) for n in batched})
    assert asked(library().unexpected_refs(held(Folio(0), Folio(1))), cache) == (busy, steps)


@pytest.mark.parametrize(("refs", "busy"), [(5, None), (6, 10), (4, None)])
def test_a_folio_of_four_pages_has_five_references(refs: int, busy: int | None) -> None:
    folio = Folio(4, 2)
    assert asked(library().unexpected_refs(held(folio)), PageCache(refs={folio: refs}))[0] == busy


def test_one_flush_is_for_all_that_were_zapped() -> None:
    cache = PageCache({0: Folio(0), 1: Folio(1), 2: Folio(2)}, dict.fromkeys(range(3), SHARED_PAGE), private={Folio(1)})
    result, done = asked(library().make_private(0, 3), cache)
    assert result == Conversion(0)
    flushes = [step for step in done if step.startswith("flush")]
    assert flushes == ["flush_tlb_kernel_range((Folio(pfn=0, order=0), Folio(pfn=2, order=0)))"]
    assert done.index(flushes[0]) > done.index("set_direct_map_invalid_noflush(pfn2)")


def test_nothing_is_flushed_where_nothing_was_zapped() -> None:
    cache = PageCache({0: Folio(0)}, {0: SHARED_PAGE}, private={Folio(0)})
    _, done = asked(library().make_private(0, 1), cache)
    assert not any(step.startswith("flush") for step in done)
    ret, done = asked(library().zap(Folio(1)), PageCache(fails={"set_direct_map_invalid_noflush": [-ENOMEM]}))
    assert ret == -ENOMEM
    assert done[-2:] == ["folio_set_no_direct_map(pfn1, False)", "pm_account(-1)"]


@pytest.mark.parametrize("uptodate", [True, False])
@pytest.mark.parametrize("away", [True, False])
@pytest.mark.parametrize("broken", [True, False])
def test_before_it_is_private_a_page_is_zeroed_once_and_broken_memory_is_not_written_to(
    uptodate: bool, away: bool, broken: bool,
) -> None:
    cache = PageCache({2: Folio(2)}, {2: SHARED_PAGE}, fails={"lock_folio": [Locked(2, uptodate, away, broken)]})
    result, done = asked(library().make_private(2, 1), cache)
    assert result == Conversion(0)
    kinds = [step.partition("(")[0] for step in done]
    assert kinds.count("clear_folio") == (not uptodate and not broken)
    assert kinds.count("set_direct_map_invalid_noflush") == (not away)


def test_a_zap_that_fails_ends_the_batch_and_what_was_zapped_is_flushed() -> None:
    cache = PageCache({0: Folio(0), 1: Folio(1), 2: Folio(2)}, dict.fromkeys(range(3), SHARED_PAGE),
                      fails={"set_direct_map_invalid_noflush": [0, -ENOMEM]})
    result, done = asked(library().make_private(0, 3), cache)
    assert result == Conversion(-ENOMEM)
    assert "flush_tlb_kernel_range((Folio(pfn=0, order=0),))" in done
    assert "lock_folio(pfn2)" not in done
    assert "tree_release(attributes)" in done
    assert not any(step.startswith("tree_store_reserved") for step in done)


@pytest.mark.parametrize(("name", "entry"), [("make_private", PRIVATE_PAGE), ("make_shared", SHARED_PAGE)])
def test_what_is_so_already_costs_a_look(name: str, entry: int) -> None:
    convert = getattr(library(), name)
    result, done = asked(convert(2, 3), PageCache(attributes=dict.fromkeys(range(64), entry)))
    assert result == Conversion(0)
    assert [step for step in done if "op(" not in step] == [
        "down_write(invalidate)", "tree_load(attributes, 2, 3)", "up_write(invalidate)"]


# -- grab --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", [4, 6, None])
def test_a_folio_that_has_moved_is_looked_up_again(to: int | None) -> None:
    answers: Iterator[Any] = iter([Lookup(Folio(1), 5), Locked(to, True, False, False), 0, 0, Lookup(Folio(2), 5),
                                   Locked(5, True, True, False)])
    result, done = asked(library().grab_folio(5), lambda _primitive: next(answers))
    assert result == Grabbed(Folio(2), 5, True)
    assert done == ["filemap_get_folio(5)", "lock_folio(pfn1)", "unlock_folio(pfn1)", "folio_put(pfn1, lookup)",
                    "filemap_get_folio(5)", "lock_folio(pfn2)"]


@pytest.mark.parametrize("uptodate", [True, False])
def test_what_is_not_up_to_date_is_zeroed(uptodate: bool) -> None:
    answers: Iterator[Any] = iter([Lookup(Folio(1), 5), Locked(5, uptodate, False, False), 0, 0])
    _, done = asked(library().grab_folio(5), lambda _primitive: next(answers))
    assert done[2:] == ([] if uptodate else ["clear_folio(pfn1)", "folio_mark_uptodate(pfn1)"])


def test_poison_is_told_and_let_go() -> None:
    answers: Iterator[Any] = iter([Lookup(Folio(1), 5), Locked(5, True, False, True), 0, 0])
    result, done = asked(library().grab_folio(5), lambda _primitive: next(answers))
    assert result == -EHWPOISON
    assert done[2:] == ["unlock_folio(pfn1)", "folio_put(pfn1, lookup)"]


@pytest.mark.parametrize(("design", "errors", "orders", "result"), [
    (OurLibrary, [-ENOMEM], [0], -ENOMEM),
    (Single, [-ENOMEM], [0], -ENOMEM),
    (OurLibrary, [-EEXIST] * 3, [0, 0, 0], -EAGAIN),
    (OurLibrary, [-EEXIST, -ENOMEM], [0, 0], -ENOMEM),
    (Whole, [-ENOMEM], [1], -ENOMEM),
    (Whole, [-EEXIST] * 3, [1, 1, 1], -EAGAIN),
    (Splitting, [-ENOMEM, -ENOMEM], [1, 0], -ENOMEM),
    (Splitting, [-ENOMEM], [1, 0], 5),
    (Splitting, [], [1], 4),
    (Splitting, [-EEXIST], [1, 0], 5),                  # somebody has part of the range: a single page fits beside it
])
def test_a_folio_is_allocated_whole_if_it_can_be(
    design: type[OurLibrary], errors: list[int], orders: list[int], result: int,
) -> None:
    grabbed, done = asked(library(design=design).grab_folio(5), PageCache(fails={"filemap_add_folio": errors}))
    assert [step for step in done if "add" in step] == [f"filemap_add_folio(5, {order})" for order in orders]
    assert grabbed == result if isinstance(grabbed, int) else grabbed.pgoff == result


@pytest.mark.parametrize(("design", "size", "index", "order"), [
    (Splitting, 6, 5, 1), (Splitting, 6, 4, 1), (Splitting, 5, 4, 0), (Splitting, 5, 3, 1), (Four, 8, 4, 2), (Four, 7, 4, 0),
    (Four, 7, 6, 0), (Four, 7, 3, 2), (Four, 6, 4, 0), (Four, 5, 4, 0), (Single, 5, 4, 0)])
def test_no_folio_goes_beyond_the_end_of_its_file(design: type[OurLibrary], size: int, index: int, order: int) -> None:
    _, done = asked(library(size, design).grab_folio(index), PageCache())
    assert [step for step in done if "add" in step] == [f"filemap_add_folio({index}, {order})"]


def test_an_allocation_ends_at_the_first_page_that_is_not_to_be_had() -> None:
    ret, done = asked(library().allocate(3, 4), PageCache(fails={"filemap_add_folio": [Lookup(Folio(3), 3), -ENOMEM]}))
    assert ret == -ENOMEM
    assert [step for step in done if "add" in step or "end_op" in step] == [
        "filemap_add_folio(3, 0)", "filemap_add_folio(4, 0)", "end_op(-12, 4)"]


@pytest.mark.parametrize(("errors", "result", "attempts"), [([], 0, 1), ([-ENOMEM], 0, 2), ([-ENOMEM] * 2, -ENOMEM, 2)])
def test_an_entry_of_the_direct_map_is_put_back_in_two_attempts(errors: list[int], result: int, attempts: int) -> None:
    folio = Folio(1)
    ret, done = asked(library().restore(folio), PageCache(fails={"set_direct_map_default_noflush": [*errors]}))
    assert ret == result
    assert done.count("set_direct_map_default_noflush(pfn1)") == attempts
    assert done[attempts:] == ([] if ret else ["folio_set_no_direct_map(pfn1, False)", "pm_account(-1)"])


# -- removal -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("start", "nr", "cut"), [(1, 3, [0]), (2, 3, [4]), (1, 5, [0]), (0, 1, [0]), (2, 2, [])])
def test_a_folio_that_ends_where_the_range_ends_is_not_split(start: int, nr: int, cut: list[int]) -> None:
    cache = PageCache({head: Folio(head, 1) for head in (0, 2, 4)})
    result, done = asked(library(6, Splitting).punch_hole(start, nr), cache)
    assert result == Conversion(0)
    assert [step for step in done if step.startswith("split")] == [f"split_folio(pfn{head}/o1)" for head in cut]


def test_a_punch_splits_what_it_cuts_and_nothing_else() -> None:
    cache = PageCache({head: Folio(head, 1) for head in (0, 2, 4)})
    result, done = asked(library(6, Splitting).punch_hole(1, 4), cache)
    assert result == Conversion(0)
    assert [step for step in done if step.startswith("split")] == ["split_folio(pfn0/o1)", "split_folio(pfn4/o1)"]
    assert [step for step in done if step.startswith("filemap_remove")] == [
        "filemap_remove_folio(pfn1)", "filemap_remove_folio(pfn2/o1)", "filemap_remove_folio(pfn4)"]
    assert done.count("gmem_invalidate_begin(1, 4)") == done.count("gmem_invalidate_end()") == 1
    assert done[done.index("split_folio(pfn0/o1)") + 1] == "unlock_folio(pfn0)"     # its head is a single page now
    balanced(cache, done)


@pytest.mark.parametrize(("start", "nr", "splits", "page"), [
    (1, 3, [-EBUSY], 1), (0, 3, [-EBUSY], 2), (1, 2, [0, -EBUSY], 2)])
def test_a_split_that_fails_frees_nothing_and_names_its_page(start: int, nr: int, splits: list[int], page: int) -> None:
    cache = PageCache({0: Folio(0, 1), 2: Folio(2, 1)}, fails={"split_folio": splits})
    result, done = asked(library(4, Splitting).punch_hole(start, nr), cache)
    assert result == Conversion(-EBUSY, page)
    assert not any(step.startswith("filemap_remove") for step in done)
    failed = len(done) - 1 - [step.startswith("split_folio") for step in reversed(done)].index(True)
    assert done[failed + 1] == done[failed].replace("split", "unlock")
    balanced(cache, done)


# Who locks, unlocks, by frames, as a split folio goes by another name; and who looks up, puts.
def test_what_is_unmapped_for_broken_memory_is_that_folio() -> None:
    folio = Folio(8, 2)
    cache = PageCache({8: folio}, dict.fromkeys(range(8, 12), SHARED_PAGE), {8: 1})
    result, done = asked(library().error_folio(folio, Locked(8, True, False, True)), alive(cache))
    assert result == "delayed"
    assert done == [
        "igrab()", "unlock_folio(pfn8/o2)", "down_read(invalidate)", "lock_folio(pfn8/o2)", "unlock_folio(pfn8/o2)",
        "gmem_invalidate_begin(8, 4)", "unmap_mapping_pages(8, 4)", "tree_load(bindings, 8, 1)",
        "tree_load(attributes, 8, 1)", "hyp_call(mmu_unmap, 0, pfn8/o2)", "gmem_invalidate_end()", "up_read(invalidate)",
        "iput()", "lock_folio(pfn8/o2)"]


@pytest.mark.parametrize("bound", [0, 6, 8, 9])
def test_a_page_that_is_not_bound_there_is_not_given_to_the_guest(bound: int) -> None:
    cache = two(PRIVATE_PAGE)
    cache.bound[2] = bound
    ret, done = asked(library().guest_fault(6, 2), alive(cache))
    assert ret == -EFAULT
    assert done[-3:] == ["end_op(-14, None)", "up_read(invalidate)", "fput()"]
    assert not any(step.startswith("filemap") for step in done)


@pytest.mark.parametrize("index", [64, 65])
def test_past_the_end_there_is_nothing_to_map(index: int) -> None:
    assert asked(library().user_fault(index), PageCache()) == ("SIGBUS", [])


# -- what the VMM is answered -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("attribute", "fails", "answer"), [
    (SHARED_PAGE, {"vmf_insert_folio": [True]}, "ok"),
    (SHARED_PAGE, {"vmf_insert_folio": [False]}, "retry"),                                  # the VMA has gone
    (SHARED_PAGE, {"set_direct_map_default_noflush": [-ENOMEM, -ENOMEM]}, "SIGBUS"),
    (PRIVATE_PAGE, {}, "SIGBUS"),
    (0, {}, "SIGBUS"),                                  # a hole is read as neither
    (SHARED_PAGE, {"filemap_get_folio": [None], "filemap_add_folio": [-ENOMEM]}, "SIGBUS"),
    (SHARED_PAGE, {"filemap_get_folio": [None] * 3, "filemap_add_folio": [-EEXIST] * 3}, "retry"),   # others were faster
    (SHARED_PAGE, {"filemap_get_folio": [None], "filemap_add_folio": [-EHWPOISON]}, "SIGBUS"),
])
def test_a_fault_of_the_vmm_is_answered(attribute: int, fails: dict[str, list[Any]], answer: str) -> None:
    folio = Folio(1)
    cache = PageCache({3: folio}, {3: attribute}, private={folio}, fails=fails)
    result, done = asked(library().user_fault(3), cache)
    assert result == answer
    assert f"end_op({-EFAULT if answer == 'SIGBUS' else 0}, None)" in done
    assert [step for step in done if step.endswith("(invalidate)")] == ["down_read(invalidate)", "up_read(invalidate)"]
    assert cache.taken == 0


# -- life --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("design", "size", "shared"), [
    (OurLibrary, 0, ()), (OurLibrary, -1, ()), (OurLibrary, 2, (0, 5)), (OurLibrary, 2, (5, 0)), (OurLibrary, 2, (-1, 0)),
    (OurLibrary, 2, (0, 2)), (Whole, 3, ()), (Whole, 4, (0,)), (Whole, 4, (1, 2)),
])
def test_a_file_that_cannot_be_is_refused_before_anything_is_asked_for(
    design: type[OurLibrary], size: int, shared: tuple[int, ...],
) -> None:
    assert asked(library(4, design).create(size, shared), PageCache()) == (-EINVAL, [])


@pytest.mark.parametrize(("size", "shared"), [(3, ()), (4, (0,)), (4, (1, 2))])
def test_where_folios_can_be_split_a_file_may_end_inside_of_one(size: int, shared: tuple[int, ...]) -> None:
    ret, _ = asked(library(size, Splitting).create(size, shared), lambda primitive: int(primitive.name in ASKS))
    assert ret == 0


@pytest.mark.parametrize("design", [OurLibrary, Mapped])
def test_readers_are_turned_away_where_private_pages_leave_the_direct_map(design: type[OurLibrary]) -> None:
    ret, done = asked(library(4, design).create(4, (1,)), lambda primitive: int(primitive.name in ASKS))
    assert ret == 0
    assert [step for step in done if "direct_map" in step] == (
        ["can_set_direct_map()", "mapping_set_no_direct_map()"] if design.no_direct_map else [])
    assert [step for step in done if "tree_store" in step] == [
        "tree_store(attributes, 0, 2 x 4)", "tree_store(attributes, 1, 1)"]


ASKS = ("can_set_direct_map", "try_module_get")


@pytest.mark.parametrize(("operation", "args", "answer", "errno"), [
    ("bind", (6, 2, 2), -EBADF, EBADF), ("unbind", (2, 2), Conversion(-ENOENT), ENOENT)])
def test_of_a_file_that_has_gone_nothing_is_touched(operation: str, args: Any, answer: Any, errno: int) -> None:
    ret, done = asked(getattr(library(), operation)(*args), PageCache(fails={"get_file": [False]}))
    assert ret == answer
    assert done[1:] == ["get_file()", f"end_op({-errno}, None)"]


# gfn 0 on is bound to page 2 on, and is no page index.
@pytest.mark.parametrize(("bound", "start", "ret"), [
    ({2: 1, 3: 2}, 3, -EEXIST), ({2: 1, 3: 2}, 4, 0), ({2: 1, 3: 2}, 1, -EEXIST), ({}, 3, 0), ({5: 6}, 3, 0)])
def test_a_page_is_bound_once_and_the_first_binding_holds_the_file(bound: dict[int, int], start: int, ret: int) -> None:
    cache = PageCache(bound=bound, fails={"vm_state": ["running"]})
    got, done = asked(library().bind(40, start, 2), alive(cache))
    assert got == ret
    assert done[3] == "tree_load(bindings, 0, 64)"
    assert done[-2 if ret or bound else -1:] == [
        "up_write(invalidate)", *(["fput()"] if ret or bound else [])]


def test_of_pages_that_are_not_bound_nothing_is_announced() -> None:
    result, done = asked(library().unbind(4, 2), alive(two(SHARED_PAGE)))
    assert result == Conversion(-ENOENT)
    assert done[3:] == ["tree_load(bindings, 0, 64)", "end_op(-2, None)", "up_write(invalidate)", "fput()"]


def test_a_vm_is_let_go_when_all_is_back_and_before_the_file_may_go() -> None:
    class Released(KvmOps):
        def release(self) -> Steps[None]:
            yield from self.host.hyp_call("release")

    _, done = asked(OurLibrary(Released(), 64).vm_teardown(), alive(two(SHARED_PAGE)))
    assert done[-4:] == ["up_write(invalidate)", "hyp_call(release)", "fput()", "fput()"]


# -- runs --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("pages", "found"), [
    ((), []), ((3,), [(3, 1)]), ((1, 2, 3), [(1, 3)]), ((0, 2), [(0, 1), (2, 1)]), ((5, 1, 2, 4, 1), [(1, 2), (4, 2)]),
])
def test_runs_of_pages(pages: tuple[int, ...], found: list[tuple[int, int]]) -> None:
    assert runs(pages) == found

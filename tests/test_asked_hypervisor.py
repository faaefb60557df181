"""What the library asks the hypervisor for, in which order, for every page of a range; and what it gives back to the kernel.

The steps expected are those that the docstrings of core/convert.py, core/invalidate.py and core/folio.py promise.
"""

from __future__ import annotations

from errno import EAGAIN, EBUSY, EINVAL, EIO, ENOMEM

import pytest
from page_cache import PageCache, Recorded, Splitting, alive, balanced, library, two
from scripted import asked

from guest_memfd.core.gmem import Conversion, Held
from guest_memfd.designs.ours import OurLibrary
from guest_memfd.words.pagestate import PRIVATE_PAGE, SHARED_PAGE
from guest_memfd.words.primitives import Folio, Locked, Steps


@pytest.mark.parametrize(("name", "attribute", "answers", "result", "calls"), [
    ("make_private", SHARED_PAGE, [], Conversion(0), "make_private 6, make_private 7"),
    ("make_private", SHARED_PAGE, [0, -EBUSY], Conversion(-EBUSY, 3), ""),
    ("make_shared", PRIVATE_PAGE, [], Conversion(0), "make_shared 6, make_shared 7"),
    ("make_shared", PRIVATE_PAGE, [0, -EBUSY], Conversion(-EBUSY, 3), ""),
    ("make_shared", PRIVATE_PAGE, [0, 0, 0, -EAGAIN], Conversion(-EAGAIN, 3), "make_shared 6, make_shared 7"),
    ("punch_hole", PRIVATE_PAGE, [], Conversion(0), "reclaim 6, reclaim 7"),
    ("punch_hole", SHARED_PAGE, [], Conversion(0), ""),
    ("punch_hole", PRIVATE_PAGE, [0, -EBUSY], Conversion(-EBUSY, 3), ""),
    ("punch_hole", PRIVATE_PAGE, [0, 0, -EAGAIN], Conversion(0), "reclaim 6, reclaim 6, reclaim 7"),
    ("punch_hole", PRIVATE_PAGE, [0, 0, 0, -EAGAIN, -EAGAIN], Conversion(-EAGAIN, 3), "reclaim 6, reclaim 7, reclaim 7"),
    ("unbind", PRIVATE_PAGE, [], Conversion(0), "reclaim 6, reclaim 7"),
    ("unbind", SHARED_PAGE, [], Conversion(0), ""),
    ("unbind", PRIVATE_PAGE, [0, -EBUSY], Conversion(-EBUSY, 3), ""),
    ("unbind", PRIVATE_PAGE, [0, 0, 0, -EIO], Conversion(-EIO, 3), "reclaim 6, reclaim 7"),
])
def test_the_hypervisor_is_asked_for_every_page_before_any_is_taken(
    name: str, attribute: int, answers: list[int], result: Conversion, calls: str,
) -> None:
    ops, cache = Recorded(*answers), two(attribute)
    file = OurLibrary(ops, 64)
    got, done = asked(getattr(file, name)(2, 2), alive(cache))
    assert got == result
    reason = {"make_private": "to_private", "make_shared": "to_shared", "punch_hole": "punch"}.get(name, name)
    assert ", ".join(ops.calls) == ", ".join(filter(None, [f"invalidate 6 {reason}, invalidate 7 {reason}", calls]))
    assert ("tree_store_reserved" in str(done)) == (result.ret == 0 and name != "punch_hole")
    # What has been reserved is used, or given back.
    kinds = [step.partition("(")[0] for step in done]
    ends = kinds.count("tree_store_reserved") * (name != "unbind") + kinds.count("tree_release")
    assert kinds.count("tree_reserve") == ends
    balanced(cache, done)


@pytest.mark.parametrize(("answers", "merged"), [([], [(2, 2)]), ([0, -EBUSY], [])])
def test_what_has_become_private_is_merged_and_what_was_refused_is_not(
    monkeypatch: pytest.MonkeyPatch, answers: list[int], merged: list[tuple[int, int]],
) -> None:
    done: list[tuple[int, int]] = []

    def merge(_: OurLibrary, start: int, nr: int) -> Steps[None]:
        done.append((start, nr))
        yield from ()

    monkeypatch.setattr(OurLibrary, "merge", merge)
    asked(OurLibrary(Recorded(*answers), 64).make_private(2, 2), alive(two(SHARED_PAGE)))
    assert done == merged


@pytest.mark.parametrize(("name", "attribute", "ranged"), [
    ("make_private", SHARED_PAGE, {"unmap_mapping_pages", "gmem_invalidate_begin", "tree_reserve"}),
    ("make_shared", PRIVATE_PAGE, {"gmem_invalidate_begin", "tree_reserve"}),
    ("punch_hole", PRIVATE_PAGE, {"unmap_mapping_pages", "gmem_invalidate_begin"}),
    ("unbind", PRIVATE_PAGE, {"gmem_invalidate_begin"}),
])
def test_what_is_done_to_a_range_is_done_to_all_of_it_and_no_more(name: str, attribute: int, ranged: set[str]) -> None:
    _, done = asked(getattr(library(), name)(2, 2), alive(two(attribute)))
    about = [step for step in done if step.startswith(("unmap_mapping_pages", "gmem_invalidate_begin", "tree_reserve"))]
    assert {step.partition("(")[0] for step in about} == ranged
    assert all(step.endswith("2, 2)") for step in about)
    stores = [at for at, step in enumerate(done) if step.startswith("tree_store_reserved")]
    assert all(done.index("gmem_invalidate_begin(2, 2)") < at < done.index("gmem_invalidate_end()") for at in stores)


@pytest.mark.parametrize(("name", "entry"), [
    ("make_shared", PRIVATE_PAGE), ("make_private", SHARED_PAGE), ("punch_hole", PRIVATE_PAGE)])
def test_of_what_is_bound_to_nothing_the_hypervisor_is_not_asked(name: str, entry: int) -> None:
    ops, cache = Recorded(), two(entry)
    cache.bound.clear()
    assert asked(getattr(OurLibrary(ops, 64), name)(2, 2), cache)[0] == Conversion(0)
    assert ops.calls == []


def test_of_what_is_so_already_the_hypervisor_is_not_asked() -> None:
    ops, cache = Recorded(), two(PRIVATE_PAGE)
    cache.attributes[3] = SHARED_PAGE
    assert asked(OurLibrary(ops, 64).make_shared(2, 2), cache)[0] == Conversion(0)
    assert ops.calls == ["invalidate 6 to_shared", "make_shared 6"]


def test_a_page_that_the_guest_keeps_stays_though_its_folio_is_split() -> None:
    ops = Recorded(-EBUSY)
    cache = PageCache({0: Folio(0, 1)}, dict.fromkeys(range(2), PRIVATE_PAGE), {0: 1, 1: 2})
    result, done = asked(Splitting(ops, 4).punch_hole(1, 1), cache)
    assert (result, ops.calls) == (Conversion(-EBUSY, 1), ["invalidate 1 punch"])
    assert [step for step in done if step.startswith(("split", "filemap_remove"))] == ["split_folio(pfn0/o1)"]
    balanced(cache, done)


@pytest.mark.parametrize("scrubs", [True, False])
def test_the_library_zeroes_what_the_hypervisor_does_not(scrubs: bool) -> None:
    ops = Recorded()
    ops.scrubs = scrubs
    _, done = asked(OurLibrary(ops, 64).punch_hole(2, 2), two(PRIVATE_PAGE))
    assert [step for step in done if "clear" in step] == (
        [] if scrubs else ["clear_folio_local(pfn2)", "clear_folio_local(pfn3)"])


def test_what_was_shared_is_not_zeroed() -> None:
    ops = Recorded()
    ops.scrubs = False
    _, done = asked(OurLibrary(ops, 64).punch_hole(2, 2), two(SHARED_PAGE))
    assert not any("clear" in step for step in done)


class NotesWhatIsReturned(Splitting):
    """What is given back, as it is told of it."""

    def __init__(self, size: int) -> None:
        super().__init__(Recorded(), size)
        self.returned: list[tuple[Held, bool]] = []

    def return_to_kernel(self, held: Held, marked: bool) -> Steps[None]:
        self.returned.append((held, marked))
        yield from super().return_to_kernel(held, marked)


@pytest.mark.parametrize(("bound", "gfn"), [({2: 7, 3: 8}, 7), ({}, None)])
@pytest.mark.parametrize("attribute", [PRIVATE_PAGE, SHARED_PAGE])
@pytest.mark.parametrize("broken", [(False, True), (True, False)])
def test_of_a_broken_folio_the_other_pages_are_given_back(
    bound: dict[int, int], gfn: int | None, attribute: int, broken: tuple[bool, bool]
) -> None:
    cache = PageCache({2: Folio(8, 1)}, dict.fromkeys((2, 3), attribute), bound, fails={
        "lock_folio": [Locked(2, True, True, True)] * 3, "page_hwpoison": [broken] * 2})
    design = NotesWhatIsReturned(64)
    assert asked(design.punch_hole(2, 2), alive(cache))[0] == Conversion(0)
    at = broken.index(False)
    whole = None if gfn is None else gfn - 1
    assert design.returned == [
        (Held(Folio(8 + at), 2 + at, None if whole is None else whole + at, attribute == PRIVATE_PAGE), True)]


def test_of_a_single_page_it_is_known_which_page_is_broken() -> None:
    cache = PageCache({2: Folio(8)}, {2: PRIVATE_PAGE}, fails={"lock_folio": [Locked(2, True, True, True)] * 3})
    _, done = asked(library().punch_hole(2, 1), cache)
    assert "filemap_remove_folio(pfn8)" in done
    assert not any(step.startswith(("page_hwpoison", "clear", "set_direct_map")) for step in done)


def test_a_vm_without_a_file_is_released() -> None:
    ops = Recorded()
    assert asked(OurLibrary(ops, 64).vm_teardown(), PageCache(fails={"get_file": [False]})) == (0, ["get_file()"])
    assert ops.calls == ["release"]


def test_the_last_reference_may_be_that_of_memory_failure() -> None:
    folio = Folio(8)
    cache = PageCache({4: folio}, {4: SHARED_PAGE}, fails={"igrab": [True], "iput": [True]})
    _, done = asked(library().error_folio(folio, Locked(4, True, False, True)), cache)
    assert done[-3:] == ["destroy_inode()", "module_put()", "lock_folio(pfn8)"]
    assert [done.count(step) for step in ("filemap_remove_folio(pfn8)", "destroy_inode()")] == [1, 1]


def test_of_broken_memory_that_is_not_bound_no_guest_is_told() -> None:
    folio = Folio(8)
    result, done = asked(library().error_folio(folio, Locked(4, True, False, True)), alive(PageCache({4: folio})))
    assert result == "delayed"
    assert not any(step.startswith("hyp_call") for step in done)


def test_broken_memory_that_has_left_the_file_is_no_business_of_it() -> None:
    assert asked(library().error_folio(Folio(8), Locked(None, True, False, True)), PageCache()) == ("failed", [])


def test_a_file_that_is_just_going_takes_its_broken_pages_along() -> None:
    result, done = asked(library().error_folio(Folio(8), Locked(4, True, False, True)), lambda _primitive: False)
    assert (result, done) == ("failed", ["igrab()"])


@pytest.mark.parametrize(("start", "nr"), [(-1, 1), (0, 0), (0, -1)])
def test_a_punch_of_no_range_is_refused_before_anything_is_asked_for(start: int, nr: int) -> None:
    assert asked(library().punch_hole(start, nr), PageCache()) == (Conversion(-EINVAL), [])


@pytest.mark.parametrize(("start", "nr"), [(64, 1), (70, 2)])
def test_a_punch_past_the_end_touches_nothing(start: int, nr: int) -> None:
    result, done = asked(library().punch_hole(start, nr), PageCache())
    assert result == Conversion(0)
    assert [step for step in done if "op(" not in step] == ["down_write(invalidate)", "up_write(invalidate)"]


@pytest.mark.parametrize(("answers", "ret", "calls", "stored"), [
    ([], 0, ["invalidate 6 teardown", "reclaim 6", "invalidate 7 teardown", "reclaim 7", "release"], True),
    ([0, 0, 0, -EAGAIN, -EAGAIN], -EAGAIN,
     ["invalidate 6 teardown", "reclaim 6", "invalidate 7 teardown", "reclaim 7", "reclaim 7"], False),
    ([0, -EIO], 0, ["invalidate 6 teardown", "reclaim 6", "invalidate 7 teardown", "reclaim 7", "release"], True),
    ([-EIO], 0, ["invalidate 6 teardown", "invalidate 7 teardown", "reclaim 7", "release"], True),
])
def test_a_dying_vm_gives_everything_back(answers: list[int], ret: int, calls: list[str], stored: bool) -> None:
    ops, cache = Recorded(*answers), two(PRIVATE_PAGE)
    got, done = asked(OurLibrary(ops, 64).vm_teardown(), alive(cache))
    assert (got, ops.calls) == (ret, calls)
    assert ("tree_store_reserved(bindings, 0, 0 x 64)" in done) == stored
    given_up = [step for step in done if any(word in step for word in ("unmap_mapping", "leak", "filemap_remove"))]
    assert given_up == (["unmap_mapping_pages(2, 1)", "leak_folio(pfn2)", "filemap_remove_folio(pfn2)"]
                        if -EIO in answers else [])
    assert f"end_op({ret}, {3 if ret else None})" in done
    balanced(cache, done)


def test_what_cannot_be_put_back_into_the_direct_map_is_kept() -> None:
    cache = two(PRIVATE_PAGE)
    cache.private, cache.fails = {Folio(2), Folio(3)}, {"set_direct_map_default_noflush": [-ENOMEM, -ENOMEM]}
    result, done = asked(library().punch_hole(2, 2), cache)
    assert result == Conversion(0)
    assert [step for step in done if "leak" in step] == ["leak_folio(pfn2)"]
    balanced(cache, done)


@pytest.mark.parametrize(("start", "nr", "cut"), [(1, 3, [0]), (0, 3, [2]), (1, 2, [0, 2])])
def test_the_first_page_of_a_range_that_stays_with_the_hypervisor_ends_a_punch(start: int, nr: int, cut: list[int]) -> None:
    cache = PageCache({0: Folio(0, 1), 2: Folio(2, 1)}, dict.fromkeys(range(4), PRIVATE_PAGE), {n: n + 1 for n in range(4)})
    ops = Recorded(0, 0, -EIO)
    result, done = asked(Splitting(ops, 4).punch_hole(start, nr), cache)
    assert result == Conversion(-EIO, start)
    assert ops.calls[2:] == [f"reclaim {start}"]
    assert [step for step in done if step.startswith(("split_folio", "filemap_remove"))] == [
        f"split_folio(pfn{head}/o1)" for head in cut]
    balanced(cache, done)

"""The abstraction function where a page of the scene is half a block: which pages it reads, and what it tells apart."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from schedules import lent, seen

from guest_memfd.abstract import state as st
from guest_memfd.lockstep import abstraction, refinement
from guest_memfd.lockstep.abstraction import ASTRAY, OF_ONE, unlike
from guest_memfd.lockstep.halves import SHARE
from guest_memfd.words.units import PAGE, Gfn, Pa, pa_to_pfn

SCENE = "two-large-folios"


def spot(both: refinement.Pair) -> int:
    """Which page of each half stands for the others."""
    return pa_to_pfn(both.host.machine.watched[0]) % SHARE


def another(both: refinement.Pair, frame: int = 0, by: int = 1) -> tuple[int, Pa]:
    """A page of the same half as the first of *frame*, and where it is."""
    at = (spot(both) + by) % SHARE
    return at, Pa(both.host.machine.watched[frame] + (at - spot(both)) * PAGE)


def differences(both: refinement.Pair, *pages: tuple[int, int]) -> list[str]:
    return list(unlike(both.host, refinement.abstraction(both.host, both.world.machine.sizes), pages))


@contextmanager
def frame_of(pa: Pa, patch: pytest.MonkeyPatch, **values: int) -> Iterator[None]:
    """Let the page at *pa* have these values."""
    right = abstraction._frame

    def other(host: Any, frame: Any, at: Pa, *rest: Any) -> None:
        right(host, frame, at, *rest)
        for name, value in values.items() if at == pa else ():
            setattr(frame, name, value)

    with patch.context() as inner:
        inner.setattr(abstraction, "_frame", other)
        yield


def test_the_pages_of_a_half_are_alike() -> None:
    both = lent(SCENE)
    assert differences(both, *((frame, at) for frame in range(2) for at in (0, 1, SHARE - 1))) == []


@pytest.mark.parametrize("more", [-1, 1])
@pytest.mark.parametrize("name", [name for name in st.FRAME_FIELDS if name not in OF_ONE])
def test_of_another_page_nothing_may_be_different(name: str, more: int, monkeypatch: pytest.MonkeyPatch) -> None:
    both = lent(SCENE)
    at, pa = another(both)
    is_now = seen(both)[f"pfn0.{name}"] + 3
    stands = both.host.machine.watched[0]
    with frame_of(stands, monkeypatch, **{name: is_now}), frame_of(pa, monkeypatch, **{name: is_now + more}):
        assert f"pfn0.{name}: {is_now} of the page that stands for all, {is_now + more} of page {at}" in differences(
            both, (0, at))


def test_differences_are_told_in_the_order_in_which_pages_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    both = lent(SCENE)
    (one, first), (other, second) = another(both), another(both, by=2)
    with frame_of(first, monkeypatch, owner=7, lock=9), frame_of(second, monkeypatch, owner=8):
        told = differences(both, (0, other), (0, one))
    assert [line.rsplit(" ", 1)[1] for line in told] == [str(other), str(one), str(one)]
    names = [line.partition(":")[0].partition(".")[2] for line in told[1:]]
    assert names == sorted(names, key=[*st.FRAME_FIELDS].index)


@pytest.mark.parametrize(("stands", "has", "told"), [
    ({}, {}, False), ({}, {"stale": 1}, True), ({}, {"gstale": 1}, True), ({"stale": 1}, {"stale": 1}, False),
    ({"gstale": 1}, {"gstale": 1}, False), ({"stale": 1, "gstale": 1}, {}, False), ({"stale": 1}, {"gstale": 2}, True),
])
def test_a_page_in_a_tlb_has_to_be_watched(
    stands: dict[str, int], has: dict[str, int], told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    both, none = lent(SCENE), {"stale": 0, "gstale": 0}
    at, pa = another(both)
    with (frame_of(both.host.machine.watched[0], monkeypatch, **{**none, **stands}),
          frame_of(pa, monkeypatch, **{**none, **has})):
        assert differences(both, (0, at)) == (
            [f"pfn0: page {at} is in a TLB, and the page that stands for all is not"] if told else [])


def test_what_leads_into_the_middle_of_a_half_leads_astray(monkeypatch: pytest.MonkeyPatch) -> None:
    both = lent(SCENE)
    before = seen(both)
    machine = both.host.machine
    monkeypatch.setattr(type(machine), "stale_guest_gfn", lambda _machine, _vm, pa: Gfn(spot(both) + 1))
    after = seen(both)
    assert {name for name in after if after[name] != before[name]} == {f"pfn{frame}.gstale" for frame in range(
        len(machine.watched))}
    assert after["pfn0.gstale"] == ASTRAY + 1


@pytest.mark.parametrize("by", [1, 100])
def test_an_entry_of_the_vmm_at_another_page_of_a_half_is_seen(by: int, monkeypatch: pytest.MonkeyPatch) -> None:
    both = lent(SCENE)
    wrong, first = (spot(both) + by) % SHARE, both.host.machine.watched[0]
    low, high = first - 7 * PAGE, both.host.machine.watched[1] + 7 * PAGE
    mapping = SimpleNamespace(vmas=[], lookup=lambda _index: None)
    monkeypatch.setattr(both.host.inode, "mapping", mapping)
    for present in ({256: low, wrong: first, 300: high}, {wrong: first, 300: low}, {300: low, wrong: first}):
        mapping.present = present
        assert seen(both)["pfn0.user"] == ASTRAY + 1
    mapping.present = {256: low, 300: high}
    assert seen(both)["pfn0.user"] == 0


def test_entries_are_those_of_the_pages_that_stand_for_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    both = lent(SCENE)
    asked: set[tuple[str, int]] = set()
    right = type(both.host.inode).entry

    def noted(inode: Any, tree: str, index: int) -> int:
        asked.add((tree, index))
        return right(inode, tree, index)

    monkeypatch.setattr(type(both.host.inode), "entry", noted)
    seen(both)
    of_pages, of_gfns = ("attributes", "bindings"), ("provided", "memslots", "gmem_files")
    at, sizes = spot(both), both.world.machine.sizes
    assert asked == {*((tree, page * SHARE + at) for tree in of_pages for page in range(sizes.pages)),
                     *((tree, gfn * SHARE + at) for tree in of_gfns for gfn in range(sizes.gfns))}

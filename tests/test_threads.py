"""Threads that explore a scenario together: nothing is entered twice, nothing is lost, whoever is faster."""

from __future__ import annotations

from functools import reduce
from operator import and_
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guest_memfd import check

pytest.importorskip("numba", reason="pip install 'guest-memfd[fast]'")

import numpy as np

from guest_memfd.explore.engine.compiled import load, rows, search, threads
from guest_memfd.explore.suite import check as suite

SLOTS = 32
ROWS = st.lists(st.integers(0, 40), max_size=18)
"""Few slots and few values: much is equal, and much probes over the end of a part."""


def hash_of(value: int) -> int:
    """What is no hash at all: neighbours meet, and the upper half is the same for many."""
    return value % 7 << 32 | value * 3 % SLOTS


def table_of(values: list[int], loops: Any) -> tuple[Any, Any]:
    """Rows of these values, all different, and a table that they have been entered in one by one."""
    rows, table = np.array(values, np.uint64).reshape(-1, 1), np.zeros(SLOTS, np.uint64)
    hashes, slots = np.array([hash_of(value) for value in values], np.uint64), np.zeros(len(values), np.int64)
    loops.enter_left(rows, hashes, np.zeros((len(values), 2), np.int64), np.arange(len(values)), 0, table, slots)
    return rows, table


@settings(max_examples=300, deadline=None)
@given(st.lists(ROWS, min_size=1, max_size=3), st.integers(1, 5), st.randoms(use_true_random=False))
def test_of_equal_rows_the_first_is_entered(made: list[list[int]], parts: int, random: Random) -> None:
    """And who is awake in one of them is awake in that one."""
    loops, each = load.threaded(), max(map(len, made)) + 1
    values = np.full((len(made) * each, 1), 99, np.uint64)
    for t, some in enumerate(made):
        values[t * each:t * each + len(some), 0] = some
    hashes = np.array([hash_of(int(value)) for value in values[:, 0]], np.uint64)
    many, slots, table = np.array([len(some) for some in made]), np.full(len(values), -7), np.zeros(SLOTS, np.uint64)
    ends = np.linspace(0, SLOTS, parts + 1).astype(np.int64)
    left = np.zeros((parts, len(values)), np.int64)
    order = [j for t, some in enumerate(made) for j in range(t * each, t * each + len(some))]
    if len({int(values[j, 0]) for j in order}) > SLOTS * 0.6:
        return
    by = np.array([[0, random.randrange(8)] for _ in values])
    asleep = by[:, 1].tolist()
    # The last part first: which comes first makes no difference.
    some = [(part, loops.enter(values, hashes, by, many, each, 0, table, ends[part], ends[part + 1], slots, left[part],
                               np.zeros(3, np.int64)))
            for part in reversed(range(parts))]
    loops.enter_left(values, hashes, by, np.concatenate([left[part, :n] for part, n in reversed(some)]), 0, table, slots)
    first: dict[int, int] = {}
    for j in order:
        first.setdefault(int(values[j, 0]), j)
    assert [j for j in order if slots[j] >= 0] == sorted(first.values())
    for value, j in first.items():
        assert by[j, 1] == reduce(and_, [asleep[k] for k in order if values[k, 0] == value])
    assert {int(entry & 0xFFFFFFFF) - 1 for entry in table if entry} == {*first.values()}
    assert all(load.loops("numba").find(values, values, j, hashes[j], table) >= 0 for j in order)


@settings(max_examples=100, deadline=None)
@given(st.sets(st.integers(0, 200), max_size=18), st.integers(1, 4))
def test_a_table_that_is_made_anew_has_all_rows(values: set[int], number: int) -> None:
    numba, some = load.loops("numba"), np.zeros(3, np.uint64)
    rows, table = np.array(sorted(values), np.uint64).reshape(-1, 1), np.zeros(SLOTS, np.uint64)
    ends, left = np.linspace(0, SLOTS, number + 1).astype(np.int64), np.zeros((number, len(values)), np.int64)
    for part in range(number):
        for i in left[part, :numba.rehash_part(rows, len(rows), table, ends[part], ends[part + 1], left[part], some)]:
            numba.enter_again(rows, i, table)
    assert sorted(int(entry & 0xFFFFFFFF) - 1 for entry in table if entry) == [*range(len(rows))]
    assert all(numba.find(rows, rows, i, np.uint64(numba.hash_of(rows, i)), table) == i for i in range(len(rows)))


def test_what_is_a_row_already_is_found() -> None:
    numba = load.loops("numba")
    rows, table = table_of([3, 10, 17, 24], load.threaded())
    made = np.array([[10], [11], [24], [31]], np.uint64)
    assert [numba.find(rows, made, j, np.uint64(hash_of(int(made[j, 0]))), table) for j in range(4)] == [1, -1, 3, -1]


@pytest.mark.parametrize("left", [0, threads.LEFT])
def test_whoever_has_no_room_goes_on_later(left: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither for rows, nor (0) for those that are left when the table is made anew, which one thread does then."""
    one = check("library", "pkvm", parties=["vcpu", "vmm2"], engine="compiled", jobs=1)
    calls: list[int] = []
    expand = threads.Threads.expand

    def noted(self: Any, queue: Any, base: int, moved: Any) -> Any:
        ended = expand(self, queue, base, moved)
        calls.append(len(ended[2]))
        return ended

    monkeypatch.setattr(threads.Threads, "expand", noted)
    monkeypatch.setattr(threads, "MADE", 0)
    monkeypatch.setattr(threads, "LEFT", left)
    monkeypatch.setattr(rows, "FEW", 16)
    monkeypatch.setattr(search, "FEW", 1)
    monkeypatch.setattr(suite, "jobs_for", lambda _jobs: 2)
    two = check("library", "pkvm", parties=["vcpu", "vmm2"], engine="compiled", jobs=2)
    assert len(calls) > 30
    assert (two.states, two.transitions, two.verdict) == (one.states, one.transitions, one.verdict)
    assert any(calls)


def test_a_thread_that_fails_is_told_and_one_explores(monkeypatch: pytest.MonkeyPatch) -> None:
    def no() -> Any:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(threads, "threaded", no)
    monkeypatch.setattr(suite, "jobs_for", lambda _jobs: 2)
    with pytest.warns(match="several threads do not work here, one explores: RuntimeError: no compiler"):
        assert check("none", "kvm", parties=["vcpu", "vmm2"], engine="compiled", jobs=2).states > 50


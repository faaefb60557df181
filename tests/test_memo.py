"""The memo of walks: it says what the walk would say, and forgets in time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("numba", reason="pip install 'guest-memfd[fast]'")

import numpy as np

from guest_memfd.explore.engine.compiled import loops_numba, loops_trees, memo
from guest_memfd.explore.engine.compiled.encoding import StepTables
from guest_memfd.explore.engine.compiled.flat import Flat, FlatWay
from guest_memfd.explore.engine.compiled.memo import Memo
from guest_memfd.explore.engine.compiled.rows import Rows

BYTES = 4
State = tuple[int, ...]


class Tree:
    """One party at one place. What it looks at after byte 0 is up to *turn*; a leaf changes what it looked at last."""

    def __init__(self, turn: Sequence[Sequence[int]], size: int) -> None:
        self.turn = turn
        self.flat = Flat(bytes(BYTES), loops_numba)
        self.number = self.flat.add_tree()
        self.rows = Rows(self.flat, 1, loops_numba)
        self.memo = Memo(size, 1)
        self.values = 1

    def learn(self, values: int) -> None:
        """Bytes can have *values* values from now on."""
        flat, before, self.values = self.flat, self.values, values
        flat.learn((at, value) for at in range(BYTES) for value in range(values))
        flat.make_room()
        known: set[tuple[tuple[int, int], ...]] = set()
        for state in product(range(values), repeat=BYTES):
            path = tuple((at, state[at]) for at in (0, *self.turn[state[0]]))
            if path not in known and max(state[at] for at, _ in path) >= before - (before == 1):
                known.add(path)
                at, value = path[-1]
                flat.add(self.number, 0, path, [FlatWay(0, [(at, value, (value + 1) % values)], 0, path)])
        flat.put()

    def place(self, states: Sequence[State]) -> None:
        """Let the rows be *states*."""
        rows, flat = self.rows, self.flat
        rows.keep_up()
        for way in flat.leaf_of:
            rows.make_room(way, [0])
        self.rows.rows = np.zeros((len(states), len(rows.used)), np.uint64)
        rows.count[0] = len(states)
        for i, state in enumerate(states):
            for at, value in enumerate(state):
                for part in flat.parts[at]:
                    loops_trees.flip(rows.rows, i, rows.room[part.number], np.uint64(part.of(flat.codes[at][value])))

    def wrong(self) -> list[int]:
        """The rows of which the memo says something else than a walk does, or than the path that they are on."""
        rows, flat = self.rows, self.flat
        lookup = StepTables(flat.trees, rows.room, rows.places, np.zeros(1, np.int64), self.memo.looks, self.memo.entries)
        found = []
        for i, state in enumerate(rows.states(rows.rows[:len(rows)]).tolist()):
            d, _ = loops_trees.leaf(0, self.number, 0, rows.rows, i, lookup)
            walked, _ = loops_trees.walk(self.number, 0, rows.rows, i, flat.trees, rows.room)
            way, _ = loops_trees.ways_of(walked)
            assert flat.payload[way] == tuple((at, state[at]) for at in (0, *self.turn[state[0]]))
            if d != walked:
                found.append(i)
        return found


@pytest.fixture
def early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Walks are remembered from the first row on."""
    monkeypatch.setattr(memo, "FEW", 0)


def states(values: int) -> Any:
    return st.lists(st.tuples(*[st.integers(0, values - 1)] * BYTES), min_size=1, max_size=60)


TURN = st.lists(st.permutations(range(1, BYTES)).flatmap(lambda order: st.integers(1, BYTES - 1).map(
    lambda many: order[:many])), min_size=5, max_size=5)


@pytest.mark.usefixtures("early")
@settings(max_examples=30, deadline=None)
@given(TURN, st.sampled_from([1, 4, 1024]), states(2), states(2), states(5))
def test_it_says_what_the_walk_says(
    turn: list[list[int]], size: int, first: list[State], second: list[State], third: list[State]
) -> None:
    """In few entries and in many, for new rows, and where bytes get values that their parts cannot tell."""
    tree = Tree(turn, size)
    steps: list[Callable[[], None]] = [
        lambda: tree.learn(2), lambda: tree.place(first), lambda: tree.place(second), lambda: tree.learn(5),
        lambda: tree.place(third)]
    for step in steps:
        step()
        tree.memo.keep_up(tree.rows)
        assert not tree.wrong()


@pytest.mark.usefixtures("early")
def test_one_that_does_not_forget_is_wrong() -> None:
    """That the other test can fail: a byte has one more part, and the memo does not look at it."""
    tree = Tree([[1]] * 5, 1024)
    tree.learn(2)
    tree.place([(0, 0, 0, 0)])
    tree.memo.keep_up(tree.rows)
    assert not tree.wrong()
    tree.learn(5)
    tree.place([(0, 0, 0, 0), (0, 4, 0, 0)])
    assert tree.wrong() == [1]
    tree.memo.keep_up(tree.rows)
    assert not tree.wrong()


def test_few_rows_are_walked_down() -> None:
    tree = Tree([[1]] * 5, 1024)
    tree.learn(2)
    tree.place([(0, 0, 0, 0)])
    tree.memo.keep_up(tree.rows)
    assert len(tree.memo.entries) == 0
    assert not tree.wrong()

"""The footprint trees of a world as arrays, which a compiled loop can walk.

Bytes of the host's state become *codes*, numbered as values appear: the value of the initial state is 0. The code of a byte
is cut into *parts*, some bits each. A byte that has had one value only has no part; one that gets more values than its parts
can tell is given one more. So codes that were written before stay right, and only nodes have to be made again.

A way changes the bytes that its step has looked at, and the leaf fixes their values: what it changes is a constant, one
exclusive-or for each part.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from guest_memfd.explore.engine.compiled.encoding import (
    BASE_SHIFT,
    BREAKS,
    FIRST_PARTY,
    KIND_BITS,
    LEAF,
    MISSING,
    PART_MASK,
    TOUCHED,
    VISIBLE,
)

Array = Any
"""An array of numpy, which is checked without numpy, too."""

Path = Sequence[tuple[int, int]]
"""The bytes that were looked at, in their order, and their values."""

SLACK = 1
"""Bits that a further part has more than it needs at once."""

VALUES = 256
"""Values of a byte."""

BITS = 8
"""Parts that a byte has at most."""


class TooWide(Exception):  # noqa: N818 - the other engine goes on
    """A state that has more parts, or more words, than the loops have numbers for."""


class Part(NamedTuple):
    """Bits [at, at + width) of the code of a byte."""

    number: int
    at: int
    width: int

    def of(self, code: int) -> int:
        """These bits of *code*."""
        return code >> self.at & (1 << self.width) - 1


class FlatWay(NamedTuple):
    """Where a step leads: exclusive-or of the place, (byte, old, new) that change, flags, and what it was made of."""

    place: int
    change: Sequence[tuple[int, int, int]]
    flags: int
    payload: Any


class Trees(NamedTuple):
    """The arrays, as the loops take them.

    first: of each way its first part in *part*, and one past the last way. touched: of each leaf, at its first way, the
    bytes that it looks at, and those that it changes. halts: the bytes by which a machine that has stopped is told.
    """

    root: Array
    child: Array
    first: Array
    part: Array
    xor: Array
    place: Array
    flag: Array
    touched: Array
    halts: Array


class Leaves:
    """What has been learned, in arrays: of each leaf its tree, place and word, and where its path ends in *path*."""

    def __init__(self) -> None:
        self.leaf, self.path = np.zeros((1 << 8, 4), np.int64), np.zeros((1 << 10, 2), np.int64)
        self.count = self.steps = 0

    def add(self, tree: int, place: int, word: int, path: Sequence[tuple[int, int]]) -> int:
        """The number of a new leaf; *path*: bytes and their codes."""
        number, self.count, before = self.count, self.count + 1, self.steps
        self.steps += len(path)
        while self.count >= len(self.leaf):
            self.leaf = _doubled(self.leaf)
        while self.steps > len(self.path):
            self.path = _doubled(self.path)
        if path:
            self.path[before:self.steps] = path
        # The path of a leaf begins where that of the one before ends.
        self.leaf[number], self.leaf[number + 1, 3] = (tree, place, word, before), self.steps
        return number


class Flat:
    """The trees, one for each party and the judgements of `encoding`. A tree has a root for each place.

    loops: the module that has `put` (loops_numba, loops_numpy).
    """

    def __init__(self, initial: bytes, loops: Any) -> None:
        self.initial, self.loops = initial, loops
        self.codes: list[dict[int, int]] = [{value: 0} for value in initial]
        self.values = np.zeros((len(initial), VALUES), np.uint8)            # by byte and code
        self.values[:, 0] = np.frombuffer(initial, np.uint8)
        self.parts: list[list[Part]] = [[] for _ in initial]
        self.of_part: list[tuple[int, Part]] = []
        self.payload: list[Any] = []
        self.leaf_of: dict[int, int] = {}               # the first way of a leaf -> how many it has
        self.most = 1                                   # ways of the leaf that has most
        self.fields = np.zeros((1 << 6, 3), np.int64)   # of each part: byte, shift, width
        self._parts = np.zeros((len(initial), 1 + BITS), np.int64)          # of each byte: how many, and their numbers
        self._root = np.zeros((FIRST_PARTY, 16), np.uint64)
        self._child, self._children = np.zeros(1 << 12, np.uint64), np.zeros(1, np.int64)
        self._first, self._place = np.zeros(1 << 10, np.int64), np.zeros(1 << 10, np.int64)
        self._flag = np.zeros(1 << 10, np.uint8)
        self._touched, self._halts = np.zeros((1 << 10, 2 * TOUCHED), np.uint64), np.zeros((1, TOUCHED), np.uint64)
        self._part, self._xor, self._changes = np.zeros(1 << 11, np.int64), np.zeros(1 << 11, np.uint64), 0
        self._leaves = Leaves()
        self._at: dict[tuple[int, int], list[int]] = {}  # (tree, place) -> its leaves
        self._new: list[int] = []                       # leaves that are in no tree yet
        self._looks_at: dict[tuple[int, int], int] = {}  # a mask of bytes
        self._outgrown: set[int] = set()                # bytes that have got a value
        self._changed_by: list[list[int]] = [[] for _ in initial]       # per byte the ways that change it
        self._visible = 0                               # a mask of the bytes that laws on states look at

    @property
    def trees(self) -> Trees:
        """As they are now: what is added may move them."""
        return Trees(self._root, self._child, self._first, self._part, self._xor, self._place, self._flag, self._touched,
                     self._halts)

    def add_tree(self) -> int:
        """The number of a new tree."""
        self._root = np.concatenate([self._root, np.zeros_like(self._root[:1])])
        return len(self._root) - 1

    def learn(self, values: Iterable[tuple[int, int]]) -> None:
        """These bytes can have these values; `make_room` must follow."""
        for at, value in values:
            codes = self.codes[at]
            if value not in codes:
                self.values[at, len(codes)] = value
                codes[value] = len(codes)
                self._outgrown.add(at)

    def make_room(self) -> None:
        """Bytes that have more values than their parts can tell get one more; nodes that look at them are made again."""
        grown = 0
        for at in sorted(self._outgrown):
            room = sum(part.width for part in self.parts[at])
            more = (len(self.codes[at]) - 1).bit_length() - room
            if more > 0:
                self._add_part(at, Part(len(self.of_part), room, more + SLACK if room else more))
                grown |= 1 << at
        self._outgrown.clear()
        for key, mask in self._looks_at.items() if grown else ():
            # The whole tree is made again from its leaves. Its old nodes stay
            # where they are: nobody comes to them any more.
            if mask & grown:
                self._root[key] = MISSING
                self._new += self._at[key]

    def _add_part(self, at: int, part: Part) -> None:
        if part.number > PART_MASK:
            raise TooWide("the state of the host changes in too many bytes")
        self.parts[at].append(part)
        self.of_part.append((at, part))
        if part.number == len(self.fields):
            self.fields = _doubled(self.fields)
        self.fields[part.number] = at, part.at, part.width
        self._parts[at, 0] += 1
        self._parts[at, self._parts[at, 0]] = part.number

    def add(self, tree: int, place: int, path: Path, ways: Sequence[FlatWay]) -> None:
        """A leaf below *path*, all values of which have been learned; `put` must follow."""
        first = len(self.payload)
        self.most = max(self.most, len(ways))
        for way in ways:
            self._add_way(way)
        if ways:
            self.leaf_of[first] = len(ways)
        self._reach(max([place, *(place ^ way.place for way in ways)]))
        key, mask, codes = (tree, place), 0, []
        for at, value in path:
            mask |= 1 << at
            codes.append((at, self.codes[at][value]))
        number = self._leaves.add(tree, place, LEAF | len(ways) << KIND_BITS | first << BASE_SHIFT, codes)
        self._at.setdefault(key, []).append(number)
        self._new.append(number)
        self._looks_at[key] = self._looks_at.get(key, 0) | mask
        if tree == BREAKS:
            self._see(mask)

    def put(self) -> None:
        """Put all leaves that are in no tree into theirs."""
        which, at, leaves = np.array(self._new, np.int64), 0, self._leaves
        self._new.clear()
        while at < len(which):
            at = self.loops.put(which, at, leaves.leaf, leaves.path, self._parts, self.fields, self._root.view(np.int64),
                                self._child.view(np.int64), self._children, self._first, self._part, self._touched,
                                self._halts)
            if at < len(which):
                self._child = _doubled(self._child)

    def _see(self, bytes_: int) -> None:
        for at, ways in enumerate(self._changed_by):
            # What was entered without a judgement before needs none now. The state before it was judged by then (a level
            # ends when nothing is put aside), and a law that has looked at none of the changed bytes says the same of
            # both.
            if bytes_ & ~self._visible & 1 << at:
                self._flag[ways] |= VISIBLE
        self._visible |= bytes_

    def _add_way(self, way: FlatWay) -> None:
        at, flags = len(self.payload), way.flags
        if at + 1 == len(self._first):
            self._first, self._place, self._flag, self._touched = map(
                _doubled, (self._first, self._place, self._flag, self._touched))
        for byte, old, new in way.change:
            self._changed_by[byte].append(at)
            flags |= VISIBLE * (self._visible >> byte & 1)
            change = self.codes[byte][old] ^ self.codes[byte][new]
            for part in self.parts[byte]:
                if bits := part.of(change):
                    if self._changes == len(self._part):
                        self._part, self._xor = _doubled(self._part), _doubled(self._xor)
                    self._part[self._changes], self._xor[self._changes] = part.number, bits
                    self._changes += 1
        self._first[at + 1], self._place[at], self._flag[at] = self._changes, way.place, flags
        self.payload.append(way.payload)

    # The loops look places up without asking whether there are so many.
    def _reach(self, place: int) -> None:
        while place >= self._root.shape[1]:
            self._root = np.concatenate([self._root, np.zeros_like(self._root)], axis=1)


def _doubled(array: Array) -> Array:
    return np.concatenate([array, np.zeros_like(array)])

"""A map from page-aligned addresses to values, kept as ranges. A query costs the depth of a tree.

A radix tree of four levels with the fan-out of a 4K page table (512G, 1G, 2M, 4K), as the hypervisor's own memory
database is a radix tree (hyp/mem/memdb_gpt). A node stores what most of it is and the exceptions; a node that has become
uniform disappears. So a machine of 1 TiB in one hand is one value, 1 GiB blocks are one value each, and a page among a
million scattered ones is found in four steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

from guest_memfd.words.units import PAGE, Unit

T = TypeVar("T")

_FANOUT_BITS = 9
_FANOUT = 1 << _FANOUT_BITS
_TOP_SHIFT = 39


class _Node(Generic[T]):
    __slots__ = ("other", "rest", "shift")

    def __init__(self, shift: int, rest: T) -> None:
        self.shift, self.rest = shift, rest
        self.other: dict[int, T | _Node[T]] = {}

    def put(self, index: int, value: T) -> None:
        if value == self.rest:
            self.other.pop(index, None)
        else:
            self.other[index] = value

    # The node one level down that stands for *index*; made when it is not there.
    def below(self, index: int) -> _Node[T]:
        child = self.other.get(index, self.rest)
        if not isinstance(child, _Node):
            child = self.other[index] = _Node(self.shift - _FANOUT_BITS, child)
        return child

    # Every index is an exception, and they all agree: then that is the rest.
    def settle(self) -> None:
        if len(self.other) == _FANOUT:
            first = next(iter(self.other.values()))
            if not isinstance(first, _Node) and all(value == first for value in self.other.values()):
                self.rest, self.other = first, {}

    def set(self, start: int, end: int, value: T) -> None:
        shift = self.shift
        at = start
        while at < end:
            index = at >> shift
            base = index << shift
            stop = min(end, base + (1 << shift))
            if stop - at == 1 << shift:
                self.put(index, value)
            elif self.other.get(index, self.rest) != value:
                child = self.below(index)
                child.set(at - base, stop - base, value)
                # The child has become uniform: it gives way to one value, so that the map of a machine stays small
                # however often pages move.
                if not child.other:
                    self.put(index, child.rest)
            at = stop
        self.settle()

    def runs(self, start: int, end: int, base: int) -> Iterator[tuple[Any, Any, T]]:
        shift = self.shift
        first, last = start >> shift, (end - 1) >> shift
        # Only the exceptions are gone through; between them everything has the value of the rest.
        inside = [first] if first == last else sorted(i for i in self.other if first <= i <= last)
        at = start
        for index in inside:
            low, high = max(start, index << shift), min(end, (index + 1) << shift)
            if at < low:
                yield base + at, base + low, self.rest
            child = self.other.get(index, self.rest)
            if isinstance(child, _Node):
                below = index << shift
                yield from child.runs(low - below, high - below, base + below)
            else:
                yield base + low, base + high, child
            at = high
        if at < end:
            yield base + at, base + end, self.rest


class RangeMap(Generic[T]):
    """Addresses 0..2^48 to values, all of them *default* at first. Bounds are bytes, multiples of 4 KiB."""

    def __init__(self, default: T) -> None:
        self._root: _Node[T] = _Node(_TOP_SHIFT, default)

    def get(self, at: Unit) -> T:
        """The value at one address."""
        node = self._root
        while True:
            child = node.other.get(at >> node.shift & _FANOUT - 1, node.rest)
            if not isinstance(child, _Node):
                return child
            node = child

    def set(self, start: Unit, end: Unit, value: T) -> None:
        """Give [start, end) a value."""
        self._root.set(start, end, value)

    def update(self, start: Unit, end: Unit, change: Callable[[T], T]) -> None:
        """Replace every value in [start, end) by what *change* makes of it."""
        for low, high, value in list(self.runs(start, end)):
            self.set(low, high, change(value))

    def runs(self, start: Unit, end: Unit) -> Iterator[tuple[Unit, Unit, T]]:
        """[start, end) as maximal ranges of one value, in order: (start, end, value)."""
        if end - start == PAGE:
            yield start, end, self.get(start)
            return
        low = high = start
        current: T | None = None
        for begin, stop, value in self._root.runs(start, end, 0):
            if low < high and value == current:
                high = stop
                continue
            if low < high:
                yield low, high, current  # type: ignore[misc]
            low, high, current = begin, stop, value
        if low < high:
            yield low, high, current  # type: ignore[misc]

    def only(self, start: Unit, end: Unit, value: T) -> bool:
        """Whether all of [start, end) has this value."""
        return all(found == value for _, _, found in self.runs(start, end))

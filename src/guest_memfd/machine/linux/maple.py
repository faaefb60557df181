"""A maple tree of small integers: ranges of page indexes, each with a value that is constant or counts up.

Cost follows the number of ranges, never the number of pages (lib/maple_tree.c). 0 is a hole.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import overload

from guest_memfd.compat import override
from guest_memfd.words.primitives import Entries

Run = tuple[int, int, int, int]
"""start, nr, value of the first, step."""


class Runs(Sequence[int]):
    """What a load returns: entries as runs. `count`, indexing and slicing cost one look at each run."""

    def __init__(self, runs: list[Run], start: int, nr: int) -> None:
        self._runs, self._start, self._nr = runs, start, nr

    @override
    def __len__(self) -> int:
        return self._nr

    @overload
    def __getitem__(self, at: int) -> int: ...

    @overload
    def __getitem__(self, at: slice) -> Runs: ...

    @override
    def __getitem__(self, at: int | slice) -> int | Runs:
        if isinstance(at, slice):
            first, last, _ = at.indices(self._nr)
            return Runs(_clip(self._runs, self._start + first, max(last - first, 0)), self._start + first,
                        max(last - first, 0))
        if not -self._nr <= at < self._nr:
            raise IndexError(at)
        index = self._start + at % self._nr
        found = bisect_right(self._runs, index, key=_start) - 1
        if found < 0:
            return 0
        start, nr, value, step = self._runs[found]
        return value + (index - start) * step if index < start + nr else 0

    @override
    def __iter__(self) -> Iterator[int]:
        at = self._start
        for start, nr, value, step in self._runs:
            yield from (0 for _ in range(at, start))
            yield from (value + i * step for i in range(nr))
            at = start + nr
        yield from (0 for _ in range(at, self._start + self._nr))

    @override
    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(other) == self._nr and all(
            a == b for a, b in zip(self, other, strict=True))

    @override
    def __hash__(self) -> int:
        return hash(tuple(self))

    @override
    def count(self, value: int) -> int:
        """How many entries are *value*; holes are 0."""
        in_runs = sum(_hits(run, value) for run in self._runs)
        return in_runs if value else self._nr - sum(run[1] for run in self._runs) + in_runs


    def ends(self) -> tuple[int, int] | None:
        """The least and the largest entry that is no hole; None if all are."""
        both = [value for _, nr, first, step in self._runs for value in (first, first + step * (nr - 1)) if value]
        return (min(both), max(both)) if both else None


def _start(run: Run) -> int:
    return run[0]


def _hits(run: Run, value: int) -> int:
    _, nr, first, step = run
    if not step:
        return nr if first == value else 0
    at, rest = divmod(value - first, step)
    return int(not rest and 0 <= at < nr)


def _clip(runs: list[Run], start: int, nr: int) -> list[Run]:
    clipped = []
    for at, length, value, step in runs:
        first, last = max(at, start), min(at + length, start + nr)
        if first < last:
            clipped.append((first, last - first, value + (first - at) * step, step))
    return clipped


class MapleTree:
    """index -> small integer."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._runs: list[Run] = []

    def load(self, start: int, nr: int) -> Runs:
        """The entries of [start, start+nr)."""
        return Runs(self._touching(start, nr), start, nr)

    def _touching(self, start: int, nr: int) -> list[Run]:
        first, last = self._span(start, nr)
        return _clip(self._runs[first:last], start, nr)

    # Which runs have anything in [start, start+nr).
    def _span(self, start: int, nr: int) -> tuple[int, int]:
        # A run that starts earlier may still reach into the range.
        first = bisect_right(self._starts, start) - 1
        if first < 0 or self._runs[first][0] + self._runs[first][1] <= start:
            first += 1
        return first, max(first, bisect_right(self._starts, start + nr - 1))

    def store(self, start: int, values: Entries) -> None:
        """Replace the entries of [start, start+len(values)); a value of 0 erases."""
        nr = len(values)
        if not nr:
            return
        first, last = self._span(start, nr)
        old = self._runs[first:last]
        # At most one run sticks out on the left and one on the right: those parts stay, and what is between is
        # replaced.
        new = [run for run in old if run[0] < start]
        new = _clip(new, new[0][0], start - new[0][0]) if new else []
        if values.first or values.step:
            new.append((start, nr, values.first, values.step))
        new += _clip(old, start + nr, max((r[0] + r[1] for r in old), default=0) - start - nr)
        self._runs[first:last] = new
        self._starts[first:last] = [run[0] for run in new]
        # With its neighbours, so that the number of ranges does not depend on the order of the stores.
        self._merge(max(first - 1, 0), first + len(new) + 1)

    # Neighbours that go on as the one before them become one range.
    def _merge(self, first: int, last: int) -> None:
        at = first
        while at + 1 < min(last, len(self._runs)):
            (start, nr, value, step), (start2, nr2, value2, step2) = self._runs[at:at + 2]
            goes_on = start + nr == start2 and step == step2 and value + nr * step == value2
            if goes_on:
                self._runs[at:at + 2] = [(start, nr + nr2, value, step)]
                del self._starts[at + 1]
                last -= 1
            else:
                at += 1

    def nodes(self) -> int:
        """How many ranges there are."""
        return len(self._runs)

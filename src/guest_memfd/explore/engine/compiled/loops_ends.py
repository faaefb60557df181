"""The inner loops that find the rows from which no end is reached, compiled by numba (search.py: `_cannot_end`).

Theory of operation. `ends` has a byte for each row: 1 if an end is known to be reached from there. A row from which no one
moves is an end, and a row with a step to one that has a 1 gets a 1 (`clear`), until nothing changes; what is left cannot
end. Where a party goes round, a row of the last rounds leads to the end by way of rows that were found long before it, and
going through all rows once for each way back takes longer than exploring. So walkers go first (`walk_to_ends`): from a row
that has no 1 a walker takes any step, and the next, until it comes to a 1; then all of its path gets one. It does not step
to where a walker has been (2); where no step is left, it goes back one. What it gives up is left to `clear`, so nothing
hangs on where walkers go, nor on whether a 2 of one thread comes over a 1 of another. There are many walkers, and they step
together: each step waits for memory, and so they wait together.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from guest_memfd.explore.engine.compiled import encoding as enc
from guest_memfd.explore.engine.compiled.jit import allocating, compiled, inlined
from guest_memfd.explore.engine.compiled.loops_table import find, touch
from guest_memfd.explore.engine.compiled.loops_trees import I, hash_of, leaf, place_of, take, walk, ways_of

WALKERS = 64
"""Walkers of a thread."""

MOST = 16
"""Steps, for each row that walkers are to start from; then who has asked for them may want to stop."""

LONGEST = 256
"""Rows of a path; at its end a walker goes back."""


@allocating
def walk_to_ends(rows: Any, table: Any, lookup: Any, lo: Any, hi: Any, ends: Any) -> Any:
    """Set `ends` of nearly all rows [lo, hi) from which an end is reached, and of others; 2 where a walker gave up.

    Returns how many rows these are.
    """
    path, tried = np.empty((WALKERS, LONGEST), np.int64), np.empty((WALKERS, LONGEST), np.int64)
    made, hashes = np.empty((WALKERS, rows.shape[1]), np.uint64), np.empty(WALKERS + 1, np.uint64)
    length, who = np.zeros(WALKERS, np.int64), np.empty(WALKERS, np.int64)
    go(rows, table, lookup, lo, hi, ends, path, tried, length, made, hashes, who)
    return hi - lo


@compiled
def go(
    rows: Any, table: Any, lookup: Any, lo: Any, hi: Any, ends: Any, path: Any, tried: Any, length: Any, made: Any,
    hashes: Any, who: Any,
) -> None:
    """`walk_to_ends`. path, length: of each walker. tried: of each row on it, how many of its steps. The rest is scratch."""
    i, walking, steps = hi - 1, True, 0
    while walking:
        size = 0
        for k in range(len(length)):
            while length[k] == 0 and i >= lo:
                if ends[i] == 0:
                    ends[i] = 2
                    path[k, 0], tried[k, 0], length[k] = i, 0, 1
                i -= 1
            if length[k] > 0:
                at = length[k] - 1
                p, way = nth_step(rows, path[k, at], tried[k, at], lookup)
                if p < 0 and tried[k, at] == 0:
                    arrive(path, length, k, ends)
                elif p < 0:
                    length[k] -= 1
                else:
                    take(rows, path[k, at], made, size, way, p, lookup.trees, lookup.room, lookup.places)
                    hashes[size], who[size] = hash_of(made, size), k
                    size += 1
        touch(rows, table, hashes, size)
        for j in range(size):
            k, r = who[j], find(rows, made, j, hashes[j], table)
            tried[k, length[k] - 1] += 1
            if ends[r] == 1:
                arrive(path, length, k, ends)
            elif ends[r] == 0 and length[k] < path.shape[1]:
                ends[r] = 2
                path[k, length[k]], tried[k, length[k]] = r, 0
                length[k] += 1
        steps += len(length)
        walking = (i >= lo or length.any()) and steps < MOST * (hi - lo) + LONGEST * len(length)


@inlined
def arrive(path: Any, length: Any, k: Any, ends: Any) -> None:
    """Walker *k* has come to an end, from all rows of its path."""
    for at in range(length[k]):
        ends[path[k, at]] = 1
    length[k] = 0


@inlined
def nth_step(rows: Any, i: Any, n: Any, lookup: Any) -> Any:
    """(party, way) of step *n* from row *i*; (-1, -1) if there are not so many."""
    p, way = I(-1), I(-1)
    d, _ = walk(enc.HALTS, 0, rows, i, lookup.trees, lookup.room)
    first, last = ways_of(d)
    if first == last:
        for q in range(len(lookup.of)):
            d, _ = leaf(q, lookup.of[q], place_of(rows, i, lookup.places, q), rows, i, lookup)
            first, last = ways_of(d)
            if n < last - first:
                p, way = q, first + n
                break
            n -= last - first
    return p, way


@allocating
def clear(rows: Any, table: Any, lookup: Any, lo: Any, hi: Any, ends: Any) -> Any:
    """Set ends[i] of those rows [lo, hi) from which a step leads to a row with 1, or none; how many it was."""
    return clear_part(rows, table, lookup, lo, hi, ends, np.empty((1, rows.shape[1]), np.uint64))


@compiled
def clear_part(rows: Any, table: Any, lookup: Any, lo: Any, hi: Any, ends: Any, made: Any) -> Any:
    """`clear`. made: room for a row."""
    cleared = 0
    for i in range(hi - 1, lo - 1, -1):
        n = 0
        while ends[i] != 1:
            p, way = nth_step(rows, i, n, lookup)
            if p >= 0:
                take(rows, i, made, 0, way, p, lookup.trees, lookup.room, lookup.places)
                if ends[find(rows, made, 0, hash_of(made, 0), table)] == 1:
                    ends[i] = 1
            elif n == 0:
                ends[i] = 1
            else:
                break
            cleared += ends[i] == 1
            n += 1
    return cleared

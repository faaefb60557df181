"""The table of rows, for all loops that numba compiles: entering a row, finding it again, and making the table anew.

Theory of operation. `table` finds a row again. It is open addressing with steps of one; an entry has 32 bits of the hash
above and the number of the row, and one, below. Only rows whose 32 bits agree are compared, and they are compared in full:
two states are never taken for one. A word that is zero adds nothing to a hash, so rows may become wider while the search
runs. The table answers from memory that is in no cache, which takes longer than all else that is done for a row. So
successors are made in batches: first all are written behind the rows that are there, then the entries are touched, then the
rows that they point to, and only then is compared and entered. The touches do not wait for each other.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from guest_memfd.explore.engine.compiled import encoding as enc
from guest_memfd.explore.engine.compiled.jit import allocating, compiled, inlined
from guest_memfd.explore.engine.compiled.loops_trees import LOW, ONE, S32, ZERO, I, U, equal, hash_of


@inlined
def enter(rows: Any, n: Any, h: Any, table: Any) -> Any:
    """Enter row *n*, whose hash is *h*; the number of the row that equals it if there is one, else *n*."""
    mask = U(len(table) - 1)
    tag, slot = h >> S32, h & mask
    while True:
        e = table[slot]
        if e == ZERO:
            table[slot] = tag << S32 | U(n + 1)
            return n
        if e >> S32 == tag and equal(rows, I(e & LOW) - 1, rows, n):
            return I(e & LOW) - 1
        slot = (slot + ONE) & mask


@inlined
def find(rows: Any, made: Any, j: Any, h: Any, table: Any) -> Any:
    """The number of the row that row *j* of *made*, whose hash is *h*, equals; -1 if there is none."""
    mask = U(len(table) - 1)
    slot = h & mask
    while True:
        e = table[slot]
        if e == ZERO:
            return I(-1)
        if e >> S32 == h >> S32 and equal(rows, I(e & LOW) - 1, made, j):
            return I(e & LOW) - 1
        slot = (slot + ONE) & mask


@inlined
def touch(rows: Any, table: Any, hashes: Any, size: Any) -> None:
    """Look at all that *size* rows with these *hashes* will be compared with, before any of it is needed.

    The last of *hashes* is none: something is kept there, or the compiler would leave the looking out.
    """
    mask, touched = U(len(table) - 1), touch_entries(table, hashes, size)
    for j in range(size):
        e = table[hashes[j] & mask]
        # An empty entry looks like one of a hash whose upper half is zero, and has no row.
        if e != ZERO and e >> S32 == hashes[j] >> S32:
            touched ^= rows[(e & LOW) - ONE, 0]
    hashes[len(hashes) - 1] = touched


@inlined
def touch_entries(table: Any, hashes: Any, size: Any) -> Any:
    """Look at the entries that *size* rows with these *hashes* come to first; what is returned has to be kept."""
    mask, touched = U(len(table) - 1), ZERO
    for j in range(size):
        touched ^= table[hashes[j] & mask]
    return touched


@allocating
def rehash(rows: Any, n: Any, table: Any) -> None:
    """Enter the first *n* rows into the empty *table*."""
    left = np.empty(n, np.int64)
    for k in range(rehash_part(rows, n, table, 0, len(table), left, np.empty(enc.BATCH, np.uint64))):
        enter_again(rows, left[k], table)


@compiled
def rehash_part(rows: Any, n: Any, table: Any, lo: Any, hi: Any, left: Any, hashes: Any) -> Any:
    """Enter those of the first *n* rows that belong in table[lo:hi], which is empty; how many are *left*.

    Those are left whose probing would run over the end of the part; *left* has as many of them as it has room for. hashes:
    room for a batch.
    """
    mask, k = U(len(table) - 1), 0
    for base in range(0, n, len(hashes)):
        size = min(len(hashes), n - base)
        for j in range(size):
            hashes[j] = hash_of(rows, base + j)
        touched = touch_entries(table, hashes, size)
        for j in range(size):
            h = hashes[j]
            at = I(h & mask)
            if lo <= at < hi:
                while at < hi and table[at] != ZERO:
                    at += 1
                if at < hi:
                    table[at] = h >> S32 << S32 | U(base + j + 1)
                else:
                    if k < len(left):
                        left[k] = base + j
                    k += 1
        hashes[0] = touched                             # or the compiler would leave it out
    return k


@compiled
def enter_again(rows: Any, i: Any, table: Any) -> None:
    """Enter row *i*, to which none that is there is equal."""
    mask, h = U(len(table) - 1), hash_of(rows, i)
    slot = h & mask
    while table[slot] != ZERO:
        slot = (slot + ONE) & mask
    table[slot] = h >> S32 << S32 | U(i + 1)

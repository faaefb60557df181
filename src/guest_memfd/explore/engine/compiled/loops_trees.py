"""Rows and trees, for all loops that numba compiles: how a part is read, where a step leads, and what is remembered of that.

Theory of operation. A product state is a row of 64-bit words: the places of the parties and the host's state, packed in
parts of a few bits. A part says how far a byte is from its initial value, so the first row is all zeros.

To take a step is to walk down a tree (encoding.py): each node names a part of the row and has a child for each value of it.
At the bottom is a leaf, with the ways that the step can end. A way is an exclusive-or of the row. The tree has looked at
every byte that the way changes, so the way is the same for all rows that come to that leaf.

A walk is ten nodes long, one of the laws forty, and each node waits for the one before. But some thousand leaves serve
millions of rows. So a *memo* remembers where walks have ended: a table in which a later walk takes the place of an earlier
one. An entry has whose walk it was and from which place, the leaf, and what the row had in *looks*: in those bits that any
walk from there has looked at, up to now. A row that has the same in all of them comes to the same leaf. Bits that are added
to *looks* later are zero in the entry, so a row that has anything else there finds nothing. What changes the bits that a
walk would look at (a part that gets room, a byte that gets one more part) must clear both (memo.py).

Only int64 and uint64 are used, and never mixed in one expression: numba would make a float of that. What indexes is unsigned
where a chain of loads waits for it: to a signed index numba adds the length of the array if it is negative.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from guest_memfd.explore.engine.compiled import encoding as enc
from guest_memfd.explore.engine.compiled.jit import compiled, inlined

U = np.uint64
I = np.int64  # noqa: E741
K0, K1, M = U(enc.MIX[0]), U(enc.MIX[1]), U(enc.MIX[2])
ZERO, ONE, NOWHERE, LOW, S29, S32 = U(0), U(1), U((1 << 64) - 1), U(0xFFFFFFFF), U(29), U(32)
KIND, KINDS, PARTS, BASE = U((1 << enc.KIND_BITS) - 1), U(enc.KIND_BITS), U(enc.PART_MASK), U(enc.BASE_SHIFT)
WORD, SHIFTED, SHIFT, MASKED = U(enc.WORD_MASK), U(enc.SHIFT_SHIFT), U(enc.SHIFT_MASK), U(enc.MASK_SHIFT)
IS_NODE, IS_LEAF, IS_MISSING, NOW_PENDING = U(enc.NODE), U(enc.LEAF), U(enc.MISSING), U(enc.PENDING)
PLACE, PLACE_MASK, PLACES = U(enc.PLACE_BITS), U((1 << enc.PLACE_BITS) - 1), U(2 * enc.PLACE_BITS)


@inlined
def hash_of(rows: Any, at: Any) -> Any:
    """The hash of row *at*."""
    h, k = ZERO, K0
    for w in range(rows.shape[1]):
        x = rows[at, w]
        h += (x ^ (x >> S29)) * k
        k *= K1
    h ^= h >> S32
    h *= M
    return h ^ (h >> S29)


@inlined
def equal(rows: Any, a: Any, others: Any, b: Any) -> Any:
    """Whether row *a* of *rows* and row *b* of *others* are."""
    differ = ZERO
    for w in range(rows.shape[1]):
        differ |= rows[a, w] ^ others[b, w]
    return differ == ZERO


@inlined
def read(rows: Any, i: Any, where: Any) -> Any:
    """What row *i* has at location *where*."""
    return (rows[i, where & WORD] >> ((where >> SHIFTED) & SHIFT)) & (where >> MASKED)


@inlined
def flip(rows: Any, i: Any, where: Any, bits: Any) -> None:
    """Change row *i* by *bits* at location *where*."""
    rows[i, where & WORD] ^= (bits & (where >> MASKED)) << ((where >> SHIFTED) & SHIFT)


@inlined
def place_of(rows: Any, i: Any, places: Any, p: Any) -> Any:
    """Where party *p* stands in row *i*."""
    return I(read(rows, i, places[p, 0]) | read(rows, i, places[p, 1]) << PLACE)


@compiled
def walk(tree: Any, place: Any, rows: Any, i: Any, trees: Any, room: Any) -> Any:
    """From a root down for row *i*: where it ends, and which child said so (NOWHERE: the root)."""
    root, children = trees.root, trees.child
    d, child = root[tree, place], NOWHERE
    while d & KIND == IS_NODE:
        child = (d >> BASE) + read(rows, i, room[(d >> KINDS) & PARTS])
        d = children[child]
    return d, child


@inlined
def leaf(who: Any, tree: Any, place: Any, rows: Any, i: Any, lookup: Any) -> Any:
    """What `walk` returns, from the memo if that has it. who: the party whose tree it is; for the laws one past the last."""
    looks, memo = lookup.looks, lookup.memo
    d, child, key, h, k = ZERO, NOWHERE, U(who + 1) << PLACES | U(place), ZERO, K0
    differ = ONE
    if len(memo) > 0:
        h = key * M
        for w in range(rows.shape[1]):
            x = rows[i, w] & looks[who, place, w]
            h += (x ^ (x >> S29)) * k
            k *= K1
        h = (h ^ (h >> S32)) & U(len(memo) - 1)
        differ = memo[h, 0] ^ key
        for w in range(rows.shape[1]):
            differ |= memo[h, enc.MEMO_HEAD + w] ^ (rows[i, w] & looks[who, place, w])
        d = memo[h, 1]
    if differ != ZERO:
        d, child = walk(tree, place, rows, i, lookup.trees, lookup.room)
        if len(memo) > 0 and d & KIND == IS_LEAF:
            remember(who, tree, place, rows, i, lookup, h, key, d)
    return d, child


@compiled
def remember(who: Any, tree: Any, place: Any, rows: Any, i: Any, lookup: Any, at: Any, key: Any, leaf_: Any) -> None:
    """Let entry *at* of the memo be the walk of row *i* to *leaf_*; `looks` gets the bits that it has looked at."""
    looks, memo = lookup.looks, lookup.memo
    d = lookup.trees.root[tree, place]
    while d & KIND == IS_NODE:
        where = lookup.room[(d >> KINDS) & PARTS]
        looks[who, place, where & WORD] |= (where >> MASKED) << ((where >> SHIFTED) & SHIFT)
        d = lookup.trees.child[(d >> BASE) + read(rows, i, where)]
    memo[at, 0], memo[at, 1] = key, leaf_
    for w in range(rows.shape[1]):
        memo[at, enc.MEMO_HEAD + w] = rows[i, w] & looks[who, place, w]


@compiled
def ask(tree: Any, place: Any, d: Any, child: Any, trees: Any) -> Any:
    """What is missing is asked for: ASKS, or WAITS if it has been."""
    if d != IS_MISSING:
        return I(enc.WAITS)
    if child == NOWHERE:
        trees.root[tree, place] = NOW_PENDING
    else:
        trees.child[child] = NOW_PENDING
    return I(enc.ASKS)


@inlined
def ways_of(d: Any) -> Any:
    """Of a leaf: the first way, and one past the last."""
    first = I(d >> BASE)
    return first, first + I((d & LOW) >> KINDS)


@inlined
def apart(a: Any, b: Any, trees: Any) -> Any:
    """Whether two leaves, known by their first ways, change nothing that the other one looks at, nor stop the machine."""
    common = ZERO
    for w in range(enc.TOUCHED):
        here, there = trees.touched[a, enc.TOUCHED + w], trees.touched[b, enc.TOUCHED + w]
        common |= (here & trees.touched[b, w]) | (there & trees.touched[a, w]) | ((here | there) & trees.halts[0, w])
    return common == ZERO


@inlined
def take(rows: Any, i: Any, into: Any, n: Any, way: Any, p: Any, trees: Any, room: Any, places: Any) -> None:
    """Make row *n* of *into* what row *i* becomes when party *p* goes *way*."""
    for w in range(rows.shape[1]):
        into[n, w] = rows[i, w]
    turn = U(trees.place[way])
    flip(into, n, places[p, 0], turn & PLACE_MASK)
    flip(into, n, places[p, 1], turn >> PLACE)
    for c in range(trees.first[way], trees.first[way + 1]):
        flip(into, n, room[trees.part[c]], trees.xor[c])

"""The inner loops, compiled by numba. loops_numpy.py does the same without a compiler, a memo, or anybody asleep.

Theory of operation. A product state is a row, and a step an exclusive-or of it (loops_trees.py). `rows` holds all that were
seen, in the order in which they were found, so a level of the search is a range of it and no list.

A step that commutes with others is made once: see "asleep" in docs/explorer.md, which also says why nothing is lost.

The loops never call Python. What no one knows yet (a step that was never worked out, a state that no law has judged, a part
that has no room in the rows) is put aside, and the loop goes on. Who comes first to such a place marks it as asked for;
those who come later only wait. Python works out what was asked for, and calls again with what was put aside as the queue. A
level is done when nothing is put aside, so the levels, and with them counts and lengths of traces, do not depend on what
was known.

An entry of a queue is (row, party). Party number P, one past the last: all parties, unless the machine has stopped; P + 1:
the laws on states, for a row that is new. A loop stops early when there may be no room for what one more entry needs, and
says how far it has come.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from guest_memfd.explore.engine.compiled import encoding as enc
from guest_memfd.explore.engine.compiled.encoding import Made, Scratch
from guest_memfd.explore.engine.compiled.jit import allocating, compiled, inlined
from guest_memfd.explore.engine.compiled.loops_ends import clear, walk_to_ends
from guest_memfd.explore.engine.compiled.loops_table import enter, enter_again, find, rehash, rehash_part, touch
from guest_memfd.explore.engine.compiled.loops_trees import (
    IS_LEAF,
    KIND,
    ONE,
    ZERO,
    I,
    U,
    apart,
    ask,
    equal,
    hash_of,
    leaf,
    place_of,
    read,
    take,
    walk,
    ways_of,
)

__all__ = [
    "CHUNK", "MEMO", "SPARE", "THREADED", "before", "breaking", "clear", "enter_again", "expand", "find", "move_apart",
    "put", "rehash", "rehash_part", "run_down", "spread", "touch", "unpack", "walk_to_ends",
]

THREADED = True
"""Whether several threads can explore a scenario (loops_threads.py)."""

CHUNK = 1 << 14
"""Entries of a queue that are taken together."""

SPARE = 1 << 14
"""Rows that there is room for when a queue is begun."""

MEMO = 1 << 13
"""Entries of a memo: of a hundred walks it saves 97, and it lies in the cache of a core."""


@inlined
def put_aside(told: Any, i: Any, p: Any, why: Any) -> None:
    """Note (row, party, why)."""
    n = told.count[enc.ASIDE]
    told.aside[n, 0], told.aside[n, 1], told.aside[n, 2] = i, p, why
    told.count[enc.ASIDE] = n + 1


@inlined
def tell(told: Any, what: Any) -> None:
    """Note that payload *what* breaks a law, the first time."""
    if told.seen[what] == 0:
        told.seen[what] = 1
        told.events[told.count[enc.EVENTS]] = what
        told.count[enc.EVENTS] += 1


@inlined
def judge(rows: Any, i: Any, p: Any, lookup: Any, told: Any) -> None:
    """Ask the laws on states about row *i*."""
    d, child = leaf(p - 1, enc.BREAKS, 0, rows, i, lookup)
    if d & KIND != IS_LEAF:
        put_aside(told, i, p, ask(enc.BREAKS, 0, d, child, lookup.trees))
    else:
        first, last = ways_of(d)
        if first < last:
            tell(told, first)


@compiled
def put(
    which: Any, lo: Any, leaves: Any, path: Any, parts: Any, fields: Any, root: Any, child: Any, children: Any,
    first_part: Any, part: Any, touched: Any, halts: Any,
) -> Any:
    """Put leaves which[lo:] into their trees; returns how far it has come, when there is no room for more children.

    leaves, path: flat.Leaves. parts: of each byte, how many, and their numbers. fields: of each part its byte, shift, width.
    children: how many there are. first_part, part, touched, halts: flat.Trees. All that is part of a word is signed here.
    """
    for k in range(lo, len(which)):
        tree, place, word, first = leaves[which[k]]
        last, needed, where = leaves[which[k] + 1, 3], 0, -1
        for s in range(first, last):
            for n in range(1, parts[path[s, 0], 0] + 1):
                needed += 1 << fields[parts[path[s, 0], n], 2]
        if children[0] + needed > len(child):
            return k
        for s in range(first, last):
            at, code = path[s, 0], path[s, 1]
            for n in range(1, parts[at, 0] + 1):
                number = parts[at, n]
                children_of = 1 << fields[number, 2]
                d = root[tree, place] if where < 0 else child[where]
                if d & (1 << enc.KIND_BITS) - 1 != enc.NODE:
                    d = enc.NODE | number << enc.KIND_BITS | children[0] << enc.BASE_SHIFT
                    children[0] += children_of
                    if where < 0:
                        root[tree, place] = d
                    else:
                        child[where] = d
                where = (d >> enc.BASE_SHIFT) + (code >> fields[number, 1] & children_of - 1)
        if where < 0:
            root[tree, place] = word
        else:
            child[where] = word
        ways, way = (word & 0xFFFFFFFF) >> enc.KIND_BITS, word >> enc.BASE_SHIFT
        for s in range(first, last):
            if parts[path[s, 0], 0] > 0 and tree == enc.HALTS:
                mark(parts[path[s, 0], 1], halts, 0, 0)
            elif parts[path[s, 0], 0] > 0 and ways > 0:
                mark(parts[path[s, 0], 1], touched, way, 0)
        for c in range(first_part[way], first_part[way + ways]):
            mark(parts[fields[part[c], 0], 1], touched, way, enc.TOUCHED)
    return len(which)


@compiled
def mark(number: Any, touched: Any, at: Any, base: Any) -> None:
    """Set the bit of the byte whose first part is *number*, in words of touched[at] from *base* on."""
    touched[at, base + number // 64 % enc.TOUCHED] |= ONE << U(number % 64)


@allocating
def unpack(rows: Any, placed: Any, room: Any, fields: Any, values: Any, states: Any) -> None:
    """Write into *states* the bytes of the host's state of each row. placed: the parts that have room."""
    codes = np.zeros(states.shape[1], np.int64)
    for i in range(len(rows)):
        for part in placed:
            codes[fields[part, 0]] = 0
        for part in placed:
            codes[fields[part, 0]] |= I(read(rows, i, room[part])) << fields[part, 1]
        for part in placed:
            states[i, fields[part, 0]] = values[fields[part, 0], codes[fields[part, 0]]]


@compiled
def fits(first: Any, last: Any, p: Any, trees: Any, room: Any, places: Any) -> Any:
    """Whether rows have room for all that ways [first, last) change, steps of party *p*."""
    for way in range(first, last):
        if trees.place[way] >> enc.PLACE_BITS and places[p, 1] == ZERO:
            return False
        for c in range(trees.first[way], trees.first[way + 1]):
            if room[trees.part[c]] == ZERO:
                return False
    return True


@compiled
def move_apart(rows: Any, n: Any, words: Any) -> None:
    """Let *n* rows of *words* words, which lie close together where *rows* begins, be the first *n* of *rows*."""
    close, wide = rows.reshape(rows.size), rows.shape[1]
    for i in range(n - 1, -1, -1):
        for w in range(wide - 1, words - 1, -1):
            rows[i, w] = ZERO
        for w in range(words - 1, -1, -1):
            rows[i, w] = close[i * words + w]


@allocating
def expand(
    rows: Any, table: Any, lookup: Any, ready: Any, queue: Any, lo: Any, level: Any, told: Any, most: Any,
) -> Any:
    """Take every step that queue[lo:] asks for; returns how far it has come.

    lookup, level, told: encoding.py. ready: first ways of leaves, all parts of which have room. most: ways of the largest
    leaf.
    """
    parties = len(lookup.of)
    batch = enc.BATCH + parties * most
    last_row = min(len(rows), I(len(table) * enc.FULL)) - batch - 1
    scratch = Scratch(np.empty(batch + 1, np.uint64), np.empty((batch, 2), np.int64), np.empty((parties, 2), np.int64))
    nothing = Made(np.empty(0, np.uint64), np.empty((0, 2), np.int64), np.empty((0, 2), np.int64))
    return spread(rows, rows, last_row, True, nothing, scratch, table, lookup, ready, queue, lo, len(queue), level, told,
                  len(told.aside), most)


@compiled
def spread(
    rows: Any, into: Any, last_row: Any, alone: Any, made: Any, scratch: Any, table: Any, lookup: Any, ready: Any,
    queue: Any, lo: Any, hi: Any, level: Any, told: Any, most_aside: Any, most: Any,
) -> Any:
    """Take every step that queue[lo:hi] asks for, while there is room; returns how far it has come.

    alone: rows are made in *into*, which is *rows*, and entered. Else they are kept there if the table has not got them, and
    *made* says more about them. There is room up to *last_row*, and for *most_aside* that are put aside.
    """
    count, parties = told.count, len(lookup.of)
    batch = enc.BATCH + parties * most
    few, few_met = most_aside - 2 * batch - 1, len(made.met) - batch
    size, k, full = 0, lo, False
    while k < hi and not full:
        full = count[enc.ROWS] > last_row or count[enc.ASIDE] > few or (not alone and count[enc.MET] > few_met)
        while k < hi and size < enc.BATCH and not full:
            i, p = queue[k, 0], queue[k, 1]
            k += 1
            if p > parties:
                judge(rows, i, p, lookup, told)
            else:
                size = step(rows, i, p, into, size, scratch, lookup, ready, level, told)
            full = count[enc.ASIDE] > few
        touch(rows, table, scratch.hashes, size)
        start = count[enc.ROWS]
        for j in range(size):
            n, way, sleepers = count[enc.ROWS], scratch.by[j, 0], scratch.by[j, 1]
            if n != start + j:
                for w in range(rows.shape[1]):
                    into[n, w] = into[start + j, w]
            if alone:
                r = enter(rows, n, scratch.hashes[j], table)
                if r == n:
                    count[enc.ROWS] = n + 1
                    level.asleep[n - level.first] = sleepers
                    if lookup.trees.flag[way] & enc.VISIBLE:
                        judge(rows, n, parties + 1, lookup, told)
                elif r >= level.fresh:
                    level.asleep[r - level.first] &= sleepers
            else:
                r = find(rows, into, n, scratch.hashes[j], table)
                if r < 0:
                    made.hashes[n], made.by[n, 0], made.by[n, 1] = scratch.hashes[j], way, sleepers
                    count[enc.ROWS] = n + 1
                elif r >= level.fresh and level.asleep[r - level.first] & ~sleepers:
                    made.met[count[enc.MET], 0], made.met[count[enc.MET], 1] = r, sleepers
                    count[enc.MET] += 1
        size = 0
    return k


@inlined
def step(
    rows: Any, i: Any, p: Any, into: Any, size: Any, scratch: Any, lookup: Any, ready: Any, level: Any, told: Any,
) -> Any:
    """Make the rows that entry (i, p) leads to, behind *size* others of a batch; how many they are then."""
    trees, places, leaves, parties = lookup.trees, lookup.places, scratch.leaves, len(lookup.of)
    lo, hi, asleep = p, p + 1, I(0)
    if p == parties:
        lo, hi = 0, 0
        d, child = walk(enc.HALTS, 0, rows, i, trees, lookup.room)
        first, last = ways_of(d)
        if d & KIND != IS_LEAF:
            put_aside(told, i, p, ask(enc.HALTS, 0, d, child, trees))
        elif first < last:
            level.moved[i - level.base] = enc.HALTED
        else:
            hi, asleep = parties, I(level.asleep[i - level.first])
    for q in range(lo, hi):
        leaves[q, 0], leaves[q, 1] = 0, 0
        tree, place = lookup.of[q], place_of(rows, i, places, q)
        d, child = leaf(q, tree, place, rows, i, lookup)
        first, last = ways_of(d)
        if d & KIND != IS_LEAF:
            put_aside(told, i, q, ask(tree, place, d, child, trees))
        elif first < last and ready[first] == 0 and not fits(first, last, q, trees, lookup.room, places):
            put_aside(told, i, q, first)
        elif first < last:
            ready[first] = 1
            level.moved[i - level.base] = enc.MOVED
            told.count[enc.TRANSITIONS] += last - first
            leaves[q, 0], leaves[q, 1] = first, last
    moved = asleep
    for q in range(lo, hi):
        first, last = leaves[q, 0], leaves[q, 1]
        if first < last and not is_in(q, asleep):
            sleepers = sleepers_after(first, moved, leaves, hi, trees)
            if q < enc.SLEEPERS:
                moved |= I(1) << q
            for way in range(first, last):
                n = told.count[enc.ROWS] + size
                take(rows, i, into, n, way, q, trees, lookup.room, places)
                scratch.hashes[size], scratch.by[size, 0], scratch.by[size, 1] = hash_of(into, n), way, sleepers
                size += 1
                if trees.flag[way] & enc.FACT:
                    tell(told, way)
    return size


@inlined
def sleepers_after(first: Any, moved: Any, leaves: Any, parties: Any, trees: Any) -> Any:
    """Of parties that have *moved*, those whose steps have nothing to do with the leaf that begins with way *first*."""
    sleepers = I(0)
    if moved:
        for q in range(parties):
            if is_in(q, moved) and leaves[q, 0] < leaves[q, 1] and apart(first, leaves[q, 0], trees):
                sleepers |= I(1) << q
    return sleepers


@inlined
def is_in(q: Any, parties: Any) -> Any:
    """Whether party *q* has its bit in *parties*."""
    return q < enc.SLEEPERS and (parties >> q) & 1 == 1


@allocating
def before(rows: Any, trees: Any, room: Any, places: Any, of: Any, others: Any, lo: Any, hi: Any, target: Any) -> Any:
    """All (row, party, way) by which one of rows [lo, hi) becomes row *target*.

    others: of each party, the bits of a row in which the others stand. The last of all rows is scratch.
    """
    found, words, scratch = [(I(-1), I(-1), I(-1))], rows.shape[1], len(rows) - 1
    for i in range(lo, hi):
        for p in range(len(of)):
            alike = True
            for w in range(words):
                if (rows[i, w] ^ rows[target, w]) & others[p, w]:
                    alike = False
                    break
            if not alike:
                continue
            d, _ = walk(of[p], place_of(rows, i, places, p), rows, i, trees, room)
            if d & KIND != IS_LEAF:
                continue
            first, last = ways_of(d)
            for way in range(first, last):
                take(rows, i, rows, scratch, way, p, trees, room, places)
                if equal(rows, scratch, rows, target):
                    found.append((i, I(p), I(way)))
    return found


@compiled
def breaking(
    rows: Any, trees: Any, room: Any, places: Any, of: Any, wanted: Any, lo: Any, hi: Any, found: Any,
) -> Any:
    """All (row, party, way) of rows [lo, hi) and payloads that are *wanted*, by which they break a law; how many."""
    scratch, n = len(rows) - 1, 0
    for i in range(lo, hi):
        d, _ = walk(enc.HALTS, 0, rows, i, trees, room)
        first, last = ways_of(d)
        # Where a limit ended the search not everything is known.
        if d & KIND != IS_LEAF or first < last:
            continue
        for p in range(len(of)):
            d, _ = walk(of[p], place_of(rows, i, places, p), rows, i, trees, room)
            if d & KIND != IS_LEAF:
                continue
            first, last = ways_of(d)
            for way in range(first, last):
                if trees.flag[way] & enc.FACT and wanted[way]:
                    found[n, 0], found[n, 1], found[n, 2], found[n, 3] = i, p, way, way
                    n += 1
                take(rows, i, rows, scratch, way, p, trees, room, places)
                d, _ = walk(enc.BREAKS, 0, rows, scratch, trees, room)
                what, none = ways_of(d)
                if d & KIND == IS_LEAF and what < none and wanted[what]:
                    found[n, 0], found[n, 1], found[n, 2], found[n, 3] = i, p, way, what
                    n += 1
    return n


@compiled
def run_down(
    rows: Any, trees: Any, room: Any, places: Any, tree: Any, done: Any, ready: Any, steps: Any, level: Any, unjudged: Any,
    todo: Any, best: Any, best_at: Any, asks: Any,
) -> Any:
    """Let the party of *tree* go on alone from rows[todo], nothing failing, to its end; rows are changed in place.

    tree: -1 if there is none. done: the place where it is done. best, best_at: per payload, the fewest steps in all after
    which it breaks a law, and the row. asks: (row, what it wants, why or the way); returns how many.
    """
    n = 0
    for k in range(len(todo)):
        j, wants, way = todo[k], I(-1), I(-1)
        while True:
            if unjudged[j]:
                d, child = walk(enc.BREAKS, 0, rows, j, trees, room)
                if d & KIND != IS_LEAF:
                    wants, way = I(enc.LAW), ask(enc.BREAKS, 0, d, child, trees)
                    break
                unjudged[j] = 0
                better(d, level[j] + steps[j], j, best, best_at)
            d, child = walk(enc.HALTS, 0, rows, j, trees, room)
            if d & KIND != IS_LEAF:
                wants, way = I(enc.HALT), ask(enc.HALTS, 0, d, child, trees)
                break
            first, last = ways_of(d)
            if first < last:
                break
            place = place_of(rows, j, places, 0)
            if tree < 0 or place == done:
                d, child = walk(enc.BREAKS_AT_END, 0, rows, j, trees, room)
                if d & KIND != IS_LEAF:
                    wants, way = I(enc.END), ask(enc.BREAKS_AT_END, 0, d, child, trees)
                    break
                better(d, level[j] + steps[j], j, best, best_at)
                break
            d, child = walk(tree, place, rows, j, trees, room)
            if d & KIND != IS_LEAF:
                wants, way = I(enc.STEP), ask(tree, place, d, child, trees)
                break
            way, last = ways_of(d)
            if way < last and ready[way] == 0:
                if not fits(way, last, 0, trees, room, places):
                    wants = I(enc.ROOM)
                    break
                ready[way] = 1
            while way < last and trees.flag[way] & enc.FAILED:
                way += 1
            if way == last or steps[j] > enc.MOST_STEPS:
                wants = I(enc.ODD)
                break
            take(rows, j, rows, j, way, 0, trees, room, places)
            steps[j] += 1
            unjudged[j] = 1
            if trees.flag[way] & enc.FACT:
                shorter(way, level[j] + steps[j], j, best, best_at)
        if wants >= 0:
            asks[n, 0], asks[n, 1], asks[n, 2] = j, wants, way
            n += 1
    return n


@compiled
def better(d: Any, length: Any, j: Any, best: Any, best_at: Any) -> None:
    """`shorter`, if the judgement *d* says that something breaks."""
    first, last = ways_of(d)
    if first < last:
        shorter(first, length, j, best, best_at)


@compiled
def shorter(what: Any, length: Any, j: Any, best: Any, best_at: Any) -> None:
    """Payload *what* breaks a law after *length* steps, on the run from row *j*."""
    if length < best[what] or (length == best[what] and j < best_at[what]):
        best[what], best_at[what] = length, j

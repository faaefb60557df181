"""The inner loops, compiled by numba. loops_numpy.py has the same functions without a compiler.

Theory of operation. A product state is a row, and a step an exclusive-or of it (loops_trees.py). `rows` holds all that were
seen, in the order in which they were found, so a level of the search is a range of it and no list.

`table` finds a row again. It is open addressing with steps of one; an entry has 32 bits of the hash above and the number of
the row, and one, below. Only rows whose 32 bits agree are compared, and they are compared in full: two states are never
taken for one. A word that is zero adds nothing to a hash, so rows may become wider while the search runs. The table answers
from memory that is in no cache, which takes longer than all else that is done for a row. So successors are made in batches:
first all are written behind the rows that are there, then the entries are touched, then the rows that they point to, and
only then is compared and entered. The touches do not wait for each other.

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
from guest_memfd.explore.engine.compiled.jit import allocating, compiled, inlined
from guest_memfd.explore.engine.compiled.loops_trees import (
    IS_LEAF,
    KIND,
    LOW,
    ONE,
    S32,
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

THREADED = True
"""Whether several threads can explore a scenario (loops_threads.py)."""

CHUNK = 1 << 14
"""Entries of a queue that are taken together."""

SPARE = 1 << 14
"""Rows that there is room for when a queue is begun."""

MEMO = 1 << 13
"""Entries of a memo: of a hundred walks it saves 97, and it lies in the cache of a core."""


@inlined
def put_aside(aside: Any, count: Any, i: Any, p: Any, why: Any) -> None:
    """Note (row, party, why)."""
    n = count[enc.ASIDE]
    aside[n, 0], aside[n, 1], aside[n, 2] = i, p, why
    count[enc.ASIDE] = n + 1


@inlined
def tell(what: Any, seen: Any, events: Any, count: Any) -> None:
    """Note that payload *what* breaks a law, the first time."""
    if seen[what] == 0:
        seen[what] = 1
        events[count[enc.EVENTS]] = what
        count[enc.EVENTS] += 1


@inlined
def judge(
    rows: Any, i: Any, p: Any, trees: Any, room: Any, looks: Any, memo: Any, seen: Any, aside: Any, events: Any, count: Any,
) -> None:
    """Ask the laws on states about row *i*."""
    d, child = leaf(p - 1, enc.BREAKS, 0, rows, i, trees, room, looks, memo)
    if d & KIND != IS_LEAF:
        put_aside(aside, count, i, p, ask(enc.BREAKS, 0, d, child, trees))
    else:
        first, last = ways_of(d)
        if first < last:
            tell(first, seen, events, count)


@compiled
def put(
    which: Any, lo: Any, leaves: Any, path: Any, parts: Any, fields: Any, root: Any, child: Any, children: Any, first_part: Any,
    part: Any, touched: Any, halts: Any,
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
        size, touched = min(len(hashes), n - base), ZERO
        for j in range(size):
            hashes[j] = hash_of(rows, base + j)
        for j in range(size):
            touched ^= table[hashes[j] & mask]
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


@allocating
def expand(
    rows: Any, table: Any, trees: Any, room: Any, places: Any, looks: Any, memo: Any, of: Any, ready: Any, seen: Any,
    queue: Any, lo: Any, base: Any, moved: Any, asleep: Any, level: Any, fresh: Any, aside: Any, events: Any, count: Any,
    most: Any,
) -> Any:
    """Take every step that queue[lo:] asks for; returns how far it has come.

    looks, memo: loops_trees.py. of: the tree of each party. ready: first ways of leaves, all parts of which have room. seen:
    payloads that were told. moved: of rows from *base*. asleep: of rows from *level*, the first of this one; *fresh*: the
    first of the next. most: ways of the largest leaf.
    """
    last_row = min(len(rows), I(len(table) * enc.FULL)) - enc.BATCH - len(of) * most - 1
    batch = enc.BATCH + len(of) * most
    return spread(rows, rows, last_row, True, np.empty(0, np.uint64), np.empty((0, 2), np.int64), np.empty(batch, np.uint64),
                  np.empty((batch, 2), np.int64), np.empty((len(of), 2), np.int64), table, trees, room, places, looks, memo,
                  of, ready, seen, queue, lo, len(queue), base, moved, asleep, level, fresh, np.empty((0, 2), np.int64), aside,
                  len(aside), events, count, most)


# One function for one thread and for several: called for each entry, or for each batch, it takes twice the time.
@compiled
def spread(
    rows: Any, into: Any, last_row: Any, alone: Any, hashes_of: Any, made_by: Any, hashes: Any, by: Any, leaves: Any,
    table: Any, trees: Any, room: Any, places: Any, looks: Any, memo: Any, of: Any, ready: Any, seen: Any, queue: Any, lo: Any,
    hi: Any, base: Any, moved: Any, asleep: Any, level: Any, fresh: Any, met: Any, aside: Any, most_aside: Any, events: Any,
    count: Any, most: Any,
) -> Any:
    """Take every step that queue[lo:hi] asks for, while there is room; returns how far it has come.

    alone: rows are made in *into*, which is *rows*, and entered. Else they are kept there if the table has not got them,
    with their hashes and what they were made by; *met* has rows of the next level that were met again, and who is asleep
    then. There is room up to *last_row*, and for *most_aside* that are put aside. hashes, by: room for a batch; by: the way,
    and who is asleep. leaves: room for two numbers of each party.
    """
    parties, mask = len(of), U(len(table) - 1)
    batch = enc.BATCH + parties * most
    few, few_met = most_aside - 2 * batch - 1, len(met) - batch
    size, k = 0, lo
    while k < hi or size:
        full = count[enc.ROWS] > last_row or count[enc.ASIDE] > few or (not alone and count[enc.MET] > few_met)
        if k < hi and size < enc.BATCH and not full:
            i, p0 = queue[k, 0], queue[k, 1]
            k += 1
            if p0 > parties:
                judge(rows, i, p0, trees, room, looks, memo, seen, aside, events, count)
                continue
            p1, sleeping = p0 + 1, I(0)
            if p0 == parties:
                d, child = walk(enc.HALTS, 0, rows, i, trees, room)
                if d & KIND != IS_LEAF:
                    put_aside(aside, count, i, p0, ask(enc.HALTS, 0, d, child, trees))
                    continue
                first, last = ways_of(d)
                if first < last:
                    moved[i - base] = enc.HALTED
                    continue
                p0, p1, sleeping = 0, parties, I(asleep[i - level])
            for p in range(p0, p1):
                leaves[p, 0], leaves[p, 1] = 0, 0
                place = place_of(rows, i, places, p)
                d, child = leaf(p, of[p], place, rows, i, trees, room, looks, memo)
                if d & KIND != IS_LEAF:
                    put_aside(aside, count, i, p, ask(of[p], place, d, child, trees))
                    continue
                first, last = ways_of(d)
                if first == last:
                    continue
                if ready[first] == 0:
                    if not fits(first, last, p, trees, room, places):
                        put_aside(aside, count, i, p, first)
                        continue
                    ready[first] = 1
                moved[i - base] = enc.MOVED
                count[enc.TRANSITIONS] += last - first
                leaves[p, 0], leaves[p, 1] = first, last
            before = sleeping
            for p in range(p0, p1):
                first, last = leaves[p, 0], leaves[p, 1]
                if first == last or sleeping >> p & 1:
                    continue
                stay = I(0)
                for q in range(p1 if before else 0):
                    if before >> q & 1 and leaves[q, 0] < leaves[q, 1] and apart(first, leaves[q, 0], trees):
                        stay |= 1 << q
                if p < enc.SLEEPERS:
                    before |= 1 << p
                for way in range(first, last):
                    n = count[enc.ROWS] + size
                    take(rows, i, into, n, way, p, trees, room, places)
                    hashes[size], by[size, 0], by[size, 1] = hash_of(into, n), way, stay
                    size += 1
                    if trees.flag[way] & enc.FACT:
                        tell(way, seen, events, count)
            continue
        if size == 0:
            break
        # Touch what will be compared, all of it before any of it is needed.
        touched = ZERO
        for j in range(size):
            touched ^= table[hashes[j] & mask]
        for j in range(size):
            e = table[hashes[j] & mask]
            if e >> S32 == hashes[j] >> S32:
                touched ^= rows[(e & LOW) - ONE, 0]
        count[enc.COUNTERS] = I(touched & ONE)          # or the compiler would leave it out
        start = count[enc.ROWS]
        for j in range(size):
            n = count[enc.ROWS]
            if n != start + j:
                for w in range(rows.shape[1]):
                    into[n, w] = into[start + j, w]
            if alone:
                r = enter(rows, n, hashes[j], table)
                if r == n:
                    count[enc.ROWS] = n + 1
                    asleep[n - level] = by[j, 1]
                    if trees.flag[by[j, 0]] & enc.VISIBLE:
                        judge(rows, n, parties + 1, trees, room, looks, memo, seen, aside, events, count)
                elif r >= fresh:
                    asleep[r - level] &= by[j, 1]
            else:
                r = find(rows, into, n, hashes[j], table)
                if r < 0:
                    hashes_of[n], made_by[n, 0], made_by[n, 1] = hashes[j], by[j, 0], by[j, 1]
                    count[enc.ROWS] = n + 1
                elif r >= fresh and asleep[r - level] & ~by[j, 1]:
                    met[count[enc.MET], 0], met[count[enc.MET], 1] = r, by[j, 1]
                    count[enc.MET] += 1
        size = 0
        if full:
            break
    return k


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


@allocating
def clear(rows: Any, table: Any, trees: Any, room: Any, places: Any, of: Any, lo: Any, hi: Any, ends: Any) -> Any:
    """Set ends[i] of those rows [lo, hi) from which a step leads to a row with it, or none; how many it was."""
    cleared, scratch = 0, np.empty((1, rows.shape[1]), np.uint64)
    for i in range(hi - 1, lo - 1, -1):
        if ends[i]:
            continue
        moves, good = False, False
        d, _ = walk(enc.HALTS, 0, rows, i, trees, room)
        first, last = ways_of(d)
        if first == last:
            for p in range(len(of)):
                d, _ = walk(of[p], place_of(rows, i, places, p), rows, i, trees, room)
                first, last = ways_of(d)
                for way in range(first, last):
                    moves = True
                    take(rows, i, scratch, 0, way, p, trees, room, places)
                    if ends[find(rows, scratch, 0, hash_of(scratch, 0), table)]:
                        good = True
                        break
                if good:
                    break
        if good or not moves:
            ends[i] = 1
            cleared += 1
    return cleared


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

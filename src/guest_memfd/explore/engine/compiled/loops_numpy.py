"""The inner loops in numpy alone, for a Python that numba has no wheel for. loops_numba.py says what each function does.

A loop becomes operations on whole arrays: all entries of a queue, or all rows of a stretch, take the same step at once, and
what is finished drops out. New rows race for the entries of the hash table: all write, the last one stays, the others look
again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from guest_memfd.explore.engine.compiled import encoding as enc
from guest_memfd.explore.engine.compiled.flat import Array

THREADED = False
"""numpy keeps the interpreter's lock where arrays are small."""

CHUNK = 1 << 16
"""Entries of a queue that are taken together: an operation of numpy costs a microsecond before it does anything."""

SPARE = 1 << 18
"""Rows that there is room for when a queue is begun."""

MEMO = 0
"""A walk of all rows at once waits for nothing."""

U = np.uint64
K0, K1, M = *enc.MIX[:2], U(enc.MIX[2])
ALL = (1 << 64) - 1
LOW, KIND = U(0xFFFFFFFF), U((1 << enc.KIND_BITS) - 1)


class _Map(NamedTuple):
    # What a walk needs beside the rows.

    trees: Any
    room: Array
    places: Array


class _Leaves(NamedTuple):
    # Where walks have ended: the descriptors, which of them are leaves, their first ways and how many they have.

    d: Array
    child: Array
    there: Array
    first: Array
    ways: Array


def hash_of(rows: Array) -> Array:
    """The hash of each row."""
    h, k = np.zeros(len(rows), U), K0
    for w in range(rows.shape[1]):
        x = rows[:, w]
        h += (x ^ x >> U(29)) * U(k)
        k = k * K1 & ALL
    h ^= h >> U(32)
    h *= M
    return h ^ h >> U(29)


def _read(rows: Array, where: Array) -> Array:
    at, shift = (where & U(enc.WORD_MASK)).astype(np.int64), where >> U(enc.SHIFT_SHIFT) & U(enc.SHIFT_MASK)
    return rows[np.arange(len(rows)), at] >> shift & where >> U(enc.MASK_SHIFT)


def _flip(rows: Array, i: Array, where: Array, bits: Array) -> None:
    at, shift = (where & U(enc.WORD_MASK)).astype(np.int64), where >> U(enc.SHIFT_SHIFT) & U(enc.SHIFT_MASK)
    # One row may be there several times, one for each part that changes.
    np.bitwise_xor.at(rows, (i, at), (bits & where >> U(enc.MASK_SHIFT)) << shift)


def _place_of(rows: Array, places: Array, p: Array) -> Array:
    return (_read(rows, places[p, 0]) | _read(rows, places[p, 1]) << U(enc.PLACE_BITS)).astype(np.int64)


def _walk(tree: Array | int, place: Array | int, rows: Array, at: _Map) -> _Leaves:
    d = np.array(np.broadcast_to(at.trees.root[tree, place], len(rows)))
    child = np.full(len(rows), -1, np.int64)
    active = np.flatnonzero(d & KIND == enc.NODE)
    now = d[active]
    while len(active):
        bits = _read(rows[active], at.room[(now >> U(enc.KIND_BITS) & U(enc.PART_MASK)).astype(np.int64)])
        to = ((now >> U(enc.BASE_SHIFT)) + bits).astype(np.int64)
        now = at.trees.child[to]
        d[active], child[active] = now, to
        on = now & KIND == enc.NODE
        active, now = active[on], now[on]
    there = d & KIND == enc.LEAF
    ways = np.where(there, (d & LOW) >> U(enc.KIND_BITS), U(0)).astype(np.int64)
    return _Leaves(d, child, there, (d >> U(enc.BASE_SHIFT)).astype(np.int64), ways)


# What is missing is asked for by the first that comes to each place; the others wait. Of those that have come to no leaf.
def _ask(leaves: _Leaves, tree: Array | int, place: Array | int, at: _Map) -> Array:
    rest = np.flatnonzero(~leaves.there)
    root, child = at.trees.root, leaves.child[rest]
    of, where = (np.broadcast_to(each, len(leaves.d))[rest] for each in (tree, place))
    at_root = child < 0
    key = np.where(at_root, -1 - (of * root.shape[1] + where), child)
    missing = np.flatnonzero(leaves.d[rest] == enc.MISSING)
    _, first = np.unique(key[missing], return_index=True)
    asks = missing[first]
    root[of[asks[at_root[asks]]], where[asks[at_root[asks]]]] = enc.PENDING
    at.trees.child[child[asks[~at_root[asks]]]] = enc.PENDING
    why = np.full(len(rest), enc.WAITS)
    why[asks] = enc.ASKS
    return why


def _put_aside(
    leaves: _Leaves, tree: Array | int, place: Array | int, entries: Array, at: _Map, aside: Array, count: Array
) -> None:
    _note(aside, count, entries[~leaves.there], _ask(leaves, tree, place, at))


def _note(aside: Array, count: Array, entries: Array, why: Array) -> None:
    n = int(count[enc.ASIDE])
    aside[n:n + len(entries), :2], aside[n:n + len(entries), 2] = entries, why
    count[enc.ASIDE] += len(entries)


def _tell(what: Array, seen: Array, events: Array, count: Array) -> None:
    fresh = np.unique(what[seen[what] == 0])
    seen[fresh] = 1
    events[count[enc.EVENTS]:count[enc.EVENTS] + len(fresh)] = fresh
    count[enc.EVENTS] += len(fresh)


# One row for each way of each leaf: whose it is (in order), and the way.
def _each(first: Array, ways: Array) -> tuple[Array, Array]:
    source = np.repeat(np.arange(len(ways)), ways)
    return source, np.arange(len(source)) + np.repeat(first - (np.cumsum(ways) - ways), ways)


def _taken(rows: Array, way: Array, p: Array, at: _Map) -> Array:
    rows = rows.copy()
    every = np.arange(len(rows))
    turn = at.trees.place[way].astype(U)
    _flip(rows, every, at.places[p, 0], turn & U((1 << enc.PLACE_BITS) - 1))
    _flip(rows, every, at.places[p, 1], turn >> U(enc.PLACE_BITS))
    first = at.trees.first[way]
    source, change = _each(first, at.trees.first[way + 1] - first)
    _flip(rows, source, at.room[at.trees.part[change]], at.trees.xor[change])
    return rows


def put(
    which: Array, lo: int, leaves: Array, path: Array, parts: Array, fields: Array, root: Array, child: Array,
    children: Array, _first: Array, _part: Array, _touched: Array, _halts: Array,
) -> int:
    """Put leaves which[lo:] into their trees; returns how far it has come, when there is no room for more children."""
    few, bits = parts[:, 0].tolist(), fields.tolist()
    for k in range(lo, len(which)):
        tree, place, word, first = leaves[which[k]].tolist()
        steps = [(*bits[number][1:], number, code) for at, code in path[first:leaves[which[k] + 1, 3]].tolist()
                 for number in parts[at, 1:few[at] + 1].tolist()]
        if int(children[0]) + sum(1 << width for _, width, _, _ in steps) > len(child):
            return k
        array: Any = root
        where: Any = (tree, place)
        for shift, width, number, code in steps:
            d = int(array[where])
            if d & (1 << enc.KIND_BITS) - 1 != enc.NODE:
                d = enc.NODE | number << enc.KIND_BITS | int(children[0]) << enc.BASE_SHIFT
                children[0] += 1 << width
                array[where] = d
            array, where = child, (d >> enc.BASE_SHIFT) + (code >> shift & (1 << width) - 1)
        array[where] = word
    return len(which)


def unpack(rows: Array, placed: Array, room: Array, fields: Array, values: Array, states: Array) -> None:
    """Write into *states* the bytes of the host's state of each row. placed: the parts that have room."""
    codes: dict[int, Array] = {}
    for part in placed.tolist():
        at, shift, _ = fields[part].tolist()
        bits = _read(rows, np.full(len(rows), room[part])) << U(shift)
        codes[at] = codes[at] | bits if at in codes else bits
    for at, code in codes.items():
        states[:, at] = values[at, code.astype(np.int64)]


def _enter(rows: Array, n: int, m: int, table: Array) -> Array:
    mask = len(table) - 1
    h = hash_of(rows[n:n + m])
    tag, slot = h & ~LOW, (h & U(mask)).astype(np.int64)
    mine = tag | np.arange(n + 1, n + m + 1, dtype=U)
    left, won = np.arange(m), np.zeros(m, bool)
    while len(left):
        entry = table[slot[left]]
        free = left[entry == 0]
        table[slot[free]] = mine[free]
        entry = table[slot[left]]
        own = entry == mine[left]
        won[left[own]] = True
        left, entry = left[~own], entry[~own]
        alike = np.flatnonzero((entry ^ tag[left]) >> U(32) == 0)
        same = (rows[(entry[alike] & LOW).astype(np.int64) - 1] == rows[n + left[alike]]).all(axis=1)
        keep = np.ones(len(left), bool)
        keep[alike[same]] = False
        left = left[keep]
        slot[left] = slot[left] + 1 & mask
    new = np.flatnonzero(won)
    # Those that lost are no states: the others move together, and their entries get the numbers that they have now.
    rows[n:n + len(new)] = rows[n + new]
    table[slot[new]] = tag[new] | np.arange(n + 1, n + len(new) + 1, dtype=U)
    return new


def move_apart(rows: Array, n: int, words: int) -> None:
    """Let *n* rows of *words* words, which lie close together where *rows* begins, be the first *n* of *rows*."""
    close = rows.reshape(-1)
    for hi in range(n, 0, -CHUNK):
        lo = max(0, hi - CHUNK)
        some = close[lo * words:hi * words].reshape(-1, words).copy()
        rows[lo:hi, :words], rows[lo:hi, words:] = some, 0


def rehash(rows: Array, n: int, table: Array) -> None:
    """Enter the first *n* rows into the empty *table*."""
    mask = len(table) - 1
    for lo in range(0, n, CHUNK):
        hi = min(lo + CHUNK, n)
        h = hash_of(rows[lo:hi])
        mine, slot = (h & ~LOW) | np.arange(lo + 1, hi + 1, dtype=U), (h & U(mask)).astype(np.int64)
        left = np.arange(hi - lo)
        while len(left):
            free = left[table[slot[left]] == 0]
            table[slot[free]] = mine[free]
            left = left[table[slot[left]] != mine[left]]
            slot[left] = slot[left] + 1 & mask


def expand(
    rows: Array, table: Array, lookup: enc.StepTables, ready: Array, queue: Array, lo: int, level: enc.Level,
    told: enc.LoopNotes, most: int,
) -> int:
    """Take every step that queue[lo:] asks for; returns how far it has come."""
    at, of, parties = _Map(*lookup[:3]), lookup.of, len(lookup.of)
    (_, _, _, base, moved), (seen, aside, events, count) = level, told
    spare = min(len(rows) - 1, int(len(table) * enc.FULL)) - int(count[enc.ROWS])
    # What one entry makes at most has room.
    makes, puts = parties * most, parties * (most + 1) + 1
    hi = min(len(queue), lo + min(CHUNK, spare // makes, (len(aside) - int(count[enc.ASIDE])) // puts))
    entries = queue[lo:hi]
    judged = entries[entries[:, 1] > parties]
    if len(judged):
        _judge(rows, judged, at, seen, aside, events, count)
    single = entries[entries[:, 1] < parties]
    whole = entries[entries[:, 1] == parties]
    if len(whole):
        running = _running(rows, whole, base, moved, at, aside, count)
        every = np.stack([np.repeat(running, parties), np.tile(np.arange(parties), len(running))], axis=1)
        single = np.concatenate([single, every])
    _step(rows, table, at, of, ready, seen, single, base, moved, aside, events, count)
    return hi


def _judge(rows: Array, entries: Array, at: _Map, seen: Array, aside: Array, events: Array, count: Array) -> None:
    leaves = _walk(enc.BREAKS, 0, rows[entries[:, 0]], at)
    _put_aside(leaves, enc.BREAKS, 0, entries, at, aside, count)
    _tell(leaves.first[leaves.ways > 0], seen, events, count)


# Of those entries the rows in which the machine has not stopped.
def _running(rows: Array, whole: Array, base: int, moved: Array, at: _Map, aside: Array, count: Array) -> Array:
    leaves = _walk(enc.HALTS, 0, rows[whole[:, 0]], at)
    _put_aside(leaves, enc.HALTS, 0, whole, at, aside, count)
    moved[whole[leaves.ways > 0, 0] - base] = enc.HALTED
    return whole[leaves.there & (leaves.ways == 0), 0]


def _step(
    rows: Array, table: Array, at: _Map, of: Array, ready: Array, seen: Array, entries: Array, base: int, moved: Array,
    aside: Array, events: Array, count: Array,
) -> None:
    source = rows[entries[:, 0]]
    place = _place_of(source, at.places, entries[:, 1])
    leaves = _walk(of[entries[:, 1]], place, source, at)
    _put_aside(leaves, of[entries[:, 1]], place, entries, at, aside, count)
    has = np.flatnonzero(leaves.ways)
    roomy = ready[leaves.first[has]] > 0
    _note(aside, count, entries[has[~roomy]], leaves.first[has[~roomy]])
    has = has[roomy]
    moved[entries[has, 0] - base] = enc.MOVED
    which, way = _each(leaves.first[has], leaves.ways[has])
    which = has[which]
    n, m = int(count[enc.ROWS]), len(way)
    count[enc.TRANSITIONS] += m
    rows[n:n + m] = _taken(source[which], way, entries[which, 1], at)
    _tell(way[at.trees.flag[way] & enc.FACT > 0], seen, events, count)
    new = _enter(rows, n, m, table)
    count[enc.ROWS] = n + len(new)
    visible = n + np.flatnonzero(at.trees.flag[way[new]] & enc.VISIBLE)
    _judge(rows, np.stack([visible, np.full(len(visible), len(of) + 1)], axis=1), at, seen, aside, events, count)


# All steps of rows [lo, hi), a stretch at a time: row, party, way, and the row it makes.
def _all_steps(rows: Array, at: _Map, of: Array, lo: int, hi: int) -> Iterator[tuple[Array, Array, Array, Array]]:
    for i in range(lo, hi, CHUNK):
        some = np.arange(i, min(i + CHUNK, hi))
        some = some[_walk(enc.HALTS, 0, rows[some], at).ways == 0]
        for p in range(len(of)):
            party = np.full(len(some), p)
            leaves = _walk(int(of[p]), _place_of(rows[some], at.places, party), rows[some], at)
            source, way = _each(leaves.first, leaves.ways)
            yield some[source], party[source], way, _taken(rows[some[source]], way, party[source], at)


def before(
    rows: Array, trees: Any, room: Array, places: Array, of: Array, others: Array, lo: int, hi: int, target: int
) -> list[tuple[int, int, int]]:
    """All (row, party, way) by which one of rows [lo, hi) becomes row *target*; the first of the list is none."""
    at, found = _Map(trees, room, places), [(-1, -1, -1)]
    for i in range(lo, hi, CHUNK):
        some = rows[i:min(i + CHUNK, hi)]
        for p in range(len(of)):
            alike = np.flatnonzero(~((some ^ rows[target]) & others[p]).any(axis=1))
            party = np.full(len(alike), p)
            leaves = _walk(int(of[p]), _place_of(some[alike], places, party), some[alike], at)
            source, way = _each(leaves.first, leaves.ways)
            good = (_taken(some[alike[source]], way, party[source], at) == rows[target]).all(axis=1)
            found += ((int(i + alike[s]), p, int(w)) for s, w in zip(source[good], way[good], strict=True))
    return found


def breaking(
    rows: Array, trees: Any, room: Array, places: Array, of: Array, wanted: Array, lo: int, hi: int, found: Array
) -> int:
    """All (row, party, way) of rows [lo, hi) and payloads that are *wanted*, by which they break a law; how many."""
    at, n = _Map(trees, room, places), 0
    for i, p, way, after in _all_steps(rows, at, of, lo, hi):
        leaves = _walk(enc.BREAKS, 0, after, at)
        fact = (trees.flag[way] & enc.FACT > 0) & (wanted[way] > 0)
        state = (leaves.ways > 0) & (wanted[np.where(leaves.ways > 0, leaves.first, 0)] > 0)
        for good, what in ((fact, way), (state, leaves.first)):
            m = int(good.sum())
            found[n:n + m] = np.stack([i[good], p[good], way[good], what[good]], 1)
            n += m
    return n


def _find(rows: Array, sought: Array, table: Array) -> Array:
    mask, h = len(table) - 1, hash_of(sought)
    slot, found = (h & U(mask)).astype(np.int64), np.zeros(len(sought), np.int64)
    left = np.arange(len(sought))
    while len(left):
        entry = table[slot[left]]
        at = (entry & LOW).astype(np.int64) - 1
        same = (entry ^ h[left]) >> U(32) == 0
        same[same] = (rows[at[same]] == sought[left[same]]).all(axis=1)
        found[left[same]] = at[same]
        left = left[~same]
        slot[left] = slot[left] + 1 & mask
    return found


def walk_to_ends(_rows: Array, _table: Array, _lookup: enc.StepTables, lo: int, hi: int, _ends: Array) -> int:
    """Nothing: `clear` takes all rows at once. Returns how many rows [lo, hi) are."""
    return hi - lo


def clear(rows: Array, table: Array, lookup: enc.StepTables, lo: int, hi: int, ends: Array) -> int:
    """Set ends[i] of those rows [lo, hi) from which a step leads to a row with it, or none; how many it was."""
    at, good, moves = _Map(*lookup[:3]), np.zeros(hi - lo, bool), np.zeros(hi - lo, bool)
    for i, _, _, after in _all_steps(rows, at, lookup.of, lo, hi):
        moves[i - lo] = True
        good[i[ends[_find(rows, after, table)] > 0] - lo] = True
    fresh = (good | ~moves) & (ends[lo:hi] == 0)
    ends[lo:hi][fresh] = 1
    return int(fresh.sum())


def run_down(
    rows: Array, trees: Any, room: Array, places: Array, tree: int, done: int, ready: Array, steps: Array, level: Array,
    unjudged: Array, todo: Array, best: Array, best_at: Array, asks: Array,
) -> int:
    """Let the party of *tree* go on alone from rows[todo], nothing failing, to its end; rows are changed in place."""
    at, n = _Map(trees, room, places), 0

    def wants(j: Array, what: int, way: Array) -> None:
        nonlocal n
        asks[n:n + len(j), 0], asks[n:n + len(j), 1], asks[n:n + len(j), 2] = j, what, way
        n += len(j)

    def shorter(j: Array, what: Array) -> None:
        for row, payload, length in zip(j.tolist(), what.tolist(), (level[j] + steps[j]).tolist(), strict=True):
            if (length, row) < (best[payload], best_at[payload]):
                best[payload], best_at[payload] = length, row

    # Those of *j* that come to a leaf, and the leaves.
    def leaves_of(j: Array, tree: int, place: Array | int, what: int) -> tuple[Array, Array, Array]:
        leaves = _walk(tree, place, rows[j], at)
        wants(j[~leaves.there], what, _ask(leaves, tree, place, at))
        return j[leaves.there], leaves.ways[leaves.there], leaves.first[leaves.there]

    j = np.array(todo)
    while len(j):
        judged, ways, first = leaves_of(j[unjudged[j] > 0], enc.BREAKS, 0, enc.LAW)
        shorter(judged[ways > 0], first[ways > 0])
        j = np.concatenate([j[unjudged[j] == 0], judged])
        unjudged[judged] = 0
        j, ways, _ = leaves_of(j, enc.HALTS, 0, enc.HALT)
        j = j[ways == 0]
        place = _place_of(rows[j], places, np.zeros(len(j), np.int64))
        over = np.full(len(j), tree < 0) | (place == done)
        ended, ways, first = leaves_of(j[over], enc.BREAKS_AT_END, 0, enc.END)
        shorter(ended[ways > 0], first[ways > 0])
        j, ways, first = leaves_of(j[~over], max(tree, 0), place[~over], enc.STEP)
        tight = (ways > 0) & (ready[np.where(ways > 0, first, 0)] == 0)
        wants(j[tight], enc.ROOM, first[tight])
        j, way, last = j[~tight], first[~tight], (first + ways)[~tight]
        while (failing := (way < last) & (trees.flag[np.where(way < last, way, 0)] & enc.FAILED > 0)).any():
            way[failing] += 1
        odd = (way == last) | (steps[j] > enc.MOST_STEPS)
        wants(j[odd], enc.ODD, way[odd])
        j, way = j[~odd], way[~odd]
        rows[j] = _taken(rows[j], way, np.zeros(len(j), np.int64), at)
        steps[j] += 1
        unjudged[j] = 1
        fact = trees.flag[way] & enc.FACT > 0
        shorter(j[fact], way[fact])
    return n

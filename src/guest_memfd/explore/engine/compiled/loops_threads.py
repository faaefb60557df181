"""The inner loops of several threads at one level, compiled by numba. threads.py has the threads, and calls the loops.

Theory of operation. What a level costs is waiting for memory and walking down trees, and both can be done by several threads
at once, if none writes where another one reads. So a stretch of a queue is taken in three loops, and between two of them
all threads wait for the slowest:

    spread  each has a part of the queue, takes its steps into rows of its own, and drops what the table has. The table is
            only read (loops_numba.py).
    enter   each has a part of the *table*, goes through what all have made, and enters what belongs there. Of equal rows the
            first stays, in the order of the queue. Probing that would run over the end of a part is left for later.
    settle  each copies those of its rows that were new to where they stay, under numbers that follow one another in the
            order of the queue, and has laws judge them.

So the order of rows depends on the queue and the number of threads, never on who was faster. Two threads may write the mark
that a step has been asked for (both ask then, which is noticed where it is answered), and the marks that a leaf has room and
that a row can move, which all set to the same. numba gives the interpreter's lock up (jit.py).
"""

from __future__ import annotations

from typing import Any

from guest_memfd.explore.engine.compiled import encoding as enc
from guest_memfd.explore.engine.compiled.jit import compiled, inlined
from guest_memfd.explore.engine.compiled.loops_numba import judge
from guest_memfd.explore.engine.compiled.loops_trees import LOW, ONE, S32, ZERO, I, U, equal


@compiled
def enter(
    made: Any, hashes: Any, by: Any, many: Any, each: Any, rows: Any, table: Any, lo: Any, hi: Any, slots: Any, left: Any,
    some: Any,
) -> Any:
    """Enter those of *made* that belong in table[lo:hi]; slots: where, -1 for what is there. Returns how many are *left*.

    made, hashes, by: of all threads, *each* of one; *many* of them are used. They are entered as if row number *rows* and
    those after it were *made*. some: room for a batch.
    """
    mask, n, touched = U(len(table) - 1), 0, ZERO
    for thread in range(len(many)):
        for base in range(thread * each, thread * each + many[thread], len(some)):
            size = 0
            for j in range(base, min(base + len(some), thread * each + many[thread])):
                if lo <= I(hashes[j] & mask) < hi:
                    some[size] = j
                    size += 1
            for k in range(size):
                touched ^= table[hashes[some[k]] & mask]
            for k in range(size):
                j = some[k]
                slots[j] = probed(made, j, hashes[j], by, rows, table, I(hashes[j] & mask), hi)
                if slots[j] == hi:
                    left[n] = j
                    n += 1
    some[0] = I(touched & ONE)                          # or the compiler would leave it out
    return n


@inlined
def probed(made: Any, j: Any, h: Any, by: Any, rows: Any, table: Any, at: Any, hi: Any) -> Any:
    """The slot, from *at* on, that row *j* of *made* is now in; -1 if an equal one is there; *hi* if none is free.

    Who is not asleep in row *j* is not in the equal one either.
    """
    while at < hi:
        e = table[at]
        if e == ZERO:
            table[at] = h >> S32 << S32 | U(rows + j + 1)
            return at
        # None of those that were rows before is equal: they have been looked at.
        if e >> S32 == h >> S32 and I(e & LOW) > rows and equal(made, I(e & LOW) - 1 - rows, made, j):
            by[I(e & LOW) - 1 - rows, 1] &= by[j, 1]
            return I(-1)
        at += 1
    return hi


@compiled
def enter_left(made: Any, hashes: Any, by: Any, left: Any, rows: Any, table: Any, slots: Any) -> None:
    """Enter what was *left*, after all threads: by probing on from the ends of their parts, and round."""
    for j in left:
        at = probed(made, j, hashes[j], by, rows, table, I(hashes[j] & U(len(table) - 1)), len(table))
        if at == len(table):
            at = probed(made, j, hashes[j], by, rows, table, 0, len(table))
        slots[j] = at


@compiled
def wake(level: Any, met: Any, n: Any) -> None:
    """Of *n* rows that a thread has *met* again: who is awake in one of the two is awake."""
    for k in range(n):
        level.asleep[met[k, 0] - level.first] &= met[k, 1]


@compiled
def settle(
    made: Any, by: Any, slots: Any, lo: Any, hi: Any, n: Any, rows: Any, table: Any, lookup: Any, level: Any, told: Any,
) -> None:
    """Let what is new of made[lo:hi] be rows *n* and on, and ask the laws."""
    for j in range(lo, hi):
        if slots[j] < 0:
            continue
        for w in range(rows.shape[1]):
            rows[n, w] = made[j, w]
        table[slots[j]] = table[slots[j]] >> S32 << S32 | U(n + 1)
        level.asleep[n - level.first] = by[j, 1]
        if lookup.trees.flag[by[j, 0]] & enc.VISIBLE:
            judge(rows, n, len(lookup.of) + 1, lookup, told)
        n += 1

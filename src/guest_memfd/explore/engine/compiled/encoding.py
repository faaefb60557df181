"""What the loops and those who feed them agree on: what a word of a tree says, and what is counted where.

A *descriptor* is a word of 64 bits. Its two lowest bits are its kind:

    MISSING   nobody has come here: Python has to work it out
    NODE      look at part `PART` of the row; go on at child[base + what is there], base in the upper 32 bits
    LEAF      `COUNT` ways, the first of them in the upper 32 bits; of a judgement: one if something breaks, else none
    PENDING   missing, and asked for already

A *location* is a word as well: where a part lies in a row (`WORD`, `SHIFT`) and the bits it has, as a mask. A part that has
never changed in a scenario has no location: word 0, and a mask without bits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

MISSING, NODE, LEAF, PENDING = range(4)
KIND_BITS = 2
BASE_SHIFT = 32
PART_MASK = 0xFFFF

WORD_MASK = 0xFF
SHIFT_SHIFT, SHIFT_MASK = 8, 0x3F
MASK_SHIFT = 16

PLACE_BITS = 8
"""The place of a party is two parts of the row, of as many bits each; one if that is enough."""

FACT, FAILED, VISIBLE = 1, 2, 4
"""Flags of a way: a fact of it breaks a law; something failed in it, by injection; it changes what laws on states look at.

A new state that a way has led to which is not VISIBLE need not be judged: the one before it was, and looks the same.
"""

HALTS, BREAKS, BREAKS_AT_END, FIRST_PARTY = range(4)
"""Trees: has the machine stopped, what does a state break, what does it break at the end, and those of the parties."""

MOVED, HALTED = 1, 2
"""Of a row: somebody can move, the machine has stopped; 0: neither."""

ROWS, TRANSITIONS, ASIDE, EVENTS, MET, COUNTERS = range(6)
"""What a loop counts: the rows there are, and how full its lists are."""

WAITS, ASKS = -1, -2
"""Why something was put aside: somebody has asked already, or this one asks. Else: the way whose parts have no room yet."""

LAW, END, HALT, STEP, ODD, ROOM = range(6)
"""What a teardown asks for. ODD: it waits or does not end. ROOM: its next way has parts without."""

BATCH = 128
"""Rows that are entered together, so that waiting for memory overlaps."""

FULL = 0.6
"""How full the hash table may be."""

MEMO_HEAD = 2
"""Words of an entry of the memo before those of a row: whose walk, and the leaf."""

TOUCHED = 3
"""Words in which the bytes that a leaf looks at have a bit each, and those that it changes; of many bytes two share one."""

SLEEPERS = 16
"""Parties that can be asleep, a bit each of 16; those after them never are."""

MOST_STEPS = 1000
"""Steps of a teardown; one that takes more does not end."""

MIX = 0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93, 0xFF51AFD7ED558CCD
"""Odd numbers that a hash multiplies by: the first word of a row, each further one, and the end."""


class StepTables(NamedTuple):
    """What a step of a row is looked up in.

    trees: flat.Trees. room, places: where each part, and the place of each party, lies in a row. of: the tree of each party.
    looks, memo: of walks that are remembered (loops_trees.py).
    """

    trees: Any
    room: Any
    places: Any
    of: Any
    looks: Any
    memo: Any


class Level(NamedTuple):
    """What a step leads out of: first, fresh: the first row of this level, and of the next.

    asleep: of each row from *first* on, the parties that need not move. base, moved: of each row from *base* on, whether
    somebody can.
    """

    first: int
    fresh: int
    asleep: Any
    base: int
    moved: Any


class LoopNotes(NamedTuple):
    """What a loop tells: what was put *aside*, payloads that break a law (*events*; *seen*: which were told), and counts."""

    seen: Any
    aside: Any
    events: Any
    count: Any


class Scratch(NamedTuple):
    """Room for a batch of rows, with the hash, the way and the sleepers of each (*by*), and for the *leaves* of a row."""

    hashes: Any
    by: Any
    leaves: Any


class Made(NamedTuple):
    """Of rows that a thread has made: hash, way and sleepers. met: rows of the next level that it came to, and sleepers."""

    hashes: Any
    by: Any
    met: Any

"""Livelocks: the states of an exploration from which no end can be reached any more.

It sees numbers only, the same that the exploration has gone through. A walk takes any step, and the next, until it comes
to a state that is known to reach an end; then every state on its way does. Nearly all walks are short, so looking for
livelocks costs less than exploring did, and no memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

Rows = Sequence[tuple[int, Mapping[int, tuple[int, ...]]]]
"""Of each party: the bits of a state that its steps depend on, and what each of its steps adds to the state."""

OUT = -1
"""In place of a state: one that is known to reach an end."""


def never_ending(rows: Rows, levels: Iterable[Sequence[int]], ends: Iterable[int], stuck: set[int]) -> set[int]:
    """What is left of *stuck*, which begins as all states of *levels*, without those that can still reach one of *ends*."""
    # All states begin as suspects. A walk that meets a state which is known to reach an end clears itself and
    # everything it came through.
    stuck.difference_update(ends)
    left: dict[int, None] = {}
    for states in levels:
        for code in states:
            if code in stuck and code not in left:
                _walk(rows, code, stuck, left)
    # Steps from what is left lead back to the way that it was found on, or to what was left before. Since then the way
    # may have come to an end.
    before = -1
    while len(left) != before:
        before = len(left)
        for code in list(left):
            if _onward(rows, code, stuck, left, left) == OUT:
                stuck.discard(code)
                del left[code]
    return stuck


# Walks from *code* until a step leads out of *stuck*, which then loses the whole way. A state from which nothing leads
# on is *left*, and the walk goes on from the one before.
def _walk(rows: Rows, code: int, stuck: set[int], left: dict[int, None]) -> None:
    way = {code: None}
    while way:
        to = _onward(rows, code, stuck, way, left)
        if to == OUT:
            stuck.difference_update(way)
            return
        if to is None:
            left[way.popitem()[0]] = None
            # Back to the state before. The way is a dictionary because it must be both in order and fast to search.
            code = next(reversed(way), OUT)
        else:
            way[to] = None
            code = to


# A step on from *code*: OUT, or a state that is neither on the way nor left; None if there is none.
def _onward(rows: Rows, code: int, stuck: set[int], way: dict[int, None], left: dict[int, None]) -> int | None:
    for keep, steps in rows:
        for step in steps[code & keep]:
            to = code + step
            if to not in stuck:
                return OUT
            if to not in way and to not in left:
                return to
    return None

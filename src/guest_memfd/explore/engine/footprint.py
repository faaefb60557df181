"""Footprints: what a step does depends on the bytes it looks at, so it is worked out once for all states that agree there.

Rule of this file: nothing here knows what a byte means. Two states that agree in every byte that was looked at in the
first are treated alike by the same code; most states differ elsewhere, so some thousand runs answer for millions.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any


class Watched(bytearray):
    """A state that notes in `seen` the value of each byte when it is first touched.

    A byte that is written counts as looked at: then what changes is a function of what was seen, too. Copies note in
    the same place, so that a later primitive of one step, working on what the first left, adds to one footprint.
    """

    def __init__(self, state: bytes, seen: dict[int, int]) -> None:
        super().__init__(state)
        self.seen = seen

    def __getitem__(self, at: Any) -> Any:
        value = super().__getitem__(at)
        self.seen.setdefault(at, value)
        return value

    def __setitem__(self, at: Any, value: Any) -> None:
        self.seen.setdefault(at, super().__getitem__(at))
        super().__setitem__(at, value)

    def copy(self) -> Watched:
        """Another state of the same step."""
        return Watched(bytes(self), self.seen)


Node = tuple[int, dict[int, Any]]
"""Look at this byte, go on below its value: another node, or whatever was learned."""


def grow(root: Node | None, seen: dict[int, int], learned: Any) -> Any:
    """The tree *root* with *learned* kept for all states that agree with *seen*; *learned* itself if that is empty.

    Code that always asks in the same order makes a tree: as long as values agree, so does the byte it asks for next.
    """
    path = list(seen.items())
    if not path:
        return learned
    node = root = root or (path[0][0], {})
    for (_, value), (following, _) in itertools.pairwise(path):
        node = node[1].setdefault(value, (following, {}))
    node[1][path[-1][1]] = learned
    return root


class Remembered:
    """A judgement of states that is made once for all states that agree in the bytes it looks at.

    *judge* is handed a `Watched` state and must look at bytes one by one, in an order that follows from what it has seen.
    """

    def __init__(self, judge: Callable[[Any], Any]) -> None:
        self.judge = judge
        self.root: Any = None

    def __call__(self, state: bytes) -> Any:
        """What *judge* says of *state*."""
        node = self.root
        while type(node) is tuple:
            at, below = node
            node = below.get(state[at])
        if node is None:
            seen: dict[int, int] = {}
            node = [self.judge(Watched(state, seen))]
            self.root = grow(self.root, seen, node)
        return node[0]

"""Footprints: what a step does depends on the bytes it looks at, so it is worked out once for all states that agree there.

Theory of operation. A host state is a few hundred bytes, and a suite meets millions of them. A step of one party reads few
of these bytes: a lock, a page record, a frame. Carrying it out anew for each state would repeat the same work, because
most states differ in bytes that the step never reads. So a step is carried out on a state that notes what is read
(`Watched`), and the outcome is kept for every state that has the same values there.

Three data structures:

    `Watched`      a state, and in `seen` the value of each byte at its first touch, in the order of the touches
    the tree       a node is an offset and a dictionary from values of that byte to what follows: a node, or what was learned
    `Remembered`   a function of a state with its tree; the laws on states are judged through it

To look a state up is to walk from the root: read the byte that the node names, follow its value, until there is no node.
To add to the tree (`grow`) is to walk along `seen`, and to put what was learned at its end.

A tree is enough, and no set of byte ranges has to be searched, because of the order. The code that carries a step out is
deterministic: as long as the values that it has read agree, it asks for the same byte next. So all paths through one node
continue with the same offset, or end there. This is the promise that `program.ExploredHost.footprints` asks for:
outcomes depend on nothing but the bytes that are read one by one as ``state[at]``. To compare whole states, or to take a
hash of one, would read bytes that `seen` does not have, so machine and laws must not do that with such a state.

Two details decide whether the outcome is right:

- A byte that is written counts as read. An outcome is stored as the bytes that have changed. A byte that was 1 before
  and is 1 now is not in that list, so the list is right only for states that had the same value there before.
- All copies of a state within one step note into the same `seen`. Silent primitives are fused with the one that follows,
  and the second of them works on what the first has left. It may read a byte that the first has written: then the noted
  value is the one before the step, as ``setdefault`` keeps the first, and that is the one that a look-up compares.

Nothing here knows what a byte means. Left out: footprints of two steps are never compared, so independent steps of two
parties are not recognised and no partial-order reduction is made; every interleaving is still visited.

Tests: tests/test_engines.py compares the number of states and transitions with an engine that has no footprints, on every
shipped model; tests/test_explorer.py (test_tables_are_right_for_every_initial_state) uses one tree from many states.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from guest_memfd.compat import override


class Watched(bytearray):
    """A state that notes in `seen` the value of each byte when it is first touched.

    A byte that is written counts as looked at: then what changes is a function of what was seen, too. Copies note in
    the same place, so that a later primitive of one step, working on what the first left, adds to one footprint.
    """

    def __init__(self, state: bytes, seen: dict[int, int]) -> None:
        super().__init__(state)
        self.seen = seen

    @override
    def __getitem__(self, at: Any) -> Any:
        value = super().__getitem__(at)
        # The first touch only: a byte that this step has written itself is not part of what it was given.
        self.seen.setdefault(at, value)
        return value

    @override
    def __setitem__(self, at: Any, value: Any) -> None:
        # The old value. A look-up compares with the state before the step.
        self.seen.setdefault(at, super().__getitem__(at))
        super().__setitem__(at, value)

    @override
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
    # Each byte's value leads to the node of the byte that was touched next. A node that is there has the same offset,
    # as the same code asked with the same values.
    for (_, value), (following, _) in itertools.pairwise(path):
        node = node[1].setdefault(value, (following, {}))
    node[1][path[-1][1]] = learned
    return root


def path_of(node: Any, state: bytes) -> list[tuple[int, int]]:
    """The bytes that the tree below *node* looks at for *state*, and their values."""
    path = []
    while type(node) is tuple:
        at, below = node
        path.append((at, state[at]))
        node = below.get(state[at])
    return path


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
            # In a list, so that an answer of None can be told from a state that has not been judged.
            node = [self.judge(Watched(state, seen))]
            self.root = grow(self.root, seen, node)
        return node[0]

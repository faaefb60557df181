"""Machines and procedures that nobody would write, to be drawn by hypothesis."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import strategies as st
from toy import US, Does, Toy, end

from guest_memfd.words.primitives import Steps

BYTES = 5
Code = Sequence[Any]

# What a call does in each state of the machine: its results, and the states they leave; none means: wait.
ENDS = st.lists(st.tuples(st.integers(0, 1), st.integers(0, BYTES - 1)), max_size=2)
CALLS = st.lists(st.lists(ENDS, min_size=BYTES, max_size=BYTES), min_size=2, max_size=2)

CODE: st.SearchStrategy[Code] = st.recursive(
    st.lists(st.integers(0, 1), max_size=3),
    lambda inner: st.lists(st.one_of(
        st.integers(0, 1),
        st.tuples(st.sampled_from(["if", "choose"]), inner, inner),
        st.tuples(st.sampled_from(["twice", "until", "while", "reads", "ever"]), inner, inner),
    ), max_size=3),
    max_leaves=6,
)


LOOPS: dict[str, Callable[[], Steps[Any]]] = {
    "until": lambda: US.hyp_call("call", 1),
    "while": lambda: US.choose("again", 0, 1),
    "reads": lambda: US.tree_load("attributes", 0, 1),
    "ever": lambda: US.choose("on", 1),
}


def procedure(code: Code) -> Callable[[], Steps[int]]:
    def steps(part: Code) -> Steps[int]:
        result = 0
        for place in range(len(part)):
            what = part[place]
            if isinstance(what, int):
                result = yield from US.hyp_call("call", what)
            elif what[0] == "twice":
                for _round in range(2):
                    yield from steps(what[1])
            elif what[0] in LOOPS:
                while (yield from LOOPS[what[0]]()):
                    yield from steps(what[1])
            else:
                which = result if what[0] == "if" else (yield from US.choose("way", 0, 1))
                yield from steps(what[1 + which])
        return result
    return lambda: steps(code)


def machine(call: Does) -> Toy:
    """*call* is what hypercalls do; loads read the lowest bit."""
    return Toy(hyp_call=call, tree_load=lambda byte, party, args: [end(byte % 2, byte)])

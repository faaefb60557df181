"""The two engines on machines and procedures that nobody would write: equal counts, whatever is drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from toy import US, Toy, ToyLaw, end, run

from guest_memfd.check.explorer import Finding
from guest_memfd.hosts.host import Steps

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
        st.tuples(st.just("twice"), inner, inner),
    ), max_size=3),
    max_leaves=6,
)


def procedure(code: Code) -> Callable[[], Steps[int]]:
    def steps(part: Code) -> Steps[int]:
        result = 0
        for place in range(len(part)):
            what = part[place]
            if isinstance(what, int):
                result = yield from US.hypercall("call", what)
            elif what[0] == "twice":
                for _round in range(2):
                    yield from steps(what[1])
            else:
                which = result if what[0] == "if" else (yield from US.choose("way", 0, 1))
                yield from steps(what[1 + which])
        return result
    return lambda: steps(code)


@settings(max_examples=150, deadline=None)
@given(CALLS, st.lists(CODE, min_size=1, max_size=3), st.integers(1, BYTES - 1))
def test_counts_agree_and_traces_lead_where_they_say(calls: list[Any], codes: list[Code], bad: int) -> None:
    def call(byte: int, party: int, args: tuple[Any, ...]) -> list[Any]:
        return [end(result, to) for result, to in dict.fromkeys(calls[args[1]][byte])]

    result = run(Toy(hypercall=call), *map(procedure, codes), law=ToyLaw(states=(bad,)))
    for finding in result.findings:
        follow(call, finding, bad)


def follow(call: Any, finding: Finding, bad: int) -> None:
    """Take the steps of a trace on the machine itself."""
    byte = 0
    for step in finding.steps:
        if step.primitive is not None:
            ways = [(o.result, o.shared[0]) for o in call(byte, 0, step.primitive.args)]
            assert (step.result, step.shared[0]) in ways
            byte = step.shared[0]
    if finding.law == "toy":
        assert byte == bad

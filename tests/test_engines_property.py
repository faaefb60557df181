"""The two engines on machines and procedures that nobody would write: equal counts, whatever is drawn."""

from __future__ import annotations

from typing import Any

from drawn import BYTES, CALLS, CODE, Code, machine, procedure
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import ToyLaw, end, run

from guest_memfd.explore.engine.finding import Finding


@settings(max_examples=60, deadline=None)
@given(CALLS, st.lists(CODE, min_size=1, max_size=3), st.integers(1, BYTES - 1))
def test_counts_agree_and_traces_lead_where_they_say(calls: list[Any], codes: list[Code], bad: int) -> None:
    def call(byte: int, party: int, args: tuple[Any, ...]) -> list[Any]:
        return [end(result, to) for result, to in dict.fromkeys(calls[args[1]][byte])]

    result = run(machine(call), *map(procedure, codes), law=ToyLaw(states=(bad,)))
    for finding in result.findings:
        follow(call, finding, bad)


def follow(call: Any, finding: Finding, bad: int) -> None:
    """Take the steps of a trace on the machine itself."""
    byte = 0
    for step in finding.steps:
        if step.primitive is not None and step.primitive.name == "hyp_call":
            ways = [(o.result, o.shared[0]) for o in call(byte, 0, step.primitive.args)]
            assert (step.result, step.shared[0]) in ways
            byte = step.shared[0]
    if finding.law == "toy":
        assert byte == bad

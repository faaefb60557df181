"""A counterexample as a Mermaid sequence diagram: parties, the kernel, the hypervisor, and what goes between them.

Syntax: Mermaid's documentation, "Sequence diagrams". A semicolon ends a statement and a hash begins an entity there, so both
are written as entities, and names stand for participants that are called p0, p1, ...
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from guest_memfd.abstract import show
from guest_memfd.report import steps as said
from guest_memfd.report.counterexample import Counterexample, length


def mermaid(example: Counterexample) -> Iterator[str]:
    """The lines of the diagram."""
    finding = example.finding
    parties = list(dict.fromkeys([*example.parties, *(step.party for step in finding.steps)]))
    yield "sequenceDiagram"
    who = f"{example.design} on {example.hypervisor}, {length(finding.steps, example.parties)}"
    yield f"    title {_text(f'{finding.law} is broken: {who}')}"
    for at, party in enumerate(parties):
        yield f"    participant p{at} as {_text(party)}"
    yield "    participant kernel"
    yield f"    participant hypervisor as {_text(example.hypervisor)}"
    names = said.lock_holders(finding.steps, finding.initial)
    before = finding.initial
    for number, step in enumerate(finding.steps, 1):
        party = f"p{parties.index(step.party)}"
        called = step.primitive is not None and step.primitive.name == "hyp_call"
        arrow = "-x" if step.failed else "->>"
        yield f"    {party}{arrow}{'hypervisor' if called else 'kernel'}: {number}. {_text(said.action(step))}"
        told = [*show.changed(before, step.shared, names), *said.told_of(step, before)]
        if told:
            yield f"    Note right of {party}: {'<br/>'.join(map(_text, told))}"
        before = step.shared
    over = f"p0,p{len(parties) - 1}" if len(parties) > 1 else "p0"
    yield f"    Note over {over}: {_text(f'{finding.law} is broken: {finding.evidence}')}"


def _text(words: str) -> str:
    return re.sub(r"[#;<>&]", lambda found: f"#{ord(found[0])};", " ".join(words.split()).replace("->", "→"))

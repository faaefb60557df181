"""A counterexample in Markdown, to paste into a mail or a review: what broke, a table of steps, where it ends."""

from __future__ import annotations

import re
from collections.abc import Iterator

from guest_memfd.abstract import show
from guest_memfd.laws import LAWS
from guest_memfd.report import steps as said
from guest_memfd.report.counterexample import Counterexample, length


def markdown(example: Counterexample) -> Iterator[str]:
    """The lines; each step is one row, whoever renders it."""
    finding, law = example.finding, LAWS[example.finding.law]
    who = f"{example.design} on {example.hypervisor}, {length(finding.steps, example.parties)}"
    yield f"**{_text(law.name)} is broken**: {_text(who)}"
    yield ""
    yield f"- broken: {_text(finding.evidence)}"
    yield f"- law: {_text(law.sentence)} ({_text(law.source)})"
    yield f"- scene: {_text(example.scene.name)}: {_text(example.scene.title)}"
    for line in show.overview(finding.initial):
        what, _, words = line.partition(" ")
        yield f"- {what} at first: {_text(words.strip())}"
    if not finding.steps:
        return
    yield ""
    yield "| # | party | step | what changes |"
    yield "| --: | --- | --- | --- |"
    names = said.lock_holders(finding.steps, finding.initial)
    before = finding.initial
    for number, step in enumerate(finding.steps, 1):
        last = number == len(finding.steps)
        told = [*show.changed(before, step.shared, names), *said.told_of(step, before),
                *(said.reaches(step) if last else ())]
        changes = [*map(_text, told), *([f"**{_text(law.name)} is broken**"] if last else [])]
        yield f"| {number} | {_text(step.party)} | {_code(said.action(step))} | {'; '.join(changes)} |"
        before = step.shared


_MARKS = re.compile(r"([\\`*_{}\[\]<>|#~])")


# Words in which nothing is markup; entities would begin with an ampersand.
def _text(words: str) -> str:
    return _MARKS.sub(r"\\\1", " ".join(words.split()).replace("->", "→").replace("&", "&amp;"))


# A cell ends at a bar, even in code.
def _code(words: str) -> str:
    return f"`{' '.join(words.split()).replace('`', chr(39)).replace('|', chr(92) + '|')}`"

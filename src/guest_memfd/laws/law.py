"""What a law is: a sentence, its source, and the functions that judge.

A law sees facts (notes of `words/facts.py`), states, and the end of the world after everything was torn down;
it answers with evidence in words, or None. It never repairs, filters or forgives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from guest_memfd.abstract import state as st
from guest_memfd.compat import override
from guest_memfd.errors import BadInput, shown
from guest_memfd.plugins.fields import FLAG, LINE, NAME, takes, wrong
from guest_memfd.plugins.guard import asked_twice, foreign

Evidence = str | None


@dataclass(frozen=True)
class Violator:
    """Who breaks a law: *design* under *hypervisor*, in the scenario of *parties*; and the evidence, on the shortest way.

    planted: the design is a mistake of tests/planted.py or tests/mistakes.py, because none that was posted breaks the law.
    scene: None for the plainest.
    """

    design: str
    hypervisor: str
    parties: tuple[str, ...]
    evidence: str
    planted: bool = False
    scene: str | None = None

    @override
    def __str__(self) -> str:
        where = " of the tests" if self.planted else ""
        scene = f" in {self.scene}" if self.scene else ""
        parties = " and ".join(self.parties)
        return f"design {self.design}{where}, under {self.hypervisor}, by {parties}{scene}: {self.evidence}"


@dataclass(frozen=True)
class Law:
    """A law. `when` says in words at which moments it is checked, `broken_by` shows that someone breaks it.

    promised: it is judged only of a design that says that it keeps it (`Design.promises`).

    Judging raises BadInput, which names the law, when its function raises or answers with anything but words or None.
    """

    name: str
    sentence: str
    source: str
    when: str
    state: Callable[[st.State], Evidence] | None = None
    note: Callable[[Any], Evidence] | None = None
    end: Callable[[st.State], Evidence] | None = None
    broken_by: Violator | None = None
    promised: bool = False

    def in_state(self, shared: bytes) -> Evidence:
        """Evidence in a reachable state."""
        return self._ask(self.state, st.State(shared)) if self.state else None

    def on_note(self, note: Any) -> Evidence:
        """Evidence in a fact."""
        return self._ask(self.note, note) if self.note else None

    def at_end(self, shared: bytes) -> Evidence:
        """Evidence in the state after teardown."""
        return self._ask(self.end, st.State(shared)) if self.end else None

    @cached_property
    def _theirs(self) -> bool:
        return foreign(*(judge for judge in (self.state, self.note, self.end) if judge is not None))

    # A third party's is asked twice, and has to answer the same.
    def _ask(self, judge: Callable[[Any], Evidence], thing: Any) -> Evidence:
        evidence, again = asked_twice(_Question(self.name, thing), judge, thing, theirs=self._theirs, error=BadInput)
        if not (evidence is None or (isinstance(evidence, str) and evidence)):
            raise BadInput(f"{_Question(self.name, thing)} answered {shown(evidence)}; evidence is words, or None")
        if again != evidence:
            raise BadInput(f"{_Question(self.name, thing)} is not deterministic: it answered {shown(evidence)} and then "
                           f"{shown(again)}")
        return evidence


class _Question(NamedTuple):
    law: str
    about: object

    @override
    def __str__(self) -> str:
        return f"law {self.law!r}, asked about {_a(self.about)},"


def _a(thing: object) -> str:
    name = type(thing).__name__
    return f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"


JUDGES = ("state", "note", "end")
FIELDS = {"name": NAME, "sentence": LINE, "source": LINE, "when": LINE, "promised": FLAG,
          **dict.fromkeys(JUDGES, takes(1).or_none())}


def lacks(thing: object) -> str | None:
    """What is wrong with *thing* as a law of someone else's; None if nothing is."""
    if not isinstance(thing, Law):
        return f"{shown(thing)} is no guest_memfd.laws.Law"
    if (words := wrong(thing, FIELDS)) is not None:
        return words
    if ". " in thing.sentence:
        return f"it is more than one sentence: {thing.sentence!r}"
    if thing.broken_by is not None and not isinstance(thing.broken_by, Violator):
        return f"what it is broken by is no guest_memfd.laws.Violator: {shown(thing.broken_by)}"
    if all(getattr(thing, what) is None for what in JUDGES):
        return f"it judges nothing: it needs one of {', '.join(JUDGES)}"
    return None

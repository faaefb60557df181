"""What a law is: a sentence, its source, and the functions that judge.

A law sees facts (notes of `hosts/abstract/notes.py`), states, and the end of the world after everything was torn down;
it answers with evidence in words, or None. It never repairs, filters or forgives.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from guest_memfd.errors import BadInput, describe
from guest_memfd.hosts.abstract import state as st

Evidence = str | None


@dataclass(frozen=True)
class Violator:
    """Who breaks a law: *design* under *hypervisor*, in the scenario of *parties*; and the evidence, on the shortest way.

    planted: the design is a mistake of tests/planted.py or tests/mistakes.py, because none that was posted breaks the law.
    """

    design: str
    hypervisor: str
    parties: tuple[str, ...]
    evidence: str
    planted: bool = False

    def __str__(self) -> str:
        where = " of the tests" if self.planted else ""
        return f"{self.design}{where} on {self.hypervisor}, {' and '.join(self.parties)}: {self.evidence}"


@dataclass(frozen=True)
class Law:
    """A law. `when` says in words at which moments it is checked, `broken_by` shows that somebody breaks it.

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

    def in_state(self, shared: bytes) -> Evidence:
        """Evidence in a reachable state."""
        return self._ask(self.state, st.State(shared)) if self.state else None

    def on_note(self, note: Any) -> Evidence:
        """Evidence in a fact."""
        return self._ask(self.note, note) if self.note else None

    def at_end(self, shared: bytes) -> Evidence:
        """Evidence in the state after teardown."""
        return self._ask(self.end, st.State(shared)) if self.end else None

    def _ask(self, judge: Callable[[Any], Evidence], thing: Any) -> Evidence:
        try:
            evidence = judge(thing)
        except Exception as error:
            raise BadInput(f"law {self.name!r} raised {describe(error)}, asked about {_a(thing)}") from error
        if evidence is None or (isinstance(evidence, str) and evidence):
            return evidence
        raise BadInput(f"law {self.name!r} answered {evidence!r}, asked about {_a(thing)}; evidence is words, or None")


def _a(thing: object) -> str:
    name = type(thing).__name__
    return f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"


JUDGES = ("state", "note", "end")


def lacks(thing: object) -> str | None:
    """What is wrong with *thing* as a law of somebody else's; None if nothing is."""
    if not isinstance(thing, Law):
        return f"{thing!r} is no guest_memfd.laws.Law"
    for what in ("sentence", "source", "when"):
        words = getattr(thing, what)
        if not isinstance(words, str) or not words.strip() or "\n" in words:
            return f"its {what} is not a line of words: {words!r}"
    if ". " in thing.sentence:
        return f"it is more than one sentence: {thing.sentence!r}"
    if thing.broken_by is not None and not isinstance(thing.broken_by, Violator):
        return f"what it is broken by is no guest_memfd.laws.Violator: {thing.broken_by!r}"
    judges = {what: getattr(thing, what) for what in JUDGES if getattr(thing, what) is not None}
    wrong = [f"its {what} is no function of one argument: {judge!r}" for what, judge in judges.items()
             if not _takes_one(judge)]
    return wrong[0] if wrong else None if judges else f"it judges nothing: it needs one of {', '.join(JUDGES)}"


def _takes_one(judge: object) -> bool:
    if not callable(judge):
        return False
    try:
        inspect.signature(judge).bind(None)
    except TypeError:
        return False
    except ValueError:                                  # Python cannot tell
        pass
    return True

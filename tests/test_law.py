"""Laws of third parties: what is taken for one, and what it may answer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from guest_memfd.abstract import state as st
from guest_memfd.errors import BadInput, PluginError, UnknownName
from guest_memfd.explore.suite.check import check
from guest_memfd.laws import LAWS, Law
from guest_memfd.laws.law import lacks
from guest_memfd.plugins.registry import Registry
from guest_memfd.words import facts

FREED = facts.Freed(0, "host", "zero", False)


def never(thing: Any) -> None:
    return None


LAW = Law("mine", "nothing is ever wrong", "a test", "always", note=never)


# -- what is a law -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("law", "wrong"), [
    (42, "42 is no guest_memfd.laws.Law"),
    (replace(LAW, note=None), "it judges nothing: it needs one of state, note, end"),
    (replace(LAW, state=3), "its state is 3"),
    (replace(LAW, end=lambda: None), "its end is <function"),
    (replace(LAW, note=lambda note, state: None), "its note is <function"),
    (replace(LAW, sentence=""), "its sentence is '', and has to be a line of words"),
    (replace(LAW, sentence=None), "its sentence is None, and has to be a line of words"),
    (replace(LAW, sentence="two\nlines"), "its sentence is 'two\\nlines', and has to be a line of words"),
    (replace(LAW, sentence="It is so. It is not"), "it is more than one sentence: 'It is so. It is not'"),
    (replace(LAW, source=" "), "its source is ' ', and has to be a line of words"),
    (replace(LAW, when=7), "its when is 7, and has to be a line of words"),
])
def test_what_is_no_law_is_refused_with_what_it_lacks(law: Any, wrong: str) -> None:
    assert str(lacks(law)).startswith(wrong)
    with pytest.raises(PluginError, match=r"^law plugin 'mine': "):
        LAWS.add("mine", law)
    assert "mine" not in LAWS


def test_a_law_has_the_name_of_its_entry_point() -> None:
    with pytest.raises(PluginError, match="law plugin 'yours': it calls itself 'mine'"):
        LAWS.add("yours", LAW)


@pytest.mark.parametrize("law", [LAW, replace(LAW, note=None, end=never), replace(LAW, state=never), replace(LAW, note=str)])
def test_one_function_is_enough(law: Law) -> None:
    assert lacks(law) is None


# -- what it may answer ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", [False, True, "", 0, ["words"], (never(each) for each in "x")])
def test_an_answer_that_is_neither_words_nor_none_is_refused(answer: Any) -> None:
    law = replace(LAW, state=lambda state: answer, note=lambda note: answer, end=lambda state: answer)
    empty = st.State.empty(st.Sizes(1, 1, 1, 1, 1, 1)).save()
    asked: list[tuple[Any, Any, str]] = [
        (law.on_note, FREED, "a Freed"), (law.in_state, empty, "a State"), (law.at_end, empty, "a State")]
    for ask, thing, what in asked:
        with pytest.raises(BadInput, match=r"^law 'mine', .* answered .*; evidence is words, or None$") as refused:
            ask(thing)
        assert f"asked about {what}, " in str(refused.value)


def test_a_law_that_raises_is_named_with_the_place() -> None:
    def stumbles(note: Any) -> str:
        return str(note.no_such_field)

    with pytest.raises(BadInput, match=r"^law 'mine', asked about a Freed, raised AttributeError: 'Freed' object has "
                                       r"no attribute 'no_such_field' \(test_law.py:\d+ in .*stumbles\)$"):
        replace(LAW, note=stumbles).on_note(FREED)


def test_a_law_that_raises_while_exploring_is_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LAWS._known, "mine", replace(LAW, end=lambda state: state.no_such_field))
    for jobs in (1, 2):
        with pytest.raises(BadInput, match=r"^law 'mine', asked about a State, raised AttributeError"):
            check("library", "kvm", parties=["vcpu", "stop"], jobs=jobs)


# -- laws by name ------------------------------------------------------------------------------------------------------


def test_a_registry_is_asked_like_a_dictionary() -> None:
    known: Registry[Law] = Registry("law", "no.such.group", {"mine": LAW})
    assert [*known] == ["mine"]
    assert [*known.values()] == [LAW]
    assert len(known) == 1
    assert ("mine" in known, "yours" in known, 3 in known) == (True, False, False)
    assert (known.get("mine"), known.get("yours")) == (LAW, None)
    with pytest.raises(UnknownName, match="unknown law 'mime'; did you mean 'mine'"):
        known["mime"]


def test_a_law_that_is_added_is_judged_by(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LAWS, "_known", dict(LAWS._known))
    LAWS.add("mine", replace(LAW, note=lambda note: "a page is freed" if isinstance(note, facts.Freed) else None))
    report = check("library", "kvm", parties=["vcpu"], jobs=1)
    assert {found.law: found.evidence for found in report.findings} == {"mine": "a page is freed"}
    assert [*report.laws][-1] == "mine"

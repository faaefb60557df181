"""The page of surveys: kernels x known bugs, kernels x behaviour, what each means for a VMM; one kernel or many."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from guest_memfd.html.render import render
from guest_memfd.probe.bugs import VERDICTS
from guest_memfd.probe.matrix import SurveyOf
from guest_memfd.probe.report import ROW_VERDICTS, offers


class KernelRow(NamedTuple):
    """A kernel that was asked: what it offers, in lines, and how many rows came out how; or the problem."""

    name: str
    problem: str
    offers: list[tuple[str, str]]
    counts: Mapping[str, int]
    seconds: float


class Told(NamedTuple):
    """What *kernel* says to one question: a word for the cell, what it is (a verdict), and what it rests on."""

    kernel: str
    text: str
    verdict: str
    why: str


class Question(NamedTuple):
    """A known bug or a row: what is asked, what follows for a VMM, and an answer for each kernel, None where none was given.

    states: what to find it by: verdicts, and whether kernels differ.
    """

    name: str
    says: str
    kind: str
    means: str
    source: str
    answers: list[Told | None]
    states: list[str]


def page(surveys: Sequence[SurveyOf]) -> str:
    """The page of *surveys*, of which some may have failed."""
    there = [each for each in surveys if each.survey is not None]
    bugs = [_bug(name, there) for name in _names(there, "known_bugs")]
    rows = [_row(name, there) for name in _names(there, "behaviour")]
    groups: dict[str, list[Question]] = {}
    for row in rows:
        groups.setdefault(row.name.partition(".")[0], []).append(row)
    return render(
        "probe.html", kernels=[_kernel(each) for each in surveys], names=[each.kernel for each in there], bugs=bugs,
        varying=[row for row in rows if "varies" in row.states], odd=[row for row in rows if {*row.states} & {"differs"}],
        groups=groups, rows=len(rows), verdicts=VERDICTS, row_verdicts=ROW_VERDICTS)


def _kernel(each: SurveyOf) -> KernelRow:
    if each.survey is None:
        return KernelRow(each.kernel, each.problem, [], {}, 0)
    facts = each.survey.get("offers")
    told = [(name, words) for name, _, words in (line.partition(": ") for line in offers(facts))] if facts else []
    counts = Counter(row["verdict"] for row in each.survey.get("behaviour", ()))
    return KernelRow(each.kernel, "", told, {verdict: counts[verdict] for verdict in ROW_VERDICTS}, each.seconds)


def _names(there: Sequence[SurveyOf], part: str) -> list[str]:
    return list(dict.fromkeys(entry["id"] for each in there for entry in _part(each, part)))


def _part(each: SurveyOf, part: str) -> Sequence[Mapping[str, Any]]:
    found: Sequence[Mapping[str, Any]] = (each.survey or {}).get(part, ())
    return found


# What each kernel says to question *name*, with the kernel's name.
def _entries(name: str, there: Sequence[SurveyOf], part: str) -> Iterator[tuple[str, Mapping[str, Any] | None]]:
    for each in there:
        yield each.kernel, next((entry for entry in _part(each, part) if entry["id"] == name), None)


def _bug(name: str, there: Sequence[SurveyOf]) -> Question:
    found = list(_entries(name, there, "known_bugs"))
    first = next(entry for _, entry in found if entry is not None)
    answers = [None if entry is None else Told(kernel, entry["verdict"], entry["verdict"], entry["seen"])
               for kernel, entry in found]
    return Question(name, first["title"], first["severity"], first["means"], first["commit"], answers, _states(answers))


def _row(name: str, there: Sequence[SurveyOf]) -> Question:
    found = list(_entries(name, there, "behaviour"))
    first = next(entry for _, entry in found if entry is not None)
    answers = [None if entry is None else _answer(kernel, entry) for kernel, entry in found]
    return Question(name, first["says"], "", "", "", answers, _states(answers))


def _answer(kernel: str, row: Mapping[str, Any]) -> Told:
    verdict = row["verdict"]
    why = row["why"] or (f"expected: {row['expected']}" if verdict == "differs" else "")
    return Told(kernel, "skipped" if verdict == "skipped" else row["result"], verdict, why)


def _states(answers: Sequence[Told | None]) -> list[str]:
    said = [answer for answer in answers if answer is not None]
    # Not asked, or not to be told: that is no other answer.
    told = {answer.text for answer in said if answer.verdict not in ("skipped", "cannot tell", "not tested")}
    return [*dict.fromkeys(answer.verdict.replace(" ", "-") for answer in said), *(["varies"] if len(told) > 1 else [])]

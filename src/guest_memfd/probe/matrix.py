"""Surveys of several kernels side by side: verdicts, known bugs, and each row whose result is not the same everywhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from guest_memfd.probe.report import ROW_VERDICTS

SHORT = {"present": "PRESENT", "fixed": "fixed", "cannot tell": "?", "not tested": "-"}
"""Verdict on a known bug -> what the table has."""

MARKS = {"differs": " *", "unknown": " ~"}


class SurveyOf(NamedTuple):
    """A survey as JSON, of a *kernel*; or the *problem* why there is none. seconds: of the command."""

    kernel: str
    survey: Mapping[str, Any] | None
    problem: str = ""
    seconds: float = 0.0


def as_tables(surveys: Sequence[SurveyOf]) -> Iterator[str]:
    """The tables, in Markdown."""
    there = [each for each in surveys if each.survey is not None]
    yield from _table("kernel", (*ROW_VERDICTS, "seconds"), [
        (each.kernel, [*_counts(each), f"{each.seconds:.0f}"] if each.survey is not None else [each.problem])
        for each in surveys])
    names = [each.kernel for each in there]
    bugs = list(dict.fromkeys(bug["id"] for each in there for bug in _of(each, "known_bugs")))
    if bugs:
        yield ""
        yield from _table("known bug (?: cannot tell, -: not tested)", names, [
            (bug, [SHORT[found["verdict"]] if (found := _found(each, "known_bugs", bug)) else "" for each in there])
            for bug in bugs if any((_found(each, "known_bugs", bug) or {}).get("verdict") in ("present", "fixed")
                                   for each in there)])
    # Compared without the marks: the same result may be expected of one kernel and unknown of another.
    rows = [row for row in dict.fromkeys(row["id"] for each in there for row in _of(each, "behaviour"))
            if len({_cell(each, row).rstrip("*~ ") for each in there} - {""}) > 1]
    if rows:
        yield ""
        yield from _table("row whose result is not the same everywhere (*: differs, ~: not known, blank: skipped)", names, [
            (row, [_cell(each, row) for each in there]) for row in rows])
    yield from _unexplained(there)


# What is neither expected nor skipped, and why what is skipped is.
def _unexplained(there: Sequence[SurveyOf]) -> Iterator[str]:
    for each in there:
        rows = _of(each, "behaviour")
        odd = [f"{row['id']} ({row['result']}, expected {row['expected'] or 'not known'})" for row in rows
               if row["verdict"] in MARKS]
        skipped: dict[str, int] = {}
        for row in rows:
            if row["verdict"] == "skipped":
                skipped[row["why"]] = skipped.get(row["why"], 0) + 1
        if odd or skipped:
            yield ""
            yield f"{each.kernel}:"
            yield from (f"- {row}" for row in odd)
            yield from (f"- {number} skipped: {why}" for why, number in skipped.items())


def _of(each: SurveyOf, part: str) -> Sequence[Mapping[str, Any]]:
    assert each.survey is not None
    found: Sequence[Mapping[str, Any]] = each.survey.get(part, ())
    return found


def _found(each: SurveyOf, part: str, name: str) -> Mapping[str, Any] | None:
    return next((entry for entry in _of(each, part) if entry["id"] == name), None)


def _cell(each: SurveyOf, name: str) -> str:
    row = _found(each, "behaviour", name)
    return "" if row is None or row["verdict"] == "skipped" else f"{row['result']}{MARKS.get(row['verdict'], '')}"


def _counts(each: SurveyOf) -> list[str]:
    verdicts = [row["verdict"] for row in _of(each, "behaviour")]
    return [str(verdicts.count(verdict)) for verdict in ROW_VERDICTS]


def _table(corner: str, heads: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> Iterator[str]:
    yield f"| {' | '.join((corner, *heads))} |"
    yield f"|{'---|' * (len(heads) + 1)}"
    for name, cells in rows:
        # A bar would begin another cell.
        yield f"| {' | '.join((name, *(cell.replace('|', '/') for cell in cells)))} |"

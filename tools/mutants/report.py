"""What became of the mutants, as tables and as JSON."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from mutants.mutant import Mutant
from mutants.trial import KILLED, SAME, SURVIVED, TIMEOUT, UNREACHED, Fate

EQUIVALENT = "equivalent"
COLUMNS = (KILLED, SURVIVED, SAME, UNREACHED, TIMEOUT, EQUIVALENT)
ALIVE = (SURVIVED, SAME, UNREACHED, TIMEOUT)


class Result(NamedTuple):
    """A mutant, its fate, and why it is judged equivalent, if it is."""

    mutant: Mutant
    fate: Fate
    equivalent: str | None = None

    @property
    def column(self) -> str:
        """Where it is counted: a mutant that is killed is killed, whatever the list says."""
        return self.fate.fate if self.equivalent is None or self.fate.fate == KILLED else EQUIVALENT


def share(results: Sequence[Result]) -> float:
    """Per cent killed of those not judged equivalent; 100 if there are none."""
    counts = Counter(result.column for result in results)
    judged = len(results) - counts[EQUIVALENT]
    return 100 * counts[KILLED] / judged if judged else 100.0


def text(results: Sequence[Result]) -> str:
    """Tables by file and by operator, those that live, and the sum."""
    parts = [
        "\n".join(_table("file", results, lambda result: result.mutant.site.file)),
        "\n".join(_table("operator", results, lambda result: result.mutant.operator)),
        *("\n".join(_alive(fate, results)) for fate in ALIVE if any(result.column == fate for result in results)),
        _sum(results),
    ]
    return "\n\n".join(parts)


def as_json(results: Sequence[Result]) -> str:
    """All results, for programs."""
    return json.dumps({
        "share": round(share(results), 2),
        "totals": dict(Counter(result.column for result in results)),
        "mutants": [
            {"id": mutant.id, "description": mutant.description, **fate._asdict(), "equivalent": equivalent}
            for mutant, fate, equivalent in results
        ],
    }, indent=1)


def _table(name: str, results: Sequence[Result], group: Callable[[Result], str]) -> Iterator[str]:
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(group(result), []).append(result)
    width = max(len(name) for name in (*groups, name))
    yield f"{name:{width}}  {'  '.join(COLUMNS)}     of  killed %"
    for key, members in groups.items():
        counts = Counter(result.column for result in members)
        numbers = "  ".join(f"{counts[column] or '.':>{len(column)}}" for column in COLUMNS)
        yield f"{key:{width}}  {numbers}  {len(members):>5}  {share(members):>8.1f}"


def _alive(fate: str, results: Sequence[Result]) -> Iterator[str]:
    yield f"{fate}:"
    for result in results:
        if result.column == fate:
            yield f"  {result.mutant.id}\n      {result.mutant.description}"


def _sum(results: Sequence[Result]) -> str:
    counts = Counter(result.column for result in results)
    said = ", ".join(f"{counts[column]} {column}" for column in COLUMNS if counts[column])
    by = Counter(result.fate.killer for result in results if result.column == KILLED)
    said += "".join(f"; by the {killer} {number}" for killer, number in by.items() if len(by) > 1)
    return f"{len(results)} mutants: {said}; {share(results):.1f} % killed of those not judged equivalent"

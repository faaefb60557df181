"""What `gmem check` prints for people: the verdict, law by law, one counterexample, and how much was explored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from guest_memfd.check.survived import Survived
from guest_memfd.check.verdict import Found, LawReport, Report
from guest_memfd.report.counterexample import Counterexample, commands, screen, wrap
from guest_memfd.report.sentence import injected
from guest_memfd.report.style import Style


def check(
    report: Report, survived: Sequence[Survived], style: Style, *, explored: str, folder: str | None, verbose: bool
) -> Iterator[str]:
    """The lines on one design under one hypervisor; *verbose* shows the way to every finding and not to the first only.

    explored: which scenarios, in words; folder: where the traces have been saved, None if nowhere.
    """
    yield headline(report, style)
    for law in report.laws.values():
        yield from _law(law, style)
    others = _others(report)
    if others:
        yield ""
        yield style.head("other ways to break a law")
        for found in others:
            yield from wrap(f"{len(found.finding.steps)} steps of {', '.join(found.parties)}: {found.evidence}",
                            f"  {found.law:<17}")
    for found in report.findings if verbose else _first(report):
        yield ""
        again = _again(report, found, folder)
        yield from screen(Counterexample(report.design, report.hypervisor, found.parties, found.finding, again), style)
    if survived:
        yield ""
        yield style.head("aborts that the kernel survives")
        yield from _survived(survived)
    yield ""
    yield from amount([report], explored)
    yield f"time: {report.seconds:.1f} s"


def headline(report: Report, style: Style) -> str:
    """``none on gunyah: refuted, 2 of 9 laws broken``."""
    judged = [law for law in report.laws.values() if law.verdict != "reported"]
    broken = sum(law.verdict == "refuted" for law in judged)
    what = f"{report.design} on {report.hypervisor}: "
    if report.verdict == "refuted":
        return style.head(what) + style.bad(f"refuted, {broken} of {_laws(len(judged))} broken")
    if report.verdict == "holds":
        return style.head(what) + style.good(f"holds, {_laws(len(judged))} kept")
    return style.head(what) + style.doubt("undetermined, nothing is proved: " + "; ".join(report.limits))


def _laws(count: int) -> str:
    return f"{count} law{'' if count == 1 else 's'}"


def _law(law: LawReport, style: Style) -> Iterator[str]:
    name = f"  {law.law:<17}"
    if law.verdict == "refuted" and law.parties is not None:
        yield f"{name}{style.bad('broken')} in {law.steps} steps of {', '.join(law.parties)}"
        yield from wrap(law.evidence or "", " " * len(name))
    elif law.verdict == "holds":
        yield f"{name}{style.good('kept')}"
    elif law.verdict == "reported":
        yield f"{name}counted by gmem compare, not judged"
    else:
        yield f"{name}{style.doubt('undetermined')}"


# The gravest: the first law, in the order of the laws, that is broken.
def _first(report: Report) -> Iterator[Found]:
    for law in report.laws:
        for found in report.findings:
            if found.law == law:
                yield found
                return


# Of each law the shortest trace is saved, and no other.
def _again(report: Report, found: Found, folder: str | None) -> tuple[tuple[str, str], ...]:
    if found.evidence != report.laws[found.law].evidence:
        return ()
    return commands(report.design, report.hypervisor, found.parties, found.law, failures=report.failures, folder=folder)


def _others(report: Report) -> list[Found]:
    return [f for f in report.findings if f.evidence != report.laws[f.law].evidence]


def _survived(survived: Sequence[Survived]) -> Iterator[str]:
    ways: dict[tuple[str, int, str], list[str]] = {}
    for event in survived:
        ways.setdefault((event.kind, event.stage, event.why), []).append(f"{event.party}'s {event.what}")
    for (kind, stage, why), who in ways.items():
        yield from wrap(f"{' and '.join(who)}: {kind} at stage {stage}; {why}", "  ", "    ")


def amount(reports: Sequence[Report], explored: str) -> Iterator[str]:
    """How much was explored, and what was not."""
    scenarios, states, transitions = (
        sum(getattr(r, what) for r in reports) for what in ("scenarios", "states", "transitions"))
    yield (f"explored: {explored}, {scenarios} scenario{'' if scenarios == 1 else 's'}, "
           f"{injected(reports[0].failures)}")
    yield f"          {states:,} states, {transitions:,} transitions"
    for report in reports:
        for limit in report.limits:
            yield f"limit: {report.design} on {report.hypervisor}: {limit}"

"""What `gmem check` prints for people: the verdict, law by law, one counterexample, and how much was explored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from guest_memfd.explore.suite.survived import Survived
from guest_memfd.explore.suite.verdict import Found, LawReport, Report
from guest_memfd.report.counterexample import Command, Counterexample, commands, length, screen, way
from guest_memfd.report.sentence import injected
from guest_memfd.report.style import Style
from guest_memfd.words.scene import Scene


def check(
    report: Report, survived: Sequence[Survived], style: Style, *, explored: str, folder: str | None, verbose: bool,
    loads: Sequence[str] = (),
) -> Iterator[str]:
    """The lines on one design under one hypervisor; *verbose* shows the way to every finding and not to the first only.

    explored: which scenarios, in words; folder: where the traces have been saved, None if nowhere.
    loads: files that have to be loaded to see it again.
    """
    yield from _headline(report, style)
    for law in report.laws.values():
        yield from _law(law, style)
    others = _others(report)
    if others:
        yield ""
        yield style.head("other ways to break a law")
        for found in others:
            how = f"{'in ' if found.finding.steps else ''}{length(found.finding.steps, found.parties)}{_where(found.scene)}"
            yield from style.wrap(f"{how}: {found.evidence}", f"  {found.law:<16} ")
    for found in report.findings if verbose else _first(report):
        yield ""
        again = _again(report, found, folder, loads)
        example = Counterexample(report.design, report.hypervisor, found.scene, found.parties, found.finding, again)
        yield from screen(example, style)
    if survived:
        yield ""
        yield style.head("aborts that the kernel survives")
        yield from _survived(survived, style)
    yield ""
    yield from amount([report], explored, style)
    yield f"time: {report.seconds:.1f} s"


def headline(report: Report, style: Style) -> str:
    """``none on gunyah: refuted, 2 of 9 laws broken``, in one line."""
    return style.head(_about(report)) + _EMPHASIS[report.verdict](style, _found(report))


# In as many lines as it takes.
def _headline(report: Report, style: Style) -> list[str]:
    if len(_about(report) + _found(report)) <= style.width:
        return [headline(report, style)]
    return style.lead(_about(report), style.head, _found(report))


def _about(report: Report) -> str:
    return f"{report.design} on {report.hypervisor}: "


def _found(report: Report) -> str:
    judged = list(report.laws.values())
    if report.verdict == "refuted":
        return f"refuted, {sum(law.verdict == 'refuted' for law in judged)} of {_laws(len(judged))} broken"
    if report.verdict == "holds":
        return f"holds, {_laws(len(judged))} kept"
    if not report.limits:
        return f"holds, but nothing happened: it never was that {'; '.join(report.missing)}"
    return f"undetermined, nothing is proved: {'; '.join(report.limits)}"


_EMPHASIS = {"refuted": Style.bad, "holds": Style.good, "undetermined": Style.doubt}


def _laws(count: int) -> str:
    return f"{count} law{'' if count == 1 else 's'}"


# The plainest scene goes without saying.
def _where(scene: Scene | None) -> str:
    return "" if scene is None or scene == Scene() else f" in scene {scene.name}"


def _law(law: LawReport, style: Style) -> Iterator[str]:
    name = f"  {law.law:<16} "
    if law.verdict == "refuted":
        how = f"{'in ' if law.steps else ''}{way(law, law.parties or ())}{_where(law.scene)}"
        first, *rest = style.wrap(f"broken {how}", name)
        yield first.replace("broken", style.bad("broken"), 1)
        yield from rest
        yield from style.wrap(law.evidence or "", " " * len(name))
    elif law.verdict == "holds":
        yield f"{name}{style.good('kept')}"
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
def _again(report: Report, found: Found, folder: str | None, loads: Sequence[str]) -> tuple[Command, ...]:
    if found.evidence != report.laws[found.law].evidence:
        return ()
    return commands(report.design, report.hypervisor, found.scene, found.parties, found.law, failures=report.failures,
                    folder=folder, loads=loads)


def _others(report: Report) -> list[Found]:
    return [f for f in report.findings if f.evidence != report.laws[f.law].evidence]


def _survived(survived: Sequence[Survived], style: Style) -> Iterator[str]:
    ways: dict[tuple[str, int, str], list[str]] = {}
    for event in survived:
        ways.setdefault((event.kind, event.stage, event.why), []).append(f"{event.party}'s {event.what}")
    for (kind, stage, why), who in ways.items():
        yield from style.wrap(f"{' and '.join(who)}: {kind} at stage {stage}; {why}", "  ", "    ")


def amount(reports: Sequence[Report], explored: str, style: Style) -> Iterator[str]:
    """How much was explored, and what was not."""
    scenarios, states, transitions = (
        sum(getattr(r, what) for r in reports) for what in ("scenarios", "states", "transitions"))
    yield from style.wrap(f"{explored}, {scenarios} scenario{'' if scenarios == 1 else 's'}, {injected(reports[0])}",
                    "explored: ")
    reduced = f" ({', '.join(reports[0].reductions)})" if reports[0].reductions else ""
    yield f"          {states:,} states, {transitions:,} transitions{reduced}"
    scenes = dict.fromkeys(scene for report in reports for scene in report.scenes)
    if len(scenes) > 1:
        yield from style.wrap(", ".join(scenes), "scenes:   ")
    yield from _refused(reports, style)
    yield from _never(reports, style)
    for report in reports:
        for limit in report.limits:
            yield from style.wrap(f"{report.design} on {report.hypervisor}: {limit}", "limit: ")


# What a verdict says nothing about, for it never happened.
def _never(reports: Sequence[Report], style: Style) -> Iterator[str]:
    if len(reports) == 1 and reports[0].never:
        yield from style.wrap("; ".join(reports[0].never), "never:    ")
    elif len(reports) > 1:
        for report in reports:
            if report.missing:
                yield from style.wrap(f"{report.design} on {report.hypervisor}: {'; '.join(report.missing)}", "never:    ")


# A kernel that a design will not work on: there is no file, and nothing can go wrong with it.
def _refused(reports: Sequence[Report], style: Style) -> Iterator[str]:
    scenes: dict[str, dict[str, list[str]]] = {}
    for report in reports:
        for scene in report.refused:
            scenes.setdefault(scene, {}).setdefault(report.design, []).append(report.hypervisor)
    for scene, designs in scenes.items():
        who = "; ".join(f"{design} on {', '.join(hypervisors)}" for design, hypervisors in designs.items())
        yield from style.wrap(f"no file in scene {scene}: {who}", "refused:  ")

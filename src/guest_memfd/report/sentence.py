"""One sentence on a design that a maintainer can quote, made of what was found and of nothing else."""

from __future__ import annotations

from collections.abc import Sequence

from guest_memfd.explore.suite.verdict import LawReport, Report
from guest_memfd.report.counterexample import BEFORE, way
from guest_memfd.scenarios import SCENES
from guest_memfd.words.scene import Scene


def sentence(design: str, title: str, reports: Sequence[Report], explored: str) -> str:
    """What *reports*, all on *design*, come to; hypervisors under which the same was found share a clause.

    explored: which scenarios, in words.
    """
    groups: dict[tuple[object, ...], list[Report]] = {}
    for report in reports:
        groups.setdefault(_alike(report), []).append(report)
    order = ("refuted", "undetermined", "holds")
    clauses = [_clause(group, explored) for group in sorted(groups.values(), key=lambda g: order.index(g[0].verdict))]
    return f"{design} ({title}) {'; it '.join(clauses)}."


def _alike(report: Report) -> tuple[object, ...]:
    gravest = _gravest(report)
    return (report.verdict, len(_broken(report)), gravest and (gravest.law, gravest.steps, gravest.scene, gravest.evidence))


def _broken(report: Report) -> list[LawReport]:
    return [law for law in report.laws.values() if law.verdict == "refuted"]


# The laws come gravest first.
def _gravest(report: Report) -> LawReport | None:
    return next(iter(_broken(report)), None)


def _clause(group: Sequence[Report], explored: str) -> str:
    report = group[0]
    where = listed([r.hypervisor for r in group])
    laws = len(report.laws)
    gravest = _gravest(report)
    if gravest is not None:
        broken = len(_broken(report))
        more = f"{broken} of {laws} laws on {where}, first {gravest.law}"
        what = f"{gravest.law} on {where}" if broken == 1 else more
        who = (listed(gravest.parties or ()),)
        after = f"after {way(gravest, who)}" if gravest.steps else BEFORE
        scene = "" if gravest.scene is None or gravest.scene == Scene() else f" in scene {gravest.scene.name}"
        return f"breaks {what}: {after}{scene}, {gravest.evidence}"
    if report.verdict == "holds":
        states = sum(r.states for r in group)
        kept = f"all {laws} laws" if laws > 1 else next(iter(report.laws))
        return (f"keeps {kept} on {where}, in every interleaving of {explored}, with {injected(report)} "
                f"({states:,} states)")
    if not report.limits:
        return f"breaks no law on {where}, but nothing is proved: it never was that {'; '.join(report.missing)}"
    return f"was not explored to the end on {where}, so nothing is proved there ({'; '.join(report.limits)})"


def injected(report: Report) -> str:
    """``one injected failure``: as many as could be injected in one run."""
    counts = {report.failures}
    if report.failures is None:
        counts = {SCENES[name].failures if name in SCENES else None for name in report.scenes}
    failures = next(iter(counts)) if len(counts) == 1 else None
    if failures is None:
        return "as many injected failures as each scene has"
    return f"{failures} injected failures" if failures > 1 else f"{('no', 'one')[failures]} injected failure"


def listed(names: Sequence[str]) -> str:
    """``a, b and c``."""
    return " and ".join([*([", ".join(names[:-1])] if names[1:] else []), *names[-1:]])

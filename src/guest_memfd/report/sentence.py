"""One sentence on a design that a maintainer can quote, made of what was found and of nothing else."""

from __future__ import annotations

from collections.abc import Sequence

from guest_memfd.check.verdict import LawReport, Report


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
    return (report.verdict, len(_broken(report)), gravest and (gravest.law, gravest.steps, gravest.evidence))


def _broken(report: Report) -> list[LawReport]:
    return [law for law in report.laws.values() if law.verdict == "refuted"]


# The laws come gravest first.
def _gravest(report: Report) -> LawReport | None:
    return next(iter(_broken(report)), None)


def _clause(group: Sequence[Report], explored: str) -> str:
    report = group[0]
    where = listed([r.hypervisor for r in group])
    laws = sum(law.verdict != "reported" for law in report.laws.values())
    gravest = _gravest(report)
    if gravest is not None:
        broken = len(_broken(report))
        more = f"{broken} of {laws} laws on {where}, first {gravest.law}"
        what = f"{gravest.law} on {where}" if broken == 1 else more
        return f"breaks {what}: after {gravest.steps} steps of {listed(gravest.parties or ())}, {gravest.evidence}"
    if report.verdict == "holds":
        states = sum(r.states for r in group)
        kept = f"all {laws} laws" if laws > 1 else next(iter(report.laws))
        return (f"keeps {kept} on {where}, in every interleaving of {explored} with {injected(report.failures)} "
                f"({states:,} states)")
    return f"was not explored to the end on {where}, so nothing is proved there ({'; '.join(report.limits)})"


def injected(failures: int) -> str:
    """``one injected failure``."""
    return f"{failures} injected failures" if failures > 1 else f"{('no', 'one')[failures]} injected failure"


def listed(names: Sequence[str]) -> str:
    """``a, b and c``."""
    return " and ".join([*([", ".join(names[:-1])] if names[1:] else []), *names[-1:]])

"""Results as KTAP, the kernel's test output (Documentation/dev-tools/ktap.rst): one test per law."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from guest_memfd.explore.suite.verdict import LawReport, Report
from guest_memfd.report.counterexample import way


def ktap(reports: Sequence[Report]) -> Iterator[str]:
    """The lines. What is undetermined is `not ok`: a search that stopped early is no pass."""
    tests = [(report, law) for report in reports for law in report.laws.values()]
    yield "KTAP version 1"
    yield f"1..{len(tests)}"
    for number, (report, law) in enumerate(tests, 1):
        name = f"{report.design}.{report.hypervisor}.{law.law}"
        yield from (f"# {line}" for line in _diagnostics(report, law))
        yield f"{'ok' if law.verdict == 'holds' else 'not ok'} {number} {name}{_directive(law)}"
    verdicts = [law.verdict for _, law in tests]
    passed = verdicts.count("holds")
    yield f"# Totals: pass:{passed} fail:{len(tests) - passed} xfail:0 xpass:0 skip:0 error:0"


def _directive(law: LawReport) -> str:
    return " # undetermined" if law.verdict == "undetermined" else ""


def _diagnostics(report: Report, law: LawReport) -> Iterator[str]:
    if law.verdict == "refuted":
        yield f"{way(law, law.parties or ())}: {law.evidence}"
    elif law.verdict == "undetermined":
        yield from report.limits
        yield from (f"it never was that {event}" for event in report.missing)

"""The verdicts of a first look at all scenes, nobody told where to look. (The whole suite is `gmem check library`.)"""

from __future__ import annotations

import pytest
from test_bugs import BUGS

from guest_memfd.explore.suite.check import compare
from guest_memfd.hypervisors import HYPERVISORS

pytestmark = pytest.mark.long


def test_the_library_keeps_every_law() -> None:
    reports = compare([("library", name) for name in HYPERVISORS], full=False)
    print(*(f"{r.hypervisor}: {r.states:,} states, {r.scenarios} scenarios, {r.seconds:.0f} s" for r in reports), sep="\n")
    assert [(r.hypervisor, r.verdict, r.limits) for r in reports] == [(name, "holds", ()) for name in HYPERVISORS]


@pytest.mark.parametrize(("design", "hypervisor"), sorted({(b.design, b.hypervisor) for b in BUGS}))
def test_known_bugs_are_among_what_is_found(design: str, hypervisor: str) -> None:
    (report,) = compare([(design, hypervisor)], scenes=["two-pages"], full=False)
    found = [(f.law, f.evidence, len(f.finding.steps)) for f in report.findings]
    for bug in BUGS:
        if (bug.design, bug.hypervisor) == (design, hypervisor):
            shortest = min((n for law, words, n in found if law == bug.law and bug.evidence in words), default=None)
            assert shortest is not None, bug
            assert shortest <= bug.steps, bug

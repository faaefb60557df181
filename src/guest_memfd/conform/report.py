"""What came of a comparison, for people and for programs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from guest_memfd.conform.compare import Difference, Known, Tally
from guest_memfd.conform.known import KNOWN
from guest_memfd.conform.operations import OPERATIONS, UserOperation
from guest_memfd.conform.sequence import as_json
from guest_memfd.report.style import Style

SCHEMA = "guest-memfd-conform-report/1"


@dataclass(frozen=True)
class ConformReport:
    """Tallies of *tables* and of what was drawn at random from *seed*, operations that were *skipped* with the reason.

    kernel: in words. emulated: what it was compared with, in words; release: whose answers that gave. seconds: of the
    comparison. known, operations: what may differ, and what there is to do.
    """

    kernel: str
    emulated: str
    release: str
    design: str
    seed: int
    tables: Tally
    random: Tally
    seconds: float
    skipped: Mapping[str, str] = field(default_factory=dict)
    known: Known = KNOWN
    operations: Mapping[str, UserOperation] = field(default_factory=lambda: OPERATIONS)

    @property
    def differences(self) -> list[Difference]:
        """All without a known reason."""
        return self.tables.differences + self.random.differences


def emulated_kvm(release: str, design: str) -> str:
    """The emulated /dev/kvm, in words."""
    return f"/dev/kvm of {release}, served by {design}"


def as_text(report: ConformReport, style: Style) -> Iterator[str]:
    """The report in lines for people."""
    yield from style.wrap(report.kernel, "real      ")
    yield from style.wrap(report.emulated, "emulated  ")
    yield f"tables    {_counted(report.tables)}"
    yield f"random    {_counted(report.random)}, seed {report.seed}"
    rate = (report.tables.steps + report.random.steps) / report.seconds * 60 if report.seconds else 0
    yield f"          {report.seconds:.0f} s, {rate:,.0f} operations a minute"
    asked = report.tables.by_operation + report.random.by_operation
    each = ", ".join(f"{name} {asked[name]:,}" for name in report.operations if asked[name])
    yield from style.wrap(each or "none", "of each   ")
    counted = report.tables.known + report.random.known
    yield "known differences"
    for known in report.known:
        yield from style.wrap(f"{known.name}, {counted[known.name]:,} times: {known.reason}", "  ", "    ")
    if report.skipped:
        yield "skipped"
        for name, why in report.skipped.items():
            yield from style.wrap(f"{name}: {why}", "  ", "    ")
    for number, found in enumerate(report.differences, 1):
        yield ""
        yield from difference_text(found, style, f"difference {number}")
    many = len(report.differences)
    yield style.bad(f"{many} unexplained") if many else style.good("0 unexplained")


def _counted(tally: Tally) -> str:
    return f"{tally.steps:,} operations in {tally.sequences:,} sequences"


def difference_text(found: Difference, style: Style, head: str) -> Iterator[str]:
    """The steps of *found*, and both answers to the last."""
    yield style.bad(head)
    for at, step in enumerate(found.sequence, 1):
        yield from style.wrap(str(step), f"  {at:2}. ", "      ")
    yield from style.wrap(str(found.real), "  real      ")
    yield from style.wrap(str(found.emulated), "  emulated  ")


def as_dict(report: ConformReport) -> dict[str, Any]:
    """The report as an object for programs."""
    counted = report.tables.known + report.random.known
    return {
        "schema": SCHEMA, "kernel": report.kernel, "emulated": report.emulated, "release": report.release,
        "design": report.design, "seed": report.seed,
        "operations": {"tables": report.tables.steps, "random": report.random.steps,
                       "by_name": dict(report.tables.by_operation + report.random.by_operation)},
        "known": [{"name": known.name, "reason": known.reason, "times": counted[known.name]} for known in report.known],
        "skipped": dict(report.skipped),
        "differences": [as_json(found.sequence, real=list(found.real), emulated=list(found.emulated))
                        for found in report.differences],
        "seconds": round(report.seconds, 3),
    }

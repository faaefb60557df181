"""Results for programs. Every object says its schema; `seconds` is the only thing that differs from run to run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from guest_memfd.abstract import show
from guest_memfd.explore.engine.finding import Finding, Step
from guest_memfd.explore.replay import Replay
from guest_memfd.explore.suite.survived import Survived
from guest_memfd.explore.suite.verdict import Found, Report
from guest_memfd.explore.trace import version
from guest_memfd.explore.world.cost import DesignCost, FolioCost
from guest_memfd.laws import LAWS
from guest_memfd.report.blame import offending
from guest_memfd.report.steps import call, lock_holders, result

CHECK, COMPARE, EXPLAIN, REPLAY, LIST = (
    f"guest-memfd-{what}" for what in ("check/3", "compare/2", "explain/1", "replay/1", "list/1"))
"""Names and versions of what is written here; a version changes when a field goes or changes its meaning (docs/json.md).

2: `failures` is null where every scene has its own number; no law is "reported" any more.
3, of check: one object, with a list of reports, however many hypervisors there are.
"""

WORST = ("refuted", "undetermined", "holds")
"""Verdicts, the worst first."""


def dump(thing: Any) -> str:
    """*thing* as JSON text, keys in the order they were put."""
    # ASCII: names may come from a file of someone else's, and a terminal that shows this obeys no control character.
    return json.dumps(thing, indent=1, ensure_ascii=True)


def check(
    reports: Sequence[Report], survivals: Sequence[Sequence[Survived]], sentence: str, explored: str
) -> dict[str, Any]:
    """One design under one or many hypervisors, with the trace of every law that broke (schemas/check.json).

    sentence: what a maintainer can quote; explored: which scenarios, in words.
    """
    first = reports[0]
    return {
        "schema": CHECK, "version": version(), "design": first.design,
        "verdict": min((report.verdict for report in reports), key=WORST.index), "sentence": sentence,
        "explored": explored, "failures": first.failures,
        "reports": [_report(report, survived) for report, survived in zip(reports, survivals, strict=True)],
    }


def schema() -> dict[str, Any]:
    """The JSON schema of what `check` makes, as published in the package."""
    text = (resources.files("guest_memfd.report") / "schemas" / "check.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


def _report(report: Report, survived: Sequence[Survived]) -> dict[str, Any]:
    return {
        "hypervisor": report.hypervisor, "verdict": report.verdict, "laws": _laws(report, traces=True),
        "findings": [_found(found) for found in report.findings],
        "survived": [event._asdict() for event in survived],
        "scenes": list(report.scenes), "refused": list(report.refused),
        "missing": list(report.missing), "never": list(report.never),
        "scenarios": report.scenarios, "states": report.states, "transitions": report.transitions,
        "reductions": list(report.reductions),
        "limits": list(report.limits), "unfinished": _unfinished(report), "seconds": round(report.seconds, 3),
    }


def compare(
    reports: Sequence[Report], costs: Mapping[tuple[str, str], DesignCost | None], sentences: Mapping[str, str],
    explored: str, folios: Mapping[tuple[str, str], FolioCost | None] | None,
) -> dict[str, Any]:
    """The whole table, without the traces; *folios*: what larger folios cost, None where that was not counted."""
    rows = [
        {"design": r.design, "hypervisor": r.hypervisor, "verdict": r.verdict, "laws": _laws(r, traces=False),
         "cost": _cost(costs.get((r.design, r.hypervisor))), "scenes": list(r.scenes), "refused": list(r.refused),
         "missing": list(r.missing), "never": list(r.never),
         "scenarios": r.scenarios, "states": r.states, "transitions": r.transitions, "limits": list(r.limits),
         "unfinished": _unfinished(r), "reductions": list(r.reductions),
         "seconds": round(r.seconds, 3)}
        for r in reports
    ]
    larger = None if folios is None else [
        {"case": case, "hypervisor": hypervisor, "cost": _cost(cost)} for (case, hypervisor), cost in folios.items()]
    return {"schema": COMPARE, "explored": explored, "failures": reports[0].failures, "table": rows,
            "sentences": dict(sentences), "larger_folios": larger}


def _cost(cost: DesignCost | None) -> dict[str, int] | None:
    return None if cost is None else dict(vars(cost))


def _laws(report: Report, *, traces: bool) -> dict[str, Any]:
    laws: dict[str, Any] = {}
    for name, law in report.laws.items():
        laws[name] = {
            "verdict": law.verdict, "steps": law.steps, "parties": law.parties and list(law.parties),
            "evidence": law.evidence, "scene": law.scene and law.scene.name,
        }
        if traces:
            laws[name] |= {"sentence": LAWS[name].sentence, "source": LAWS[name].source}
            laws[name]["trace"] = trace(law.finding) if law.finding else None
    return laws


def replayed(again: Replay, schema: str) -> dict[str, Any]:
    """A trace that was run again: the same verdict, or where it diverges."""
    trace, parted = again.trace, again.divergence
    return {
        "schema": schema, "design": trace.design, "hypervisor": trace.hypervisor, "scene": trace.scene.name,
        "parties": list(trace.parties),
        "law": trace.law, "evidence": trace.evidence, "same": again.same,
        "divergence": None if parted is None else {"step": parted.step, "why": parted.why},
    }


# Scenarios that met a limit: of the others the verdict says all there is to say.
def _unfinished(report: Report) -> list[dict[str, Any]]:
    return [{"scene": each.scene, "parties": list(each.parties), "limit": each.limit} for each in report.unfinished]


def _found(found: Found) -> dict[str, Any]:
    return {"law": found.law, "evidence": found.evidence, "scene": found.scene.name, "parties": list(found.parties),
            "steps": len(found.finding.steps)}


def trace(finding: Finding) -> dict[str, Any]:
    """A way to a broken law: what everybody does, what it changes, which fields of the last state are to blame."""
    names = lock_holders(finding.steps, finding.initial)
    steps = []
    before = finding.initial
    for number, step in enumerate(finding.steps, 1):
        steps.append({"step": number, **_step(step), "changed": show.changed(before, step.shared, names)})
        before = step.shared
    return {"initial": show.overview(finding.initial), "steps": steps, "blamed": sorted(offending(finding))}


def _step(step: Step) -> dict[str, Any]:
    return {
        "party": step.party, "choices": list(step.choices),
        "primitive": None if step.primitive is None else call(step.primitive),
        "result": result(step.result), "failed": step.failed,
    }

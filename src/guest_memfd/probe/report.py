"""What a survey found, for people, as JSON and as KTAP. Rule of this file: nothing is judged here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from guest_memfd.probe.bugs import VERDICTS, Found
from guest_memfd.probe.row import Judged
from guest_memfd.probe.survey import Survey
from guest_memfd.report.style import Style

SCHEMA = "guest-memfd-probe/1"
"""Name and version of the JSON object."""

ROW_VERDICTS = ("expected", "differs", "unknown", "skipped")


def as_json(found: Survey) -> dict[str, Any]:
    """One object; parts that were not asked for are absent."""
    parts: dict[str, Any] = {"schema": SCHEMA}
    if "offers" in found.parts:
        parts["offers"] = dict(found.offers.facts)
    if "behaviour" in found.parts:
        parts["summary"] = dict(_counts(found))
        parts["behaviour"] = [_row(judged) for judged in found.behaviour]
    if "bugs" in found.parts:
        parts["known_bugs"] = [_bug(bug) for bug in found.bugs]
    left = {"descriptors": found.left.descriptors, "children": found.left.children, "mappings": found.left.mappings,
            "vms": found.left.vms, "direct_map_split_kb": dict(found.left.split)}
    return {**parts, "left": left, "seconds": round(found.seconds, 3)}


def _row(judged: Judged) -> dict[str, Any]:
    return {"id": judged.row.id, "says": judged.row.says, "operation": judged.row.act.__name__,
            "input": [str(x) for x in judged.row.given],
            "result": judged.result, "expected": judged.expected, "verdict": judged.verdict, "why": judged.why}


def _bug(found: Found) -> dict[str, Any]:
    return {"id": found.bug.id, "title": found.bug.title, "verdict": found.verdict, "seen": found.seen,
            "commit": found.bug.commit,
            "means": found.bug.means}


def _counts(found: Survey) -> Mapping[str, int]:
    counts = Counter(judged.verdict for judged in found.behaviour)
    return {"rows": len(found.behaviour), **{verdict: counts[verdict] for verdict in ROW_VERDICTS}}


# -- KTAP --------------------------------------------------------------------------------------------------------------


def as_ktap(found: Survey) -> Iterator[str]:
    """A test per row; bugs are told in diagnostics, since having one fails nothing that was expected."""
    yield "KTAP version 1"
    if "offers" in found.parts:
        yield from (f"# {line}" for line in _offers(found.offers.facts))
    yield from (f"# bug {bug.bug.id}: {bug.verdict}: {bug.seen}" for bug in found.bugs)
    yield f"1..{len(found.behaviour)}"
    for number, judged in enumerate(found.behaviour, 1):
        if judged.verdict in ("differs", "unknown"):
            yield f"# {judged.row.says}"
            yield f"# result {judged.result}, expected {judged.expected or 'not known'}"
        directive = {"skipped": f" # SKIP {judged.why}", "unknown": f" # SKIP {judged.why}"}.get(judged.verdict, "")
        yield f"{'not ok' if judged.verdict == 'differs' else 'ok'} {number} {judged.row.id}{directive}"
    counts = _counts(found)
    yield (f"# Totals: pass:{counts['expected']} fail:{counts['differs']} xfail:0 xpass:0 "
           f"skip:{counts['skipped'] + counts['unknown']} error:0")


# -- text --------------------------------------------------------------------------------------------------------------


def as_text(found: Survey, style: Style, *, verbose: bool = False) -> Iterator[str]:
    """Blocks for the parts that were asked for; *verbose*: every row, and what every bug means."""
    if "offers" in found.parts:
        yield style.head("offers")
        for line in _offers(found.offers.facts):
            name, _, words = line.partition(": ")
            yield from style.wrap(words, f"  {name:<22}", " " * 24)
    if "behaviour" in found.parts:
        yield style.head("behaviour") + f": {_summary(found)}"
        yield from _behaviour(found, style, verbose)
    if "bugs" in found.parts:
        yield style.head("known bugs")
        said: set[str] = set()
        for bug in found.bugs:
            yield from _bug_lines(bug, style, verbose, again=bug.seen in said)
            said.add(bug.seen)
    first, *rest = style.wrap(f"{_left(found)}; {found.seconds:.1f} seconds", "left behind: ", "  ")
    yield from (first.replace("left behind", style.head("left behind"), 1), *rest)


def _offers(facts: Mapping[str, Any]) -> Iterator[str]:
    kvm, vcpu = facts["kvm"], facts["vcpu"]
    yield f"kernel: {facts['kernel']}, {facts['machine']}"
    if kvm["usable"]:
        yield f"KVM: {kvm['path']}, API version {kvm['api_version']}"
        yield "capabilities: " + ", ".join(f"{name} {value}" for name, value in kvm["capabilities"].items())
        yield f"guest_memfd flags: {_listed(kvm['guest_memfd_flags'])}"
        yield f"VM types: {_listed(kvm['vm_types'])}"
        yield f"vCPU: {vcpu['kind']} ({vcpu['told_by']})"
    yield f"memfd_secret: {facts['memfd_secret']}"
    yield f"page sizes: {_listed(facts['page_sizes'])}"
    yield "limits: " + ", ".join(f"{name} {soft} (hard {hard})" for name, (soft, hard) in facts["limits"].items())
    yield "module parameters: " + (", ".join(f"{name}={value}" for name,
                                             value in facts["module_parameters"].items()) or "none visible")
    yield "direct map, kB: " + (", ".join(f"{size} {kb}" for size, kb in facts["direct_map_kb"].items()) or "not shown")
    yield f"hibernation: {facts['hibernation']}"
    yield "huge pages: " + ", ".join(f"{name} {value}" for name, value in facts["transparent_hugepages"].items())
    reasons = facts["not_here"]
    for why in dict.fromkeys(reasons.values()):
        yield f"not here: {', '.join(name for name in reasons if reasons[name] == why)}: {why}"


def _listed(values: list[int]) -> str:
    return ", ".join(map(str, values)) or "none"


def _summary(found: Survey) -> str:
    counts = _counts(found)
    return f"{counts['rows']} rows: " + ", ".join(f"{counts[verdict]} {verdict}" for verdict in ROW_VERDICTS)


def _behaviour(found: Survey, style: Style, verbose: bool) -> Iterator[str]:
    colour = {"differs": style.bad, "unknown": style.doubt, "skipped": style.doubt}
    for judged in found.behaviour:
        if not verbose and judged.verdict not in ("differs", "unknown"):
            continue
        said = colour.get(judged.verdict, style.good)(f"{judged.verdict:<8}")
        result = judged.result if judged.verdict != "differs" else f"{judged.result}, expected {judged.expected}"
        first, *rest = style.wrap(f"{judged.row.id}: {result or judged.why}", f"  {judged.verdict:<8} ")
        yield first.replace(f"{judged.verdict:<8}", said, 1)
        yield from (*rest, *style.wrap(judged.row.says, " " * 11))
    if not verbose:
        for why, number in Counter(judged.why for judged in found.behaviour if judged.verdict == "skipped").items():
            yield from style.wrap(f"{number} rows: {why}", "  skipped  ")


# again: the same has been said of a bug before.
def _bug_lines(found: Found, style: Style, verbose: bool, again: bool) -> Iterator[str]:
    colour = {"present": style.bad, "fixed": style.good}.get(found.verdict, style.doubt)
    width = max(map(len, VERDICTS))
    indent = " " * (width + 3)
    first, *rest = style.wrap(f"{found.bug.id}: {found.bug.title}", f"  {found.verdict:<{width}} ")
    yield first.replace(found.verdict, colour(found.verdict), 1)
    yield from rest
    label = "seen" if found.verdict in ("present", "fixed") else "why"
    yield from style.wrap(found.seen.partition("; ")[0] if again else found.seen, f"{indent}{label}: ", indent)
    if verbose or found.verdict == "present":
        yield from style.wrap(found.bug.means, f"{indent}for a VMM: ", indent)
    if verbose:
        yield from style.wrap(found.bug.commit, f"{indent}fix: ", indent)


def _left(found: Survey) -> str:
    left = found.left
    counts = f"{left.descriptors} descriptors, {left.children} children, {left.mappings} mappings"
    owned = "nothing" if left.nothing else counts
    owned += " (VMs are not counted: debugfs is not mounted)" if left.vms is None else f", {left.vms} VMs"
    split = ", ".join(f"{size} {kb:+d} kB" for size, kb in left.split.items())
    return f"{owned}; direct map {split or 'as it was'}" + (" (never merged back)" if split else "")

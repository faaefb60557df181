"""What a survey found, for people, as JSON and as KTAP. Nothing is judged here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from guest_memfd.probe.against import Against
from guest_memfd.probe.ask.row import Judged
from guest_memfd.probe.bugs import SEVERITIES, TRAP, VERDICTS, BugFound
from guest_memfd.probe.survey import SCHEMA, Survey
from guest_memfd.report.style import Style

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
        counts = Counter(bug.verdict for bug in found.bugs)
        parts["bug_summary"] = {**{verdict: counts[verdict] for verdict in VERDICTS},
                                "present_by_severity": dict(_severities(found))}
    left = {"descriptors": found.left.descriptors, "children": found.left.children, "mappings": found.left.mappings,
            "vms": found.left.vms, "direct_map_split_kb": dict(found.left.split)}
    return {**parts, "left": left, "seconds": round(found.seconds, 3)}


def _row(judged: Judged) -> dict[str, Any]:
    return {"id": judged.row.id, "says": judged.row.says, "operation": judged.row.act.__name__,
            "input": [str(x) for x in judged.row.given],
            "result": judged.result, "expected": judged.expected, "verdict": judged.verdict, "why": judged.why}


def _bug(found: BugFound) -> dict[str, Any]:
    return {"id": found.bug.id, "title": found.bug.title, "severity": found.bug.severity, "verdict": found.verdict,
            "seen": found.seen, "commit": found.bug.commit, "means": found.bug.means}


def against_json(against: Against) -> dict[str, Any]:
    """What goes into the object besides, where there is an earlier survey."""
    return {"against": {"file": against.file, "kernel": against.kernel, "worse": against.worse,
                        "changes": [vars(change) for change in against.changes], "only_in_one": against.alone}}


def _severities(found: Survey) -> Iterator[tuple[str, int]]:
    for severity in SEVERITIES:
        number = sum(bug.bug.severity == severity and bug.verdict == "present" for bug in found.bugs)
        if number:
            yield severity, number


def _bug_summary(found: Survey) -> str:
    counts = Counter(bug.verdict for bug in found.bugs)
    kinds = ", ".join(f"{number} {severity}{'s' if number > 1 and severity != 'severe' else ''}"
                      for severity, number in _severities(found))
    said = [f"{counts[verdict]} {verdict}{f' ({kinds})' if verdict == 'present' and kinds else ''}" for verdict in VERDICTS]
    return ", ".join(said)


def _counts(found: Survey) -> Mapping[str, int]:
    counts = Counter(judged.verdict for judged in found.behaviour)
    return {"rows": len(found.behaviour), **{verdict: counts[verdict] for verdict in ROW_VERDICTS}}


# -- KTAP --------------------------------------------------------------------------------------------------------------


def as_ktap(found: Survey) -> Iterator[str]:
    """A test per row and per known bug. A trap that is there is an expected failure, a bug or worse is a failure."""
    yield "KTAP version 1"
    if "offers" in found.parts:
        yield from (f"# {line}" for line in offers(found.offers.facts))
    yield f"1..{len(found.behaviour) + len(found.bugs)}"
    for number, judged in enumerate(found.behaviour, 1):
        if judged.verdict in ("differs", "unknown"):
            yield f"# {judged.row.says}"
            yield f"# result {judged.result}, expected {judged.expected or 'not known'}"
        # Unknown is a SKIP as well: a kernel that no one has looked at yet must not turn a harness red.
        directive = {"skipped": f" # SKIP {judged.why}", "unknown": f" # SKIP {judged.why}"}.get(judged.verdict, "")
        yield f"{'not ok' if judged.verdict == 'differs' else 'ok'} {number} {judged.row.id}{directive}"
    for number, bug in enumerate(found.bugs, len(found.behaviour) + 1):
        yield from _bug_test(number, bug)
    if found.bugs:
        yield f"# known bugs: {_bug_summary(found)}"
    counts, bugs = _counts(found), Counter(map(_bug_result, found.bugs))
    yield (f"# Totals: pass:{counts['expected'] + bugs['pass']} fail:{counts['differs'] + bugs['fail']} "
           f"xfail:{bugs['xfail']} xpass:0 skip:{counts['skipped'] + counts['unknown'] + bugs['skip']} error:0")


def against_ktap(against: Against) -> Iterator[str]:
    """Diagnostics that follow, where there is an earlier survey."""
    yield f"# against {against.file}, {against.kernel}: {_changed(against)}"
    yield from (f"# {change.what} {change.id}: was {change.was}, is {change.now}" for change in against.changes)


def _bug_result(bug: BugFound) -> str:
    if bug.verdict == "present":
        return "xfail" if bug.bug.severity == TRAP else "fail"
    return "pass" if bug.verdict == "fixed" else "skip"


def _bug_test(number: int, bug: BugFound) -> Iterator[str]:
    result = _bug_result(bug)
    if bug.verdict == "present":
        yield f"# {bug.bug.severity}: {bug.bug.title}"
        yield f"# {bug.seen}"
        yield f"# for a VMM: {bug.bug.means}"
    directive = {"xfail": f" # XFAIL {bug.bug.means}", "skip": f" # SKIP {bug.verdict}: {bug.seen}"}.get(result, "")
    yield f"{'not ok' if result == 'fail' else 'ok'} {number} bug.{bug.bug.id}{directive}"


# -- text --------------------------------------------------------------------------------------------------------------


def as_text(found: Survey, style: Style, *, verbose: bool = False) -> Iterator[str]:
    """Blocks for the parts that were asked for; *verbose*: every row, and what every bug means."""
    if "offers" in found.parts:
        yield style.head("offers")
        for line in offers(found.offers.facts):
            name, _, words = line.partition(": ")
            yield from style.wrap(words, f"  {name:<22}", " " * 24)
    if "behaviour" in found.parts:
        yield style.head("behaviour") + f": {_summary(found)}"
        yield from _behaviour(found, style, verbose)
    if "bugs" in found.parts:
        yield from style.lead("known bugs", style.head, f": {_bug_summary(found)}")
        said: set[str] = set()
        for bug in found.bugs:
            yield from _bug_lines(bug, style, verbose, again=bug.seen in said)
            said.add(bug.seen)
    first, *rest = style.wrap(f"{_left(found)}; {found.seconds:.1f} seconds", "left behind: ", "  ")
    yield from (first.replace("left behind", style.head("left behind"), 1), *rest)


def against_text(against: Against, style: Style) -> Iterator[str]:
    """What has changed since an earlier survey."""
    yield from style.lead(f"against {against.file}", style.head, f" ({against.kernel}): {_changed(against)}")
    for change in against.changes:
        first, *rest = style.wrap(f"{change.id}: was {change.was}, is {change.now}", f"  {change.what:<5} ")
        yield style.bad(first) if change.worse else first
        yield from rest


def _changed(against: Against) -> str:
    what = Counter(change.what for change in against.changes)
    said = [f"{number} {kind}{'s' if number > 1 else ''}" for kind, number in what.items()]
    alone = f"; rows and bugs with an answer in one of the two only: {against.alone}" if against.alone else ""
    return f"{', '.join(said) or 'nothing'} changed{alone}"


def offers(facts: Mapping[str, Any]) -> Iterator[str]:
    """What a kernel offers, a line each: a name, a colon, and words."""
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
def _bug_lines(found: BugFound, style: Style, verbose: bool, again: bool) -> Iterator[str]:
    colour = {"present": style.bad, "fixed": style.good}.get(found.verdict, style.doubt)
    width = max(map(len, VERDICTS))
    indent = " " * (width + 3)
    severity = f" ({found.bug.severity})" if verbose or found.verdict == "present" else ""
    first, *rest = style.wrap(f"{found.bug.id}{severity}: {found.bug.title}", f"  {found.verdict:<{width}} ")
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

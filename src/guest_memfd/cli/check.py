"""`gmem check DESIGN`: explore one design, say which laws hold, show the shortest way to break one that does not."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import ExitStack

from guest_memfd.cli.elsewhere import same_elsewhere
from guest_memfd.cli.gently import Gently
from guest_memfd.cli.load import add_load, designs_of, load_all
from guest_memfd.cli.options import Scope, add_output, add_scope, hypervisors_of, scope_of
from guest_memfd.cli.output import Output, TraceFolder
from guest_memfd.designs import DESIGNS
from guest_memfd.errors import BadInput
from guest_memfd.explore.suite.plan import NAMED
from guest_memfd.explore.suite.survived import Survived, survived
from guest_memfd.explore.suite.verdict import Report
from guest_memfd.explore.trace import save
from guest_memfd.report import json, terminal
from guest_memfd.report.ktap import ktap
from guest_memfd.report.progress import Progress
from guest_memfd.report.sentence import sentence


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this verb."""
    parser.add_argument("design", metavar="DESIGN", help="which design (gmem list designs, or FILE.py:NAME)")
    add_load(parser)
    add_scope(parser)
    add_output(parser)
    parser.add_argument("--quick", action="store_true", help="a first look, as compare takes: a tenth of the time")
    parser.add_argument("--ktap", action="store_true", help="for test harnesses, as the kernel's tests report")
    parser.add_argument("--save-traces", metavar="DIR", help="save the shortest trace to each broken law there")
    parser.add_argument("-q", "--quiet", action="store_true", help="verdicts only, no progress")
    parser.add_argument("-v", "--verbose", action="store_true", help="the way to every finding, not to the first only")


def run(arguments: argparse.Namespace) -> int:
    """Explore, print, save; returns the exit code of the worst verdict."""
    if arguments.json and arguments.ktap:
        raise BadInput("--json and --ktap exclude each other")
    load_all(arguments)
    (design,) = designs_of(arguments, [arguments.design])
    scope = scope_of(arguments, full=not arguments.quick)
    pairs = [(design, hypervisor) for hypervisor in hypervisors_of(design, scope.hypervisors)]
    stop = Gently()
    with ExitStack() as stack:
        out = stack.enter_context(Output(arguments.output))
        folder = None
        if arguments.save_traces is not None:
            folder = stack.enter_context(TraceFolder(arguments.save_traces))
        same_elsewhere(pairs, scope, arguments.load)
        reports = scope.explore(pairs, Progress(quiet=arguments.quiet), stop)
        out.write(_text(arguments, scope, reports, out, ended=stop.asked()))
        if folder is not None:
            _save(reports, folder)
    return stop.code or exit_code(reports)


def exit_code(reports: Sequence[Report]) -> int:
    """2 when anything is refuted, else 3 when anything is undetermined, else 0."""
    verdicts = {report.verdict for report in reports}
    return next((code for verdict, code in (("refuted", 2), ("undetermined", 3)) if verdict in verdicts), 0)


def _text(arguments: argparse.Namespace, scope: Scope, reports: Sequence[Report], out: Output, *, ended: bool) -> str:
    if arguments.ktap:
        return "\n".join(ktap(reports))
    if arguments.quiet and not arguments.json:
        return "\n".join(terminal.headline(report, out.style) for report in reports)
    survivals = [[] if ended else _survivals(report, scope) for report in reports]
    if arguments.json:
        design = reports[0].design
        quoted = sentence(design, DESIGNS[design].title, reports, scope.words())
        return json.dump(json.check(reports, survivals, quoted, scope.words()))
    screens = [
        "\n".join(terminal.check(report, seen, out.style, explored=scope.words(), folder=arguments.save_traces,
                                 verbose=arguments.verbose, loads=arguments.load))
        for report, seen in zip(reports, survivals, strict=True)
    ]
    return "\n\n".join(screens)


READERS = ("zeropad", "kcore", "power", "page-cache-reader", "device", "pfn-cache")
"""Who reads what may be the guest's: beside a vCPU these meet every kind of abort there is."""


# Where a limit was reached no one wants to wait for more.
def _survivals(report: Report, scope: Scope) -> list[Survived]:
    if report.verdict == "undetermined":
        return []
    one = scope.parties or (NAMED[scope.scenario] if scope.scenario else None)
    return survived(report.design, report.hypervisor, [one] if one else [("vcpu", reader) for reader in READERS])


def _save(reports: Sequence[Report], folder: TraceFolder) -> None:
    for report in reports:
        shortest = {found.law: found for found in reversed(report.findings)}
        for law, found in shortest.items():
            save(report, found, folder.file(report.design, report.hypervisor, law))

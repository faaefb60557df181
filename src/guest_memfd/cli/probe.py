"""`gmem probe`: what this kernel's guest_memfd and memfd_secret offer, how they behave, which known bugs they have."""

from __future__ import annotations

import argparse
import resource
import sys
from contextlib import ExitStack

from guest_memfd.cli import probe_kernels
from guest_memfd.cli.kernel import add_machine
from guest_memfd.cli.options import add_output
from guest_memfd.cli.output import Output, opened
from guest_memfd.errors import BadInput, HostUnavailable, UnknownName
from guest_memfd.probe import report
from guest_memfd.probe.against import Against, compare, read
from guest_memfd.probe.matrix import SurveyOf
from guest_memfd.probe.saved import saved
from guest_memfd.probe.survey import PARTS, Survey, survey
from guest_memfd.report import json
from guest_memfd.uapi.kvm import PATH

FEWEST = 64
"""Descriptors; with fewer, what fails for want of one would be taken for what the kernel answers."""

EXIT_CODES = """\
exit codes: 0 nothing differs (rows that were skipped, and bugs that are present, included), 2 a row differs from what is
expected of this kernel, or something is worse than --against FILE, 1 failure of gmem itself, 4 bad input, 5 neither KVM
nor memfd_secret is here, or what --kvm names is no KVM."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this verb."""
    parser.epilog = EXIT_CODES
    group = parser.add_argument_group("what to probe")
    group.add_argument("--part", metavar="A,B,...", help=f"some of {','.join(PARTS)}; default: all")
    group.add_argument("--row", metavar="GLOB,...", action="append",
                       help="rows of the behaviour table whose id matches (repeat, or a,b)")
    group.add_argument("--kvm", metavar="PATH", help=f"the device node of KVM, which must be one (default {PATH}, if there)")
    group.add_argument("--against", metavar="FILE", help="say what has changed since a survey that --json has written, on "
                       "another kernel perhaps; a row with another result, or a bug that has come back, exits 2")
    group.add_argument("--saved", metavar="FILE", nargs="+", help="probe nothing: show surveys that --json has written, of "
                       "other machines perhaps, side by side in Markdown; also with --html")
    group.add_argument("--patience", metavar="N", type=float, default=1, help="let every row take N times as long before it "
                       "is given up, as on a busy or emulated machine (default 1)")
    group.add_argument("--expendable", action="store_true", help="this machine is made for the probe, as --kernel's "
                       "are: also try what takes memory out of use or could crash the kernel")
    probe_kernels.add_arguments(parser)
    add_machine(parser)
    add_output(parser)
    parser.add_argument("--html", metavar="PAGE", help="write a page for a browser to PAGE as well: search, filters, what "
                        "each bug means for a VMM")
    parser.add_argument("--ktap", action="store_true", help="for test harnesses, as the kernel's tests report")
    parser.add_argument("-v", "--verbose", action="store_true", help="every row, and all there is to say about every bug")


def run(arguments: argparse.Namespace) -> int:
    """Probe and print; 2 when a row differs from what is expected of this kernel, 5 when there is nothing to probe."""
    if arguments.json and arguments.ktap:
        raise BadInput("--json and --ktap exclude each other")
    if not 0 < arguments.patience <= 1000:
        raise BadInput(f"--patience {arguments.patience:g}: a number above 0, 1000 at most")
    if arguments.saved is not None:
        return _saved(arguments)
    if arguments.kernel is not None:
        return _elsewhere(arguments)
    if arguments.table:
        raise BadInput("--table is for --kernel and --saved")
    if not sys.platform.startswith("linux"):
        raise HostUnavailable(f"gmem probe asks a Linux kernel; this is {sys.platform}")
    descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if descriptors < FEWEST:
        raise HostUnavailable(f"gmem probe needs {FEWEST} descriptors, and a process may have {descriptors} here; ulimit -n "
                              "may allow more")
    globs = [glob.strip() for given in arguments.row or ("*",) for glob in given.split(",")]
    parts = _parts(arguments.part, arguments.row is not None)
    old = None if arguments.against is None else read(arguments.against)
    with ExitStack() as stack:
        out, (page,) = opened(stack, arguments, "html")
        found = survey(arguments.kvm or PATH, parts=parts, globs=globs, patience=arguments.patience,
                       expendable=arguments.expendable)
        against = None if old is None else compare(arguments.against, old, report.as_json(found))
        if page is not None:
            from guest_memfd.html import probe as html

            name = found.offers.facts["kernel"]
            page.write(html.page([SurveyOf(name, report.as_json(found), "", found.seconds)]))
        out.write(_text(arguments, found, against, out))
    has = found.offers.features
    if found.absent:
        raise HostUnavailable(f"neither KVM nor memfd_secret is here: {has.why('kvm')}; {has.why('secretmem')}")
    if arguments.kvm is not None and "kvm" not in has:
        raise HostUnavailable(f"--kvm {has.why('kvm')}")
    return 2 if found.differing or (against is not None and against.worse) else 0


# Nothing is asked: what can be chosen of a survey has been.
def _saved(arguments: argparse.Namespace) -> int:
    for name in ("kernel", "part", "row", "kvm", "against", "json", "ktap"):
        if getattr(arguments, name):
            raise BadInput(f"--saved and --{name} exclude each other: what was saved is shown as it is")
    surveys = [saved(path) for path in arguments.saved]
    with ExitStack() as stack:
        out, (page,) = opened(stack, arguments, "html")
        return probe_kernels.side_by_side(surveys, out, page)


# In the guest everything is looked at again; what can be known to be wrong is said here, before anything is fetched.
def _elsewhere(arguments: argparse.Namespace) -> int:
    _parts(arguments.part, arguments.row is not None)
    if arguments.against is not None:
        read(arguments.against)
    if arguments.kvm is not None:
        raise BadInput("--kvm is for this machine, and --kernel for another")
    return probe_kernels.probe(arguments)


# To ask for rows is to ask for the behaviour table.
def _parts(given: str | None, rows: bool) -> tuple[str, ...]:
    if given is None:
        return ("behaviour",) if rows else PARTS
    names = [name.strip() for name in given.split(",")]
    for name in names:
        if name not in PARTS:
            raise UnknownName("part", name, PARTS)
    if rows and "behaviour" not in names:
        raise BadInput("--row is for the part behaviour, which --part leaves out")
    return tuple(part for part in PARTS if part in names)


def _text(arguments: argparse.Namespace, found: Survey, against: Against | None, out: Output) -> str:
    if arguments.json:
        return json.dump(report.as_json(found) | ({} if against is None else report.against_json(against)))
    if arguments.ktap:
        return "\n".join([*report.as_ktap(found), *(report.against_ktap(against) if against else ())])
    return "\n".join([*report.as_text(found, out.style, verbose=arguments.verbose),
                      *(report.against_text(against, out.style) if against else ())])

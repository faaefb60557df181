"""`gmem probe --kernel`: the same survey, in QEMU, of other kernels."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from guest_memfd.cli.kernel import architecture, job_of, tell
from guest_memfd.cli.output import Output, opened
from guest_memfd.errors import BadInput, HostUnavailable
from guest_memfd.kernels import find
from guest_memfd.kernels.run import KernelAnswer, run
from guest_memfd.probe.matrix import SurveyOf, as_tables

ALL = "all"
OLDEST = (6, 12)
"""The first release whose guest_memfd is asked for by ``all``."""

_AGAINST = "/against.json"
_SECRETMEM = "secretmem.enable=1"                       # not the default before 6.5
NODES = 2
"""Of memory: what the kernel does with a policy shows only then."""
EMULATED = 20
"""How many times as long a row may take under emulation, on a busy host."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of its own; those of the machine come from `gmem kernel`."""
    group = parser.add_argument_group("other kernels")
    group.add_argument("--kernel", metavar="K,...", help="probe this kernel in QEMU, not the running one: 7.3, 6.18.15, a "
                       f"package, the path of an image; {ALL}: the newest of each series that can be had")
    group.add_argument("--table", action="store_true", help="several kernels side by side, in Markdown; also with --html")


def probe(arguments: argparse.Namespace) -> int:
    """Probe the kernels that `--kernel` names; the exit code is the worst of theirs."""
    names = [name.strip() for name in arguments.kernel.split(",")]
    if names == [ALL]:
        names = [name for name in find.releases(architecture(arguments)) if find.series_of(name) >= OLDEST]
    table = arguments.table or arguments.html is not None
    if len(names) > 1 and not table:
        raise BadInput("several kernels need --table")
    if table and (arguments.json or arguments.ktap or arguments.against):
        raise BadInput(f"--{'table' if arguments.table else 'html'} excludes --json, --ktap and --against")
    with ExitStack() as stack:
        out, (page,) = opened(stack, arguments, "html")
        if table:
            return side_by_side(list(_surveys(names, arguments)), out, page)
        answer = _ask(names[0], arguments, tuple(_options(arguments)))
        if answer.err:
            tell(answer.err.strip().removeprefix("gmem: "))
        out.write(answer.out.rstrip("\n"))
    return answer.code


def side_by_side(surveys: Sequence[SurveyOf], out: Output, page: Output | None) -> int:
    """Write *surveys* as tables to *out*, and as a page to *page*; the exit code is the worst of theirs."""
    if page is not None:
        from guest_memfd.html import probe as html

        page.write(html.page(surveys))
    out.write("\n".join(as_tables(surveys)))
    return _worst(surveys)


def _surveys(names: Sequence[str], arguments: argparse.Namespace) -> Iterator[SurveyOf]:
    began = time.monotonic()
    for number, name in enumerate(names):
        left = f", about {(time.monotonic() - began) / number * (len(names) - number):.0f} s to go" if number else ""
        tell(f"{number + 1} of {len(names)}: {name}{left}")
        try:
            answer = _ask(name, arguments, ("--json", *_what(arguments)))
            yield SurveyOf(answer.kernel, json.loads(answer.out), "", answer.command)
        except (HostUnavailable, ValueError) as error:
            problem = str(error) if isinstance(error, HostUnavailable) else (
                f"exit code {answer.code}: {answer.err.strip()[-200:] or 'no survey'}")
            tell(f"{name}: {problem}")
            # One kernel that does not boot takes nothing from the others: hours of emulation would be lost.
            yield SurveyOf(name, None, problem)


def _ask(name: str, arguments: argparse.Namespace, options: tuple[str, ...]) -> KernelAnswer:
    files = () if arguments.against is None else ((Path(arguments.against), _AGAINST),)
    job = job_of(arguments, ("gmem", "probe", *options), files=files)
    # The caller's words come last, and the kernel takes the last of two: --append can switch it off again.
    job = replace(job, append=f"{_SECRETMEM} {job.append}", nodes=NODES)
    return run(find.find(name, arguments.arch, tell, arguments.modules), job, tell)


def _options(arguments: argparse.Namespace) -> Iterator[str]:
    yield from _what(arguments)
    yield from (f"--{name}" for name in ("json", "ktap", "verbose") if getattr(arguments, name))
    if arguments.against is not None:
        yield from ("--against", _AGAINST)


# What is asked for; emulated, everything takes longer.
def _what(arguments: argparse.Namespace) -> Iterator[str]:
    yield from ("--expendable", "--patience", f"{arguments.patience * EMULATED:g}")
    if arguments.part is not None:
        yield from ("--part", arguments.part)
    for row in arguments.row or ():
        yield from ("--row", row)


def _worst(surveys: Sequence[SurveyOf]) -> int:
    if all(each.survey is None for each in surveys):
        raise HostUnavailable("none of the kernels has answered")
    rows = [row for each in surveys if each.survey is not None for row in each.survey.get("behaviour", ())]
    return 2 if any(row["verdict"] == "differs" for row in rows) else 0

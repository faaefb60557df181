"""`gmem explain FILE`: a saved trace on one screen, as JSON with what every step changed, or as a page for a browser."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import ExitStack

from guest_memfd.cli.load import add_load, load_all
from guest_memfd.cli.options import add_output
from guest_memfd.cli.output import opened
from guest_memfd.cli.replay import HOSTS, diverged, recorded
from guest_memfd.errors import BadInput
from guest_memfd.explore.replay import Replay, replay
from guest_memfd.explore.trace import Trace
from guest_memfd.export import perfetto
from guest_memfd.export.c import c_program
from guest_memfd.export.markdown import markdown
from guest_memfd.export.mermaid import mermaid
from guest_memfd.export.syz import syz_program
from guest_memfd.report import json
from guest_memfd.report.counterexample import Command, Counterexample, screen
from guest_memfd.report.counterexample import again as commands_of
from guest_memfd.report.steps import lines
from guest_memfd.report.style import Style

FORMS: dict[str, tuple[str, Callable[[Counterexample], Iterator[str]]]] = {
    "markdown": ("in Markdown, for a mail or a review", markdown),
    "mermaid": ("as a Mermaid sequence diagram", mermaid),
    "c": ("as a C program that makes the system calls of the trace on /dev/kvm", c_program),
    "syz": ("as a program of syzkaller that makes them", syz_program),
}
"""Option -> what it gives, and how it is made."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this verb."""
    parser.add_argument("file", metavar="FILE", help="a trace that gmem check --save-traces has saved")
    add_load(parser)
    add_output(parser)
    group = parser.add_argument_group("for other tools")
    group.add_argument("--html", metavar="PAGE", help="write a page for a browser to PAGE as well: steps, states, a cursor")
    group.add_argument("--perfetto", metavar="TRACE", help="write it to TRACE for Perfetto or chrome://tracing as well")
    for name, (words, _) in FORMS.items():
        group.add_argument(f"--{name}", action="store_true", help=f"{words}, and not as text")
    group.add_argument("--on", metavar="HOST", default=HOSTS[0], help="emulated: take the steps on the emulated machine, "
                       "too, and show descriptors, syndrome and kernel log in the page")


def run(arguments: argparse.Namespace) -> int:
    """Run the trace again for what it does not hold (the states), and print it; 3 when it cannot be followed."""
    load_all(arguments)
    trace, host = recorded(arguments)
    if host != "abstract" and arguments.html is None:
        raise BadInput(f"--on {arguments.on} is for --html; gmem replay --on {host} shows the machine as text")
    commands = commands_of(arguments.file, arguments.load)
    form = _one_of(arguments)
    with ExitStack() as stack:
        out, (page, track) = opened(stack, arguments, "html", "perfetto")
        again, html = _page(trace, host, commands) if page is not None else (replay(trace), "")
        if page is not None:
            page.write(html)
        if track is not None:
            track.write(json.dump(perfetto.counterexample(_followed("perfetto", again, commands))))
        if form is not None:
            out.write("\n".join(FORMS[form][1](_followed(form, again, commands))))
        elif arguments.json:
            out.write(json.dump({**json.replayed(again, json.EXPLAIN), "trace": json.trace(again.finding)}))
        else:
            out.write("\n".join(_screen(again, commands, out.style)))
    # 0 where `gmem replay` says 2: what was asked is how the law breaks, and not whether.
    return 0 if again.same else 3


def _screen(again: Replay, commands: tuple[Command, ...], style: Style) -> list[str]:
    if again.divergence is not None:
        return [*diverged(again, style), "", style.head("up to there"), *lines(again.steps, again.initial, style)]
    return [*screen(_example(again, commands), style)]


def _example(again: Replay, commands: tuple[Command, ...]) -> Counterexample:
    trace = again.trace
    return Counterexample(trace.design, trace.hypervisor, trace.scene, trace.parties, again.finding, commands)


def _one_of(arguments: argparse.Namespace) -> str | None:
    given = [name for name in ("json", *FORMS) if getattr(arguments, name)]
    if len(given) > 1:
        raise BadInput(f"{' and '.join(f'--{name}' for name in given)} exclude each other")
    return given[0] if given and given[0] != "json" else None


# What a form shows has to have happened: a trace that parts from its record is told as text, and as a page.
def _followed(form: str, again: Replay, commands: tuple[Command, ...]) -> Counterexample:
    if again.divergence is not None:
        raise BadInput(f"--{form}: the trace diverges at {again.divergence}")
    return _example(again, commands)


def _page(trace: Trace, host: str, commands: tuple[Command, ...]) -> tuple[Replay, str]:
    from guest_memfd.html.trace import page

    if host != "emulated":
        again = replay(trace)
        return again, page(again, commands)
    from guest_memfd.lockstep.evidence import on_machine

    shown = on_machine(trace)
    last = len(shown.again.steps)
    notes = {**shown.notes, last: [shown.evidence(), *shown.notes.get(last, ())]}
    return shown.again, page(shown.again, commands, notes, str(shown.both.host.machine))

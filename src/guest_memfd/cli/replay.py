"""`gmem replay FILE`: a saved trace once more, step by step: the same verdict, or where it diverges and why.

With ``--on emulated`` every step is taken on the emulated arm64 machine as well, which then shows its evidence.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import chain

from guest_memfd.cli.load import add_load, load_all
from guest_memfd.cli.options import add_output
from guest_memfd.cli.output import Output
from guest_memfd.errors import BadInput, UnknownName
from guest_memfd.explore.replay import Replay, replay
from guest_memfd.explore.trace import Trace, load
from guest_memfd.report import json
from guest_memfd.report.counterexample import length
from guest_memfd.report.style import Style

HOSTS = ("abstract", "emulated")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this verb."""
    parser.add_argument("file", metavar="FILE", help="a trace that gmem check --save-traces has saved")
    parser.add_argument("--on", metavar="HOST", default="abstract",
                        help="abstract (default), or emulated: on real page tables and instructions, too")
    add_load(parser)
    add_output(parser)
    parser.epilog = ("The same verdict exits 2, for the law is broken again; a trace that diverges exits 3, for it\n"
                     f"says nothing about this program any more.\n\n{parser.epilog}")


def run(arguments: argparse.Namespace) -> int:
    """Replay and say what came of it."""
    load_all(arguments)
    trace, host = recorded(arguments)
    with Output(arguments.output) as out:
        if host == "emulated":
            return _emulated(trace, out, as_json=arguments.json)
        again = replay(trace)
        if arguments.json:
            out.write(json.dump(json.replayed(again, json.REPLAY)))
        else:
            out.write("\n".join(_words(again, out.style)))
    return 2 if again.same else 3


def recorded(arguments: argparse.Namespace) -> tuple[Trace, str]:
    """The trace in ``FILE`` and the host that ``--on`` names; raises BadInput where the trace cannot run there."""
    host, _, machine = arguments.on.partition(":")
    if host not in HOSTS:
        raise UnknownName("host", host, HOSTS)
    trace = load(arguments.file)
    if machine and (host != "emulated" or machine != f"arm64/{trace.hypervisor}"):
        raise BadInput(f"--on {arguments.on}: the trace is of {trace.hypervisor}, so it runs on "
                       f"emulated:arm64/{trace.hypervisor}, or emulated for short")
    return trace, host


def _emulated(trace: Trace, out: Output, *, as_json: bool) -> int:
    from guest_memfd.lockstep.evidence import on_machine

    shown = on_machine(trace)
    if as_json:
        out.write(json.dump(json.replayed(shown.again, json.REPLAY) | {
            "machine": str(shown.both.host.machine), "evidence": shown.evidence(), "state": list(shown.lines())}))
    else:
        lines = chain.from_iterable(out.style.wrap(line, "  ", "      ") for line in shown.lines())
        out.write("\n".join([*_words(shown.again, out.style), f"on the emulated machine ({shown.both.host.machine}):",
                             *out.style.wrap(shown.evidence(), "  "), *lines]))
    return 2 if shown.same else 3


def _words(again: Replay, style: Style) -> Iterator[str]:
    return diverged(again, style) if again.divergence else _same(again, style)


def _same(again: Replay, style: Style) -> Iterator[str]:
    trace = again.trace
    how = length(again.steps, trace.parties)
    yield from style.lead(f"the same verdict: {trace.law} is broken", style.bad,
                          f", {trace.design} on {trace.hypervisor}, {how}")
    yield from style.wrap(trace.evidence, "  ")


def diverged(again: Replay, style: Style) -> Iterator[str]:
    """Where the trace and the program part, and what had been recorded; nothing when they do not part."""
    if again.divergence is not None:
        trace = again.trace
        yield style.doubt(f"diverges at step {again.divergence.step} of {len(trace.steps)}")
        yield from style.wrap(again.divergence.why, "  ")
        yield from style.wrap(f"{trace.law}, {trace.design} on {trace.hypervisor}: {trace.evidence}", "  recorded: ")

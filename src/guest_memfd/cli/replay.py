"""`gmem replay FILE`: a saved trace once more, step by step: the same verdict, or where it diverges and why."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from guest_memfd.check.replay import Replay, replay
from guest_memfd.check.trace import load
from guest_memfd.cli.options import add_output
from guest_memfd.cli.output import Output
from guest_memfd.report import json
from guest_memfd.report.counterexample import wrap
from guest_memfd.report.style import Style


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this verb."""
    parser.add_argument("file", metavar="FILE", help="a trace that gmem check --save-traces has saved")
    add_output(parser)
    parser.epilog = ("The same verdict exits 2, for the law is broken again; a trace that diverges exits 3, for it\n"
                     f"says nothing about this program any more.\n\n{parser.epilog}")


def run(arguments: argparse.Namespace) -> int:
    """Replay and say what came of it."""
    trace = load(arguments.file)
    with Output(arguments.output) as out:
        again = replay(trace)
        if arguments.json:
            out.write(json.dump(json.replayed(again, json.REPLAY)))
        else:
            out.write("\n".join(diverged(again, out.style) if again.divergence else _same(again, out.style)))
    return 2 if again.same else 3


def _same(again: Replay, style: Style) -> Iterator[str]:
    trace = again.trace
    yield style.bad(f"the same verdict: {trace.law} is broken") + (
        f", {trace.design} on {trace.hypervisor}, {len(again.steps)} steps of {', '.join(trace.parties)}")
    yield from wrap(trace.evidence, "  ")


def diverged(again: Replay, style: Style) -> Iterator[str]:
    """Where the trace and the program part, and what had been recorded; nothing when they do not part."""
    if again.divergence is not None:
        trace = again.trace
        yield style.doubt(f"diverges at step {again.divergence.step} of {len(trace.steps)}")
        yield from wrap(again.divergence.why, "  ")
        yield from wrap(f"{trace.law}, {trace.design} on {trace.hypervisor}: {trace.evidence}", "  recorded: ")

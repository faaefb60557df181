"""`gmem explain FILE`: a saved trace on one screen, or as JSON with what every step changed."""

from __future__ import annotations

import argparse

from guest_memfd.cli.load import add_load, load_all
from guest_memfd.cli.options import add_output
from guest_memfd.cli.output import Output
from guest_memfd.cli.replay import diverged
from guest_memfd.explore.replay import replay
from guest_memfd.explore.trace import load
from guest_memfd.report import json
from guest_memfd.report.counterexample import Counterexample, screen
from guest_memfd.report.counterexample import again as commands_of
from guest_memfd.report.steps import lines


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this verb."""
    parser.add_argument("file", metavar="FILE", help="a trace that gmem check --save-traces has saved")
    add_load(parser)
    add_output(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the trace again for what it does not hold (the states), and print it; 3 when it cannot be followed."""
    load_all(arguments)
    trace = load(arguments.file)
    with Output(arguments.output) as out:
        again = replay(trace)
        if arguments.json:
            out.write(json.dump({**json.replayed(again, json.EXPLAIN), "trace": json.trace(again.finding)}))
        elif again.divergence is not None:
            out.write("\n".join([*diverged(again, out.style), "", out.style.head("up to there"),
                                 *lines(again.steps, again.initial, out.style)]))
        else:
            example = Counterexample(trace.design, trace.hypervisor, trace.scene, trace.parties, again.finding,
                                     commands_of(arguments.file, arguments.load))
            out.write("\n".join(screen(example, out.style)))
    return 0 if again.same else 3

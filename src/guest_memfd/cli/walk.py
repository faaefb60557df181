"""`gmem walk DESIGN`: all parties of a scene at once, at random; for what is too large to be explored. It proves nothing."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import ExitStack

from guest_memfd.cli.load import add_load, designs_of, load_all
from guest_memfd.cli.options import hypervisors_of, names_of, whole
from guest_memfd.cli.output import Output, TraceFolder
from guest_memfd.errors import BadInput
from guest_memfd.explore import trace
from guest_memfd.explore.world.scenario import World, scene_of, world
from guest_memfd.explore.world.shorten import shortened
from guest_memfd.explore.world.walk import Stumble, Walked, walk
from guest_memfd.report.counterexample import Counterexample, again, screen
from guest_memfd.report.style import Style
from guest_memfd.scenarios import SCENES

STEPS = 20_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this verb."""
    parser.add_argument("design", metavar="DESIGN", help="which design (gmem list designs, or FILE.py:NAME)")
    add_load(parser)
    parser.add_argument("--hypervisor", action="append", metavar="NAME",
                        help="under which hypervisor (repeat, or a,b); default: all the design was posted for")
    parser.add_argument("--scene", action="append", metavar="NAME", help="in which scene (repeat, or a,b); default: all")
    parser.add_argument("--steps", type=whole, default=STEPS, metavar="N",
                        help=f"steps to take in each scene (default {STEPS:,})")
    parser.add_argument("--quiet-for", type=whole, metavar="N",
                        help="end in a scene when N steps have shown nothing new (default: never)")
    parser.add_argument("--seed", type=whole, default=1, metavar="N", help="of the first schedule (default 1)")
    parser.add_argument("--save-traces", metavar="DIR", help="save the shortest trace to each broken law there")
    parser.add_argument("-o", "--output", metavar="FILE", help="write there instead of standard output")


def run(arguments: argparse.Namespace) -> int:
    """Walk, make what was found shorter, print and save it; 2 if something broke, else 3, as nothing is proved."""
    for option, number in (("--steps", arguments.steps), ("--quiet-for", arguments.quiet_for)):
        if number is not None and number < 1:
            raise BadInput(f"{option} must be at least 1, not {number}")
    load_all(arguments)
    (design,) = designs_of(arguments, [arguments.design])
    hypervisors = hypervisors_of(design, names_of(arguments.hypervisor, "--hypervisor"))
    scenes = [scene_of(name) for name in names_of(arguments.scene, "--scene") or SCENES]
    shortest: dict[tuple[str, str], tuple[World, Stumble]] = {}
    with ExitStack() as stack:
        out = stack.enter_context(Output(arguments.output))
        folder = None
        if arguments.save_traces is not None:
            folder = stack.enter_context(TraceFolder(arguments.save_traces))
        # All built before the first is walked: a design that does not load in the last scene is told at once.
        worlds = [world(design, hypervisor, scene=scene) for hypervisor in hypervisors for scene in scenes]
        for built in worlds:
            walked = walk(built, arguments.steps, arguments.seed, quiet=arguments.quiet_for)
            out.write("\n".join(_words(built, walked, out.style)))
            for stumble in walked.found:
                short, what = shortened(built, stumble), (built.hypervisor.name, stumble.finding.law)
                if what not in shortest or len(short.finding.steps) < len(shortest[what][1].finding.steps):
                    shortest[what] = built, short
        for (hypervisor, law), (built, stumble) in shortest.items():
            path = folder.file(design, hypervisor, law) if folder is not None else None
            if path is not None:
                trace.write(_trace(built, stumble), path)
            example = Counterexample(design, hypervisor, built.scene, stumble.parties, stumble.finding,
                                     () if path is None else again(str(path), arguments.load))
            out.write("\n".join(["", *screen(example, out.style)]))
        if not shortest:
            out.write("nothing has broken, and nothing is proved by that")
    return 2 if shortest else 3


def _words(built: World, walked: Walked, style: Style) -> Iterator[str]:
    laws = ", ".join(f"{stumble.finding.law} (seed {stumble.seed})" for stumble in walked.found) or "nothing broken"
    yield from style.wrap(
        f"{built.design.name} on {built.hypervisor.name} in {built.scene.name}: {walked.steps:,} steps in "
        f"{walked.schedules:,} schedules, {walked.footprints:,} footprints, the last new one after {walked.last_new:,} "
        f"steps; {laws}", "", "  ")


def _trace(built: World, stumble: Stumble) -> trace.Trace:
    finding = stumble.finding
    steps = tuple(trace.TraceStep(s.party, s.choices, s.primitive, s.result, s.failed) for s in finding.steps)
    return trace.Trace(built.design.name, built.hypervisor.name, built.scene, built.scene.failures, stumble.parties,
                       finding.law, finding.evidence, steps, trace.version())

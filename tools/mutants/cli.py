"""`make mutants`: generate, try, report.

Exit code 0 if enough of them die, 2 if not, 4 if the list of equivalents is wrong, 1 if nothing could be tried.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from mutants import report
from mutants.equivalent import listed, mistakes
from mutants.mutant import Mutant, mutants
from mutants.run import NotClean, chosen, known, tried, within
from mutants.targets import TARGETS, Target
from mutants.trial import KILLED, Fate

GOAL = 97.0
"""Per cent that have to be killed, of those that are not judged equivalent."""

HOLDS, FAILED, REFUTED, BAD_INPUT = 0, 1, 2, 4
EVERY = 50


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    args = _parser().parse_args(argv)
    target = TARGETS[args.target]
    everything = mutants(target, args.only)
    wanted = chosen(_living(everything, args.again), args.only, args.sample, args.seed)
    if args.list:
        print("\n".join(f"{mutant.id}\n    {mutant.description}" for mutant in wanted))
        return HOLDS
    fates: dict[str, Fate] = {}
    try:
        within(target, lambda: _try(target, wanted, args, fates))
    except NotClean as error:
        print(f"mutants: {error}", file=sys.stderr)
        return FAILED
    files = {mutant.site.file for mutant in everything}
    equivalent = {name: why for name, why in listed().items() if name.partition(":")[0] in files}
    results = [report.Result(mutant, fates[mutant.id], equivalent.get(mutant.id)) for mutant in wanted]
    print(report.as_json(results) if args.json else report.text(results))
    wrong = mistakes(equivalent, [mutant.id for mutant in everything], fates)
    for line in wrong:
        print(f"equivalent.txt: {line}", file=sys.stderr)
    return BAD_INPUT if wrong else HOLDS if report.share(results) >= args.goal else REFUTED


def _try(target: Target, wanted: Sequence[Mutant], args: argparse.Namespace, fates: dict[str, Fate]) -> None:
    began = time.monotonic()
    base = known(target, jobs=args.jobs, values=any(mutant.site.function is None for mutant in wanted))
    for killer, done in base:
        _say(f"{killer.name}: {len(done.ran)} hold without mutants, {time.monotonic() - began:.0f} s")
    for mutant, fate in tried(wanted, base, jobs=args.jobs, seconds=args.seconds):
        fates[mutant.id] = fate
        if args.verbose:
            _say(f"{mutant.id}  {fate.fate} {fate.by} {fate.why} {fate.seconds:.1f} s")
        elif len(fates) % EVERY == 0:
            dead = sum(fate.fate == KILLED for fate in fates.values())
            _say(f"{len(fates)} of {len(wanted)}, {dead} killed, {time.monotonic() - began:.0f} s")


def _living(everything: Sequence[Mutant], path: Path | None) -> Sequence[Mutant]:
    if path is None:
        return everything
    lived = {entry["id"] for entry in json.loads(path.read_text())["mutants"] if entry["fate"] != KILLED}
    return [mutant for mutant in everything if mutant.id in lived]


def _say(what: str) -> None:
    print(f"mutants: {what}", file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mutants", description="The library with one small thing wrong: who notices?")
    parser.add_argument("--target", choices=TARGETS, default="library", help="what is changed")
    parser.add_argument("--only", metavar="GLOB", help="mutants whose name fits, as in 'core/convert.py:*:drop-step:*'")
    parser.add_argument("--sample", type=int, metavar="N", help="so many of them, drawn at random")
    parser.add_argument("--seed", type=int, default=1, help="of the sample (default 1)")
    parser.add_argument("--again", type=Path, metavar="FILE", help="those that lived, by the --json of an earlier run")
    parser.add_argument("--list", action="store_true", help="print names and what is changed, try nothing")
    parser.add_argument("--json", action="store_true", help="results for programs")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: one per CPU)")
    parser.add_argument("--seconds", type=float, default=240, help="CPU time per mutant (default 240)")
    parser.add_argument("--goal", type=float, default=GOAL, help=f"per cent that must be killed (default {GOAL:g})")
    parser.add_argument("--verbose", action="store_true", help="say what becomes of each as it becomes known")
    return parser

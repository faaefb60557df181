"""How a scenario grows, by one party, page or failure more: states, seconds and bytes; and each engine on a first look.

Prints two tables. Seconds are of CPU, on empty tables, and the engine is loaded before. A bar is as long as the logarithm
of the number of states.
"""

from __future__ import annotations

import argparse
import gc
import math
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from guest_memfd.explore.suite.plan import plan
from guest_memfd.explore.world import choice
from guest_memfd.explore.world.scenario import World, world
from guest_memfd.hypervisors import HYPERVISORS
from guest_memfd.words.scene import Scene, Slot
from guest_memfd.words.units import Gfn, Index

PARTIES = ("vcpu", "vmm2", "device", "pfn-cache")
HYPERVISOR = "pkvm"
SCENES = ("two-pages", "both-shared", "unbound")
"""In which suites are timed: those of the first look."""

BAR = 4
"""Columns for a power of ten."""


class Size(NamedTuple):
    """What is explored, in words; and what it comes to."""

    what: str
    states: int
    seconds: float
    bytes: int


def pages(number: int) -> Scene:
    """The plainest scene with so many pages, the last of them shared."""
    return Scene(f"{number}-pages", "bench", pages=number, frames=number + 1, shared=(number - 1,) if number > 1 else (),
                 slots=(Slot(Gfn(0), Index(0), number),))


def questions() -> Iterator[tuple[str, World, Sequence[str]]]:
    """One thing more at a time."""
    built = world("library", HYPERVISOR, engine="compiled")
    for number in (2, 3, 4):
        yield f"{number} parties", built, PARTIES[:number]
    for number in (1, 2, 3, 4):
        yield f"{number} pages", world("library", HYPERVISOR, scene=pages(number), engine="compiled"), PARTIES[:2]
    for number in (0, 1, 2):
        yield f"{number} failures", world("library", HYPERVISOR, failures=number, engine="compiled"), PARTIES[:3]


def sizes() -> Iterator[Size]:
    """What they come to."""
    for what, built, parties in questions():
        explorer: Any = built.explorer(parties, built.tables.empty())
        began = time.process_time()
        states = explorer.run().states
        rows = explorer.rows
        yield Size(what, states, time.process_time() - began, 8 * len(rows.used) * states + rows.table.nbytes)


def suite(hypervisor: str, engine: str, *, reduce: bool) -> tuple[int, float]:
    """States and seconds of the first look in SCENES, in one process."""
    states, began = 0, time.process_time()
    for scene in SCENES:
        built = world("library", hypervisor, scene=scene, engine=engine, reduce=reduce)
        states += sum(built.explorer(parties).run().states for parties in plan(built, full=False))
    return states, time.process_time() - began


def main() -> int:
    """Print the tables; 1 where engines disagree."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    choice.must_be_here("compiled")
    choice.prepare("compiled")
    gc.disable()
    print(f"library on {HYPERVISOR}, {', '.join(PARTIES)}: the first two, and one failure, if nothing else is said")
    print(f"{'':12}{'states':>12}{'seconds':>9}{'MB':>7}")
    for size in sizes():
        bar = "#" * round(BAR * math.log10(size.states))
        print(f"{size.what:12}{size.states:12,}{size.seconds:9.2f}{size.bytes / 1e6:7.0f}  {bar}", flush=True)
    print(f"\nlibrary, the first look in {', '.join(SCENES)}: seconds")
    print(f"{'':12}{'states':>12}{'python':>9}{'compiled':>9}{'ratio':>7}{'reduced':>9}")
    agree = True
    for hypervisor in HYPERVISORS:
        (states, slow), (same, fast) = (suite(hypervisor, engine, reduce=False) for engine in ("python", "compiled"))
        agree &= states == same
        reduced = suite(hypervisor, "compiled", reduce=True)[1]
        print(f"{hypervisor:12}{states:12,}{slow:9.1f}{fast:9.1f}{slow / fast:7.1f}{reduced:9.1f}", flush=True)
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())

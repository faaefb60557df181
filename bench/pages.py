"""How large pages for a browser are, and how long they take: `make bench-pages`. What the documents say is measured here.

A page of 40 steps is made of the longest counterexample of gunyah-v17 that has as many or more, cut there; one of 10,000 of
locks that are taken and dropped. Each time is the best of several; starting Python is told beside the command.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace

from guest_memfd.explore.engine.finding import Step
from guest_memfd.explore.replay import Replay, replay
from guest_memfd.explore.suite.check import check
from guest_memfd.explore.trace import Trace, trace_of
from guest_memfd.html.trace import page
from guest_memfd.words.primitives import Primitive
from guest_memfd.words.scene import Scene

STEPS, MANY, TIMES = 40, 10_000, 7


def main() -> int:
    """Print the table; nothing is judged."""
    report = check("gunyah-v17", "gunyah", parties=("vcpu", "stop"), laws=["nothing-lost"], jobs=1)
    trace = trace_of(report, report.laws["nothing-lost"])
    again = replay(trace)
    assert len(again.steps) >= STEPS
    cut = replace(again, steps=again.steps[:STEPS], inside=again.inside[:STEPS], looked=again.looked[:STEPS])
    page(cut)                                           # templates are read once
    print(f"{'':36} {'kB':>8} {'ms':>8}")
    row(f"page of {STEPS} steps", lambda: page(cut))
    row(f"the same, with the {len(trace.steps)} run again", lambda: page(replay(trace)))
    locks = many(again.initial)
    row(f"page of {MANY:,} steps", lambda: page(locks), times=1)
    command([sys.executable, "-c", "pass"], "python that does nothing")
    command([sys.executable, "-m", "guest_memfd", "--help"], "gmem --help")
    return 0


def row(name: str, made: Callable[[], str], times: int = TIMES) -> None:
    """Print the size of what is *made* and the best time of *times*."""
    best, text = float("inf"), ""
    for _ in range(times):
        began = time.perf_counter()
        text = made()
        best = min(best, time.perf_counter() - began)
    print(f"{name:36} {len(text.encode()) / 1000:8.1f} {best * 1000:8.1f}")


def command(argv: list[str], name: str) -> None:
    """Print the best time of a command, in a process of its own."""
    best = float("inf")
    for _ in range(TIMES):
        began = time.perf_counter()
        subprocess.run(argv, capture_output=True, check=True)
        best = min(best, time.perf_counter() - began)
    print(f"{name:36} {'':8} {best * 1000:8.1f}")


def many(initial: bytes) -> Replay:
    """A run of MANY steps of two parties, which change nothing."""
    steps = []
    for number in range(MANY):
        primitive = Primitive(("down_read", "up_read")[number % 2], ("invalidate",), "library")
        steps.append(Step(("vcpu", "stop")[number // 2 % 2], (), primitive, None, False, initial, ()))
    trace = Trace("none", "gunyah", Scene(), 1, ("vcpu", "stop"), "progress", "it never ends", (), "0")
    return Replay(trace, initial, tuple(steps))


if __name__ == "__main__":
    sys.exit(main())

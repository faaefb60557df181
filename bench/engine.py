"""How fast the explorer is: its engines against each other, and against Spin on the same scenario with the same states.

Run it with the Python that has guest_memfd installed (`make bench`). Without numba, or without spin or gcc, that comparison
is left out and said so. Nothing is judged by time: a count that differs is an error, a slow machine is not.
"""

from __future__ import annotations

import argparse
import gc
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from conversion import HostSurvives, Pages, parties

from guest_memfd.explore.engine.explorer import Explorer
from guest_memfd.explore.engine.naive import explore
from guest_memfd.explore.engine.program import Program
from guest_memfd.explore.engine.tables import Tables
from guest_memfd.explore.world.scenario import World, world

PAGES = 2
LARGE = "vcpu", "vmm2", "device", "pfn-cache"
MODEL = Path(__file__).with_name("conversion.pml")


class Size(NamedTuple):
    """How much of the scenario: which parties, and how many rounds the vCPUs and the stray loads go."""

    small: bool
    vcpu_rounds: int
    stray_rounds: int

    @property
    def defines(self) -> list[str]:
        """The same for the Promela model."""
        return [f"-DVCPU_ROUNDS={self.vcpu_rounds}", f"-DSTRAY_ROUNDS={self.stray_rounds}", *["-DSMALL"][:self.small]]


SMALL, BIG = Size(True, 1, 2), Size(False, 6, 8)


class Count(NamedTuple):
    """What an engine saw, and the CPU seconds of the exploration itself."""

    states: int
    transitions: int
    seconds: float

    def __str__(self) -> str:
        rate = f"{self.states / self.seconds:>11,.0f} states/s" if self.seconds > 0.05 else ""
        return f"{self.states:>11,} states {self.transitions:>12,} transitions {self.seconds:8.2f} s {rate}"


class Scenario(NamedTuple):
    """What an explorer is made of, but the tables."""

    machine: Any
    laws: Sequence[Any]
    programs: Sequence[Program]
    initial: bytes
    teardown: Program | None = None

    def explore(self, make: Callable[..., Explorer], tables: Tables) -> tuple[Count, Explorer]:
        """With what *make* makes: what it sees, in CPU seconds; and what has explored."""
        gc.disable()
        began = time.process_time()
        explorer = make(tables, self.programs, self.initial, self.teardown)
        result = explorer.run()
        seconds = time.process_time() - began
        gc.enable()
        return Count(result.states, result.transitions, seconds), explorer

    def tables(self) -> Tables:
        """Empty ones."""
        return Tables(self.machine, self.laws)


def model(size: Size) -> Scenario:
    """Conversions of guest memory."""
    machine = Pages(PAGES)
    return Scenario(machine, [HostSurvives()], parties(*size), machine.initial())


def shipped(built: World, names: Sequence[str]) -> Scenario:
    """One of the suite."""
    return Scenario(built.machine, built.laws, [built.programs[name] for name in names], built.initial, built.teardown)


def tabulated(size: Size) -> Count:
    """The engine in Python, tables empty at the beginning."""
    one = model(size)
    return one.explore(Explorer, one.tables())[0]


def compiled() -> tuple[Callable[..., Explorer], float] | None:
    """The compiled engine, and the seconds that loading it takes: if it is the first time, compiling. None: not here."""
    began = time.perf_counter()
    try:
        from guest_memfd.explore.engine.compiled.load import loops
        from guest_memfd.explore.engine.compiled.search import CompiledExplorer

        return partial(CompiledExplorer, loops=loops("numba")), time.perf_counter() - began
    except ImportError:
        return None


def against_python(name: str, one: Scenario, fast: Callable[..., Explorer]) -> bool:
    """Print *one* in both engines, on empty tables and again on the same; whether they agree."""
    slow, kept = one.tables(), one.tables()
    counts = [one.explore(Explorer, slow)[0], one.explore(Explorer, slow)[0], one.explore(fast, kept)[0]]
    again, explorer = one.explore(fast, kept)
    counts.append(again)
    rows = explorer.rows                                # type: ignore[attr-defined]
    words = ("tabulated", "  again", "compiled", "  again")
    for at, (what, count) in enumerate(zip(words, counts, strict=True)):
        print(f"{'' if at else name:8}{what:11} {count}")
    ratios = [counts[at].seconds / counts[at + 2].seconds for at in range(2)]
    print(f"        compiled / tabulated: {ratios[0]:.1f} on empty tables, {ratios[1]:.1f} on full ones; "
          f"{rows.bits} bits and {8 * len(rows.used)} bytes a state, {rows.table.nbytes / len(rows):.0f} more to find it")
    return len({count[:2] for count in counts}) == 1


def naive(size: Size) -> Count:
    """Its naive twin."""
    machine, programs = Pages(PAGES), parties(*size)
    began = time.process_time()
    states, transitions = explore(machine, programs, machine.initial())
    return Count(states, transitions, time.process_time() - began)


def spin_is_here() -> bool:
    """Whether there is what the comparison with Spin needs."""
    return bool(shutil.which("spin") and shutil.which("gcc"))


def spin(size: Size, *, reduce: bool = False) -> Count:
    """Spin, exhaustive, depth first, without partial-order reduction unless *reduce* (the explorer has none).

    CPU seconds of the search itself. Spin counts the initial state as a transition, too; that one is taken off.
    """
    with tempfile.TemporaryDirectory() as folder:
        run = {"cwd": folder, "check": True, "capture_output": True, "text": True}
        subprocess.run(["spin", "-a", "-o3", *size.defines, str(MODEL)], **run)     # type: ignore[call-overload]
        compile_ = ["gcc", "-O2", "-DSAFETY", *["-DNOREDUCE"][reduce:], "-o", "pan", "pan.c"]
        subprocess.run(compile_, **run)                                             # type: ignore[call-overload]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        out = subprocess.run(["./pan", "-m1000000", "-w24"], **run).stdout          # type: ignore[call-overload]
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if "errors: 0" not in out:
        raise RuntimeError(f"spin finds an error where the explorer finds none:\n{out}")
    states, transitions = (re.findall(pattern, out)[0] for pattern in (r"(\d+) states, stored", r"(\d+) transitions"))
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Count(int(states), int(transitions) - 1, seconds)


def threads(make: Callable[..., Explorer]) -> bool:
    """Print how much faster several threads explore four parties, by the clock; whether they see the same."""
    one = shipped(world("library", "pkvm"), LARGE)
    counts = {}
    for number in (1, 2):
        began = time.perf_counter()
        counts[number] = one.explore(partial(make, threads=number), one.tables())[0]._replace(
            seconds=time.perf_counter() - began)
        print(f"{'' if number > 1 else 'four':8}{number} thread{'s' * (number > 1):7} {counts[number]}")
    print(f"        2 threads / 1: {counts[1].seconds / counts[2].seconds:.2f} of the speed, by the clock")
    return counts[1][:2] == counts[2][:2]


def main() -> int:
    """Print the comparison; 1 when two engines disagree."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    small, slow = tabulated(SMALL), naive(SMALL)
    print(f"small   naive       {slow}\n        tabulated   {small}")
    agree = small[:2] == slow[:2]
    if (fast := compiled()) is not None:
        make, seconds = fast
        print(f"        compiled    loaded in {seconds:.1f} s")
        agree &= against_python("library", shipped(world("library", "pkvm"), ("vcpu", "vmm", "device")), make)
        agree &= against_python("big", model(BIG), make)
        agree &= threads(make)
        one = model(BIG)
        big, name = one.explore(make, one.tables())[0], "compiled"
    else:
        print("        compiled    left out: it needs numpy and numba (pip install -e '.[fast]')")
        big, name = tabulated(BIG), "tabulated"
        print(f"big     tabulated   {big}")
    if spin_is_here():
        theirs = spin(BIG)
        print(f"big     Spin        {theirs}\n        its reduct. {spin(BIG, reduce=True)}")
        ratio = big.states / big.seconds / theirs.states * theirs.seconds
        print(f"ratio   {name} / Spin, states per second: {ratio:.2f}")
        agree = agree and spin(SMALL)[:2] == small[:2] and theirs[:2] == big[:2]
    else:
        print("        Spin        left out: it needs the commands spin and gcc (Debian: apt install spin gcc)")
    print("counts  " + ("agree" if agree else "DISAGREE"))
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())

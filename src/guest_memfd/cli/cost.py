"""`gmem cost`: what unmapping from the direct map costs on this machine, per design and GiB, over leaving it mapped."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Iterator, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

from guest_memfd.cli.load import add_load, designs_of, load_all
from guest_memfd.cli.options import one_hypervisor, seconds
from guest_memfd.cli.output import Output
from guest_memfd.designs import DESIGNS
from guest_memfd.errors import BadInput, GuestMemfdError
from guest_memfd.explore.world.cost import DesignCost, cost
from guest_memfd.hypervisors import HYPERVISORS
from guest_memfd.report import price
from guest_memfd.report.style import Style
from guest_memfd.report.table import costs

SCHEMA = "guest-memfd-cost/1"
MOST_SECONDS = 600
"""The longest that may be measured."""
NAMES = {"fault": "a fault of memfd, with the zeroing", "gmem_fault": "a fault of guest_memfd", "clear": "zeroing a page",
         "zap": "out of the direct map, with the flush", "restore": "back into it", "split": "splitting a leaf of it",
         "call": "a system call (getppid)", "ioctl": "an ioctl (KVM_GET_API_VERSION)"}
PATIENCE = 60.0
"""Seconds more than asked for until what measures is given up: a machine that is emulated takes that for a few rounds."""
Costs = dict[str, DesignCost]


class Measured(NamedTuple):
    """What a process has measured: microseconds by name (NAMES), how many rounds of how many pages, and what is missing."""

    spreads: dict[str, price.Spread | None]
    rounds: int
    split: int
    pages: int
    why: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this verb."""
    parser.add_argument("designs", metavar="DESIGN", nargs="*", help="which designs (names, or FILE.py:NAME; default: all)")
    parser.add_argument("--hypervisor", metavar="NAME", default="kvm", help="whose calls are counted (default: kvm)")
    parser.add_argument("--seconds", metavar="N", type=seconds, default=3.0, help="how long to measure (default: 3)")
    add_load(parser)
    group = parser.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="for programs")
    group.add_argument("-o", "--output", metavar="FILE", help="write there instead of standard output")
    parser.epilog = ("The direct map is split around 256 pages or so of memfd_secret, until the next boot.\n\n"
                     "Exits 0 with prices, and 5 where nothing could be measured: then it prints what is counted alone.\n\n"
                     f"{parser.epilog}")


def run(arguments: argparse.Namespace) -> int:
    """Count what each design does, measure what that costs here, and print the price."""
    if not 0 < arguments.seconds <= MOST_SECONDS:
        raise BadInput(f"--seconds is more than 0 and at most {MOST_SECONDS}, not {arguments.seconds:g}")
    load_all(arguments)
    counted = _counted(designs_of(arguments, arguments.designs), one_hypervisor(arguments.hypervisor))
    with Output(arguments.output) as out:
        found = _measured(arguments.seconds)
        unit = None if isinstance(found, str) else price.units(found.spreads)
        if arguments.json:
            out.write(json.dumps(_object(counted, arguments.hypervisor, found, unit), indent=1))
        else:
            out.write("\n".join(_lines(counted, arguments.hypervisor, found, unit, out.style)))
    return 0 if unit is not None else 5


def _counted(chosen: Sequence[str], hypervisor: str) -> Costs:
    found = {name: cost(DESIGNS[name], HYPERVISORS[hypervisor]) for name in chosen or DESIGNS}
    counted = {name: counts for name, counts in found.items() if counts is not None}
    if not counted:
        raise BadInput(f"no design was posted for {hypervisor}" if not chosen else
                       f"{', '.join(chosen)} was not posted for {hypervisor}, or cannot lend a page there")
    return counted


# In a process of its own: where the kernel has no page for a touch it sends SIGBUS. Or why not, in words.
def _measured(duration: float) -> Measured | str:
    from guest_memfd.linux.unit_costs import measured
    from guest_memfd.probe.ask.child import Slate, Unfit, perform

    def act(_: Slate) -> str:
        try:
            seen = measured(duration)
        except GuestMemfdError as error:
            raise Unfit(str(error)) from error
        spreads = {name: price.spread(getattr(seen, name)) for name in NAMES}
        return json.dumps(Measured(spreads, len(seen.fault), len(seen.split), seen.pages, seen.why))

    slate = Slate()
    try:
        outcome = perform(act, slate, duration + PATIENCE)
    finally:
        slate.close()
    if outcome.unfit is not None:
        return outcome.unfit
    if not (outcome.result or "").startswith("["):
        why = ": the kernel has no page for it" if outcome.result in ("SIGBUS", "ENOMEM") else ""
        return f"the process that measures ended with {outcome.result}{why}"
    told = Measured(*json.loads(outcome.result or ""))
    found = told._replace(spreads={name: one and price.Spread(*one) for name, one in told.spreads.items()})
    zap = found.spreads["zap"]
    if zap is None:
        return "leaves of the direct map were split in every round but one; repeat it"
    return found if zap.median > 0 else "this machine is too busy: out of the direct map was no slower than in it; repeat it"


def _machine() -> str:
    return f"Linux {platform.release()} {platform.machine()}, {os.cpu_count()} CPUs"


def _lines(counted: Costs, hypervisor: str, found: Measured | str, unit: price.Units | None, style: Style) -> Iterator[str]:
    if isinstance(found, str) or unit is None:
        yield from style.wrap(f"nothing is measured here, so this is what is counted alone: {found}", "", "  ")
    else:
        yield from _units(found, unit, style)
        yield ""
        yield from _prices(counted, hypervisor, unit, style)
    yield ""
    yield from costs({(name, hypervisor): counts for name, counts in counted.items()}, style)


def _units(found: Measured, unit: price.Units, style: Style) -> Iterator[str]:
    yield from style.lead(f"measured on {_machine()}", style.head,
                          f"; {found.rounds} rounds of {found.pages} pages, in turns")
    yield f"{'microseconds':<42}{'median':>10}{'quartiles':>20}"
    for name, words in NAMES.items():
        one = found.spreads[name]
        if one is not None and (name != "split" or unit.split is not None):
            yield f"{words:<42}{one.median:>10.2f}{f'{one.low:.2f} to {one.high:.2f}':>20}"
    if unit.split is None:
        yield from style.wrap(f"Rounds in which leaves of the direct map were split: {found.split}, too few to tell what "
                              "that takes. A split counts as nothing.", "", "  ")
    if found.why:
        yield from style.wrap(f"No guest_memfd, so memfd and a system call stand for it: {found.why}", "", "  ")


def _prices(counted: Costs, hypervisor: str, unit: price.Units, style: Style) -> Iterator[str]:
    yield from style.lead("what unmapping costs over leaving it mapped", style.head,
                          ", per GiB lent and taken back: ms (quartiles), and beside lending it")
    alike: dict[DesignCost, list[str]] = {}
    for name, counts in counted.items():
        alike.setdefault(counts, []).append(name)
    for counts, names in alike.items():
        yield ""
        touches = counts.direct_map_writes or counts.flushes
        said = _verdict(counts, unit) if touches else "nothing"
        yield from style.wrap(f"{', '.join(names)} on {hypervisor}: {said}", "", "  ")
        for size, order in price.SHOWN.items() if touches else ():
            cell = price.price(counts, unit, order)
            yield f"  folios of {size:<6}{_cell(cell):>32}{_share(cell):>12}"
    if not unit.flush.low:
        yield from style.wrap("The flush is not more than the noise here.", "", "  ")


def _cell(cell: price.Price) -> str:
    ms, low, high = (f"{one:,.{0 if cell.ms.median >= 10 else 2}f}" for one in cell.ms[:3])
    return f"{ms} ({low} to {high})"


def _share(cell: price.Price) -> str:
    return f"{cell.share * 100:.{0 if cell.share >= 0.1 else 2}f} %"


# By the median, and by the quartiles where they say otherwise.
def _verdict(counts: DesignCost, unit: price.Units) -> str:
    if _is_noise(counts, unit):
        return "less than what disturbs it here, so only the upper figures tell something"
    by, low, high = (price.cheap_from(counts, unit, attrgetter(figure)) for figure in ("median", "low", "high"))
    limit = f"under {price.LIMIT * 100:g} % of lending"
    if by is None:
        return f"not {limit} with folios of any size"
    around = "" if low == high else f" ({_size(low)} to {_size(high)} by the quartiles)"
    return f"{limit} from folios of {price.size(by)} on{around}"


# A median that disturbance has made nothing says nothing, and not that it costs nothing.
def _is_noise(counts: DesignCost, unit: price.Units) -> bool:
    return bool(counts.direct_map_writes or counts.flushes) and price.extra(counts, unit, 0, attrgetter("median")) <= 0


def _size(order: int | None) -> str:
    return "none" if order is None else price.size(order)


def _object(counted: Costs, hypervisor: str, found: Measured | str, unit: price.Units | None) -> dict[str, Any]:
    rows = []
    for name, counts in counted.items():
        row: dict[str, Any] = {"design": name, "cost": dict(vars(counts)), "per_gib": None, "under_1_percent_from": None}
        if unit is not None:
            order = None if _is_noise(counts, unit) else price.cheap_from(counts, unit)
            row["per_gib"] = {size: {"ms": cell.ms._asdict(), "share": cell.share} for size, cell in (
                (size, price.price(counts, unit, order)) for size, order in price.SHOWN.items())}
            row["under_1_percent_from"] = None if order is None else price.size(order)
        rows.append(row)
    why = found if isinstance(found, str) else None
    measured = None if isinstance(found, str) else {name: one and one._asdict() for name, one in found.spreads.items()}
    return {"schema": SCHEMA, "machine": _machine(), "hypervisor": hypervisor, "why_not_measured": why,
            "microseconds": measured, "designs": rows}

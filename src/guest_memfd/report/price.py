"""What a design costs on a machine: its counted operations times what that machine needs for each, per GiB.

Option A takes a page out of the direct map before a guest gets it, option B leaves it there and fixes up. A design's price
is what A costs over B: its direct-map writes, flushes and splits. Lending the same GiB costs a fault for each folio, zeroing
all of it, and a call for each that the design makes of the hypervisor, taken to last as long as an ioctl that does nothing.

A folio of more than a page is one write, one flush and one call: so it is counted on the emulated machine (README.md). No
kernel has such a memfd_secret to measure.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import NamedTuple

from guest_memfd.explore.world.cost import DesignCost

GIB_PAGES = 1 << 18
"""Pages of 4 KiB in a GiB."""
ORDERS = range(19)
"""Of folios of 4 KiB to 1 GiB."""
SHOWN = {"4K": 0, "64K": 4, "2M": 9, "1G": 18}
LIMIT = 0.01
"""A share of lending below which a price is no argument."""


class Spread(NamedTuple):
    """Median and quartiles of *rounds* samples."""

    median: float
    low: float
    high: float
    rounds: int

    def at_least(self, least: float) -> Spread:
        """The same with nothing below *least*: a difference that disturbance has made negative."""
        return Spread(max(self.median, least), max(self.low, least), max(self.high, least), self.rounds)


Figure = Callable[[Spread], float]


def spread(samples: Sequence[float]) -> Spread | None:
    """Of two samples and more; None where there are fewer."""
    if len(samples) < 2:
        return None
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Spread(median, low, high, len(samples))


class Units(NamedTuple):
    """Microseconds: the fault of a page with its zeroing, zeroing alone, a call; an entry written, a flush, a split.

    split is None where too few leaves were split to tell: then it counts as nothing.
    """

    fault: Spread
    clear: Spread
    call: Spread
    write: Spread
    flush: Spread
    split: Spread | None


def units(of: Mapping[str, Spread | None]) -> Units:
    """From the spreads of what `linux.unit_costs` has measured: what is measured together is taken apart.

    A page that comes back into the direct map needs no flush, so that is a write; what going out takes longer is the flush.
    Raises ValueError where there is no spread of a figure that is needed.
    """
    fault, clear, zap, back = of.get("gmem_fault") or of["fault"], of["clear"], of["zap"], of["restore"]
    call, split = of.get("ioctl") or of["call"], of["split"]
    if fault is None or clear is None or call is None or zap is None or back is None:
        raise ValueError("too few samples")
    write = back.at_least(0)
    flush = Spread(zap.median - write.median, zap.low - write.median, zap.high - write.median, zap.rounds).at_least(0)
    # Of three rounds and more: a flush that was disturbed looks like a split.
    enough = split is not None and split.rounds > 2
    return Units(fault, clear, call, write, flush, split.at_least(0) if split is not None and enough else None)


def splits(cost: DesignCost, order: int) -> int:
    """Leaves that are split of a GiB that was one, as on x86-64: into those of 2M, and for smaller folios each of them."""
    if not cost.splits or order == max(ORDERS):
        return 0
    return 1 if order >= SHOWN["2M"] else 1 + (GIB_PAGES >> SHOWN["2M"])


def extra(cost: DesignCost, unit: Units, order: int, figure: Figure) -> float:
    """Milliseconds that A costs over B for a GiB in folios of *order*; figure: which of a spread's."""
    each = cost.direct_map_writes * figure(unit.write) + cost.flushes * figure(unit.flush)
    split = figure(unit.split) if unit.split is not None else 0.0
    return ((GIB_PAGES >> order) * each + splits(cost, order) * split) / 1e3


def lending(cost: DesignCost, unit: Units, order: int) -> float:
    """Milliseconds to lend a GiB in folios of *order*, and to take it back, without what the direct map costs."""
    enters = max(unit.fault.median - unit.clear.median, 0.0)
    each = enters + cost.hypercalls * unit.call.median
    return ((GIB_PAGES >> order) * each + GIB_PAGES * unit.clear.median) / 1e3


class Price(NamedTuple):
    """Of folios of one size: milliseconds of A over B, per GiB, and that as a share of lending it."""

    ms: Spread
    share: float


def price(cost: DesignCost, unit: Units, order: int) -> Price:
    """What A costs over B; its spread takes every part of it at its low, or its high, quartile."""
    median, low, high = (extra(cost, unit, order, attrgetter(figure)) for figure in ("median", "low", "high"))
    return Price(Spread(median, low, high, unit.flush.rounds), median / lending(cost, unit, order))


def cheap_from(cost: DesignCost, unit: Units, figure: Figure = attrgetter("median")) -> int | None:
    """The order from which on the price is under LIMIT of lending; None where that is so of no size.

    figure: which one of the price's spread; lending is taken at its median.
    """
    dear = [order for order in ORDERS if extra(cost, unit, order, figure) >= LIMIT * lending(cost, unit, order)]
    order = dear[-1] + 1 if dear else 0
    return order if order in ORDERS else None


def size(order: int) -> str:
    """``4K``, ``2M``, ``1G``: a folio of *order*."""
    kib = 4 << order
    return f"{kib}K" if kib < 1024 else f"{kib >> 10}M" if kib < 1 << 20 else f"{kib >> 20}G"

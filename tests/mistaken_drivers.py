"""Drivers that lend on demand, each with one thing wrong (hypervisors/gunyah/driver.py)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from guest_memfd.hypervisors.gunyah import driver
from guest_memfd.words.primitives import Primitive, Steps


class GunyahsDriver:
    """Gunyah's driver, procedure by procedure, so that one of them can be another."""

    def demand_page(self, library: Any, gfn: int, index: int, *, lend: bool = True, writable: bool = True) -> Steps[int]:
        return driver.demand_page(library, gfn, index, lend=lend, writable=writable)

    def mmap(self, library: Any, start: int, nr: int) -> Steps[int]:
        return driver.mmap(library, start, nr)

    def unbind(self, library: Any, start: int, nr: int) -> Steps[int]:
        return driver.unbind(library, start, nr)

    def abandon(self, library: Any, ranges: Sequence[tuple[int, int]]) -> Steps[int]:
        return driver.abandon(library, ranges)


def without(steps: Steps[Any], *names: str) -> Iterator[Primitive]:
    """*steps* but for its primitives *names* on the driver's own lock, or its own reference: they say yes at once."""
    sent: Any = None
    try:
        while True:
            asked = steps.send(sent)
            mine = asked.caller == "gunyah" and asked.name in names
            sent = True if mine else (yield asked)
    except StopIteration as stop:
        return stop.value


LOCK = ("down_read", "up_read", "down_write", "up_write")


class LendsWithoutLock(GunyahsDriver):
    """As /dev/gunyah of the machine had it: a conversion, and then a fault, with nothing held in between."""

    def demand_page(self, library: Any, gfn: int, index: int, *, lend: bool = True, writable: bool = True) -> Steps[int]:
        return without(super().demand_page(library, gfn, index, lend=lend, writable=writable), *LOCK)


class MapsWithoutLock(GunyahsDriver):
    """The lock is held by who lends, and not by who takes back."""

    def mmap(self, library: Any, start: int, nr: int) -> Steps[int]:
        return without(super().mmap(library, start, nr), *LOCK)


class AbandonsAsUnbind(GunyahsDriver):
    """The same: a dying VM's bindings end as those of a living one, and what is refused three times is left there."""

    def abandon(self, library: Any, ranges: Sequence[tuple[int, int]]) -> Steps[int]:
        refused = 0
        for start, nr in ranges:
            for _attempt in range(3):
                ret = yield from driver.unbind(library, start, nr)
                if not ret:
                    break
            refused = ret or refused
        return refused


class LendsWithoutConverting(GunyahsDriver):
    """The page goes to the guest as it is."""

    def demand_page(self, library: Any, gfn: int, index: int, *, lend: bool = True, writable: bool = True) -> Steps[int]:
        host = library.ops.host
        ret = yield from library.guest_fault(gfn, index)
        yield from host.op_returned("lend", index, 1, ret)
        return ret


class UnbindDoesNotHold(GunyahsDriver):
    """The binding's reference is taken for the caller's."""

    def unbind(self, library: Any, start: int, nr: int) -> Steps[int]:
        host = library.ops.host
        yield from host.down_write("bindings")
        ret = (yield from library.unbind(start, nr)).ret
        if not ret:
            yield from library.make_shared(start, nr)
        yield from host.up_write("bindings")
        return ret


class NeverReleases(GunyahsDriver):
    """What Gunyah keeps of the file is kept for good."""

    def abandon(self, library: Any, ranges: Sequence[tuple[int, int]]) -> Steps[int]:
        return without(super().abandon(library, ranges), "ops_released")

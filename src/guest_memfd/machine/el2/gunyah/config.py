"""Which guest addresses may hold private pages and which are emulated devices. There are 128 ranges at most.

Source: docs/api/gunyah_api.md of the hypervisor, addrspace_configure_range.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntEnum
from typing import Literal, NamedTuple

from guest_memfd.machine.el2.gunyah.errors import GunyahError, HypRefused
from guest_memfd.words.units import Ipa

MAX_RANGES = 128
"""Per address space."""

Kind = Literal["private", "vmmio"]


class RangeOp(IntEnum):
    """What addrspace_configure_range can do: add or remove a range, of VMMIO or of private memory."""

    ADD_VMMIO = 0
    REMOVE_VMMIO = 1
    ADD_PRIVATE = 2
    REMOVE_PRIVATE = 3


class ConfiguredRange(NamedTuple):
    """Guest addresses [start, end), bytes."""

    start: Ipa
    end: Ipa
    kind: Kind


class ConfiguredRanges:
    """The ranges of one address space; they never overlap, and neighbours of the same kind are one range."""

    def __init__(self) -> None:
        self._ranges: list[ConfiguredRange] = []

    def __iter__(self) -> Iterator[ConfiguredRange]:
        return iter(self._ranges)

    def __len__(self) -> int:
        return len(self._ranges)

    def apply(self, op: RangeOp, start: Ipa, end: Ipa) -> None:
        """Add or remove [start, end).

        Raises HypRefused: BUSY adding inside a range of the same kind, IDLE removing from where there is none, ARG_INVAL
        on any other mismatch, NORESOURCES beyond 128 ranges. A removal from the middle leaves two ranges.
        """
        kind: Kind = "private" if op >= RangeOp.ADD_PRIVATE else "vmmio"
        touched = [r for r in self._ranges if r.start < end and start < r.end]
        if op in (RangeOp.ADD_VMMIO, RangeOp.ADD_PRIVATE):
            self._add(ConfiguredRange(start, end, kind), touched)
        else:
            self._remove(ConfiguredRange(start, end, kind), touched)

    def _add(self, new: ConfiguredRange, touched: list[ConfiguredRange]) -> None:
        if any(r.kind == new.kind and r.start <= new.start and new.end <= r.end for r in touched):
            raise HypRefused(GunyahError.BUSY, f"{new} is configured already")
        if touched:
            raise HypRefused(GunyahError.ARG_INVAL, f"{new} runs into {touched[0]}")
        beside = [r for r in self._ranges if r.kind == new.kind and (r.end == new.start or new.end == r.start)]
        # Counted after joining its neighbours: a range that closes a gap needs no room.
        if len(self._ranges) - len(beside) == MAX_RANGES:
            raise HypRefused(GunyahError.NORESOURCES, f"{MAX_RANGES} ranges are configured")
        for found in beside:
            self._ranges.remove(found)
        self._ranges.append(ConfiguredRange(
            min(r.start for r in (new, *beside)), max(r.end for r in (new, *beside)), new.kind))

    def _remove(self, gone: ConfiguredRange, touched: list[ConfiguredRange]) -> None:
        if not touched:
            raise HypRefused(GunyahError.IDLE, f"nothing is configured in {gone}")
        found = touched[0]
        if found.kind != gone.kind or not (found.start <= gone.start and gone.end <= found.end):
            raise HypRefused(GunyahError.ARG_INVAL, f"{gone} is not inside {found}")
        edges = ((found.start, gone.start), (gone.end, found.end))
        left = [ConfiguredRange(start, end, found.kind) for start, end in edges if start < end]
        if len(self._ranges) - 1 + len(left) > MAX_RANGES:
            raise HypRefused(GunyahError.NORESOURCES, f"{MAX_RANGES} ranges are configured")
        self._ranges.remove(found)
        self._ranges += left

    def kind(self, start: Ipa, end: Ipa) -> Kind | None:
        """What all of [start, end) is configured as; None when that is nothing, or not one thing."""
        return next((found.kind for found in self._ranges if found.start <= start and end <= found.end), None)

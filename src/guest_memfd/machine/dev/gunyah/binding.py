"""Bindings: which part of which file a guest has where. Here is the arithmetic of ranges, in pages.

Source: struct gunyah_gmem_binding and its users in drivers/virt/gunyah/guest_memfd.c (series v17, patch 24).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from guest_memfd.uapi.gunyah import ACCESS_MASK, MapFlag
from guest_memfd.words.units import Gfn, Index

if TYPE_CHECKING:
    from guest_memfd.machine.dev.gunyah.memory import GunyahMemoryFile
    from guest_memfd.machine.hypcalls.gunyah import DeviceVm


@dataclass(eq=False)
class Binding:
    """Pages [start, start+nr) of *file* at *gfn* of *vm*; *flags* as MAP_MEM had them."""

    vm: DeviceVm
    file: GunyahMemoryFile
    gfn: Gfn
    start: Index
    nr: int
    flags: MapFlag

    @property
    def lend(self) -> bool:
        """Whether the guest alone may have it: everything that is not FORCE_SHARE."""
        return self.flags & ACCESS_MASK != MapFlag.FORCE_SHARE

    @property
    def writable(self) -> bool:
        """Whether the guest may write."""
        return bool(self.flags & MapFlag.ALLOW_WRITE)

    @property
    def end(self) -> Gfn:
        """The first gfn after it."""
        return self.gfn + self.nr

    def has(self, gfn: Gfn, nr: int = 1) -> bool:
        """Whether all of these gfns are in it."""
        return self.gfn <= gfn and gfn + nr <= self.end

    def meets(self, gfn: Gfn, nr: int) -> bool:
        """Whether any of these gfns is in it."""
        return gfn < self.end and self.gfn < gfn + nr

    def covers(self, start: Index, nr: int) -> bool:
        """Whether any of these pages of the file is in it."""
        return start < self.start + self.nr and self.start < start + nr

    def index(self, gfn: Gfn) -> Index:
        """The page of the file at *gfn*."""
        return self.start + (gfn - self.gfn)

    def trim(self, gfn: Gfn, nr: int) -> None:
        """Give up *nr* gfns from *gfn* on, which must be the first or the last of the binding."""
        if gfn == self.gfn:
            self.gfn, self.start = self.gfn + nr, self.start + nr
        self.nr -= nr

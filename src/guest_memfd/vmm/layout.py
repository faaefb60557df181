"""The guest's address space. Here is what is where before the guest starts, in bytes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from guest_memfd.errors import BadInput
from guest_memfd.guests import CONSOLE, PRIVATE_BASE, SHARED_BASE
from guest_memfd.guests.bootinfo import SIZE, BootHypervisor, BootInfo
from guest_memfd.guests.loader import GuestImage, fits
from guest_memfd.words.units import PAGE, Ipa


@dataclass(frozen=True)
class Layout:
    """*private* bytes at *base*, *shared* bytes at SHARED_BASE; *folio* bytes is the unit in which memory changes hands."""

    private: int = 16 << 20
    shared: int = 64 << 10
    folio: int = PAGE
    base: Ipa = PRIVATE_BASE

    def __post_init__(self) -> None:
        for name, size in (("--memory", self.private), ("--shared", self.shared)):
            if size % self.folio:
                raise BadInput(f"{name} {size:#x}: no multiple of the folio size, {self.folio:#x}")
        if not self.private:
            raise BadInput("--memory 0: a guest needs private memory for its image")
        if self.base <= SHARED_BASE < self.end and self.shared:
            raise BadInput(f"--memory {self.private:#x}: it would reach the window at {SHARED_BASE:#x}; --shared 0 leaves "
                           "that out")
        if self.base <= CONSOLE < self.end:
            raise BadInput(f"--memory {self.private:#x}: it would reach the console at {CONSOLE:#x}")
        if self.shared and SHARED_BASE % self.folio:
            raise BadInput(f"--shared {self.shared:#x}: the window at {SHARED_BASE:#x} cannot be made of folios of "
                           f"{self.folio:#x} bytes; --shared 0 leaves it out")
        if SHARED_BASE + self.shared > CONSOLE:
            raise BadInput(f"--shared {self.shared:#x}: the window would reach the console at {CONSOLE:#x}")

    @property
    def end(self) -> int:
        """The first IPA after the private memory."""
        return self.base + self.private

    def boot_info(self, image: GuestImage) -> Ipa:
        """IPA of the boot info: a page of its own after *image*. Raises BadInput when they do not fit together."""
        fits(image, [(self.base, self.private)])
        where = -(-image.end // PAGE) * PAGE
        if where + PAGE > self.end:
            raise BadInput(f"{image.name}: no page is left after the image for the boot info; it ends at {image.end:#x}, "
                           f"and private memory at {self.end:#x}")
        return Ipa(where)

    def contents(self, image: GuestImage, hypervisor: BootHypervisor) -> list[tuple[int, bytes]]:
        """(offset into the private memory, bytes) of all that is there at the start; the rest is zeros."""
        info = BootInfo(hypervisor, self.base, self.private, SHARED_BASE if self.shared else 0, self.shared)
        pieces = [*image.segments, (self.boot_info(image), info.pack())]
        return [(ipa - self.base, data) for ipa, data in pieces]

    def folios(self, contents: list[tuple[int, bytes]]) -> Iterator[tuple[int, int]]:
        """(offset, bytes) of the runs of whole folios that *contents* touch, lowest first."""
        touched = sorted({at for offset, data in contents
                          for at in range(offset // self.folio, -(-(offset + len(data)) // self.folio))})
        start = 0
        for i, at in enumerate(touched):
            if i + 1 == len(touched) or touched[i + 1] != at + 1:
                yield touched[start] * self.folio, (i + 1 - start) * self.folio
                start = i + 1


assert SIZE <= PAGE

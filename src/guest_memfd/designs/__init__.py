"""The designs: what was posted, one file per series, and ours. Third parties: entry points in ``guest_memfd.designs``."""

from __future__ import annotations

from guest_memfd.designs.design import Design
from guest_memfd.designs.guestmem_rfc1 import GuestmemRfc1
from guest_memfd.designs.gunyah_v17 import GunyahV17
from guest_memfd.designs.names import misspelt
from guest_memfd.designs.none import Fixup, NoDesign
from guest_memfd.designs.ours import OurLibrary
from guest_memfd.designs.secretmem import Secretmem
from guest_memfd.plugins import Registry


def _lacks(thing: object) -> str | None:
    if not (isinstance(thing, type) and issubclass(thing, Design)):
        return f"{thing!r} is no subclass of guest_memfd.designs.Design"
    missing = [what for what in ("name", "title", "source") if not hasattr(thing, what)]
    return f"{thing.__qualname__} lacks {', '.join(missing)}" if missing else misspelt(thing)


DESIGNS: Registry[type[Design]] = Registry("design", "guest_memfd.designs", {
    d.name: d for d in (NoDesign, GunyahV17, Fixup, Secretmem, GuestmemRfc1, OurLibrary)
}, _lacks)

__all__ = ["DESIGNS", "Design", "misspelt"]

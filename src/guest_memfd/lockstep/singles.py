"""Carrying a primitive out on the machine where a page of the scene is a page of the machine.

Frames have numbers on the abstract host and addresses on the machine: arguments and results are translated, and nothing else
is done.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from guest_memfd.machine.adversary import Adversary
from guest_memfd.machine.primitives.host import EmulatedHost
from guest_memfd.words import facts
from guest_memfd.words.primitives import Folio, Lookup, Primitive
from guest_memfd.words.units import pa_to_pfn, pfn_to_pa

PFNS = frozenset({"load_unaligned_zeropad", "copy_from_kernel_nofault", "image_copy"})
"""Primitives whose first argument is a frame number."""


class Singles:
    """*host*'s machine, as the abstract host speaks of it."""

    def __init__(self, host: EmulatedHost, adversary: Adversary) -> None:
        self.host, self.adversary = host, adversary

    def real(self, primitive: Primitive) -> Primitive:
        """*primitive* as the machine is asked for it."""
        args = tuple(map(self._real, primitive.args))
        if primitive.name in PFNS:
            # The abstract host's frame numbers are 0, 1, 2; the machine's frames lie where its allocator has put
            # them.
            args = (pa_to_pfn(self.host.machine.watched[primitive.args[0]]), *args[1:])
        return primitive._replace(args=args)

    def _real(self, value: Any) -> Any:
        if isinstance(value, Folio):
            return Folio(pa_to_pfn(self.host.machine.watched[value.pfn]), value.order)
        return tuple(map(self._real, value)) if type(value) is tuple else value

    def arm(self, primitive: Primitive, errno: int) -> None:
        """Let *primitive* fail when it is carried out next."""
        self.adversary.fail_next(self.real(primitive), errno)

    def perform(self, primitive: Primitive, who: int, *, fails: bool = False) -> Any:
        """Carry it out: the result; raises Blocked, KernelPanic. *fails*: it is armed to fail."""
        return self._told(self.host.perform(self.real(primitive), who))

    def _told(self, value: Any) -> Any:
        if isinstance(value, Folio):
            return Folio(self.host.machine.number(pfn_to_pa(value.pfn)), value.order)
        if isinstance(value, Lookup):
            return Lookup(self._told(value.folio), value.pgoff)
        return value

    @property
    def notes(self) -> list[facts.Note]:
        """What the last primitive has left for the laws."""
        return self.host.notes

    def unlike(self, saved: bytes, *, thorough: bool = False) -> Iterable[str]:
        """What is not the same of the pages that one stands for: there are none."""
        return ()

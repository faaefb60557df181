"""`none`: the direct map is left alone, as in the Gunyah series up to v16. And `fixup`, which is `none` on another kernel.

Differs from our library only in that nothing touches the direct map and nothing vetoes hibernation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from guest_memfd.compat import override
from guest_memfd.designs.design import OPERATIONS, Design
from guest_memfd.words.primitives import Folio, Steps


class NoDesign(Design):
    """Leave the direct map alone."""

    name = "none"
    title = "the direct map is left alone"
    source = "Gunyah series v1-v16; Elliot Berman, 23 Feb 2024"
    power = "none"
    no_direct_map = False
    keeps: ClassVar[Mapping[str, str]] = dict.fromkeys(
        OPERATIONS, "the series says nothing of it but that the direct map stays as it is, and that is all that differs")

    @override
    def zap_noflush(self, folio: Folio) -> Steps[int]:
        """0, with the direct map as it was: this design leaves every page mapped in the kernel."""
        yield from ()
        return 0

    @override
    def flush(self, folios: tuple[Folio, ...]) -> Steps[None]:
        """No TLB entry to remove, as no entry of the direct map has changed."""
        yield from ()


class Fixup(NoDesign):
    """Let stage-2 aborts go through the exception tables instead: do_sea() calls fixup_exception()."""

    name = "fixup"
    title = "stage-2 aborts are fixed up through the exception tables"
    source = "Elliot Berman, 23 Feb 2024 (19/35 thread): what he would prefer"
    sea_fixup = True
    keeps: ClassVar[Mapping[str, str]] = dict.fromkeys(OPERATIONS, "it is a change of do_sea(), and not of a driver")

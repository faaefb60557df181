"""What a design is to a scenario: a library that may differ from ours, and the kernel it was posted for."""

from __future__ import annotations

from typing import ClassVar

from guest_memfd.core import Library


class Design(Library):
    """Base of all designs. A posted design overrides what it does differently, and nothing else."""

    name: ClassVar[str]
    title: ClassVar[str]
    source: ClassVar[str]
    sea_fixup: ClassVar[bool] = False
    """Whether this design's kernel lets do_sea() consult the exception table."""
    gup: ClassVar[bool] = True
    """Whether pages the VMM has mapped may be taken by GUP at all (secretmem refuses)."""
    hypervisors: ClassVar[tuple[str, ...] | None] = None
    """Names of the hypervisors it was posted for; None: any."""
    born_shared: ClassVar[tuple[int, ...]] = (1,)
    """Pages of the scenario's file that start out shared (so that both kinds exist from the beginning)."""

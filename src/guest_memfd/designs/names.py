"""Names in a design: what it defines must override something of the library, or be called by somebody."""

from __future__ import annotations

from guest_memfd.designs.design import Design
from guest_memfd.overrides import unfit


def misspelt(design: type[Design]) -> str | None:
    """What *design* defines that nothing will ever call, or that does not fit what it overrides; None if all is well."""
    return unfit(design, Design)

"""Units: what a number counts, or what it is an address in. To take one for another is an error that mypy finds.

At run time each is a `typing.NewType` of int: a number. To mypy each is a class whose arithmetic keeps what it can: a unit
and a plain number make the same unit (``index + 1``), and so does a mask (``va & -PAGE``); two units make a plain number
(``gfn - slot.gfn``), and so do a remainder, a product and a shift (``va % PAGE``, ``index * PAGE``). From one unit to
another the functions below lead, and those that know a binding (`Slot.index`, `Scene.index`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, NewType, TypeVar, overload

PAGE_SHIFT: Final = 12
"""log2 of a page's size in bytes, as far as frame numbers are made of addresses here."""
PAGE: Final = 1 << PAGE_SHIFT
"""Bytes of a page: the emulated machine's kernel's, hypervisor's and guests'. A real kernel's is `linux.mapping.PAGE`."""

if TYPE_CHECKING:
    from typing import Self

    from typing_extensions import override

    # A unit is an int as well, so the two ways overlap; the first that fits is taken, and that is what is meant.
    class _Unit(int):
        @overload
        def __add__(self, other: _Unit, /) -> int: ...          # type: ignore[overload-overlap]
        @overload
        def __add__(self, other: int, /) -> Self: ...
        @override
        def __add__(self, other: int, /) -> Any: ...
        @override
        def __and__(self, other: int, /) -> Self: ...
        @overload
        def __sub__(self, other: _Unit, /) -> int: ...          # type: ignore[overload-overlap]
        @overload
        def __sub__(self, other: int, /) -> Self: ...
        @override
        def __sub__(self, other: int, /) -> Any: ...

    class Pfn(_Unit):
        """Page frame number of the host: a physical address in pages (include/linux/pfn.h)."""

    class Gfn(_Unit):
        """Guest frame number: a guest's physical address in pages (gfn_t, include/linux/kvm_types.h)."""

    class Index(_Unit):
        """Page index in a guest_memfd file: its offset in pages (pgoff_t, include/linux/types.h)."""

    class Pa(_Unit):
        """Physical address in bytes: what stage 2 makes of an Ipa (phys_addr_t, include/linux/types.h)."""

    class Ipa(_Unit):
        """Intermediate physical address in bytes: a guest's physical address (gpa_t; Arm ARM, stage 1's output)."""

    class Va(_Unit):
        """Virtual address in bytes, of the kernel, a process or a guest (Arm ARM, stage 1's input)."""
else:
    Pfn = NewType("Pfn", int)
    Gfn = NewType("Gfn", int)
    Index = NewType("Index", int)
    Pa = NewType("Pa", int)
    Ipa = NewType("Ipa", int)
    Va = NewType("Va", int)

Unit = TypeVar("Unit", Pfn, Gfn, Index, Pa, Ipa, Va)
"""Any of them, and the same one throughout."""

NULL: Final = Va(0)
"""No address."""

FIRST_PAGE: Final = Index(0)
"""Where a file begins."""

FIRST_GFN: Final = Gfn(0)
"""Where a guest's memory begins."""

FIRST_FRAME: Final = Pfn(0)
"""Where memory begins."""


def span(first: Unit, nr: int, step: int = 1) -> Sequence[Unit]:
    """*nr* of them: *first*, and what lies *step* after the one before."""
    return range(first, first + nr * step, step)                # type: ignore[return-value]


def pfn_to_pa(pfn: Pfn) -> Pa:
    """Where frame *pfn* begins (PFN_PHYS(), include/linux/pfn.h)."""
    return Pa(pfn << PAGE_SHIFT)


def pa_to_pfn(pa: Pa) -> Pfn:
    """The frame that *pa* is in (PHYS_PFN(), include/linux/pfn.h)."""
    return Pfn(pa >> PAGE_SHIFT)


def gfn_to_gpa(gfn: Gfn) -> Ipa:
    """Where guest frame *gfn* begins (include/linux/kvm_host.h)."""
    return Ipa(gfn << PAGE_SHIFT)


def page_index(offset: int) -> Index:
    """The page that byte *offset* of a file is in (linear_page_index(), include/linux/pagemap.h)."""
    return Index(offset >> PAGE_SHIFT)


def identity_pa(ipa: Ipa) -> Pa:
    """Where *ipa* is if stage 2 is off, or maps every address to itself as the host's does."""
    return Pa(ipa)


def identity_ipa(pa: Pa) -> Ipa:
    """What leads to *pa* through such a stage 2."""
    return Ipa(pa)


def gpa_to_gfn(gpa: Ipa) -> Gfn:
    """The guest frame that *gpa* is in (include/linux/kvm_host.h)."""
    return Gfn(gpa >> PAGE_SHIFT)

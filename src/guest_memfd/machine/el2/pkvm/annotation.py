"""What an invalid stage-2 entry says. Bit 0 clear and not all zeros means that EL2 wrote a note there.

Linux 7.3 (asm/kvm_pgtable.h, kvm/hyp/nvhe/mem_protect.c) has a type in bits 63:60:

    1 LOCKED      break-before-make is under way
    2 DONATION    host stage 2: bits 3:1 owner, 59:4 metadata, which for a guest is its handle | gfn << 16
    3 POISONED    guest stage 2: the host took the page by force

Linux 6.12 has the owner in bits 9:2 and LOCKED in bit 10, and no more. All zeros is "not mapped" in both.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

from guest_memfd.compat import override
from guest_memfd.words.units import FIRST_GFN, Gfn

Release = Literal["7.3", "6.12"]

_TYPE_SHIFT = 60
_PAYLOAD = (1 << _TYPE_SHIFT) - 1
_OWNER_612 = 0xff << 2
_LOCKED_612 = 1 << 10
_HANDLE = 0xffff
_GFN = (1 << 40) - 1


class PageOwner(IntEnum):
    """enum pkvm_component_id: who owns a page that the host's stage 2 does not map."""

    HOST = 0
    HYP = 1
    GUEST = 2


class AnnotationType(IntEnum):
    """enum kvm_invalid_pte_type of Linux 7.3, bits 63:60 of an invalid entry."""

    LOCKED = 1
    DONATION = 2
    POISONED = 3


@dataclass(frozen=True)
class Annotation:
    """An annotated entry; *owner*, *handle* and *gfn* (of the first 4 KiB page) belong to donations."""

    type: AnnotationType
    owner: PageOwner = PageOwner.HOST
    handle: int = 0
    gfn: Gfn = FIRST_GFN

    def encode(self, release: Release = "7.3") -> int:
        """The eight bytes. Raises ValueError for what the release has no format for (6.12: POISONED)."""
        if release == "7.3":
            extra = (self.handle & _HANDLE) | (self.gfn & _GFN) << 16
            return self.type << _TYPE_SHIFT | self.owner << 1 | extra << 4
        if self.type is AnnotationType.LOCKED:
            return _LOCKED_612
        if self.type is AnnotationType.DONATION:
            return self.owner << 2
        raise ValueError("Linux 6.12 has no annotation for a page that was reclaimed by force")

    @classmethod
    def decode(cls, value: int, release: Release = "7.3") -> Annotation | None:
        """None for a valid entry, and for zero, which is no annotation."""
        if value & 1 or not value:
            return None
        if release == "7.3":
            extra = (value & _PAYLOAD) >> 4
            return cls(AnnotationType(value >> _TYPE_SHIFT), PageOwner(value >> 1 & 7), extra & _HANDLE, Gfn(extra >> 16))
        if value & _LOCKED_612:
            return cls(AnnotationType.LOCKED)
        return cls(AnnotationType.DONATION, PageOwner((value & _OWNER_612) >> 2))

    @override
    def __repr__(self) -> str:
        if self.type is not AnnotationType.DONATION:
            return f"<{self.type.name}>"
        whom = f"guest {self.handle:#x} gfn {self.gfn:#x}" if self.owner is PageOwner.GUEST else self.owner.name.lower()
        return f"<DONATION to {whom}>"


LOCKED = Annotation(AnnotationType.LOCKED)
POISONED = Annotation(AnnotationType.POISONED)

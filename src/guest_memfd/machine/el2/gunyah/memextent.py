"""Memory extents: sets of pages, in a tree, with the places they are mapped at. Each has four mappings at most.

Every page belongs to exactly one extent (memdb.py). A recorded mapping says where the whole of an extent appears in an
address space; pages that come in by a donation appear there, pages that leave disappear. PARTIAL maps of single folios
are not recorded: a driver maps each folio at its own distance, and an extent has four slots. Each address space knows where
it shows which page (mappings.py), so that a page that leaves its extent leaves these places, too.
Source: docs/api/gunyah_api.md, hyp/mem/memextent_sparse of the hypervisor.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntFlag
from typing import TYPE_CHECKING

from guest_memfd.compat import override
from guest_memfd.machine.el2.gunyah.errors import GunyahError, HypRefused
from guest_memfd.words.units import Ipa, Pa

if TYPE_CHECKING:
    from guest_memfd.machine.el2.gunyah.addrspace import AddressSpace

START, END = Pa(0), Pa(1 << 48)
"""Of all physical addresses."""

MAX_MAPPINGS = 4
"""MEMEXTENT_MAX_MAPS: recorded mappings of one extent."""


class ExtentAccess(IntFlag):
    """Access bits of one exception level: bits 2:0 (user) and 6:4 (kernel) of the map attributes."""

    NONE = 0
    X = 1
    W = 2
    R = 4
    RX = 5
    RW = 6
    RWX = 7


@dataclass(frozen=True)
class Attributes:
    """Map attributes: what user and kernel of the VM may do, and the memory type (bits 23:16; 0xF normal write-back)."""

    user: ExtentAccess
    kernel: ExtentAccess
    memory_type: int = 0xF

    @classmethod
    def decode(cls, value: int) -> Attributes:
        """From the hypercall's word; raises HypRefused(ARG_INVAL) on reserved bits and memory types that do not exist."""
        memory_type = value >> 16 & 0xFF
        if value & ~0xFF_0077 or memory_type > 0xF:
            raise HypRefused(GunyahError.ARG_INVAL, f"map attributes {value:#x} have reserved bits set")
        return cls(ExtentAccess(value & 7), ExtentAccess(value >> 4 & 7), memory_type)

    @property
    def value(self) -> int:
        """The attributes as the word that a hypercall takes: user bits 2:0, kernel 6:4, memory type 23:16."""
        return self.user | self.kernel << 4 | self.memory_type << 16

    def within(self, other: Attributes) -> bool:
        """Whether these allow nothing that *other* does not."""
        return not (self.user & ~other.user or self.kernel & ~other.kernel) and self.memory_type == other.memory_type


RWX = Attributes(ExtentAccess.RWX, ExtentAccess.RWX)
"""All access, normal write-back memory."""


@dataclass(frozen=True)
class ExtentMapping:
    """The extent's offset 0 (physical address 0 for a sparse one) appears at *vbase* of *space*."""

    space: AddressSpace
    vbase: Ipa
    attributes: Attributes


@dataclass(eq=False)
class Extent:
    """A set of pages. Sparse extents can have any pages donated in and out; others hold [base, base+size) for good.

    *alone*: the address space of the one VM that may have these pages, for as long as they are here.
    """

    name: str
    parent: Extent | None = None
    sparse: bool = True
    base: Pa = START
    size: int = 1 << 48
    attributes: Attributes = RWX
    alone: AddressSpace | None = None
    mappings: list[ExtentMapping] = field(default_factory=list)

    @override
    def __repr__(self) -> str:
        return f"<extent {self.name}>"

    def record(self, mapping: ExtentMapping) -> None:
        """Remember a mapping; raises HypRefused(MEMEXTENT_MAPPINGS_FULL)."""
        if len(self.mappings) == MAX_MAPPINGS:
            raise HypRefused(GunyahError.MEMEXTENT_MAPPINGS_FULL, f"{self!r} has {MAX_MAPPINGS} mappings already")
        self.mappings.append(mapping)

    def forget_all(self, space: AddressSpace) -> None:
        """*space* ends: so does every mapping in it."""
        self.mappings = [mapping for mapping in self.mappings if mapping.space is not space]

    def forget(self, space: AddressSpace, vbase: Ipa) -> ExtentMapping:
        """Drop the record of a mapping and return it; raises HypRefused(ADDR_INVAL) when there is none."""
        for mapping in self.mappings:
            if mapping.space is space and mapping.vbase == vbase:
                self.mappings.remove(mapping)
                return mapping
        raise HypRefused(GunyahError.ADDR_INVAL, f"{self!r} is not mapped at {vbase:#x}")

"""Capabilities: a VM names objects by number, and each number carries rights. There is no access to an object without
one.

Source: docs/api/gunyah_api.md of the hypervisor, capability rights and CSPACE errors.
"""

from __future__ import annotations

from enum import IntFlag
from typing import NamedTuple, TypeVar

from guest_memfd.machine.el2.gunyah.errors import GunyahError, HypRefused


class ExtentRight(IntFlag):
    """Rights on a memory extent."""

    MAP = 1
    DERIVE = 2
    ATTACH = 4
    LOOKUP = 8
    DONATE = 0x10
    PROTECTED_HOST = 0x20
    PROTECTED_GUEST = 0x40
    MAP_PRIVATE = 0x80


class SpaceRight(IntFlag):
    """Rights on an address space."""

    ATTACH = 1
    MAP = 2
    LOOKUP = 4
    CONFIGURE_RANGE = 8
    MAP_PROTECTED = 0x10
    MODIFY_PROTECTED = 0x20
    ADD_INFO = 0x40


class VcpuRight(IntFlag):
    """Rights on a vCPU; running it is the only one that matters here."""

    RUN = 1


class _Entry(NamedTuple):
    thing: object
    rights: int


T = TypeVar("T")

_FIRST = 0x1000


class CapabilitySpace:
    """The table of one VM; at most *limit* capabilities."""

    def __init__(self, limit: int = 65536) -> None:
        self.limit = limit
        self._entries: dict[int, _Entry] = {}
        self._next = _FIRST

    def grant(self, thing: object, rights: int) -> int:
        """A new capability; raises HypRefused(CSPACE_FULL)."""
        if len(self._entries) == self.limit:
            raise HypRefused(GunyahError.CSPACE_FULL, f"{self.limit} capabilities are in use")
        cap = self._next
        # Numbers are not used again, so a capability that was revoked can be told from one that never was.
        self._next += 1
        self._entries[cap] = _Entry(thing, int(rights))
        return cap

    def revoke(self, cap: int) -> None:
        """The number is never used again, and answers CAP_REVOKED from now on."""
        self._entries.pop(cap, None)

    def lookup(self, cap: int, kind: type[T], rights: int) -> T:
        """The object that *cap* names; raises Refused: CAP_NULL, CAP_REVOKED, WRONG_OBJECT_TYPE, INSUFFICIENT_RIGHTS."""
        if not _FIRST <= cap < self._next:
            raise HypRefused(GunyahError.CSPACE_CAP_NULL, f"no capability {cap:#x}")
        entry = self._entries.get(cap)
        if entry is None:
            raise HypRefused(GunyahError.CSPACE_CAP_REVOKED, f"capability {cap:#x} was revoked")
        if not isinstance(entry.thing, kind):
            raise HypRefused(GunyahError.CSPACE_WRONG_OBJECT_TYPE, f"capability {cap:#x} is no {kind.__name__}")
        if rights & ~entry.rights:
            raise HypRefused(
                GunyahError.CSPACE_INSUFFICIENT_RIGHTS, f"capability {cap:#x} lacks {rights & ~entry.rights:#x}")
        return entry.thing

"""Software bits of a private page's stage-2 entry. All that the hypervisor knows of a private page is here.

    bit 55  PRIVATE       mapped with the PRIVATE flag; the host never has it at the same time
    bit 56  LOCKED        the guest holds on to it: unmapping answers BUSY while the VM lives
    bit 57  NO_SANITISE   the guest gave it up as it is; otherwise it is zeroed when it leaves
    bit 58  WRITABLE      the map allowed writing (S2AP may say less while the page is unlocked)

Source: hyp/mem/pgtable and hyp/mem/addrspace of the hypervisor for the states; the positions are this project's own.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from guest_memfd.machine.el2.gunyah.errors import GunyahError, HypRefused
from guest_memfd.machine.el2.gunyah.memextent import Attributes, ExtentAccess
from guest_memfd.machine.hw.arm64.descriptor import AF, MEMATTR_SHIFT, S2_READ, S2_WRITE, SH_INNER, XN_SHIFT

PRIVATE = 1 << 55
LOCKED = 1 << 56
NO_SANITISE = 1 << 57
WRITABLE = 1 << 58

Relock = Literal["access", "write", "never"]
"""What locks an unlocked page again: any access of the guest, a write, or nothing but a new map."""
Layout = Literal["2024-12", "new"]
"""Flags of modify_pages: as in the test VMM of December 2024, or as in the hypervisor's later documents."""

# XN[1:0] by (user may execute, kernel may execute).
_XN = {(True, True): 0, (True, False): 1, (False, False): 2, (False, True): 3}
_ACCESS = {0: ExtentAccess.NONE, 1: ExtentAccess.R, 2: ExtentAccess.W, 3: ExtentAccess.RW}


def encode(attributes: Attributes) -> int:
    """Descriptor bits without address and type. S2AP holds for both exception levels: what either may do, both may."""
    data = attributes.user | attributes.kernel
    xn = _XN[bool(attributes.user & ExtentAccess.X), bool(attributes.kernel & ExtentAccess.X)]
    return (attributes.memory_type << MEMATTR_SHIFT | AF | SH_INNER | xn << XN_SHIFT
            | (S2_READ if data & ExtentAccess.R else 0) | (S2_WRITE if data & ExtentAccess.W else 0))


def decode(value: int) -> Attributes:
    """The map attributes of a descriptor; reading and writing as for the kernel of the VM."""
    data = _ACCESS[value >> 6 & 3]
    if value & WRITABLE:
        data |= ExtentAccess.W
    user, kernel = next(who for who, xn in _XN.items() if xn == value >> XN_SHIFT & 3)
    return Attributes(data | ExtentAccess(user), data | ExtentAccess(kernel), value >> MEMATTR_SHIFT & 15)


def lock(value: int) -> int:
    """A private entry as the guest holding on to it leaves it."""
    # What the guest agreed to when it gave the page up ends here: a page that is locked again is zeroed when it is
    # taken.
    return (value | LOCKED | AF | (S2_WRITE if value & WRITABLE else 0)) & ~NO_SANITISE


def unlock(value: int, keep: bool, relock: Relock) -> int:
    """A private entry that the guest has given up; *keep*: with what it holds. The next touch has to be seen."""
    # The page stays mapped: a guest that has changed its mind must find what it had.
    value = value & ~(LOCKED | NO_SANITISE) | (NO_SANITISE if keep else 0)
    if relock == "access":
        return value & ~AF
    return value & ~S2_WRITE if relock == "write" else value


class Modify(NamedTuple):
    """What a modify_pages call asks for.

    *keep*: the contents stay. *sync*: no TLB has the old entries afterwards. *flush*: nor those of any earlier call.
    """

    unlock: bool
    keep: bool
    sync: bool
    flush: bool


def modification(flags: int, layout: Layout) -> Modify:
    """Decode the flags of modify_pages; raises HypRefused(ARG_INVAL) for reserved bits and for nothing to do.

    2024-12: 0x1 unlock, 0x2 sanitise, 0x4 flush. new: 0x1 unlock, 0x4 no_unlock_sync, 0x8 do_not_sanitise.
    """
    if layout == "2024-12":
        known, found = 0x7, Modify(bool(flags & 1), not flags & 2, True, bool(flags & 4))
    else:
        known, found = 0xD, Modify(bool(flags & 1), bool(flags & 8), not flags & 4, False)
    if flags & ~known or not (found.unlock or found.flush) or (not found.unlock and flags & 2):
        raise HypRefused(GunyahError.ARG_INVAL, f"modify_pages flags {flags:#x}")
    return found

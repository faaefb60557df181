"""The Resource Manager's error codes and the two translations they take part in.

Values: include/rm-rpc.h of the Resource Manager; to errnos: drivers/virt/gunyah/rsc_mgr.c (Linux series v17, patch 07);
from the hypervisor's: src/resource-manager.c.
"""

from __future__ import annotations

from enum import IntEnum
from errno import EBADMSG, EBUSY, EINVAL, ENODEV, ENOMEM, EOPNOTSUPP, EPERM

from guest_memfd.machine.el2.gunyah.errors import GunyahError


class RmError(IntEnum):
    """The err word of a reply."""

    OK = 0
    NOMEM = 1
    NORESOURCE = 2
    DENIED = 3
    MSG_INVALID = 4
    BUSY = 5
    ARGUMENT_INVALID = 6
    HANDLE_INVALID = 7
    VALIDATE_FAILED = 8
    MAP_FAILED = 9
    MEM_INVALID = 0xA
    MEM_INUSE = 0xB
    MEM_RELEASED = 0xC
    VMID_INVALID = 0xD
    LOOKUP_FAILED = 0xE
    IRQ_INUSE = 0x12
    IRQ_RELEASED = 0x13
    VM_STATE = 0x14
    UNIMPLEMENTED = 0xFFFF_FFFF


class RmRefused(Exception):  # noqa: N818 - an answer, not an accident
    """The request is answered with this error."""

    def __init__(self, error: RmError, why: str) -> None:
        super().__init__(f"{error.name}: {why}")
        self.error = error


_ERRNO: dict[int, int] = {
    RmError.OK: 0,
    RmError.UNIMPLEMENTED: -EOPNOTSUPP,
    RmError.NOMEM: -ENOMEM,
    RmError.NORESOURCE: -ENODEV,
    RmError.DENIED: -EPERM,
    RmError.BUSY: -EBUSY,
    RmError.MSG_INVALID: -EINVAL,
} | dict.fromkeys(range(RmError.ARGUMENT_INVALID, 0x12), -EINVAL)


def remap(error: int) -> int:
    """0 or -errno as Linux reports it; unnamed codes (0x12 and up, so VM_STATE as well) are -EBADMSG."""
    return _ERRNO.get(error, -EBADMSG)


_OF_HYPERVISOR = {
    GunyahError.OK: RmError.OK,
    GunyahError.NOMEM: RmError.NOMEM,
    GunyahError.NORESOURCES: RmError.NORESOURCE,
    GunyahError.BUSY: RmError.BUSY,
    GunyahError.ADDR_INVAL: RmError.MEM_INVALID,
    GunyahError.ADDR_OVFL: RmError.MEM_INVALID,
    GunyahError.ADDR_UNFL: RmError.MEM_INVALID,
    GunyahError.ARG_INVAL: RmError.ARGUMENT_INVALID,
    GunyahError.UNIMPLEMENTED: RmError.UNIMPLEMENTED,
}


def of_hypervisor(error: GunyahError) -> RmError:
    """What the Resource Manager replies when a hypercall of its own failed; anything unnamed is DENIED."""
    return _OF_HYPERVISOR.get(error, RmError.DENIED)

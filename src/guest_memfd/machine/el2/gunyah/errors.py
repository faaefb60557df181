"""What a Gunyah hypercall answers with, and what Linux makes of it. The numbers are the ABI's.

Values: docs/api/gunyah_api.md of the hypervisor (enum error); errnos: gunyah_error_remap() in the Linux series
"Drivers for Gunyah hypervisor", v17, include/linux/gunyah.h.
"""

from __future__ import annotations

from enum import IntEnum
from errno import EACCES, EAGAIN, EBUSY, EINVAL, EIO, ENOMEM, EOPNOTSUPP


class GunyahError(IntEnum):
    """x0 after a hypercall."""

    UNIMPLEMENTED = -1
    RETRY = -2
    OK = 0
    ARG_INVAL = 1
    ARG_SIZE = 2
    ARG_ALIGN = 3
    NOMEM = 10
    NORESOURCES = 11
    ADDR_OVFL = 20
    ADDR_UNFL = 21
    ADDR_INVAL = 22
    DENIED = 30
    BUSY = 31
    IDLE = 32
    CSPACE_CAP_NULL = 50
    CSPACE_CAP_REVOKED = 51
    CSPACE_WRONG_OBJECT_TYPE = 52
    CSPACE_INSUFFICIENT_RIGHTS = 53
    CSPACE_FULL = 54
    MEMDB_NOT_OWNER = 111
    MEMEXTENT_MAPPINGS_FULL = 120
    MEMEXTENT_TYPE = 121
    EXISTING_MAPPING = 200


class HypRefused(Exception):  # noqa: N818 - an answer, not an accident
    """A hypercall ends with this error; nothing it was asked for has happened."""

    def __init__(self, error: GunyahError, why: str) -> None:
        super().__init__(f"{error.name}: {why}")
        self.error = error


_ERRNO: dict[int, int] = {
    GunyahError.OK: 0,
    GunyahError.NOMEM: -ENOMEM,
    GunyahError.DENIED: -EACCES,
    GunyahError.CSPACE_CAP_NULL: -EACCES,
    GunyahError.CSPACE_CAP_REVOKED: -EACCES,
    GunyahError.CSPACE_WRONG_OBJECT_TYPE: -EACCES,
    GunyahError.CSPACE_INSUFFICIENT_RIGHTS: -EACCES,
    GunyahError.CSPACE_FULL: -EBUSY,
    GunyahError.BUSY: -EBUSY,
    GunyahError.IDLE: -EBUSY,
    GunyahError.UNIMPLEMENTED: -EOPNOTSUPP,
    GunyahError.RETRY: -EAGAIN,
}
# IRQ_BOUND, IRQ_UNBOUND, MSGQUEUE_EMPTY, MSGQUEUE_FULL: no memory call answers with them, but the table has them.
_EIO = frozenset({40, 41, 60, 61})


def remap(error: int) -> int:
    """0 or -errno for *error* (x0 of a hypercall, signed); what the table does not name is -EINVAL."""
    if error in _EIO:
        return -EIO
    return _ERRNO.get(error, -EINVAL)

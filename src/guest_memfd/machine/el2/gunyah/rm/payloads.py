"""What the messages carry. They are packed structures, little endian; a short or overlong body is refused.

Source: include/rm-rpc-fifo.h and memparcel messages of the Resource Manager; drivers/virt/gunyah/rsc_mgr_rpc.c of the
Linux series v17 (patches 09, 11, 17, 27).
"""

from __future__ import annotations

import struct
from enum import IntEnum, IntFlag
from typing import Any, NamedTuple

from guest_memfd.machine.el2.gunyah.rm.errors import RmError, RmRefused
from guest_memfd.words.units import Ipa

MAX_SGL = 512
"""Entries of one scatter list; longer ones go on in MEM_APPEND."""
INVALID_HANDLE = 0xFFFF_FFFF


class Id(IntEnum):
    """Ids of messages: 0x51 for memory, 0x56 for VMs; 0x10 in the second byte marks a notification."""

    MEM_DONATE = 0x5100_0010
    MEM_ACCEPT = 0x5100_0011
    MEM_LEND = 0x5100_0012
    MEM_SHARE = 0x5100_0013
    MEM_RELEASE = 0x5100_0014
    MEM_RECLAIM = 0x5100_0015
    MEM_NOTIFY = 0x5100_0017
    MEM_APPEND = 0x5100_0018
    MEM_SHARED = 0x5110_0011
    MEM_RELEASED = 0x5110_0012
    MEM_ACCEPTED = 0x5110_0013
    MEM_RECALL = 0x5110_0014
    VM_ALLOC_VMID = 0x5600_0001
    VM_DEALLOC_VMID = 0x5600_0002
    VM_START = 0x5600_0004
    VM_STOP = 0x5600_0005
    VM_RESET = 0x5600_0006
    VM_CONFIG_IMAGE = 0x5600_0009
    VM_AUTH_IMAGE = 0x5600_000A
    VM_INIT = 0x5600_000B
    VM_GET_HYP_RESOURCES = 0x5600_0020
    VM_SET_BOOT_CONTEXT = 0x5600_0031
    VM_SET_DEMAND_PAGING = 0x5600_0033
    VM_SET_ADDRESS_LAYOUT = 0x5600_0034
    VM_EXITED = 0x5610_0001
    VM_STATUS = 0x5610_0008


class RmMemFlag(IntFlag):
    """Flags of a memory request; reclaim and release know SANITIZE only."""

    SANITIZE = 1
    APPEND = 2


APPEND_END = 1
ACCEPT_DONE = 128


class Acl(NamedTuple):
    """Who may do what: rights are X 1, W 2, R 4."""

    vmid: int
    rights: int


class Sgl(NamedTuple):
    """One piece of memory: intermediate physical address of the caller, size in bytes."""

    ipa: Ipa
    size: int


class Attribute(NamedTuple):
    """A memory attribute override for one VM."""

    attr: int
    vmid: int


class MemRequest(NamedTuple):
    """The body of MEM_LEND, MEM_SHARE and MEM_DONATE: which memory (*sgl*), for which VMs (*acl*)."""

    mem_type: int
    flags: int
    label: int
    acl: tuple[Acl, ...]
    sgl: tuple[Sgl, ...]
    attributes: tuple[Attribute, ...] = ()


class Append(NamedTuple):
    """MEM_APPEND: more of a parcel's scatter list."""

    handle: int
    flags: int
    sgl: tuple[Sgl, ...]


class Accept(NamedTuple):
    """MEM_ACCEPT: *sgl* says where the caller wants it, in its own addresses; it must be as large as the parcel."""

    handle: int
    mem_type: int
    transaction: int
    flags: int
    label: int
    sgl: tuple[Sgl, ...]


class Resource(NamedTuple):
    """One 44-byte entry of VM_GET_HYP_RESOURCES."""

    type: int
    partner_vmid: int
    handle: int
    label: int
    cap: int
    base: int = 0
    size: int = 0


_COUNT = struct.Struct("<HH")
_ACL = struct.Struct("<HBx")
_SGL = struct.Struct("<QQ")
_ATTRIBUTE = struct.Struct("<HH")
_MEM = struct.Struct("<BxBxI")
_HANDLE_FLAGS = struct.Struct("<IB3x")
_ACCEPT = struct.Struct("<IBBBxI")
_NOTIFY = struct.Struct("<IB3xI")
_VMID = struct.Struct("<H2x")
_RESOURCE = struct.Struct("<BxHIIQIIQQ")


class Body:
    """Reads a body from front to back; every short read is a MSG_INVALID."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def take(self, layout: struct.Struct) -> tuple[Any, ...]:
        """The fields of the next structure; raises RmRefused(MSG_INVALID) when the body ends within it."""
        if self._at + layout.size > len(self._data):
            raise RmRefused(RmError.MSG_INVALID, f"a body of {len(self._data)} bytes ends in the middle of a field")
        fields = layout.unpack_from(self._data, self._at)
        self._at += layout.size
        return fields

    def take_list(self, layout: struct.Struct) -> list[tuple[Any, ...]]:
        """A 16-bit count, padding, and that many structures."""
        # A count that the body does not bear out ends at the first entry that is not there.
        count, _ = self.take(_COUNT)
        return [self.take(layout) for _ in range(count)]

    def end(self) -> None:
        """Raises RmRefused(MSG_INVALID) when bytes are left over."""
        if self._at != len(self._data):
            raise RmRefused(RmError.MSG_INVALID, f"{len(self._data) - self._at} bytes too many")


def _list(layout: struct.Struct, entries: tuple[tuple[int, int], ...]) -> bytes:
    return _COUNT.pack(len(entries), 0) + b"".join(layout.pack(*entry) for entry in entries)


def encode_mem(request: MemRequest) -> bytes:
    """The body of MEM_LEND, MEM_SHARE and MEM_DONATE: head, then ACL, scatter list and attributes."""
    return (_MEM.pack(request.mem_type, request.flags, request.label) + _list(_ACL, request.acl)
            + _list(_SGL, request.sgl) + _list(_ATTRIBUTE, request.attributes))


def decode_mem(data: bytes) -> MemRequest:
    """The reverse of `encode_mem`."""
    body = Body(data)
    mem_type, flags, label = body.take(_MEM)
    acl = tuple(Acl(*entry) for entry in body.take_list(_ACL))
    sgl = tuple(Sgl(*entry) for entry in body.take_list(_SGL))
    attributes = tuple(Attribute(*entry) for entry in body.take_list(_ATTRIBUTE))
    body.end()
    return MemRequest(mem_type, flags, label, acl, sgl, attributes)


def encode_append(request: Append) -> bytes:
    """The body of MEM_APPEND: handle, flags (`APPEND_END`) and more of the scatter list."""
    return _HANDLE_FLAGS.pack(request.handle, request.flags) + _list(_SGL, request.sgl)


def decode_append(data: bytes) -> Append:
    """The reverse of `encode_append`."""
    body = Body(data)
    handle, flags = body.take(_HANDLE_FLAGS)
    sgl = tuple(Sgl(*entry) for entry in body.take_list(_SGL))
    body.end()
    return Append(handle, flags, sgl)


def encode_accept(request: Accept) -> bytes:
    """MEM_ACCEPT; the ACL and attribute lists are empty: nothing is to be validated."""
    head = _ACCEPT.pack(request.handle, request.mem_type, request.transaction, request.flags, request.label)
    return head + _list(_ACL, ()) + _list(_SGL, request.sgl) + _list(_ATTRIBUTE, ())


def decode_accept(data: bytes) -> Accept:
    """The reverse of `encode_accept`."""
    body = Body(data)
    handle, mem_type, transaction, flags, label = body.take(_ACCEPT)
    body.take_list(_ACL)
    sgl = tuple(Sgl(*entry) for entry in body.take_list(_SGL))
    body.take_list(_ATTRIBUTE)
    body.end()
    return Accept(handle, mem_type, transaction, flags, label, sgl)


def encode_handle(handle: int, flags: int = 0) -> bytes:
    """The body of MEM_RECLAIM and MEM_RELEASE, 8 bytes."""
    return _HANDLE_FLAGS.pack(handle, flags)


def decode_handle(data: bytes) -> tuple[int, int]:
    """Handle and flags of MEM_RECLAIM and MEM_RELEASE; raises RmRefused(MSG_INVALID) for another length."""
    body = Body(data)
    handle, flags = body.take(_HANDLE_FLAGS)
    body.end()
    return handle, flags


def encode_notify(handle: int, flags: int, tag: int, vmids: tuple[int, ...]) -> bytes:
    """MEM_NOTIFY, and the notification it causes."""
    return _NOTIFY.pack(handle, flags, tag) + _list(_ATTRIBUTE, tuple((vmid, 0) for vmid in vmids))


def decode_notify(data: bytes) -> tuple[int, int, int, tuple[int, ...]]:
    """Handle, flags, tag, vmids."""
    body = Body(data)
    handle, flags, tag = body.take(_NOTIFY)
    vmids = tuple(vmid for vmid, _ in body.take_list(_ATTRIBUTE))
    body.end()
    return handle, flags, tag, vmids


def encode_vmid(vmid: int) -> bytes:
    """The body of most VM calls, and the reply of VM_ALLOC_VMID."""
    return _VMID.pack(vmid)


def decode_fields(layout: str, data: bytes) -> tuple[int, ...]:
    """A body that is one structure."""
    body = Body(data)
    fields = body.take(struct.Struct(layout))
    body.end()
    return fields


CONFIG_IMAGE = "<HHIQQQQ"
"""vmid, auth, mem_handle, image offset and size, dtb offset and size."""
STOP = "<HBxI"
"""vmid, flags (1 force), reason."""
BOOT_CONTEXT = "<HBBIQ"
"""vmid, register set, register index, padding, value."""
ADDRESS_LAYOUT = "<H2xIQQ"
"""vmid, range id (0: the image), base, size."""
EXITED = "<HHI"
"""vmid, exit type, size of the reason (0: none follows)."""
STATUS = "<H2xBBH"
"""vmid, VM, OS and application status."""


def encode_demand_paging(vmid: int, ranges: tuple[Sgl, ...]) -> bytes:
    """VM_SET_DEMAND_PAGING: guest address ranges that will be lent."""
    return struct.pack("<H2xI", vmid, len(ranges)) + b"".join(_SGL.pack(*entry) for entry in ranges)


def decode_demand_paging(data: bytes) -> tuple[int, tuple[Sgl, ...]]:
    """The reverse of `encode_demand_paging`."""
    body = Body(data)
    vmid, count = body.take(struct.Struct("<H2xI"))
    ranges = tuple(Sgl(*body.take(_SGL)) for _ in range(count))
    body.end()
    return vmid, ranges


def encode_resources(resources: tuple[Resource, ...]) -> bytes:
    """The reply of VM_GET_HYP_RESOURCES: a 32-bit count and the entries; no interrupts here."""
    return struct.pack("<I", len(resources)) + b"".join(
        _RESOURCE.pack(r.type, r.partner_vmid, r.handle, r.label, r.cap, 0, 0, r.base, r.size) for r in resources)


def decode_resources(data: bytes) -> tuple[Resource, ...]:
    """The reverse of `encode_resources`."""
    body = Body(data)
    count, = body.take(struct.Struct("<I"))
    found = []
    for _ in range(count):
        kind, partner, handle, label, cap, _, _, base, size = body.take(_RESOURCE)
        found.append(Resource(kind, partner, handle, label, cap, base, size))
    body.end()
    return tuple(found)

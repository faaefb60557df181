"""Linux's side of the Resource Manager. There is one request at a time, and every answer is 0 or -errno.

Source: drivers/virt/gunyah/rsc_mgr.c and rsc_mgr_rpc.c of the Linux series v17 (patches 07, 09, 11, 17, 27, 29).
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from errno import E2BIG, EINVAL, EIO
from typing import NamedTuple

from guest_memfd.machine.el2.gunyah.rm import payloads as p
from guest_memfd.machine.el2.gunyah.rm.errors import remap
from guest_memfd.machine.el2.gunyah.rm.lifecycle import VmState
from guest_memfd.machine.el2.gunyah.rm.message import MAX_REQUEST, Message, MessageType, Receiver, fragments
from guest_memfd.machine.el2.gunyah.rm.payloads import Acl, Id, Resource, Sgl
from guest_memfd.machine.el2.gunyah.rm.server import Channel

STOP_REASON = 3
"""GUNYAH_RM_VM_STOP_REASON_FORCE_STOP."""


class Notification(NamedTuple):
    """What arrived unasked: message id and body."""

    id: int
    body: bytes


class RmClient:
    """The driver at one end of *channel*; *ring* makes the other end look (its receive interrupt).

    `notifications` are kept in order, `status` is what VM_STATUS and VM_EXITED last said of each VM.
    """

    def __init__(self, channel: Channel, ring: Callable[[], None]) -> None:
        self._channel, self._ring = channel, ring
        self._receiver = Receiver()
        self._seq = 0
        self.notifications: list[Notification] = []
        self.status: dict[int, VmState] = {}

    def call(self, message_id: int, body: bytes) -> tuple[int, bytes]:
        """One request: (0 or -errno, body of the reply). -E2BIG: too long; -EIO: no answer came."""
        if len(body) > MAX_REQUEST:
            return -E2BIG, b""
        self._seq = self._seq + 1 & 0xFFFF
        self._channel.requests += fragments(Message(MessageType.REQUEST, self._seq, message_id, body))
        self._ring()
        answer: tuple[int, bytes] = (-EIO, b"")
        for message in self.receive():
            # Both: the number alone wraps after 65,536 requests, and a late
            # answer to one that was given up may still come.
            if message.type == MessageType.REPLY and (message.seq, message.id) == (self._seq, message_id) \
                    and len(message.body) >= 4:
                answer = remap(struct.unpack_from("<I", message.body)[0]), message.body[4:]
        return answer

    def receive(self) -> list[Message]:
        """Take what has arrived; notifications are noted, the rest is returned."""
        found = []
        while self._channel.replies:
            found += self._receiver.drain(self._channel.replies)
        for message in found:
            if message.type == MessageType.NOTIFICATION:
                self._noted(Notification(message.id, message.body))
        return [message for message in found if message.type != MessageType.NOTIFICATION]

    def forget(self, vmid: int) -> None:
        """The VMID has been given back: what has been told of its VM is of no more interest."""
        self.notifications = [n for n in self.notifications
                              if n.id not in (Id.VM_STATUS, Id.VM_EXITED) or struct.unpack_from("<H", n.body)[0] != vmid]
        self.status.pop(vmid, None)

    def _noted(self, notification: Notification) -> None:
        self.notifications.append(notification)
        if notification.id == Id.VM_STATUS:
            vmid, state, _, _ = p.decode_fields(p.STATUS, notification.body)
            self.status[vmid] = VmState(state)
        elif notification.id == Id.VM_EXITED:
            vmid, _, _ = struct.unpack_from(p.EXITED, notification.body)
            self.status[vmid] = VmState.EXITED

    # -- memory --------------------------------------------------------------------------------------------------

    def mem_share(self, acl: tuple[Acl, ...], sgl: tuple[Sgl, ...], label: int = 0) -> tuple[int, int]:
        """Offer memory: lent if there is exactly one VM in *acl*, else shared. (0 or -errno, handle).

        -EINVAL for no or more than 255 entries in *acl*, or no memory. Lists beyond 512 entries go on in appends; when one
        of those fails, the parcel is reclaimed.
        """
        if not 1 <= len(acl) <= 255 or not sgl:
            return -EINVAL, p.INVALID_HANDLE
        first, rest = sgl[:p.MAX_SGL], sgl[p.MAX_SGL:]
        request = p.MemRequest(0, p.RmMemFlag.APPEND if rest else 0, label, acl, first)
        ret, reply = self.call(Id.MEM_LEND if len(acl) == 1 else Id.MEM_SHARE, p.encode_mem(request))
        if ret:
            return ret, p.INVALID_HANDLE
        handle, = struct.unpack("<I", reply)
        while rest:
            piece, rest = rest[:p.MAX_SGL], rest[p.MAX_SGL:]
            append = p.Append(handle, 0 if rest else p.APPEND_END, piece)
            ret, _ = self.call(Id.MEM_APPEND, p.encode_append(append))
            if ret:
                self.mem_reclaim(handle)
                return ret, p.INVALID_HANDLE
        return 0, handle

    def mem_reclaim(self, handle: int) -> int:
        """Take a parcel back."""
        return self.call(Id.MEM_RECLAIM, p.encode_handle(handle))[0]

    # -- VMs -----------------------------------------------------------------------------------------------------

    def alloc_vmid(self, vmid: int = 0) -> int:
        """A VMID, or -errno."""
        ret, reply = self.call(Id.VM_ALLOC_VMID, p.encode_vmid(vmid))
        return ret or p.decode_fields("<H2x", reply)[0]

    def vm_call(self, message_id: Id, vmid: int) -> int:
        """A request whose body is a VMID: VM_DEALLOC_VMID, VM_AUTH_IMAGE, VM_INIT, VM_START, VM_RESET."""
        return self.call(message_id, p.encode_vmid(vmid))[0]

    def vm_stop(self, vmid: int) -> int:
        """Stop it by force."""
        return self.call(Id.VM_STOP, struct.pack(p.STOP, vmid, 1, STOP_REASON))[0]

    def vm_configure(self, vmid: int, auth: int, handle: int, dtb_offset: int, dtb_size: int) -> int:
        """VM_CONFIG_IMAGE with an empty image beside the device tree."""
        return self.call(Id.VM_CONFIG_IMAGE, struct.pack(p.CONFIG_IMAGE, vmid, auth, handle, 0, 0, dtb_offset, dtb_size))[0]

    def vm_set_demand_paging(self, vmid: int, ranges: tuple[Sgl, ...]) -> int:
        """Announce the guest address ranges that will be lent."""
        return self.call(Id.VM_SET_DEMAND_PAGING, p.encode_demand_paging(vmid, ranges))[0]

    def vm_set_address_layout(self, vmid: int, base: int, size: int) -> int:
        """Where the image goes."""
        return self.call(Id.VM_SET_ADDRESS_LAYOUT, struct.pack(p.ADDRESS_LAYOUT, vmid, 0, base, size))[0]

    def vm_set_boot_context(self, vmid: int, register_set: int, index: int, value: int) -> int:
        """A register of the boot CPU."""
        return self.call(Id.VM_SET_BOOT_CONTEXT, struct.pack(p.BOOT_CONTEXT, vmid, register_set, index, 0, value))[0]

    def get_hyp_resources(self, vmid: int) -> tuple[int, tuple[Resource, ...]]:
        """(0 or -errno, resources)."""
        ret, reply = self.call(Id.VM_GET_HYP_RESOURCES, p.encode_vmid(vmid))
        return ret, () if ret else p.decode_resources(reply)

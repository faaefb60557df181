"""The Resource Manager: answers requests, owns the life of VMs. A request is decoded, checked, then done.

VM_SET_DEMAND_PAGING and VM_SET_ADDRESS_LAYOUT are in no public release; what they do here is inferred from what Linux needs:
ranges to be lent are configured PRIVATE, everything else below 1 GiB VMMIO; the image appears at the layout's base, and
what of it lies in such a range becomes ordinary private (or shared) memory of the VM when that starts.
Source: src/vm_mgnt.c of the Resource Manager; drivers/virt/gunyah/rsc_mgr_rpc.c and vm_mgr.c (Linux series v17).
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from guest_memfd.machine.el2.gunyah.addrspace import AddrMapFlag
from guest_memfd.machine.el2.gunyah.config import RangeOp
from guest_memfd.machine.el2.gunyah.donate import Donation, Options
from guest_memfd.machine.el2.gunyah.el2 import FIRST_VMID, HLOS_VMID, LAST_VMID, Gunyah
from guest_memfd.machine.el2.gunyah.errors import HypRefused
from guest_memfd.machine.el2.gunyah.memextent import RWX, Attributes, ExtentAccess
from guest_memfd.machine.el2.gunyah.rm import payloads as p
from guest_memfd.machine.el2.gunyah.rm.errors import RmError, RmRefused, of_hypervisor
from guest_memfd.machine.el2.gunyah.rm.lifecycle import Auth, VmState, check
from guest_memfd.machine.el2.gunyah.rm.memparcel import Memparcels, Parcel, Placed, Transaction
from guest_memfd.machine.el2.gunyah.rm.message import Message, MessageType, Receiver, fragments
from guest_memfd.machine.el2.gunyah.rm.payloads import Id, Resource, Sgl
from guest_memfd.machine.el2.gunyah.vm import Exit, GunyahHypVm
from guest_memfd.words.units import PAGE, Ipa

DEVICES_END = Ipa(1 << 30)
"""Below this, what is not lent is taken for devices. Not confirmed by any public source."""
DEFAULT_BASE = Ipa(1 << 31)
"""Where an image appears when no layout was set."""

# Resource types of VM_GET_HYP_RESOURCES, and the labels of the extents (include/linux/gunyah.h, vm_mgr.h).
_VCPU, _MEM_EXTENT, _ADDR_SPACE = 4, 9, 10
_REGISTERS = {0: 31, 1: 1, 2: 3}     # set X, PC, SP: how many
_FORCE = 1


@dataclass
class Record:
    """What the Resource Manager knows of a VM. *boot_context*: (register set, index) to value, for the maker of the CPU."""

    vmid: int
    owner: int
    state: VmState = VmState.LOAD
    vm: GunyahHypVm | None = None
    image: Parcel | None = None
    base: Ipa = DEFAULT_BASE
    boot_context: dict[tuple[int, int], int] = field(default_factory=dict)


@dataclass
class Channel:
    """The two message queues between a VM and the Resource Manager."""

    requests: deque[bytes] = field(default_factory=deque)
    replies: deque[bytes] = field(default_factory=deque)


class ResourceManager:
    """One for the machine; the host's channel exists from the start, a VM's from `connect` on."""

    def __init__(self, el2: Gunyah) -> None:
        self.el2 = el2
        self.vms: dict[int, Record] = {}
        self.parcels = Memparcels(el2, lambda vmid: vmid == HLOS_VMID or vmid in self.vms, self._notify)
        self.channels: dict[int, Channel] = {}
        self._receivers: dict[int, Receiver] = {}
        self._seq = 0
        self.connect(HLOS_VMID)

    def connect(self, vmid: int) -> Channel:
        """The queues of a VM."""
        self._receivers[vmid] = Receiver()
        return self.channels.setdefault(vmid, Channel())

    def serve(self, vmid: int = HLOS_VMID) -> None:
        """Answer all that *vmid* has sent."""
        channel = self.channels[vmid]
        while channel.requests:
            for message in self._receivers[vmid].drain(channel.requests):
                if message.type == MessageType.REQUEST:
                    error, data = self._answer(vmid, message)
                    reply = Message(MessageType.REPLY, message.seq, message.id, struct.pack("<I", error) + data)
                    channel.replies += fragments(reply)

    def _answer(self, caller: int, message: Message) -> tuple[int, bytes]:
        handler = _HANDLERS.get(message.id)
        if handler is None:
            return RmError.UNIMPLEMENTED, b""
        try:
            return RmError.OK, handler(self, caller, message.body)
        # Every refusal becomes the error word of the reply; the caller's procedure does not stop for it.
        except RmRefused as refused:
            return refused.error, b""
        except HypRefused as refused:
            return of_hypervisor(refused.error), b""

    def _notify(self, vmid: int, message_id: Id, body: bytes) -> None:
        if vmid in self.channels:
            self._seq += 1
            message = Message(MessageType.NOTIFICATION, self._seq & 0xFFFF, message_id, body)
            self.channels[vmid].replies += fragments(message)

    # -- memory --------------------------------------------------------------------------------------------------

    def _mem_create(self, caller: int, kind: Transaction, body: bytes) -> bytes:
        return struct.pack("<I", self.parcels.create(caller, kind, p.decode_mem(body)))

    def _mem_append(self, caller: int, body: bytes) -> bytes:
        self.parcels.append(caller, p.decode_append(body))
        return b""

    def _mem_reclaim(self, caller: int, body: bytes) -> bytes:
        self.parcels.reclaim(caller, *p.decode_handle(body))
        return b""

    def _mem_accept(self, caller: int, body: bytes) -> bytes:
        self.parcels.accept(self._guest(caller), p.decode_accept(body))
        return b""

    def _mem_release(self, caller: int, body: bytes) -> bytes:
        self.parcels.release(self._guest(caller), *p.decode_handle(body))
        return b""

    def _mem_notify(self, caller: int, body: bytes) -> bytes:
        self.parcels.notify(caller, *p.decode_notify(body))
        return b""

    def _guest(self, vmid: int) -> GunyahHypVm:
        record = self.vms.get(vmid)
        if record is None or record.vm is None:
            raise RmRefused(RmError.DENIED, f"VM {vmid:#x} accepts no memory")
        return record.vm

    # -- VM life -------------------------------------------------------------------------------------------------

    def _alloc_vmid(self, caller: int, body: bytes) -> bytes:
        wanted, = p.decode_fields("<H2x", body)
        free = [vmid for vmid in range(FIRST_VMID, LAST_VMID + 1) if vmid not in self.vms]
        if wanted and not FIRST_VMID <= wanted <= LAST_VMID:
            raise RmRefused(RmError.VMID_INVALID, f"VMID {wanted:#x}")
        if wanted in self.vms:
            raise RmRefused(RmError.BUSY, f"VMID {wanted:#x} is in use")
        if not free:
            raise RmRefused(RmError.NORESOURCE, "no VMID is free")
        vmid = wanted or free[0]
        self.vms[vmid] = Record(vmid, caller)
        self._status(self.vms[vmid])
        return p.encode_vmid(vmid)

    # The record of a VM, if *call* is allowed now: for its owner, in its state.
    def _record(self, caller: int, vmid: int, call: Id) -> Record:
        record = self.vms.get(vmid)
        if record is None:
            raise RmRefused(RmError.VMID_INVALID, f"no VM {vmid:#x}")
        if record.owner != caller:
            raise RmRefused(RmError.DENIED, f"VM {vmid:#x} belongs to VM {record.owner:#x}")
        check(call, record.state)
        return record

    def _dealloc_vmid(self, caller: int, body: bytes) -> bytes:
        vmid, = p.decode_fields("<H2x", body)
        self._record(caller, vmid, Id.VM_DEALLOC_VMID)
        del self.vms[vmid]
        return b""

    def _config_image(self, caller: int, body: bytes) -> bytes:
        vmid, auth, handle, _, _, _, _ = p.decode_fields(p.CONFIG_IMAGE, body)
        record = self._record(caller, vmid, Id.VM_CONFIG_IMAGE)
        if auth not in tuple(Auth):
            raise RmRefused(RmError.ARGUMENT_INVALID, f"authentication {auth}")
        parcel = self.parcels.find(handle)
        if parcel.rights(vmid) is None or not parcel.complete or parcel.locked or parcel.kind == Transaction.DONATE:
            raise RmRefused(RmError.DENIED, f"parcel {handle:#x} is no image for VM {vmid:#x}")
        # What can be refused comes before, what changes the record after: without memory for a VM nothing has happened.
        record.vm = self.el2.create_vm(f"vm{vmid:x}", vmid, running=False)
        # The hypervisor tells the Resource Manager, and that the VM's owner: the driver never hears from EL2
        # directly.
        record.vm.on_exit = lambda why: self._exited(record, why)
        # Locked: the owner must not reclaim the image of a VM that may run.
        record.image, parcel.locked = parcel, True
        record.base, record.boot_context = DEFAULT_BASE, {}
        self._enter(record, VmState.INIT if auth == Auth.NONE else VmState.AUTH)
        return b""

    def _auth_image(self, caller: int, body: bytes) -> bytes:
        vmid, = p.decode_fields("<H2x", body)
        self._enter(self._record(caller, vmid, Id.VM_AUTH_IMAGE), VmState.INIT)
        return b""

    def _set_demand_paging(self, caller: int, body: bytes) -> bytes:
        vmid, ranges = p.decode_demand_paging(body)
        record = self._record(caller, vmid, Id.VM_SET_DEMAND_PAGING)
        assert record.vm is not None
        done: list[tuple[RangeOp, Ipa, int]] = []
        try:
            for op, base, size in _layout(ranges):
                record.vm.space.configure(op, base, size)
                done.append((op, base, size))
        except HypRefused:
            for op, base, size in done:
                record.vm.space.configure(op + 1, base, size)       # every ADD is followed by its REMOVE
            raise
        return b""

    def _set_address_layout(self, caller: int, body: bytes) -> bytes:
        vmid, range_id, base, size = p.decode_fields(p.ADDRESS_LAYOUT, body)
        record = self._record(caller, vmid, Id.VM_SET_ADDRESS_LAYOUT)
        assert record.image is not None
        if range_id or base % PAGE or size < record.image.size:
            raise RmRefused(RmError.ARGUMENT_INVALID, f"range {range_id} at {base:#x}+{size:#x}")
        record.base = Ipa(base)
        return b""

    def _init(self, caller: int, body: bytes) -> bytes:
        vmid, = p.decode_fields("<H2x", body)
        record = self._record(caller, vmid, Id.VM_INIT)
        assert record.vm is not None
        assert record.image is not None
        rights = record.image.rights(vmid)
        assert rights is not None
        try:
            self.parcels.place(record.vm, record.image, (Sgl(record.base, record.image.size),), rights)
        except RmRefused:
            self._enter(record, VmState.INIT_FAILED)
            raise
        self._enter(record, VmState.READY)
        return b""

    def _set_boot_context(self, caller: int, body: bytes) -> bytes:
        vmid, which, index, _, value = p.decode_fields(p.BOOT_CONTEXT, body)
        record = self._record(caller, vmid, Id.VM_SET_BOOT_CONTEXT)
        if index >= _REGISTERS.get(which, 0):
            raise RmRefused(RmError.ARGUMENT_INVALID, f"register {index} of set {which}")
        record.boot_context[which, index] = value
        return b""

    def _get_hyp_resources(self, caller: int, body: bytes) -> bytes:
        vmid, = p.decode_fields("<H2x", body)
        vm = self._record(caller, vmid, Id.VM_GET_HYP_RESOURCES).vm
        assert vm is not None
        # Linux tells them apart by their labels, which are their places here (vm_mgr.h).
        extents = (vm.caps.guest_private, vm.caps.host_shared, vm.caps.host_private, vm.caps.guest_shared)
        found = [Resource(_MEM_EXTENT, vmid, 0, label, cap) for label, cap in enumerate(extents)]
        found.append(Resource(_ADDR_SPACE, vmid, 0, 0, vm.caps.addrspace))
        found += [Resource(_VCPU, vmid, 0, label, cap) for label, cap in enumerate(vm.vcpu_caps)]
        return p.encode_resources(tuple(found))

    def _start(self, caller: int, body: bytes) -> bytes:
        vmid, = p.decode_fields("<H2x", body)
        record = self._record(caller, vmid, Id.VM_START)
        assert record.vm is not None
        # Before the VM runs, while no one touches the image.
        self._adopt(record, record.vm)
        record.vm.start()
        self._enter(record, VmState.RUNNING)
        return b""

    # The image becomes ordinary memory of the VM, piece by piece, when all of it lies where the VM may have such. This
    # takes no memory: the tables are there since the image was offered and VM_INIT mapped it.
    def _adopt(self, record: Record, vm: GunyahHypVm) -> None:
        image = record.image
        assert image is not None
        lent = image.kind == Transaction.LEND
        kind = "private" if lent else "vmmio"
        if vm.space.ranges.kind(record.base, record.base + image.size) != kind:
            return
        for placed in image.accepted.pop(vm.vmid):
            self._adopt_piece(vm, image, placed, lent)
        self.parcels.drop(image)
        record.image = None

    def _adopt_piece(self, vm: GunyahHypVm, image: Parcel, placed: Placed, lent: bool) -> None:
        ipa, pa, size = placed
        quiet = Options(Donation.TO_SIBLING, sync=False)
        # From the parcel to the VM's own extent by way of the host's: only relatives can donate to each other, and a
        # parcel's extent is no relative of the private one.
        vm.space.unmap(image.extent, ipa, AddrMapFlag.PARTIAL, pa, size)
        if lent:
            self.el2.donate(quiet, image.extent, self.el2.host_extent, pa, size)
            self.el2.donate(Options(Donation.TO_PROTECTED, sync=True), self.el2.host_extent, vm.guest_private, pa, size)
            vm.space.map(vm.guest_private, ipa, RWX, AddrMapFlag.PARTIAL | AddrMapFlag.PRIVATE, pa, size)
        else:
            self.el2.donate(quiet, image.extent, vm.guest_shared, pa, size)
            rw = Attributes(ExtentAccess.RW, ExtentAccess.RW)
            vm.space.map(vm.guest_shared, ipa, rw, AddrMapFlag.PARTIAL | AddrMapFlag.VMMIO, pa, size)

    def _stop(self, caller: int, body: bytes) -> bytes:
        vmid, flags, _ = p.decode_fields(p.STOP, body)
        record = self._record(caller, vmid, Id.VM_STOP)
        assert record.vm is not None
        if flags & ~_FORCE:
            raise RmRefused(RmError.ARGUMENT_INVALID, f"flags {flags:#x}")
        record.vm.kill(Exit.STOP_FORCED if flags & _FORCE else Exit.VM_EXIT)
        return b""

    def _exited(self, record: Record, why: Exit) -> None:
        # Not of a VM that is being reset: that kills it once more, and its owner knows.
        if record.state in (VmState.RUNNING, VmState.PAUSED):
            self._notify(record.owner, Id.VM_EXITED, struct.pack(p.EXITED, record.vmid, why, 0))
            self._enter(record, VmState.EXITED)

    def _reset(self, caller: int, body: bytes) -> bytes:
        vmid, = p.decode_fields("<H2x", body)
        record = self._record(caller, vmid, Id.VM_RESET)
        assert record.vm is not None
        before = record.state
        self._enter(record, VmState.RESETTING)
        # Parcels first. Pages of a parcel are not the VM's, and must not be sanitised with it.
        self._release_memparcels(record, record.vm)
        try:
            record.vm.destroy()
        except HypRefused:
            # As if it had not been asked for: the owner may try again.
            self._enter(record, before)
            raise
        record.vm = None
        self._enter(record, VmState.RESET)
        return b""

    # The stages of a reset that touch memory: RELEASE_MEMPARCELS here, DESTROY_VM above.
    def _release_memparcels(self, record: Record, vm: GunyahHypVm) -> None:
        vm.kill()
        for parcel in self.parcels.parcels.values():
            if vm.vmid in parcel.accepted:
                self.parcels.release(vm, parcel.handle, 0)
        if record.image is not None:
            record.image.locked = False
            record.image = None

    def _enter(self, record: Record, state: VmState) -> None:
        record.state = state
        self._status(record)

    def _status(self, record: Record) -> None:
        self._notify(record.owner, Id.VM_STATUS, struct.pack(p.STATUS, record.vmid, record.state, 0, 0))


# What is lent, and the gaps between that below the end of devices.
def _layout(ranges: tuple[Sgl, ...]) -> list[tuple[RangeOp, Ipa, int]]:
    found = [(RangeOp.ADD_PRIVATE, base, size) for base, size in ranges]
    at = Ipa(0)
    for base, size in [*sorted(r for r in ranges if r.ipa < DEVICES_END), Sgl(DEVICES_END, 0)]:
        if at < base:
            found.append((RangeOp.ADD_VMMIO, at, base - at))
        at = max(at, base + size)
    return found


_HANDLERS: dict[int, Callable[[ResourceManager, int, bytes], bytes]] = {
    Id.MEM_LEND: lambda rm, caller, body: rm._mem_create(caller, Transaction.LEND, body),
    Id.MEM_SHARE: lambda rm, caller, body: rm._mem_create(caller, Transaction.SHARE, body),
    Id.MEM_DONATE: lambda rm, caller, body: rm._mem_create(caller, Transaction.DONATE, body),
    Id.MEM_APPEND: ResourceManager._mem_append,
    Id.MEM_RECLAIM: ResourceManager._mem_reclaim,
    Id.MEM_ACCEPT: ResourceManager._mem_accept,
    Id.MEM_RELEASE: ResourceManager._mem_release,
    Id.MEM_NOTIFY: ResourceManager._mem_notify,
    Id.VM_ALLOC_VMID: ResourceManager._alloc_vmid,
    Id.VM_DEALLOC_VMID: ResourceManager._dealloc_vmid,
    Id.VM_CONFIG_IMAGE: ResourceManager._config_image,
    Id.VM_AUTH_IMAGE: ResourceManager._auth_image,
    Id.VM_SET_DEMAND_PAGING: ResourceManager._set_demand_paging,
    Id.VM_SET_ADDRESS_LAYOUT: ResourceManager._set_address_layout,
    Id.VM_INIT: ResourceManager._init,
    Id.VM_SET_BOOT_CONTEXT: ResourceManager._set_boot_context,
    Id.VM_GET_HYP_RESOURCES: ResourceManager._get_hyp_resources,
    Id.VM_START: ResourceManager._start,
    Id.VM_STOP: ResourceManager._stop,
    Id.VM_RESET: ResourceManager._reset,
}

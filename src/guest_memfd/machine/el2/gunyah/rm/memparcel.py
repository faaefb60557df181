"""Memory parcels: pages that one VM offers to others by number. All checks come first, then all pages or none.

A parcel is an extent beside the owner's: lending donates the pages to it, which takes the owner's mapping away; sharing
records the owner's mapping on it first, so that it stays. Pieces are donated without synchronisation, which follows once at
the end. Source: src/memparcel of the Resource Manager. The owner here is always the host: other VMs get UNIMPLEMENTED.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum, IntFlag
from typing import NamedTuple

from guest_memfd.machine.el2.gunyah.addrspace import AddrMapFlag
from guest_memfd.machine.el2.gunyah.donate import Donation, Options
from guest_memfd.machine.el2.gunyah.el2 import HLOS_VMID, Gunyah
from guest_memfd.machine.el2.gunyah.errors import HypRefused
from guest_memfd.machine.el2.gunyah.memextent import RWX, Attributes, Extent, ExtentAccess, ExtentMapping
from guest_memfd.machine.el2.gunyah.rm.errors import RmError, RmRefused, of_hypervisor
from guest_memfd.machine.el2.gunyah.rm.payloads import (
    ACCEPT_DONE,
    APPEND_END,
    MAX_SGL,
    Accept,
    Acl,
    Append,
    Id,
    MemRequest,
    RmMemFlag,
    Sgl,
    encode_notify,
)
from guest_memfd.machine.el2.gunyah.stage2 import IA_BITS
from guest_memfd.machine.el2.gunyah.vm import GunyahHypVm
from guest_memfd.words.units import PAGE, Ipa, Pa, identity_pa

MAX_PARCELS = 64
"""Of one owner."""
_RIGHTS = (ExtentAccess.R, ExtentAccess.RX, ExtentAccess.RW, ExtentAccess.RWX)
_QUIET = Options(Donation.TO_SIBLING, sync=False)
_IO = 1
# As plain numbers: inverting an IntFlag loses the bits that have no name.
_CREATE_FLAGS, _SANITIZE = int(RmMemFlag.SANITIZE | RmMemFlag.APPEND), int(RmMemFlag.SANITIZE)


class Transaction(IntEnum):
    """What kind of parcel; also the transaction type of MEM_ACCEPT."""

    DONATE = 0
    LEND = 1
    SHARE = 2


class NotifyFlag(IntFlag):
    """MEM_NOTIFY: exactly one of these."""

    SHARED = 1
    RELEASED = 2
    ACCEPTED = 4
    RECALL = 8


_NOTIFICATIONS = {
    NotifyFlag.SHARED: Id.MEM_SHARED, NotifyFlag.RELEASED: Id.MEM_RELEASED,
    NotifyFlag.ACCEPTED: Id.MEM_ACCEPTED, NotifyFlag.RECALL: Id.MEM_RECALL,
}


class Placed(NamedTuple):
    """Where a VM has a piece: guest address, physical address, bytes."""

    ipa: Ipa
    pa: Pa
    size: int


@dataclass
class Parcel:
    """One parcel. *accepted*: per VM where its pieces are; *locked*: it is the image of a VM."""

    handle: int
    kind: Transaction
    mem_type: int
    flags: int
    label: int
    acl: tuple[Acl, ...]
    extent: Extent
    pieces: list[Sgl] = field(default_factory=list)
    complete: bool = False
    locked: bool = False
    accepted: dict[int, list[Placed]] = field(default_factory=dict)

    def rights(self, vmid: int) -> ExtentAccess | None:
        """What the ACL gives to a VM; None: it is not in it."""
        return next((ExtentAccess(entry.rights) for entry in self.acl if entry.vmid == vmid), None)

    @property
    def size(self) -> int:
        """Length of the parcel in bytes, over all its pieces."""
        return sum(piece.size for piece in self.pieces)


def check_acl(kind: Transaction, mem_type: int, acl: tuple[Acl, ...], owner: int, known: Callable[[int], bool]) -> None:
    """Raises RmRefused: ARGUMENT_INVALID for what no such parcel can have, VMID_INVALID for a VM that is not there."""
    vmids = [entry.vmid for entry in acl]
    bad = (
        not acl or len(set(vmids)) != len(vmids)
        or any(entry.rights not in _RIGHTS for entry in acl)
        # Who lends or donates gives its own access up, and who shares keeps it: the owner is in the list exactly then.
        or (owner in vmids) != (kind == Transaction.SHARE)
        or (kind == Transaction.DONATE and (len(acl) != 1 or acl[0].rights != ExtentAccess.RWX))
        or mem_type not in (0, _IO)
        # No one executes what lies in a device.
        or (mem_type == _IO and any(entry.rights & ExtentAccess.X for entry in acl))
    )
    if bad:
        raise RmRefused(RmError.ARGUMENT_INVALID, f"{kind.name} with ACL {acl}")
    if not all(known(vmid) for vmid in vmids):
        raise RmRefused(RmError.VMID_INVALID, f"ACL {acl} names a VM that is not there")


def check_sgl(sgl: tuple[Sgl, ...]) -> None:
    """Raises RmRefused(ARGUMENT_INVALID) for lists that are empty, too long, unaligned or beyond the address limit."""
    bad = not 0 < len(sgl) <= MAX_SGL or any(
        (piece.ipa | piece.size) % PAGE or not piece.size or piece.ipa + piece.size > 1 << IA_BITS for piece in sgl)
    if bad:
        raise RmRefused(RmError.ARGUMENT_INVALID, f"a scatter list of {len(sgl)} entries")


class Memparcels:
    """All parcels. *known* says whether a VMID exists; *notify* sends (vmid, message, body)."""

    def __init__(self, el2: Gunyah, known: Callable[[int], bool], notify: Callable[[int, Id, bytes], None]) -> None:
        self._el2, self._known, self._notify = el2, known, notify
        self.parcels: dict[int, Parcel] = {}
        self._next = 1

    def find(self, handle: int) -> Parcel:
        """The parcel with this handle; raises RmRefused(HANDLE_INVALID) when there is none."""
        if handle not in self.parcels:
            raise RmRefused(RmError.HANDLE_INVALID, f"no parcel {handle:#x}")
        return self.parcels[handle]

    # -- the owner's calls ---------------------------------------------------------------------------------------

    def create(self, owner: int, kind: Transaction, request: MemRequest) -> int:
        """MEM_LEND, MEM_SHARE, MEM_DONATE: the handle. Raises RmRefused.

        UNIMPLEMENTED, ARGUMENT_INVALID, VMID_INVALID, DENIED beyond 64 parcels, MEM_INVALID a page that is not the owner's.
        """
        self._only_host(owner)
        if request.flags & ~_CREATE_FLAGS:
            raise RmRefused(RmError.ARGUMENT_INVALID, f"flags {request.flags:#x}")
        check_acl(kind, request.mem_type, request.acl, owner, self._known)
        check_sgl(request.sgl)
        if len(self.parcels) >= MAX_PARCELS:
            raise RmRefused(RmError.DENIED, f"{MAX_PARCELS} parcels")
        extent = Extent(f"parcel {self._next}", parent=self._el2.root_extent)
        if kind == Transaction.SHARE:
            # Before the pages come in. With the same mapping recorded on both extents the donation leaves the host's
            # mapping alone; afterwards it would be gone already.
            extent.record(ExtentMapping(self._el2.hlos, Ipa(0), RWX))
        parcel = Parcel(self._next, kind, request.mem_type, request.flags, request.label, request.acl, extent)
        self._take(parcel, request.sgl)
        parcel.complete = not request.flags & RmMemFlag.APPEND
        self.parcels[parcel.handle] = parcel
        # Never used again: who releases a parcel late, by its number, must not meet another one.
        self._next += 1
        return parcel.handle

    def append(self, owner: int, request: Append) -> None:
        """MEM_APPEND. Raises RmRefused: HANDLE_INVALID; DENIED unless the owner's and incomplete; as `create`."""
        parcel = self._owned(owner, request.handle)
        if parcel.complete:
            raise RmRefused(RmError.DENIED, f"parcel {parcel.handle:#x} is complete")
        if request.flags & ~APPEND_END:
            raise RmRefused(RmError.ARGUMENT_INVALID, f"flags {request.flags:#x}")
        check_sgl(request.sgl)
        self._take(parcel, request.sgl)
        parcel.complete = bool(request.flags & APPEND_END)

    def reclaim(self, owner: int, handle: int, flags: int) -> None:
        """MEM_RECLAIM. Raises RmRefused: HANDLE_INVALID; DENIED not the owner, or a VM's image; MEM_INUSE still accepted."""
        parcel = self._owned(owner, handle)
        if flags & ~_SANITIZE:
            raise RmRefused(RmError.ARGUMENT_INVALID, f"flags {flags:#x}")
        # The image of a VM is being used by it, whatever the ACL says.
        if parcel.locked:
            raise RmRefused(RmError.DENIED, f"parcel {handle:#x} is the image of a VM")
        if parcel.accepted:
            raise RmRefused(RmError.MEM_INUSE, f"VMs {sorted(parcel.accepted)} still have parcel {handle:#x}")
        # While the parcel still owns the pages: the host must not see them before they are zero.
        if (flags | parcel.flags) & RmMemFlag.SANITIZE:
            for piece in parcel.pieces:
                self._el2.ram.zero(identity_pa(piece.ipa), piece.size)
        self._untake(parcel, parcel.pieces)
        self.drop(parcel)

    def drop(self, parcel: Parcel) -> None:
        """The handle ends; its pages have gone elsewhere."""
        del self.parcels[parcel.handle]

    # -- the others' ---------------------------------------------------------------------------------------------

    def accept(self, vm: GunyahHypVm, request: Accept) -> None:
        """MEM_ACCEPT: map all pieces, in order, where the request's list says.

        Raises RmRefused: HANDLE_INVALID; DENIED not in the ACL, incomplete or accepted before; VALIDATE_FAILED;
        ARGUMENT_INVALID for a list of another size; what mapping fails with.
        """
        parcel = self.find(request.handle)
        rights = parcel.rights(vm.vmid)
        if rights is None or not parcel.complete or vm.vmid in parcel.accepted:
            raise RmRefused(RmError.DENIED, f"VM {vm.vmid:#x} may not accept parcel {request.handle:#x}")
        if (request.mem_type, request.transaction, request.label) != (parcel.mem_type, parcel.kind, parcel.label):
            raise RmRefused(RmError.VALIDATE_FAILED, f"parcel {request.handle:#x} is something else")
        check_sgl(request.sgl)
        if request.flags != ACCEPT_DONE or sum(piece.size for piece in request.sgl) != parcel.size:
            raise RmRefused(RmError.ARGUMENT_INVALID, "the list has to be complete, and as large as the parcel")
        self.place(vm, parcel, request.sgl, rights)

    def place(self, vm: GunyahHypVm, parcel: Parcel, sgl: tuple[Sgl, ...], rights: ExtentAccess) -> None:
        """Map *parcel* into *vm*; raises RmRefused, and nothing stays mapped."""
        attributes = Attributes(rights, rights)
        done: list[Placed] = []
        try:
            for placed in _pair(parcel.pieces, sgl):
                ipa, pa, size = placed
                vm.space.map(parcel.extent, ipa, attributes, AddrMapFlag.PARTIAL, pa, size)
                done.append(placed)
        except HypRefused as refused:
            # All pieces or none: a VM that has half of a parcel could neither use nor release it.
            self._unplace(vm, parcel, done)
            raise RmRefused(of_hypervisor(refused.error), str(refused)) from None
        parcel.accepted[vm.vmid] = done

    def release(self, vm: GunyahHypVm, handle: int, flags: int) -> None:
        """MEM_RELEASE. Raises RmRefused: HANDLE_INVALID; MEM_RELEASED when it has not accepted it; ARGUMENT_INVALID."""
        parcel = self.find(handle)
        if flags & ~_SANITIZE:
            raise RmRefused(RmError.ARGUMENT_INVALID, f"flags {flags:#x}")
        if vm.vmid not in parcel.accepted:
            raise RmRefused(RmError.MEM_RELEASED, f"VM {vm.vmid:#x} does not have parcel {handle:#x}")
        # First out of the VM's reach, then zeroed: it could write in between.
        self._unplace(vm, parcel, parcel.accepted.pop(vm.vmid))
        if flags & RmMemFlag.SANITIZE:
            for piece in parcel.pieces:
                self._el2.ram.zero(identity_pa(piece.ipa), piece.size)

    def notify(self, caller: int, handle: int, flags: int, tag: int, vmids: tuple[int, ...]) -> None:
        """MEM_NOTIFY. Raises RmRefused: HANDLE_INVALID; ARGUMENT_INVALID; DENIED when this is not the caller's to say."""
        parcel = self.find(handle)
        if flags not in tuple(NotifyFlag):
            raise RmRefused(RmError.ARGUMENT_INVALID, f"flags {flags:#x}")
        from_owner = flags in (NotifyFlag.SHARED, NotifyFlag.RECALL)
        if from_owner != (caller == HLOS_VMID) or (not from_owner and parcel.rights(caller) is None):
            raise RmRefused(RmError.DENIED, f"VM {caller:#x} about parcel {handle:#x}")
        others = [vmid for vmid in vmids if parcel.rights(vmid) is not None] if from_owner else [HLOS_VMID]
        for vmid in others:
            self._notify(vmid, _NOTIFICATIONS[NotifyFlag(flags)], encode_notify(handle, flags, tag, (caller,)))

    # -- pages ---------------------------------------------------------------------------------------------------

    @staticmethod
    def _only_host(owner: int) -> None:
        if owner != HLOS_VMID:
            raise RmRefused(RmError.UNIMPLEMENTED, "parcels of other VMs than the host")

    def _owned(self, owner: int, handle: int) -> Parcel:
        parcel = self.find(handle)
        if owner != HLOS_VMID:
            raise RmRefused(RmError.DENIED, f"parcel {handle:#x} is not VM {owner:#x}'s")
        return parcel

    # The host's addresses are physical addresses.
    def _take(self, parcel: Parcel, sgl: tuple[Sgl, ...]) -> None:
        host = self._el2.host_extent
        done: list[Sgl] = []
        try:
            for piece in sgl:
                start = identity_pa(piece.ipa)
                if not self._el2.memdb.owns(host, start, start + piece.size):
                    raise RmRefused(RmError.MEM_INVALID, f"{piece.ipa:#x}+{piece.size:#x} is not the host's")
                # Without synchronisation, piece by piece; one flush follows for all, and until then no one has been
                # told that the parcel exists.
                self._el2.donate(_QUIET, host, parcel.extent, piece.ipa, piece.size)
                done.append(piece)
        except HypRefused as refused:
            self._untake(parcel, done)
            raise RmRefused(of_hypervisor(refused.error), str(refused)) from None
        except RmRefused:
            self._untake(parcel, done)
            raise
        # Before the handle is given out: a VM that accepts must not share the pages with a stale entry of the host's.
        self._el2.sync()
        parcel.pieces += done

    def _untake(self, parcel: Parcel, pieces: list[Sgl]) -> None:
        for piece in pieces:
            self._el2.donate(_QUIET, parcel.extent, self._el2.host_extent, piece.ipa, piece.size)
        self._el2.sync()

    def _unplace(self, vm: GunyahHypVm, parcel: Parcel, placed: list[Placed]) -> None:
        for ipa, pa, size in placed:
            vm.space.unmap(parcel.extent, ipa, AddrMapFlag.PARTIAL | AddrMapFlag.NOSYNC, pa, size)
        # Once for all pieces: a parcel may have 512 of them, and nobody is told before this.
        vm.space.sync_all()


# Two lists of the same total size, cut so that every result lies in one entry of both.
def _pair(pieces: list[Sgl], sgl: tuple[Sgl, ...]) -> list[Placed]:
    found = []
    wanted = list(sgl)
    for piece in pieces:
        at = 0
        while at < piece.size:
            ipa, size = wanted[0]
            step = min(size, piece.size - at)
            found.append(Placed(ipa, identity_pa(piece.ipa) + at, step))
            at += step
            wanted[0] = Sgl(ipa + step, size - step)
            if step == size:
                wanted.pop(0)
    return found

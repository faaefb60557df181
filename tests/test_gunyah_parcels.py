"""Memory parcels of the Resource Manager."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from gunyah_rm import BASE, GIB, MIB, POOL, RW, RWX, Machine, R

from guest_memfd.machine.el2.gunyah.el2 import HLOS_VMID
from guest_memfd.machine.el2.gunyah.errors import HypRefused
from guest_memfd.machine.el2.gunyah.rm import payloads as p
from guest_memfd.machine.el2.gunyah.rm.client import RmClient
from guest_memfd.machine.el2.gunyah.rm.errors import RmError
from guest_memfd.machine.el2.gunyah.rm.lifecycle import VmState
from guest_memfd.machine.el2.gunyah.rm.memparcel import MAX_PARCELS, NotifyFlag, Transaction
from guest_memfd.machine.el2.gunyah.rm.message import (
    Message,
    MessageType,
)
from guest_memfd.machine.el2.gunyah.rm.payloads import Accept, Acl, Append, Id, MemRequest, RmMemFlag, Sgl
from guest_memfd.machine.hw.arm64.mmu import Mmu
from guest_memfd.machine.hw.arm64.registers import Tcr
from guest_memfd.machine.hw.arm64.walk import Stage1
from guest_memfd.words.units import PAGE


@pytest.fixture
def m() -> Machine:
    return Machine()


# -- parcels -----------------------------------------------------------------------------------------------------------


def test_lend_and_share(m: Machine) -> None:
    vmid = m.linux.alloc_vmid()
    at = m.ram.base + 64 * MIB
    ret, lent = m.lend(vmid, Sgl(at, 2 * MIB), Sgl(at + 4 * MIB, PAGE))
    assert ret == 0
    assert [m.el2.host_may(at + n) for n in (0, 2 * MIB, 4 * MIB, 4 * MIB + PAGE)] == [False, True, False, True]
    ret, shared = m.share(vmid, Sgl(at + 2 * MIB, 2 * MIB))
    assert ret == 0
    assert m.el2.host_may(at + 2 * MIB)
    assert m.el2.owner(at + 2 * MIB) is None
    assert m.lend(vmid, Sgl(at + 2 * MIB, PAGE))[0] == -22
    assert m.linux.mem_reclaim(lent) == 0
    assert m.linux.mem_reclaim(lent) == -22
    assert m.linux.mem_reclaim(shared) == 0
    assert all(m.el2.owner(at + n) == "host" and m.el2.host_may(at + n) for n in (0, 2 * MIB, 4 * MIB))
    assert m.el2.hlos.table.pages.violations == []


@pytest.mark.parametrize("share", [False, True])
def test_nothing_of_a_lent_parcel_stays_in_a_tlb(m: Machine, share: bool) -> None:
    vmid, at = m.linux.alloc_vmid(), m.ram.base + 64 * MIB
    assert m.lend(vmid, Sgl(at, PAGE))[0] == 0              # the block is in pieces from here on
    tlb = m.el2.tlbs[0]
    off = Stage1(Tcr(), 0, 0, enabled=False)
    assert Mmu(m.ram, tlb).translate(at + PAGE, "r", 1, off, m.el2.stage2()).pa == at + PAGE
    assert tlb.holds_stage2(at + PAGE, HLOS_VMID)
    assert (m.share if share else m.lend)(vmid, Sgl(at + PAGE, PAGE))[0] == 0
    assert m.el2.host_may(at + PAGE) == share
    assert not tlb.holds_stage2(at + PAGE, HLOS_VMID)


SMALL = (Sgl(0x8100_0000, PAGE),)
PARCEL_ERRORS: list[tuple[str, Id, dict[str, Any], RmError]] = [
    ("lend", Id.MEM_LEND, {}, RmError.OK),
    ("lend names the owner", Id.MEM_LEND, {"acl": (Acl(0x80, RWX), Acl(3, RWX))}, RmError.ARGUMENT_INVALID),
    ("share does not name the owner", Id.MEM_SHARE, {}, RmError.ARGUMENT_INVALID),
    ("share", Id.MEM_SHARE, {"acl": (Acl(0x80, R), Acl(3, RWX))}, RmError.OK),
    ("donate", Id.MEM_DONATE, {}, RmError.OK),
    ("donate to two", Id.MEM_DONATE, {"acl": (Acl(0x80, RWX), Acl(0x81, RWX))}, RmError.ARGUMENT_INVALID),
    ("donate a part", Id.MEM_DONATE, {"acl": (Acl(0x80, RW),)}, RmError.ARGUMENT_INVALID),
    ("nobody", Id.MEM_LEND, {"acl": ()}, RmError.ARGUMENT_INVALID),
    ("twice the same", Id.MEM_LEND, {"acl": (Acl(0x80, RWX), Acl(0x80, RWX))}, RmError.ARGUMENT_INVALID),
    ("write only", Id.MEM_LEND, {"acl": (Acl(0x80, 2),)}, RmError.ARGUMENT_INVALID),
    ("no right", Id.MEM_LEND, {"acl": (Acl(0x80, 0),)}, RmError.ARGUMENT_INVALID),
    ("no such VM", Id.MEM_LEND, {"acl": (Acl(0x99, RWX),)}, RmError.VMID_INVALID),
    ("devices", Id.MEM_LEND, {"mem_type": 1, "acl": (Acl(0x80, RW),)}, RmError.OK),
    ("executable devices", Id.MEM_LEND, {"mem_type": 1}, RmError.ARGUMENT_INVALID),
    ("no such type", Id.MEM_LEND, {"mem_type": 2, "acl": (Acl(0x80, RW),)}, RmError.ARGUMENT_INVALID),
    ("no such flag", Id.MEM_LEND, {"flags": 4}, RmError.ARGUMENT_INVALID),
    ("nothing", Id.MEM_LEND, {"sgl": ()}, RmError.ARGUMENT_INVALID),
    ("misaligned", Id.MEM_LEND, {"sgl": (Sgl(0x8100_0001, PAGE),)}, RmError.ARGUMENT_INVALID),
    ("no size", Id.MEM_LEND, {"sgl": (Sgl(0x8100_0000, 0),)}, RmError.ARGUMENT_INVALID),
    ("beyond the limit", Id.MEM_LEND, {"sgl": (Sgl(1 << 48, PAGE),)}, RmError.ARGUMENT_INVALID),
    ("not memory", Id.MEM_LEND, {"sgl": (Sgl(0x1000, PAGE),)}, RmError.MEM_INVALID),
    ("the same page twice", Id.MEM_LEND, {"sgl": SMALL + SMALL}, RmError.MEM_INVALID),
    ("too many", Id.MEM_LEND, {"sgl": tuple(Sgl(0x8100_0000 + n * PAGE, PAGE) for n in range(513))},
     RmError.ARGUMENT_INVALID),
]


@pytest.mark.parametrize(("what", "call", "change", "error"), PARCEL_ERRORS, ids=[e[0] for e in PARCEL_ERRORS])
def test_parcel_errors(m: Machine, what: str, call: Id, change: dict[str, Any], error: RmError) -> None:
    assert [m.linux.alloc_vmid(), m.linux.alloc_vmid()] == [0x80, 0x81]
    request = MemRequest(0, 0, 0, (Acl(0x80, RWX),), SMALL)._replace(**change)
    assert m.rm._answer(HLOS_VMID, Message(MessageType.REQUEST, 1, call, p.encode_mem(request)))[0] == error
    assert (m.el2.owner(0x8100_0000) == "host") == bool(error)
    assert bool(m.rm.parcels.parcels) == (not error)


def test_other_vms_offer_nothing(m: Machine) -> None:
    vmid, _ = m.vm()
    guest = m.guest(vmid)
    assert guest.mem_share((Acl(HLOS_VMID, RWX),), (Sgl(BASE, PAGE),))[0] == -95


def test_64_parcels(m: Machine) -> None:
    vmid = m.linux.alloc_vmid()
    handles = [m.lend(vmid, Sgl(m.ram.base + n * PAGE, PAGE))[1] for n in range(MAX_PARCELS)]
    assert m.lend(vmid, Sgl(m.ram.base + 70 * PAGE, PAGE))[0] == -1
    assert m.linux.mem_reclaim(handles[5]) == 0
    assert m.lend(vmid, Sgl(m.ram.base + 70 * PAGE, PAGE))[0] == 0


def test_long_lists_are_appended(m: Machine) -> None:
    vmid = m.linux.alloc_vmid()
    sgl = tuple(Sgl(m.ram.base + 2 * n * PAGE, PAGE) for n in range(1100))
    ret, handle = m.linux.mem_share((Acl(vmid, RWX),), sgl)
    assert ret == 0
    parcel = m.rm.parcels.find(handle)
    assert (len(parcel.pieces), parcel.complete, parcel.size) == (1100, True, 1100 * PAGE)
    assert not m.el2.host_may(sgl[-1].ipa)
    assert m.linux.call(Id.MEM_APPEND, p.encode_append(Append(handle, 1, SMALL)))[0] == -1
    assert m.linux.mem_reclaim(handle) == 0
    assert m.el2.host_may(sgl[-1].ipa)


def test_an_append_that_fails_gives_everything_back(m: Machine) -> None:
    vmid = m.linux.alloc_vmid()
    sgl = tuple(Sgl(m.ram.base + n * PAGE, PAGE) for n in range(600))
    assert m.linux.mem_share((Acl(vmid, RWX),), (*sgl, sgl[0])) == (-22, p.INVALID_HANDLE)
    assert not m.rm.parcels.parcels
    assert all(m.el2.host_may(piece.ipa) and m.el2.owner(piece.ipa) == "host" for piece in sgl)


def test_append_errors(m: Machine) -> None:
    vmid = m.linux.alloc_vmid()
    request = MemRequest(0, RmMemFlag.APPEND, 0, (Acl(vmid, RWX),), SMALL)
    ret, reply = m.linux.call(Id.MEM_LEND, p.encode_mem(request))
    assert ret == 0
    handle, = struct.unpack("<I", reply)

    def append(number: int, flags: int, sgl: tuple[Sgl, ...], caller: int = HLOS_VMID) -> int:
        message = Message(MessageType.REQUEST, 1, Id.MEM_APPEND, p.encode_append(Append(number, flags, sgl)))
        return m.rm._answer(caller, message)[0]

    more = (Sgl(0x8200_0000, PAGE),)
    assert append(99, 1, more) == RmError.HANDLE_INVALID
    assert append(handle, 1, more, 0x80) == RmError.DENIED
    assert append(handle, 2, more) == RmError.ARGUMENT_INVALID
    assert append(handle, 1, ()) == RmError.ARGUMENT_INVALID
    assert append(handle, 1, SMALL) == RmError.MEM_INVALID
    assert m.linux.vm_configure(vmid, 0, handle, 0, PAGE) == -1         # not complete yet
    assert append(handle, 0, more) == RmError.OK
    assert append(handle, 1, (Sgl(0x8300_0000, PAGE),)) == RmError.OK
    assert append(handle, 1, (Sgl(0x8400_0000, PAGE),)) == RmError.DENIED


@pytest.mark.parametrize(("acl", "sgl"), [((), SMALL), (tuple(Acl(n, RWX) for n in range(256)), SMALL),
                                          ((Acl(0x80, RWX),), ())])
def test_linux_does_not_even_ask(m: Machine, acl: tuple[Acl, ...], sgl: tuple[Sgl, ...]) -> None:
    assert m.linux.mem_share(acl, sgl) == (-22, p.INVALID_HANDLE)
    assert m.linux._seq == 0


def test_lending_without_memory_loses_nothing(m: Machine) -> None:
    vmid = m.linux.alloc_vmid()
    sgl = (Sgl(m.ram.base + PAGE, PAGE), Sgl(m.ram.base + GIB + PAGE, PAGE))
    failed = 0
    while True:
        m.pool.fail_at(failed)
        ret, handle = m.lend(vmid, *sgl)
        m.pool.fail_at(None)
        if not ret:
            break
        assert ret == -12
        failed += 1
        assert m.el2.memdb.owns(m.el2.host_extent, m.ram.base, m.ram.end - POOL)
        assert all(m.el2.host_may(piece.ipa) for piece in sgl)
        assert failed >= 1
    assert m.linux.mem_reclaim(handle) == 0


def test_sanitising_parcels(m: Machine) -> None:
    vmid = m.linux.alloc_vmid()
    at = SMALL[0].ipa
    m.ram.write64(at, 5)
    _, handle = m.lend(vmid, *SMALL)
    assert m.linux.mem_reclaim(handle) == 0
    assert m.ram.read64(at) == 5
    _, handle = m.lend(vmid, *SMALL)
    assert m.linux.call(Id.MEM_RECLAIM, p.encode_handle(handle, RmMemFlag.SANITIZE))[0] == 0
    assert m.ram.read64(at) == 0
    _, handle = m.lend(vmid, *SMALL)
    assert m.linux.call(Id.MEM_RECLAIM, p.encode_handle(handle, 2))[0] == -22


def accepting(m: Machine) -> tuple[int, RmClient, int]:
    vmid, _ = m.vm()
    sgl = (Sgl(0x9000_0000, 2 * PAGE), Sgl(0x9100_0000, PAGE))
    ret, handle = m.linux.mem_share((Acl(vmid, RW), Acl(HLOS_VMID, RWX)), sgl, label=7)
    assert ret == 0
    return vmid, m.guest(vmid), handle


def test_accept_and_release(m: Machine) -> None:
    vmid, guest, handle = accepting(m)
    vm = m.rm.vms[vmid].vm
    assert vm is not None
    request = Accept(handle, 0, Transaction.SHARE, 128, 7, (Sgl(64 * GIB, PAGE), Sgl(65 * GIB, 2 * PAGE)))
    assert guest.call(Id.MEM_ACCEPT, p.encode_accept(request))[0] == 0
    assert [vm.ipa_of(pa) for pa in (0x9000_0000, 0x9000_1000, 0x9100_0000)] == [64 * GIB, 65 * GIB, 65 * GIB + PAGE]
    assert m.linux.mem_reclaim(handle) == -22           # MEM_INUSE
    assert guest.call(Id.MEM_ACCEPT, p.encode_accept(request))[0] == -1
    assert guest.call(Id.MEM_RELEASE, p.encode_handle(handle, 2))[0] == -22
    assert guest.call(Id.MEM_RELEASE, p.encode_handle(handle, RmMemFlag.SANITIZE))[0] == 0
    assert guest.call(Id.MEM_RELEASE, p.encode_handle(handle))[0] == -22
    assert vm.ipa_of(0x9000_0000) is None
    assert m.linux.mem_reclaim(handle) == 0
    assert vm.space.table.pages.violations == []


ACCEPT_ERRORS: list[tuple[str, dict[str, Any], RmError]] = [
    ("right", {}, RmError.OK),
    ("no such handle", {"handle": 99}, RmError.HANDLE_INVALID),
    ("another type", {"mem_type": 1}, RmError.VALIDATE_FAILED),
    ("another transaction", {"transaction": Transaction.LEND}, RmError.VALIDATE_FAILED),
    ("another label", {"label": 8}, RmError.VALIDATE_FAILED),
    ("another size", {"sgl": (Sgl(64 * GIB, PAGE),)}, RmError.ARGUMENT_INVALID),
    ("no list", {"sgl": ()}, RmError.ARGUMENT_INVALID),
    ("not done", {"flags": 0}, RmError.ARGUMENT_INVALID),
    ("taken already", {"sgl": (Sgl(64 * GIB, PAGE), Sgl(64 * GIB, 2 * PAGE))}, RmError.DENIED),
    ("beyond its addresses", {"sgl": (Sgl((1 << 44) - PAGE, 3 * PAGE),)}, RmError.ARGUMENT_INVALID),
]


@pytest.mark.parametrize(("what", "change", "error"), ACCEPT_ERRORS, ids=[e[0] for e in ACCEPT_ERRORS])
def test_accept_errors(m: Machine, what: str, change: dict[str, Any], error: RmError) -> None:
    vmid, _, handle = accepting(m)
    request = Accept(handle, 0, Transaction.SHARE, 128, 7, (Sgl(64 * GIB, 3 * PAGE),))._replace(**change)
    message = Message(MessageType.REQUEST, 1, Id.MEM_ACCEPT, p.encode_accept(request))
    assert m.rm._answer(vmid, message)[0] == error
    vm = m.rm.vms[vmid].vm
    assert vm is not None
    assert (vm.ipa_of(0x9000_0000) is None) == bool(error)
    assert m.rm._answer(0x99, message)[0] == RmError.DENIED


def test_accepting_without_memory(m: Machine) -> None:
    vmid, guest, handle = accepting(m)
    vm = m.rm.vms[vmid].vm
    assert vm is not None
    before = list(vm.space.mappings())
    request = Accept(handle, 0, Transaction.SHARE, 128, 7, (Sgl(64 * GIB, PAGE), Sgl(95 * GIB, 2 * PAGE)))
    for n in range(4):
        m.pool.fail_at(n)
        ret, _ = guest.call(Id.MEM_ACCEPT, p.encode_accept(request))
        m.pool.fail_at(None)
        if n == 0:
            assert ret == -12
        if ret == 0:
            break
        assert ret == -12
        assert list(vm.space.mappings()) == before
        assert not m.rm.parcels.find(handle).accepted
    assert [leaf.ipa for leaf in vm.space.mappings()][-3:] == [64 * GIB, 95 * GIB, 95 * GIB + PAGE]


def test_notify(m: Machine) -> None:
    vmid, guest, handle = accepting(m)
    linux = m.linux

    def notify(client: RmClient, flags: int, number: int = handle) -> int:
        return client.call(Id.MEM_NOTIFY, p.encode_notify(number, flags, 0xAB, (vmid, 0x99)))[0]

    assert notify(linux, NotifyFlag.SHARED) == 0
    assert notify(linux, NotifyFlag.RECALL) == 0
    assert notify(guest, NotifyFlag.ACCEPTED) == 0
    assert notify(guest, NotifyFlag.RELEASED) == 0
    guest.receive()
    linux.receive()
    assert [n.id for n in guest.notifications] == [Id.MEM_SHARED, Id.MEM_RECALL]
    assert [n.id for n in linux.notifications[-2:]] == [Id.MEM_ACCEPTED, Id.MEM_RELEASED]
    assert p.decode_notify(guest.notifications[0].body) == (handle, NotifyFlag.SHARED, 0xAB, (HLOS_VMID,))
    assert notify(linux, NotifyFlag.ACCEPTED) == -1
    assert notify(guest, NotifyFlag.SHARED) == -1
    assert notify(m.guest(0x99), NotifyFlag.RELEASED) == -1
    assert notify(linux, 3) == -22
    assert notify(linux, 1, 99) == -22


def test_a_reset_releases_what_the_vm_had_accepted(m: Machine) -> None:
    vmid, guest, handle = accepting(m)
    request = Accept(handle, 0, Transaction.SHARE, 128, 7, (Sgl(64 * GIB, 3 * PAGE),))
    assert guest.call(Id.MEM_ACCEPT, p.encode_accept(request))[0] == 0
    assert m.linux.vm_stop(vmid) == 0
    assert m.linux.mem_reclaim(handle) == -22
    assert m.linux.vm_call(Id.VM_RESET, vmid) == 0
    assert m.linux.mem_reclaim(handle) == 0
    assert m.el2.memdb.owns(m.el2.host_extent, m.ram.base, m.ram.end - POOL)


@pytest.mark.parametrize("share", [False, True])
def test_starting_takes_no_memory(m: Machine, share: bool) -> None:
    """The tables are there since the image was offered and VM_INIT: nothing that could fail half-way."""
    vmid, _ = m.vm(VmState.READY, share=share, base=16 * MIB if share else BASE)
    m.pool.fail_at(0)
    assert m.linux.vm_call(Id.VM_START, vmid) == 0
    vm = m.rm.vms[vmid].vm
    assert vm is not None
    assert m.el2.owner(m.ram.base) == ("shared" if share else "guest", vm)
    with pytest.raises(HypRefused, match="NOMEM"):
        m.el2.create_vm("the failure is still pending")


def test_a_stop_flag_that_does_not_exist(m: Machine) -> None:
    vmid, _ = m.vm()
    assert m.linux.call(Id.VM_STOP, struct.pack(p.STOP, vmid, 2, 3))[0] == -22
    assert m.linux.call(Id.VM_STOP, struct.pack(p.STOP, vmid, 0, 0))[0] == 0
    with pytest.raises(HypRefused, match="NORESOURCES"):
        m.el2.create_vm("taken", vmid)

"""The Resource Manager: messages, the life of a VM, demand paging."""

from __future__ import annotations

import random
import struct
from collections import deque
from typing import Any

import pytest
from gunyah_rm import BASE, GIB, MIB, Machine

from guest_memfd.machine.el2.gunyah.el2 import FIRST_VMID, HLOS_VMID, LAST_VMID
from guest_memfd.machine.el2.gunyah.errors import GunyahError
from guest_memfd.machine.el2.gunyah.rm import payloads as p
from guest_memfd.machine.el2.gunyah.rm.client import RmClient
from guest_memfd.machine.el2.gunyah.rm.errors import RmError, RmRefused, of_hypervisor, remap
from guest_memfd.machine.el2.gunyah.rm.lifecycle import ALLOWED, Auth, VmState
from guest_memfd.machine.el2.gunyah.rm.message import (
    API,
    BODY,
    MAX_BODY,
    MAX_FRAGMENTS,
    MAX_REQUEST,
    Message,
    MessageType,
    Receiver,
    fragments,
)
from guest_memfd.machine.el2.gunyah.rm.payloads import Accept, Acl, Append, Id, MemRequest, Sgl
from guest_memfd.machine.el2.gunyah.vm import Exit
from guest_memfd.words.units import PAGE


@pytest.fixture
def m() -> Machine:
    return Machine()


# -- messages ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, BODY - 1, BODY, BODY + 1, 5 * BODY, MAX_REQUEST, MAX_BODY])
def test_what_is_cut_is_put_together(size: int) -> None:
    message = Message(MessageType.REPLY, 0x1234, Id.MEM_LEND, random.Random(size).randbytes(size))
    pieces = fragments(message)
    assert len(pieces) == max(1, -(-size // BODY))
    assert all(len(piece) <= 240 for piece in pieces)
    assert Receiver().drain(deque(pieces)) == [message]


def test_the_header_is_the_manuals() -> None:
    one, two = fragments(Message(MessageType.REQUEST, 7, 0x5600_0001, bytes(BODY + 1)))
    assert one[:8] == bytes([0x21, 1 | 1 << 2, 7, 0, 0x01, 0, 0, 0x56])
    assert two[:2] == bytes([0x21, 0 | 1 << 2])


def test_more_than_62_continuations_cannot_be_sent() -> None:
    assert MAX_BODY == 14616
    with pytest.raises(ValueError, match="does not fit"):
        fragments(Message(MessageType.REPLY, 0, 0, bytes(MAX_BODY + 1)))


def test_malformed_messages() -> None:
    good = fragments(Message(MessageType.REQUEST, 1, 2, b"body"))[0]
    long = fragments(Message(MessageType.REQUEST, 3, 4, bytes(2 * BODY)))
    receiver = Receiver()
    queue = deque([b"short", good])
    assert [found.body for found in receiver.drain(queue)] == [b"body"]         # skipped
    queue = deque([b"\x11" + good[1:], good])
    assert receiver.drain(queue) == []                                          # the round ends here
    assert len(queue) == 1
    assert len(receiver.drain(queue)) == 1
    assert receiver.drain(deque([long[1], good]))[0].body == b"body"            # a continuation of nothing
    assert [found.id for found in receiver.drain(deque([long[0], good, long[1]]))] == [2]   # cut off
    other = fragments(Message(MessageType.REQUEST, 9, 4, bytes(2 * BODY)))
    assert [found.seq for found in receiver.drain(deque([long[0], other[1], long[1]]))] == [3]
    too_many = bytes([API, MessageType.REQUEST | 63 << 2]) + good[2:]
    assert MAX_FRAGMENTS < 63
    assert receiver.drain(deque([too_many, good]))[0].seq == 1
    assert receiver.drain(deque([bytes(241)])) == []
    assert receiver.dropped == 8


def test_a_message_may_arrive_in_several_rounds() -> None:
    receiver, pieces = Receiver(), fragments(Message(MessageType.REQUEST, 1, 2, bytes(3 * BODY)))
    assert [len(receiver.drain(deque([piece]))) for piece in pieces] == [0, 0, 1]


# -- the client --------------------------------------------------------------------------------------------------------


def test_an_unknown_request_is_not_supported(m: Machine) -> None:
    assert m.linux.call(0x5600_0077, b"") == (-95, b"")


@pytest.mark.parametrize("body", [b"", b"\x80", bytes(5)])
def test_a_body_of_another_length_is_invalid(m: Machine, body: bytes) -> None:
    assert m.linux.call(Id.VM_START, body)[0] == -22


def test_a_request_that_is_too_long_is_not_sent(m: Machine) -> None:
    assert m.linux.call(Id.MEM_LEND, bytes(MAX_REQUEST + 1)) == (-7, b"")
    assert m.linux.call(Id.MEM_LEND, bytes(MAX_REQUEST))[0] == -22


def test_no_answer_is_an_error() -> None:
    m = Machine()
    deaf = RmClient(m.rm.channels[HLOS_VMID], lambda: None)
    assert deaf.alloc_vmid() == -5


@pytest.mark.parametrize(("error", "errno"), [
    (0, 0), (0xFFFF_FFFF, -95), (1, -12), (2, -19), (3, -1), (4, -22), (5, -16), (6, -22), (7, -22), (8, -22), (9, -22),
    (10, -22), (11, -22), (12, -22), (13, -22), (14, -22), (15, -22), (0x11, -22), (0x12, -74), (0x13, -74), (0x14, -74)])
def test_errors_as_linux_sees_them(error: int, errno: int) -> None:
    assert remap(error) == errno


@pytest.mark.parametrize(("error", "code"), [
    (GunyahError.NOMEM, RmError.NOMEM), (GunyahError.NORESOURCES, RmError.NORESOURCE), (GunyahError.DENIED, RmError.DENIED),
    (GunyahError.BUSY, RmError.BUSY), (GunyahError.ADDR_INVAL, RmError.MEM_INVALID),
    (GunyahError.ADDR_OVFL, RmError.MEM_INVALID), (GunyahError.ADDR_UNFL, RmError.MEM_INVALID),
    (GunyahError.ARG_INVAL, RmError.ARGUMENT_INVALID), (GunyahError.UNIMPLEMENTED, RmError.UNIMPLEMENTED),
    (GunyahError.MEMDB_NOT_OWNER, RmError.DENIED), (GunyahError.IDLE, RmError.DENIED)])
def test_errors_of_the_hypervisor(error: GunyahError, code: RmError) -> None:
    assert of_hypervisor(error) == code


# -- payloads ----------------------------------------------------------------------------------------------------------


def test_layouts() -> None:
    request = MemRequest(0, 3, 0x11223344, (Acl(0x80, 7),), (Sgl(0x1000, 0x2000),), (p.Attribute(5, 0x80),))
    data = p.encode_mem(request)
    assert data.hex() == ("00000300" "44332211" "01000000" "80000700" "01000000" "0010000000000000" "0020000000000000"
                          "01000000" "05008000")
    assert p.decode_mem(data) == request
    append = Append(9, 1, (Sgl(1, 2),))
    assert p.encode_append(append).hex() == "09000000" "01000000" "01000000" "0100000000000000" "0200000000000000"
    assert p.decode_append(p.encode_append(append)) == append
    accept = Accept(9, 0, 1, 128, 4, (Sgl(1, 2),))
    assert p.decode_accept(p.encode_accept(accept)) == accept
    assert p.encode_handle(9, 1).hex() == "0900000001000000"
    assert p.encode_notify(9, 1, 2, (0x80,)).hex() == "0900000001000000" "02000000" "01000000" "80000000"
    assert p.decode_notify(p.encode_notify(9, 1, 2, (0x80, 3))) == (9, 1, 2, (0x80, 3))
    paging = p.encode_demand_paging(0x80, (Sgl(1, 2),))
    assert paging.hex() == "80000000" "01000000" "0100000000000000" "0200000000000000"
    assert p.decode_demand_paging(paging) == (0x80, (Sgl(1, 2),))
    assert struct.calcsize(p.CONFIG_IMAGE) == 40
    assert struct.calcsize(p.STOP) == 8
    assert struct.calcsize(p.BOOT_CONTEXT) == 16
    assert struct.calcsize(p.ADDRESS_LAYOUT) == 24
    assert p.encode_resources((p.Resource(9, 0x80, 3, 1, 2),)).hex() == (
        "01000000" "09008000" "03000000" "01000000" "0200000000000000" + 2 * "00000000" + 2 * 16 * "0")


@pytest.mark.parametrize("cut", [1, 4, 9])
def test_a_body_that_ends_early_or_late_is_refused(cut: int) -> None:
    data = p.encode_mem(MemRequest(0, 0, 0, (Acl(0x80, 7),), (Sgl(0x1000, 0x2000),)))
    for wrong in (data[:-cut], data + bytes(cut)):
        with pytest.raises(RmRefused, match="MSG_INVALID"):
            p.decode_mem(wrong)


# -- the life of a VM --------------------------------------------------------------------------------------------------


def bring(m: Machine, state: VmState) -> int:
    """A VM in *state*, by calls where calls lead there."""
    if state in (VmState.LOAD, VmState.AUTH, VmState.INIT, VmState.READY, VmState.RUNNING, VmState.EXITED):
        return m.vm(state, auth=Auth.QCOM_PIL_ELF if state == VmState.AUTH else Auth.NONE)[0]
    if state == VmState.RESET:
        vmid = m.vm(VmState.EXITED)[0]
        assert m.linux.vm_call(Id.VM_RESET, vmid) == 0
        return vmid
    vmid = m.vm(VmState.READY)[0]
    m.rm._enter(m.rm.vms[vmid], state)
    return vmid


BODIES: dict[Id, Any] = {
    Id.VM_CONFIG_IMAGE: lambda v: struct.pack(p.CONFIG_IMAGE, v, 0, 0xFFFF_FFFF, 0, 0, 0, 0),
    Id.VM_SET_DEMAND_PAGING: lambda v: p.encode_demand_paging(v, ()),
    Id.VM_SET_ADDRESS_LAYOUT: lambda v: struct.pack(p.ADDRESS_LAYOUT, v, 0, BASE, GIB),
    Id.VM_SET_BOOT_CONTEXT: lambda v: struct.pack(p.BOOT_CONTEXT, v, 0, 0, 0, 0),
    Id.VM_STOP: lambda v: struct.pack(p.STOP, v, 1, 3),
}


@pytest.mark.parametrize("state", [state for state in VmState if state != VmState.NO_STATE])
@pytest.mark.parametrize("call", list(ALLOWED))
def test_every_call_in_every_state(m: Machine, call: Id, state: VmState) -> None:
    vmid = bring(m, state)
    body = BODIES.get(call, p.encode_vmid)(vmid)
    ret, _ = m.linux.call(call, body)
    if state not in ALLOWED[call]:
        assert ret == -74
        assert m.rm.vms[vmid].state == state
    else:
        # The image of this attempt does not exist; all other calls do what they say.
        assert ret == (-22 if call == Id.VM_CONFIG_IMAGE else 0)


def test_a_life(m: Machine) -> None:
    vmid, _ = m.vm(VmState.LOAD)
    seen = [VmState.LOAD]
    linux = m.linux
    linux.vm_configure(vmid, Auth.QCOM_ANDROID_PVM, 1, 0, PAGE)
    for call in (Id.VM_AUTH_IMAGE, Id.VM_INIT, Id.VM_START):
        seen.append(m.state(vmid))
        assert linux.vm_call(call, vmid) == 0
    seen.append(m.state(vmid))
    assert linux.vm_stop(vmid) == 0
    seen.append(m.state(vmid))
    assert linux.vm_call(Id.VM_RESET, vmid) == 0
    seen.append(m.state(vmid))
    assert seen == [VmState.LOAD, VmState.AUTH, VmState.INIT, VmState.READY, VmState.RUNNING, VmState.EXITED, VmState.RESET]
    assert linux.vm_call(Id.VM_DEALLOC_VMID, vmid) == 0
    assert linux.vm_call(Id.VM_START, vmid) == -22
    exited = [n for n in linux.notifications if n.id == Id.VM_EXITED]
    assert [struct.unpack_from(p.EXITED, n.body) for n in exited] == [(vmid, Exit.STOP_FORCED, 0)]


def test_a_reset_vm_is_configured_again(m: Machine) -> None:
    vmid, _ = m.vm(VmState.EXITED)
    assert m.linux.vm_call(Id.VM_RESET, vmid) == 0
    ret, handle = m.lend(vmid, Sgl(m.ram.base, 2 * MIB))
    assert ret == 0
    assert m.linux.vm_configure(vmid, 0, handle, 0, PAGE) == 0
    assert m.linux.vm_call(Id.VM_INIT, vmid) == 0
    assert m.linux.vm_call(Id.VM_START, vmid) == 0


def test_vmids(m: Machine) -> None:
    linux = m.linux
    assert linux.alloc_vmid(0x90) == 0x90
    assert linux.alloc_vmid(0x90) == -16
    assert linux.alloc_vmid(0x40) == -22
    assert [linux.alloc_vmid() for _ in range(FIRST_VMID, LAST_VMID)][-1] == LAST_VMID
    assert linux.alloc_vmid() == -19
    assert linux.vm_call(Id.VM_DEALLOC_VMID, 0x90) == 0
    assert linux.alloc_vmid() == 0x90


def test_a_vm_belongs_to_whoever_made_it(m: Machine) -> None:
    vmid, _ = m.vm(VmState.READY)
    stranger = m.guest(FIRST_VMID + 9)
    assert stranger.vm_call(Id.VM_START, vmid) == -1
    assert m.linux.vm_call(Id.VM_START, vmid) == 0


def test_the_guest_switches_itself_off(m: Machine) -> None:
    vmid, _ = m.vm()
    vm = m.rm.vms[vmid].vm
    assert vm is not None
    regs = [0x8400_0008] + [0] * 17
    vm.guest_call(regs)
    m.linux.receive()
    assert m.state(vmid) == VmState.EXITED
    exited = [n.body for n in m.linux.notifications if n.id == Id.VM_EXITED]
    assert struct.unpack_from(p.EXITED, exited[0])[1] == Exit.PLATFORM_OFF
    assert m.linux.vm_stop(vmid) == -74


def test_boot_context(m: Machine) -> None:
    vmid, _ = m.vm(VmState.READY)
    for which, index, errno in ((0, 30, 0), (0, 31, -22), (1, 0, 0), (1, 1, -22), (2, 2, 0), (2, 3, -22), (3, 0, -22)):
        assert m.linux.vm_set_boot_context(vmid, which, index, 0x1000 + index) == errno
    assert m.rm.vms[vmid].boot_context == {(0, 30): 0x101E, (1, 0): 0x1000, (2, 2): 0x1002}


def test_resources(m: Machine) -> None:
    vmid, _ = m.vm(VmState.READY)
    vm = m.rm.vms[vmid].vm
    assert vm is not None
    cpu: Any = object()
    vm.add_vcpu(cpu)
    ret, found = m.linux.get_hyp_resources(vmid)
    assert ret == 0
    caps = {(r.type, r.label): r.cap for r in found}
    assert caps == {(9, 0): vm.caps.guest_private, (9, 1): vm.caps.host_shared, (9, 2): vm.caps.host_private,
                    (9, 3): vm.caps.guest_shared, (10, 0): vm.caps.addrspace, (4, 0): vm.vcpu_caps[0]}
    assert vm.caps.host_private == vm.caps.host_shared


def test_configure_needs_a_parcel_for_that_vm(m: Machine) -> None:
    vmid, other = m.linux.alloc_vmid(), m.linux.alloc_vmid()
    ret, handle = m.lend(other, Sgl(m.ram.base, PAGE))
    assert ret == 0
    assert m.linux.vm_configure(vmid, 0, handle, 0, PAGE) == -1
    assert m.linux.vm_configure(vmid, 3, handle, 0, PAGE) == -22
    assert m.linux.vm_configure(vmid, 0, 99, 0, PAGE) == -22
    assert m.linux.vm_configure(other, 0, handle, 0, PAGE) == 0
    assert m.linux.vm_configure(other, 0, handle, 0, PAGE) == -74


# -- demand paging -----------------------------------------------------------------------------------------------------


def kinds(m: Machine, vmid: int) -> list[tuple[int, int, str]]:
    vm = m.rm.vms[vmid].vm
    assert vm is not None
    return sorted(vm.space.ranges)


def test_what_is_lent_is_private_and_the_rest_below_one_gibibyte_devices(m: Machine) -> None:
    vmid, _ = m.vm(VmState.INIT)
    assert m.linux.vm_set_demand_paging(vmid, (Sgl(BASE, GIB), Sgl(16 * MIB, 16 * MIB))) == 0
    assert kinds(m, vmid) == [(0, 16 * MIB, "vmmio"), (16 * MIB, 32 * MIB, "private"), (32 * MIB, GIB, "vmmio"),
                              (BASE, BASE + GIB, "private")]


def test_a_range_across_the_border(m: Machine) -> None:
    vmid, _ = m.vm(VmState.INIT)
    assert m.linux.vm_set_demand_paging(vmid, (Sgl(GIB - PAGE, GIB),)) == 0
    assert kinds(m, vmid) == [(0, GIB - PAGE, "vmmio"), (GIB - PAGE, 2 * GIB - PAGE, "private")]


@pytest.mark.parametrize(("paging", "errno"), [
    ((Sgl(BASE, GIB), Sgl(BASE, PAGE)), -16),
    ((Sgl(BASE, GIB), Sgl(BASE + GIB - PAGE, 2 * PAGE)), -22),
    ((Sgl(BASE + 1, GIB),), -1),
    (tuple(Sgl(BASE + 2 * n * PAGE, PAGE) for n in range(128)), -19),
])
def test_demand_paging_that_cannot_be_leaves_nothing(m: Machine, paging: tuple[Sgl, ...], errno: int) -> None:
    vmid, _ = m.vm(VmState.INIT)
    assert m.linux.vm_set_demand_paging(vmid, paging) == errno
    assert kinds(m, vmid) == []
    assert m.linux.vm_set_demand_paging(vmid, paging[:1] if errno != -1 else (Sgl(BASE, GIB),)) == 0


def test_address_layout(m: Machine) -> None:
    vmid, _ = m.vm(VmState.INIT)
    linux = m.linux
    assert linux.vm_set_address_layout(vmid, BASE + 1, 2 * MIB) == -22
    assert linux.vm_set_address_layout(vmid, BASE, MIB) == -22
    assert linux.call(Id.VM_SET_ADDRESS_LAYOUT, struct.pack(p.ADDRESS_LAYOUT, vmid, 1, BASE, GIB))[0] == -22
    assert linux.vm_set_address_layout(vmid, BASE + GIB, 2 * MIB) == 0
    assert linux.vm_call(Id.VM_INIT, vmid) == 0
    vm = m.rm.vms[vmid].vm
    assert vm is not None
    assert vm.ipa_of(m.ram.base) == BASE + GIB


def test_init_that_fails(m: Machine) -> None:
    vmid, handle = m.vm(VmState.INIT)
    m.pool.fail_at(0)
    assert m.linux.vm_call(Id.VM_INIT, vmid) == -12
    assert m.state(vmid) == VmState.INIT_FAILED
    assert m.linux.vm_call(Id.VM_INIT, vmid) == -74
    assert m.linux.mem_reclaim(handle) == -1
    assert m.linux.vm_call(Id.VM_RESET, vmid) == 0
    assert m.linux.mem_reclaim(handle) == 0
    assert m.el2.owner(m.ram.base) == "host"


def test_the_image_of_a_running_vm_is_its_ordinary_memory(m: Machine) -> None:
    m.ram.write64(m.ram.base, 0xD00DFEED)
    vmid, handle = m.vm()
    vm = m.rm.vms[vmid].vm
    assert vm is not None
    assert m.el2.owner(m.ram.base) == ("guest", vm)
    assert not m.el2.host_may(m.ram.base)
    assert vm.ipa_of(m.ram.base) == BASE
    assert vm.locked(BASE)
    assert m.ram.read64(m.ram.base) == 0xD00DFEED
    assert m.linux.mem_reclaim(handle) == -22
    assert m.linux.vm_stop(vmid) == 0
    assert m.linux.vm_call(Id.VM_RESET, vmid) == 0
    assert m.el2.owner(m.ram.base) == "host"
    assert m.ram.read64(m.ram.base) == 0
    assert m.el2.host_may(m.ram.base)


def test_a_shared_image_stays_the_hosts_to_read(m: Machine) -> None:
    vmid, _ = m.vm(share=True, base=16 * MIB)
    vm = m.rm.vms[vmid].vm
    assert vm is not None
    assert m.el2.owner(m.ram.base) == ("shared", vm)
    assert m.el2.host_may(m.ram.base)
    assert vm.ipa_of(m.ram.base) == 16 * MIB
    assert m.linux.vm_stop(vmid) == 0
    assert m.linux.vm_call(Id.VM_RESET, vmid) == 0
    assert m.el2.owner(m.ram.base) == "host"


def test_an_image_outside_of_demand_paging_stays_a_parcel(m: Machine) -> None:
    vmid, handle = m.vm(paging=())
    assert m.el2.owner(m.ram.base) is None
    assert m.linux.mem_reclaim(handle) == -1
    assert m.linux.vm_stop(vmid) == 0
    assert m.linux.vm_call(Id.VM_RESET, vmid) == 0
    assert m.linux.mem_reclaim(handle) == 0
    assert m.el2.owner(m.ram.base) == "host"
    assert m.el2.hlos.table.pages.violations == []


def test_a_reset_without_memory_can_be_repeated(m: Machine) -> None:
    vmid, _ = m.vm(VmState.EXITED)
    host = m.el2.hlos
    need = host.tables_for_mapping(m.el2.host_extent.mappings[0], 0, [(m.ram.base, m.ram.base + 2 * MIB)])
    if need:
        m.pool.fail_at(0)
        assert m.linux.vm_call(Id.VM_RESET, vmid) == -12
        assert m.state(vmid) == VmState.EXITED
    assert m.linux.vm_call(Id.VM_RESET, vmid) == 0

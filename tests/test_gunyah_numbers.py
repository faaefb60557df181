"""Numbers that Gunyah, its Resource Manager and Linux have agreed on, as their documents give them."""

from __future__ import annotations

from enum import IntEnum

import pytest

from guest_memfd.machine.el2.gunyah import hypercalls, memextent, private
from guest_memfd.machine.el2.gunyah.addrspace import AddrMapFlag
from guest_memfd.machine.el2.gunyah.capabilities import ExtentRight, SpaceRight, VcpuRight
from guest_memfd.machine.el2.gunyah.config import RangeOp
from guest_memfd.machine.el2.gunyah.donate import NOSYNC, Donation
from guest_memfd.machine.el2.gunyah.errors import GunyahError
from guest_memfd.machine.el2.gunyah.memextent import ExtentAccess
from guest_memfd.machine.el2.gunyah.rm import memparcel, message, payloads, server
from guest_memfd.machine.el2.gunyah.rm.errors import RmError
from guest_memfd.machine.el2.gunyah.rm.lifecycle import ALLOWED, Auth, VmState
from guest_memfd.machine.el2.gunyah.vcpu import Action, VcpuState
from guest_memfd.machine.el2.gunyah.vm import Exit

NUMBERS: list[tuple[type[IntEnum], str]] = [
    # docs/api/gunyah_api.md of the hypervisor
    (GunyahError, "UNIMPLEMENTED -1, RETRY -2, OK 0, ARG_INVAL 1, ARG_SIZE 2, ARG_ALIGN 3, NOMEM 10, NORESOURCES 11, "
                  "ADDR_OVFL 20, ADDR_UNFL 21, ADDR_INVAL 22, DENIED 30, BUSY 31, IDLE 32, CSPACE_CAP_NULL 50, "
                  "CSPACE_CAP_REVOKED 51, CSPACE_WRONG_OBJECT_TYPE 52, CSPACE_INSUFFICIENT_RIGHTS 53, CSPACE_FULL 54, "
                  "MEMDB_NOT_OWNER 111, MEMEXTENT_MAPPINGS_FULL 120, MEMEXTENT_TYPE 121, EXISTING_MAPPING 200"),
    (Donation, "TO_CHILD 0, TO_PARENT 1, TO_SIBLING 2, TO_PROTECTED 3, FROM_PROTECTED 4"),
    (VcpuState, "READY 0, EXPECTS_WAKEUP 1, POWERED_OFF 2, BLOCKED 3, VMMIO_READ 4, VMMIO_WRITE 5, FAULT 6, PAGE_FAULT 7, "
                "PSCI_SYSTEM_RESET 256"),
    (RangeOp, "ADD_VMMIO 0, REMOVE_VMMIO 1, ADD_PRIVATE 2, REMOVE_PRIVATE 3"),
    (Action, "EMULATE 0, RETRY 1, FAULT 2"),
    # include/rm-rpc.h and src/vm_mgnt.c of the Resource Manager, drivers/virt/gunyah/rsc_mgr.h of Linux
    (RmError, "OK 0, NOMEM 1, NORESOURCE 2, DENIED 3, MSG_INVALID 4, BUSY 5, ARGUMENT_INVALID 6, HANDLE_INVALID 7, "
              "VALIDATE_FAILED 8, MAP_FAILED 9, MEM_INVALID 10, MEM_INUSE 11, MEM_RELEASED 12, VMID_INVALID 13, "
              "LOOKUP_FAILED 14, IRQ_INUSE 18, IRQ_RELEASED 19, VM_STATE 20, UNIMPLEMENTED 4294967295"),
    (VmState, "NO_STATE 0, INIT 1, READY 2, RUNNING 3, PAUSED 4, LOAD 5, AUTH 6, INIT_FAILED 8, EXITED 9, RESETTING 10, "
              "RESET 11"),
    (Auth, "NONE 0, QCOM_PIL_ELF 1, QCOM_ANDROID_PVM 2"),
    (Exit, "VM_EXIT 0, PLATFORM_OFF 1, PLATFORM_RESET 2, PSCI_SYSTEM_RESET2 3, WATCHDOG 4, SW_ERR 5, HW_ERR 6, "
           "STOP_FORCED 7"),
    (message.MessageType, "CONTINUATION 0, REQUEST 1, REPLY 2, NOTIFICATION 3"),
    (memparcel.Transaction, "DONATE 0, LEND 1, SHARE 2"),
]
FLAGS: list[tuple[type, str]] = [
    (ExtentRight, "MAP 1, DERIVE 2, ATTACH 4, LOOKUP 8, DONATE 16, PROTECTED_HOST 32, PROTECTED_GUEST 64, MAP_PRIVATE 128"),
    (SpaceRight, "ATTACH 1, MAP 2, LOOKUP 4, CONFIGURE_RANGE 8, MAP_PROTECTED 16, MODIFY_PROTECTED 32, ADD_INFO 64"),
    (VcpuRight, "RUN 1"),
    (AddrMapFlag, "PARTIAL 1, PRIVATE 2, VMMIO 4, WHOLE 8, NOSYNC 2147483648"),
    (ExtentAccess, "NONE 0, X 1, W 2, R 4, RX 5, RW 6, RWX 7"),
    (payloads.RmMemFlag, "SANITIZE 1, APPEND 2"),
    (memparcel.NotifyFlag, "SHARED 1, RELEASED 2, ACCEPTED 4, RECALL 8"),
]
MESSAGES = {
    0x5100: "MEM_DONATE 10, MEM_ACCEPT 11, MEM_LEND 12, MEM_SHARE 13, MEM_RELEASE 14, MEM_RECLAIM 15, MEM_NOTIFY 17, "
            "MEM_APPEND 18",
    0x5110: "MEM_SHARED 11, MEM_RELEASED 12, MEM_ACCEPTED 13, MEM_RECALL 14",
    0x5600: "VM_ALLOC_VMID 1, VM_DEALLOC_VMID 2, VM_START 4, VM_STOP 5, VM_RESET 6, VM_CONFIG_IMAGE 9, VM_AUTH_IMAGE A, "
            "VM_INIT B, VM_GET_HYP_RESOURCES 20, VM_SET_BOOT_CONTEXT 31, VM_SET_DEMAND_PAGING 33, "
            "VM_SET_ADDRESS_LAYOUT 34",
    0x5610: "VM_EXITED 1, VM_STATUS 8",
}
STATES = {
    "VM_CONFIG_IMAGE": "LOAD RESET", "VM_AUTH_IMAGE": "AUTH", "VM_SET_DEMAND_PAGING": "INIT",
    "VM_SET_ADDRESS_LAYOUT": "INIT", "VM_INIT": "INIT", "VM_SET_BOOT_CONTEXT": "READY",
    "VM_GET_HYP_RESOURCES": "READY RUNNING PAUSED", "VM_START": "READY", "VM_STOP": "RUNNING PAUSED",
    "VM_RESET": "EXITED READY INIT_FAILED", "VM_DEALLOC_VMID": "LOAD RESET",
}


def _numbers(text: str, base: int = 10) -> dict[str, int]:
    return {name: int(number, base) for name, number in (pair.split() for pair in text.split(", "))}


@pytest.mark.parametrize(("numbers", "text"), [*NUMBERS, *FLAGS], ids=[kind.__name__ for kind, _ in [*NUMBERS, *FLAGS]])
def test_numbers_are_those_of_the_documents(numbers: type[IntEnum], text: str) -> None:
    assert {name: int(value) for name, value in numbers.__members__.items()} == _numbers(text)


def test_ids_of_messages() -> None:
    expected = {name: group << 16 | low for group, text in MESSAGES.items() for name, low in _numbers(text, 16).items()}
    assert {name: int(value) for name, value in payloads.Id.__members__.items()} == expected


def test_calls_and_the_states_in_which_they_are_allowed() -> None:
    assert {call.name: {state.name for state in states} for call, states in ALLOWED.items()} == {
        call: set(states.split()) for call, states in STATES.items()}


def test_numbers_of_hypercalls() -> None:
    # Vendor-specific hypervisor service: fast, 64 bits, owner 6 (SMCCC); the function in bits 15:0.
    functions = {"ADDRSPACE_MAP": 0x802B, "ADDRSPACE_UNMAP": 0x802C, "ADDRSPACE_LOOKUP": 0x805A,
                 "ADDRSPACE_CONFIGURE_RANGE": 0x8060, "MEMEXTENT_DONATE": 0x8061, "VCPU_RUN": 0x8065,
                 "ADDRSPACE_MODIFY_PAGES": 0x8069}
    assert {name: getattr(hypercalls, name) for name in functions} == {
        name: 1 << 31 | 1 << 30 | 6 << 24 | function for name, function in functions.items()}


def test_numbers_without_a_name_of_their_own() -> None:
    assert (NOSYNC, memextent.MAX_MAPPINGS) == (1 << 31, 4)
    assert (payloads.MAX_SGL, payloads.INVALID_HANDLE) == (512, 0xFFFFFFFF)
    assert (payloads.APPEND_END, payloads.ACCEPT_DONE) == (1, 128)
    assert (message.MAX_MESSAGE, message.MAX_FRAGMENTS, message.BODY) == (240, 62, 232)
    assert (message.MAX_BODY, message.MAX_REQUEST) == (63 * 232, 62 * 232)
    assert (server.DEVICES_END, server.DEFAULT_BASE, memparcel.MAX_PARCELS) == (1 << 30, 1 << 31, 64)
    assert (private.PRIVATE, private.LOCKED, private.NO_SANITISE, private.WRITABLE) == (1 << 55, 1 << 56, 1 << 57, 1 << 58)

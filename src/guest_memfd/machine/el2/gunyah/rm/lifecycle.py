"""Which call is allowed in which state of a VM. The table alone decides.

States as Linux numbers them (drivers/virt/gunyah/rsc_mgr.h, series v17); transitions of src/vm_mgnt.c and
src/vm_creation of the Resource Manager. VM_SET_DEMAND_PAGING and VM_SET_ADDRESS_LAYOUT are in no public release: taken
to be allowed where Linux calls them, between VM_CONFIG_IMAGE and VM_INIT.
"""

from __future__ import annotations

from enum import IntEnum

from guest_memfd.machine.el2.gunyah.rm.errors import RmError, RmRefused
from guest_memfd.machine.el2.gunyah.rm.payloads import Id


class VmState(IntEnum):
    """Life of a VM."""

    NO_STATE = 0
    INIT = 1
    READY = 2
    RUNNING = 3
    PAUSED = 4
    LOAD = 5
    AUTH = 6
    INIT_FAILED = 8
    EXITED = 9
    RESETTING = 10
    RESET = 11


class Auth(IntEnum):
    """How the image is authenticated; Linux v17 knows NONE only."""

    NONE = 0
    QCOM_PIL_ELF = 1
    QCOM_ANDROID_PVM = 2


ALLOWED: dict[Id, frozenset[VmState]] = {
    Id.VM_CONFIG_IMAGE: frozenset({VmState.LOAD, VmState.RESET}),
    Id.VM_AUTH_IMAGE: frozenset({VmState.AUTH}),
    Id.VM_SET_DEMAND_PAGING: frozenset({VmState.INIT}),
    Id.VM_SET_ADDRESS_LAYOUT: frozenset({VmState.INIT}),
    Id.VM_INIT: frozenset({VmState.INIT}),
    Id.VM_SET_BOOT_CONTEXT: frozenset({VmState.READY}),
    Id.VM_GET_HYP_RESOURCES: frozenset({VmState.READY, VmState.RUNNING, VmState.PAUSED}),
    Id.VM_START: frozenset({VmState.READY}),
    Id.VM_STOP: frozenset({VmState.RUNNING, VmState.PAUSED}),
    Id.VM_RESET: frozenset({VmState.EXITED, VmState.READY, VmState.INIT_FAILED}),
    Id.VM_DEALLOC_VMID: frozenset({VmState.LOAD, VmState.RESET}),
}
"""Anything else is RM_ERROR_VM_STATE."""

def check(call: Id, state: VmState) -> None:
    """Raises RmRefused(VM_STATE) when *call* is not allowed in *state*."""
    if state not in ALLOWED[call]:
        raise RmRefused(RmError.VM_STATE, f"{call.name} in state {state.name}")

"""The end of a VM: its last descriptor has gone. Memory comes back before the VM is reset.

In the driver's order: stop; a parcel that never became ordinary memory; functions; bindings; what is left in the tree;
reset; VMID. Where the posted driver loses what the Resource Manager refuses, a library-served VM resets first and asks
again. Source: _gunyah_vm_put() (drivers/virt/gunyah/vm_mgr.c, series v17, patches 10, 12, 20 and 25).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from guest_memfd.machine.dev.gunyah.posted import PostedFile
from guest_memfd.machine.el2.gunyah.rm.lifecycle import VmState
from guest_memfd.machine.el2.gunyah.rm.payloads import Id
from guest_memfd.words.pagestate import DYING, GONE
from guest_memfd.words.units import PAGE

if TYPE_CHECKING:
    from guest_memfd.machine.dev.gunyah.vm import VmFile

_RESETTABLE = (VmState.EXITED, VmState.READY, VmState.INIT_FAILED)
_ATTEMPTS = 3


def teardown(vm: VmFile) -> None:
    """Take everything back; what cannot be is warned about, and lost."""
    if vm.machine.dead is not None:
        return                                          # no one is left to do it
    started = vm.status in (VmState.RUNNING, VmState.EXITED)
    if vm.status == VmState.RUNNING and vm.rm.vm_stop(vm.vmid):
        warn(vm, "the VM cannot be stopped")
    # Before memory is asked for: a living VM's locked pages are refused, a stopped one's are not.
    vm.linux.state = DYING
    if not started and vm.parcel is not None:
        _parcel_back(vm)
    for function in vm.functions.values():
        function.removed = True
    lost = _bindings(vm)
    # While the hypervisor still has pages of the VM, a reset would lose them; the posted driver resets all the same.
    if not lost or vm.posted:
        _reset(vm)
    vm.machine.module.put()


def warn(vm: VmFile, what: str) -> None:
    """WARN(): say *what* on the console and go on; a VM's end cannot be refused."""
    vm.machine.log(f"WARNING: {what}")


def _parcel_back(vm: VmFile) -> None:
    assert vm.parcel is not None
    binding, parcel, handle = vm.parcel
    ret = vm.rm.mem_reclaim(handle)
    if ret and not vm.posted:
        # It is the image of a VM that will never be: only a reset makes the Resource Manager let go of it.
        _reset(vm)
        ret = vm.rm.mem_reclaim(handle)
    if ret:
        warn(vm, f"memory parcel {handle:#x} is not given back")
    binding.file.parcel_is_back(parcel, binding.lend, ret)


def _bindings(vm: VmFile) -> bool:
    lost, posted = False, None
    for binding in vm.bindings:
        if binding.file.abandon(binding):
            lost = True
            warn(vm, f"memory at {binding.gfn * PAGE:#x} is not given back")
        elif not vm.posted:
            binding.file.bindings.remove(binding)
        if isinstance(binding.file, PostedFile):
            posted = binding.file
            binding.file.bindings.remove(binding)
    if posted is not None:
        posted.run(posted.library.reclaim_rest())
    vm.bindings.clear()
    return lost


# VM_RESET where it is allowed, then the VMID. A VM that was configured and not initialised is initialised for that.
def _reset(vm: VmFile) -> None:
    if vm.vmid == 0 or vm.linux.state == GONE:
        return
    vm.rm.receive()
    state = vm.rm.status.get(vm.vmid, VmState.LOAD)
    # VM_RESET is refused in this state. To initialise it is the only way on to a state in which it is allowed.
    if state == VmState.INIT and not vm.posted:
        vm.rm.vm_call(Id.VM_INIT, vm.vmid)
        state = vm.rm.status[vm.vmid]
    if state in _RESETTABLE:
        ret = 0
        for _attempt in range(_ATTEMPTS):
            ret = vm.rm.vm_call(Id.VM_RESET, vm.vmid)
            if not ret:
                break
        if ret:
            warn(vm, f"VM {vm.vmid:#x} cannot be reset")
            return
    ret = vm.rm.vm_call(Id.VM_DEALLOC_VMID, vm.vmid)
    if ret:
        warn(vm, f"VMID {vm.vmid:#x} cannot be given back")
        return
    vm.machine.forget_vm(vm.linux)
    vm.linux.handle = None
    vm.rm.forget(vm.vmid)

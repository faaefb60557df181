"""START, through the Resource Manager. Here are the steps in their order, and where a failure leaves the VM.

A failed START is final: the status stays what it was when a step failed, every later START is -ENODEV, and memory comes
back with the last descriptor. Source: gunyah_vm_start() (drivers/virt/gunyah/vm_mgr.c, series v17, patches 10, 12, 25 to
28, 30).

vCPUs are made by the Resource Manager: one for every vCPU function there is at START and one at least; vCPU 0 runs first,
the others are powered off. A vCPU function added later finds its vCPU if the VM has that many.
"""

from __future__ import annotations

from errno import EINVAL, ENODEV, ENOENT
from typing import TYPE_CHECKING

from guest_memfd.errors import SyscallFailed
from guest_memfd.machine.dev.gunyah.memory import Parcelled
from guest_memfd.machine.dev.gunyah.vcpu import VcpuFile
from guest_memfd.machine.el2.gunyah.el2 import HLOS_VMID
from guest_memfd.machine.el2.gunyah.errors import HypRefused, remap
from guest_memfd.machine.el2.gunyah.rm.lifecycle import Auth, VmState
from guest_memfd.machine.el2.gunyah.rm.payloads import Acl, Id, Sgl
from guest_memfd.machine.el2.gunyah.vcpu import GunyahRun, VcpuState
from guest_memfd.machine.hw.arm64.guestcore import GuestCore
from guest_memfd.uapi.gunyah import FnType, MapFlag, RegisterSet
from guest_memfd.words.units import PAGE, gfn_to_gpa, gpa_to_gfn, identity_ipa, pfn_to_pa

if TYPE_CHECKING:
    from guest_memfd.machine.dev.gunyah.binding import Binding
    from guest_memfd.machine.dev.gunyah.vm import VmFile

_RWX = 7
_MOST_VCPUS = 8


def start(vm: VmFile) -> None:
    """Raises SyscallFailed as uapi/gunyah.py GunyahVm.start says."""
    if vm.status == VmState.RUNNING:
        return
    if vm.status != VmState.NO_STATE:
        raise SyscallFailed(ENODEV, "START", f"the VM is in state {vm.status.name}")
    vmid = vm.rm.alloc_vmid(0)
    _check(vmid, "VM_ALLOC_VMID")
    # From here on a failure is final: what the Resource Manager has begun to build is taken apart by the VM's end
    # only.
    vm.vmid, vm.status = vmid, VmState.LOAD
    binding, parcel = _parcel(vm)
    _configure(vm, binding, parcel)
    ret = vm.rm.vm_call(Id.VM_INIT, vmid)
    if ret:
        vm.status = VmState.INIT_FAILED
    _check(ret, "VM_INIT")
    vm.status = VmState.READY
    for (which, index), value in vm.boot.items():
        _check(vm.rm.vm_set_boot_context(vmid, which, index, value), "VM_SET_BOOT_CONTEXT")
    _make_vcpus(vm)
    ret, _ = vm.rm.get_hyp_resources(vmid)
    _check(ret, "VM_GET_HYP_RESOURCES")
    for function in vm.functions.values():
        # vCPU functions that were added before START have waited for their capability.
        if isinstance(function, VcpuFile):
            populate(vm, function)
    _check(binding.file.parcel_is_paged(binding, parcel), "parcel to paged")
    ret = vm.rm.vm_call(Id.VM_START, vmid)
    if ret:
        binding.file.parcel_is_not_paged(parcel)
    _check(ret, "VM_START")
    binding.file.parcel_has_started(parcel)
    vm.status = VmState.RUNNING


def _check(ret: int, step: str) -> None:
    if ret < 0:
        raise SyscallFailed(-ret, "START", step)


# The device tree's folios become a parcel: lent to the VM, or shared with it.
def _parcel(vm: VmFile) -> tuple[Binding, Parcelled]:
    gfn, nr = gpa_to_gfn(vm.dtb.guest_phys_addr), vm.dtb.size // PAGE
    if not nr:
        raise SyscallFailed(EINVAL, "START", "no device tree is configured")
    binding = vm.binding_at(gfn, nr)
    if binding is None:
        raise SyscallFailed(ENOENT, "START", "the device tree is not in one binding")
    parcel = binding.file.make_parcel(binding, gfn, nr)
    if isinstance(parcel, int):
        raise SyscallFailed(-parcel, "START", "the device tree cannot be made a memory parcel")
    guest = Acl(vm.vmid, rights(binding.flags))
    acl = (guest,) if binding.lend else (guest, Acl(HLOS_VMID, _RWX))
    pieces = tuple(Sgl(identity_ipa(pfn_to_pa(folio.pfn)), folio.nr * PAGE) for folio in parcel.folios)
    ret, handle = vm.rm.mem_share(acl, pieces)
    if ret:
        # The Resource Manager has never had it.
        binding.file.parcel_is_back(parcel, binding.lend, 0)
    _check(ret, "MEM_LEND" if binding.lend else "MEM_SHARE")
    vm.parcel = binding, parcel, handle
    return binding, parcel


def rights(flags: MapFlag) -> int:
    """Access rights of the Resource Manager (X 1, W 2, R 4) for MAP_MEM's flags."""
    return (4 if flags & MapFlag.ALLOW_READ else 0) | (2 if flags & MapFlag.ALLOW_WRITE else 0) | (
        1 if flags & MapFlag.ALLOW_EXEC else 0)


def _configure(vm: VmFile, binding: Binding, parcel: Parcelled) -> None:
    rm, base = vm.rm, gfn_to_gpa(parcel.gfn)
    assert vm.parcel is not None
    offset = vm.dtb.guest_phys_addr - base
    _check(rm.vm_configure(vm.vmid, Auth.NONE, vm.parcel[2], offset, vm.dtb.size), "VM_CONFIG_IMAGE")
    vm.linux.handle, vm.linux.vmid = vm.driver.rm.vms[vm.vmid].vm, vm.vmid
    vm.machine.add_vm(vm.linux)
    lent = tuple(Sgl(gfn_to_gpa(b.gfn), b.nr * PAGE) for b in vm.bindings if b.lend)
    _check(rm.vm_set_demand_paging(vm.vmid, lent), "VM_SET_DEMAND_PAGING")
    _check(rm.vm_set_address_layout(vm.vmid, base, parcel.nr * PAGE), "VM_SET_ADDRESS_LAYOUT")
    if not vm.posted:
        for other in vm.bindings:
            if not other.lend:
                _check(other.file.announce(other), "announcing what is shared")


# -- vCPUs -----------------------------------------------------------------------------------------------------------

def _make_vcpus(vm: VmFile) -> None:
    ids = [index for kind, index in vm.functions if kind == FnType.VCPU]
    handle, machine = vm.linux.handle, vm.machine
    for index in range(min(max(ids, default=0) + 1, _MOST_VCPUS)):
        core = GuestCore(machine.ram, machine.tlbs, index % len(machine.tlbs), lambda: handle.space.table.registers)
        try:
            handle.add_vcpu(core, machine.config.slice)
        except HypRefused as refused:
            _check(remap(refused.error), "the Resource Manager makes a vCPU")
        if index:
            handle.vcpus[index].last = GunyahRun(VcpuState.POWERED_OFF)
        else:
            _boot(vm, core)


def _boot(vm: VmFile, core: GuestCore) -> None:
    record = vm.driver.rm.vms[vm.vmid]
    core.pc = record.base
    for (which, index), value in record.boot_context.items():
        if which == RegisterSet.X:
            core.set_x(index, value)
        elif which == RegisterSet.PC:
            core.pc = value
        elif index == 1:
            core.sp = value
        else:
            core.set_sysreg(f"SP_EL{index}", value)


def populate(vm: VmFile, vcpu: VcpuFile) -> None:
    """The vCPU's resource ticket: its capability, once the Resource Manager has told of it."""
    handle = vm.linux.handle
    if handle is not None and vm.status in (VmState.READY, VmState.RUNNING) and vcpu.index < len(handle.vcpu_caps):
        vcpu.give(handle.vcpu_caps[vcpu.index], handle.vcpus[vcpu.index].cpu)

"""/dev/kvm: what it can do, and new VMs. The VM types are those of KVM with and without protected mode."""

from __future__ import annotations

from errno import EINVAL, ENOMEM
from typing import TYPE_CHECKING

from guest_memfd.compat import override
from guest_memfd.designs import Design
from guest_memfd.errors import BadInput, SyscallFailed
from guest_memfd.machine.dev.file import Serialised
from guest_memfd.machine.dev.kvm.release import rules
from guest_memfd.machine.dev.kvm.vm import NR_VCPUS, KvmVmFile
from guest_memfd.machine.el2.kvm.guest import IPA_BITS
from guest_memfd.machine.hw.buddy import OutOfMemory
from guest_memfd.uapi.kvm import API_VERSION, CAP_GUEST_MEMFD_MEMORY_ATTRIBUTES, PRIVATE, SHARED, Cap
from guest_memfd.uapi.kvm_arm64 import VM_TYPE_IPA_SIZE, VM_TYPE_PROTECTED

if TYPE_CHECKING:
    from guest_memfd.machine.board.board import Board

# Attributes of a VM are no more once they belong to the file; pre-faulting is x86's.
_CAPS: dict[int, int] = {
    Cap.NR_VCPUS: NR_VCPUS, Cap.MAX_VCPUS: NR_VCPUS, Cap.SYNC_MMU: 1,
    Cap.ARM_VM_IPA_SIZE: IPA_BITS, Cap.USER_MEMORY2: 1, Cap.GUEST_MEMFD: 1,
    Cap.GUEST_MEMFD_FLAGS: int(SHARED),
}


class KvmDevice(Serialised):
    """/dev/kvm (uapi/kvm.py KvmSystem); *design* serves the files of its VMs. Raises BadInput where there is no KVM.

    Raises UnknownName for a release whose answers are not known.
    """

    def __init__(self, machine: Board, design: type[Design]) -> None:
        if machine.hypervisor.name == "gunyah":
            raise BadInput(f"a machine under {machine.hypervisor.name} has no /dev/kvm")
        self.machine, self.design = machine, design
        self.rules = rules(machine.config.kvm_release, machine.config.kvm_architecture)
        self._lock = machine.lock

    def get_api_version(self) -> int:
        """KVM_GET_API_VERSION: 12, as every KVM since Linux 2.6.22."""
        self._in_use("KVM_GET_API_VERSION")
        return API_VERSION

    def check_extension(self, cap: int) -> int:
        """KVM_CHECK_EXTENSION; 0 for what there is not."""
        self._in_use("KVM_CHECK_EXTENSION")
        rules = self.rules
        own = {CAP_GUEST_MEMFD_MEMORY_ATTRIBUTES: PRIVATE if rules.converts else 0, Cap.NR_MEMSLOTS: rules.nr_slots,
               Cap.MEMORY_FAULT_INFO: rules.fault_info}
        return own.get(cap, _CAPS.get(cap, 0))

    def create_vm(self, vm_type: int = 0) -> KvmVmFile:
        """KVM_CREATE_VM: EINVAL for a type that there is not or more IPA bits than there are, ENOMEM."""
        call = "KVM_CREATE_VM"
        self._in_use(call)
        protected = bool(vm_type & VM_TYPE_PROTECTED)
        if vm_type & ~(VM_TYPE_IPA_SIZE | VM_TYPE_PROTECTED):
            raise SyscallFailed(EINVAL, call, f"type {vm_type:#x}")
        if protected and self.machine.hypervisor.name != "pkvm":
            raise SyscallFailed(EINVAL, call, "KVM does not run in protected mode")
        if vm_type & VM_TYPE_IPA_SIZE not in (0, IPA_BITS):
            raise SyscallFailed(EINVAL, call, f"IPA of {vm_type & VM_TYPE_IPA_SIZE} bits; here it is {IPA_BITS}")
        try:
            return KvmVmFile(self, protected)
        except OutOfMemory as error:
            raise SyscallFailed(ENOMEM, call, str(error)) from error

    @override
    def _release(self) -> None:
        pass

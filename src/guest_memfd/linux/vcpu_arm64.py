"""A vCPU of arm64: made ready for the processor it runs on; its registers go by number (`uapi.kvm_arm64`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from guest_memfd.compat import override
from guest_memfd.linux import syscall
from guest_memfd.linux.vcpu import LinuxVcpu
from guest_memfd.uapi import kvm_arm64 as arm64

if TYPE_CHECKING:
    from guest_memfd.linux.vm import LinuxVm


class Arm64Vcpu(LinuxVcpu):
    """`LinuxVcpu` after KVM_ARM_VCPU_INIT for the preferred target, with PSCI 0.2. Raises SyscallFailed.

    Without KVM_ARM_VCPU_PSCI_0_2 a guest's SYSTEM_OFF returns -1 to it.
    """

    def __init__(self, vm: LinuxVm, fd: int, vcpu_id: int) -> None:
        super().__init__(vm, fd, vcpu_id)
        target = arm64.VcpuInit()
        syscall.ioctl(vm.fileno(), arm64.PREFERRED_TARGET, target, call="KVM_ARM_PREFERRED_TARGET")
        target.features[0] |= arm64.VCPU_PSCI_0_2
        syscall.ioctl(fd, arm64.VCPU_INIT, target, call="KVM_ARM_VCPU_INIT")

    @override
    def inject_external_abort(self) -> None:
        """KVM_SET_VCPU_EVENTS with ext_dabt_pending: the MMIO access under way ends in an external abort."""
        syscall.ioctl(self.fileno(), arm64.SET_VCPU_EVENTS, arm64.VcpuEvents(ext_dabt_pending=1), call="KVM_SET_VCPU_EVENTS")

    @override
    def _hypercall_result(self, value: int) -> None:
        self.set_one_reg(arm64.X[0], value)

"""What of /dev/kvm is arm64's: VM types, structures and registers of a vCPU (arch/arm64/include/uapi/asm/kvm.h)."""

from __future__ import annotations

from ctypes import c_uint8, c_uint32, c_uint64, sizeof

from guest_memfd.uapi.ioctl import ior, iow
from guest_memfd.uapi.kvm import KVMIO
from guest_memfd.uapi.words import Words

VM_TYPE_IPA_SIZE = 0xFF
"""Mask of the IPA bits asked for in a VM type; 0 is 40."""
VM_TYPE_PROTECTED = 1 << 31
"""KVM_VM_TYPE_ARM_PROTECTED: a protected guest, where KVM runs in protected mode."""
HYP_MEMINFO, MEM_SHARE, MEM_UNSHARE = 0xC600_0002, 0xC600_0003, 0xC600_0004
"""ARM_SMCCC_VENDOR_HYP_KVM_HYP_MEMINFO_FUNC_ID and the two after it: hypercalls of a protected guest (linux/arm-smccc.h)."""


class VcpuInit(Words):
    """struct kvm_vcpu_init of KVM_ARM_VCPU_INIT: a target CPU and a bit map of 224 features."""

    _fields_ = [("target", c_uint32), ("features", c_uint32 * 7)]


VCPU_PSCI_0_2 = 1 << 2
"""KVM_ARM_VCPU_PSCI_0_2, in `features`: the guest's PSCI calls are 0.2's and later, SYSTEM_OFF among them."""


class VcpuEvents(Words):
    """struct kvm_vcpu_events; the first four fields are its `exception`."""

    _fields_ = [("serror_pending", c_uint8), ("serror_has_esr", c_uint8), ("ext_dabt_pending", c_uint8),
                ("pad", c_uint8 * 5), ("serror_esr", c_uint64), ("reserved", c_uint32 * 12)]


PREFERRED_TARGET = ior(KVMIO, 0xAF, sizeof(VcpuInit))
VCPU_INIT = iow(KVMIO, 0xAE, sizeof(VcpuInit))
GET_VCPU_EVENTS, SET_VCPU_EVENTS = ior(KVMIO, 0x9F, sizeof(VcpuEvents)), iow(KVMIO, 0xA0, sizeof(VcpuEvents))

_CORE, _SYSTEM = 0x6030_0000_0010_0000, 0x6030_0000_0013_0000


def core_reg(n: int) -> int:
    """KVM_REG_ARM_CORE of doubleword *n* of struct kvm_regs: x0..x30, SP_EL0, pc, pstate, SP_EL1, ELR_EL1."""
    # KVM counts in words of 32 bits: KVM_REG_ARM_CORE_REG() divides the offset by four.
    return _CORE | 2 * n


def sys_reg(op0: int, op1: int, crn: int, crm: int, op2: int) -> int:
    """ARM64_SYS_REG(): the id of a system register by its encoding."""
    return _SYSTEM | op0 << 14 | op1 << 11 | crn << 7 | crm << 3 | op2


X = tuple(core_reg(n) for n in range(31))
SP_EL0, PC, PSTATE, SP_EL1, ELR_EL1 = (core_reg(n) for n in range(31, 36))
ESR_EL1, FAR_EL1, VBAR_EL1 = sys_reg(3, 0, 5, 2, 0), sys_reg(3, 0, 6, 0, 0), sys_reg(3, 0, 12, 0, 0)
SCTLR_EL1 = sys_reg(3, 0, 1, 0, 0)

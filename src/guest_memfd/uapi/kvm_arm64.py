"""What of /dev/kvm is arm64's: VM types, register ids (arch/arm64/include/uapi/asm/kvm.h), and their ioctls."""

from __future__ import annotations

from guest_memfd.uapi.ioctl import ior, iow
from guest_memfd.uapi.kvm import KVMIO

VM_TYPE_IPA_SIZE = 0xFF
"""Mask of the IPA bits asked for in a VM type; 0 is 40."""
VM_TYPE_PROTECTED = 1 << 31
"""KVM_VM_TYPE_ARM_PROTECTED: a protected guest, where KVM runs in protected mode."""

PREFERRED_TARGET = ior(KVMIO, 0xAF, 32)
VCPU_INIT = iow(KVMIO, 0xAE, 32)
GET_VCPU_EVENTS, SET_VCPU_EVENTS = ior(KVMIO, 0x9F, 64), iow(KVMIO, 0xA0, 64)

_CORE, _SYSTEM = 0x6030_0000_0010_0000, 0x6030_0000_0013_0000


def core_reg(n: int) -> int:
    """KVM_REG_ARM_CORE of doubleword *n* of struct kvm_regs: x0..x30, SP_EL0, pc, pstate, SP_EL1, ELR_EL1."""
    return _CORE | 2 * n


def sys_reg(op0: int, op1: int, crn: int, crm: int, op2: int) -> int:
    """ARM64_SYS_REG(): the id of a system register by its encoding."""
    return _SYSTEM | op0 << 14 | op1 << 11 | crn << 7 | crm << 3 | op2


X = tuple(core_reg(n) for n in range(31))
SP_EL0, PC, PSTATE, SP_EL1, ELR_EL1 = (core_reg(n) for n in range(31, 36))
ESR_EL1, FAR_EL1, VBAR_EL1 = sys_reg(3, 0, 5, 2, 0), sys_reg(3, 0, 6, 0, 0), sys_reg(3, 0, 12, 0, 0)

"""What of /dev/kvm is arm64's, as bytes (arch/arm64/include/uapi/asm/kvm.h)."""

from __future__ import annotations

from ctypes import c_uint8, c_uint32, c_uint64

from guest_memfd.linux.abi.table import Command
from guest_memfd.linux.abi.words import Words
from guest_memfd.uapi import kvm_arm64 as uapi


class VcpuInit(Words):
    """struct kvm_vcpu_init of KVM_ARM_VCPU_INIT: a target CPU and a bit map of 224 features."""

    _fields_ = [("target", c_uint32), ("features", c_uint32 * 7)]


class VcpuEvents(Words):
    """struct kvm_vcpu_events; the first four fields are its `exception`."""

    _fields_ = [("serror_pending", c_uint8), ("serror_has_esr", c_uint8), ("ext_dabt_pending", c_uint8),
                ("pad", c_uint8 * 5), ("serror_esr", c_uint64), ("reserved", c_uint32 * 12)]


COMMANDS = (
    Command("KVM_ARM_PREFERRED_TARGET", "VM", uapi.PREFERRED_TARGET, VcpuInit),
    Command("KVM_ARM_VCPU_INIT", "vCPU", uapi.VCPU_INIT, VcpuInit),
    Command("KVM_GET_VCPU_EVENTS", "vCPU", uapi.GET_VCPU_EVENTS, VcpuEvents),
    Command("KVM_SET_VCPU_EVENTS", "vCPU", uapi.SET_VCPU_EVENTS, VcpuEvents),
)

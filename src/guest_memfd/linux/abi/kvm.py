"""What of /dev/kvm only a real kernel has: a vCPU's signal mask, and its statistics (include/uapi/linux/kvm.h)."""

from __future__ import annotations

from ctypes import c_int16, c_uint16, c_uint32, c_uint64
from enum import IntEnum

from guest_memfd.uapi.ioctl import io, iow
from guest_memfd.uapi.kvm import KVMIO
from guest_memfd.uapi.words import Words


class SignalMask(Words):
    """struct kvm_signal_mask with the kernel's sigset_t of 8 bytes; without padding, as in C."""

    _pack_ = 4
    _fields_ = [("len", c_uint32), ("sigset", c_uint64)]


class StatsHeader(Words):
    """struct kvm_stats_header: offsets into the file of KVM_GET_STATS_FD."""

    _fields_ = [("flags", c_uint32), ("name_size", c_uint32), ("num_desc", c_uint32), ("id_offset", c_uint32),
                ("desc_offset", c_uint32), ("data_offset", c_uint32)]


class StatsDesc(Words):
    """struct kvm_stats_desc; a name of `StatsHeader.name_size` bytes follows. `size` counts values of 8 bytes."""

    _fields_ = [("flags", c_uint32), ("exponent", c_int16), ("size", c_uint16), ("offset", c_uint32),
                ("bucket_size", c_uint32)]


SET_SIGNAL_MASK = iow(KVMIO, 0x8B, SignalMask.sigset.offset)
"""The number counts `len` only."""
GET_STATS_FD = io(KVMIO, 0xCE)


class StatsType(IntEnum):
    """KVM_STATS_TYPE_*: bits 3:0 of `StatsDesc.flags`."""

    CUMULATIVE = 0
    INSTANT = 1
    PEAK = 2
    LINEAR_HIST = 3
    LOG_HIST = 4

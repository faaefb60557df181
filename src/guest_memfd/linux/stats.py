"""KVM_GET_STATS_FD (Documentation/virt/kvm/api.rst, 4.133): the counters of a VM or a vCPU by name."""

from __future__ import annotations

import ctypes
import os

from guest_memfd.linux import syscall
from guest_memfd.linux.abi.kvm import GET_STATS_FD, StatsDesc, StatsHeader, StatsType
from guest_memfd.linux.fd import Descriptor

_SCALARS = (StatsType.CUMULATIVE, StatsType.INSTANT, StatsType.PEAK)


def read(owner: Descriptor) -> dict[str, int]:
    """Every counter of *owner* that is one number; histograms are left out. Raises SyscallFailed."""
    fd = syscall.ioctl(owner.fileno(), GET_STATS_FD, call="KVM_GET_STATS_FD")
    with Descriptor(fd, "kvm-stats"), syscall.named("pread", "KVM's statistics"):
        return _scalars(fd)


def _scalars(fd: int) -> dict[str, int]:
    header = StatsHeader.from_buffer_copy(os.pread(fd, ctypes.sizeof(StatsHeader), 0))
    step = ctypes.sizeof(StatsDesc) + header.name_size
    table = os.pread(fd, step * header.num_desc, header.desc_offset)
    found = {}
    for at in range(0, len(table), step):
        desc = StatsDesc.from_buffer_copy(table, at)
        if desc.flags & 0xF in _SCALARS:
            name = table[at + ctypes.sizeof(StatsDesc):at + step].split(b"\0", 1)[0].decode()
            found[name] = int.from_bytes(os.pread(fd, 8, header.data_offset + desc.offset), "little")
    return found

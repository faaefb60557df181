"""/dev/gunyah of Android's common kernels 6.1 and 6.6: guest memory by user addresses instead of by file.

Only what differs from series v17: drivers/virt/gunyah/vm_mgr.c of android14-6.1 and android15-6.6.
"""

from __future__ import annotations

import ctypes
from ctypes import c_uint32, c_uint64
from enum import IntFlag

from guest_memfd.linux.abi.table import Command
from guest_memfd.linux.abi.words import Words
from guest_memfd.uapi.ioctl import io, iow

_KIND, _ANDROID = "G", "A"


class UserspaceMemoryRegion(Words):
    """struct gh_userspace_memory_region; sizes and addresses in bytes."""

    _fields_ = [("label", c_uint32), ("flags", c_uint32), ("guest_phys_addr", c_uint64), ("memory_size", c_uint64),
                ("userspace_addr", c_uint64)]


class FwConfig(Words):
    """struct gh_vm_firmware_config: where the firmware of a protected VM is."""

    _fields_ = [("guest_phys_addr", c_uint64), ("size", c_uint64)]


class RegionFlag(IntFlag):
    """Flags of a region. From FORCE_LEND on only in 6.6, where bits 6:4 are a field as in series v17."""

    ALLOW_READ = 0x1
    ALLOW_WRITE = 0x2
    ALLOW_EXEC = 0x4
    FORCE_LEND = 0x10
    FORCE_SHARE = 0x20
    UNMAP = 0x100


ACCESS_MASK = 0x70
"""The access field of `RegionFlag` in 6.6."""

SET_USER_MEM_REGION = iow(_KIND, 0x1, ctypes.sizeof(UserspaceMemoryRegion))
ANDROID_TENTATIVE_UAPI = io(_ANDROID, 0x10)
ANDROID_LEND_USER_MEM = iow(_ANDROID, 0x11, ctypes.sizeof(UserspaceMemoryRegion))
ANDROID_SET_FW_CONFIG = iow(_ANDROID, 0x12, ctypes.sizeof(FwConfig))

COMMANDS = (
    Command("GH_VM_SET_USER_MEM_REGION", "VM", SET_USER_MEM_REGION, UserspaceMemoryRegion, "android14-6.1"),
    Command("GH_ANDROID_TENTATIVE_UAPI", "VM", ANDROID_TENTATIVE_UAPI, None, "android14-6.1"),
    Command("GH_VM_ANDROID_LEND_USER_MEM", "VM", ANDROID_LEND_USER_MEM, UserspaceMemoryRegion, "android14-6.1"),
    Command("GH_VM_ANDROID_SET_FW_CONFIG", "VM", ANDROID_SET_FW_CONFIG, FwConfig, "android14-6.1"),
)

"""/dev/gunyah of series v17 as bytes: structures with all their fields, and the table of commands."""

from __future__ import annotations

import ctypes
from ctypes import c_int32, c_uint8, c_uint16, c_uint32, c_uint64

from guest_memfd.linux.abi.table import Command
from guest_memfd.linux.abi.words import Words
from guest_memfd.uapi.gunyah import Ioctl


class CreateMemArgs(Words):
    """struct gunyah_create_mem_args; no one looks at `reserved`."""

    _fields_ = [("flags", c_uint64), ("size", c_uint64), ("reserved", c_uint64 * 6)]


class MapMemArgs(Words):
    """struct gunyah_map_mem_args of MAP_MEM, 32 bytes; addresses, offset and size are bytes."""

    _fields_ = [("guest_addr", c_uint64), ("flags", c_uint32), ("guest_mem_fd", c_uint32), ("offset", c_uint64),
                ("size", c_uint64)]


class VmDtbConfig(Words):
    """struct gunyah_vm_dtb_config of SET_DTB_CONFIG, 16 bytes; address and size are bytes."""

    _fields_ = [("guest_phys_addr", c_uint64), ("size", c_uint64)]


class FnDesc(Words):
    """struct gunyah_fn_desc; `arg` is an address."""

    _fields_ = [("type", c_uint32), ("arg_size", c_uint32), ("arg", c_uint64)]


class VmBootContext(Words):
    """struct gunyah_vm_boot_context; `reserved` has to be 0."""

    _fields_ = [("reg", c_uint32), ("reserved", c_uint32), ("value", c_uint64)]


class FnVcpuArg(Words):
    """struct gunyah_fn_vcpu_arg, 4 bytes: the number of the vCPU to add or remove."""

    _fields_ = [("id", c_uint32)]


class FnIrqfdArg(Words):
    """struct gunyah_fn_irqfd_arg, 16 bytes: an eventfd, and the label of the interrupt that it raises."""

    _fields_ = [("fd", c_uint32), ("label", c_uint32), ("flags", c_uint32), ("padding", c_uint32)]


class FnIoeventfdArg(Words):
    """struct gunyah_fn_ioeventfd_arg, 32 bytes: a store of `len` bytes at guest address `addr` signals the eventfd."""

    _fields_ = [("datamatch", c_uint64), ("addr", c_uint64), ("len", c_uint32), ("fd", c_int32), ("flags", c_uint32),
                ("padding", c_uint32)]


class RunMmio(Words):
    """gunyah_vcpu_run.mmio: a guest access of `len` bytes at `phys_addr`; user space answers in `resume_action`."""

    _fields_ = [("phys_addr", c_uint64), ("data", c_uint8 * 8), ("len", c_uint32), ("is_write", c_uint8),
                ("resume_action", c_uint8)]


class RunStatus(Words):
    """gunyah_vcpu_run.status; all but `status` is what the kernel calls exit_info."""

    _fields_ = [("status", c_uint32), ("type", c_uint16), ("padding", c_uint16), ("reason_size", c_uint32),
                ("reason", c_uint8 * 8)]


class RunPageFault(Words):
    """gunyah_vcpu_run.page_fault: a guest address that could not be given, and -errno of the attempt."""

    _fields_ = [("phys_addr", c_uint64), ("attempt", c_int32), ("resume_action", c_uint8)]


class RunUnion(ctypes.Union):
    """What an exit says."""

    _fields_ = [("mmio", RunMmio), ("status", RunStatus), ("page_fault", RunPageFault)]


class VcpuRun(Words):
    """struct gunyah_vcpu_run, the beginning of the page that a vCPU shares."""

    _anonymous_ = ("exit",)
    _fields_ = [("immediate_exit", c_uint8), ("padding", c_uint8 * 7), ("exit_reason", c_uint32), ("exit", RunUnion)]


COMMANDS = (
    Command("GUNYAH_CREATE_VM", "device", Ioctl.CREATE_VM),
    Command("GUNYAH_CREATE_GUEST_MEM", "device", Ioctl.CREATE_GUEST_MEM, CreateMemArgs),
    Command("GUNYAH_VM_SET_DTB_CONFIG", "VM", Ioctl.SET_DTB_CONFIG, VmDtbConfig),
    Command("GUNYAH_VM_START", "VM", Ioctl.START),
    Command("GUNYAH_VM_ADD_FUNCTION", "VM", Ioctl.ADD_FUNCTION, FnDesc),
    Command("GUNYAH_VM_REMOVE_FUNCTION", "VM", Ioctl.REMOVE_FUNCTION, FnDesc),
    Command("GUNYAH_VM_MAP_MEM", "VM", Ioctl.MAP_MEM, MapMemArgs),
    Command("GUNYAH_VM_SET_BOOT_CONTEXT", "VM", Ioctl.SET_BOOT_CONTEXT, VmBootContext),
    Command("GUNYAH_VCPU_RUN", "vCPU", Ioctl.VCPU_RUN),
    Command("GUNYAH_VCPU_MMAP_SIZE", "vCPU", Ioctl.VCPU_MMAP_SIZE),
)

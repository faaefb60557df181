"""Numbers and layouts of /dev/gunyah, against the values that a C compiler gives."""

from __future__ import annotations

import struct

import pytest

from guest_memfd.uapi import gunyah as u

NUMBERS = {
    "CREATE_VM": 0x4700, "CREATE_GUEST_MEM": 0x40404708, "SET_DTB_CONFIG": 0x40104702, "START": 0x4703,
    "ADD_FUNCTION": 0x40104704, "VCPU_RUN": 0x4705, "VCPU_MMAP_SIZE": 0x4706, "REMOVE_FUNCTION": 0x40104707,
    "MAP_MEM": 0x40204709, "SET_BOOT_CONTEXT": 0x4010470A,
}


def test_ioctl_numbers() -> None:
    assert {command.name: command.value for command in u.Ioctl} == NUMBERS


# Structure, and per field its offset and width; every field gets a value of its own.
LAYOUTS = [
    (u.CreateMemArgs, 64, [(0, 8), (8, 8)]),
    (u.MapMemArgs, 32, [(0, 8), (8, 4), (12, 4), (16, 8), (24, 8)]),
    (u.VmDtbConfig, 16, [(0, 8), (8, 8)]),
    (u.FnDesc, 16, [(0, 4), (4, 4), (8, 8)]),
    (u.VmBootContext, 16, [(0, 4), (4, 4), (8, 8)]),
    (u.FnVcpuArg, 4, [(0, 4)]),
    (u.FnIrqfdArg, 16, [(0, 4), (4, 4), (8, 4), (12, 4)]),
    (u.FnIoeventfdArg, 32, [(0, 8), (8, 8), (16, 4), (20, 4), (24, 4), (28, 4)]),
]


@pytest.mark.parametrize(("kind", "size", "fields"), LAYOUTS, ids=[row[0].__name__ for row in LAYOUTS])
def test_layout(kind: type, size: int, fields: list[tuple[int, int]]) -> None:
    values = [0x11 * (n + 1) for n in range(len(fields))]
    raw = kind(*values).pack()
    expected = bytearray(size)
    for value, (offset, width) in zip(values, fields, strict=True):
        expected[offset:offset + width] = value.to_bytes(width, "little")
    assert raw == bytes(expected)
    assert tuple(kind.unpack(raw)) == tuple(values)


def test_ioeventfd_descriptor_is_signed() -> None:
    assert u.FnIoeventfdArg.unpack(u.FnIoeventfdArg(0, 0, 4, -1).pack()).fd == -1


def test_run_page_offsets() -> None:
    page = u.VcpuRun()
    assert len(page.raw) == 4096
    assert (page.exit_reason, page.exit) == (u.GunyahExitReason.UNKNOWN, None)
    page.immediate_exit = 1
    page.set_mmio(0x1122334455667788, b"\xde\xad", 2, True)
    page.resume_action = u.ResumeAction.RETRY
    assert page.raw[0] == 1
    assert struct.unpack_from("<I", page.raw, 8)[0] == 1
    assert struct.unpack_from("<Q", page.raw, 16)[0] == 0x1122334455667788
    assert page.raw[24:32] == b"\xde\xad" + bytes(6)
    assert struct.unpack_from("<I", page.raw, 32)[0] == 2
    assert (page.raw[36], page.raw[37]) == (1, 2)
    assert page.exit == u.MmioExit(0x1122334455667788, b"\xde\xad", True)
    assert not any(page.raw[u.VcpuRun.SIZE:])


def test_run_page_status_and_page_fault() -> None:
    page = u.VcpuRun()
    page.set_status(u.VmStatus.EXITED, 7, b"abc")
    assert struct.unpack_from("<IHHI", page.raw, 16) == (2, 7, 0, 3)
    assert page.raw[28:31] == b"abc"
    assert page.exit == u.StatusExit(u.VmStatus.EXITED, 7, b"abc")
    page.set_page_fault(0x8000_0000, -2)
    assert struct.unpack_from("<Qi", page.raw, 16) == (0x8000_0000, -2)
    assert page.raw[28] == u.ResumeAction.FAULT
    assert page.exit == u.PageFaultExit(0x8000_0000, -2)


def test_boot_register_numbers() -> None:
    assert u.boot_register(u.RegisterSet.X, 31) == 31
    assert u.boot_register(u.RegisterSet.PC, 0) == 0x100
    assert u.boot_register(u.RegisterSet.SP, 2) == 0x202


def test_flags() -> None:
    assert u.MapFlag.ALLOW_RWX == u.MapFlag.ALLOW_READ | u.MapFlag.ALLOW_WRITE | u.MapFlag.ALLOW_EXEC == 0x70
    assert (u.MapFlag.UNMAP, u.GunyahMemFlag.CLOEXEC, u.GunyahMemFlag.ALLOW_HUGEPAGE) == (0x100, 1, 2)

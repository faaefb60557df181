"""/dev/gunyah: the page that a vCPU shares, and numbers."""

from __future__ import annotations

import struct

from guest_memfd.uapi import gunyah as u


def test_run_page_offsets() -> None:
    page = u.VcpuRun()
    assert (page.exit_reason, page.exit) == (u.GunyahExitReason.UNKNOWN, None)
    page.immediate_exit = 1
    page.set_mmio(0x1122334455667788, b"\xde\xad", 2, True)
    page.mmio.resume_action = u.ResumeAction.RETRY
    raw = bytes(page)
    assert len(raw) == 40
    assert raw[0] == 1
    assert struct.unpack_from("<I", raw, 8)[0] == 1
    assert struct.unpack_from("<Q", raw, 16)[0] == 0x1122334455667788
    assert raw[24:32] == b"\xde\xad" + bytes(6)
    assert struct.unpack_from("<I", raw, 32)[0] == 2
    assert (raw[36], raw[37]) == (1, 2)
    assert page.exit == u.MmioExit(0x1122334455667788, b"\xde\xad", True)


def test_run_page_status_and_page_fault() -> None:
    page = u.VcpuRun()
    page.set_status(u.VmStatus.EXITED, 7, b"abc")
    assert struct.unpack_from("<IHHI", bytes(page), 16) == (2, 7, 0, 3)
    assert bytes(page)[28:31] == b"abc"
    assert page.exit == u.StatusExit(u.VmStatus.EXITED, 7, b"abc")
    page.set_page_fault(0x8000_0000, -2)
    assert struct.unpack_from("<Qi", bytes(page), 16) == (0x8000_0000, -2)
    assert bytes(page)[28] == u.ResumeAction.FAULT
    assert page.exit == u.PageFaultExit(0x8000_0000, -2)


def test_boot_register_numbers() -> None:
    assert u.boot_register(u.RegisterSet.X, 31) == 31
    assert u.boot_register(u.RegisterSet.PC, 0) == 0x100
    assert u.boot_register(u.RegisterSet.SP, 2) == 0x202


def test_flags() -> None:
    assert u.MapFlag.ALLOW_RWX == u.MapFlag.ALLOW_READ | u.MapFlag.ALLOW_WRITE | u.MapFlag.ALLOW_EXEC == 0x70
    assert (u.MapFlag.UNMAP, u.GunyahMemFlag.CLOEXEC, u.GunyahMemFlag.ALLOW_HUGEPAGE) == (0x100, 1, 2)

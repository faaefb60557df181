"""linux/gunyah.py: every call of series v17, as number and bytes, through a C library that only writes them down.

The table is recorded by hand from include/uapi/linux/gunyah.h of the series. No machine here has /dev/gunyah.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from errno import EBADF, EINTR, EINVAL, EPERM
from pathlib import Path
from typing import Any

import pytest

from guest_memfd.errors import BadInput, HostUnavailable, SyscallFailed
from guest_memfd.linux import syscall
from guest_memfd.linux.gunyah import LinuxGunyahDevice, LinuxGunyahVcpu, LinuxGunyahVm
from guest_memfd.uapi.gunyah import (
    FnIoeventfdArg,
    FnIrqfdArg,
    FnType,
    GunyahExitReason,
    GunyahMemFlag,
    MapFlag,
    MmioExit,
    PageFaultExit,
    RegisterSet,
    ResumeAction,
    StatusExit,
    VmStatus,
    boot_register,
)

PAGE = os.sysconf("SC_PAGESIZE")
MAKES_FD = {0x4700, 0x40404708}
"""Commands that return a descriptor; so does ADD_FUNCTION of a vCPU."""


class Recorder:
    """The C library with another ioctl(): what the kernel would copy is in `calls`, and every descriptor is a memfd."""

    def __init__(self, real: Any) -> None:
        self.real = real
        self.calls: list[tuple[int, int, str]] = []
        self.errnos: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def ioctl(self, fd: int, request: int, word: int) -> int:
        size = request >> 16 & 0x3FFF
        data = ctypes.string_at(word, size) if size else word.to_bytes(8, "little")
        if request in (0x40104704, 0x40104707):             # what the descriptor points to, too
            data += b"|" + ctypes.string_at(int.from_bytes(data[8:], "little"), int.from_bytes(data[4:8], "little"))
            data = data[:8] + data[16:]
        self.calls.append((fd, request, data.hex()))
        if self.errnos:
            ctypes.set_errno(self.errnos.pop(0))
            return -1
        if request in MAKES_FD or (request == 0x40104704 and data[0] == FnType.VCPU):
            made = os.memfd_create("fake")
            os.set_inheritable(made, True)
            os.ftruncate(made, PAGE)
            return made
        return PAGE if request == 0x4706 else 0


@pytest.fixture
def libc(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder(syscall.libc)
    monkeypatch.setattr(syscall, "libc", recorder)
    return recorder


@pytest.fixture
def device(libc: Recorder) -> Iterator[LinuxGunyahDevice]:
    with LinuxGunyahDevice("/dev/null") as device:
        yield device


@pytest.fixture
def vm(device: LinuxGunyahDevice) -> Iterator[LinuxGunyahVm]:
    with device.create_vm() as vm:
        yield vm


@pytest.fixture
def vcpu(vm: LinuxGunyahVm) -> Iterator[LinuxGunyahVcpu]:
    with vm.add_vcpu(3) as vcpu:
        yield vcpu


MAP = MapFlag.ALLOW_RWX | MapFlag.FORCE_SHARE
CALLS: dict[str, tuple[Callable[[LinuxGunyahVm], object], int, str]] = {
    "set_dtb_config": (lambda vm: vm.set_dtb_config(0x8000_0000, 0x20_0000), 0x40104702,
                       "0000008000000000" "0000200000000000"),
    "start": (lambda vm: vm.start(), 0x4703, "0000000000000000"),
    "set_boot_context x0": (lambda vm: vm.set_boot_context(boot_register(RegisterSet.X, 0), 0x1122), 0x4010470A,
                            "00000000" "00000000" "2211000000000000"),
    "set_boot_context sp": (lambda vm: vm.set_boot_context(boot_register(RegisterSet.SP, 2), 1 << 63, reserved=7),
                            0x4010470A, "02020000" "07000000" "0000000000000080"),
    "add irqfd": (lambda vm: vm.add_function(FnType.IRQFD, bytes(FnIrqfdArg(9, 5, 1))), 0x40104704,
                  "02000000" "10000000" "7c" "09000000" "05000000" "01000000" "00000000"),
    "add ioeventfd": (lambda vm: vm.add_function(FnType.IOEVENTFD, bytes(FnIoeventfdArg(0xAA, 0x9000, 4, 8, 1))), 0x40104704,
                      "03000000" "20000000" "7c" "aa00000000000000" "0090000000000000" "04000000" "08000000" "01000000"
                      "00000000"),
    "add something else": (lambda vm: vm.add_function(0xFFFF, b""), 0x40104704, "ffff0000" "00000000" "7c"),
    "remove vcpu": (lambda vm: vm.remove_function(FnType.VCPU, b"\3\0\0\0"), 0x40104707,
                    "01000000" "04000000" "7c" "03000000"),
}


@pytest.mark.parametrize("name", CALLS)
def test_call_of_a_vm(libc: Recorder, vm: LinuxGunyahVm, name: str) -> None:
    call, number, data = CALLS[name]
    libc.calls.clear()
    call(vm)
    assert libc.calls == [(vm.fileno(), number, data)]


def test_calls_of_the_device(libc: Recorder, device: LinuxGunyahDevice) -> None:
    with device.create_vm(), device.create_vm(1), device.create_guest_mem(0x20_0000, GunyahMemFlag.ALLOW_HUGEPAGE) as memory:
        assert [call[1:] for call in libc.calls] == [
            (0x4700, "0000000000000000"), (0x4700, "0100000000000000"),
            (0x40404708, "0200000000000000" "0000200000000000" + "00" * 48)]
        assert memory.size == 0x20_0000
        assert not os.get_inheritable(memory.fileno())


def test_memory_is_mapped_by_its_number_and_a_closed_one_by_none(
    libc: Recorder, device: LinuxGunyahDevice, vm: LinuxGunyahVm
) -> None:
    memory = device.create_guest_mem(0x2000)
    number = memory.fileno()
    libc.calls.clear()
    vm.map_mem(memory, 0x4000_0000, 0x1000, 0x2000, MAP)
    vm.map_mem(memory, 0x4000_0000, 0x1000, 0x2000, MAP | MapFlag.UNMAP)
    memory.close()
    vm.map_mem(memory, 0, 0, 0, 0)
    fd = number.to_bytes(4, "little").hex()
    assert [call[1:] for call in libc.calls] == [
        (0x40204709, f"0000004000000000" f"72000000{fd}" "0010000000000000" "0020000000000000"),
        (0x40204709, f"0000004000000000" f"72010000{fd}" "0010000000000000" "0020000000000000"),
        (0x40204709, "0000000000000000" "00000000ffffffff" "0000000000000000" "0000000000000000")]
    with pytest.raises(BadInput):
        vm.map_mem("memory", 0, 0, 0, 0)            # type: ignore[arg-type]


def test_a_vcpu_and_its_page(libc: Recorder, vm: LinuxGunyahVm, vcpu: LinuxGunyahVcpu) -> None:
    assert libc.calls[-2:] == [(vm.fileno(), 0x40104704, "01000000" "04000000" "7c" "03000000"),
                               (vcpu.fileno(), 0x4706, "0000000000000000")]
    shared = vcpu.fileno()                          # the other side of the page is the file that stands for the vCPU

    def says(at: int, data: bytes) -> None:
        os.pwrite(shared, data, at)

    assert vcpu.run() is None
    assert libc.calls[-1] == (shared, 0x4705, "0000000000000000")
    says(8, bytes.fromhex("01000000" "00000000" "0090000000000000" "1122334455667788" "04000000" "01" "00"))
    assert vcpu.run() == MmioExit(0x9000, b"\x11\x22\x33\x44", True)
    says(8, bytes.fromhex("02000000" "00000000" "03000000" "0100" "0000" "02000000" "abcd000000000000"))
    assert vcpu.run() == StatusExit(VmStatus.CRASHED, 1, b"\xab\xcd")
    says(8, bytes.fromhex("03000000" "00000000" "0000004000000000" "f4ffffff" "01"))
    assert vcpu.run() == PageFaultExit(0x4000_0000, -12)

    vcpu.page.immediate_exit = 1
    vcpu.page.data = b"\x99\x88"
    vcpu.page.mmio.resume_action = ResumeAction.RETRY
    vcpu.page.exit_reason = GunyahExitReason.MMIO
    assert os.pread(shared, 1, 0) == b"\1"
    assert os.pread(shared, 4, 8) == b"\1\0\0\0"
    assert os.pread(shared, 8, 24) == bytes.fromhex("9988000000000000")
    assert os.pread(shared, 1, 37) == b"\2"
    vcpu.close()
    with pytest.raises(AttributeError):
        vcpu.page.data                              # noqa: B018


def test_errors_keep_their_number_and_say_the_call(
    libc: Recorder, device: LinuxGunyahDevice, vm: LinuxGunyahVm, vcpu: LinuxGunyahVcpu
) -> None:
    for call, name, errno in ((device.create_vm, "GUNYAH_CREATE_VM", EPERM), (vm.start, "GUNYAH_VM_START", EINVAL),
                              (vcpu.run, "GUNYAH_VCPU_RUN", EINTR),
                              (lambda: vm.add_vcpu(1), "GUNYAH_VM_ADD_FUNCTION", EINVAL),
                              (lambda: device.create_guest_mem(1), "GUNYAH_CREATE_GUEST_MEM", EINVAL)):
        libc.errnos = [errno]
        with pytest.raises(SyscallFailed, match=name) as caught:
            call()
        assert caught.value.errno == errno
    libc.errnos = [EINTR, EINTR]
    libc.calls.clear()
    vm.set_boot_context(0, 1)
    assert len(libc.calls) == 3, "it has done nothing when a signal comes, so it is made again"


def test_a_vcpu_without_a_page_leaves_nothing_open(libc: Recorder, vm: LinuxGunyahVm) -> None:
    class NoPage(Recorder):
        def ioctl(self, fd: int, request: int, word: int) -> int:
            self.errnos = [EINVAL] if request == 0x4706 else []
            return super().ioctl(fd, request, word)

    syscall.libc = NoPage(libc.real)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(SyscallFailed, match="MMAP_SIZE"):
        vm.add_vcpu(0)
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_used_after_close(libc: Recorder, device: LinuxGunyahDevice, vm: LinuxGunyahVm, vcpu: LinuxGunyahVcpu) -> None:
    for thing in (vcpu, vm, device):
        thing.close()
        thing.close()
    libc.calls.clear()
    for use in (vcpu.run, vm.start, device.create_vm, lambda: device.create_guest_mem(0), lambda: vm.set_dtb_config(0, 0)):
        with pytest.raises(SyscallFailed) as caught:
            use()
        assert caught.value.errno == EBADF
    assert not libc.calls, "a number that may be somebody else's by now is not used"


def test_no_gunyah_is_said_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(HostUnavailable, match="no Gunyah host"):
        LinuxGunyahDevice(str(tmp_path / "gunyah"))

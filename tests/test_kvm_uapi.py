"""/dev/kvm: how exits are decoded, and the emulated device against what the kernel does."""

from __future__ import annotations

import errno
import itertools
import struct
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from judged import judged

from guest_memfd.asm.arm64.asm import assemble
from guest_memfd.designs import DESIGNS, Design
from guest_memfd.designs.ours import OurLibrary
from guest_memfd.errors import BadInput, Signalled, SyscallFailed
from guest_memfd.machine.boot import Config, Machine
from guest_memfd.machine.dev.kvm import KvmDevice
from guest_memfd.machine.linux import mm
from guest_memfd.uapi import kvm, kvm_arm64, kvm_run
from guest_memfd.uapi.kvm import PRIVATE, SHARED, GuestMemfdFlag, MemFlag, MemoryAttributes2
from guest_memfd.words.primitives import Bound, Steps

pytest.importorskip("unicorn")

PAGE, MIB = 4096, 1 << 20
MMAP = GuestMemfdFlag.MMAP
BASE = 0x8000_0000

# -- registers and exits -----------------------------------------------------------------------------------------------


def test_register_numbers() -> None:
    assert (kvm_arm64.X[3], kvm_arm64.PC) == (0x6030_0000_0010_0006, 0x6030_0000_0010_0040)
    assert kvm_arm64.VBAR_EL1 == 0x6030_0000_0013_C600


def page(reason: int, *union: tuple[str, int, Any]) -> bytes:
    raw = bytearray(4096)
    struct.pack_into("<I", raw, 8, reason)
    for form, at, value in union:
        struct.pack_into(form, raw, at, value)
    return bytes(raw)


@pytest.mark.parametrize(("raw", "number", "said"), [
    (page(6, ("<Q", 32, 0x900_0000), ("8s", 40, b"hello..."), ("<I", 48, 4), ("B", 52, 1)), 0,
     kvm_run.Mmio(0x900_0000, 4, True, b"hell")),
    (page(6, ("<Q", 32, 0x900_0000), ("8s", 40, b"hello..."), ("<I", 48, 4)), 0, kvm_run.Mmio(0x900_0000, 4, False, b"")),
    (page(39, ("<Q", 32, 8), ("<Q", 40, BASE), ("<Q", 48, PAGE)), 14, kvm_run.MemoryFault(PRIVATE, BASE, PAGE, 14)),
    (page(24, ("<I", 32, 1)), 0, kvm_run.SystemEvent(1)),
    (page(3, ("<Q", 32, 12), ("<Q", 40, BASE)), 0, kvm_run.HypercallExit(12, (BASE, 0, 0, 0, 0, 0))),
    (page(10), 4, kvm_run.Intr()), (page(17, ("<I", 32, 9)), 0, kvm_run.KvmInternalError("suberror 9")),
    (page(17, ("<I", 32, 3)), 0, kvm_run.KvmInternalError("KVM_INTERNAL_ERROR_DELIVERY_EV")),
    (page(17, ("<I", 32, 1), ("<I", 36, 4), ("<Q", 40, 1), ("3s", 48, b"\2\x0f\x0b")), 0,
     kvm_run.KvmInternalError("KVM_INTERNAL_ERROR_EMULATION, instruction bytes 0f 0b")),
    (page(17, ("<I", 32, 1), ("<I", 36, 4), ("3s", 48, b"\2\x0f\x0b")), 0,
     kvm_run.KvmInternalError("KVM_INTERNAL_ERROR_EMULATION")),
    (page(0), 14, kvm_run.Unknown(0, 14)), (page(4), 0, kvm_run.Unknown(4)), (page(5), 0, kvm_run.Halt()),
    (page(8), 0, kvm_run.Shutdown()), (page(9, ("<Q", 32, 0x8000_0021)), 0, kvm_run.FailEntry(0x8000_0021)),
    (page(2, ("10s", 32, b"\1\2\xf8\3\2\0\0\0\0\3"), ("4s", 0x300, b"abcd")), 0, kvm_run.Io(0x3F8, 2, 2, True, b"abcd")),
    (page(2, ("10s", 32, b"\0\1\x60\0\1\0\0\0\0\3"), ("4s", 0x300, b"abcd")), 0, kvm_run.Io(0x60, 1, 1, False, b"")),
])
def test_exits_are_decoded(raw: bytes, number: int, said: kvm_run.Exit) -> None:
    assert kvm_run.decode_run(raw, number) == said


# -- the device ----------------------------------------------------------------------------------------------------------


def until(vcpu: Any, ready: Callable[[], object]) -> None:
    """Let the guest run until *ready*, however slow this machine is; it loops, so only the clock ends a run."""
    while not ready():
        assert vcpu.run(0.05) == kvm_run.Intr()


class Opened:
    """A machine with /dev/kvm and one VM."""

    def __init__(
        self, hypervisor: str, design: str | type[Design] = "library", protected: bool | None = None,
    ) -> None:
        self.machine = Machine(hypervisor, Config(ram=32 * MIB))
        self.watch = judged(self.machine)
        self.free = self.machine.kernel_pages.free_pages
        self.system = KvmDevice(self.machine, DESIGNS[design] if isinstance(design, str) else design)
        self.protected = hypervisor == "pkvm" if protected is None else protected
        self.vm = self.system.create_vm(kvm_arm64.VM_TYPE_PROTECTED if self.protected else 0)

    def bind(self, file: Any, size: int, gpa: int = BASE, slot: int = 0, offset: int = 0, flags: int = 4) -> None:
        self.vm.set_user_memory_region2(slot, flags, gpa, size, guest_memfd=file, guest_memfd_offset=offset)

    def load(self, source: str, pages: int = 8) -> Any:
        """A private file at BASE with a program, and the vCPU that is to run it."""
        self.file = self.vm.create_guest_memfd(pages * PAGE, MMAP)
        self.bind(self.file, pages * PAGE)
        self.file.set_memory_attributes2(MemoryAttributes2(0, PAGE, 0))
        with self.file.mmap() as mapping:
            mapping.write(0, assemble(source, BASE, "test").data)
        self.file.set_memory_attributes2(MemoryAttributes2(0, PAGE, PRIVATE))
        vcpu = self.vm.create_vcpu()
        vcpu.set_one_reg(kvm_arm64.PC, BASE)
        return vcpu

    def ends(self) -> None:
        """Nothing may be left once everything is closed, and no law may have broken."""
        assert self.machine.audit() == []
        assert not self.watch.broken
        assert self.machine.kernel_pages.free_pages == self.free


@pytest.fixture(params=["kvm", "pkvm"])
def opened(request: pytest.FixtureRequest) -> Iterator[Opened]:
    made = Opened(request.param)
    yield made
    assert not made.watch.broken


def refused(code: int, call: Any, *args: Any, **more: Any) -> SyscallFailed:
    with pytest.raises(SyscallFailed) as failed:
        call(*args, **more)
    assert errno.errorcode[failed.value.errno] == errno.errorcode[code], failed.value
    return failed.value


def test_the_system(opened: Opened) -> None:
    system = opened.system
    assert system.get_api_version() == 12
    caps = kvm.Cap.GUEST_MEMFD, kvm.Cap.GUEST_MEMFD_FLAGS, kvm.Cap.USER_MEMORY2
    assert [system.check_extension(cap) for cap in caps] == [1, 3, 1]
    assert opened.vm.check_extension(kvm.Cap.MEMORY_ATTRIBUTES) == 0
    assert system.check_extension(kvm.CAP_GUEST_MEMFD_MEMORY_ATTRIBUTES) == PRIVATE
    for kind in (1 << 8, 1 << 40, 48):
        refused(errno.EINVAL, system.create_vm, kind)
    system.close()
    refused(errno.EBADF, system.create_vm)


def test_protected_vms_need_protected_mode() -> None:
    refused(errno.EINVAL, Opened("kvm").system.create_vm, kvm_arm64.VM_TYPE_PROTECTED)
    with pytest.raises(BadInput, match="gunyah has no /dev/kvm"):
        KvmDevice(Machine("gunyah", Config(ram=16 * MIB)), DESIGNS["library"])


def test_an_unprotected_vm_under_pkvm_has_no_private_memory() -> None:
    opened = Opened("pkvm", protected=False)
    refused(errno.EINVAL, opened.vm.create_guest_memfd, PAGE, MMAP)
    file = opened.vm.create_guest_memfd(PAGE, SHARED)
    refused(errno.EINVAL, file.set_memory_attributes2, MemoryAttributes2(0, PAGE, PRIVATE))
    opened.bind(file, PAGE)
    with file.mmap() as mapping:
        mapping.write(0, assemble("_start: mov x0, #7\n str x0, [x1]\n hvc #0\n", BASE, "test").data)
    vcpu = opened.vm.create_vcpu()
    for reg, value in ((kvm_arm64.PC, BASE), (kvm_arm64.X[1], BASE + 64)):
        vcpu.set_one_reg(reg, value)
    with file.mmap() as mapping:
        until(vcpu, lambda: mapping.read(64, 8) == (7).to_bytes(8, "little"))


@pytest.mark.parametrize(("size", "flags"), [
    (0, 0), (1, 0), (PAGE - 1, 0), (PAGE + 1, 0), (-PAGE, 0), (1 << 63, 0), (PAGE, 4), (PAGE, 1 << 63),
])
def test_files_that_are_refused(opened: Opened, size: int, flags: int) -> None:
    refused(errno.EINVAL, opened.vm.create_guest_memfd, size, flags)


def test_a_file_is_no_file(opened: Opened) -> None:
    file = opened.vm.create_guest_memfd(4 * PAGE, 0)
    refused(errno.ENODEV, file.mmap)
    for mode in (0, 2, 0x10, 0x08, 0x20, 0x40, 0x80):
        refused(errno.EOPNOTSUPP, file.fallocate, mode, 0, PAGE)
    refused(errno.EINVAL, file.fallocate, 1, 0, 5 * PAGE)
    refused(errno.EINVAL, file.fallocate, 1, 1, PAGE)
    refused(errno.EINVAL, file.fallocate, 3, 0, 0)
    file.fallocate(1, 0, 2 * PAGE)
    file.punch_hole(0, 100 * PAGE)
    mapped = opened.vm.create_guest_memfd(PAGE, SHARED)
    refused(errno.EINVAL, mapped.mmap, shared=False)
    refused(errno.EINVAL, mapped.mmap, 1)
    with mapped.mmap(0, 2 * PAGE) as mapping:
        mapping.write(PAGE - 4, b"last")
        with pytest.raises(Signalled, match="SIGBUS"):
            mapping.read(PAGE, 1)


def test_private_memory_is_sigbus(opened: Opened) -> None:
    with opened.vm.create_guest_memfd(2 * PAGE, MMAP) as file, file.mmap() as mapping:
        with pytest.raises(Signalled, match="SIGBUS"):
            mapping.write(0, b"x")
        file.set_memory_attributes2(MemoryAttributes2(PAGE, PAGE, 0))
        mapping.write(PAGE, b"x")
        with pytest.raises(Signalled, match="SIGBUS"):
            mapping.write(PAGE - 1, b"xx")
        file.set_memory_attributes2(MemoryAttributes2(0, PAGE, 0))
        assert mapping.read(PAGE - 1, 2) == b"\0x"


@pytest.mark.parametrize(("what", "code"), [
    ({"flags": 4 | 1}, errno.EINVAL), ({"flags": 4 | 2}, errno.EINVAL), ({"flags": 4 | 8}, errno.EINVAL),
    ({"flags": 4 | 1 << 16}, errno.EINVAL), ({"flags": 0}, errno.EINVAL), ({"slot": 32767}, errno.EINVAL),
    ({"slot": 1 << 16}, errno.EINVAL), ({"gpa": BASE + 1}, errno.EINVAL), ({"size": PAGE + 1}, errno.EINVAL),
    ({"size": 0, "slot": 9}, errno.EINVAL), ({"offset": 1}, errno.EINVAL), ({"offset": -PAGE}, errno.EINVAL),
    ({"offset": PAGE}, errno.EINVAL), ({"size": 5 * PAGE}, errno.EINVAL), ({"offset": (1 << 63) - PAGE}, errno.EINVAL),
    ({"offset": (1 << 64) - PAGE}, errno.EINVAL), ({"gpa": (1 << 64) - PAGE}, errno.EINVAL),
    ({"gpa": 1 << 40}, errno.EFAULT), ({"size": (1 << 31) * PAGE}, errno.EINVAL), ({"file": None}, errno.EBADF),
])
def test_slots_that_are_refused(opened: Opened, what: dict[str, Any], code: int) -> None:
    file = opened.vm.create_guest_memfd(4 * PAGE, MMAP)
    refused(code, opened.bind, **{"file": file, "size": 4 * PAGE, **what})
    opened.bind(file, 4 * PAGE)


LAST_BYTE = (1 << 63) - 1


@pytest.mark.parametrize(("mode", "offset", "nr", "code"), [
    (1, -PAGE, PAGE, errno.EINVAL), (1, LAST_BYTE + 1, PAGE, errno.EINVAL), (1, 0, -PAGE, errno.EINVAL),
    (0x100, 0, 0, errno.EINVAL),
    (0x100, PAGE, LAST_BYTE, errno.EOPNOTSUPP), (2, PAGE, LAST_BYTE, errno.EOPNOTSUPP),
    (9, PAGE, LAST_BYTE, errno.EOPNOTSUPP), (0, 1, LAST_BYTE, errno.EFBIG), (8, PAGE, LAST_BYTE, errno.EFBIG),
    (0x11, PAGE, LAST_BYTE, errno.EFBIG),
    (3, PAGE, LAST_BYTE + 1 - PAGE, errno.EFBIG), (0, 0, PAGE, errno.EOPNOTSUPP), (0x11, 0, PAGE, errno.EOPNOTSUPP),
])
def test_what_the_vfs_looks_at_before_the_file_does(opened: Opened, mode: int, offset: int, nr: int, code: int) -> None:
    refused(code, opened.vm.create_guest_memfd(PAGE, SHARED).fallocate, mode, offset, nr)


@pytest.mark.parametrize(("offset", "nr", "code"), [
    (1, PAGE, errno.EINVAL), (0, 0, errno.EINVAL), (-PAGE, PAGE, errno.EOVERFLOW), (0, 1 << 48, errno.ENOMEM),
    (-PAGE, 1 << 48, errno.ENOMEM), (LAST_BYTE + 1 - PAGE, 1, errno.EOVERFLOW),
    (LAST_BYTE + 1 - 2 * PAGE, PAGE, errno.ENODEV),
])
def test_what_mmap_looks_at_before_the_file_does(opened: Opened, offset: int, nr: int, code: int) -> None:
    refused(code, opened.vm.create_guest_memfd(PAGE).mmap, offset, nr)


def test_a_process_has_so_many_mappings(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mm, "MAX_VMAS", 300)
    file = opened.vm.create_guest_memfd(2 * PAGE, SHARED)
    mappings = [file.mmap(n % 2 * PAGE, PAGE) for n in range(300)]
    refused(errno.ENOMEM, file.mmap)
    mappings[0].write(0, b"first")
    assert mappings[298].read(0, 5) == b"first"
    assert mappings[299].read(0, 5) == bytes(5)
    mappings.pop(0).close()
    file.mmap().close()
    assert mappings[-1].read(0, 5) == bytes(5)
    for mapping in mappings:
        mapping.close()
    file.close()
    opened.vm.close()
    opened.ends()


@pytest.mark.long
def test_as_many_mappings_as_linux_allows() -> None:
    opened = Opened("kvm")
    file = opened.vm.create_guest_memfd(PAGE, SHARED)
    mappings = [file.mmap() for _ in range(65530)]
    refused(errno.ENOMEM, file.mmap)
    mappings[-1].write(0, b"last")
    assert mappings[0].read(0, 4) == b"last"
    for mapping in mappings:
        mapping.close()
    file.close()
    opened.vm.close()
    opened.ends()


@pytest.mark.parametrize("size", [1 << 47, 1 << 62])
def test_a_page_of_a_huge_file_is_mapped(opened: Opened, size: int) -> None:
    file = opened.vm.create_guest_memfd(size, SHARED)
    for offset in (0, size // 2, size - PAGE):
        with file.mmap(offset, PAGE) as one, file.mmap(offset, PAGE) as other:
            one.write(8, b"here")
            assert other.read(8, 4) == b"here"
        file.punch_hole(offset, PAGE)
    file.close()
    opened.vm.close()
    opened.ends()


@pytest.mark.parametrize("value", [-1, 1 << 63, 1 << 64, -(1 << 63) - 1])
def test_numbers_that_are_none_of_a_kernels(opened: Opened, value: int) -> None:
    vm = opened.vm
    file = vm.create_guest_memfd(PAGE, SHARED)
    for call in (
        lambda: vm.create_guest_memfd(value), lambda: vm.create_guest_memfd(PAGE, value),
        lambda: file.set_memory_attributes2(MemoryAttributes2(value, PAGE, 0)),
        lambda: file.set_memory_attributes2(MemoryAttributes2(0, value, 0)),
        lambda: file.set_memory_attributes2(MemoryAttributes2(0, PAGE, value)),
        lambda: file.set_memory_attributes2(MemoryAttributes2(0, PAGE, 0, value)),
        lambda: vm.set_user_memory_region2(value, 4, 0, PAGE, guest_memfd=file),
        lambda: vm.set_user_memory_region2(0, value, 0, PAGE, guest_memfd=file),
        lambda: vm.set_user_memory_region2(0, 4, value, PAGE, guest_memfd=file),
        lambda: vm.set_user_memory_region2(0, 4, 0, value, guest_memfd=file),
        lambda: vm.set_user_memory_region2(0, 4, 0, PAGE, userspace_addr=value, guest_memfd=file),
        lambda: vm.set_user_memory_region2(0, 4, 0, PAGE, guest_memfd_offset=value, guest_memfd=file),
    ):
        with pytest.raises((SyscallFailed, BadInput)) as failed:
            call()
        if isinstance(failed.value, SyscallFailed):
            assert failed.value.errno in (errno.EINVAL, errno.EFAULT)
        else:
            assert "does not fit" in str(failed.value)


def test_an_address_beyond_the_guests_is_looked_at_last(opened: Opened) -> None:
    file = opened.vm.create_guest_memfd(PAGE, SHARED)
    closed = opened.vm.create_guest_memfd(PAGE, SHARED)
    closed.close()
    refused(errno.EBADF, opened.bind, closed, PAGE, 1 << 40)
    refused(errno.EBADF, opened.bind, None, PAGE, 1 << 40)
    refused(errno.EINVAL, opened.bind, file, 2 * PAGE, 1 << 40)
    refused(errno.EFAULT, opened.bind, file, PAGE, 1 << 40)
    opened.bind(file, PAGE)


def test_whose_file_and_where(opened: Opened) -> None:
    file, other = (opened.vm.create_guest_memfd(4 * PAGE, MMAP) for _ in range(2))
    strange = opened.system.create_vm().create_guest_memfd(4 * PAGE, SHARED)
    refused(errno.EINVAL, opened.bind, strange, 4 * PAGE)
    opened.bind(file, 2 * PAGE)
    refused(errno.EINVAL, opened.bind, file, 2 * PAGE)                          # never changed, not even to what it is
    refused(errno.EEXIST, opened.bind, other, 2 * PAGE, slot=1, gpa=BASE + PAGE)
    refused(errno.EEXIST, opened.bind, file, 2 * PAGE, slot=1, gpa=BASE + MIB)
    refused(errno.EEXIST, opened.bind, file, 2 * PAGE, slot=1, gpa=BASE + MIB, offset=PAGE)
    opened.bind(file, 2 * PAGE, slot=1, gpa=BASE + MIB, offset=2 * PAGE)
    opened.bind(file, 0)                                                        # delete
    refused(errno.EINVAL, opened.bind, file, 0)
    opened.bind(file, 2 * PAGE, slot=2, gpa=BASE + 2 * MIB)
    other.close()
    refused(errno.EBADF, opened.bind, other, 2 * PAGE, slot=3, gpa=BASE + 3 * MIB)


@pytest.mark.parametrize("arguments", [
    (0, 0, 0), (0, PAGE + 1, 0), (1, PAGE, 0), (0, 5 * PAGE, 0), (4 * PAGE, PAGE, 0), (0, PAGE, 1), (0, PAGE, 16),
    (-PAGE, PAGE, 0), (0, PAGE, 0, 1),
])
def test_conversions_that_are_refused(opened: Opened, arguments: tuple[int, ...]) -> None:
    file = opened.vm.create_guest_memfd(4 * PAGE, MMAP)
    refused(errno.EINVAL, file.set_memory_attributes2, MemoryAttributes2(*arguments))
    refused(errno.EINVAL, opened.vm.set_memory_attributes, BASE, PAGE, PRIVATE)


def test_a_pin_refuses_the_conversion_and_says_where(opened: Opened) -> None:
    file = opened.vm.create_guest_memfd(8 * PAGE, SHARED)
    with file.mmap() as mapping:
        mapping.write(3 * PAGE, b"data")
        with mapping.pin(3 * PAGE + 7):
            request = MemoryAttributes2(PAGE, 6 * PAGE, PRIVATE)
            refused(errno.EAGAIN, file.set_memory_attributes2, request)
            assert request.error_offset == 3 * PAGE
            assert mapping.read(3 * PAGE, 4) == b"data"
        file.set_memory_attributes2(request)
        with pytest.raises(Signalled):
            mapping.read(3 * PAGE, 4)
        refused(errno.EFAULT, mapping.pin, 3 * PAGE)
        with pytest.raises(BadInput):
            mapping.pin(8 * PAGE)


def test_a_pin_outlives_its_mapping_and_its_file(opened: Opened) -> None:
    file = opened.vm.create_guest_memfd(PAGE, SHARED)
    mapping = file.mmap()
    pins = [mapping.pin(), mapping.pin(8)]                  # of a page that nobody has touched before
    for owner in (mapping, file, opened.vm):
        owner.close()
    assert any("pin 2" in line for line in opened.machine.audit())
    for pin in pins:
        pin.close()
    opened.ends()


def test_a_design_that_nobody_may_pin() -> None:
    with Opened("kvm", "secretmem").vm.create_guest_memfd(PAGE, SHARED).mmap() as mapping:
        refused(errno.EFAULT, mapping.pin)


def test_want_of_memory_refuses_the_conversion(opened: Opened) -> None:
    file = opened.vm.create_guest_memfd(8 * PAGE, SHARED)
    opened.machine.fail_slab_at(0)
    request = MemoryAttributes2(2 * PAGE, PAGE, PRIVATE)
    refused(errno.ENOMEM, file.set_memory_attributes2, request)
    assert request.error_offset == 2 * PAGE


# -- vCPUs ---------------------------------------------------------------------------------------------------------------

OFF = "_start: ldr x0, =0x84000008\n hvc #0\n b _start\n"


def test_a_guest_turns_itself_off(opened: Opened) -> None:
    vcpu = opened.load(OFF)
    assert vcpu.run(5) == kvm_run.SystemEvent(kvm_run.SystemEventType.SHUTDOWN)
    assert vcpu.statistics()["faults"] == 1


def test_mmio(opened: Opened) -> None:
    vcpu = opened.load("_start: ldr x1, =0x09000000\n ldrh w2, [x1, #6]\n str w2, [x1]\n str w2, [x1, #8]\n b _start\n"
                       "  .balign 2048\nvectors: b vectors\n")
    assert vcpu.run(5) == kvm_run.Mmio(0x900_0006, 2, False, b"")
    vcpu.answer(b"\x34\x12")
    assert vcpu.run(5) == kvm_run.Mmio(0x900_0000, 4, True, b"\x34\x12\0\0")
    assert vcpu.run(5) == kvm_run.Mmio(0x900_0008, 4, True, b"\x34\x12\0\0")
    if not opened.protected:
        vcpu.set_one_reg(kvm_arm64.VBAR_EL1, BASE + 0x800 - 0x200)
        vcpu.inject_external_abort()
        until(vcpu, lambda: vcpu.get_one_reg(kvm_arm64.ESR_EL1) == 0x96000010)
        assert vcpu.get_one_reg(kvm_arm64.FAR_EL1) == 0x900_0008


def test_a_read_that_is_not_answered_finds_zeros(opened: Opened) -> None:
    vcpu = opened.load("_start: ldr x1, =0x09000000\n mov x2, #-1\n ldr x2, [x1]\n str x2, [x1]\n b _start\n")
    vcpu.run(5)
    assert vcpu.run(5) == kvm_run.Mmio(0x900_0000, 8, True, bytes(8))


def test_an_answer_that_nobody_waits_for(opened: Opened) -> None:
    vcpu = opened.load("_start: ldr x1, =0x09000000\n ldr x2, [x1]\n str x2, [x1]\n b _start\n")
    refused(errno.EINVAL, vcpu.answer, b"\1")
    vcpu.run(5)
    vcpu.answer(b"\2")
    assert vcpu.run(5) == kvm_run.Mmio(0x900_0000, 8, True, b"\2" + bytes(7))
    refused(errno.EINVAL, vcpu.answer, b"\1")


@pytest.mark.parametrize("source", ["_start: b _start", "_start: wfi\n b _start", "_start: mov x0, #0x7000000000\n br x0"])
def test_the_clock_ends_everything(opened: Opened, source: str) -> None:
    vcpu = opened.load(source)
    began = time.monotonic()
    assert vcpu.run(0.1) == kvm_run.Intr()
    assert time.monotonic() - began > 0.09


def test_immediate_exit(opened: Opened) -> None:
    vcpu = opened.load("_start: b _start")
    vcpu.immediate_exit = True
    assert vcpu.run() == kvm_run.Intr()


def test_registers(opened: Opened) -> None:
    vcpu = opened.load(OFF)
    vcpu.set_one_reg(kvm_arm64.X[5], 55)
    assert vcpu.get_one_reg(kvm_arm64.X[5]) == 55
    assert vcpu.get_one_reg(kvm_arm64.PC) == BASE
    refused(errno.ENOENT, vcpu.get_one_reg, 0x1234)
    vcpu.run(5)
    if opened.protected:
        refused(errno.EPERM, vcpu.get_one_reg, kvm_arm64.PC)
    else:
        assert vcpu.get_one_reg(kvm_arm64.X[0]) == 0x8400_0008


def test_vcpu_numbers(opened: Opened) -> None:
    opened.vm.create_vcpu(3)
    refused(errno.EEXIST, opened.vm.create_vcpu, 3)
    refused(errno.EINVAL, opened.vm.create_vcpu, 512)


def test_a_second_vcpu_runs(opened: Opened) -> None:
    first = opened.load("_start: b _start")
    second = opened.vm.create_vcpu(1)
    second.set_one_reg(kvm_arm64.PC, BASE)
    assert [vcpu.run(0.05) for vcpu in (first, second, first)] == [kvm_run.Intr()] * 3


def test_two_vms_at_a_time(opened: Opened) -> None:
    one = opened.load("_start: ldr x1, =0x80007000\n str x1, [x1]\n b _start")
    opened.vm, first = opened.system.create_vm(kvm_arm64.VM_TYPE_PROTECTED if opened.protected else 0), opened.vm
    two = opened.load("_start: ldr x1, =0x80006000\n str x1, [x1]\n b _start")
    driver, machine = opened.machine.driver, opened.machine
    until(one, lambda: driver.lookup(first.vm, 0x8000_7000) is not None)
    until(two, lambda: driver.lookup(opened.vm.vm, 0x8000_6000) is not None)
    assert one.run(0.05) == kvm_run.Intr()
    maps = [[driver.lookup(vm.vm, ipa) is not None for ipa in (0x8000_7000, 0x8000_6000)] for vm in (first, opened.vm)]
    assert maps == [[True, False], [False, True]]
    two.close()
    opened.vm.close()
    assert one.run(0.05) == kvm_run.Intr()
    assert len(machine.vms) == 1


def test_memory_that_is_not_there_for_the_guest(opened: Opened) -> None:
    vcpu = opened.load("_start: ldr x1, =0x80007000\n str x1, [x1]\n b _start")
    opened.machine.folios.fail_at(0)
    first = BASE if opened.machine.hypervisor.name == "kvm" else 0x8000_7000       # KVM's tables come from there as well
    assert vcpu.run(5) == kvm_run.MemoryFault(PRIVATE, first, PAGE, errno.ENOMEM)
    assert vcpu.run(0.05) == kvm_run.Intr()


def test_a_page_taken_by_force_is_a_memory_fault() -> None:
    opened = Opened("pkvm", "none")
    vcpu = opened.load("_start: ldr x1, =0x80007000\nagain: str x1, [x1]\n b again")
    until(vcpu, lambda: opened.machine.driver.lookup(opened.vm.vm, 0x8000_7000) is not None)
    pa = opened.machine.driver.lookup(opened.vm.vm, 0x8000_7000)
    assert pa is not None
    opened.machine.cpu.call("plain_read", opened.machine.linear_map.va(pa))
    assert vcpu.run(5) == kvm_run.MemoryFault(PRIVATE, 0x8000_7000, PAGE, errno.EFAULT)


SHARE = """
_start: ldr     x19, =0x80002000
        mov     x1, #0x5ec7
        str     x1, [x19]
        ldr     x0, =0xc6000003
        mov     x1, x19
        mov     x2, #0
        mov     x3, #0
        hvc     #0
        mov     x20, x0
        ldr     x0, =0xc6000004
        mov     x1, x19
        mov     x2, #0
        mov     x3, #0
        hvc     #0
        ldr     x1, =0x09000000
        str     w0, [x1]
        ldr     w0, [x19]
        str     w0, [x1]
"""


def test_a_protected_guest_shares_a_page_and_takes_it_back() -> None:
    opened = Opened("pkvm")
    vcpu = opened.load(SHARE)
    assert vcpu.run(5) == kvm_run.HypercallExit(0xC600_0003, (BASE + 2 * PAGE,))
    opened.file.set_memory_attributes2(MemoryAttributes2(2 * PAGE, PAGE, 0))
    with opened.file.mmap() as mapping:
        assert mapping.read(2 * PAGE, 8) == (0x5EC7).to_bytes(8, "little")
    assert vcpu.run(5) == kvm_run.HypercallExit(0xC600_0004, (BASE + 2 * PAGE,))
    opened.file.set_memory_attributes2(MemoryAttributes2(2 * PAGE, PAGE, PRIVATE))
    assert vcpu.run(5) == kvm_run.Mmio(0x900_0000, 4, True, bytes(4))
    assert vcpu.run(5) == kvm_run.Mmio(0x900_0000, 4, True, (0x5EC7).to_bytes(4, "little"))
    with opened.file.mmap() as mapping, pytest.raises(Signalled):
        mapping.read(2 * PAGE, 8)


def test_a_protected_guest_must_agree() -> None:
    opened = Opened("pkvm")
    until(opened.load("_start: b _start"), lambda: opened.machine.driver.lookup(opened.vm.vm, BASE) is not None)
    request = MemoryAttributes2(0, 8 * PAGE, 0)
    assert refused(errno.EBUSY, opened.file.set_memory_attributes2, request)
    assert request.error_offset == 0
    refused(errno.EBUSY, opened.file.punch_hole, 0, PAGE)
    refused(errno.EBUSY, opened.bind, opened.file, 0)


# -- the laws ------------------------------------------------------------------------------------------------------------


class Frugal(OurLibrary):
    """States less than it takes."""

    bounds = {**OurLibrary.bounds, "fault": Bound(writes=1, calls=1)}


class Wordy(OurLibrary):
    """Documents fewer errnos than a fault of its own returns."""

    def guest_fault(self, gfn: int, index: int) -> Steps[int]:
        ret = yield from super().guest_fault(gfn, index)
        yield from self.host.begin_op("fault", index, 1, gfn)
        yield from self.host.end_op(ret or -errno.EPERM)
        return ret


class Documented(Wordy):
    errnos = {"fault": (errno.EPERM,)}


@pytest.mark.parametrize(("design", "law", "evidence"), [
    (OurLibrary, None, ""), (Documented, None, ""),
    (Frugal, "bounded-cost", "fault of 1 pages takes 1 TLB flushes, and at most 0 are stated"),
    (Wordy, "all-or-nothing", "fault returns errno 1, which is not documented for it")])
def test_what_a_design_states_of_itself_is_judged(design: type[Design], law: str | None, evidence: str) -> None:
    opened = Opened("pkvm", design)
    vcpu = opened.load("_start: ldr x1, =0x80007000\n str x1, [x1]\n b _start")
    until(vcpu, lambda: law in opened.watch.broken if law else opened.machine.driver.lookup(opened.vm.vm, 0x8000_7000))
    assert {name: broken.evidence for name, broken in opened.watch.broken.items()} == ({law: evidence} if law else {})


# -- the end -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))), ids=str)
def test_closing_in_any_order(opened: Opened, order: tuple[int, ...]) -> None:
    vcpu = opened.load("_start: ldr x1, =0x80007000\n str x1, [x1]\n b _start")
    opened.file.set_memory_attributes2(MemoryAttributes2(PAGE, PAGE, 0))
    mapping = opened.file.mmap()
    mapping.write(PAGE, b"data")
    vcpu.run(0.02)
    things = [opened.vm, opened.file, vcpu, mapping]
    for at in order:
        things[at].close()
        things[at].close()
    opened.ends()
    refused(errno.EBADF, vcpu.run)
    refused(errno.EBADF, opened.vm.create_vcpu)
    refused(errno.EBADF, opened.file.mmap)


def test_a_file_outlives_its_vm(opened: Opened) -> None:
    file = opened.vm.create_guest_memfd(2 * PAGE, SHARED)
    opened.bind(file, 2 * PAGE)
    mapping = file.mmap()
    mapping.write(0, b"data")
    opened.vm.close()
    assert mapping.read(0, 4) == b"data"
    file.punch_hole(0, PAGE)
    assert mapping.read(0, 4) == bytes(4)
    file.set_memory_attributes2(MemoryAttributes2(0, 2 * PAGE, PRIVATE))
    mapping.close()
    file.close()
    opened.ends()


def test_a_slot_outlives_the_descriptor_of_its_file(opened: Opened) -> None:
    vcpu = opened.load("_start: ldr x1, =0x80007000\n str x1, [x1]\n b _start")
    opened.file.close()
    assert vcpu.run(0.05) == kvm_run.Intr()
    vcpu.close()
    opened.vm.close()
    opened.ends()


def test_each_allocation_of_create_vm_may_fail() -> None:
    for hypervisor in ("kvm", "pkvm"):
        opened, failures = Opened(hypervisor), 0
        opened.vm.close()
        opened.free = opened.machine.kernel_pages.free_pages
        for n in range(20):
            opened.machine.kernel_pages.fail_at(n)
            try:
                opened.system.create_vm(kvm_arm64.VM_TYPE_PROTECTED if opened.protected else 0).close()
            except SyscallFailed as error:
                failures += error.errno == errno.ENOMEM
            opened.machine.kernel_pages.fail_at(None)
            opened.ends()
        assert failures == {"kvm": 1, "pkvm": 5}[hypervisor]


def test_flags_are_bits() -> None:
    assert int(SHARED) == 3
    assert int(MemFlag.GUEST_MEMFD) == 4

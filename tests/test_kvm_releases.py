"""The emulated /dev/kvm: what gmem conform has found, and what differs from release to release.

Expected values are what real kernels answer: 6.18.44, 6.18.15, 7.2.12 and 7.3.4 on x86-64, 7.3.4 on arm64.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from guest_memfd.asm.arm64.asm import assemble
from guest_memfd.errors import Signalled, SyscallFailed, UnknownName
from guest_memfd.machine.boot import Config, Machine
from guest_memfd.machine.dev.kvm.release import RELEASES
from guest_memfd.uapi import kvm, kvm_arm64, kvm_run
from guest_memfd.uapi.kvm import PRIVATE, SHARED, MemFlag, MemoryAttributes2
from guest_memfd.uapi.memory import Advice

pytest.importorskip("unicorn")

PAGE, MIB, BASE = 4096, 1 << 20, 0x8000_0000


@contextmanager
def opened(**config: str) -> Iterator[tuple[Machine, Any]]:
    machine = Machine("kvm", Config(ram=64 * MIB, **config))        # type: ignore[arg-type]
    with machine.open("/dev/kvm") as device, device.create_vm() as vm:
        yield machine, vm


def refused(call: Callable[..., Any], *args: Any, **more: Any) -> int:
    try:
        call(*args, **more)
    except SyscallFailed as error:
        return error.errno
    return 0


def test_a_mapping_of_negative_length_is_of_more_bytes_than_there_are() -> None:
    with opened() as (_, vm), vm.create_guest_memfd(4 * PAGE, SHARED) as file:
        assert refused(file.mmap, 0, -PAGE) == errno.ENOMEM
        assert refused(file.mmap, 0, 0) == errno.EINVAL


def test_an_odd_offset_is_seen_before_a_closed_file() -> None:
    with opened() as (_, vm):
        with vm.create_guest_memfd(4 * PAGE, SHARED) as file:
            pass
        assert refused(file.mmap, 1, PAGE) == errno.EINVAL
        assert refused(file.mmap, 0, PAGE) == errno.EBADF


def test_a_signal_names_the_address_in_the_mapping_that_was_touched() -> None:
    with (opened() as (_, vm), vm.create_guest_memfd(4 * PAGE, SHARED) as file, file.mmap(0, 8 * PAGE) as first,
          file.mmap(2 * PAGE, 4 * PAGE) as second):
        assert first.address != second.address
        for mapping, at in ((first, 5 * PAGE + 16), (second, 2 * PAGE + 8)):
            with pytest.raises(Signalled) as caught:
                mapping.read(at, 8)
            assert (caught.value.address, caught.value.code) == (mapping.address + at, 2)
        second.write(0, b"the same")
        assert first.read(2 * PAGE, 8) == b"the same"
        first.close()
        assert second.read(0, 8) == b"the same"


def test_a_read_only_mapping() -> None:
    with opened() as (_, vm), vm.create_guest_memfd(4 * PAGE, SHARED) as file, file.mmap(readonly=True) as mapping:
        assert mapping.read(PAGE, 8) == bytes(8)
        with pytest.raises(Signalled, match="SIGSEGV"):
            mapping.write(PAGE + 8, b"x")
        assert refused(mapping.advise, Advice.POPULATE_WRITE) == errno.EINVAL
        assert refused(mapping.advise, Advice.POPULATE_READ) == 0
        assert file.resident() == 4


def test_advice() -> None:
    with opened() as (_, vm), vm.create_guest_memfd(4 * PAGE, SHARED) as file, file.mmap(0, 8 * PAGE) as mapping:
        mapping.write(0, b"kept")
        mapping.write(PAGE, b"gone")
        mapping.advise(Advice.DONTNEED)
        mapping.advise(Advice.REMOVE, PAGE, 1)              # a byte is a page
        assert (mapping.read(0, 4), file.resident(), mapping.read(PAGE, 4)) == (b"kept", 1, bytes(4))
        assert refused(mapping.advise, Advice.POPULATE_WRITE) == errno.EFAULT           # past the end of the file
        assert file.resident() == 4                         # what came before it is there
        assert [refused(mapping.advise, advice, at, nr) for advice, at, nr in (
            (99, 0, PAGE), (Advice.FREE, 0, PAGE), (Advice.FREE, 0, 0), (Advice.DONTNEED, 1, PAGE), (Advice.DONTNEED, 1, 0))
        ] == [errno.EINVAL, errno.EINVAL, 0, errno.EINVAL, errno.EINVAL]
        file.close()
        mapping.advise(Advice.REMOVE, 0, 4 * PAGE)
        assert mapping.read(0, 4) == bytes(4)


def test_a_pin_keeps_what_was_punched() -> None:
    with opened() as (_, vm), vm.create_guest_memfd(4 * PAGE, SHARED) as file, file.mmap() as mapping:
        mapping.write(8, b"old")
        with mapping.pin(8) as pinned:
            file.punch_hole(0, PAGE)
            assert (pinned.read(8, 3), mapping.read(8, 3)) == (b"old", bytes(3))


def test_a_forked_child_has_mappings_and_files_and_no_vm() -> None:
    with opened() as (machine, vm), vm.create_guest_memfd(4 * PAGE, SHARED) as file, file.mmap() as mapping:
        with machine.in_child():
            assert refused(vm.check_extension, 0) == refused(vm.create_guest_memfd, PAGE) == errno.EIO
            mapping.write(0, b"child")
            file.fallocate(1, PAGE, PAGE)
        assert (vm.check_extension(kvm.Cap.GUEST_MEMFD), mapping.read(0, 5), file.resident()) == (1, b"child", 2)


@pytest.mark.parametrize("name", ["read", "pread64", "lseek", "ftruncate"])
def test_calls_that_the_file_has_no_method_for(name: str) -> None:
    with opened() as (_, vm):
        with vm.create_guest_memfd(PAGE) as file:
            assert refused(file.other_call, name) == (errno.ESPIPE if name in ("pread64", "lseek") else errno.EINVAL)
        assert refused(file.other_call, name) == errno.EBADF


@pytest.mark.parametrize("architecture", ["arm64", "x86_64"])
@pytest.mark.parametrize("release", RELEASES)
def test_releases(release: str, architecture: str) -> None:
    x86, converts = architecture == "x86_64", release == "7.4"
    with (opened(kvm_release=release, kvm_architecture=architecture) as (_, vm),
          vm.create_guest_memfd(4 * PAGE, SHARED) as file, vm.create_guest_memfd(PAGE, 0) as hidden):
        def bind(slot: int, gpa: int, what: Any = file) -> int:
            return refused(vm.set_user_memory_region2, slot, MemFlag.GUEST_MEMFD, gpa, PAGE, guest_memfd=what)

        twice, beyond = errno.EINVAL if release == "6.18" else errno.EEXIST, errno.EINVAL if x86 else errno.EFAULT
        assert bind(1, BASE) == 0
        assert bind(2, BASE + PAGE) == twice
        assert bind(2, 1 << 60) == (beyond if release in ("7.3", "7.4") else twice)
        assert bind(3, BASE + PAGE, hidden) == (0 if x86 or converts else errno.EINVAL)
        no_ioctl = errno.ENOTTY if x86 else errno.EINVAL
        assert refused(vm.set_memory_attributes, BASE, PAGE, PRIVATE) == no_ioctl
        assert refused(file.set_memory_attributes2, MemoryAttributes2(0, PAGE, PRIVATE)) == (0 if converts else errno.ENOTTY)
        assert vm.check_extension(kvm.CAP_GUEST_MEMFD_MEMORY_ATTRIBUTES) == (PRIVATE if converts else 0)
        assert vm.check_extension(kvm.Cap.NR_MEMSLOTS) == (32764 if x86 else 32767)


def test_a_default_vm_of_x86_gets_what_is_at_userspace_addr() -> None:
    code = assemble("ldr x0, [x1]\nb .\n", BASE).data
    with (opened(kvm_release="6.18", kvm_architecture="x86_64") as (_, vm), vm.create_guest_memfd(PAGE, SHARED) as program,
          vm.create_guest_memfd(PAGE, 0) as hidden, program.mmap() as mapping):
        mapping.write(0, code)
        vm.set_user_memory_region2(0, MemFlag.GUEST_MEMFD, BASE, PAGE, guest_memfd=program)
        vm.set_user_memory_region2(1, MemFlag.GUEST_MEMFD, BASE + PAGE, PAGE, guest_memfd=hidden)
        with vm.create_vcpu() as vcpu:
            vcpu.set_one_reg(kvm_arm64.PC, BASE)
            vcpu.set_one_reg(kvm_arm64.X[1], BASE + PAGE)
            assert vcpu.run(5) == kvm_run.Unknown(0, errno.EFAULT)
        assert hidden.resident() == 0


@pytest.mark.parametrize("config", [{"kvm_release": "6.19"}, {"kvm_architecture": "riscv"}])
def test_a_release_that_no_one_knows(config: dict[str, str]) -> None:
    with pytest.raises(UnknownName, match="of /dev/kvm"), opened(**config):
        pass

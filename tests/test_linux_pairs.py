"""Calls in pairs: /dev/kvm of the machine the tests run on, and the emulated one, refuse the same with the same errno.

Left out is what depends on the architecture: how many bits a user's and a guest's address have, how many slots there are.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from random import Random
from typing import Any

import pytest
from linux_driver import no_guests

from guest_memfd.errors import SyscallFailed, errno_name
from guest_memfd.linux.system import System
from guest_memfd.machine.boot import Config, Machine
from guest_memfd.uapi.kvm import SHARED

pytest.importorskip("unicorn")
REASON = no_guests()
pytestmark = pytest.mark.skipif(bool(REASON), reason=REASON)

PAGE = 4096
SIZE = 16 * PAGE
LAST = (1 << 63) - 1
NUMBERS = (0, 1, PAGE, 2 * PAGE, PAGE + 1, SIZE - PAGE, SIZE, SIZE + PAGE, -1, -PAGE, 1 << 40, 1 << 48, 1 << 62,
           LAST, LAST + 1 - PAGE, LAST + 1 - 2 * PAGE, -LAST - 1)
MODES = (0, 1, 2, 3, 4, 8, 9, 0x10, 0x11, 0x13, 0x20, 0x21, 0x40, 0x41, 0x80, 0x81, 0x100)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as opened:
        yield opened


@pytest.fixture
def vms(stack: ExitStack) -> tuple[Any, Any]:
    """A VM of each."""
    machine = Machine("kvm", Config(ram=32 << 20))
    real, emulated = (stack.enter_context(stack.enter_context(system).create_vm())
                      for system in (System(), machine.open("/dev/kvm")))
    return real, emulated


def outcome(call: Callable[..., Any], *args: Any, **more: Any) -> str:
    try:
        made = call(*args, **more)
    except SyscallFailed as error:
        return errno_name(error.errno)
    if made is not None:
        made.close()
    return "ok"


def test_fallocate(vms: tuple[Any, Any], stack: ExitStack) -> None:
    files = [stack.enter_context(vm.create_guest_memfd(SIZE, SHARED)) for vm in vms]
    for mode, offset, nr in itertools.product(MODES, NUMBERS, NUMBERS):
        real, emulated = (outcome(file.fallocate, mode, offset, nr) for file in files)
        assert real == emulated, (mode, offset, nr)


@pytest.mark.parametrize("flags", [0, SHARED])
@pytest.mark.parametrize("size", [SIZE, 1 << 46])
def test_mmap(vms: tuple[Any, Any], stack: ExitStack, size: int, flags: int) -> None:
    files = [stack.enter_context(vm.create_guest_memfd(size, flags)) for vm in vms]
    numbers = (*NUMBERS, (1 << 52), (1 << 52) - PAGE)
    for offset, nr, shared in itertools.product(numbers, numbers, (True, False)):
        if nr == 1 << 40 and not shared:                    # how much a process may commit
            continue
        real, emulated = (outcome(file.mmap, offset, nr, shared=shared) for file in files)
        assert real == emulated, (offset, nr, shared)


def test_create(vms: tuple[Any, Any]) -> None:
    for size, flags in itertools.product(NUMBERS, (0, 1, 2, 3, 4, 8, -1, 1 << 63)):
        real, emulated = (outcome(vm.create_guest_memfd, size, flags) for vm in vms)
        if flags != 2 and size < 1 << 62:                   # INIT_SHARED alone; the most that a file system has
            assert real == emulated, (size, flags)


def test_slots(vms: tuple[Any, Any], stack: ExitStack) -> None:
    random = Random(1)
    files = [stack.enter_context(vm.create_guest_memfd(SIZE, SHARED)) for vm in vms]
    closed = [vm.create_guest_memfd(SIZE, SHARED) for vm in vms]
    for file in closed:
        file.close()
    addresses = (0, PAGE, SIZE, 1, -1, 1 << 30, -PAGE, 1 << 63)
    for _ in range(3000):
        slot, flags = random.choice((0, 1, 2, 32767, 1 << 16, 1 << 32 - 1)), random.choice((4, 4, 4, 5, 6, 7, 8, 12))
        address, size = random.choice(addresses), random.choice((0, PAGE, PAGE, 2 * PAGE, SIZE, SIZE + PAGE, 1, 1 << 43))
        user, offset = random.choice((0, 0, 0, 1, PAGE)), random.choice((0, 0, PAGE, 1, SIZE, SIZE - PAGE, -PAGE, 1 << 63))
        which = random.choice(("open", "open", "open", "closed", "none"))
        real, emulated = (
            outcome(vm.set_user_memory_region2, slot, flags, address, size, userspace_addr=user, guest_memfd_offset=offset,
                    guest_memfd={"open": file, "closed": gone, "none": None}[which])
            for vm, file, gone in zip(vms, files, closed, strict=True))
        # x86 says EINVAL beyond the guest's addresses; so did every kernel before conversion in place where a file is bound.
        if (real, emulated) not in (("EINVAL", "EFAULT"), ("EINVAL", "EEXIST")):
            assert real == emulated, (slot, flags, address, size, user, offset, which)

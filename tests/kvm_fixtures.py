"""A plugin: the fixtures of test_linux_kvm.py and test_linux_guests.py."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from kvm_vms import GPA, SIZE

from guest_memfd.linux.guest_memfd import GuestMemfd
from guest_memfd.linux.guest_x86 import SmallGuest
from guest_memfd.linux.system import System
from guest_memfd.linux.vm import LinuxVm
from guest_memfd.uapi.kvm import SHARED, MemFlag


@pytest.fixture
def system() -> Iterator[System]:
    with System() as system:
        yield system


@pytest.fixture
def vm(system: System) -> Iterator[LinuxVm]:
    with system.create_vm() as vm:
        yield vm


@pytest.fixture
def guest(system: System) -> Iterator[SmallGuest]:
    with SmallGuest(system) as guest:
        yield guest


@pytest.fixture
def bound(guest: SmallGuest) -> Iterator[GuestMemfd]:
    with guest.vm.create_guest_memfd(SIZE, SHARED) as memory:
        guest.vm.set_user_memory_region2(1, MemFlag.GUEST_MEMFD, GPA, SIZE, guest_memfd=memory)
        yield memory

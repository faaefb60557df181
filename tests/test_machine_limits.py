"""Sizes, numbers and registers at their limits: the documented errno, in no time, and nothing lost."""

from __future__ import annotations

from errno import EINVAL

import pytest

from guest_memfd.errors import BadInput, SyscallFailed
from guest_memfd.machine.boot import Config, Machine
from guest_memfd.machine.hypcalls.vm import Vm
from guest_memfd.machine.primitives.host import EmulatedHost
from guest_memfd.uapi import kvm_arm64 as regs
from guest_memfd.uapi.kvm import SHARED, GuestMemfdFlag, MemFlag
from guest_memfd.words.outcome import Blocked
from guest_memfd.words.primitives import Host, Primitive

PAGE = 4096


def machine(hypervisor: str = "kvm") -> Machine:
    return Machine(hypervisor, Config(ram=64 << 20))


@pytest.mark.parametrize("flags", [GuestMemfdFlag.MMAP, SHARED])
def test_an_empty_file_of_any_size_costs_nothing(flags: int) -> None:
    m = machine()
    with m.open("/dev/kvm") as device, device.create_vm() as vm:
        for size in (1 << 30, 1 << 40, 1 << 62):
            vm.create_guest_memfd(size, flags).close()
    assert m.audit() == []


def test_a_page_far_out_in_a_sparse_file_is_found_and_punched() -> None:
    m = machine()
    with m.open("/dev/kvm") as device, device.create_vm() as vm:
        file = vm.create_guest_memfd(1 << 40, SHARED)
        for at in (0, 1 << 20, (1 << 39) + PAGE, (1 << 40) - PAGE):
            with file.mmap(at, PAGE) as mapping:
                mapping.write(0, b"here")
        assert len(file.host.inode.pages) == 4
        file.punch_hole(PAGE, (1 << 40) - 2 * PAGE)
        assert len(file.host.inode.pages) == 2
        file.close()
    assert m.audit() == []


@pytest.mark.parametrize("what", ["guest_phys_addr", "userspace_addr", "memory_size"])
def test_numbers_below_zero_are_refused(what: str) -> None:
    m = machine()
    with m.open("/dev/kvm") as device, device.create_vm() as vm:
        file = vm.create_guest_memfd(16 * PAGE, GuestMemfdFlag.MMAP)
        numbers = {"guest_phys_addr": 0, "memory_size": PAGE, "userspace_addr": 0, what: -PAGE}
        with pytest.raises(SyscallFailed) as failed:
            vm.set_user_memory_region2(0, int(MemFlag.GUEST_MEMFD), numbers["guest_phys_addr"], numbers["memory_size"],
                                       userspace_addr=numbers["userspace_addr"], guest_memfd=file)
        assert failed.value.errno == EINVAL
        file.close()
    assert m.audit() == []


@pytest.mark.parametrize("pstate", [0x8, 0x9, 0xC, 0xD, 0x10, 0x1F])
def test_a_vcpu_is_at_el0_or_el1(pstate: int) -> None:
    m = machine()
    with m.open("/dev/kvm") as device, device.create_vm() as vm, vm.create_vcpu(0) as vcpu:
        with pytest.raises(SyscallFailed) as failed:
            vcpu.set_one_reg(regs.PSTATE, pstate)
        assert failed.value.errno == EINVAL
        for fine in (0x0, 0x4, 0x5, 0x3C5):
            vcpu.set_one_reg(regs.PSTATE, fine)


def test_a_machine_without_a_cpu_is_none() -> None:
    with pytest.raises(BadInput, match="a CPU"):
        Machine("kvm", Config(cpus=0))


@pytest.mark.parametrize("held", ["down_read", "down_write"])
def test_a_writer_alone_that_would_wait_for_ever_says_so(held: str) -> None:
    host = EmulatedHost(machine(), Vm(None, -1), 2)
    host.perform(Primitive(held, ("invalidate",), "library"), 1)
    with pytest.raises(Blocked):
        host.run(Host("library").down_write("invalidate"))
    assert host.inode.invalidate.writer != 0
    host.perform(Primitive(held.replace("down", "up"), ("invalidate",), "library"), 1)
    host.run(Host("library").down_write("invalidate"))
    assert host.inode.invalidate.writer == 0

"""Many lives of VMs on one machine: what has ended takes no memory, and numbers do not run out."""

from __future__ import annotations

import gc
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from guest_memfd.asm.arm64.asm import assemble
from guest_memfd.errors import SyscallFailed
from guest_memfd.machine.boot import Config, Machine
from guest_memfd.machine.el2.kvm.guest import LAST_VMID, next_vmid
from guest_memfd.uapi import kvm_arm64
from guest_memfd.uapi.gunyah import MapFlag, RegisterSet, boot_register
from guest_memfd.uapi.kvm import PRIVATE, GuestMemfdFlag, MemFlag, MemoryAttributes2

pytest.importorskip("unicorn")

PAGE, BASE, NR = 4096, 0x8000_0000, 16
HYPERVISORS = ("kvm", "pkvm", "gunyah")
OFF = "_start: ldr x0, =0x84000008\n hvc #0\n"
INSTANCE = 1 << 30
"""Address space that one of Unicorn's instances takes."""


def live(machine: Machine) -> None:
    """A VM is made, its guest runs and turns itself off, and everything is closed."""
    owners = _gunyah(machine) if machine.hypervisor.name == "gunyah" else _kvm(machine)
    for owner in owners:
        owner.close()


def _kvm(machine: Machine) -> list[Any]:
    system = machine.open("/dev/kvm")
    vm = system.create_vm(kvm_arm64.VM_TYPE_PROTECTED if machine.hypervisor.name == "pkvm" else 0)
    file = vm.create_guest_memfd(NR * PAGE, GuestMemfdFlag.MMAP)
    vm.set_user_memory_region2(0, MemFlag.GUEST_MEMFD, BASE, NR * PAGE, guest_memfd=file)
    file.set_memory_attributes2(MemoryAttributes2(0, PAGE, 0))
    with file.mmap() as mapping:
        mapping.write(0, assemble(OFF, BASE, "test").data)
    file.set_memory_attributes2(MemoryAttributes2(0, PAGE, PRIVATE))
    vcpu = vm.create_vcpu()
    vcpu.set_one_reg(kvm_arm64.PC, BASE)
    vcpu.run()
    return [vcpu, vm, file, system]


def _gunyah(machine: Machine) -> list[Any]:
    device = machine.open("/dev/gunyah")
    vm, file = device.create_vm(), device.create_guest_mem(NR * PAGE)
    with file.mmap() as mapping:
        mapping.write(0, assemble(OFF, BASE, "test").data)
    vm.map_mem(file, BASE, 0, NR * PAGE, MapFlag.FORCE_LEND | MapFlag.ALLOW_RWX)
    vm.set_dtb_config(BASE + PAGE, PAGE)
    vm.set_boot_context(boot_register(RegisterSet.PC, 0), BASE)
    vcpu = vm.add_vcpu(0)
    vm.start()
    vcpu.run()
    return [vcpu, vm, file, device]


def objects() -> Counter[str]:
    """How many there are of every type of the project's, and all others together."""
    gc.collect()
    kinds = (type(thing) for thing in gc.get_objects())
    return Counter(kind.__qualname__ if str(kind.__module__).startswith("guest_memfd") else "other" for kind in kinds)


def memory() -> tuple[int, int]:
    """Address space and resident memory of this process, bytes."""
    size, resident = map(int, Path("/proc/self/statm").read_text().split()[:2])
    return size * PAGE, resident * PAGE


@pytest.mark.parametrize("name", HYPERVISORS)
def test_a_vm_that_has_ended_leaves_no_object(name: str) -> None:
    machine = Machine(name, Config(ram=32 << 20))
    live(machine)
    live(machine)
    before = objects()
    for _ in range(4):
        live(machine)
    more = objects() - before
    assert more.pop("other", 0) < 100                        # caches of the interpreter; it was 2,000 and more
    assert not more
    assert not machine.vms
    assert not machine.inodes
    assert machine.audit() == []


@pytest.mark.parametrize("name", HYPERVISORS)
def test_a_vm_that_has_ended_keeps_no_instance_of_unicorn(name: str) -> None:
    machine = Machine(name, Config(ram=32 << 20))
    live(machine)
    gc.collect()
    gc.disable()                                            # it goes with the VM, and not when somebody cleans up
    try:
        before, _ = memory()
        for _ in range(3):
            live(machine)
        assert memory()[0] - before < INSTANCE
    finally:
        gc.enable()


@pytest.mark.parametrize("name", HYPERVISORS)
def test_a_file_that_could_not_be_made_leaves_no_inode(name: str) -> None:
    machine = Machine(name, Config(ram=32 << 20))
    opened = machine.open("/dev/gunyah" if name == "gunyah" else "/dev/kvm")
    maker = opened if name == "gunyah" else opened.create_vm(kvm_arm64.VM_TYPE_PROTECTED if name == "pkvm" else 0)
    create = maker.create_guest_mem if name == "gunyah" else maker.create_guest_memfd
    failures = 0
    while True:
        machine.fail_slab_at(failures)
        try:
            file = create(NR * PAGE)
        except SyscallFailed:
            failures += 1
            assert not machine.inodes
            continue
        break
    machine.fail_slab_at(None)
    assert failures
    assert list(machine.inodes) == [file.host.inode]


def test_vmids_come_round() -> None:
    assert [next_vmid(0, ()), next_vmid(1, {2, 3}), next_vmid(LAST_VMID, {1})] == [1, 4, 2]
    machine = Machine("kvm", Config(ram=32 << 20))
    machine.el2._last = LAST_VMID - 1
    system = machine.open("/dev/kvm")
    vms = [system.create_vm() for _ in range(3)]
    assert [vm.vm.vmid for vm in vms] == [LAST_VMID, 1, 2]
    assert all(machine.driver.guest_stage2(vm.vm).vttbr >> 48 == vm.vm.vmid for vm in vms)
    for vm in vms:
        vm.close()
    assert machine.audit() == []


@pytest.mark.long
@pytest.mark.parametrize("name", HYPERVISORS)
def test_memory_stays_flat(name: str) -> None:
    """GUEST_MEMFD_LIVES: how many; 10,000 are some minutes on each host."""
    machine = Machine(name, Config(ram=32 << 20))
    for _ in range(20):
        live(machine)
    gc.collect()
    _, before = memory()
    for _ in range(int(os.environ.get("GUEST_MEMFD_LIVES", "100"))):
        live(machine)
    assert memory()[1] - before < 20 << 20
    assert machine.audit() == []

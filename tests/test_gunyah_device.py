"""/dev/gunyah of an emulated machine: devices, files, MAP_MEM, configuration, VCPU_RUN."""

from __future__ import annotations

from errno import (
    EBADF,
    EBUSY,
    EEXIST,
    EINTR,
    EINVAL,
    ENODEV,
    ENOENT,
    EOPNOTSUPP,
    EPERM,
)

import pytest
from gunyah_files import DESIGNS, HUGE, LENT, MAGIC, SHARED, errno_of, nothing_is_lost
from gunyah_guest import CALL, DEFAULT, DTB_PAGE, LEND, PAGE, RAM, RW, RWX, SHARE, Scene, peek, poke

from guest_memfd.errors import BadInput, SyscallFailed, UnknownName
from guest_memfd.machine.boot import Config, Machine
from guest_memfd.machine.el2.gunyah.rm.lifecycle import VmState
from guest_memfd.machine.hw.buddy import OutOfMemory
from guest_memfd.uapi import gunyah as u
from guest_memfd.uapi.memory import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE


@pytest.fixture(params=DESIGNS)
def design(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def scene(design: str) -> Scene:
    return Scene(design)


# -- devices -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("hypervisor", "path"), [
    ("gunyah", "/dev/kvm"), ("kvm", "/dev/gunyah"), ("pkvm", "/dev/gunyah"), ("gunyah", "/dev/null")])
def test_a_device_is_there_where_its_hypervisor_is(hypervisor: str, path: str) -> None:
    assert errno_of(Machine(hypervisor, Config(ram=64 << 20)).open, path) == ENOENT


def test_a_design_has_to_exist() -> None:
    with pytest.raises(UnknownName):
        Machine("gunyah", Config(ram=64 << 20)).open("/dev/gunyah", "libary")


def test_a_design_without_conversion_is_refused() -> None:
    with pytest.raises(BadInput, match="no conversion"):
        Machine("gunyah", Config(ram=64 << 20)).open("/dev/gunyah", "guestmem-rfc1")


@pytest.mark.parametrize("design", ["none", "fixup", "secretmem"])
def test_other_designs_lend_and_take_back(design: str) -> None:
    scene = Scene(design)
    file = scene.bound(LENT, PAGE, LEND | RW)
    poke(file, MAGIC)
    scene.vm.start()
    assert scene.read(LENT) == MAGIC
    assert errno_of(file.mmap) == EBUSY
    assert scene.unlock(LENT, PAGE) == 0
    assert peek(file) == MAGIC
    nothing_is_lost(scene)


def test_create_vm_and_create_guest_mem(scene: Scene) -> None:
    device = scene.device
    assert errno_of(device.create_vm, 1) == EINVAL
    assert errno_of(device.create_guest_mem, PAGE + 1) == EINVAL
    assert errno_of(device.create_guest_mem, PAGE, 4) == EINVAL
    with device.create_guest_mem(0) as empty:
        assert empty.fstat().size == 0
        assert errno_of(empty.mmap) == EINVAL
        assert errno_of(empty.fallocate, FALLOC_FL_KEEP_SIZE, 0, PAGE) == EINVAL
    nothing_is_lost(scene)
    assert errno_of(device.create_vm) == errno_of(device.create_guest_mem, PAGE) == EBADF


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "offset", "nr", "expected"), [
    (0, 0, PAGE, EOPNOTSUPP),
    (FALLOC_FL_PUNCH_HOLE, 0, PAGE, EOPNOTSUPP),
    (FALLOC_FL_KEEP_SIZE | 0x40, 0, PAGE, EOPNOTSUPP),
    (FALLOC_FL_KEEP_SIZE | 0x40, 1, PAGE, EOPNOTSUPP),
    (FALLOC_FL_KEEP_SIZE, 1, PAGE, EINVAL),
    (FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, 0, 1, EINVAL),
    (FALLOC_FL_KEEP_SIZE, PAGE, 4 * PAGE, EINVAL),
    (FALLOC_FL_KEEP_SIZE | FALLOC_FL_ZERO_RANGE, 4 * PAGE, PAGE, EINVAL),
    (FALLOC_FL_KEEP_SIZE, 0, 0, EINVAL),
])
def test_fallocate_refuses(scene: Scene, mode: int, offset: int, nr: int, expected: int) -> None:
    assert errno_of(scene.memory(4 * PAGE).fallocate, mode, offset, nr) == expected
    nothing_is_lost(scene)


def test_fallocate_allocates_and_keeps(scene: Scene) -> None:
    file = scene.memory(4 * PAGE)
    poke(file, MAGIC, PAGE)
    for mode in (FALLOC_FL_KEEP_SIZE, FALLOC_FL_KEEP_SIZE | FALLOC_FL_ZERO_RANGE):
        file.fallocate(mode, 0, 4 * PAGE)
        assert sorted(file.host.inode.pages) == [0, 1, 2, 3]
        assert peek(file, PAGE) == MAGIC
    nothing_is_lost(scene)


def test_mappings_are_windows(scene: Scene) -> None:
    file = scene.memory(4 * PAGE)
    assert errno_of(file.mmap, shared=False) == EINVAL
    assert errno_of(file.mmap, 1) == EINVAL
    with file.mmap(PAGE, 2 * PAGE) as part, file.mmap() as whole:
        part.write(PAGE - 3, b"over the edge")
        assert whole.read(2 * PAGE - 3, 13) == b"over the edge"
        assert whole.read(2 * PAGE - 8, 32) == bytes(5) + b"over the edge" + bytes(14)
        part.write(5, b"x")
        assert whole.read(PAGE, 8) == bytes(5) + b"x" + bytes(2)
        with pytest.raises(BadInput, match="of a mapping of"):
            part.read(2 * PAGE - 1, 2)
    assert errno_of(part.read, 0, 1) == EBADF
    part.close()
    file.close()
    assert errno_of(file.mmap) == errno_of(file.fstat) == errno_of(file.punch_hole, 0, PAGE) == EBADF
    nothing_is_lost(scene)


def test_a_mapping_outlives_its_descriptor(scene: Scene) -> None:
    file = scene.device.create_guest_mem(PAGE)
    mapping = file.mmap()
    file.close()
    mapping.write(0, b"still here")
    assert mapping.read(0, 10) == b"still here"
    mapping.close()
    nothing_is_lost(scene)


# -- MAP_MEM -----------------------------------------------------------------------------------------------------------


def test_map_mem_checks_in_order(scene: Scene) -> None:
    vm, file = scene.vm, scene.memory(8 * PAGE)
    gone = scene.device.create_guest_mem(PAGE)
    gone.close()
    # Each line is wrong in one way more than the next, and all that is wrong later is wrong already.
    assert errno_of(vm.map_mem, gone, 1, 0, PAGE, 0x1003) == EINVAL
    assert errno_of(vm.map_mem, scene.device, 1, 0, PAGE, 0x1003) == EINVAL
    for args in ((1, 0, PAGE, 0x1003), (1, 0, PAGE, 3), (1, 0, PAGE, 0x100), (1, 0, PAGE, RW | 3), (1, 0, PAGE, RW | 7),
                 (1, 0, PAGE, RW), (LENT, 8, PAGE, RW), (LENT, 0, 100, RW), (LENT, 0, 0, RW)):
        assert errno_of(vm.map_mem, file, *args) == EINVAL
    vm.map_mem(file, LENT, 0, 4 * PAGE, RW | LEND)
    assert errno_of(vm.map_mem, file, LENT, 3 * PAGE, PAGE, RW) == EEXIST          # that part of the file
    assert errno_of(vm.map_mem, file, LENT + 3 * PAGE, 4 * PAGE, PAGE, RW) == EEXIST    # those guest addresses
    assert errno_of(vm.map_mem, file, LENT + 4 * PAGE, 4 * PAGE, 0, RW) == EINVAL
    vm.map_mem(file, LENT + 4 * PAGE, 4 * PAGE, PAGE, RW)
    nothing_is_lost(scene)


def test_the_checks_say_which_one_it_was(scene: Scene) -> None:
    file = scene.memory(8 * PAGE)
    for flags, why in ((0x1003, "flags"), (3, "none of"), (RW | 3, "access 3"), (RW, "page aligned")):
        with pytest.raises(SyscallFailed, match=why):
            scene.vm.map_mem(file, 1, 0, PAGE, flags)


def test_huge_files_are_bound_in_multiples(scene: Scene) -> None:
    file = scene.memory(2 * HUGE, u.GunyahMemFlag.ALLOW_HUGEPAGE)
    for place in ((LENT + PAGE, 0, HUGE), (LENT, PAGE, HUGE), (LENT, 0, PAGE)):
        assert errno_of(scene.vm.map_mem, file, *place, RW) == EINVAL
    scene.vm.map_mem(file, LENT, 0, HUGE, RW)
    nothing_is_lost(scene)


def test_lending_needs_a_direct_map_that_can_change() -> None:
    machine = Machine("gunyah", Config(ram=64 << 20, rodata="off"))
    device = machine.open("/dev/gunyah", "gunyah-v17")          # the library says so earlier: test_machine_rodata.py
    vm, file = device.create_vm(), device.create_guest_mem(PAGE)
    assert errno_of(vm.map_mem, file, LENT, 0, PAGE, RW | LEND) == EINVAL
    assert errno_of(vm.map_mem, file, LENT, 0, PAGE, RW | DEFAULT) == EINVAL
    vm.map_mem(file, SHARED, 0, PAGE, RW | SHARE)
    for owner in (vm, file, device):
        owner.close()
    assert machine.audit() == []


def test_unmap_wants_exactly_the_binding(scene: Scene) -> None:
    vm, file, other = scene.vm, scene.memory(8 * PAGE), scene.memory(8 * PAGE)
    vm.map_mem(file, LENT, PAGE, 5 * PAGE, RW | LEND)
    unmap = u.MapFlag.UNMAP
    for args in ((LENT, PAGE, 5 * PAGE, RW | SHARE | unmap), (LENT, PAGE, 5 * PAGE, RWX | LEND | unmap),
                 (LENT, 0, 5 * PAGE, RW | LEND | unmap), (LENT, PAGE, 6 * PAGE, RW | LEND | unmap),
                 (LENT - PAGE, 0, PAGE, RW | LEND | unmap)):
        assert errno_of(vm.map_mem, file, *args) == ENOENT
    assert errno_of(vm.map_mem, other, LENT, PAGE, 5 * PAGE, RW | LEND | unmap) == ENOENT
    assert errno_of(vm.map_mem, file, LENT + PAGE, 2 * PAGE, PAGE, RW | LEND | unmap) == EINVAL
    assert errno_of(vm.map_mem, file, LENT, PAGE, 5 * PAGE, unmap) == EINVAL
    vm.map_mem(file, LENT, PAGE, PAGE, RW | LEND | unmap)
    vm.map_mem(file, LENT + 4 * PAGE, 5 * PAGE, PAGE, RW | LEND | unmap)
    assert [(b.gfn, b.start, b.nr) for b in file.bindings] == [(LENT // PAGE + 1, 2, 3)]
    vm.map_mem(file, LENT + PAGE, 2 * PAGE, 3 * PAGE, RW | LEND | unmap)
    assert file.bindings == []
    vm.map_mem(other, LENT, 0, 8 * PAGE, RW)


def test_a_locked_page_keeps_its_binding(scene: Scene) -> None:
    file = scene.bound(LENT, PAGE, LEND | RW)
    scene.vm.start()
    assert scene.write(LENT, MAGIC) == 0
    assert errno_of(scene.vm.map_mem, file, LENT, 0, PAGE, LEND | RW | u.MapFlag.UNMAP) == EBUSY
    assert scene.read(LENT) == MAGIC
    nothing_is_lost(scene)


def test_memory_bound_while_the_vm_runs(scene: Scene) -> None:
    scene.vm.start()
    scene.bound(LENT, PAGE, LEND | RW)
    if scene.design == "library":
        assert scene.write(LENT, MAGIC) == 0
        assert scene.read(LENT) == MAGIC
    else:
        # S29: nobody told the Resource Manager, and the hypervisor calls it no memory at all.
        with pytest.raises(SyscallFailed, match="which is nothing"):
            scene.write(LENT, MAGIC)
    nothing_is_lost(scene)


def test_memory_lent_among_devices_while_the_vm_runs(scene: Scene) -> None:
    scene.vm.start()
    scene.bound(SHARED, PAGE, LEND | RW)
    if scene.design == "library":
        assert scene.write(SHARED, MAGIC) == 0
        assert scene.read(SHARED) == MAGIC
    else:                                                       # S29: the hypervisor denies a private page there
        assert scene.read(SHARED) == u.MmioExit(SHARED, bytes(8), False)
    nothing_is_lost(scene)


def test_one_file_in_two_vms(scene: Scene) -> None:
    file, second = scene.bound(LENT, PAGE, LEND | RW), scene.device.create_vm()
    two = scene.memory(2 * PAGE)
    scene.vm.map_mem(two, LENT + PAGE, 0, PAGE, LEND | RW)
    if scene.design == "library":
        second.map_mem(two, LENT, PAGE, PAGE, LEND | RW)
        assert {b.vm for b in two.bindings} == {scene.vm.linux, second.linux}
    else:
        assert errno_of(second.map_mem, two, LENT, PAGE, PAGE, LEND | RW) == EOPNOTSUPP
    assert errno_of(second.map_mem, file, LENT, 0, PAGE, LEND | RW) == EEXIST
    scene.vm.start()
    assert scene.write(LENT + PAGE, MAGIC) == 0
    second.close()
    assert scene.read(LENT + PAGE) == MAGIC
    nothing_is_lost(scene)


def test_two_vms_run_on_one_file() -> None:
    one = Scene("library")
    two = Scene.__new__(Scene)
    two.__dict__.update(one.__dict__)
    two.vm = one.device.create_vm()
    two.ram = one.device.create_guest_mem(16 * PAGE)
    with one.ram.mmap() as source, two.ram.mmap() as copy:
        copy.write(0, source.read(0, PAGE))
    two.vm.map_mem(two.ram, RAM, 0, 16 * PAGE, LEND | RWX)
    two.vm.set_dtb_config(RAM + DTB_PAGE * PAGE, PAGE)
    two.vcpu, two.owned = two.vm.add_vcpu(0), []
    two.vm.set_boot_context(u.boot_register(u.RegisterSet.PC, 0), RAM)
    file = one.memory(2 * PAGE)
    one.vm.map_mem(file, LENT, 0, PAGE, LEND | RW)
    two.vm.map_mem(file, LENT, PAGE, PAGE, LEND | RW)
    one.vm.start()
    two.vm.start()
    assert one.write(LENT, MAGIC) == two.write(LENT, MAGIC + 1) == 0
    assert (one.read(LENT), two.read(LENT)) == (MAGIC, MAGIC + 1)
    assert errno_of(file.punch_hole, 0, 2 * PAGE) == EBUSY
    assert two.unlock(LENT, PAGE) == 0
    file.punch_hole(PAGE, PAGE)
    assert (one.read(LENT), two.read(LENT)) == (MAGIC, 0)
    for owner in (two.vcpu, two.vm, two.ram):
        owner.close()
    assert one.read(LENT) == MAGIC
    nothing_is_lost(one)


def test_a_page_somebody_refers_to_is_not_lent() -> None:
    scene = Scene("library")
    file = scene.bound(LENT, PAGE, LEND | RW)
    poke(file, MAGIC)
    page = file.host.inode.find(0)
    page.take("pin")
    scene.vm.start()
    assert scene.read(LENT) == u.PageFaultExit(LENT, -EBUSY)
    page.drop("pin")
    assert scene.order(0) == MAGIC
    nothing_is_lost(scene)


def test_a_huge_page_somebody_refers_to_is_not_lent() -> None:
    scene = Scene("library")
    file = scene.bound(LENT, HUGE, LEND | RW, u.GunyahMemFlag.ALLOW_HUGEPAGE)
    poke(file, MAGIC)
    page = file.host.inode.find(7)
    assert page.order == 0                              # shared pages are single ones, of a block
    page.take("pin")
    scene.vm.start()
    assert scene.read(LENT) == u.PageFaultExit(LENT, -EBUSY)
    page.drop("pin")
    assert scene.order(0) == MAGIC
    assert file.host.inode.find(7).order == 9
    nothing_is_lost(scene)


def test_punching_one_page_of_two(scene: Scene) -> None:
    file = scene.bound(LENT, 2 * PAGE, LEND | RW)
    scene.vm.start()
    assert scene.write(LENT, MAGIC) == scene.write(LENT + PAGE, MAGIC) == 0
    assert scene.unlock(LENT, PAGE) == 0
    if scene.design == "library":
        file.punch_hole(0, PAGE)
        assert scene.read(LENT) == 0
    else:
        assert errno_of(file.punch_hole, 0, PAGE) == EBUSY      # S4: bytes for pages, so the other page is meant, too
        file.punch_hole(PAGE, PAGE)                             # and this one means page 4096, which is not there
    assert scene.read(LENT + PAGE) == MAGIC
    nothing_is_lost(scene)


def test_a_huge_folio_is_split_by_a_punch() -> None:
    scene = Scene("library")
    file = scene.bound(LENT, HUGE, LEND | RW, u.GunyahMemFlag.ALLOW_HUGEPAGE)
    scene.vm.start()
    for at in (0, PAGE, HUGE - 8):
        assert scene.write(LENT + at, MAGIC + at) == 0
    assert scene.unlock(LENT, HUGE) == 0
    page = file.host.inode.find(0)
    page.take("get")
    assert errno_of(file.punch_hole, PAGE, PAGE) == EBUSY           # somebody refers to it: it stays one folio
    page.drop("get")
    file.punch_hole(PAGE, PAGE)
    assert len(file.host.inode.pages) == 511
    assert [scene.read(LENT + at) for at in (0, PAGE, HUGE - 8)] == [MAGIC, 0, MAGIC + HUGE - 8]
    assert errno_of(file.punch_hole, HUGE - PAGE, PAGE) == EBUSY    # the guest has that page again, and no other
    file.punch_hole(2 * PAGE, HUGE - 3 * PAGE)
    assert sorted(file.host.inode.pages) == [0, 1, 511]
    assert scene.unlock(LENT, PAGE) == scene.unlock(LENT + PAGE, PAGE) == scene.unlock(LENT + HUGE - PAGE, PAGE) == 0
    file.punch_hole(0, HUGE)
    assert file.host.inode.pages == {}
    assert scene.read(LENT) == 0
    assert [one.order for one in file.host.inode.pages.values()] == [9]
    nothing_is_lost(scene)


def test_a_huge_file_makes_do_with_pages_when_memory_is_in_pieces(scene: Scene) -> None:
    file = scene.bound(LENT, HUGE, LEND | RW, u.GunyahMemFlag.ALLOW_HUGEPAGE)
    folios = scene.machine.folios
    taken = []
    while True:
        try:
            taken.append(folios.alloc(9))
        except OutOfMemory:
            break
    scene.vm.start()
    assert scene.write(LENT, MAGIC) == 0
    assert [one.order for one in file.host.inode.pages.values()] == [0]
    for pa in taken:
        folios.free(pa, 9)
    assert scene.write(LENT + PAGE, MAGIC) == 0
    assert scene.read(LENT) == MAGIC
    nothing_is_lost(scene)


def test_the_laws_watch_what_a_device_does(scene: Scene) -> None:
    scene.bound(LENT, PAGE, LEND | RW)
    scene.vm.start()
    assert scene.write(LENT, MAGIC) == 0
    nothing_is_lost(scene)
    assert set(scene.watch.broken) == ({"library-alone"} if scene.design == "gunyah-v17" else set())


# -- configuration and functions ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("reg", [0x20, 0x101, 0x203, 0x300, 1 << 16])
def test_boot_registers_that_are_none(scene: Scene, reg: int) -> None:
    assert errno_of(scene.vm.set_boot_context, reg, 0) == EINVAL


def test_boot_registers_reach_the_guest(scene: Scene) -> None:
    assert errno_of(scene.vm.set_boot_context, 0, 0, 1) == EINVAL
    scene.vm.set_boot_context(u.boot_register(u.RegisterSet.X, 5), MAGIC)
    scene.vm.set_boot_context(u.boot_register(u.RegisterSet.SP, 1), RAM + 0x8000)
    scene.vm.start()
    (vcpu,) = scene.vm.linux.handle.vcpus
    assert (vcpu.cpu.x(5), vcpu.cpu.sp, vcpu.cpu.pc) == (MAGIC, RAM + 0x8000, RAM)
    assert errno_of(scene.vm.set_boot_context, 0, 0) == EINVAL
    nothing_is_lost(scene)


def test_functions(scene: Scene) -> None:
    vm = scene.vm
    assert errno_of(vm.add_function, u.FnType.VCPU, bytes(257)) == EINVAL
    assert errno_of(vm.add_function, 9, bytes(4)) == ENOENT
    assert errno_of(vm.add_function, u.FnType.VCPU, bytes(5)) == EINVAL
    assert errno_of(vm.add_vcpu, 0) == EEXIST
    assert errno_of(vm.remove_function, u.FnType.VCPU, bytes(u.FnVcpuArg(1))) == ENOENT
    assert errno_of(vm.remove_function, 9, bytes(4)) == ENOENT
    irqfd = bytes(u.FnIrqfdArg(3, 7, u.IRQFD_LEVEL))
    assert errno_of(vm.add_function, u.FnType.IRQFD, bytes(u.FnIrqfdArg(3, 7, 2))) == EINVAL
    vm.add_function(u.FnType.IRQFD, irqfd)
    assert errno_of(vm.add_function, u.FnType.IRQFD, irqfd) == EEXIST
    vm.remove_function(u.FnType.IRQFD, irqfd)
    good = {"datamatch": 5, "addr": SHARED, "len": 8, "fd": 4, "flags": u.IOEVENTFD_DATAMATCH}
    for change, errno in (({"len": 3}, EINVAL), ({"flags": 2}, EINVAL), ({"len": 0}, EINVAL),
                          ({"addr": (1 << 64) - 1}, EINVAL), ({"fd": -1}, EBADF)):
        assert errno_of(vm.add_function, u.FnType.IOEVENTFD, bytes(u.FnIoeventfdArg(**good | change))) == errno
    nothing_is_lost(scene)


def test_ioeventfd_takes_what_matches(scene: Scene) -> None:
    event = u.FnIoeventfdArg(5, SHARED, 8, 4, u.IOEVENTFD_DATAMATCH)
    scene.vm.add_function(u.FnType.IOEVENTFD, bytes(event))
    scene.vm.start()
    (function,) = (f for (kind, _), f in scene.vm.functions.items() if kind == u.FnType.IOEVENTFD)
    assert scene.write(SHARED, 5) == 0
    assert function.count == 1
    assert scene.write(SHARED, 6) == u.MmioExit(SHARED, (6).to_bytes(8, "little"), True)
    nothing_is_lost(scene)


# -- VCPU_RUN ----------------------------------------------------------------------------------------------------------


def test_run_before_start_and_after_removal(scene: Scene) -> None:
    assert errno_of(scene.vcpu.run) == ENODEV
    scene.vm.start()
    late = scene.vm.add_vcpu(3)
    assert errno_of(late.run) == ENODEV
    scene.vm.remove_function(u.FnType.VCPU, bytes(u.FnVcpuArg(0)))
    assert errno_of(scene.vcpu.run) == ENODEV
    late.close()
    nothing_is_lost(scene)


def test_immediate_exit_and_resume_actions(scene: Scene) -> None:
    scene.vm.start()
    page = scene.vcpu.page
    page.immediate_exit = 1
    assert errno_of(scene.vcpu.run) == EINTR
    page.immediate_exit = 0
    assert scene.read(SHARED) == u.MmioExit(SHARED, bytes(8), False)
    page.mmio.resume_action = 3
    assert errno_of(scene.vcpu.run) == EINVAL
    page.mmio.resume_action = u.ResumeAction.RETRY                   # nothing is bound there yet: once more
    assert scene.vcpu.run() == u.MmioExit(SHARED, bytes(8), False)
    file = scene.bound(SHARED, PAGE, SHARE | RW)
    poke(file, MAGIC)
    page.mmio.resume_action = u.ResumeAction.RETRY
    assert scene.order(0) == MAGIC
    nothing_is_lost(scene)


def test_a_fault_the_guest_gets(scene: Scene) -> None:
    scene.vm.start()
    assert scene.read(SHARED) == u.MmioExit(SHARED, bytes(8), False)
    scene.vcpu.page.mmio.resume_action = u.ResumeAction.FAULT
    assert scene.vcpu.run() == u.PageFaultExit(0, -ENOENT)     # its vectors are at 0, where it has nothing
    (vcpu,) = scene.vm.linux.handle.vcpus
    assert vcpu.cpu.sysreg("ESR_EL1") & 0x3F == 0x10
    assert vcpu.cpu.sysreg("FAR_EL1") == SHARED
    nothing_is_lost(scene)


def test_memory_the_guest_may_not_write(scene: Scene) -> None:
    scene.bound(SHARED, PAGE, SHARE | u.MapFlag.ALLOW_READ)
    scene.bound(LENT, PAGE, LEND | u.MapFlag.ALLOW_READ)
    scene.vm.start()
    assert scene.read(SHARED) == 0
    if scene.design == "library":
        assert scene.write(SHARED, MAGIC) == u.MmioExit(SHARED, MAGIC.to_bytes(8, "little"), True)
        assert scene.order(0) == 0
    else:
        # S25: the exit before was a read, so this is taken for one, and the page is provided again and again.
        with pytest.raises(SyscallFailed, match="leads nowhere"):
            scene.write(SHARED, MAGIC)
        scene.vcpu.page.mmio.is_write = 1                       # user space may say what it likes
        assert scene.vcpu.run() == u.MmioExit(SHARED, MAGIC.to_bytes(8, "little"), True)
        assert scene.order(0) == 0
    assert scene.read(LENT) == u.PageFaultExit(LENT, -EINVAL)   # S24: the hypervisor has no read-only private pages
    nothing_is_lost(scene)


def test_code_cannot_run_in_shared_memory(scene: Scene) -> None:
    file = scene.bound(SHARED, PAGE, SHARE | RWX)
    poke(file, 0xD65F03C0)                                      # ret
    scene.vm.start()
    if scene.design == "library":
        assert scene.order(CALL, SHARED) == u.PageFaultExit(SHARED, -EPERM)
    else:
        with pytest.raises(SyscallFailed, match="leads nowhere"):
            scene.order(CALL, SHARED)
    nothing_is_lost(scene)


def test_after_the_guest_has_gone(scene: Scene) -> None:
    file = scene.bound(LENT, PAGE, LEND | RW)
    scene.vm.start()
    assert scene.write(LENT, MAGIC) == 0
    assert isinstance(scene.order(5), u.StatusExit)
    assert scene.vm.status == VmState.EXITED
    assert isinstance(scene.vcpu.run(), u.StatusExit)
    assert errno_of(scene.vm.start) == ENODEV
    scene.vm.map_mem(scene.memory(PAGE), LENT + PAGE, 0, PAGE, LEND | RW)
    assert peek(file) == 0                                      # a dead guest holds on to nothing, and leaves nothing
    nothing_is_lost(scene)

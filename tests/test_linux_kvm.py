"""The real /dev/kvm: the device, files, slots, and the ends of things."""

from __future__ import annotations

import itertools
import os
import resource
import sys
from errno import EBADF, EEXIST, EINVAL, EIO, EMFILE, ENODEV, ENOENT, ENOTTY, EOPNOTSUPP

import pytest
from kvm_vms import GPA, SECONDS, SIZE, STORE, enough_memory, run
from linux_driver import errno_of, fails, in_child, limit, lowest_free, no_guests, opened

from guest_memfd.errors import BadInput, HostUnavailable, Signalled
from guest_memfd.linux import syscall
from guest_memfd.linux.guest_memfd import GuestMemfd
from guest_memfd.linux.guest_x86 import RESULT, SmallGuest
from guest_memfd.linux.mapping import BUS_ADRERR, PAGE
from guest_memfd.linux.system import System
from guest_memfd.linux.vm import LinuxVm
from guest_memfd.uapi.kvm import PRIVATE, SHARED, Cap, GuestMemfdFlag, MemFlag, MemoryAttributes2
from guest_memfd.uapi.kvm_run import Mmio
from guest_memfd.uapi.memory import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE, Advice

pytest_plugins = ["kvm_fixtures"]
REASON = no_guests()
pytestmark = pytest.mark.skipif(bool(REASON), reason=REASON)


# -- the device --------------------------------------------------------------------------------------------------------


def test_system(system: System) -> None:
    assert system.get_api_version() == 12
    assert system.check_extension(Cap.USER_MEMORY2) == 1
    assert system.check_extension(0x7FFF_FFFF) == 0
    assert system.vcpu_mmap_size >= PAGE
    assert not os.get_inheritable(system.fileno())
    with fails(EINVAL):
        system.create_vm(1 << 40)


def test_a_device_that_is_not_there_is_said_to_be_unavailable(tmp_path: os.PathLike[str]) -> None:
    with pytest.raises(HostUnavailable, match="No such file"):
        System(f"{tmp_path}/kvm")
    with pytest.raises(HostUnavailable, match="is no KVM"):
        System("/dev/null")


# -- files -------------------------------------------------------------------------------------------------------------


def test_a_new_file(vm: LinuxVm) -> None:
    with vm.create_guest_memfd(SIZE, SHARED) as memory:
        assert memory.fstat().size == memory.size == SIZE
        assert memory.fstat().blocks == 0
        assert memory.resident() == 0
        assert not os.get_inheritable(memory.fileno())
        assert "fd" in repr(memory)
    assert "closed" in repr(memory)


@pytest.mark.parametrize("size", [0, 1, PAGE - 1, PAGE + 1, 1 << 63, (1 << 64) - PAGE])
def test_sizes_that_are_refused(vm: LinuxVm, size: int) -> None:
    with fails(EINVAL):
        vm.create_guest_memfd(size, SHARED)


def test_numbers_that_do_not_fit_are_refused_and_not_cut(vm: LinuxVm, guest: SmallGuest) -> None:
    with vm.create_guest_memfd(PAGE, SHARED) as memory:
        for use in (lambda: vm.create_guest_memfd(PAGE, 1 << 64), lambda: vm.create_guest_memfd(1 << 64),
                    lambda: vm.set_user_memory_region2(1 << 32, 4, GPA, PAGE, guest_memfd=memory),
                    lambda: vm.set_user_memory_region(1, 0, 1 << 64, PAGE), lambda: vm.set_memory_attributes(0, 1 << 70, 0),
                    lambda: guest.start(STORE, rax=1 << 64), lambda: guest.start(STORE, rxx=1),
                    lambda: guest.vcpu.enter_real_mode(0, bogus=3), lambda: memory.fallocate(1, 1 << 64, PAGE),
                    lambda: memory.fallocate(1, 0, 1 << 64), lambda: memory.mmap(1 << 64, PAGE),
                    lambda: memory.mmap(0, 1 << 64), lambda: guest.vcpu.pre_fault_memory(1 << 64, PAGE)):
            with pytest.raises(BadInput, match=r"does not fit (32|64) bits|has no field '(rxx|bogus)'"):
                use()


@pytest.mark.parametrize("flags", [1 << bit for bit in (2, 3, 31, 32, 63)])
def test_flags_that_are_refused(vm: LinuxVm, flags: int) -> None:
    with fails(EINVAL):
        vm.create_guest_memfd(PAGE, flags)


def test_fallocate_punch_and_what_is_resident(vm: LinuxVm) -> None:
    with vm.create_guest_memfd(SIZE) as memory:
        memory.fallocate(FALLOC_FL_KEEP_SIZE, 4 * PAGE, 8 * PAGE)
        assert (memory.resident(), memory.resident(0, 5 * PAGE)) == (8, 1)
        memory.punch_hole(6 * PAGE, 2 * PAGE)
        assert memory.resident() == 6
        memory.punch_hole(0, 2 * SIZE)
        assert memory.resident() == 0
        memory.allocate(0, SIZE)
        assert memory.resident() == 16


@pytest.mark.parametrize("offset", [(1 << 31) - PAGE, 1 << 31, (1 << 32) - PAGE, 1 << 32, (1 << 40) - PAGE])
def test_offsets_and_lengths_of_every_width(vm: LinuxVm, offset: int) -> None:
    with vm.create_guest_memfd(1 << 41, SHARED) as memory:
        memory.fallocate(FALLOC_FL_KEEP_SIZE, offset, 2 * PAGE)
        assert [memory.resident(offset + at, PAGE) for at in (-PAGE, 0, PAGE, 2 * PAGE)] == [0, 1, 1, 0]
        memory.fallocate(FALLOC_FL_KEEP_SIZE, 0, PAGE)
        memory.punch_hole(PAGE, offset)                     # all but its second page
        assert (memory.resident(), memory.resident(offset + PAGE, PAGE)) == (2, 1)
        memory.punch_hole(0, offset + 2 * PAGE)
        assert memory.resident() == 0


@pytest.mark.parametrize(("mode", "offset", "nr", "errno"), [
    (0, 0, PAGE, EOPNOTSUPP),
    (FALLOC_FL_PUNCH_HOLE, 0, PAGE, EOPNOTSUPP),
    (FALLOC_FL_ZERO_RANGE, 0, PAGE, EOPNOTSUPP),
    (FALLOC_FL_KEEP_SIZE, 1, PAGE, EINVAL),
    (FALLOC_FL_KEEP_SIZE, 0, PAGE + 1, EINVAL),
    (FALLOC_FL_KEEP_SIZE, 0, 0, EINVAL),
    (FALLOC_FL_KEEP_SIZE, -PAGE, PAGE, EINVAL),
    (FALLOC_FL_KEEP_SIZE, SIZE - PAGE, 2 * PAGE, EINVAL),
])
def test_fallocate_refuses(vm: LinuxVm, mode: int, offset: int, nr: int, errno: int) -> None:
    with vm.create_guest_memfd(SIZE, SHARED) as memory:
        with fails(errno):
            memory.fallocate(mode, offset, nr)
        assert memory.resident() == 0


def test_mapping_is_the_file(vm: LinuxVm) -> None:
    with vm.create_guest_memfd(SIZE, SHARED) as memory, memory.mmap() as mapping, memory.mmap(2 * PAGE, PAGE) as part:
        data = bytes(range(256)) * 32
        mapping.write(PAGE + 7, data)
        assert mapping.read(PAGE + 7, len(data)) == data
        assert part.read(0, 16) == mapping.read(2 * PAGE, 16)
        assert mapping.read(5, 0) == b""
        mapping.write(5, b"")
        into = bytearray(300)
        mapping.readinto(PAGE + 7, into)
        assert bytes(into) == data[:300]
        part.write(0, memoryview(b"abc"))
        assert mapping.read(2 * PAGE, 3) == b"abc"
        memory.punch_hole(2 * PAGE, PAGE)
        assert mapping.read(2 * PAGE, 3) == bytes(3)
        with pytest.raises(BadInput):
            mapping.read(SIZE - 1, 2)
        with pytest.raises(BadInput):
            mapping.write(-1, b"x")


def test_a_touch_past_the_end_is_an_exception_at_the_exact_byte(vm: LinuxVm) -> None:
    with vm.create_guest_memfd(2 * PAGE, SHARED) as memory, memory.mmap(0, 4 * PAGE) as mapping:
        with pytest.raises(Signalled) as caught:
            mapping.write(PAGE + 100, b"z" * (2 * PAGE))
        assert (caught.value.signal, caught.value.address, caught.value.code) \
            == ("SIGBUS", mapping.address + 2 * PAGE, BUS_ADRERR)
        assert mapping.read(PAGE, PAGE) == bytes(100) + b"z" * (PAGE - 100)
        into = bytearray(b"?" * (2 * PAGE))
        with pytest.raises(Signalled):
            mapping.readinto(PAGE + 100, into)
        assert into == b"z" * (PAGE - 100) + b"?" * (PAGE + 100)
        with pytest.raises(Signalled) as caught:
            mapping.read(3 * PAGE + 9, 1)
        assert caught.value.address == mapping.address + 3 * PAGE + 9


def test_a_copy_longer_than_one_call_takes(vm: LinuxVm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(syscall, "MOST", 3 * PAGE)
    data = os.urandom(SIZE)
    with vm.create_guest_memfd(SIZE, SHARED) as memory, memory.mmap(0, 2 * SIZE) as mapping:
        mapping.write(0, data)
        assert mapping.read(0, SIZE) == data
        with pytest.raises(Signalled) as caught:
            mapping.read(7, 2 * SIZE - 7)
        assert caught.value.address == mapping.address + SIZE


def test_a_touch_of_private_memory_is_an_exception(vm: LinuxVm) -> None:
    with vm.create_guest_memfd(SIZE, GuestMemfdFlag.MMAP) as memory, memory.mmap() as mapping:
        memory.allocate(0, SIZE)
        for touch in (lambda: mapping.read(PAGE, 1), lambda: mapping.write(PAGE, b"x")):
            with pytest.raises(Signalled) as caught:
                touch()
            assert caught.value.address == mapping.address + PAGE


def test_mmap_refuses(vm: LinuxVm) -> None:
    with vm.create_guest_memfd(SIZE) as private, fails(ENODEV):
        private.mmap()
    with vm.create_guest_memfd(SIZE, SHARED) as memory:
        for arguments in ({"shared": False}, {"offset": 1}, {"nr": 0}, {"offset": 2 * SIZE}):
            with fails(EINVAL):
                memory.mmap(**arguments)


def test_madvise_remove_is_a_punch(vm: LinuxVm) -> None:
    with vm.create_guest_memfd(SIZE, SHARED) as memory, memory.mmap() as mapping:
        mapping.advise(Advice.POPULATE_WRITE)
        assert memory.resident() == 16
        mapping.advise(Advice.REMOVE, PAGE, 3 * PAGE)
        assert memory.resident() == 13


def test_attributes_in_place_or_not_at_all(vm: LinuxVm) -> None:
    attributes = MemoryAttributes2(0, PAGE, PRIVATE)
    with vm.create_guest_memfd(SIZE, SHARED) as memory:
        in_place = vm.check_extension(Cap.MEMORY_ATTRIBUTES) == 0 and errno_of(
            lambda: memory.set_memory_attributes2(MemoryAttributes2(0, PAGE, 1 << 60))) == EINVAL
        if in_place:
            pytest.skip("this kernel converts in place; what a VM may do then depends on its type")
        with fails(ENOTTY):
            memory.set_memory_attributes2(attributes)
    with fails(ENOTTY):
        vm.set_memory_attributes(GPA, PAGE, PRIVATE)


# -- slots -------------------------------------------------------------------------------------------------------------


def test_binding_and_what_overlaps(vm: LinuxVm) -> None:
    twice = (EINVAL, EEXIST)                # before 7.2, and since

    def bind(slot: int, gpa: int, size: int, **others: object) -> None:
        vm.set_user_memory_region2(slot, MemFlag.GUEST_MEMFD, gpa, size, guest_memfd=memory, **others)

    with vm.create_guest_memfd(SIZE, SHARED) as memory:
        bind(1, GPA, 8 * PAGE)
        with fails(EEXIST):
            bind(2, GPA + 7 * PAGE, PAGE, guest_memfd_offset=8 * PAGE)
        assert errno_of(lambda: bind(2, 2 * GPA, PAGE, guest_memfd_offset=7 * PAGE)) in twice
        bind(2, 2 * GPA, 8 * PAGE, guest_memfd_offset=8 * PAGE)
        for wrong in ({"gpa": 3 * GPA + 1, "size": PAGE}, {"gpa": 3 * GPA, "size": PAGE + 1}, {"gpa": 3 * GPA, "size": 0},
                      {"gpa": 3 * GPA, "size": SIZE, "guest_memfd_offset": PAGE}):
            with fails(EINVAL):
                bind(3, **wrong)
        vm.set_user_memory_region2(1, 0, 0, 0)
        with fails(EINVAL):
            vm.set_user_memory_region2(1, 0, 0, 0)
        bind(1, 4 * GPA, 8 * PAGE)
        with fails(ENOENT):
            vm.get_dirty_log(1, 8 * PAGE)


def test_what_is_no_guest_memory_of_this_vm(system: System, vm: LinuxVm) -> None:
    with system.create_vm() as other, other.create_guest_memfd(SIZE, SHARED) as foreign, fails(EINVAL):
        vm.set_user_memory_region2(1, MemFlag.GUEST_MEMFD, GPA, SIZE, guest_memfd=foreign)
    with fails(EBADF):
        vm.set_user_memory_region2(1, MemFlag.GUEST_MEMFD, GPA, SIZE, guest_memfd=foreign)
    with fails(EBADF):
        vm.set_user_memory_region2(1, MemFlag.GUEST_MEMFD, GPA, SIZE)
    with pytest.raises(BadInput):
        vm.set_user_memory_region2(1, MemFlag.GUEST_MEMFD, GPA, SIZE, guest_memfd="memory")     # type: ignore[arg-type]


def test_the_last_slot(vm: LinuxVm) -> None:
    slots = vm.check_extension(Cap.NR_MEMSLOTS)
    with vm.create_guest_memfd(SIZE, SHARED) as memory:
        with fails(EINVAL):
            vm.set_user_memory_region2(slots, MemFlag.GUEST_MEMFD, GPA, SIZE, guest_memfd=memory)
        vm.set_user_memory_region2(slots - 1, MemFlag.GUEST_MEMFD, GPA, SIZE, guest_memfd=memory)


# -- the ends of things ------------------------------------------------------------------------------------------------


def cached() -> int:
    with open("/proc/meminfo") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("Cached:"))


@pytest.mark.parametrize("order", list(itertools.permutations(("vm", "memory", "vcpu", "mapping"))), ids="-".join)
def test_close_in_every_order(system: System, order: tuple[str, ...]) -> None:
    guest = SmallGuest(system)
    memory = guest.vm.create_guest_memfd(SIZE, SHARED)
    guest.vm.set_user_memory_region2(1, MemFlag.GUEST_MEMFD, GPA, SIZE, guest_memfd=memory)
    things = {"vm": guest.vm, "memory": memory, "vcpu": guest.vcpu, "mapping": memory.mmap()}
    assert run(guest, STORE, rax=9, rdi=GPA) == 9
    for name in order:
        things[name].close()
        things[name].close()
        assert things[name].closed
    guest.close()


@pytest.mark.skipif(not enough_memory(), reason="needs 1 GiB of free memory")
def test_memory_goes_with_the_last_file_or_mapping(vm: LinuxVm) -> None:
    size = 256 << 20
    memory = vm.create_guest_memfd(size, SHARED)
    with memory.mmap() as mapping:
        mapping.advise(Advice.POPULATE_WRITE)
        memory.close()
        vm.close()
        mapping.write(size - 1, b"x")
        before = cached()
    assert before - cached() > size // 2 // 1024, "others use the page cache, too"


def test_used_after_close(system: System) -> None:
    guest = SmallGuest(system)
    memory = guest.vm.create_guest_memfd(SIZE, SHARED)
    mapping = memory.mmap()
    for thing in (mapping, memory, guest):
        thing.close()
    for use in (lambda: mapping.read(0, 1), lambda: mapping.write(0, b"x"), lambda: mapping.advise(Advice.REMOVE),
                memory.fstat, memory.mmap, memory.resident, lambda: memory.punch_hole(0, PAGE),
                lambda: memory.allocate(0, PAGE),
                guest.vcpu.run, guest.vcpu.kick, guest.vcpu.get_regs, lambda: guest.vcpu.answer(b""),
                lambda: guest.vcpu.get_one_reg(0), guest.vm.create_vcpu, lambda: guest.vm.check_extension(0),
                lambda: guest.vm.create_guest_memfd(PAGE), lambda: guest.vm.set_user_memory_region2(0, 0, 0, 0)):
        with fails(EBADF):
            use()


def test_what_is_dropped_is_closed(system: System) -> None:
    before = len(opened())
    with pytest.warns(ResourceWarning) as told:
        system.create_vm().create_guest_memfd(SIZE, SHARED).mmap()
    said = " ".join(str(each.message) for each in told)
    kinds = ("LinuxVm kvm", "GuestMemfd guest_memfd", "Mapping of guest_memfd")
    assert all(f"never closed: <{kind}" in said for kind in kinds)
    assert len(opened()) == before


def test_no_more_descriptors(system: System) -> None:
    with SmallGuest(system) as guest:
        before = opened()
        with limit(resource.RLIMIT_NOFILE, lowest_free()):
            codes = [errno_of(use) for use in (system.create_vm, lambda: guest.vm.create_guest_memfd(PAGE, SHARED),
                                               lambda: guest.vm.create_vcpu(1))]
        assert codes == [EMFILE] * 3
        assert opened() == before
        with guest.vm.create_vcpu(1):
            pass


def test_a_child_may_use_the_file_but_not_the_vm(guest: SmallGuest, bound: GuestMemfd) -> None:
    guest.start(STORE, rdi=GPA, rsi=RESULT)

    with bound.mmap() as mapping:
        assert in_child(lambda: errno_of(lambda: guest.vm.check_extension(1))) == EIO
        assert in_child(lambda: errno_of(lambda: guest.vm.create_guest_memfd(PAGE))) == EIO
        assert in_child(lambda: errno_of(lambda: guest.vcpu.run(SECONDS))) == EIO
        assert in_child(lambda: errno_of(lambda: bound.allocate(0, PAGE))) == 0
        assert bound.resident() == 1
        assert in_child(lambda: mapping.write(PAGE, b"child") or 0) == 0
        assert mapping.read(PAGE, 5) == b"child"
        assert isinstance(guest.vcpu.run(SECONDS), Mmio), "and nothing has changed here"


def test_an_exec_inherits_nothing(vm: LinuxVm) -> None:
    with vm.create_guest_memfd(PAGE, SHARED) as memory:
        number = memory.fileno()

        def listing() -> int:
            looks = f"import os, sys; sys.exit(os.path.exists('/proc/self/fd/{number}'))"
            os.execv(sys.executable, [sys.executable, "-S", "-c", looks])

        assert in_child(listing) == 0

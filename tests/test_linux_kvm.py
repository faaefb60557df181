"""linux against the /dev/kvm of the machine the tests run on; skipped, with the reason, where there is none.

Nothing here waits without an end: every KVM_RUN has a timeout, every child is waited for with one.
"""

from __future__ import annotations

import array
import ctypes
import gc
import itertools
import os
import resource
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EBADF, EEXIST, EFAULT, EINTR, EINVAL, EIO, EMFILE, ENODEV, ENOENT, ENOTTY, EOPNOTSUPP
from pathlib import Path
from typing import Any

import pytest
from linux_driver import errno_of, fails, in_child, limit, lowest_free, no_guests, nothing_stays_open, opened

from guest_memfd.errors import BadInput, HostUnavailable, Signalled, SyscallFailed
from guest_memfd.linux import guest_x86, syscall
from guest_memfd.linux.abi.memory import Advice
from guest_memfd.linux.guest_memfd import GuestMemfd
from guest_memfd.linux.guest_x86 import RESULT, SmallGuest
from guest_memfd.linux.kick import KICK, this_thread
from guest_memfd.linux.mapping import BUS_ADRERR, PAGE
from guest_memfd.linux.system import System
from guest_memfd.linux.vm import LinuxVm
from guest_memfd.uapi.kvm import PRIVATE, SHARED, Cap, GuestMemfdFlag, MemFlag, MemoryAttributes2
from guest_memfd.uapi.kvm_run import Intr, MemoryFault, Mmio, Unknown
from guest_memfd.uapi.memory import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE

GPA, SIZE = 0x100_0000, 16 * PAGE
SECONDS = 300.0
"""Far more than any program here needs."""

STORE = bytes.fromhex("488907" "488906" "ebfe")            # mov [rdi], rax; mov [rsi], rax; jmp .
LOAD = bytes.fromhex("488b07" "488906" "ebfe")             # mov rax, [rdi]; mov [rsi], rax; jmp .
READ_DEVICE = bytes.fromhex("488b07" "50" "59" "48890e" "ebfe")    # mov rax, [rdi]; push rax; pop rcx; mov [rsi], rcx; jmp .
FOR_EVER = bytes.fromhex("ebfe")                            # jmp .
COUNT = bytes.fromhex("48ffc0" "488907" "ebf8")            # inc rax; mov [rdi], rax; jmp the inc


REASON = no_guests()
pytestmark = pytest.mark.skipif(bool(REASON), reason=REASON)


@pytest.fixture(autouse=True)
def nothing_leaks() -> Iterator[None]:
    with nothing_stays_open():
        yield


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


def run(guest: SmallGuest, code: bytes, **registers: int) -> int:
    """Run *code* until it stores its result; the result."""
    guest.start(code, rsi=RESULT, **registers)
    out = guest.vcpu.run(SECONDS)
    assert isinstance(out, Mmio), out
    assert (out.phys_addr, out.size, out.is_write) == (RESULT, 8, True)
    return int.from_bytes(out.data, "little")


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


# -- a guest -----------------------------------------------------------------------------------------------------------

def test_the_host_sees_what_the_guest_stores(guest: SmallGuest, bound: GuestMemfd) -> None:
    value = 0x1122_3344_5566_7788
    with bound.mmap() as mapping:
        assert run(guest, STORE, rax=value, rdi=GPA + 3 * PAGE + 8) == value
        assert mapping.read(3 * PAGE + 8, 8) == value.to_bytes(8, "little")
        assert bound.resident() == 1
        mapping.write(5 * PAGE, b"from us!")
        assert run(guest, LOAD, rdi=GPA + 5 * PAGE) == int.from_bytes(b"from us!", "little")


def test_a_hole_is_seen_by_guest_and_host(guest: SmallGuest, bound: GuestMemfd) -> None:
    with bound.mmap() as mapping:
        assert run(guest, STORE, rax=77, rdi=GPA) == 77
        bound.punch_hole(0, PAGE)
        assert mapping.read(0, 8) == bytes(8)
        mapping.advise(Advice.REMOVE, 0, PAGE)
        assert run(guest, STORE, rax=78, rdi=GPA) == 78
        bound.punch_hole(0, PAGE)
        assert run(guest, LOAD, rdi=GPA) == 0
        assert run(guest, STORE, rax=79, rdi=GPA) == 79
        assert mapping.read(0, 1) == b"\x4f"


def test_a_device_read_is_answered_and_finished_before_registers_change(guest: SmallGuest) -> None:
    guest.start(READ_DEVICE, rdi=RESULT + PAGE, rsi=RESULT)
    out = guest.vcpu.run(SECONDS)
    assert out == Mmio(RESULT + PAGE, 8, False, b"")
    guest.vcpu.answer(b"\x2a\x01")
    assert guest.vcpu.run(SECONDS) == Mmio(RESULT, 8, True, (0x12A).to_bytes(8, "little"))
    with fails(EINVAL):
        guest.vcpu.answer(b"")
    # The same read, but registers change while it waits: its answer must not end up in the new ones, nor move them.
    guest.start(READ_DEVICE, rdi=RESULT + PAGE, rsi=RESULT)
    guest.vcpu.run(SECONDS)
    guest.vcpu.answer(b"\xff" * 8)
    regs = guest.vcpu.get_regs()
    regs.rcx, regs.rip = 0x51, guest_x86.CODE + 5           # at the store of the result
    guest.vcpu.set_regs(regs)
    assert guest.vcpu.run(SECONDS) == Mmio(RESULT, 8, True, (0x51).to_bytes(8, "little"))


def test_a_load_outside_of_every_slot_is_a_device_s(guest: SmallGuest, bound: GuestMemfd) -> None:
    guest.start(LOAD, rdi=GPA + SIZE, rsi=RESULT)
    assert guest.vcpu.run(SECONDS) == Mmio(GPA + SIZE, 8, False, b"")


def test_private_memory_of_this_vm_is_the_guest_s_alone(guest: SmallGuest) -> None:
    with guest.vm.create_guest_memfd(SIZE, GuestMemfdFlag.MMAP) as memory, memory.mmap() as mapping:
        guest.vm.set_user_memory_region2(1, MemFlag.GUEST_MEMFD, GPA, SIZE, guest_memfd=memory)
        assert run(guest, STORE, rax=5, rdi=GPA) == 5
        assert run(guest, LOAD, rdi=GPA) == 5
        with pytest.raises(Signalled):
            mapping.read(0, 1)


def test_a_file_that_is_gone_is_a_memory_fault(guest: SmallGuest) -> None:
    with guest.vm.create_guest_memfd(SIZE, SHARED) as memory:
        guest.vm.set_user_memory_region2(1, MemFlag.GUEST_MEMFD, GPA, SIZE, guest_memfd=memory)
        assert run(guest, STORE, rax=5, rdi=GPA) == 5
    for page in (0, 1):                     # one it had, one it never touched
        guest.start(STORE, rdi=GPA + page * PAGE + 8, rsi=RESULT)
        for _ in range(2):
            assert guest.vcpu.run(SECONDS) == MemoryFault(0, GPA + page * PAGE, PAGE, EFAULT)
    guest.vm.set_user_memory_region2(1, 0, 0, 0)
    with guest.vm.create_guest_memfd(SIZE, SHARED) as fresh:
        guest.vm.set_user_memory_region2(1, MemFlag.GUEST_MEMFD, GPA, SIZE, guest_memfd=fresh)
        assert run(guest, LOAD, rdi=GPA) == 0


def test_memory_that_is_not_there_at_all_is_an_efault_without_more(guest: SmallGuest) -> None:
    address = syscall.mmap(-1, 0, PAGE, 3, 0x22)
    syscall.munmap(address, PAGE)
    guest.vm.set_user_memory_region(2, 0, GPA, PAGE, address)
    guest.start(LOAD, rdi=GPA, rsi=RESULT)
    out = guest.vcpu.run(SECONDS)
    assert isinstance(out, Unknown)
    assert out.errno == EFAULT


def test_real_mode_starts_where_it_is_told(guest: SmallGuest) -> None:
    # A real-mode segment ends below our slot, so this one needs memory at 0.
    address = syscall.mmap(-1, 0, PAGE, 3, 0x22)
    try:
        ctypes.memmove(address + 0x100, bytes.fromhex("a3000ff4"), 4)   # mov [0xf00], ax; hlt
        guest.vm.set_user_memory_region(2, 0, 0, PAGE, address)
        guest.vcpu.enter_real_mode(0x100, rax=0xBEEF)
        guest.vcpu.run(SECONDS)
        assert ctypes.string_at(address + 0xF00, 2) == b"\xef\xbe"
    finally:
        guest.close()
        syscall.munmap(address, PAGE)


# -- coming back -------------------------------------------------------------------------------------------------------

def test_a_timeout_ends_a_loop_and_the_loop_goes_on_afterwards(guest: SmallGuest, bound: GuestMemfd) -> None:
    guest.start(COUNT, rdi=GPA)
    with bound.mmap() as mapping:
        seen = []
        for _ in range(3):
            # A guest that nobody gave the CPU meanwhile has not counted.
            while True:
                start = time.monotonic()
                assert guest.vcpu.run(0.05) == Intr()
                assert time.monotonic() - start > 0.04
                now = int.from_bytes(mapping.read(0, 8), "little")
                if now > (seen or [0])[-1]:
                    break
            seen.append(now)


@pytest.mark.parametrize("timeout", [0, -1.0, 1e-9, 1e-12])
def test_no_time_at_all_is_an_exit_at_once(guest: SmallGuest, timeout: float) -> None:
    def briefly() -> int:
        with System() as system, SmallGuest(system) as own:
            own.start(FOR_EVER)
            return int(own.vcpu.run(timeout) != Intr())

    assert in_child(briefly) == 0                       # a timer of 0 is none at all, and the loop would never end


def test_a_timeout_that_does_not_come_leaves_nothing_behind(guest: SmallGuest, bound: GuestMemfd) -> None:
    for value in range(50):
        guest.start(STORE, rax=value, rdi=GPA, rsi=RESULT)
        while (told := guest.vcpu.run(0.02)) == Intr():
            pass                                        # the clock was faster than a busy machine
        assert isinstance(told, Mmio)
    time.sleep(0.03)
    guest.start(STORE, rdi=GPA, rsi=RESULT)
    assert isinstance(guest.vcpu.run(), Mmio), "no signal of before is pending"


def test_immediate_exit(guest: SmallGuest) -> None:
    guest.start(FOR_EVER)
    guest.vcpu.immediate_exit = True
    assert guest.vcpu.run(SECONDS) == Intr()
    assert guest.vcpu.immediate_exit
    guest.vcpu.immediate_exit = False
    start = time.monotonic()
    assert guest.vcpu.run(0.05) == Intr()
    assert time.monotonic() - start > 0.04


def test_finishing_an_access_leaves_immediate_exit_as_it_was(guest: SmallGuest) -> None:
    for wanted in (True, False):
        guest.vcpu.immediate_exit = False
        guest.start(STORE, rdi=RESULT + PAGE, rsi=RESULT)
        assert isinstance(guest.vcpu.run(SECONDS), Mmio)
        guest.vcpu.immediate_exit = wanted
        guest.vcpu.complete()
        assert guest.vcpu.immediate_exit is wanted
    assert isinstance(guest.vcpu.run(SECONDS), Mmio)


@pytest.mark.parametrize("timeout", [float("nan"), float("inf"), 1e300])
def test_times_that_are_none(guest: SmallGuest, timeout: float) -> None:
    guest.start(FOR_EVER)
    with pytest.raises(BadInput, match="None is for ever"):
        guest.vcpu.run(timeout)


def test_a_child_has_timers_of_its_own(guest: SmallGuest) -> None:
    ours = this_thread()

    def child() -> int:
        with System() as system, SmallGuest(system) as own:
            own.start(FOR_EVER)
            own.vcpu.run(0.01)
            theirs = this_thread()
            return int(theirs is ours or (theirs.process, theirs.tid) != (os.getpid(), os.getpid()))

    guest.start(FOR_EVER)
    guest.vcpu.run(0.01)
    assert in_child(child) == 0


def test_threads_that_have_ended_leave_no_timer(guest: SmallGuest) -> None:
    timers = Path("/proc/self/timers")
    if not timers.exists():
        pytest.skip("this kernel does not list timers (CONFIG_CHECKPOINT_RESTORE)")

    def once() -> None:
        guest.start(FOR_EVER)
        guest.vcpu.run(0.001)

    once()
    gc.collect()
    before = timers.read_text().count("signal:")
    for _ in range(5):
        thread = threading.Thread(target=once)
        thread.start()
        thread.join()
    gc.collect()
    assert timers.read_text().count("signal:") <= before + 1            # the vCPU remembers the thread that ran it last


def test_creating_a_vm_is_tried_again_after_a_signal(system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = syscall.ioctl, []

    def interrupted(*arguments: Any, **named: Any) -> int:
        calls.append(named["call"])
        if len(calls) == 1:
            raise SyscallFailed(EINTR, "KVM_CREATE_VM")
        return real(*arguments, **named)

    monkeypatch.setattr(syscall, "ioctl", interrupted)
    with system.create_vm():
        assert calls[:2] == ["KVM_CREATE_VM"] * 2


@pytest.mark.parametrize("data", [bytearray(b"ab"), memoryview(b"ab"), array.array("B", b"ab")])
def test_what_has_bytes_is_taken_for_them(vm: LinuxVm, data: Any) -> None:
    with vm.create_guest_memfd(PAGE, SHARED) as memory, memory.mmap() as mapping:
        mapping.write(0, data)
        assert mapping.read(0, 3) == b"ab\0"
        with pytest.raises(TypeError):
            mapping.write(0, 1 << 20)                   # which bytes() would make zeros of


def test_another_thread_kicks(guest: SmallGuest) -> None:
    guest.start(FOR_EVER)
    out: list[object] = []
    thread = threading.Thread(target=lambda: out.append(guest.vcpu.run(SECONDS)))
    thread.start()
    time.sleep(0.05)
    guest.vcpu.kick()
    thread.join(SECONDS / 2)
    assert out == [Intr()]
    guest.vcpu.immediate_exit = False
    assert guest.vcpu.run(0.01) == Intr()       # by this thread, whose timer is another


def test_kicks_that_come_too_late_do_not_end_the_runs_after(guest: SmallGuest, bound: GuestMemfd) -> None:
    guest.start(FOR_EVER)
    guest.vcpu.run(0.01)
    for _ in range(3):
        this_thread().kick()
    assert guest.vcpu.run() == Intr()
    guest.start(STORE, rdi=GPA, rsi=RESULT)
    assert isinstance(guest.vcpu.run(), Mmio)


def test_a_timer_that_ran_out_too_late_is_taken_back() -> None:
    thread = this_thread()
    thread.arm(0.001)
    time.sleep(0.05)
    assert KICK in signal.sigpending()
    thread.disarm()
    assert KICK not in signal.sigpending()


def test_an_efault_that_says_no_more_is_not_the_exit_before(guest: SmallGuest, monkeypatch: pytest.MonkeyPatch) -> None:
    class Libc:
        def ioctl(self, fd: int, request: int, word: int) -> int:
            ctypes.set_errno(EFAULT)
            return -1

    guest.start(STORE, rdi=RESULT + PAGE)
    assert isinstance(guest.vcpu.run(SECONDS), Mmio)
    monkeypatch.setattr(syscall, "libc", Libc())            # a kernel that leaves exit_reason as it was
    assert guest.vcpu.run() == Unknown(6, EFAULT)


def test_a_python_signal_handler_runs(guest: SmallGuest) -> None:
    def stop(number: int, frame: object) -> None:
        raise InterruptedError

    old = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    try:
        guest.start(FOR_EVER)
        with pytest.raises(InterruptedError):
            guest.vcpu.run(SECONDS)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    assert guest.vcpu.run(0.01) == Intr()


def test_statistics(guest: SmallGuest) -> None:
    before = guest.vcpu.statistics()["exits"]
    guest.start(STORE, rdi=RESULT + PAGE, rsi=RESULT)
    for _ in range(2):
        guest.vcpu.run(SECONDS)
    assert guest.vcpu.statistics()["exits"] > before
    assert "remote_tlb_flush" in guest.vm.statistics()
    assert not [name for name in guest.vcpu.statistics() if name.endswith("_hist")]         # more than one number each


def test_what_there_is_not(guest: SmallGuest) -> None:
    with fails(EOPNOTSUPP):
        guest.vcpu.inject_external_abort()
    with pytest.raises(SyscallFailed):
        guest.vcpu.get_one_reg(0)
    if not guest.vm.check_extension(Cap.PRE_FAULT_MEMORY):
        with fails(EOPNOTSUPP):
            guest.vcpu.pre_fault_memory(GPA, PAGE)
    with fails(EINVAL):
        guest.vm.create_vcpu(1 << 20)
    with fails(EEXIST):
        guest.vm.create_vcpu(0)
    with pytest.raises(BadInput):
        guest.start(bytes(guest_x86.SIZE))


# -- fallocate and signals ---------------------------------------------------------------------------------------------

@contextmanager
def ticking(seconds: float) -> Iterator[list[int]]:
    """A signal every *seconds*, to a handler that only counts."""
    count = [0]

    def tick(number: int, frame: object) -> None:
        count[0] += 1

    old = signal.signal(signal.SIGALRM, tick)
    signal.setitimer(signal.ITIMER_REAL, seconds, seconds)
    try:
        yield count
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


BIG = 512 << 20


def enough_memory() -> bool:
    return os.sysconf("SC_AVPHYS_PAGES") * PAGE > 2 * BIG


@pytest.mark.skipif(not enough_memory(), reason="needs 1 GiB of free memory")
def test_fallocate_that_is_interrupted_keeps_what_it_has_and_goes_on_if_asked(vm: LinuxVm) -> None:
    with vm.create_guest_memfd(BIG, SHARED) as memory:
        with ticking(0.005), fails(EINTR):
            memory.fallocate(FALLOC_FL_KEEP_SIZE, 0, BIG)
        partly = memory.resident()
        assert 0 < partly < BIG // PAGE
        assert memory.resident(0, partly * PAGE) == partly, "from the front, without a hole"
        with ticking(0.005) as count:
            memory.allocate(0, BIG)
        assert memory.resident() == BIG // PAGE
        assert count[0] > 1


def test_a_handler_that_raises_ends_allocate(vm: LinuxVm) -> None:
    def stop(number: int, frame: object) -> None:
        raise InterruptedError

    with vm.create_guest_memfd(BIG, SHARED) as memory:
        old = signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, 0.005)
        try:
            with pytest.raises(InterruptedError):
                memory.allocate(0, BIG)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, old)
        assert memory.resident() < BIG // PAGE


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
            os.execv("/usr/bin/env", ["env", "test", "!", "-e", f"/proc/self/fd/{number}"])

        assert in_child(listing) == 0

"""Guests on the real /dev/kvm: what they run, how one comes back from them, signals."""

from __future__ import annotations

import array
import ctypes
import gc
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EEXIST, EFAULT, EINTR, EINVAL, EOPNOTSUPP
from pathlib import Path
from typing import Any

import pytest
from kvm_vms import BIG, GPA, SECONDS, SIZE, STORE, enough_memory, run
from linux_driver import fails, in_child, no_guests

from guest_memfd.errors import BadInput, Signalled, SyscallFailed
from guest_memfd.linux import guest_x86, syscall
from guest_memfd.linux.guest_memfd import GuestMemfd
from guest_memfd.linux.guest_x86 import RESULT, SmallGuest
from guest_memfd.linux.kick import KICK, this_thread
from guest_memfd.linux.mapping import PAGE
from guest_memfd.linux.system import System
from guest_memfd.linux.vm import LinuxVm
from guest_memfd.uapi.kvm import SHARED, Cap, GuestMemfdFlag, MemFlag
from guest_memfd.uapi.kvm_run import Intr, MemoryFault, Mmio, Unknown
from guest_memfd.uapi.memory import FALLOC_FL_KEEP_SIZE, Advice

LOAD = bytes.fromhex("488b07" "488906" "ebfe")             # mov rax, [rdi]; mov [rsi], rax; jmp .
READ_DEVICE = bytes.fromhex("488b07" "50" "59" "48890e" "ebfe")    # mov rax, [rdi]; push rax; pop rcx; mov [rsi], rcx; jmp .
FOR_EVER = bytes.fromhex("ebfe")                            # jmp .
COUNT = bytes.fromhex("48ffc0" "488907" "ebf8")            # inc rax; mov [rdi], rax; jmp the inc


pytest_plugins = ["kvm_fixtures"]
REASON = no_guests()
pytestmark = pytest.mark.skipif(bool(REASON), reason=REASON)


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
    with pytest.raises(BadInput, match="None is without an end"):
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

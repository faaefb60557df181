"""Threads of a VMM: every call into a machine is one after the other, and a guest that loops is in nobody's way."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from threaded import NR, PAGE, Vmm, vmm

from guest_memfd.asm.arm64.asm import assemble
from guest_memfd.errors import BadInput, SyscallFailed
from guest_memfd.machine.board.lock import Turns
from guest_memfd.machine.boot import Config, Machine
from guest_memfd.machine.dev.file import Serialised
from guest_memfd.machine.primitives.host import EmulatedHost
from guest_memfd.uapi import kvm_arm64, kvm_run
from guest_memfd.uapi.kvm import SHARED, MemFlag

pytest.importorskip("unicorn")

HYPERVISORS = ("kvm", "pkvm", "gunyah")


def live(made: Vmm, changes: int, seed: int) -> None:
    made.run(changes, seed)
    made.end()
    assert made.done


@pytest.mark.parametrize("vcpus", [1, 3])
@pytest.mark.parametrize("name", HYPERVISORS)
def test_memory_changes_while_guests_run(name: str, vcpus: int) -> None:
    live(vmm(name, vcpus), 30, seed=1)


@pytest.mark.long
@pytest.mark.parametrize("name", HYPERVISORS)
def test_memory_changes_for_long(name: str) -> None:
    """GUEST_MEMFD_CHANGES: how many; 5,000 are most of a minute."""
    live(vmm(name, 4), int(os.environ.get("GUEST_MEMFD_CHANGES", "500")), seed=2)


# -- one vCPU ----------------------------------------------------------------------------------------------------------

BASE = 0x8000_0000


class Looping:
    """A guest of plain KVM that loops for ever, and a thread that runs it without a limit."""

    def __init__(self, source: str = "_start: b _start") -> None:
        self.machine = Machine("kvm", Config(ram=32 << 20))
        self.vm = self.machine.open("/dev/kvm").create_vm()
        self.file = self.vm.create_guest_memfd(NR * PAGE, SHARED)
        self.vm.set_user_memory_region2(0, MemFlag.GUEST_MEMFD, BASE, NR * PAGE, guest_memfd=self.file)
        with self.file.mmap() as mapping:
            mapping.write(0, assemble(source, BASE, "test").data)
        self.vcpu = self.vm.create_vcpu()
        self.vcpu.set_one_reg(kvm_arm64.PC, BASE)
        self.out: list[Any] = []
        self.threads: list[threading.Thread] = []

    def run(self) -> None:
        """Another thread in KVM_RUN; it is inside when this returns."""
        thread = threading.Thread(target=lambda: self.out.append(self.vcpu.run()), daemon=True)
        self.threads.append(thread)
        before = self.vcpu.statistics()["exits"]
        thread.start()
        while len(self.threads) == 1 and self.vcpu.statistics()["exits"] == before:
            pass

    def join(self) -> None:
        """All of them come back."""
        for thread in self.threads:
            thread.join()


def test_a_punch_gets_in_while_the_guest_loops() -> None:
    guest = Looping()
    guest.run()
    guest.file.fallocate(1, PAGE, PAGE)
    guest.file.punch_hole(PAGE, PAGE)
    with guest.file.mmap() as mapping:
        mapping.write(2 * PAGE, b"here")
    assert not guest.out
    guest.vcpu.immediate_exit = True
    guest.join()
    assert guest.out == [kvm_run.Intr()]


def test_the_text_of_a_looping_guest_may_be_changed() -> None:
    guest = Looping()
    guest.run()
    with guest.file.mmap() as mapping:
        mapping.write(4, assemble("_start: movz x1, #0x0900, lsl #16\n str x1, [x1]", BASE, "test").data)
        mapping.write(0, assemble("_start: nop", BASE, "test").data)
    guest.join()
    assert guest.out == [kvm_run.Mmio(0x900_0000, 8, True, (0x900_0000).to_bytes(8, "little"))]


@pytest.mark.parametrize("source", ["_start: b _start", "_start: wfi\n b _start"])
def test_a_thread_makes_another_come_back(source: str) -> None:
    guest = Looping(source)
    thread = threading.Thread(target=lambda: guest.out.append(guest.vcpu.run(1e6)), daemon=True)
    thread.start()
    guest.vcpu.immediate_exit = True
    thread.join()
    assert guest.out == [kvm_run.Intr()]


def test_a_second_thread_waits_for_the_vcpu() -> None:
    guest = Looping()
    guest.run()
    guest.run()
    asked = threading.Thread(target=lambda: guest.out.append(guest.vcpu.get_one_reg(kvm_arm64.PC)), daemon=True)
    asked.start()
    guest.file.punch_hole(PAGE, PAGE)
    assert not guest.out
    guest.vcpu.immediate_exit = True
    guest.join()
    asked.join()
    assert sorted(guest.out, key=str) == [BASE, kvm_run.Intr(), kvm_run.Intr()]


def test_a_vcpu_that_is_closed_while_it_runs_goes_when_it_comes_back() -> None:
    guest = Looping()
    guest.run()
    for owner in (guest.vcpu, guest.vm, guest.file):
        owner.close()
    assert [vm.vmid for vm in guest.machine.vms] == [1]
    with pytest.raises(SyscallFailed, match="EBADF"):
        guest.vcpu.answer(b"")
    guest.vcpu.immediate_exit = True
    guest.join()
    assert guest.out == [kvm_run.Intr()]
    assert not guest.machine.vms
    assert guest.machine.audit() == []


# -- the lock ----------------------------------------------------------------------------------------------------------


def every(kind: type[Serialised]) -> list[type[Serialised]]:
    return [kind, *(below for sub in kind.__subclasses__() for below in every(sub))]


def test_every_call_of_every_object_of_a_device_takes_its_turn() -> None:
    missed = [f"{kind.__name__}.{name}" for kind in every(Serialised)[1:] for name, thing in vars(kind).items()
              if not name.startswith("_") and callable(thing) and not hasattr(thing, "__wrapped__")]
    assert missed == []


def waits(lock: Turns, names: list[str], name: str) -> threading.Thread:
    """A thread that waits for its turn, behind all that wait already."""
    def take() -> None:
        with lock, lock:
            names.append(name)
    before = len(lock._queue)
    thread = threading.Thread(target=take, daemon=True)
    thread.start()
    while len(lock._queue) == before:
        pass
    return thread


def test_turns_are_taken_in_the_order_in_which_threads_came() -> None:
    lock, names = Turns(), list[str]()
    with lock, lock:
        threads = [waits(lock, names, name) for name in "abc"]
        assert lock.wanted
        assert not names
        lock.give_way()
        assert names == ["a", "b", "c"]
        lock.give_way()
    for thread in threads:
        thread.join()
    assert not lock.wanted


@pytest.mark.parametrize("name", ["kvm", "pkvm", "gunyah"])
def test_a_machine_that_was_interrupted_can_be_closed_and_no_more(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    vm = vmm(name, 1)
    with vm.vm, vm.ram, vm.window, vm.vcpus[0]:
        monkeypatch.setattr(EmulatedHost, "perform", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            vm.ram.punch_hole(0, PAGE)
        monkeypatch.undo()
        with pytest.raises(BadInput, match="was interrupted half way"):
            vm.ram.punch_hole(0, PAGE)
    assert vm.ram.closed


def _interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def test_who_gave_way_has_his_turn_again_before_a_signal_is_raised() -> None:
    lock = Turns()
    inside, go = threading.Event(), threading.Event()

    def other() -> None:
        with lock:
            inside.set()
            go.wait()
    thread = threading.Thread(target=other, daemon=True)

    def interrupt() -> None:
        inside.wait()
        while not lock.wanted:                          # the main thread waits to have it back
            pass
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        go.set()
    killer = threading.Thread(target=interrupt, daemon=True)

    def gives_way() -> None:
        with lock:
            thread.start()
            while not lock.wanted:
                pass
            killer.start()
            lock.give_way()

    with pytest.raises(KeyboardInterrupt):
        gives_way()
    assert lock._owner is None
    assert lock._depth == 0
    for each in (thread, killer):
        each.join()


@contextmanager
def held(lock: Turns) -> Iterator[None]:
    """Another thread has *lock* while this lasts."""
    has_it, done = threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            has_it.set()
            done.wait()
    holder = threading.Thread(target=hold, daemon=True)
    holder.start()
    has_it.wait()
    try:
        yield
    finally:
        done.set()
        holder.join()


def test_a_signal_while_waiting_leaves_the_queue() -> None:
    lock, names = Turns(), list[str]()

    def interrupt() -> None:
        while not lock.wanted:
            pass
        # Again, if it came just before the main thread began to wait: then it is seen only when that has ended.
        while lock.wanted:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            time.sleep(1)
    killer = threading.Thread(target=interrupt, daemon=True)
    with held(lock):
        killer.start()
        with pytest.raises(KeyboardInterrupt), lock:
            raise AssertionError("it is held")
        assert not lock.wanted
        thread = waits(lock, names, "next")
    for one in (killer, thread):
        one.join()
    with lock:
        assert names == ["next"]


class Interrupted(deque[Any]):
    """A queue in which a signal comes as soon as a thread is in it."""

    def append(self, item: Any) -> None:
        super().append(item)
        raise KeyboardInterrupt


def test_a_signal_between_two_instructions_leaves_no_one_in_the_queue() -> None:
    lock = Turns()
    with held(lock):
        lock._queue = Interrupted()
        with pytest.raises(KeyboardInterrupt), lock:
            raise AssertionError("it is held")
        assert not lock.wanted
    assert lock._owner is None
    with lock:
        assert lock._depth == 1

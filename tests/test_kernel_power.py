"""Who reads or writes pages behind everybody's back: hibernation, /proc/kcore, and the page allocator's checks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from errno import EAGAIN, EBUSY, EINVAL, ENOMEM, EOPNOTSUPP, EPERM
from typing import Any

import pytest

from guest_memfd.machine.hw.arm64.tlb import Tlb
from guest_memfd.machine.hw.buddy import Buddy
from guest_memfd.machine.hw.ram import Ram
from guest_memfd.machine.linux.kcore import read_kcore
from guest_memfd.machine.linux.linear_map import LinearMap
from guest_memfd.machine.linux.page_poison import PAGE_POISON, PageChecks
from guest_memfd.machine.linux.snapshot import (
    NOTIFY_BAD,
    NOTIFY_DONE,
    NOTIFY_OK,
    NOTIFY_STOP_MASK,
    Event,
    HibernationImage,
    Notifier,
    NotifierChain,
    Policy,
    SnapshotPower,
    hibernation_available,
    notifier_from_errno,
    notifier_to_errno,
    safe_copy_page,
    saveable_page,
)
from guest_memfd.words.units import PAGE

BASE = 0x8000_0000
PAGES = 16


class Died(Exception):  # noqa: N818 - named after what happened
    """A plain access that nothing fixes up."""


class Machine:
    """Sixteen pages that Linux knows, a linear map over them, and a record of what was done in which order."""

    def __init__(self, **options: Any) -> None:
        self.ram = Ram(32 << 20)
        self.buddy = Buddy(self.ram, BASE + (16 << 20), 16 << 20)
        self.map = LinearMap(self.ram, self.buddy, [Tlb()], **options)
        self.free, self.nosave, self.offline, self.guard, self.reserved, self.hwpoison, self.no_ram = (
            set[int]() for _ in range(7))
        self.donated: set[int] = set()
        self.done: list[str] = []
        self.room = PAGES
        self.freeze = self.devices = 0
        for pa in self.pages():
            self.ram.fill(pa, PAGE, 1 + (pa - BASE) // PAGE)

    def pages(self) -> Iterable[int]:
        return range(BASE, BASE + PAGES * PAGE, PAGE)

    def is_free(self, pa: int) -> bool:
        return pa in self.free

    def is_nosave(self, pa: int) -> bool:
        return pa in self.nosave

    def is_offline(self, pa: int) -> bool:
        return pa in self.offline

    def is_guard(self, pa: int) -> bool:
        return pa in self.guard

    def is_reserved(self, pa: int) -> bool:
        return pa in self.reserved

    def is_hwpoison(self, pa: int) -> bool:
        return pa in self.hwpoison

    def is_ram(self, pa: int) -> bool:
        return self.ram.contains(pa) and pa not in self.no_ram

    def kernel_page_present(self, pa: int) -> bool:
        return self.map.kernel_page_present(pa)

    def set_direct_map_default_noflush(self, pa: int) -> int:
        self.done.append("default")
        return self.map.set_direct_map_default_noflush(pa)

    def set_direct_map_invalid_noflush(self, pa: int) -> int:
        self.done.append("invalid")
        return self.map.set_direct_map_invalid_noflush(pa)

    def flush_tlb_kernel_page(self, pa: int) -> None:
        self.done.append("flush")
        self.map.flush_tlb_kernel_range(self.map.va(pa), self.map.va(pa) + PAGE)

    def _access(self, pa: int) -> None:
        if not self.map.kernel_page_present(pa) or pa in self.donated:
            raise Died(pa)

    def do_copy_page(self, pa: int) -> bytes:
        self._access(pa)
        self.done.append("copy")
        return self.ram.read(pa, PAGE)

    def memset_page(self, pa: int, byte: int) -> None:
        self._access(pa)
        self.done.append(f"memset {byte:#x}")
        self.ram.fill(pa, PAGE, byte)

    def memchr_inv_page(self, pa: int, byte: int) -> bytes | None:
        self._access(pa)
        self.done.append("check")
        data = self.ram.read(pa, PAGE)
        return None if data == bytes((byte,)) * PAGE else data

    def copy_from_kernel_nofault(self, pa: int, nr: int) -> bytes | None:
        page = pa & -PAGE
        return self.ram.read(pa, nr) if self.map.kernel_page_present(page) and page not in self.donated else None

    def free_pages(self) -> int:
        return self.room

    def freeze_processes(self) -> int:
        self.done.append("freeze")
        return self.freeze

    def thaw_processes(self) -> None:
        self.done.append("thaw")

    def suspend_devices(self) -> int:
        self.done.append("devices off")
        return self.devices

    def resume_devices(self) -> None:
        self.done.append("devices on")


def page(index: int) -> int:
    return BASE + index * PAGE


# -- the image ---------------------------------------------------------------------------------------------------


def test_everything_allocated_is_saved_holes_included() -> None:
    machine = Machine()
    machine.map.set_direct_map_invalid_noflush(page(3))
    machine.ram.zero(page(5), PAGE)
    image = SnapshotPower().hibernate(machine)
    assert isinstance(image, HibernationImage)
    assert sorted(image.pages) == [pa for pa in machine.pages() if pa != page(5)]
    assert image.zero == {page(5)}
    assert image.pages[page(3)] == b"\x04" * PAGE                           # the hole's contents are in it
    assert page(5) in image
    assert page(PAGES) not in image
    assert not machine.map.kernel_page_present(page(3))


@pytest.mark.parametrize("kind", ["free", "nosave", "offline", "guard"])
def test_what_is_not_saved(kind: str) -> None:
    machine = Machine()
    assert saveable_page(machine, page(2))
    getattr(machine, kind).add(page(2))
    assert not saveable_page(machine, page(2))


@pytest.mark.parametrize(("reserved", "hole", "saved"), [
    (False, False, True), (False, True, True), (True, False, True), (True, True, False)])
def test_a_hole_matters_for_reserved_pages_only(reserved: bool, hole: bool, saved: bool) -> None:
    machine = Machine()
    if reserved:
        machine.reserved.add(page(2))
    if hole:
        machine.map.set_direct_map_invalid_noflush(page(2))
    assert saveable_page(machine, page(2)) is saved


def test_poisoned_pages_are_read_for_the_image() -> None:
    machine = Machine()
    machine.hwpoison.add(page(1))
    assert saveable_page(machine, page(1))


def test_a_hole_is_mapped_only_while_it_is_copied() -> None:
    machine = Machine()
    assert safe_copy_page(machine, page(1)) == b"\x02" * PAGE
    assert machine.done == ["copy"]
    machine.done.clear()
    machine.map.set_direct_map_invalid_noflush(page(1))
    assert safe_copy_page(machine, page(1)) == b"\x02" * PAGE
    assert machine.done == ["default", "copy", "invalid", "flush"]
    assert not machine.map.kernel_page_present(page(1))
    assert machine.map.flushes["vaale1is"] == 1


def test_a_donated_page_in_the_image_ends_the_kernel() -> None:
    machine = Machine()
    machine.donated.add(page(7))
    with pytest.raises(Died):
        SnapshotPower().hibernate(machine)
    machine = Machine()
    machine.donated.add(page(7))
    machine.offline.add(page(7))
    assert isinstance(SnapshotPower().hibernate(machine), HibernationImage)


def test_memory_that_goes_while_devices_are_suspended() -> None:
    machine = Machine()

    def suspend_devices() -> int:
        machine.room = PAGES - 1
        return 0

    machine.suspend_devices = suspend_devices  # type: ignore[method-assign]
    assert SnapshotPower().hibernate(machine) == -ENOMEM
    assert machine.done == ["freeze", "devices on", "thaw"]


def test_an_image_that_does_not_fit() -> None:
    machine = Machine()
    machine.room = PAGES - 1
    assert SnapshotPower().hibernate(machine) == -ENOMEM
    assert machine.done == ["freeze", "thaw"]                               # noticed before devices are suspended
    machine.free.add(page(0))
    assert isinstance(SnapshotPower().hibernate(machine), HibernationImage)


# -- who may forbid it -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("policy", "available"), [
    (Policy(), True),
    (Policy(nohibernate=True), False),
    (Policy(locked_down=True), False),
    (Policy(secretmem_users=1), False),
    (Policy(cxl_mem_active=True), False),
])
def test_hibernation_available(policy: Policy, available: bool) -> None:
    machine, power = Machine(), SnapshotPower(policy)
    assert hibernation_available(policy) is available
    assert isinstance(power.hibernate(machine), HibernationImage) is available
    if not available:
        assert power.hibernate(machine) == power.open_snapshot_device() == -EPERM
        assert not machine.done
    assert power.suspend(machine) == 0                                      # nothing of it concerns suspend to RAM


def test_other_reasons_to_refuse() -> None:
    machine = Machine()
    assert SnapshotPower(Policy(compressor="lz9")).hibernate(machine) == -EOPNOTSUPP
    power = SnapshotPower()
    assert power.open_snapshot_device() == 0
    assert power.open_snapshot_device() == power.hibernate(machine) == -EBUSY
    power.close_snapshot_device()
    assert isinstance(power.hibernate(machine), HibernationImage)


def test_secretmem_is_looked_at_only_in_the_beginning() -> None:
    machine, power = Machine(), SnapshotPower()

    def opens(event: Event) -> int:
        power.policy.secretmem_users = 1
        return NOTIFY_OK

    power.chain.register(Notifier("opens", opens))
    assert isinstance(power.hibernate(machine), HibernationImage)
    assert power.hibernate(machine) == -EPERM


# -- the order of it ---------------------------------------------------------------------------------------------


def recorder(into: list[str], name: str, answer: int = NOTIFY_OK, veto: Event | None = None) -> Notifier:
    def callback(event: Event) -> int:
        into.append(f"{name} {event.name}")
        return answer if veto in (None, event) else NOTIFY_OK
    return Notifier(name, callback)


def test_the_order_of_hibernation() -> None:
    machine, power = Machine(), SnapshotPower()
    power.chain.register(recorder(machine.done, "library"))
    assert isinstance(power.hibernate(machine), HibernationImage)
    assert machine.done == [
        "library HIBERNATION_PREPARE", "freeze", "devices off", *["copy"] * PAGES, "devices on", "thaw",
        "library POST_HIBERNATION"]
    assert power.log == [
        "notifiers", "sync", "freeze filesystems", "freeze processes", "memory bitmaps", "prepare devices",
        "preallocate memory", "freeze kernel threads", "suspend devices", "offline CPUs", "image"]


@pytest.mark.parametrize(("attribute", "errno", "done"), [
    ("freeze", -EBUSY, ["freeze"]), ("devices", -EAGAIN, ["freeze", "devices off", "thaw"])])
def test_failures_on_the_way_are_undone(attribute: str, errno: int, done: list[str]) -> None:
    for operation, prepare, post in ((SnapshotPower.hibernate, "HIBERNATION_PREPARE", "POST_HIBERNATION"),
                                     (SnapshotPower.suspend, "SUSPEND_PREPARE", "POST_SUSPEND")):
        machine, power = Machine(), SnapshotPower()
        setattr(machine, attribute, errno)
        power.chain.register(recorder(machine.done, "library"))
        assert operation(power, machine) == errno
        assert machine.done == [f"library {prepare}", *done, f"library {post}"]


def test_suspend_copies_nothing() -> None:
    machine, power = Machine(), SnapshotPower()
    machine.donated.add(page(1))
    power.chain.register(recorder(machine.done, "library"))
    assert power.suspend(machine) == 0
    assert machine.done == ["library SUSPEND_PREPARE", "freeze", "devices off", "devices on", "thaw",
                            "library POST_SUSPEND"]


# -- notifiers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("errno", "ret"), [(0, 1), (-EPERM, 0x8002), (-EBUSY, 0x8011), (-EINVAL, 0x8017)])
def test_errno_in_a_notifiers_answer(errno: int, ret: int) -> None:
    assert notifier_from_errno(errno) == ret
    assert notifier_to_errno(ret) == errno


def test_notify_bad_is_eperm_and_done_is_nothing() -> None:
    assert notifier_to_errno(NOTIFY_BAD) == -EPERM
    assert notifier_to_errno(NOTIFY_DONE) == notifier_to_errno(NOTIFY_OK) == 0


def operations(machine: Machine) -> list[tuple[Callable[[SnapshotPower], Any], str, str]]:
    return [(lambda power: power.hibernate(machine), "HIBERNATION_PREPARE", "POST_HIBERNATION"),
            (lambda power: power.open_snapshot_device(), "HIBERNATION_PREPARE", "POST_HIBERNATION"),
            (lambda power: power.suspend(machine), "SUSPEND_PREPARE", "POST_SUSPEND")]


@pytest.mark.parametrize("which", range(3))
def test_a_veto_is_undone_for_those_before_it_only(which: int) -> None:
    machine = Machine()
    operation, prepare, post = operations(machine)[which]
    power, heard = SnapshotPower(), list[str]()
    power.chain.register(recorder(heard, "last"))
    power.chain.register(recorder(heard, "veto", notifier_from_errno(-EBUSY))._replace(priority=5))
    power.chain.register(recorder(heard, "second")._replace(priority=10))
    power.chain.register(recorder(heard, "first")._replace(priority=(1 << 31) - 1))
    assert operation(power) == -EBUSY
    assert heard == [f"first {prepare}", f"second {prepare}", f"veto {prepare}", f"first {post}", f"second {post}"]
    assert not machine.done
    assert power.snapshot_device_users == 0


def test_a_stop_without_an_errno_ends_the_call_quietly() -> None:
    chain, heard = NotifierChain(), list[str]()
    chain.register(recorder(heard, "first"))
    chain.register(recorder(heard, "stops", NOTIFY_OK | NOTIFY_STOP_MASK))
    chain.register(recorder(heard, "never"))
    assert chain.call_robust(Event.SUSPEND_PREPARE, Event.POST_SUSPEND) == 0
    assert heard == ["first SUSPEND_PREPARE", "stops SUSPEND_PREPARE", "first POST_SUSPEND"]


def test_an_error_without_the_stop_bit_vetoes_nothing() -> None:
    chain, heard = NotifierChain(), list[str]()
    chain.register(recorder(heard, "forgot", -EBUSY & 0x7FFF))
    chain.register(recorder(heard, "next"))
    assert chain.call_robust(Event.HIBERNATION_PREPARE, Event.POST_HIBERNATION) == 0
    assert heard == ["forgot HIBERNATION_PREPARE", "next HIBERNATION_PREPARE"]


def test_equal_priorities_are_called_in_order_of_registration() -> None:
    chain, heard = NotifierChain(), list[str]()
    notifiers = [recorder(heard, name) for name in "abc"]
    for notifier in notifiers:
        chain.register(notifier)
    with pytest.raises(ValueError, match="registered already"):
        chain.register(notifiers[0])
    chain.unregister(notifiers[1])
    with pytest.raises(ValueError, match="list"):
        chain.unregister(notifiers[1])
    chain.call(Event.POST_SUSPEND)
    assert heard == ["a POST_SUSPEND", "c POST_SUSPEND"]


# -- /proc/kcore -------------------------------------------------------------------------------------------------


def test_kcore_reads_across_pages() -> None:
    machine = Machine()
    assert read_kcore(machine, page(1) + 0xFFE, PAGE + 4) == b"\x02" * 2 + b"\x03" * PAGE + b"\x04" * 2
    assert read_kcore(machine, page(1), 0) == b""


@pytest.mark.parametrize("kind", ["offline", "hwpoison", "no_ram"])
def test_kcore_skips_pages_without_looking(kind: str) -> None:
    machine = Machine()
    getattr(machine, kind).add(page(2))
    looked: list[int] = []
    copy = machine.copy_from_kernel_nofault
    machine.copy_from_kernel_nofault = lambda pa, nr: looked.append(pa & -PAGE) or copy(pa, nr)  # type: ignore
    assert read_kcore(machine, page(1), 3 * PAGE) == b"\x02" * PAGE + bytes(PAGE) + b"\x04" * PAGE
    assert looked == [page(1), page(3)]


def test_kcore_finds_zeros_behind_a_fault() -> None:
    machine = Machine()
    machine.map.set_direct_map_invalid_noflush(page(2))
    machine.donated.add(page(3))
    assert read_kcore(machine, page(2) + 8, 2 * PAGE) == bytes(2 * PAGE - 8) + b"\x05" * 8


# -- the page allocator ------------------------------------------------------------------------------------------


def test_poison_is_written_at_free_and_checked_at_alloc() -> None:
    machine = Machine()
    checks = PageChecks(machine, machine.map, poison=True)
    checks.on_free(page(0), 2)
    assert machine.ram.read(page(0), 4 * PAGE) == bytes((PAGE_POISON,)) * 4 * PAGE
    assert machine.ram.read(page(4), 1) == b"\x05"
    checks.on_alloc(page(0), 2)
    assert machine.done == ["memset 0xaa"] * 4 + ["check"] * 4
    assert not checks.log
    machine.ram.write(page(1) + 9, bytes((PAGE_POISON ^ 0x10,)))
    machine.ram.write(page(2) + 9, bytes((PAGE_POISON ^ 0x11,)))
    machine.ram.write(page(3) + 4, b"abc")
    checks.on_alloc(page(0), 2)
    assert checks.log == [f"pagealloc: single bit error at {page(1) + 9:#x}-{page(1) + 9:#x}",
                          f"pagealloc: memory corruption at {page(2) + 9:#x}-{page(2) + 9:#x}",
                          f"pagealloc: memory corruption at {page(3) + 4:#x}-{page(3) + 6:#x}"]


@pytest.mark.parametrize(("options", "free", "alloc", "zeroed"), [
    ({}, [], [], ["memset 0x0"]),
    ({"init_on_free": True}, ["memset 0x0"], [], []),
    ({"init_on_alloc": True}, [], ["memset 0x0"], ["memset 0x0"]),
    ({"init_on_free": True, "init_on_alloc": True}, ["memset 0x0"], [], []),
    ({"poison": True, "init_on_free": True, "init_on_alloc": True}, ["memset 0xaa"], ["check"], ["check", "memset 0x0"]),
])
def test_what_is_written_when(options: dict[str, bool], free: list[str], alloc: list[str], zeroed: list[str]) -> None:
    machine = Machine()
    checks = PageChecks(machine, machine.map, **options)
    for operation, done in ((lambda: checks.on_free(page(0)), free), (lambda: checks.on_alloc(page(0)), alloc),
                            (lambda: checks.on_free(page(0)), free), (lambda: checks.on_alloc(page(0), zero=True), zeroed)):
        machine.done.clear()
        operation()
        assert machine.done == done
    assert bool(checks.log) is ("poison" in options)


@pytest.mark.parametrize("options", [{"poison": True}, {"init_on_free": True}])
def test_freeing_a_hole_ends_the_kernel(options: dict[str, bool]) -> None:
    machine = Machine()
    checks = PageChecks(machine, machine.map, **options)
    machine.map.set_direct_map_invalid_noflush(page(0))
    with pytest.raises(Died):
        checks.on_free(page(0))
    machine.map.set_direct_map_default_noflush(page(0))
    checks.on_free(page(0))
    PageChecks(machine, machine.map).on_free(page(1))


def test_debug_pagealloc_takes_free_pages_out_of_the_linear_map() -> None:
    machine = Machine(debug_pagealloc=True)
    checks = PageChecks(machine, machine.map, poison=True)
    machine.map.atomic = True
    checks.on_free(page(0), 1)
    assert not machine.map.kernel_page_present(page(1))
    assert machine.map.kernel_page_present(page(2))
    checks.on_alloc(page(0), 1)
    assert machine.map.kernel_page_present(page(1))
    assert machine.done == ["memset 0xaa"] * 2 + ["check"] * 2              # poison first, check only when mapped again
    assert not machine.map.warnings

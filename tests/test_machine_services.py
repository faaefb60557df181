"""Readers and writers of all RAM beside lent pages: what they do to the host under each hypervisor and design."""

from __future__ import annotations

from errno import EBUSY

import pytest

from guest_memfd.designs import DESIGNS
from guest_memfd.hypervisors import HYPERVISORS
from guest_memfd.machine.board import hostcpu
from guest_memfd.machine.board.config import InjectKind
from guest_memfd.machine.boot import Config, Machine
from guest_memfd.machine.linux.kcore import read_kcore
from guest_memfd.machine.linux.page_poison import PageChecks
from guest_memfd.machine.linux.panic import KernelPanic
from guest_memfd.machine.linux.snapshot import (
    Event,
    HibernationImage,
    Notifier,
    SnapshotPower,
    notifier_from_errno,
    safe_copy_page,
)
from guest_memfd.machine.linux.trans_pgd import trans_pgd_create_copy
from guest_memfd.machine.primitives.host import EmulatedHost
from guest_memfd.machine.primitives.services import Services
from guest_memfd.words.primitives import Folio
from guest_memfd.words.units import PAGE

SECRET = b"GUESTGST"


class Lent:
    """A machine with page 0 of a file lent to a guest that has written a secret into it."""

    def __init__(self, hypervisor: str, design: str, inject: InjectKind = "sea") -> None:
        self.machine = Machine(hypervisor, Config(ram=16 << 20, sea_fixup=DESIGNS[design].sea_fixup, inject=inject))
        self.library = DESIGNS[design](HYPERVISORS[hypervisor].ops(), 2)
        self.host = EmulatedHost(self.machine, self.machine.create_vm(2), 2)
        assert self.host.run(self.library.create(2)) == 0
        assert self.host.run(self.library.bind(0, 0, 2)) == 0
        assert self.host.run(self.library.guest_fault(0, 0)) == 0
        assert self.host.perform_by_name("guest_access", 0, True, caller="guest") == "ok"
        (self.page,) = self.machine.pages.values()
        self.services = Services(self.machine)

    @property
    def pa(self) -> int:
        return self.page.pa


@pytest.mark.parametrize(("hypervisor", "design", "outcome"), [
    ("gunyah", "library", "zeros"), ("gunyah", "none", "panic"), ("gunyah", "fixup", "zeros"),
    ("pkvm", "library", "zeros"), ("pkvm", "none", "zeros"),
    ("kvm", "library", "zeros"), ("kvm", "none", "secret"),
])
def test_kcore_beside_a_lent_page(hypervisor: str, design: str, outcome: str) -> None:
    lent = Lent(hypervisor, design)
    if outcome == "panic":
        with pytest.raises(KernelPanic, match="synchronous external abort: 0000000096000010"):
            read_kcore(lent.services, lent.pa, PAGE)
        return
    data = read_kcore(lent.services, lent.pa, PAGE)
    assert data[:8] == (SECRET if outcome == "secret" else bytes(8))
    assert len(data) == PAGE


def test_a_hypervisor_that_injects_a_fixable_abort_spares_the_host() -> None:
    lent = Lent("gunyah", "none", inject="fixable")
    assert read_kcore(lent.services, lent.pa, 8) == bytes(8)


# Nobody takes the page back and nobody fixes the load up: the kernel would try for ever.
def test_a_retry_without_end_ends_in_the_watchdog(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hostcpu, "LOCKUP", 50)
    lent = Lent("gunyah", "none", inject="fixable")
    with pytest.raises(KernelPanic, match="soft lockup"):
        lent.machine.cpu.call("plain_read", lent.machine.linear_map.va(lent.pa))


@pytest.mark.parametrize("holder", [None, -1, 1 << 20])
def test_a_folio_lock_is_dropped_by_who_has_it(holder: int | None) -> None:
    lent = Lent("kvm", "none")
    lent.page.lock = holder
    with pytest.raises(KernelPanic, match="which this task has not locked"):
        lent.host.perform_by_name("unlock_folio", Folio(lent.pa // PAGE, 0))


def test_kcore_skips_poisoned_pages_and_what_is_no_ram() -> None:
    lent = Lent("kvm", "none")
    lent.page.broken.add(lent.page.pa)
    assert read_kcore(lent.services, lent.pa, 8) == bytes(8)
    assert read_kcore(lent.services, lent.machine.el2_pool.start, 8) == bytes(8)


# The library is asked first, through its notifier: nothing is copied while a page is away.
def _hibernate(lent: Lent, *, veto: bool) -> HibernationImage | int:
    power = SnapshotPower()
    if veto:
        def notify(event: Event) -> int:
            ret = lent.host.run(lent.library.hibernate_prepare()) if event == Event.HIBERNATION_PREPARE else 0
            return notifier_from_errno(ret) if ret else 0

        power.chain.register(Notifier("guest_memfd", notify))
    return power.hibernate(lent.services)


def test_the_library_vetoes_hibernation_while_a_page_is_away() -> None:
    assert _hibernate(Lent("gunyah", "library"), veto=True) == -EBUSY


def test_without_the_veto_the_image_takes_the_secret_through_the_hole() -> None:
    lent = Lent("kvm", "library")
    image = _hibernate(lent, veto=False)
    assert isinstance(image, HibernationImage)
    assert image.pages[lent.pa][:8] == SECRET
    assert not lent.machine.linear_map.kernel_page_present(lent.pa)     # and the hole is there again


def test_without_the_veto_the_image_kills_a_host_of_gunyah() -> None:
    with pytest.raises(KernelPanic, match="synchronous external abort"):
        _hibernate(Lent("gunyah", "library"), veto=False)


def test_a_page_of_a_protected_guest_is_taken_by_force_for_the_image() -> None:
    lent = Lent("pkvm", "none")
    assert safe_copy_page(lent.services, lent.pa) == bytes(PAGE)       # zeros: the guest's data is lost
    assert lent.machine.driver.poisoned(lent.host.vm, 0)


# Pages that EL2 has taken for the guest's tables are no guest's, so they cannot even be taken by force.
def test_an_image_with_a_protected_guest_around_kills_the_host() -> None:
    with pytest.raises(KernelPanic, match="access to hypervisor-protected memory"):
        _hibernate(Lent("pkvm", "none"), veto=False)


def test_kexec_tables_have_no_holes() -> None:
    lent = Lent("gunyah", "library")
    lm = lent.machine.linear_map
    va = lm.va(lent.pa)
    root = trans_pgd_create_copy(lm, lent.machine.kernel_pages, va, va + PAGE)
    table = root
    for level in range(4):
        value = lent.machine.ram.read64(table + 8 * (va >> (39 - 9 * level) & 511))
        table = value & 0x0000_FFFF_FFFF_F000
    assert value & 1
    assert table == lent.pa
    assert not lm.kernel_page_present(lent.pa)


def test_poisoning_a_page_that_is_still_a_hole_ends_the_kernel() -> None:
    lent = Lent("gunyah", "library")
    checks = PageChecks(lent.services, lent.machine.linear_map, poison=True)
    with pytest.raises(KernelPanic, match="paging request"):
        checks.on_free(lent.pa)
    free = lent.machine.kernel_pages.alloc()
    again = PageChecks(Services(lent.machine), lent.machine.linear_map, poison=True)
    again.on_free(free)
    assert lent.machine.ram.read(free, 4) == b"\xaa" * 4
    lent.machine.ram.write(free + 16, b"\xab")
    again.on_alloc(free)
    assert "single bit error" in again.log[0]

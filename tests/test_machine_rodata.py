"""A kernel whose direct map cannot be changed (rodata=noalias, rodata=off): who asks, and what becomes of who does not.

Source: can_set_direct_map(), set_direct_map_invalid_noflush() (arch/arm64/mm/pageattr.c); mm/secretmem.c; CVE-2024-50182.
"""

from __future__ import annotations

from errno import EOPNOTSUPP

import pytest

from guest_memfd.designs import DESIGNS, Design
from guest_memfd.designs.none import NoDesign
from guest_memfd.designs.ours import OurLibrary
from guest_memfd.designs.secretmem import Secretmem
from guest_memfd.errors import BadInput, SyscallFailed
from guest_memfd.hypervisors import HYPERVISORS
from guest_memfd.laws import LAWS
from guest_memfd.machine.boot import Config, Machine
from guest_memfd.machine.linux.folio import LinuxFolio
from guest_memfd.machine.linux.kcore import read_kcore
from guest_memfd.machine.linux.panic import KernelPanic
from guest_memfd.machine.primitives.host import EmulatedHost
from guest_memfd.machine.primitives.services import Services
from guest_memfd.words.units import PAGE

RODATA = {"full": True, "on": True, "noalias": False, "off": False}
"""The kernel parameter -> whether set_direct_map_*() do anything."""
SECRET = b"GUESTGST"


class Unasked(OurLibrary):
    """The library without its question."""

    no_direct_map = False


class Lent:
    """A machine booted with *rodata*, and a file of two pages that *design* serves; ``made`` is what create() returned."""

    def __init__(self, design: type[Design], rodata: str, hypervisor: str = "kvm", **config: object) -> None:
        self.machine = Machine(hypervisor, Config(ram=16 << 20, rodata=rodata, **config))  # type: ignore[arg-type]
        self.library = design(HYPERVISORS[hypervisor].ops(), 2)
        self.host = EmulatedHost(self.machine, self.machine.create_vm(2), 2)
        self.made: int = self.host.run(self.library.create(2))

    def with_a_secret(self) -> LinuxFolio:
        """Page 0 is the guest's, and holds what the guest has written."""
        assert self.made == 0
        assert self.host.run(self.library.bind(0, 0, 2)) == 0
        assert self.host.run(self.library.guest_fault(0, 0)) == 0
        assert self.host.perform_by_name("guest_access", 0, True, caller="guest") == "ok"
        (page,) = self.machine.pages.values()
        return page

    def kcore(self, page: LinuxFolio) -> tuple[str, list[str]]:
        """/proc/kcore reads the page: what came of it, and what guest-private says to that."""
        got: str = self.host.perform_by_name("copy_from_kernel_nofault", page.pa // PAGE, caller="mm")
        return got, [words for note in self.host.notes if (words := LAWS["guest-private"].on_note(note))]

    def close(self) -> None:
        self.host.perform_by_name("vm_kill")
        assert self.host.run(self.library.vm_teardown()) == 0
        self.host.perform_by_name("vm_destroyed")
        if self.host.perform_by_name("fd_close"):
            self.host.run(self.library.close())


@pytest.mark.parametrize("bbml3", [False, True])
@pytest.mark.parametrize("release", ["6.12", "7.3"])
@pytest.mark.parametrize("rodata", RODATA)
def test_the_kernel_parameter_decides(rodata: str, release: str, bbml3: bool) -> None:
    lent = Lent(OurLibrary, rodata, release=release, bbml3=bbml3)
    can = RODATA[rodata]
    assert lent.host.perform_by_name("can_set_direct_map", caller="library") is can
    assert lent.made == (0 if can else -EOPNOTSUPP)
    blocks = lent.machine.linear_map.leaf(lent.machine.ram.base).level < 3
    assert blocks == (not can or (bbml3 and release == "7.3"))


def test_an_unknown_parameter_is_refused() -> None:
    with pytest.raises(BadInput, match="rodata=maybe"):
        Machine("kvm", Config(ram=16 << 20, rodata="maybe"))


@pytest.mark.parametrize("rodata", ["noalias", "off"])
def test_without_the_question_a_zapped_page_stays_where_it_is(rodata: str) -> None:
    lent = Lent(Unasked, rodata)
    page = lent.with_a_secret()
    assert page.no_direct_map                                         # the library believes that it is gone
    assert lent.machine.linear_map.kernel_page_present(page.pa)
    assert lent.kcore(page) == ("ok", [
        "copy_from_kernel_nofault reads a page that is private to the guest, through the direct map"])
    assert read_kcore(Services(lent.machine), page.pa, 8) == SECRET
    lent.close()
    assert lent.machine.audit() == []                           # nothing is lost, so nobody notices later


def test_with_the_question_nothing_is_made_and_nothing_is_held() -> None:
    lent = Lent(OurLibrary, "noalias")
    assert lent.made == -EOPNOTSUPP
    assert not lent.machine.inodes
    assert lent.machine.module.refcount == 1                    # the VM's
    lent.close()
    assert lent.machine.audit() == []


def test_where_the_direct_map_can_be_changed_both_hide_the_page() -> None:
    for design in (Unasked, OurLibrary):
        lent = Lent(design, "full")
        page = lent.with_a_secret()
        assert not lent.machine.linear_map.kernel_page_present(page.pa)
        assert lent.kcore(page) == ("fixed", [])
        assert read_kcore(Services(lent.machine), page.pa, 8) == bytes(8)


def test_a_lent_page_that_stays_mapped_kills_a_host_of_gunyah() -> None:
    lent = Lent(Unasked, "noalias", "gunyah")
    page = lent.with_a_secret()
    with pytest.raises(KernelPanic, match="synchronous external abort"):
        lent.kcore(page)
    assert [words for note in lent.host.notes if (words := LAWS["host-survives"].on_note(note))]


LEAVE_IT_ALONE = ("gunyah-v17", "guestmem-rfc1", "kvm-7.4", "guestmem-v5")
"""Designs that do not ask, and those of NoDesign: they change nothing, or do not look whether they can."""


@pytest.mark.parametrize("hypervisor", ["kvm", "pkvm", "gunyah"])
def test_who_changes_nothing_need_not_ask(hypervisor: str) -> None:
    for name in DESIGNS:
        design = DESIGNS[name]
        if design.hypervisors is None or hypervisor in design.hypervisors:
            asks = Lent(design, "noalias", hypervisor).made == -EOPNOTSUPP
            assert asks != (issubclass(design, NoDesign) or name in LEAVE_IT_ALONE), name


# -- devices ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("design", [OurLibrary, Secretmem])
def test_dev_kvm_makes_no_file(design: type[Design]) -> None:
    machine = Machine("kvm", Config(ram=32 << 20, rodata="noalias"))
    with machine.open("/dev/kvm", design.name) as system, system.create_vm() as vm:
        with pytest.raises(SyscallFailed, match="rodata=noalias") as failed:
            vm.create_guest_memfd(PAGE)
        assert (failed.value.errno, failed.value.call) == (EOPNOTSUPP, "KVM_CREATE_GUEST_MEMFD")
    assert machine.audit() == []


def test_dev_gunyah_makes_no_file() -> None:
    machine = Machine("gunyah", Config(ram=32 << 20, rodata="off"))
    with machine.open("/dev/gunyah") as device:
        with pytest.raises(SyscallFailed, match="rodata=off") as failed:
            device.create_guest_mem(PAGE)
        assert (failed.value.errno, failed.value.call) == (EOPNOTSUPP, "CREATE_GUEST_MEM")
    assert machine.audit() == []


@pytest.mark.parametrize(("hypervisor", "path"), [("kvm", "/dev/kvm"), ("gunyah", "/dev/gunyah")])
def test_a_design_that_changes_nothing_serves_files(hypervisor: str, path: str) -> None:
    machine = Machine(hypervisor, Config(ram=32 << 20, rodata="noalias"))
    with machine.open(path, "none") as device:
        vm = device.create_vm()
        file = vm.create_guest_memfd(PAGE) if hypervisor == "kvm" else device.create_guest_mem(PAGE)
        file.close()
        vm.close()
    assert machine.audit() == []

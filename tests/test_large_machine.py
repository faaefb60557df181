"""Folios of 2 MiB on the machine, under all three hypervisors: split, converted in part, merged, punched, taken back.

The scenes of the explorer have folios of four pages at most; here the tables are real, and a block is one.
"""

from __future__ import annotations

from collections.abc import Callable
from errno import EAGAIN, EBUSY, ENOMEM
from typing import Any

import pytest

from guest_memfd.core.gmem import Conversion
from guest_memfd.designs.ours import OurLibrary
from guest_memfd.vmm.folio_costs import BLOCK, counted_folios, lent_and_back
from guest_memfd.words.units import Gfn, Index, Pa, gfn_to_gpa

pytest.importorskip("unicorn")

from guest_memfd.vmm.counted_file import CountedFile

HYPERVISORS = ("kvm", "pkvm", "gunyah")
NR = 1 << BLOCK
ONE, OTHER = Index(5), Index(511)


class Filled:
    """A file of one folio of 2 MiB, lent; the guest has written to each of its pages."""

    def __init__(self, hypervisor: str) -> None:
        self.file = CountedFile(OurLibrary, hypervisor, NR, BLOCK)
        self.machine, self.host = self.file.machine, self.file.host
        self.file.lend()
        self.at = {Index(i): self.guest_page(Gfn(i)) for i in range(NR)}
        for index, pa in self.at.items():
            assert pa is not None
            self.machine.ram.write(pa, self.token(index))

    def token(self, index: int) -> bytes:
        return b"PAGE%04d" % index

    def guest_page(self, gfn: Gfn) -> Pa | None:
        return self.machine.driver.lookup(self.host.vm, gfn_to_gpa(gfn))

    def lost(self, *away: int) -> list[str]:
        """What is not as it should be, of pages that are the guest's: all but *away*."""
        found = []
        for index, pa in self.at.items():
            assert pa is not None
            if index not in away:
                here = self.guest_page(Gfn(index))
                # Plain KVM drops the block; its guest faults the rest in again.
                if here != pa and (here is not None or self.machine.hypervisor.tracks_owner):
                    found.append(f"gfn {index} is at {here}")
                if self.machine.ram.read(pa, 8) != self.token(index):
                    found.append(f"page {index} holds {self.machine.ram.read(pa, 8)!r}")
                if self.machine.hypervisor.tracks_owner and self.machine.driver.owner(pa) != "guest":
                    found.append(f"page {index} is {self.machine.driver.owner(pa)}'s")
                if self.machine.kernel_maps(pa):
                    found.append(f"page {index} is in the direct map")
        return found

    def violations(self) -> list[Any]:
        return [*self.machine.linear_map.tables.violations, *self.machine.driver.guest_table(self.host.vm).violations]

    def orders(self) -> dict[int, int]:
        return self.host.inode.orders


@pytest.fixture(params=HYPERVISORS)
def filled(request: pytest.FixtureRequest) -> Filled:
    return Filled(request.param)


def ended(filled: Filled) -> None:
    filled.file.take_back()
    assert filled.machine.audit() == []


def test_of_a_block_one_page_is_shared_and_comes_back(filled: Filled) -> None:
    file, pa = filled.file, filled.at[ONE]
    file.consent(Gfn(ONE))
    assert file.convert(ONE, shared=True) == Conversion(0)
    assert filled.lost(ONE) == []
    assert filled.orders() == {0: NR}
    assert pa is not None
    assert filled.machine.driver.owner(pa) in ("host", "borrowed")
    assert filled.machine.ram.read(pa, 8) == filled.token(ONE), "a conversion keeps the contents"
    assert file.convert(ONE, shared=False) == Conversion(0)
    assert filled.orders() == {BLOCK: 1}, "they are one folio again"
    file.fault(Gfn(ONE))
    assert filled.lost() == []
    assert filled.violations() == []
    ended(filled)


def test_two_pages_of_a_block_go_their_own_way(filled: Filled) -> None:
    file = filled.file
    for index in (ONE, OTHER):
        file.consent(Gfn(index))
        assert file.convert(index, shared=True) == Conversion(0)
    assert file.convert(ONE, shared=False) == Conversion(0)
    assert filled.orders() == {0: NR}, "one is shared still"
    assert filled.lost(ONE, OTHER) == []
    assert file.convert(OTHER, shared=False) == Conversion(0)
    assert filled.orders() == {BLOCK: 1}
    ended(filled)


@pytest.mark.parametrize("hypervisor", ["kvm", "gunyah"])
def test_a_page_of_a_block_is_punched(hypervisor: str) -> None:
    filled = Filled(hypervisor)
    assert filled.file.punch(ONE) == Conversion(0)
    assert filled.lost(ONE) == []
    assert (filled.orders(), filled.host.inode.find(ONE)) == ({0: NR - 1}, None)
    assert filled.violations() == []
    ended(filled)


def test_a_living_guest_of_pkvm_gives_up_no_page() -> None:
    filled = Filled("pkvm")
    assert filled.file.punch(ONE) == Conversion(-EBUSY, ONE)
    # It has agreed that the host reads what is in it, and that is all it has agreed to.
    assert filled.lost(ONE) == []
    ended(filled)


def test_a_pinned_page_keeps_its_block_whole(filled: Filled) -> None:
    folio = filled.host.inode.find(ONE)
    assert folio is not None
    folio.take("pin")
    filled.file.consent(Gfn(ONE))
    assert filled.file.convert(ONE, shared=True) == Conversion(-EAGAIN, ONE)
    assert filled.orders() == {BLOCK: 1}
    folio.drop("pin")
    assert filled.file.convert(ONE, shared=True) == Conversion(0)
    ended(filled)


# Each allocator of the machine: its n-th allocation fails, and whether that is still to come.
FAILING: dict[str, tuple[Callable[[Any, int | None], None], Callable[[Any], bool]]] = {
    "kernel": (lambda machine, n: machine.kernel_pages.fail_at(n), lambda machine: machine.kernel_pages.pending),
    "el2": (lambda machine, n: machine.el2_pool.fail_at(n), lambda machine: machine.el2_pool.pending),
    "slab": (lambda machine, n: machine.fail_slab_at(n), lambda machine: machine.slab_pending),
}


@pytest.mark.parametrize("hypervisor", HYPERVISORS)
@pytest.mark.parametrize("allocator", FAILING)
def test_every_allocation_of_a_conversion_can_fail(hypervisor: str, allocator: str) -> None:
    """-ENOMEM, or what a fault makes of it; nothing is lost, and the same request succeeds then."""
    fail, pending = FAILING[allocator]
    for n in range(20):
        filled = Filled(hypervisor)
        filled.file.consent(Gfn(ONE))
        fail(filled.machine, n)
        for shared in (True, False):
            result = filled.file.convert(ONE, shared=shared)
            if result.ret:
                assert result.ret in (-ENOMEM, -EAGAIN), result
                assert filled.lost(ONE) == []
                assert filled.file.convert(ONE, shared=shared) == Conversion(0)
        assert filled.lost(ONE) == []
        over = pending(filled.machine)
        fail(filled.machine, None)
        ended(filled)
        if over:
            return
    raise AssertionError("a conversion allocates without end")


def test_a_share_of_a_part_has_the_block_split_first() -> None:
    """MEM_SHARE by the guest itself: EL2 asks the host for a split, on which the host's annotation is copied down."""
    filled = Filled("pkvm")
    file, el2 = filled.file, filled.machine.el2
    file.consent(Gfn(ONE))
    assert {el2.host.note(filled.at[Index(i)]).gfn for i in range(NR) if i != ONE} == {*range(NR)} - {ONE}
    assert filled.lost(ONE) == []
    assert filled.orders() == {BLOCK: 1}, "the folio is one: only its leaves are not"
    ended(filled)


@pytest.mark.parametrize(("hypervisor", "order"), [("gunyah", 0), *((name, BLOCK) for name in HYPERVISORS)])
def test_what_is_carried_over_is_what_is_counted(hypervisor: str, order: int) -> None:
    """The cost of 1 GiB is taken for that of a block of 2 MiB and 511 times that of another; so it is of 4 blocks."""
    one, two, many = (vars(lent_and_back(hypervisor, blocks << BLOCK, order)) for blocks in (1, 2, 4))
    carried = {name: one[name] + 3 * (two[name] - one[name]) for name in one}
    assert {name: abs(many[name] - carried[name]) <= 8 for name in one} == dict.fromkeys(one, True), (many, carried)
    assert {name: many[name] == carried[name] for name in one if name not in ("splits", "table_pages")} == dict.fromkeys(
        ("direct_map_writes", "flushes", "hypercalls"), True)


def test_the_costs_by_size() -> None:
    counted = counted_folios(["kvm"])
    costs = {case: vars(cost) for (case, _), cost in counted.items() if cost is not None}
    # Out of the direct map and into it again, for each folio; one flush on the way out.
    assert [(costs[f"1 GiB as {size}"]["direct_map_writes"], costs[f"1 GiB as {size}"]["flushes"])
            for size in ("4K", "2M", "1G")] == [(2 << 18, 1 << 18), (2 << 9, 1 << 9), (2, 1)]
    assert costs["4K of 2M, round trip"]["splits"] == 1
    assert costs["4K of 2M, another"]["splits"] == 0, "the direct map stays split, so it is split once"

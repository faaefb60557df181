"""First and last places of the machine's parts: what begins, ends or fits just there, and what happens twice."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from pkvm_machine import Machine as PkvmMachine

from guest_memfd.errors import BadInput
from guest_memfd.machine.el2.kvm.guest import GuestStage2
from guest_memfd.machine.el2.kvm.pgtable import leaf_attributes, page_of
from guest_memfd.machine.el2.pkvm import transitions as t
from guest_memfd.machine.hw.arm64.registers import Tcr
from guest_memfd.machine.hw.arm64.tlb import Tlb
from guest_memfd.machine.hw.buddy import Buddy
from guest_memfd.machine.hw.ram import Ram
from guest_memfd.machine.linux.extable import read_reg
from guest_memfd.machine.linux.folio import LinuxFolio
from guest_memfd.machine.linux.inode import Inode
from guest_memfd.machine.linux.mm import CHUNK, FIRST, Mm, Vma
from guest_memfd.machine.primitives.pagecache import _occupied
from guest_memfd.words.primitives import Entries
from guest_memfd.words.units import PAGE

MIB = 1 << 20


@pytest.mark.parametrize("field", [-1, 64])
def test_a_field_of_a_register_has_a_lowest_and_a_highest_value(field: int) -> None:
    with pytest.raises(BadInput, match=f"t0sz = {field} does not fit into 6 bits"):
        _ = Tcr(t0sz=field).value
    assert Tcr(t0sz=63).value & 63 == 63


def test_register_31_is_zero_and_no_register() -> None:
    assert read_reg(SimpleNamespace(x=lambda n: 7), 30) == 7                                     # type: ignore[arg-type]
    assert read_reg(SimpleNamespace(), 31) == 0                                                  # type: ignore[arg-type]


@pytest.mark.parametrize(("start", "nr", "chunks"), [
    (0, CHUNK, range(1)), (0, CHUNK - 1, range(1)), (0, CHUNK + 1, range(2)), (CHUNK, CHUNK, range(1, 2)),
    (CHUNK - 1, 2, range(2)), (CHUNK - 1, 1, range(1)),
])
def test_a_vma_is_made_of_the_tables_that_its_pages_are_in(start: int, nr: int, chunks: range) -> None:
    assert Vma(FIRST, start, nr).chunks == chunks


def test_vmas_that_begin_within_a_table_do_not_reach_into_the_next() -> None:
    ram = Ram(32 * MIB)
    mm, inode = Mm(ram, Buddy(ram, ram.base, ram.size), [Tlb()], vmid=0), Inode(4 * CHUNK, "kvm")
    vmas = [mm.mmap(inode, *window) for window in ((CHUNK - 1, 2), (CHUNK - 1, CHUNK), (0, 1))]
    ends = [vma.va(vma.start + vma.nr) for vma in vmas]
    assert all(end <= vma.base for end, vma in zip(ends, vmas[1:], strict=False))


def test_an_inode_that_is_gone_has_empty_trees() -> None:
    inode = Inode(4, "kvm")
    for tree in ("attributes", "bindings"):
        inode.trees[tree].store(0, Entries(1, 4, 0))
    inode.destroy()
    assert [inode.entry(tree, index) for tree in ("attributes", "bindings") for index in range(4)] == [0] * 8
    assert not inode.bound()


def full_of_pages(*indexes: int) -> Any:
    """A host whose file has pages of their own there."""
    inode = Inode(4 * CHUNK, "kvm")
    for index in indexes:
        inode.insert(LinuxFolio(index * PAGE, 0), index)
    return SimpleNamespace(inode=inode)


@pytest.mark.parametrize("more", [0, CHUNK])
@pytest.mark.parametrize(("index", "occupied"), [
    (CHUNK, True), (CHUNK + 1, True), (2 * CHUNK - 1, True), (CHUNK - 1, False), (2 * CHUNK, False)])
def test_a_large_folio_has_no_room_where_a_page_of_it_is(index: int, occupied: bool, more: int) -> None:
    """Whether the file has few pages, or as many as the folio."""
    elsewhere = range(2 * CHUNK + 1, 2 * CHUNK + 1 + more)
    assert _occupied(full_of_pages(index, *elsewhere), CHUNK, 9) == occupied                     # type: ignore[arg-type]


def test_what_the_hypervisor_pins_twice_has_two_references() -> None:
    machine = PkvmMachine()
    pfn = machine.page()
    assert t.share_hyp(machine.el2, pfn) == 0
    for count in (1, 2, 3):
        assert t.pin_shared_mem(machine.el2, pfn) == 0
        assert machine.el2.vmemmap.page(pfn).refcount == count


def test_a_record_of_the_first_page_alone_is_one_of_those_of_its_block() -> None:
    machine = PkvmMachine()
    pfn = machine.page(9)
    machine.el2.vmemmap.set(pfn, 0, machine.el2.vmemmap.page(pfn)._replace(refcount=5))
    assert sorted(page.refcount for page in machine.el2.vmemmap.pages(pfn, 9)) == [0, 5]


def test_a_block_of_1g_becomes_pages_wherever_one_looks() -> None:
    ram, gib = Ram(64 * MIB), 1 << 30
    pgt = GuestStage2(ram, Buddy(ram, ram.base, ram.size), [Tlb()], vmid=1).pgt
    pgt.map(gib, 18, 4 * gib, leaf_attributes("rwx"))
    pgt.split(gib, page_of)
    for page in (0, 1, 511, 512, 513, 100_000, 262_143):
        entry = pgt.leaf(gib + page * PAGE)
        assert (entry.order, entry.oa, entry.valid) == (0, 4 * gib + page * PAGE, True)
    assert pgt.tables == 513
    pgt.destroy()
    assert (pgt.tables, pgt.leaf(gib).value) == (0, 0)

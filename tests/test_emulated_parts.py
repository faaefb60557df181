"""Parts of the emulated machine against naive twins: RAM, buddy allocator, maple tree, user page tables."""

from __future__ import annotations

import resource
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as given_by

from guest_memfd.errors import BadInput
from guest_memfd.machine.boot import Config, Machine
from guest_memfd.machine.hw.arm64.fault import Fault
from guest_memfd.machine.hw.arm64.registers import Tcr
from guest_memfd.machine.hw.arm64.tlb import Tlb
from guest_memfd.machine.hw.arm64.walk import Stage1, walk
from guest_memfd.machine.hw.buddy import Buddy, OutOfMemory
from guest_memfd.machine.hw.ram import BusError, Ram
from guest_memfd.machine.linux.folio import LinuxFolio
from guest_memfd.machine.linux.inode import Inode
from guest_memfd.machine.linux.maple import MapleTree
from guest_memfd.machine.linux.mm import CHUNK, FIRST, FileMapping, Mm
from guest_memfd.machine.linux.rwsem import Rwsem
from guest_memfd.words.primitives import Entries
from guest_memfd.words.units import PAGE

MIB = 1 << 20


# -- RAM -----------------------------------------------------------------------------------------------------------


def test_a_terabyte_costs_what_is_touched() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ram = Ram(1 << 40)
    for at in range(0, 1 << 40, 1 << 36):
        ram.write64(ram.base + at, at | 1)
    assert [ram.read64(ram.base + at) for at in (0, 1 << 36, 5 << 36)] == [1, 1 << 36 | 1, 5 << 36 | 1]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 10 * 1024


def test_zeroing_gives_back_and_reads_zero() -> None:
    ram = Ram(64 * MIB)
    for size in (1, PAGE, 3 * PAGE + 5, 4 * MIB):
        ram.fill(ram.base, 8 * MIB, 0xEE)
        ram.zero(ram.base + PAGE, size)
        assert ram.read(ram.base + PAGE, size) == bytes(size)
        assert ram.read(ram.base + PAGE + size, 1) == b"\xee"
        assert ram.read(ram.base + PAGE - 1, 1) == b"\xee"


def test_there_is_nothing_outside() -> None:
    ram = Ram(16 * MIB)
    for pa in (ram.base - 8, ram.end, 0):
        with pytest.raises(BusError, match=hex(pa)):
            ram.read64(pa)
    with pytest.raises(BusError):
        ram.write(ram.end - 4, bytes(8))
    for size in (0, -PAGE, PAGE + 1):
        with pytest.raises(BadInput, match="multiple"):
            Ram(size)


# -- buddy ---------------------------------------------------------------------------------------------------------


@given(given_by.lists(given_by.tuples(given_by.booleans(), given_by.integers(0, 6)), max_size=60))
@settings(deadline=None)
def test_blocks_never_overlap_and_all_come_back(calls: list[tuple[bool, int]]) -> None:
    ram = Ram(4 * MIB)
    buddy = Buddy(ram, ram.base + PAGE, ram.size - PAGE)                # no power of two
    total, held = buddy.free_pages, list[tuple[int, int]]()
    for free, order in calls:
        if free and held:
            buddy.free(*held.pop(order % len(held)))
            continue
        try:
            pa = buddy.alloc(order)
        except OutOfMemory:
            continue
        assert not pa % (PAGE << order)
        assert all(pa + (PAGE << order) <= other or other + (PAGE << o) <= pa for other, o in held)
        held.append((pa, order))
    assert buddy.free_pages == total - sum(1 << order for _, order in held)
    for block in held:
        buddy.free(*block)
    assert buddy.free_pages == total
    assert buddy.alloc(9) == ram.base + 2 * MIB                         # everything has merged again


def test_the_nth_allocation_fails_once() -> None:
    ram = Ram(MIB)
    buddy = Buddy(ram, ram.base, ram.size)
    buddy.fail_at(1)
    buddy.alloc()
    with pytest.raises(OutOfMemory, match="injected"):
        buddy.alloc()
    buddy.alloc()
    with pytest.raises(OutOfMemory, match="no free block of order 18"):
        buddy.alloc(18)
    with pytest.raises(ValueError, match="no block"):
        buddy.free(ram.base + PAGE, 1)


# -- maple tree ----------------------------------------------------------------------------------------------------

STORES = given_by.lists(given_by.tuples(
    given_by.integers(0, 40), given_by.integers(1, 15), given_by.integers(0, 3), given_by.integers(0, 1)), max_size=25)


@given(STORES, given_by.integers(0, 50), given_by.integers(0, 30))
@settings(deadline=None)
def test_the_tree_is_a_dictionary(stores: list[tuple[int, int, int, int]], start: int, nr: int) -> None:
    tree, naive = MapleTree(), dict[int, int]()
    for at, length, value, step in stores:
        entries = Entries(value, length, step if value else 0)
        tree.store(at, entries)
        naive |= dict(enumerate(entries, at))
    expected = [naive.get(i, 0) for i in range(start, start + nr)]
    loaded = tree.load(start, nr)
    assert list(loaded) == expected
    assert [loaded[i] for i in range(nr)] == expected
    assert all(loaded.count(v) == expected.count(v) for v in range(20))
    assert list(loaded[1:4]) == expected[1:4]
    assert loaded == expected


def test_a_terabyte_of_entries_is_one_range() -> None:
    tree, pages = MapleTree(), 1 << 28
    tree.store(0, Entries(2, pages))
    for index in range(0, pages, 1 << 18):
        tree.store(index, Entries(1, 1 << 18))
    assert tree.nodes() == 1
    assert tree.load(0, pages).count(1) == pages


# -- folios and user page tables -------------------------------------------------------------------------------------


def test_a_reference_dropped_twice_is_an_error() -> None:
    page = LinuxFolio(0, 0)
    page.take("cache")
    assert page.drop("cache")
    with pytest.raises(ValueError, match="cache"):
        page.drop("cache")


def test_vmas_share_entries_and_lose_them_with_the_last() -> None:
    ram = Ram(32 * MIB)
    source = Buddy(ram, ram.base, ram.size)
    mm = Mm(ram, source, [Tlb()], vmid=0)
    free, inode = source.free_pages, Inode(4, "kvm")
    mm.mmap(inode)
    mm.mmap(inode)
    assert inode.mapping is not None
    inode.mapping.insert(2, ram.base + 5 * PAGE)
    assert inode.mapping.lookup(2) == ram.base + 5 * PAGE
    assert [vma.address for vma in inode.mapping.vmas] == [FIRST, FIRST + CHUNK * PAGE]
    mm.munmap(inode)
    assert inode.mapping.lookup(2) == ram.base + 5 * PAGE
    mm.munmap(inode)
    assert inode.mapping is None
    assert source.free_pages == free


class Space:
    """An address space in 32 MiB, and a file of 4 GiB."""

    def __init__(self) -> None:
        self.ram = Ram(32 * MIB)
        self.source = Buddy(self.ram, self.ram.base, self.ram.size)
        self.mm = Mm(self.ram, self.source, [Tlb()], vmid=0)
        self.free, self.inode = self.source.free_pages, Inode(1 << 20, "kvm")

    @property
    def mapping(self) -> FileMapping:
        assert self.inode.mapping is not None
        return self.inode.mapping


def test_the_cpu_finds_a_page_where_its_vma_says_in_every_table_of_it() -> None:
    space = Space()
    windows = (0, 1 << 19), (0, 4), (3, 1500), (600, 1)                 # the first is of 2 GiB
    vmas = [space.mm.mmap(space.inode, *window) for window in windows]
    regime = Stage1(Tcr(), space.mm.ttbr0, 0)
    for index in (3, 511, 512, 600, 1100, 1502):
        space.mapping.insert(index, space.ram.base + index * PAGE)
        for vma in space.mapping.vmas:
            if vma.covers(index):
                assert walk(space.ram, vma.va(index), "r", 0, regime).pa == space.ram.base + index * PAGE
    space.mm.munmap(space.inode, vmas[0])
    space.mm.munmap(space.inode, vmas[2])
    assert sorted(space.mapping.present) == [3, 600]


def test_an_entry_goes_with_the_last_vma_that_shows_it() -> None:
    space = Space()
    pa = space.ram.base
    vmas = [space.mm.mmap(space.inode, *window) for window in ((0, 4), (2, 4), (1000, 2), (1001, 1))]
    for index in (1, 3, 1000, 1001):
        space.mapping.insert(index, pa + index * PAGE)
    assert [vma.va(vma.start) % (2 * MIB) for vma in space.mapping.vmas] == [0, 2 * PAGE, 488 * PAGE, 489 * PAGE]
    assert all(space.mm.find(vma.va(vma.start)) == (space.inode, vma.start) for vma in space.mapping.vmas)
    space.mm.munmap(space.inode, vmas[0])
    assert sorted(space.mapping.present) == [3, 1000, 1001]
    space.mm.munmap(space.inode, vmas[2])
    assert sorted(space.mapping.present) == [3, 1001]
    assert space.mapping.lookup(1000) is None
    space.mm.munmap(space.inode)
    space.mm.munmap(space.inode)
    assert space.inode.mapping is None
    assert space.source.free_pages == space.free
    assert space.mm.find(FIRST) is None


def test_all_entries_of_a_range_are_zapped_and_none_beside_it() -> None:
    space = Space()
    space.mm.mmap(space.inode, 0, 1000)
    pa, vma = space.ram.base, space.mapping.vmas[0]
    for index in (1, 2, 3, 600, 999):
        space.mapping.insert(index, pa + index * PAGE)
    assert space.mapping.zap(2, 700) == [2, 3, 600]
    assert [i for i in range(1000) if space.mapping.lookup(i) is not None] == [1, 999]
    regime = Stage1(Tcr(), space.mm.ttbr0, 0)
    for index in (2, 3, 600):
        with pytest.raises(Fault, match="translation"):
            walk(space.ram, vma.va(index), "r", 0, regime)
    assert space.mapping.zap(1, 1) == [1]
    assert space.mapping.zap(1, 1) == []


def test_a_writer_that_waits_keeps_readers_out_and_a_reader_that_is_in_keeps_it_waiting() -> None:
    lock = Rwsem()
    assert lock.down_read()
    assert lock.down_write(7) is None
    assert not lock.down_read(), "a writer has queued"
    assert lock.down_write(7) is False
    assert lock.down_write(8) is False, "one writer queues at a time"
    assert lock.up_read()
    assert lock.down_write(8) is False, "it is the other's turn"
    assert lock.down_write(7)
    assert not lock.down_read()
    assert not lock.up_write(8)
    assert lock.up_write(7)
    assert not lock.up_read()
    assert lock.down_read()


@pytest.mark.parametrize("failing", range(8))
def test_want_of_tables_leaves_nothing_behind(failing: int) -> None:
    space = Space()
    space.mm.mmap(space.inode, 0, 1)
    space.mm.mmap(space.inode, 0, 1 << 19)                  # 2 GiB, so that the third is below another table
    space.mm.mmap(space.inode, 0, 1)
    before = space.source.free_pages
    space.source.fail_at(failing)
    try:
        space.mapping.insert(0, space.ram.base)
    except OutOfMemory:
        assert space.source.free_pages == before
        assert space.mapping.lookup(0) is None
        space.mapping.insert(0, space.ram.base)
    space.source.fail_at(failing)
    with suppress(OutOfMemory):
        space.mm.mmap(space.inode, 0, 1 << 19)
    space.source.fail_at(None)
    while space.inode.mapping is not None:
        space.mm.munmap(space.inode)
    assert space.source.free_pages == space.free


def test_address_space_is_used_again_when_all_of_it_has_been() -> None:
    space = Space()
    size = 1 << 35                                          # pages: half of what there is, and a bit
    for _ in range(4):
        large = space.mm.mmap(space.inode, 0, size)
        space.mm.mmap(space.inode, 0, 1)
        space.mm.munmap(space.inode, large)
    with pytest.raises(OutOfMemory, match="address space"):
        space.mm.mmap(space.inode, 0, 1 << 36)
    assert len(space.mapping.vmas) == 4
    assert len({vma.base for vma in space.mapping.vmas}) == 4


@pytest.mark.parametrize("hypervisor", ["kvm", "pkvm", "gunyah"])
def test_a_machine_that_is_too_small_says_so(hypervisor: str) -> None:
    with pytest.raises(BadInput, match="16 MiB"):
        Machine(hypervisor, Config(ram=8 * MIB))

"""One emulated arm64 machine: RAM, CPUs with their TLBs, EL2, and Linux on it.

Who changes what: the primitives (primitives/) act for Linux, hypcalls/ talks to EL2, hostcpu.py executes. The machine
answers the questions that need several parts. What a VMM calls - `open`, what it gives, `audit` - may be called from any
thread. Code that uses a part of the machine by itself while other threads run does so inside of ``with machine.lock``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from guest_memfd.compat import override
from guest_memfd.core.hypervisor import Hypervisor
from guest_memfd.machine.board.config import Config
from guest_memfd.machine.board.hostcpu import HostCpu
from guest_memfd.machine.board.lock import Turns
from guest_memfd.machine.board.tracer import Tracer
from guest_memfd.machine.hw.arm64 import tlbi
from guest_memfd.machine.hw.arm64.entry import TlbEntry
from guest_memfd.machine.hw.buddy import Buddy
from guest_memfd.machine.hypcalls.driver import Driver
from guest_memfd.machine.hypcalls.hardware import Hardware
from guest_memfd.machine.hypcalls.vm import Vm
from guest_memfd.machine.linux import direct_map as dm
from guest_memfd.machine.linux.folio import LinuxFolio
from guest_memfd.machine.linux.inode import Inode
from guest_memfd.machine.linux.linear_map import LinearMap
from guest_memfd.machine.linux.mm import Mm
from guest_memfd.machine.linux.module import Loader, Module, ModuleImage
from guest_memfd.machine.linux.panic import KernelPanic
from guest_memfd.machine.linux.text import KernelText
from guest_memfd.words import facts
from guest_memfd.words.pagestate import GONE
from guest_memfd.words.primitives import Folio, Primitive, Splits
from guest_memfd.words.units import PAGE, Gfn, Index, Ipa, Pa, Pfn, Va, gpa_to_gfn, identity_ipa, pa_to_pfn, pfn_to_pa

FOLIO_BATCH = 31
"""Folios that a batch has room for (include/linux/folio_batch.h)."""

Judge = Callable[[Primitive, list[facts.Note]], None]
"""Told of every primitive, and of the facts that it left."""

_POKING = Va(0xFFFF_FC00_0000_0000)
"""Where one CPU maps a folio for itself alone for the moment; a multiple of 1 GiB, outside of the linear map."""


@dataclass
class PowerState:
    """Pages counted as gone from the host, hibernation announced, tasks frozen."""

    away: int = 0
    preparing: bool = False
    frozen: bool = False


class Board:
    """Linux under *hypervisor* on *hardware*; what `driver` makes issues its hypercalls. raises HostUnavailable."""

    def __init__(self, config: Config, hypervisor: Hypervisor, hardware: Hardware, driver: Callable[[], Driver]) -> None:
        self.config, self.hypervisor = config, hypervisor
        self.lock = Turns()
        self.ram, self.tlbs = hardware.ram, hardware.tlbs
        self.el2_pool, self.kernel_pages = hardware.el2_pool, hardware.kernel_pages
        self.on_free = config.on_free
        self.pages: dict[int, LinuxFolio] = {}
        self.lru_batch: dict[int, LinuxFolio] = {}
        self.inodes: dict[Inode, None] = {}
        self._accounted: Splits | None = None           # what has been split and is some file's; None: nobody accounts
        self.power = PowerState()
        self.dead: KernelPanic | None = None
        self.forked = False                                     # who calls is a child of the VMM (`in_child`)
        self.console: list[str] = []
        self._slab_in: int | None = None
        self._vms: list[Vm] = []
        self.folios: Buddy = self.kernel_pages
        self.watched: list[Pa] = []
        self.leaked = 0                                         # pages that are counted as never coming back
        self.batch: int | None = FOLIO_BATCH                    # None: each folio is added on a CPU of its own
        self.judge: Judge | None = None                         # of every host that has none of its own
        self._boot(driver)

    def _boot(self, driver: Callable[[], Driver]) -> None:
        text = self.kernel_pages.alloc()
        self.text = KernelText(self.ram, text)
        self.driver = driver()
        self.el2: Any = self.driver.el2
        # Under pKVM the host's stage 2 is filled by its first access; a page that is handed out has been touched.
        self.kernel_pages.touched = self.driver.host_touches
        self.linear_map = LinearMap(
            self.ram, self.kernel_pages, self.tlbs, release=self.config.release, rodata=self.config.rodata,
            bbml3=self.config.bbml3, tlb_range=self.config.tlb_range, vmid=lambda: self.driver.host_vmid)
        self.linear_map.tables.map(self.text.start, self.text.start + self.text.size, text, dm.PAGE_KERNEL_ROX, dm.ROX)
        self.bounce_va = self.linear_map.va(self.kernel_pages.alloc())
        self.vmm = Mm(self.ram, self.kernel_pages, self.tlbs, self.driver.host_vmid)
        self.cpu = HostCpu(self, sea_fixup=self.config.sea_fixup, pkvm=self.hypervisor.name == "pkvm")
        with self.poking(Folio(pa_to_pfn(text))):                  # poking_init(): tables that a mapping of the moment needs
            pass
        self.modules = Loader()
        loaded = self.modules.load(ModuleImage(self.hypervisor.module, exit=lambda: None))
        assert isinstance(loaded, Module)
        self.module = loaded
        self.tracer = Tracer(self)

    @override
    def __str__(self) -> str:
        c = self.config
        return f"{self.hypervisor.name} {c.release} rodata={c.rodata}{' bbml3' if c.bbml3 else ''}"

    # -- VMs, files ------------------------------------------------------------------------------------------------

    def create_vm(self, frames: int = 2) -> Vm:
        """A VM of *frames* guest page frames; its fd holds the module."""
        vm = self.driver.create_vm(frames)
        self.module.try_get()
        self._vms.append(vm)
        return vm

    def add_vm(self, vm: Vm) -> None:
        """A VM that a device has made."""
        self._vms.append(vm)

    def forget_vm(self, vm: Vm) -> None:
        """It has been destroyed: no one executes it, or finds it, any more."""
        vm.state = GONE
        if vm in self._vms:
            self._vms.remove(vm)
            # Megabytes for each vCPU, which the garbage collector may find much later.
            for core in (vcpu.cpu for vcpu in vm.handle.vcpus if vcpu.cpu is not None):
                core.release()

    # -- frames ------------------------------------------------------------------------------------------------------

    def number(self, pa: Pa) -> Pfn:
        """What the laws call the frame at *pa*: its place among the watched ones, or its frame number."""
        return Pfn(self.watched.index(pa)) if pa in self.watched else pa_to_pfn(pa)

    def named(self, pa: Pa, size: int) -> list[Pa]:
        """The pages of [pa, pa+size) that facts are about: those that are watched, or the first."""
        return [at for at in self.watched if pa <= at < pa + size] or [pa]

    def spot(self, page: LinuxFolio, pa: Pa) -> Pa:
        """The page that a fact about the byte at *pa*, which is *page*'s, names: its own where pages are watched."""
        return pa & -PAGE if self.watched else page.pa

    def page_at(self, pa: Pa) -> LinuxFolio:
        """The folio that the byte at *pa* belongs to, or a stand-in for a free frame."""
        pfn = pa_to_pfn(pa)
        page = self.pages.get(pfn)
        if page is not None:
            return page
        # A frame inside of a large folio: only the head has a struct page here.
        for order in (9, 18):
            page = self.pages.get(pfn & -1 << order)
            if page is not None and page.order >= order:
                return page
        return LinuxFolio(pfn_to_pa(pfn), 0)

    def allocated(self, page: LinuxFolio) -> bool:
        """Whether it is someone's."""
        return pa_to_pfn(page.pa) in self.pages

    def first_free(self, pa: Pa, size: int) -> Pa | None:
        """The lowest page of [pa, pa+size) that Linux's or EL2's allocator has, None when all of it is someone's."""
        found = (buddy.first_free(pa, size) for buddy in {self.kernel_pages, self.folios, self.el2_pool})
        return min((free for free in found if free is not None), default=None)

    @property
    def unloaded(self) -> bool:
        """Whether the hypervisor's module is gone."""
        return self.module.name not in self.modules.modules

    def slab_fails(self) -> bool:
        """Whether the allocation of a small object fails now; injected."""
        if self._slab_in is None:
            return False
        self._slab_in -= 1
        if self._slab_in >= 0:
            return False
        self._slab_in = None
        return True

    @property
    def slab_pending(self) -> bool:
        """Whether a small allocation is still to fail."""
        return self._slab_in is not None

    def fail_slab_at(self, n: int | None) -> None:
        """Let the *n*-th small allocation from now on (0: the next) fail once; None: none."""
        self._slab_in = n

    # -- who reaches what ----------------------------------------------------------------------------------------

    def kernel_maps(self, pa: Pa) -> bool:
        """Whether the linear map has *pa*, at its own address."""
        entry = self.linear_map.leaf(pa)
        offset = self.linear_map.va(pa) % dm.level_size(entry.level)
        # Present, and at its own address: an entry that leads to another page does not map this one.
        return self.linear_map.kernel_page_present(pa) and entry.oa + offset == pa

    def holds_kernel(self, pa: Pa) -> bool:
        """Whether some CPU's TLB still translates the linear-map address of *pa*."""
        va = self.linear_map.va(pa)
        return any(tlb.holds_stage1(va, None, self.driver.host_vmid) for tlb in self.tlbs)

    def host_reaches(self, pa: Pa) -> bool:
        """Whether stage 2, or a TLB entry made from it, lets the host touch *pa*."""
        # The table allows it, or a TLB entry that was made when it did.
        if self.driver.host_may(pa):
            return True
        return any(tlb.holds_stage2(identity_ipa(pa), self.driver.host_vmid) for tlb in self.tlbs)

    def mapped_by_user(self, pa: Pa, size: int) -> bool:
        """Whether a VMM's page table, or a TLB entry made from it, maps any of [pa, pa+size)."""
        for inode in self.inodes:
            mapping = inode.mapping
            if mapping is None:
                continue
            for index, at in mapping.present.items():
                if pa <= at < pa + size and mapping.lookup(index) == at:
                    return True
        return self.tlb_maps_user(pa, size)

    def tlb_maps_user(self, pa: Pa, size: int) -> bool:
        """Whether a TLB translates a user address to [pa, pa+size)."""
        return any(pa <= e.oa < pa + size for e in self._user_entries())

    def _user_entries(self) -> Iterator[TlbEntry]:
        return (e for tlb in self.tlbs for e in tlb.entries()
                if e.kind != "stage2" and e.vmid == self.driver.host_vmid and not e.ia >> 55)

    def user_indexes(self, pa: Pa) -> Iterator[Index]:
        """Which pages of a file TLBs take *pa* for."""
        found = (self.vmm.find(Va(e.ia)) for e in self._user_entries() if e.oa == pa)
        return (at[1] for at in found if at is not None)

    def any_guest_maps(self, pa: Pa) -> bool:
        """Whether any VM's stage 2 maps *pa*."""
        return any(self.driver.ipa_of(vm, pa) is not None for vm in self.vms)

    def guest_reaches(self, pa: Pa) -> bool:
        """Whether a guest reaches the page at *pa* through its tables or a TLB entry that outlived its mapping."""
        return self.any_guest_maps(pa) or any(self.stale_guest_gfn(vm, pa) is not None for vm in self.vms)

    @property
    def splits(self) -> Splits:
        """How many leaves of 2 MiB or more, of the linear map and of both stages 2, have been made smaller ones so far."""
        direct_map = sum(self.linear_map.tables.splits[size] for size in (dm.PMD_SIZE, dm.PUD_SIZE))
        return Splits(direct_map, self.driver.host_splits, self.driver.guest_splits)

    def begin_accounting(self) -> None:
        """Have files told from now on which leaves they split (`Inode.split`)."""
        self._accounted = self.splits

    def account(self, inode: Inode, *, by_guest: bool) -> None:
        """What has been split since the last call is *inode*'s: by a primitive, or by its guest on its own."""
        if self._accounted is None:
            return
        now = self.splits
        more, self._accounted = now.more_than(self._accounted), now
        # A guest splits its own leaf, and with it the host's note of the same pages. What else happens between primitives,
        # as memory that EL2 gets for the tables of a VM, is no file's.
        inode.split = inode.split.plus(Splits(0, min(more.host, more.guest), more.guest) if by_guest else more)

    def stale_guest_gfn(self, vm: Vm, pa: Pa) -> Gfn | None:
        """The guest frame number that a TLB still translates to *pa* and *vm*'s tables do not."""
        for tlb in self.tlbs:
            for entry in tlb.of_stage2(vm.vmid):
                if entry.oa <= pa < entry.oa + entry.size:
                    ipa = Ipa(entry.ia + (pa - entry.oa))
                    # An entry that agrees with the table is no stale one.
                    if self.driver.lookup(vm, ipa) != pa:
                        return gpa_to_gfn(ipa)
        return None

    # -- mappings of the moment ----------------------------------------------------------------------------------------

    @contextmanager
    def poking(self, folio: Folio) -> Iterator[Va]:
        """A virtual address at which this CPU alone has *folio* while the block runs (text_poke())."""
        tables, size = self.linear_map.tables, folio.nr * PAGE
        tables.map(_POKING, _POKING + size, pfn_to_pa(folio.pfn), dm.PAGE_KERNEL_TAGGED, dm.NO_CONT)
        try:
            yield _POKING
        finally:
            # Unmapped and flushed on this CPU alone: the mapping was never loaded on another (text_poke() works the
            # same way).
            for _, entry in list(tables.leaves(_POKING, _POKING + size)):
                tables.store(entry, 0)
            tlbi.vmalle1(self.tlbs[self.cpu.current], self.driver.host_vmid)

    # -- the console -----------------------------------------------------------------------------------------------------

    def log(self, text: str) -> None:
        """printk(): append *text* to the console, one entry a line."""
        self.console += text.splitlines()

    def panicked(self, panic: KernelPanic) -> None:
        """Linux has stopped: keep why, and print it to the console; no later call reaches the kernel."""
        self.dead = panic
        self.log(panic.text)

    @property
    def vms(self) -> Sequence[Vm]:
        """VMs that have not been destroyed."""
        return self._vms

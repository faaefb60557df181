"""What every primitive of the emulated host is given: the machine, the file, the task - and how it waits or dies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NoReturn

from guest_memfd.machine.linux.panic import HARDWARE, KernelPanic
from guest_memfd.words import facts
from guest_memfd.words.outcome import Blocked
from guest_memfd.words.pagestate import PRIVATE_PAGE, ZERO
from guest_memfd.words.primitives import Bound, Caller, Folio
from guest_memfd.words.units import Index, Pa, Pfn, pa_to_pfn

if TYPE_CHECKING:
    from guest_memfd.machine.board.board import Board
    from guest_memfd.machine.hypcalls.vm import Vm
    from guest_memfd.machine.linux.folio import LinuxFolio
    from guest_memfd.machine.linux.inode import Inode
    from guest_memfd.words.scene import Scene


class Base:
    """One guest_memfd file on a machine, and the primitive under way: who asks, and what it leaves for the laws."""

    machine: Board
    inode: Inode
    vm: Vm
    who: int
    caller: Caller
    notes: list[facts.Note]
    scene: Scene | None
    bounds: Mapping[str, Bound]
    errnos: Mapping[str, tuple[int, ...]]
    resumes: tuple[str, ...]

    def vm_at(self, index: Index) -> Vm:
        """The VM that page *index* is bound to, or would be."""
        return self.vm

    def wait(self) -> NoReturn:
        """The primitive cannot go on now; the caller waits."""
        raise Blocked

    def die(self, why: str) -> NoReturn:
        """BUG(): the kernel stops for a reason that is no abort."""
        self.notes.append(facts.Broken(why))
        raise KernelPanic(f"kernel BUG: {why}\n{HARDWARE}\nKernel panic - not syncing: Oops - BUG: Fatal exception")

    def gone(self, what: str) -> NoReturn:
        """The memory that the primitive works on has been freed: KASAN sees it, and the kernel stops (mm/kasan/report.c)."""
        self.notes.append(facts.UseAfterFree(what))
        raise KernelPanic(f"BUG: KASAN: slab-use-after-free of {what}\n{HARDWARE}\n"
                          "Kernel panic - not syncing: kasan.fault=panic set ...")

    def must_have(self, index: Index) -> None:
        """BUG() where the file has no page *index*: what is put there no one takes out again."""
        if not 0 <= index < self.inode.size:
            self.die(f"page {index} is used, of a file of {self.inode.size} pages")

    def against(self, reason: int, page: LinuxFolio | None = None) -> None:
        """Something stands against the operation that the task is in: at *page*, if it is a page's doing."""
        self.machine.tracer.against(self.who, reason, page if page is not None and page.inode is self.inode else None)

    def page(self, folio: Folio) -> LinuxFolio:
        """struct folio of *folio*, which someone holds."""
        # A folio whose last reference has gone has no struct page here. A procedure that still uses it reads what is
        # freed.
        page = self.machine.pages.get(folio.pfn) or self._around(folio)
        if page is None:
            self.die(f"{folio} is used without a reference")
        return page

    # The large folio that *folio*, a page of it, is part of: page_folio().
    def _around(self, folio: Folio) -> LinuxFolio | None:
        for order in self.inode.orders:
            page = self.machine.pages.get(Pfn(folio.pfn & -1 << order))
            if page is not None and page.order == order:
                return page
        return None

    def folio(self, page: LinuxFolio) -> Folio:
        """The handle procedures know *page* by."""
        return Folio(pa_to_pfn(page.pa), page.order)

    def locked(self, folio: Folio, what: str) -> LinuxFolio:
        """*folio*, which the caller must have locked."""
        page = self.page(folio)
        if page.lock != self.who:
            self.die(f"{what} of {folio} without its lock")
        return page

    def private(self, page: LinuxFolio, pa: Pa) -> bool:
        """The library's word on the page of *page* at *pa*: its attribute, or the mark where a design has no attributes."""
        # Designs without an attribute tree have only the mark to say it by.
        attribute = self.inode.entry("attributes", page.index_of(pa)) if page.inode is self.inode else 0
        return attribute == PRIVATE_PAGE if attribute else page.no_direct_map

    def drop(self, page: LinuxFolio, kind: str, nr: int = 1) -> None:
        """Drop *nr* references; a count below zero is a bug of the caller."""
        try:
            page.drop(kind, nr)
        except ValueError:
            self.die(f"reference count of {self.folio(page)} drops below zero ({kind})")

    def asked(self, page: LinuxFolio) -> bool:
        """Whether the guest can hold on to *page*: it has written to it, or was given it when it had faulted there."""
        tracer = self.machine.tracer
        return any(tracer.content(pa) != ZERO or pa in tracer.asked for pa in self.machine.named(page.pa, page.size))

"""The kernel touches memory on the emulated host: one real instruction per page-table leaf, and what comes of it.

An access runs our kernel text on the CPU. What stops it - a stage-1 fault, an abort that EL2 injects - goes through the
kernel's own fault table; this file only tells the laws what was seen.
"""

from __future__ import annotations

from collections.abc import Callable

from guest_memfd.core.hypervisor import DATA_ABORT, SEA
from guest_memfd.machine.board.hostcpu import Aborted, Ran
from guest_memfd.machine.hw.ram import PAGE
from guest_memfd.machine.linux.direct_map import level_size
from guest_memfd.machine.linux.page import Page
from guest_memfd.machine.linux.panic import KernelPanic
from guest_memfd.machine.linux.snapshot import safe_copy_page
from guest_memfd.machine.primitives.base import Base
from guest_memfd.machine.primitives.services import Services
from guest_memfd.words import facts
from guest_memfd.words.pagestate import DATA, ZERO
from guest_memfd.words.primitives import Folio

WORD = 8
BEFORE = 4
"""load_unaligned_zeropad() starts this many bytes before the end of the page in front."""


class Contents(Base):
    """clear_folio ... copy_from_kernel_nofault, and `kernel_access`, the one way the kernel touches memory."""

    def note_access(self, page: Page, who: str, what: str, via: str, write: bool, content: int) -> None:
        """Record that *who* reached the contents, which were *content* until then."""
        self.notes.append(self.machine.tracer.access(self, page, who, what, via, write, content))

    # Every abort that the CPU took on the way, as a fact.
    def _note_aborts(self, what: str, page: Page, aborts: list[Aborted], *, survived: bool) -> None:
        for aborted in aborts:
            kind = ("translation fault" if aborted.stage == 1 else SEA if aborted.external else DATA_ABORT)
            self.notes.append(facts.Abort(what, aborted.stage, self.machine.number(page.pa), kind, survived,
                                          aborted.words()))

    def kernel_access(self, page: Page, who: str, what: str, symbol: str, *arguments: int) -> str:
        """Call kernel function *symbol*: ``ok``, ``fixed`` (the exception table), or the end of the kernel."""
        machine = self.machine
        # Asked before the access: if it arrives although the table has no entry, it came through a TLB.
        stale = not machine.linear_map.kernel_page_present(page.pa)
        content = machine.tracer.content(page)
        ran = self._run(what, page, lambda: machine.cpu.call(symbol, *arguments))
        if ran.fixed:
            return "fixed"
        # Compared with where the instruction really arrived. A direct map that leads to another page would otherwise
        # go unseen.
        if not any(page.pa <= pa < page.pa + page.size for pa in ran.reached):
            self.die(f"{what} reaches {ran.reached[-1]:#x} and not {page.pa:#x}: the direct map leads astray")
        self.note_access(page, who, what, "stale TLB entry" if stale else "direct map", symbol == "plain_write",
                         ZERO if ran.reclaimed else content)
        return "ok"

    def _run(self, what: str, page: Page, run: Callable[[], Ran]) -> Ran:
        cpu = self.machine.cpu
        try:
            ran = run()
        except KernelPanic:
            self._note_aborts(what, page, cpu.aborts, survived=False)
            raise
        if ran.reclaimed:
            self.machine.tracer.reclaimed_by_force(self, page)
        self._note_aborts(what, page, cpu.aborts, survived=True)
        return ran

    def kernel_write(self, page: Page, who: str, what: str) -> None:
        """Store to every leaf through which the direct map shows *page*: what holds for one word of it holds for all."""
        lm = self.machine.linear_map
        pa = page.pa
        while pa < page.pa + page.size:
            self.kernel_access(page, who, what, "plain_write", lm.va(pa))
            # One store for each leaf: what holds for one word of it holds for all, and a folio of 1 GiB has 2^27
            # words.
            size = level_size(lm.leaf(pa).level)
            pa += size - lm.va(pa) % size

    def load_unaligned_zeropad(self, pfn: int) -> str:
        """A word load from the page before that runs into *pfn*: it has an exception-table entry."""
        page = self.machine.page_at(pfn * PAGE)
        return self.kernel_access(page, "kernel", "load_unaligned_zeropad", "load_unaligned_zeropad",
                                  self.machine.linear_map.va(page.pa) - BEFORE)

    def copy_from_kernel_nofault(self, pfn: int) -> str:
        """/proc/kcore: it has an exception-table entry; poisoned pages are skipped (fs/proc/kcore.c)."""
        page = self.machine.page_at(pfn * PAGE)
        if page.hwpoison:
            return "skipped"
        return self.kernel_access(page, "kernel", "copy_from_kernel_nofault", "copy_from_kernel_nofault",
                                  self.machine.bounce_va, self.machine.linear_map.va(page.pa), WORD)

    def read_folio(self, folio: Folio) -> str:
        """A plain read through the direct map, of a folio that the reader found in the page cache."""
        page = self.page(folio)
        return self.kernel_access(page, "kernel", "read_folio", "plain_read", self.machine.linear_map.va(page.pa))

    def clear_folio(self, folio: Folio) -> None:
        """A plain write through the direct map."""
        page = self.page(folio)
        self.kernel_write(page, "library", "clear_folio")
        self._zeroed(page)

    def clear_folio_local(self, folio: Folio) -> None:
        """A write through a mapping that this CPU alone has for the moment (text_poke()): stage 2 still has a say."""
        page, machine = self.page(folio), self.machine
        content = machine.tracer.content(page)
        with machine.poking(page) as va:
            ran = self._run("clear_folio_local", page, lambda: machine.cpu.call("plain_write", va))
        self.note_access(page, "library", "clear_folio_local", "local mapping", True,
                         ZERO if ran.reclaimed else content)
        self._zeroed(page)

    def _zeroed(self, page: Page) -> None:
        self.machine.ram.zero(page.pa, page.size)
        self.machine.tracer.secret.discard(page.pa)

    def image_copy(self, pfn: int) -> str:
        """safe_copy_page(): map a hole for the moment, copy plainly, make the hole again (kernel/power/snapshot.c)."""
        machine = self.machine
        page = machine.page_at(pfn * PAGE)
        if not machine.allocated(page) or page.hwpoison:
            return "skipped"

        def read(pa: int) -> bytes:
            self.kernel_access(page, "image", "safe_copy_page", "plain_read", machine.linear_map.va(pa))
            return machine.ram.read(pa, PAGE)

        # The kernel's own procedure, with the copy replaced by one that the laws are told of.
        safe_copy_page(Services(machine, read), page.pa)
        return "copied"

    def written(self, page: Page, token: bytes) -> None:
        """Someone of the host's side has put *token* there: both sides may know it."""
        self.machine.ram.write(page.pa, token)
        self.machine.tracer.wrote(page, DATA)

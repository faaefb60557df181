"""What the laws remember of guests that are real programs. Who could write tells what a page holds.

In a scenario every party writes a mark of its own, so bytes say who was there. A program writes what it likes. Here a page
that a guest has as its own holds a secret as soon as it is not all zeros; whatever a page held before the kernel cleared it
is someone else's data.
"""

from __future__ import annotations

from collections.abc import Callable

from guest_memfd.compat import override
from guest_memfd.machine.board.tracer import TracedTask, Tracer
from guest_memfd.machine.linux.folio import LinuxFolio
from guest_memfd.machine.linux.inode import Inode
from guest_memfd.words import facts
from guest_memfd.words.pagestate import ANY, DATA, JUNK, PRIVATE_PAGE, SECRET, ZERO
from guest_memfd.words.units import PAGE, Pa

_ZEROS = bytes(PAGE)


class ProgramTracer(Tracer):
    """The ghosts of a machine whose guests run programs."""

    @override
    def content(self, pa: Pa) -> int:
        """ZERO; SECRET; DATA for a page that has been cleared in this life; JUNK for any other."""
        if self.machine.ram.read(pa, PAGE) == _ZEROS:
            return ZERO
        if pa in self.secret:
            return SECRET
        return DATA if self.machine.page_at(pa).uptodate else JUNK

    @override
    def contents(self) -> Callable[[Pa], int]:
        """`content`, asked afterwards: no write makes a page other than it was in a way that a law would miss."""
        return self.content

    @override
    def declassify(self, page: LinuxFolio, pa: Pa) -> None:
        """The guest agrees that the host reads the page, whatever it holds by now."""
        self.secret.discard(pa)
        self.expect(page, pa, ANY)

    @override
    def access(self, host: TracedTask, page: LinuxFolio, pa: Pa, who: str, what: str, via: str, write: bool,
               content: int) -> facts.Access:
        """As for every tracer; a write finds nothing that could be expected."""
        fact = super().access(host, page, pa, who, what, via, write, content)
        return fact._replace(expect=None) if write else fact

    @override
    def after_hypercall(self, page: LinuxFolio, pa: Pa, sanitised: bool) -> None:
        """A page that a guest maps may hold anything from now on, and what it has alone is its secret."""
        super().after_hypercall(page, pa, sanitised)
        machine = self.machine
        owned = machine.driver.owner(pa) == "guest"
        if machine.any_guest_maps(pa):
            self.expect(page, pa, ANY)
            if owned or (isinstance(page.inode, Inode) and page.inode.entry("attributes", page.index) == PRIVATE_PAGE):
                self.secret.add(pa)
        elif owned and not sanitised and machine.hypervisor.consents is not None:
            self.secret.discard(pa)                     # unlocked before: the guest has agreed

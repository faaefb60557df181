"""Power and hardware errors on the emulated host: who is counted, who waits, who is frozen, what is broken."""

from __future__ import annotations

from guest_memfd.hosts.emulated.primitives.files import Files
from guest_memfd.hosts.host import EAGAIN, EBUSY, Folio


class Power(Files):
    """pm_account ... hwpoison."""

    def pm_account(self, pages: int) -> int:
        """Counted and refused atomically."""
        power = self.machine.power
        if pages > 0 and power.preparing:
            return -EAGAIN
        if power.away + pages < 0:
            self.die("more pages come back to the host than had left it")
        power.away += pages
        return 0

    def pm_prepare(self, what: str) -> int:
        """Veto, or close the door."""
        if self.machine.power.away:
            return -EBUSY
        self.machine.power.preparing = True
        return 0

    def pm_post(self) -> None:
        """The door opens."""
        self.machine.power.preparing = False

    def open_files(self) -> int:
        """secretmem_users."""
        return sum(inode.files > 0 for inode in self.machine.inodes)

    def freeze_processes(self) -> None:
        """Tasks stop where they can: outside of every memory operation (kernel/power/process.c)."""
        if self._busy():
            self.wait()
        self.machine.power.frozen = True

    def _busy(self) -> bool:
        sems = [sem for inode in self.machine.inodes for sem in (inode.invalidate, inode.bindings)]
        return (any(s.writer is not None or s.readers or s.queued is not None for s in sems)
                or any(p.lock is not None or p.lookup or p.spec for p in self.machine.pages.values())
                or bool(self.vm.gpc_readers))

    def thaw_processes(self) -> None:
        """They run again."""
        self.machine.power.frozen = False

    def hwpoison(self, index: int) -> Folio | None:
        """Hardware reports the folio at *index*; memory_failure() holds a reference while it works."""
        page = self.inode.find(index)
        if page is None or page.hwpoison:
            return None
        page.hwpoison = True
        page.take("lookup")
        return self.folio(page)

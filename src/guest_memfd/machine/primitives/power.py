"""Power and hardware errors on the emulated host: who is counted, who waits, who is frozen, what is broken."""

from __future__ import annotations

from guest_memfd.machine.primitives.files import FilePrimitives
from guest_memfd.words import facts
from guest_memfd.words.pagestate import ALIVE, HIBERNATION, RUNNING
from guest_memfd.words.primitives import EAGAIN, EBUSY, EPERM, Folio


class PowerPrimitives(FilePrimitives):
    """Hibernation, the freezer and memory failure: pm_account to memory_failure_done."""

    def pm_account(self, pages: int) -> int:
        """Count *pages* that leave the host, in one step with the check: -EAGAIN once hibernation has begun to prepare."""
        power = self.machine.power
        if pages > 0 and power.preparing:
            self.against(HIBERNATION)
            return -EAGAIN
        if power.away + pages < 0:
            self.die("more pages come back to the host than had left it")
        power.away += pages
        return 0

    def pm_prepare(self, what: str) -> int:
        """-EBUSY while pages are away from the host, else 0: from now on none may leave until `pm_post`."""
        if self.machine.power.away:
            self.machine.tracer.ended[self.who] = -EBUSY
            return -EBUSY
        self.machine.power.preparing = True
        return 0

    def pm_post(self) -> None:
        """End the hibernation that `pm_prepare` began: pages may leave the host again."""
        self.machine.power.preparing = False

    def open_files(self) -> int:
        """How many files have a reference left, as secretmem_users counts; hibernation asks for it."""
        count = sum(inode.files > 0 for inode in self.machine.inodes)
        if count:
            self.machine.tracer.ended[self.who] = -EPERM
        return count

    def freeze_processes(self) -> None:
        """Tasks stop where they can: outside of every memory operation (kernel/power/process.c)."""
        if self._busy():
            self.wait()
        self.machine.power.frozen = True

    def _busy(self) -> bool:
        # v17's bindings_lock is the VM's: it is there when the inode, through which it is found here, has gone.
        inodes = {*self.machine.inodes, self.inode}
        sems = [sem for inode in inodes for sem in (inode.invalidate, inode.bindings)]
        return (any(s.writer is not None or s.readers or s.queued is not None for s in sems)
                or any(p.lock is not None or p.lookup or p.spec for p in self.machine.pages.values())
                or bool(self.vm.gpc_readers))

    def thaw_processes(self) -> None:
        """Let the tasks run that `freeze_processes` has stopped."""
        self.machine.power.frozen = False

    def hwpoison(self, index: int) -> Folio | None:
        """Hardware reports the folio at *index*; memory_failure() holds a reference while it works."""
        page = self.inode.find(index)
        if page is None or page.hwpoison:
            return None
        page.hwpoison = True
        page.take("lookup")
        return self.folio(page)

    def memory_failure_done(self, folio: Folio, result: str) -> None:
        """Who still reaches the page now, and what the handler makes of it."""
        machine, page = self.machine, self.page(folio)
        reached = {"the guest": self.vm.state == RUNNING and machine.guest_reaches(page),
                   "the VMM": machine.mapped_by_user(page.pa, page.size), "the kernel": self.vm.gpc is page}
        self.notes.append(facts.Contained(machine.number(page.pa), result, tuple(who for who, how in reached.items() if how),
                                          machine.tracer.forget(self.who, excused=self.inode.life != ALIVE)))
        page.handled = result == "delayed"

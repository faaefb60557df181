"""Power and hardware errors on the emulated host: who is counted, who waits, who is frozen, what is broken."""

from __future__ import annotations

from errno import EAGAIN, EBUSY, EPERM

from guest_memfd.machine.primitives.base import Base
from guest_memfd.words import facts
from guest_memfd.words.pagestate import ALIVE, HIBERNATION, RUNNING
from guest_memfd.words.primitives import Folio, MfResult
from guest_memfd.words.units import PAGE, Index


def pm_account(host: Base, pages: int) -> int:
    """Count *pages* that leave the host, in one step with the check: -EAGAIN once hibernation has begun to prepare."""
    power = host.machine.power
    if pages > 0 and power.preparing:
        host.against(HIBERNATION)
        return -EAGAIN
    if power.away + pages < 0:
        host.die("more pages come back to the host than had left it")
    power.away += pages
    return 0


def pm_prepare(host: Base, what: str) -> int:
    """-EBUSY while pages are away from the host, else 0: from now on none may leave until `pm_post`."""
    if host.machine.power.away:
        host.machine.tracer.ended[host.who] = facts.HowEnded("hibernate", -EBUSY)
        return -EBUSY
    host.machine.power.preparing = True
    return 0


def pm_post(host: Base) -> None:
    """End the hibernation that `pm_prepare` began: pages may leave the host again."""
    host.machine.power.preparing = False


def open_files(host: Base) -> int:
    """How many files have a reference left, as secretmem_users counts; hibernation asks for it."""
    count = sum(inode.files > 0 for inode in host.machine.inodes)
    if count:
        host.machine.tracer.ended[host.who] = facts.HowEnded("hibernate", -EPERM)
    return count


def freeze_processes(host: Base) -> None:
    """Tasks stop where they can: outside of every memory operation (kernel/power/process.c)."""
    if _busy(host):
        host.wait()
    host.machine.power.frozen = True


def _busy(host: Base) -> bool:
    # v17's bindings_lock is the VM's: it is there when the inode, through which it is found here, has gone.
    inodes = {*host.machine.inodes, host.inode}
    sems = [sem for inode in inodes for sem in (inode.invalidate, inode.bindings)]
    return (any(s.writer is not None or s.readers or s.queued is not None for s in sems)
            or any(p.lock is not None or p.lookup or p.spec for p in host.machine.pages.values())
            or bool(host.vm.gpc_readers or host.vm.srcu) or host.vm.slots_lock is not None
            or host.vm.mmu_lock.writer is not None or bool(host.vm.mmu_lock.readers))


def thaw_processes(host: Base) -> None:
    """Let the tasks run that `freeze_processes` has stopped."""
    host.machine.power.frozen = False


def hwpoison(host: Base, index: Index) -> Folio | None:
    """Hardware reports the folio at *index*; memory_failure() holds a reference while it works."""
    page = host.inode.find(index)
    if page is None:
        return None
    pa = page.pa + (index - page.index) * PAGE
    if pa in page.broken:                               # reported once
        return None
    page.broken.add(pa)
    page.take("lookup")
    return host.folio(page)


def memory_failure_done(host: Base, folio: Folio, result: MfResult) -> None:
    """Who still reaches the page now, and what the handler makes of it."""
    machine, page = host.machine, host.page(folio)
    reasons = machine.tracer.forget(host.who, excused=host.inode.life != ALIVE)
    about = machine.named(page.pa, page.size) if machine.watched else sorted(page.broken)
    for pa in (pa for pa in about if pa in page.broken):
        reached = {"the guest": host.vm.state == RUNNING and machine.guest_reaches(pa),
                   "the VMM": machine.mapped_by_user(pa, PAGE), "the kernel": host.vm.gpc is page and page.pa == pa}
        host.notes.append(facts.Contained(
            machine.number(pa), result, tuple(who for who, how in reached.items() if how), reasons))
    page.handled = set(page.broken) if result == "delayed" else set()

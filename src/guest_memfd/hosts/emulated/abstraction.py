"""The abstraction function: what the abstract host would call the state that the emulated machine is in.

Rule of this file: every field is read from where the machine keeps it - descriptors in RAM, EL2's records, TLBs, struct
folio, bytes - or from the tracer, if it is a ghost. Nothing is remembered between two calls.
"""

from __future__ import annotations

from guest_memfd.hosts.abstract import state as st
from guest_memfd.hosts.emulated.kernel.page import KINDS, Page
from guest_memfd.hosts.emulated.primitives.host import EmulatedHost
from guest_memfd.hosts.emulated.ram import PAGE


def abstraction(host: EmulatedHost, failures: int = 0) -> bytes:
    """The state of hosts/abstract that *host*'s machine is in: frame i is the i-th of the frames it watches.

    *failures* is the scheduler's to know: how many may still be injected.
    """
    state = st.State()
    for frame, pa in zip(state.frames(), host.machine.watched, strict=True):
        _frame(host, frame, pa)
    for page in state.pages():
        _page(host, page)
    for task in range(st.PARTIES):
        _ghost(host, state.ghost(task))
    _globals(host, state)
    state.failures = failures
    return state.save()


def _frame(host: EmulatedHost, frame: st.Frame, pa: int) -> None:
    machine, driver, vm = host.machine, host.machine.driver, host.vm
    frame.owner = st.OWNERS.index(driver.owner(pa))
    frame.s1 = machine.kernel_maps(pa)
    frame.stale = not frame.s1 and machine.holds_kernel(pa)
    frame.s2 = machine.host_reaches(pa)
    if vm.state != st.GONE:
        mapped = driver.guest_maps(vm, pa)
        frame.gmap = 0 if mapped is None else mapped // PAGE + 1
        stale = machine.stale_guest_gfn(vm, pa)
        frame.gstale = 0 if stale is None else stale + 1
        frame.locked_in = driver.locked_in(vm, pa)
    frame.user = machine.mapped_by_user(pa, PAGE)
    page = machine.pages.get(pa // PAGE)
    frame.content = machine.tracer.content(page or Page(pa, 0))
    frame.allocated = st.KEPT if page and page.kept else st.ALLOCATED if page else st.FREE
    if page is not None:
        if page.refcount + page.kept != page.kinds():
            raise AssertionError(f"pfn {pa // PAGE:#x}: {page.refcount} references, {page.kinds()} by kind")
        for kind in KINDS:
            setattr(frame, kind, getattr(page, kind))
        frame.slot = page.index + 1 if page.inode is host.inode else 0
        frame.lock = 0 if page.lock is None else page.lock + 1
        frame.uptodate, frame.private, frame.poison = page.uptodate, page.private, page.hwpoison


def _page(host: EmulatedHost, page: st.Page) -> None:
    machine, inode, index = host.machine, host.inode, page.number
    cached = inode.find(index)
    page.cached = machine.number(cached.pa) + 1 if cached else 0
    page.attr = inode.entry("attributes", index)
    page.binding = inode.entry("bindings", index)
    page.provided = inode.entry("provided", index)
    page.gpoison = host.vm.state != st.GONE and machine.driver.poisoned(host.vm, index)
    page.expect = machine.tracer.expected.get((inode, index), st.ZERO)


def _ghost(host: EmulatedHost, ghost: st.PartyGhost) -> None:
    operation = host.machine.tracer.operations.get(ghost.number)
    if operation is not None:
        ghost.op = st.OPS.index(operation.op) + 1
        ghost.scope = _mask(range(operation.start, operation.start + operation.nr))
        ghost.toggled, ghost.removed = _mask(operation.toggled), _mask(operation.removed)


def _mask(members: range | set[int]) -> int:
    return sum(1 << i for i in members if i < st.PAGES)


def _globals(host: EmulatedHost, state: st.State) -> None:
    machine, inode, vm = host.machine, host.inode, host.vm
    for name, sem in (("invalidate", inode.invalidate), ("bindings", inode.bindings)):
        setattr(state, f"{name}_w", 0 if sem.writer is None else sem.writer + 1)
        setattr(state, f"{name}_r", sem.readers)
        setattr(state, f"{name}_q", 0 if sem.queued is None else sem.queued + 1)
    state.fd, state.files, state.inodes = inode.fd, inode.files, inode.references
    state.vma = len(inode.mapping.vmas) if inode.mapping else 0
    state.vm, state.progress = vm.state, vm.invalidations
    state.module, state.unloaded = machine.module.refcount, machine.unloaded
    state.gpc = machine.number(vm.gpc.pa) + 1 if vm.gpc else 0
    state.gpc_fresh, state.gpc_readers = vm.gpc_fresh, vm.gpc_readers
    state.away, state.preparing, state.frozen = machine.power.away, machine.power.preparing, machine.power.frozen
    state.reserved = inode.reserved
    state.panic = machine.dead is not None

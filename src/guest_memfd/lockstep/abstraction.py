"""The abstraction function: what the abstract host would call the state that the emulated machine is in.

Rule of this file: every field is read from where the machine keeps it - descriptors in RAM, EL2's records, TLBs, struct
folio, bytes - or from the tracer, if it is a ghost (tests/test_abstraction.py holds it). Nothing is remembered between
two calls.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection

from guest_memfd.abstract import state as st
from guest_memfd.machine.linux.folio import KINDS, LinuxFolio
from guest_memfd.machine.primitives.host import EmulatedHost
from guest_memfd.words.pagestate import ALLOCATED, FREE, KEPT, MAPPED, MARKED, OWNERS, UNMAPPED, ZERO
from guest_memfd.words.primitives import OPS
from guest_memfd.words.units import FIRST_PAGE, Gfn, Index, Pa, gpa_to_gfn, pa_to_pfn, span


def abstraction(host: EmulatedHost, sizes: st.Sizes, failures: int = 0, given: int = 0, refusals: int = 0) -> bytes:
    """The state of abstract, of *sizes*, that *host*'s machine is in: frame i is the i-th of those it watches.

    *failures* and *refusals* are the scheduler's to know: how many may still be injected, and (*given*) could at first.
    """
    state = st.State.empty(sizes)
    for frame, pa in zip(state.frames(), host.machine.watched, strict=True):
        _frame(host, frame, pa)
    for page in state.pages():
        _page(host, page)
    for gfn in state.gfns():
        _gfn(host, gfn)
    for ghost in state.ghosts():
        _ghost(host, ghost, sizes.pages)
    _file(host, state.file())
    _vm(host, state.vm())
    _globals(host, state)
    state.failures, state.given, state.refusals = failures, given, refusals
    return state.save()


def _frame(host: EmulatedHost, frame: st.Frame, pa: Pa) -> None:
    machine, driver, vm = host.machine, host.machine.driver, host.vm
    frame.owner = OWNERS.index(driver.owner(pa))
    frame.s1 = machine.kernel_maps(pa)
    # A TLB entry that agrees with the table is not stale; the abstract host does not know that it is there.
    frame.stale = not frame.s1 and machine.holds_kernel(pa)
    frame.s2 = machine.host_reaches(pa)
    mapped = driver.ipa_of(vm, pa)
    frame.gmap = 0 if mapped is None else gpa_to_gfn(mapped) + 1
    frame.asked = mapped is not None and pa in machine.tracer.asked
    frame.withdrawn = pa in machine.tracer.withdrawn
    stale = machine.stale_guest_gfn(vm, pa)
    frame.gstale = 0 if stale is None else stale + 1
    frame.locked_in = driver.locked_in(vm, pa)
    frame.user = _shown_at(host, pa)
    frame.stuck = pa in driver.stuck
    page = machine.pages.get(pa_to_pfn(pa))
    frame.content = machine.tracer.content(page or LinuxFolio(pa, 0))
    frame.allocated = KEPT if page and page.retired else ALLOCATED if page else FREE
    if page is not None:
        # The machine has one count, as the kernel does, and the kinds beside it, for the laws. If they differ the
        # machine is wrong, not the design.
        if page.refcount != page.kinds():
            raise AssertionError(f"pfn {pa_to_pfn(pa):#x}: {page.refcount} references, {page.kinds()} by kind")
        for kind in KINDS:
            setattr(frame, kind, getattr(page, kind))
        # A frame of another file, or of none, is in no slot of this one.
        frame.slot = page.index + 1 if page.inode is host.inode else 0
        frame.lock = 0 if page.lock is None else page.lock + 1
        frame.uptodate, frame.poison = page.uptodate, page.hwpoison
        frame.no_direct_map = UNMAPPED if page.unmapped else MARKED if page.no_direct_map else MAPPED
        frame.handled = page.handled


# Page index + 1 at which the VMM's page table has the frame; a TLB entry that says otherwise goes first.
def _shown_at(host: EmulatedHost, pa: Pa) -> int:
    mapping = host.inode.mapping
    table = {i for i in span(FIRST_PAGE, host.inode.size) if mapping.lookup(i) == pa} if mapping is not None else set()
    outlived = set(host.machine.user_indexes(pa)) - table
    # An entry that has outlived the table is what an access would hit first, so it is what the abstract host must
    # have.
    return min(outlived or table, default=-1) + 1


def _page(host: EmulatedHost, page: st.PageRecord) -> None:
    machine, inode, index = host.machine, host.inode, Index(page.number)        # there is one file
    cached = inode.find(index)
    page.cached = machine.number(cached.pa) + 1 if cached else 0
    page.attr = inode.entry("attributes", index)
    page.binding = inode.entry("bindings", index)
    page.expect = machine.tracer.expected.get((inode, index), ZERO)


def _gfn(host: EmulatedHost, gfn: st.GfnRecord) -> None:
    gfn.provided = host.inode.entry("provided", Gfn(gfn.number))
    gfn.gpoison = host.machine.driver.poisoned(host.vm, Gfn(gfn.number))


def _ghost(host: EmulatedHost, ghost: st.PartyGhost, pages: int) -> None:
    tracer = host.machine.tracer
    ghost.begun = host.vm.begun[ghost.number]
    ghost.announced = _mask({*itertools.chain(*tracer.announced.get(ghost.number, ()))}, pages)
    how = tracer.ended.get(ghost.number)
    if how is not None:
        ghost.ended, ghost.ended_op, ghost.scope = 1 - how.ret, OPS.index(how.op) + 1, _mask(how.about, pages)
        ghost.ended_at = 0 if how.at is None else how.at + 1
        ghost.gfn = 0 if how.gfn is None else how.gfn + 1
    operation = tracer.operations.get(ghost.number)
    if operation is not None:
        ghost.op = OPS.index(operation.op) + 1
        ghost.gfn = 0 if operation.gfn is None else operation.gfn + 1
        ghost.scope = _mask(range(operation.start, operation.start + operation.nr), pages)
        ghost.toggled, ghost.removed = _mask(operation.toggled, pages), _mask(operation.removed, pages)
        ghost.reasons, ghost.places = operation.reasons, _mask(operation.places, pages)
        for what, count in operation.cost.items():
            setattr(ghost, what, count)


def _mask(members: Collection[int], pages: int) -> int:
    return sum(1 << i for i in members if 0 <= i < pages)


def _file(host: EmulatedHost, file: st.FileRecord) -> None:
    inode = host.inode
    for name, sem in (("invalidate", inode.invalidate), ("bindings", inode.bindings)):
        setattr(file, f"{name}_w", 0 if sem.writer is None else sem.writer + 1)
        setattr(file, f"{name}_r", sem.readers)
        setattr(file, f"{name}_q", 0 if sem.queued is None else sem.queued + 1)
    file.fd, file.files, file.inodes = inode.fd, inode.files, inode.references
    file.inode, file.evictor = inode.life, 0 if inode.evictor is None else inode.evictor + 1
    file.vma = len(inode.mapping.vmas) if inode.mapping else 0
    file.reserved, file.refuses_readers = _mask(inode.reserved, inode.size), inode.refuses_readers
    file.released = inode.released


def _vm(host: EmulatedHost, record: st.VmRecord) -> None:
    vm = host.vm
    record.vm, record.progress = vm.state, vm.begun.total()
    record.gpc = host.machine.number(vm.gpc.pa) + 1 if vm.gpc else 0
    record.gpc_fresh, record.gpc_readers = vm.gpc_fresh, vm.gpc_readers


def _globals(host: EmulatedHost, state: st.State) -> None:
    machine = host.machine
    state.module, state.unloaded = machine.module.refcount, machine.unloaded
    state.away, state.preparing, state.frozen = machine.power.away, machine.power.preparing, machine.power.frozen
    state.leaked = machine.leaked
    state.panic = machine.dead is not None

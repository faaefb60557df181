"""The abstraction function: what the abstract host would call the state that the emulated machine is in.

Rule of this file: every field is read from where the machine keeps it - descriptors in RAM, EL2's records, TLBs, struct
folio, bytes - or from the tracer, if it is a ghost (tests/test_abstraction.py holds it). Nothing is remembered between
two calls.

Where a scene has large folios a page of it is *share* pages of the machine, which are alike (blocks.py). One of them stands
for the others: so many pages from the first as the first watched page is. `unlike` looks at the others.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

from guest_memfd.abstract import state as st
from guest_memfd.machine.linux.folio import KINDS
from guest_memfd.machine.linux.rwsem import Rwsem
from guest_memfd.machine.primitives.host import EmulatedHost
from guest_memfd.words.pagestate import ALLOCATED, FREE, KEPT, MAPPED, MARKED, OWNERS, UNMAPPED, ZERO
from guest_memfd.words.primitives import OPS
from guest_memfd.words.units import PAGE, Gfn, Index, Pa, gpa_to_gfn, pa_to_pfn, span

ASTRAY = 250
"""A number that is none of a page of the scene: the machine's leads into the middle of one, or to another part of it."""

OF_ONE = frozenset({"stale", "gstale", "asked", "withdrawn", "stuck", "of"})
"""Fields that only the page that stands for the others has: what is in a TLB, and what laws and tests remember."""


def abstraction(host: EmulatedHost, sizes: st.Sizes, failures: int = 0, given: int = 0, refusals: int = 0) -> bytes:
    """The state of abstract, of *sizes*, that *host*'s machine is in: frame i is the i-th of those it watches.

    *failures* and *refusals* are the scheduler's to know: how many may still be injected, and (*given*) could at first.
    """
    state, share = st.State.empty(sizes), host.inode.size // sizes.pages
    at = pa_to_pfn(host.machine.watched[0]) % share
    for frame, pa in zip(state.frames(), host.machine.watched, strict=True):
        _frame(host, frame, pa, at, share)
        if sizes.order:
            _folio(host, state.folio(frame.number), pa, share)
    for page in state.pages():
        _page(host, page, at, share)
    for gfn in state.gfns():
        _gfn(host, gfn, at, share)
    for ghost in state.ghosts():
        _ghost(host, ghost, sizes.pages, share)
    _file(host, state.file(), share)
    _vm(host, state.vm(), share)
    _globals(host, state, share)
    state.failures, state.given, state.refusals = failures, given, refusals
    return state.save()


def unlike(host: EmulatedHost, saved: bytes, pages: Iterable[tuple[int, int]]) -> Iterator[str]:
    """What is not so of the page that is *at* further on in a frame, and is of the one that stands for it in *saved*.

    *pages* are (frame, at).
    """
    state = st.State(saved)
    sizes = state.layout.sizes
    share = host.inode.size // sizes.pages
    stands = pa_to_pfn(host.machine.watched[0]) % share
    for number, at in pages:
        frame = state.frame(state.layout.pfns[number])
        pa = host.machine.watched[number] + (at - stands) * PAGE
        scratch = st.State.empty(sizes)
        other = scratch.frame(frame.number)
        _frame(host, other, pa, at, share)
        for name in st.FRAME_FIELDS:
            one, two = getattr(frame, name), getattr(other, name)
            if one != two and name not in OF_ONE:
                yield f"pfn{number}.{name}: {one} of the page that stands for all, {two} of page {at}"
        # The TLBs of a watched page are the fuller ones.
        if other.stale > frame.stale or (other.gstale and not frame.gstale):
            yield f"pfn{number}: page {at} is in a TLB, and the page that stands for all is not"


# What is *share* times as much on the machine, and *at* more.
def _down(number: int, at: int, share: int) -> int:
    whole, rest = divmod(number - at, share)
    return ASTRAY if rest else whole


def _frame(host: EmulatedHost, frame: st.Frame, pa: Pa, at: int, share: int) -> None:
    machine, driver, vm = host.machine, host.machine.driver, host.vm
    frame.owner = OWNERS.index(driver.owner(pa))
    frame.s1 = machine.kernel_maps(pa)
    # A TLB entry that agrees with the table is not stale; the abstract host does not know that it is there.
    frame.stale = not frame.s1 and machine.holds_kernel(pa)
    frame.s2 = machine.host_reaches(pa)
    mapped = driver.ipa_of(vm, pa)
    frame.gmap = 0 if mapped is None else _down(gpa_to_gfn(mapped), at, share) + 1
    frame.asked = mapped is not None and pa in machine.tracer.asked
    frame.withdrawn = pa in machine.tracer.withdrawn
    stale = machine.stale_guest_gfn(vm, pa)
    frame.gstale = 0 if stale is None else _down(stale, at, share) + 1
    frame.locked_in = driver.locked_in(vm, pa)
    frame.user = _shown_at(host, pa, at, share)
    frame.stuck = pa in driver.stuck
    page = machine.page_at(pa)
    frame.content = machine.tracer.content(pa)
    if not machine.allocated(page):
        frame.allocated = FREE
        return
    frame.allocated = KEPT if page.retired else ALLOCATED
    # A frame of another file, or of none, is in no slot of this one.
    frame.slot = _down(page.index_of(pa), at, share) + 1 if page.inode is host.inode else 0
    frame.poison, frame.handled = pa in page.broken, pa in page.handled
    if pa - page.pa >= share * PAGE:                    # the rest is the folio's, and so its first page's
        return
    # The machine has one count, as the kernel does, and the kinds beside it, for the laws. If they differ the
    # machine is wrong, not the design.
    if page.refcount != page.kinds():
        raise AssertionError(f"pfn {pa_to_pfn(pa):#x}: {page.refcount} references, {page.kinds()} by kind")
    for kind in KINDS:
        count = getattr(page, kind)
        setattr(frame, kind, _down(count, 0, share) if kind == "cache" and page.order else count)
    frame.lock = 0 if page.lock is None else page.lock + 1
    frame.uptodate = page.uptodate
    frame.no_direct_map = UNMAPPED if page.unmapped else MARKED if page.no_direct_map else MAPPED


# The folio that begins or goes on at the frame, and whether a leaf maps the whole block.
def _folio(host: EmulatedHost, folio: st.FolioRecord, pa: Pa, share: int) -> None:
    machine, vm = host.machine, host.vm
    page = machine.page_at(pa)
    folio.tail = (pa - page.pa) // PAGE // share
    folio.order = int(page.order > 0 and not folio.tail)
    folio.s1_leaf = machine.linear_map.leaf(pa).level < 3
    folio.s2_leaf = machine.driver.host_order(pa) != 0
    ipa = machine.driver.ipa_of(vm, pa)
    folio.guest_leaf = ipa is not None and machine.driver.guest_order(vm, ipa) > 0


# Page index + 1 at which the VMM's page table has the frame; a TLB entry that says otherwise goes first.
def _shown_at(host: EmulatedHost, pa: Pa, at: int, share: int) -> int:
    mapping, pages = host.inode.mapping, span(Index(at), host.inode.size // share, share)
    table: set[Index] = set()
    if mapping is not None:
        # Of other pages of a half nobody looks at the table: what rmap would find there is enough.
        table = {index for index in pages if mapping.lookup(index) == pa}
        table |= {index for index, to in mapping.present.items() if to == pa}
    outlived = set(host.machine.user_indexes(pa)) - table
    # An entry that has outlived the table is what an access would hit first, so it is what the abstract host must
    # have.
    shown = min(outlived or table, default=None)
    return 0 if shown is None else _down(shown, at, share) + 1


def _page(host: EmulatedHost, page: st.PageRecord, at: int, share: int) -> None:
    machine, inode = host.machine, host.inode
    index = Index(page.number * share + at)                                 # there is one file
    cached = inode.find(index)
    page.cached = machine.number(cached.pa + (index - cached.index) * PAGE) + 1 if cached else 0
    page.attr = inode.entry("attributes", index)
    bound = inode.entry("bindings", index)
    page.binding = _down(bound - 1, at, share) + 1 if bound else 0
    page.expect = machine.tracer.expected.get((inode, index), ZERO)


def _gfn(host: EmulatedHost, gfn: st.GfnRecord, at: int, share: int) -> None:
    real = Gfn(gfn.number * share + at)
    gfn.provided = host.inode.entry("provided", real)
    gfn.memslot = host.inode.entry("memslots", real)
    gfn.gmem_file = host.inode.entry("gmem_files", real)
    gfn.gpoison = host.machine.driver.poisoned(host.vm, real)


def _ghost(host: EmulatedHost, ghost: st.PartyGhost, pages: int, share: int) -> None:
    tracer = host.machine.tracer
    ghost.begun = host.vm.begun[ghost.number]
    for announced in tracer.announced.get(ghost.number, ()):
        ghost.announced |= _mask(announced, pages, share)
    how = tracer.ended.get(ghost.number)
    if how is not None:
        ghost.ended, ghost.ended_op = 1 - how.ret, OPS.index(how.op) + 1
        ghost.scope = _mask(how.about, pages, share)
        ghost.ended_at = 0 if how.at is None else how.at // share + 1
        ghost.gfn = 0 if how.gfn is None else how.gfn // share + 1
    operation = tracer.operations.get(ghost.number)
    if operation is not None:
        ghost.op = OPS.index(operation.op) + 1
        ghost.gfn = 0 if operation.gfn is None else operation.gfn // share + 1
        ghost.scope = _mask(range(operation.start, operation.start + operation.nr), pages, share)
        ghost.toggled = _mask(operation.toggled, pages, share)
        ghost.removed = _mask(operation.removed, pages, share)
        ghost.reasons, ghost.places = operation.reasons, _mask(operation.places, pages, share)
        for what, count in operation.cost.items():
            setattr(ghost, what, count)


def _mask(members: Collection[int], pages: int, share: int) -> int:
    if isinstance(members, range):
        members = range(members.start // share, -(-members.stop // share))
    else:
        members = {member // share for member in members}
    return sum(1 << i for i in members if 0 <= i < pages)


def _file(host: EmulatedHost, file: st.FileRecord, share: int) -> None:
    inode = host.inode
    _sem(file, "invalidate", inode.invalidate)
    _sem(file, "bindings", inode.bindings)
    file.fd, file.files, file.inodes = inode.fd, inode.files, inode.references
    file.inode, file.evictor = inode.life, 0 if inode.evictor is None else inode.evictor + 1
    file.vma = len(inode.mapping.vmas) if inode.mapping else 0
    file.reserved, file.refuses_readers = _mask(inode.reserved, inode.size // share, share), inode.refuses_readers
    file.released = inode.released


def _sem(record: st.FileRecord | st.VmRecord, name: str, sem: Rwsem) -> None:
    setattr(record, f"{name}_w", 0 if sem.writer is None else sem.writer + 1)
    setattr(record, f"{name}_r", sem.readers)
    setattr(record, f"{name}_q", 0 if sem.queued is None else sem.queued + 1)


def _vm(host: EmulatedHost, record: st.VmRecord, share: int) -> None:
    vm = host.vm
    record.vm, record.progress = vm.state, vm.begun.total()
    record.gpc = host.machine.number(vm.gpc.pa) + 1 if vm.gpc else 0
    record.gpc_fresh, record.gpc_readers = vm.gpc_fresh, vm.gpc_readers
    record.slots_lock = 0 if vm.slots_lock is None else vm.slots_lock + 1
    _sem(record, "mmu", vm.mmu_lock)
    record.srcu, record.seq, record.sampled = vm.srcu, vm.seq, vm.sampled
    record.range = sum(1 << gfn for gfn in {gfn // share for gfn in vm.invalidated})


def _globals(host: EmulatedHost, state: st.State, share: int) -> None:
    machine = host.machine
    state.module, state.unloaded = machine.module.refcount, machine.unloaded
    state.away = _down(machine.power.away, 0, share)
    state.preparing, state.frozen = machine.power.preparing, machine.power.frozen
    state.leaked = _down(machine.leaked, 0, share)
    state.panic = machine.dead is not None

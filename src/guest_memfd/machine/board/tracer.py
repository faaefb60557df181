"""What the laws remember of a run on the emulated machine and the machine itself does not: secrecy, intent, expectation.

Only ghosts are here. Nothing in the machine reads them, so nothing the machine does can depend on them. What a page holds
is read from its bytes; only whether words that a guest wrote are a *secret* cannot be told from bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from guest_memfd.core.gmem import bound_gfn
from guest_memfd.machine.linux.folio import LinuxFolio
from guest_memfd.machine.linux.inode import Inode
from guest_memfd.words import facts
from guest_memfd.words.pagestate import (
    ANY,
    CONTENTION,
    CONTENTS,
    DATA,
    EVICTED,
    GONE_BEFORE,
    JUNK,
    MANY,
    REASONS,
    RUNNING,
    SECRET,
    SHARED_PAGE,
    ZERO,
)
from guest_memfd.words.primitives import UNREPORTED, Bound, Cost, Entries
from guest_memfd.words.units import FIRST_PAGE, PAGE, Gfn, Index, Pa, gfn_to_gpa, pa_to_pfn, span

if TYPE_CHECKING:
    from guest_memfd.machine.board.board import Board
    from guest_memfd.machine.hypcalls.vm import Vm
    from guest_memfd.words.scene import Scene

GUEST_TOKEN, USER_TOKEN, DEVICE_TOKEN, KERNEL_TOKEN = b"GUESTGST", b"VMM-USER", b"DEVICEIO", b"KERNELGP"
"""The first doubleword of a page, when that party was the last to write to it."""

JUDGED = 1 << 16
"""Operations on more pages than this are not reported to the laws, page by page as the facts are."""

BLOCK = 9
"""2 MiB are 4 KiB << 9."""

_TOKENS = frozenset((GUEST_TOKEN, USER_TOKEN, DEVICE_TOKEN, KERNEL_TOKEN))
_ZEROS = bytes(PAGE)


class TracedTask(Protocol):
    """Whose primitive is under way: the task, its file, and where facts about it go."""

    who: int
    inode: Inode
    notes: list[facts.Note]
    bounds: Mapping[str, Bound]
    scene: Scene | None
    errnos: Mapping[str, tuple[int, ...]]
    resumes: tuple[str, ...]

    def vm_at(self, index: Index) -> Vm:
        """The VM that page *index* of the file is bound to, or would be."""

    def private(self, page: LinuxFolio, pa: Pa) -> bool:
        """Whether the page of *page* at *pa* is private, by what the library says."""


@dataclass
class Operation:
    """The operation a task is in."""

    op: str
    start: Index
    nr: int
    gfn: Gfn | None = None                              # where the guest has faulted, if that is what it is about
    toggled: set[Index] = field(default_factory=set)    # pages whose attribute changed an odd number of times
    removed: set[Index] = field(default_factory=set)
    reasons: int = 0                                    # what has stood against it (abstract/state.py REASONS)
    places: set[Index] = field(default_factory=set)     # pages at which something did
    cost: dict[str, int] = field(default_factory=lambda: dict.fromkeys(Cost._fields, 0))

    def first_of(self, index: Index, nr: int = 1) -> Index | None:
        """The first of pages [index, index+nr) that it is about, None if it is about none of them."""
        first = max(index, self.start)
        return first if first < min(index + nr, self.start + self.nr) else None


class Tracer:
    """Ghosts of one machine."""

    def __init__(self, machine: Board) -> None:
        self.machine = machine
        self.secret: set[Pa] = set()                    # physical addresses of pages that hold what a guest wrote in private
        self.expected: dict[tuple[Inode, Index], int] = {}
        self.operations: dict[int, Operation] = {}
        self.asked: set[Pa] = set()                     # physical addresses of pages whose mapping the guest had asked for
        self.withdrawn: set[Pa] = set()                 # of pages whose consent is older than their conversion to private
        self.announced: dict[int, tuple[range, ...]] = {}   # task -> pages whose invalidation it has begun and not ended
        self.ended: dict[int, facts.HowEnded] = {}            # task -> how its operation has ended, before it returns

    # -- contents ------------------------------------------------------------------------------------------------

    def content(self, pa: Pa) -> int:
        """ZERO, JUNK, DATA or SECRET, by the page at *pa*."""
        raw = self.machine.ram.read(pa, PAGE)
        if raw == _ZEROS:
            return ZERO
        if raw[:8] not in _TOKENS:
            return JUNK
        return SECRET if pa in self.secret else DATA

    def contents(self) -> Callable[[Pa], int]:
        """`content` of the frames in use as it is now, for after an access whose target is not known before."""
        before = {pa: self.content(pa) for pa in self.machine.watched}
        return lambda pa: before.get(pa, JUNK)

    def wrote(self, page: LinuxFolio, pa: Pa, content: int) -> None:
        """The page of *page* at *pa* now holds DATA or a SECRET, and any reader is to find that."""
        if content == SECRET:
            self.secret.add(pa)
        else:
            self.secret.discard(pa)
        self.expect(page, pa, content)

    def expect(self, page: LinuxFolio, pa: Pa, content: int) -> None:
        """Any reader of the page of the file that is at *pa* is to find *content*."""
        if isinstance(page.inode, Inode):
            self.expected[page.inode, page.index_of(pa)] = content

    def declassify(self, page: LinuxFolio, pa: Pa) -> None:
        """The guest agrees that the host reads what it wrote there."""
        if self.content(pa) == SECRET:
            self.wrote(page, pa, DATA)

    def consented(self, page: LinuxFolio, pa: Pa) -> None:
        """The guest has given a page up; under a hypervisor whose guests relinquish, no one relies on it any more."""
        self.withdrawn.discard(pa)
        self.declassify(page, pa)
        if self.machine.driver.forgets:
            self.expect(page, pa, ANY)

    def after_hypercall(self, page: LinuxFolio, pa: Pa, sanitised: bool) -> None:
        """What it did to the page of *page* at *pa*: if it has zeroed it, no one relies on what it held."""
        if self.machine.driver.owner(pa) != "borrowed":
            self.withdrawn.discard(pa)
        if sanitised:
            self.secret.discard(pa)
            self.expect(page, pa, ANY)

    def reclaimed_by_force(self, host: TracedTask, pa: Pa) -> None:
        """EL2 took the page from a guest that never agreed, and zeroed it."""
        self.secret.discard(pa)
        host.notes.append(facts.Destroyed(
            self.machine.number(pa), "reclaimed by force because the host touched it"))

    def zeroed(self, pa: Pa, size: int) -> None:
        """Someone has written to all of [pa, pa+size), and it was no guest."""
        self.secret = {at for at in self.secret if not pa <= at < pa + size}

    def access(self, host: TracedTask, page: LinuxFolio, pa: Pa, who: str, what: str, via: str, write: bool,
               content: int) -> facts.Access:
        """The fact that *who* reached the page of *page* at *pa*, which held *content*."""
        index, expect = None, ANY
        if isinstance(page.inode, Inode):
            index = page.index_of(pa)
            expect = self.expected.get((page.inode, index), ZERO)
        machine = self.machine
        owner, mapped = machine.driver.owner(pa), machine.any_guest_maps(pa)
        guests = owner == "guest" or content == SECRET or (mapped and index is not None and host.private(page, pa))
        return facts.Access(who, what, via, machine.number(pa), write, CONTENTS[content], guests,
                            mapped or owner == "guest", index, None if expect == ANY else CONTENTS[expect],
                            pa_to_pfn(page.pa) not in machine.pages, pa in page.handled)

    def destroyed(self, inode: Inode) -> None:
        """The file is gone: no one reads there any more."""
        self.expected = {(file, index): content for (file, index), content in self.expected.items() if file is not inode}

    def split(self, page: LinuxFolio) -> None:
        """A folio becomes single pages: what is known of it is known of each, where that has not been kept page by page."""
        inode, index = page.inode, page.index
        if self.machine.watched:
            return
        if page.pa in self.secret:
            self.secret.update(span(page.pa, page.nr, PAGE))
        if isinstance(inode, Inode) and (inode, index) in self.expected:
            self.expected |= {(inode, index + at): self.expected[inode, index] for at in range(page.nr)}

    # -- operations ----------------------------------------------------------------------------------------------

    def begin(self, host: TracedTask, op: str, start: Index, nr: int, gfn: Gfn | None = None) -> None:
        """The task starts *op* on pages [start, start+nr)."""
        first = max(start, FIRST_PAGE)
        self.ended.pop(host.who, None)
        self.operations[host.who] = Operation(op, first, max(min(start + nr, host.inode.size) - first, 0), gfn)

    def out_of_scope(self, host: TracedTask, what: str, index: Index, nr: int = 1) -> None:
        """Note it when the task's operation is about none of pages [index, index+nr), which are one folio's.

        Who evicts the inode is about all of them.
        """
        operation = self.operations.get(host.who)
        if operation is not None and host.inode.life != EVICTED and operation.first_of(index, nr) is None:
            host.notes.append(facts.OutOfScope(operation.op, what, index))

    def announces(self, host: TracedTask, start: Index, nr: int) -> None:
        """The task begins to invalidate pages [start, start+nr)."""
        first = max(start, FIRST_PAGE)
        pages = range(first, max(min(start + nr, host.inode.size), 0))
        self.announced[host.who] = (*self.announced.get(host.who, ()), pages)
        operation = self.operations.get(host.who)
        if operation is not None and host.inode.life != EVICTED:
            ends = (first, first + len(pages) - 1) if pages else ()
            # Of a folio of a block all of it may be announced, whatever part is meant.
            block = BLOCK if self.machine.config.blocks else 0
            beyond = next((i for i in ends if operation.first_of(Index(i >> block << block), 1 << block) is None), None)
            if beyond is not None:
                host.notes.append(facts.OutOfScope(operation.op, "announces an invalidation", beyond))

    def done_to(self, host: TracedTask, what: str, index: Index, nr: int = 1, *, always: bool = False) -> None:
        """The task's operation does something to a folio that its users must hear of beforehand.

        *always*: that is so even if the operation has begun no invalidation at all: there is a VM to be told.
        """
        self.out_of_scope(host, what, index, nr)
        operation, announced = self.operations.get(host.who), self.announced.get(host.who)
        if announced is None and always:
            announced = ()
        if operation is not None and announced is not None and not any(index in pages for pages in announced):
            host.notes.append(facts.Unannounced(operation.op, what, index))

    def removed(self, host: TracedTask, page: LinuxFolio) -> None:
        """*page* has left the file: the next reader is to find zeros."""
        index, nr = page.index, page.nr
        operation = self.operations.get(host.who)
        if operation is not None and operation.nr <= JUDGED:
            operation.removed.update(span(index, nr))
        op = self.under_way(host.who) or "someone"
        for pa in self.machine.named(page.pa, page.size):
            expected = self.expected.pop((host.inode, page.index_of(pa)), ZERO)
            # Only a punch, or the end of the file, is asked to lose what is there; a page that is given up is lost already.
            if op not in ("punch", "copy") and host.inode.life != EVICTED and not page.kept and expected not in (ZERO, ANY):
                host.notes.append(facts.Destroyed(self.machine.number(pa), f"{op} takes the page out of the file"))
            self.done_to(host, "removes the folio", page.index_of(pa))

    def attributes(self, host: TracedTask, start: Index, values: Entries) -> list[LinuxFolio]:
        """Attributes are about to change: the folios in the file for which they do."""
        operation, inode = self.operations.get(host.who), host.inode
        old = inode.trees["attributes"].load(start, len(values))
        if old.count(values.first) == len(values):
            return []
        if operation is None:
            return [p for i, p in inode.pages.items() if start <= i < start + len(values)]
        if len(values) > JUDGED:
            return [p for i, p in inode.pages.items() if start <= i < start + len(values)]
        changed = [start + i for i in range(len(values)) if old[i] != values[i]]
        for index in changed:
            operation.toggled ^= {index}
            self.done_to(host, "changes the attribute", index, always=bool(inode.entry("bindings", index)))
        pages = (inode.find(index) for index in changed)
        return list({page.pa: page for page in pages if page is not None}.values())

    def bindings(self, host: TracedTask, start: Index, values: Entries) -> None:
        """Bindings are about to change: what the operation does to pages that are bound, or will be."""
        operation = self.operations.get(host.who)
        if operation is None or len(values) > JUDGED:
            return
        bound = host.inode.trees["bindings"].load(start, len(values))
        for index, was, entry in zip(span(start, len(values)), bound, values, strict=True):
            if was and entry and operation.op == "bind":
                host.notes.append(facts.Rebound(index))
            if was != entry:
                if operation.op in ("bind", "unbind"):
                    operation.toggled ^= {index}
                # Of a binding that goes a kernel mapping has to be told, or no one will be able to tell it any more.
                self.done_to(host, "changes the binding", index, always=bool(was and self.machine.hypervisor.pfn_cache))

    def against(self, task: int, reason: int, page: LinuxFolio | None) -> None:
        """Something stands against the operation of *task*: at *page* of its file, if it is a page's doing."""
        operation = self.operations.get(task)
        if operation is not None:
            operation.reasons |= reason
            if page is None:
                return
            if self.machine.watched:                    # what stands against a folio stands at each of its pages
                operation.places.update(map(page.index_of, self.machine.named(page.pa, page.size)))
            else:
                first = operation.first_of(page.index, page.nr)
                operation.places.add(page.index if first is None else first)

    def overtaken(self, task: int) -> None:
        """What *task* has just mapped into the VMM, and has locked, is unmapped again: its fault has been right about it."""
        if self.under_way(task) == "user_fault":
            self.against(task, CONTENTION, None)

    def counts(self, task: int, what: str, more: int = 1) -> None:
        """The operation of *task* asks for *more* of *what*: writes, flushes, calls, stalls or splits."""
        operation = self.operations.get(task)
        if operation is not None:
            operation.cost[what] = min(operation.cost[what] + more, MANY)

    def mapped(self, task: int, pa: Pa) -> None:
        """*task* has mapped the page at *pa* into the guest: whether the guest had asked for it."""
        operation = self.operations.get(task)
        if operation is not None and operation.op == "fault":
            self.asked.add(pa)
        else:
            self.asked.discard(pa)

    def under_way(self, task: int) -> str | None:
        """The operation that *task* is in."""
        operation = self.operations.get(task)
        return None if operation is None else operation.op

    def forget(self, task: int, *, excused: bool = True) -> tuple[str, ...]:
        """The operation of *task* is over: what stood against it; not *excused*: the end of the file did not."""
        operation = self.operations.pop(task, None)
        self.ended.pop(task, None)
        return _reasons(operation.reasons & ~(0 if excused else GONE_BEFORE)) if operation is not None else ()

    def faulted_in(self, host: TracedTask, index: Index) -> None:
        """The task goes on at page *index* of its mapping: if it has faulted, it was told that it can."""
        how = self.ended.get(host.who)
        if how is not None and how.op == "user_fault" and host.who not in self.operations:
            self.returned(host, "user_fault", index, 1, 0, None)

    def returned(
        self, host: TracedTask, op: str, start: Index, nr: int, ret: int, error_index: Index | None, gfn: Gfn | None = None,
    ) -> None:
        """What the caller is told, beside what the operation had said."""
        shared: tuple[int, ...] = ()
        if op == "lend":
            attributes = host.inode.trees["attributes"].load(start, nr)
            shared = tuple(start + at for at, attribute in enumerate(attributes) if attribute == SHARED_PAGE)
        host.notes.append(facts.Returned(op, start, nr, ret, error_index, host.inode.size, self.ended.get(host.who),
                                         host.who in self.announced, gfn, shared, host.errnos.get(op, ())))
        self.forget(host.who)

    def end(self, host: TracedTask, ret: int, error_index: Index | None) -> None:
        """Report how the task's operation ended."""
        operation = self.operations.pop(host.who, None)
        if operation is None:
            return
        if operation.op not in UNREPORTED:
            about = range(operation.start, operation.start + operation.nr) if operation.nr else range(0)
            self.ended[host.who] = facts.HowEnded(
                operation.op, ret, about, error_index,
                operation.gfn if operation.op == "bind" else None)
        if operation.nr <= JUDGED:
            host.notes.append(self._ended(host, operation, ret, error_index))

    def _ended(self, host: TracedTask, operation: Operation, ret: int, error_index: Index | None) -> facts.Ended:
        inode = host.inode
        scope = tuple(span(operation.start, operation.nr))
        attributes = inode.trees["attributes"].load(operation.start, operation.nr)
        bindings = inode.trees["bindings"].load(operation.start, operation.nr)
        left = tuple(i for i in scope if inode.find(i) is not None)
        batched = tuple(i for i in left if (page := inode.find(i)) is not None and page.lru)
        mapped = tuple(i for i, entry in zip(scope, bindings, strict=True) if (
            self._vmm_has(host, i) if operation.op == "user_fault" else self._guest_has(host, i, entry)))
        return facts.Ended(
            operation.op, ret, error_index, scope, tuple(sorted(operation.toggled)),
            tuple(sorted(operation.removed)), left, tuple(attributes), tuple(bindings), batched, mapped,
            _reasons(operation.reasons), tuple(sorted(operation.places)),
            operation.gfn, Cost(**operation.cost),
            (*self.machine.hypervisor.errnos.get(operation.op, ()), *host.errnos.get(operation.op, ())),
            host.bounds.get(operation.op), host.scene.attributes if operation.op == "create" and host.scene else (),
            *self._around(scope), operation.op in host.resumes)

    # Pages of the blocks over *scope*, and leaves: on a machine that has blocks for guest_memfd, and nothing else.
    def _around(self, scope: tuple[Index, ...]) -> tuple[int, int]:
        blocks = len({index >> BLOCK for index in scope}) if self.machine.config.blocks else 0
        return blocks << BLOCK, blocks

    # Unless the mapping has gone meanwhile, or memory is broken: who faulted is told so when he goes on.
    def _vmm_has(self, host: TracedTask, index: Index) -> bool:
        mapping, page = host.inode.mapping, host.inode.find(index)
        if mapping is None or not mapping.vmas or (page is not None and page.hwpoison):
            return True
        return mapping.lookup(index) is not None

    # Where it is bound the guest maps it - or cannot, and its next access says so: it is stopped, or memory is broken.
    def _guest_has(self, host: TracedTask, index: Index, entry: int) -> bool:
        vm, page = host.vm_at(index), host.inode.find(index)
        if vm.state != RUNNING or vm.handle is None:
            return True
        if not entry or page is None:
            return False
        driver, gfn = self.machine.driver, bound_gfn(entry)
        return driver.lookup(vm, gfn_to_gpa(gfn)) == page.pa + (index - page.index) * PAGE or (
            page.hwpoison or driver.poisoned(vm, gfn))


def _reasons(mask: int) -> tuple[str, ...]:
    return tuple(why for bit, why in enumerate(REASONS) if mask >> bit & 1)

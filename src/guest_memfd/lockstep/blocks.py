"""Carrying a primitive out on the machine where a folio of two pages of the scene is a block of 2 MiB.

Theory of operation. No machine has folios of two pages, and no EL2 here knows a leaf that maps two. So a page of a scene
with large folios is half a block of the machine, 256 pages that lie side by side: a folio of order 1 is one of order 9, a
leaf of order 1 a block of a real table (halves.py has the numbers). One page of each half stands for the others; which one
is drawn for each machine, and is the same in all halves.

What is about a range, or about a folio that is one on the machine, too, is one primitive of the machine: a look-up, a zap,
a split, a donation of 2 MiB. What is about a page of the scene is done to the page that stands for the half first, and then
to the other 255, one by one, each by the same primitive of the machine. The result of each must be that of the first. For
the abstract host all this is one step. So what is compared after every step - results, facts, state - is that of the pages
that stand for the others, in real tables with real blocks; and of the others it is asked whether they are like them
(`unlike`): of some after every step, of all at the end of a schedule.

What is not done 256 times: accesses. A CPU reaches the one page, and the others get the same contents without an
instruction, for all of them are mapped alike, which is what `unlike` finds out. Where EL2 takes an access for more than
that - a page that is locked again, or reclaimed by force - it is done to each.

An injected failure is that of the first page, and then the others are left alone: what fails has changed nothing. A cost is
counted once. lru_add batches hold any number of folios, as if each page had been added on a CPU of its own.

Left out: folios of more than two pages (nothing lies between 2 MiB and 1 GiB), contiguous runs of leaves, loads that begin
in the page before, and that one of the 256 pages goes another way than the rest, which is not a state of the scene.
tests/test_large_machine.py has that.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from guest_memfd.errors import BadInput, GuestMemfdError
from guest_memfd.lockstep.abstraction import unlike
from guest_memfd.lockstep.halves import HALF, SCALED, SHARE, entries, scaled, told
from guest_memfd.machine.adversary import Adversary
from guest_memfd.machine.board.tracer import BLOCK
from guest_memfd.machine.primitives.host import EmulatedHost
from guest_memfd.words import facts
from guest_memfd.words.outcome import STAY
from guest_memfd.words.pagestate import GONE
from guest_memfd.words.primitives import Folio, Locked, Lookup, Primitive
from guest_memfd.words.units import PAGE, Gfn, Index, Pfn, pa_to_pfn, pfn_to_pa, span

OF_THE_FOLIO = frozenset({
    "lock_folio", "unlock_folio", "folio_put", "folio_get", "leak_folio", "folio_ref_count", "folio_maybe_dma_pinned",
    "folio_mark_uptodate", "folio_set_no_direct_map", "filemap_remove_folio", "split_folio", "unpin", "gup_try_get",
    "gup_recheck", "memory_failure_done", "gpc_commit",
})
"""Primitives about the folio that a page is part of now: once, if that is a block. Others are about the pages named."""

BY_PFN = frozenset({"copy_from_kernel_nofault", "image_copy"})
BY_GFN = frozenset({"guest_access", "guest_consents"})
BY_INDEX = frozenset({
    "filemap_get_folio", "hwpoison", "vmf_insert_folio", "gup_read_pte", "gup_recheck", "gpc_begin", "user_access",
})
"""Primitives whose first argument is a frame number, a gfn, a page index."""

OF_ONE = frozenset({"gup_read_pte", "gpc_begin", "gpc_commit", "folio_mapped", "page_hwpoison"})
"""Primitives that change nothing, or something of which there is one."""

ACCESSES = frozenset({
    *BY_PFN, "guest_access", "user_access", "clear_folio", "clear_folio_local", "write_folio", "read_folio", "pin_access",
    "gpc_access",
})
"""Primitives that reach contents."""


class Unlike(GuestMemfdError):  # noqa: N818 - named after what they are
    """Of the pages that are one page of the scene, one does not do as the others."""


class Blocks:
    """*host*'s machine, of blocks, as the abstract host speaks of it."""

    def __init__(self, host: EmulatedHost, adversary: Adversary) -> None:
        self.host, self.adversary = host, adversary
        host.counts_splits = True
        first = pa_to_pfn(host.machine.watched[0])
        self.base, self.at = Pfn(first & -1 << BLOCK), first % SHARE
        scene = host.scene
        assert scene is not None, "blocks are those of a scene"
        adversary.indexes, adversary.gfns = span(Index(self.at), scene.pages, SHARE), span(Gfn(self.at), scene.beyond, SHARE)
        self.notes: list[facts.Note] = []
        self._draw = random.Random(first)

    # -- what the machine is asked for -------------------------------------------------------------------------------

    # The pages that *number* - a frame, a page, a gfn - is on the machine: the one that stands for them first.
    def _all(self, number: int, base: int = 0) -> list[int]:
        first = base + number * SHARE
        return [first + self.at, *(first + at for at in range(SHARE) if at != self.at)]

    # Whether the folio that frame *pfn* is part of is a block.
    def _is_block(self, pfn: Pfn) -> bool:
        page = self.host.machine.pages.get(self._block(pfn))
        return page is not None and page.order == BLOCK

    def _block(self, pfn: Pfn) -> Pfn:
        return self.base + (pfn & ~1) * SHARE

    def real(self, primitive: Primitive) -> Primitive:
        """*primitive* as the machine is asked for it first."""
        return next(self._each(primitive))

    # Each primitive of the machine that *primitive* is; what comes after the first is to be like it.
    def _each(self, primitive: Primitive) -> Iterator[Primitive]:
        name, args = primitive.name, primitive.args
        if name == "load_unaligned_zeropad":
            raise BadInput("a load that runs into a page begins in the one before, which must be the host's; of half a "
                           "block it is the guest's, too, so party 'zeropad' cannot be there")
        if name in SCALED:
            yield scaled(primitive)
        elif name in ("filemap_add_folio", "filemap_add_pages"):
            index, order = args
            name = name if order else "filemap_add_pages"
            yield primitive._replace(name=name, args=(index * SHARE + self.at, order + HALF))
        elif name == "flush_tlb_kernel_range":
            yield primitive._replace(args=(tuple(real for folio in args[0] for real in self._named(folio)),))
        else:
            columns = [self._column(primitive, at, arg) for at, arg in enumerate(args)]
            length = max(map(len, columns), default=1)
            if name in OF_ONE:
                length = 1
            for row in range(length):
                yield primitive._replace(args=tuple(column[row % len(column)] for column in columns))

    # What an argument is in each of them.
    def _column(self, primitive: Primitive, at: int, arg: Any) -> Sequence[Any]:
        name = primitive.name
        if isinstance(arg, Folio):
            return self._current(arg) if name in OF_THE_FOLIO else self._named(arg)
        numbers = (at == 0 and name in BY_INDEX | BY_GFN) or (name == "hyp_call" and at == 1)
        if numbers and isinstance(arg, int):
            folio = next((each for each in primitive.args if isinstance(each, Folio)), None)
            if folio is not None and folio.order and name == "hyp_call":
                return [arg * SHARE]
            return self._all(arg)
        if at == 0 and name in BY_PFN:
            return self._all(arg, self.base)
        return [arg]

    # The pages that *folio* names: all of a block by its head, else one by one.
    def _named(self, folio: Folio) -> list[Folio]:
        if folio.order:
            if self._is_block(folio.pfn):
                return [Folio(self._block(folio.pfn), BLOCK)]
            return [Folio(Pfn(pfn)) for part in folio.pfns for pfn in self._all(part, self.base)]
        return [Folio(Pfn(pfn)) for pfn in self._all(folio.pfn, self.base)]

    # The folio, or folios, that frame *folio.pfn* is part of now.
    def _current(self, folio: Folio) -> list[Folio]:
        if self._is_block(folio.pfn):
            return [Folio(self._block(folio.pfn), BLOCK)]
        return [Folio(Pfn(pfn)) for pfn in self._all(folio.pfn, self.base)]

    # -- carrying it out ---------------------------------------------------------------------------------------------

    def arm(self, primitive: Primitive, errno: int) -> None:
        """Let *primitive* fail when it is carried out next; what is refused for good is all of the last page of it."""
        machine = self.host.machine
        self.adversary.fail_next(self.real(primitive), errno)
        if primitive.name == "hyp_call" and machine.hypervisor.final.get(primitive.args[0]) == errno:
            folio = next(arg for arg in primitive.args if isinstance(arg, Folio))
            machine.driver.stuck -= {pfn_to_pa(self.real(primitive).args[-1].pfn)}
            machine.driver.stuck |= {pfn_to_pa(Pfn(pfn)) for pfn in self._all(self._parts(folio)[-1], self.base)}

    def _parts(self, folio: Folio) -> Sequence[Pfn]:
        return span(Pfn(folio.pfn & ~1), 2) if self._is_block(folio.pfn) else folio.pfns

    def perform(self, primitive: Primitive, who: int, *, fails: bool = False) -> Any:
        """Carry it out on the page that stands for the others, and on those: the result; raises Blocked, KernelPanic."""
        host, each = self.host, self._each(primitive)
        first = next(each)
        about = self._reached(primitive)
        before = [self._held(pfn) for pfn in about]
        self.notes = []
        try:
            result = host.perform(first, who)
        finally:
            self.notes = list(dict.fromkeys(told(note, self.base) for note in host.notes))
        if fails or result is STAY:
            return self._told(primitive, result)
        if primitive.name not in ACCESSES or before != [self._held(pfn) for pfn in about]:
            self._follow(primitive, each, who, result)
        if primitive.name in ACCESSES:
            for pfn in about:
                self._copy(pfn)
        return self._told(primitive, result)

    # The others do as the first has done; what it has cost is not counted again.
    def _follow(self, primitive: Primitive, each: Iterator[Primitive], who: int, result: Any) -> None:
        host = self.host
        if primitive.name == "filemap_get_folio" and result is not None and result.folio.order:
            return
        operation = host.machine.tracer.operations.get(who)
        cost = dict(operation.cost) if operation is not None else {}
        host.counts_splits = False
        for other in each:
            done = host.perform(other, who)
            if self._told(primitive, done) != self._told(primitive, result):
                raise Unlike(f"{other} returns {done!r}, and for the page that stands for it {result!r}")
            if primitive.name == "hwpoison" and done is not None and done.order:
                host.perform(Primitive("folio_put", (done,), "mm"), who)    # one report, so one reference
        self._rest(primitive, who, result)
        host.counts_splits = True
        if operation is not None:
            operation.cost = cost

    # A folio that is found anew as a single page is one of those that are: each of them is looked up, and locked.
    def _rest(self, primitive: Primitive, who: int, result: Any) -> None:
        name = primitive.name
        if name == "split_folio" and not result:
            mine = self.host.machine.pages[self._block(primitive.args[0].pfn)]
            for at in range(1, SHARE):
                self._found(mine.index + at, who)
        elif name in ("filemap_add_folio", "filemap_add_pages") and isinstance(result, Lookup) and not result.folio.order:
            for index in self._all(result.pgoff // SHARE)[1:]:
                self._found(Index(index), who)

    def _found(self, index: Index, who: int) -> None:
        hit = self.host.perform(Primitive("filemap_get_folio", (index,), "library"), who)
        self.host.perform(Primitive("lock_folio", (hit.folio,), "library"), who)

    # The frames whose contents *primitive* may reach.
    def _reached(self, primitive: Primitive) -> list[Pfn]:
        if primitive.name not in ACCESSES:
            return []
        return [*span(Pfn(0), len(self.host.machine.watched))]

    # What EL2 keeps of the page that stands for frame *pfn*.
    def _held(self, pfn: Pfn) -> tuple[Any, ...]:
        machine, vm = self.host.machine, self.host.vm
        pa = machine.watched[pfn]
        return machine.driver.owner(pa), machine.driver.ipa_of(vm, pa), machine.driver.locked_in(vm, pa)

    # The others hold what that page holds.
    def _copy(self, pfn: Pfn) -> None:
        machine = self.host.machine
        pa, ram, secret = machine.watched[pfn], machine.ram, machine.tracer.secret
        word, first = ram.read(pa, 8), pa - self.at * PAGE
        if ram.read(first, 8) == word and ((first in secret) == (pa in secret)):
            return
        empty = not any(ram.read(pa, PAGE))
        for other in span(first, SHARE, PAGE):
            if empty:
                ram.zero(other, PAGE)
            else:
                ram.write(other, word)
            if pa in secret:
                secret.add(other)
            else:
                secret.discard(other)

    # -- what the machine has said -------------------------------------------------------------------------------------

    def _told(self, primitive: Primitive, value: Any) -> Any:
        if isinstance(value, Folio):
            return Folio(Pfn((value.pfn - self.base) // SHARE), 1 if value.order else 0)
        if isinstance(value, Lookup):
            return Lookup(self._told(primitive, value.folio), Index(value.pgoff // SHARE))
        if isinstance(value, Locked):
            return value if value.pgoff is None else value._replace(pgoff=Index(value.pgoff // SHARE))
        if primitive.name == "tree_load":
            return entries(list(value))
        if primitive.name == "filemap_find_folio":
            return value // SHARE
        if primitive.name == "page_hwpoison":
            return value[self.at::SHARE] if len(value) > 1 else value
        return value

    # Whether frame *pfn* is in use, and 256 folios.
    def _is_loose(self, pfn: Pfn) -> bool:
        return pa_to_pfn(self.host.machine.watched[pfn]) in self.host.machine.pages and not self._is_block(pfn)

    # Live entries that were changed without break-before-make, in any table that a split goes through.
    def _violations(self) -> Iterator[str]:
        machine, vm = self.host.machine, self.host.vm
        guests = [machine.driver.guest_table(vm)] if vm.state != GONE else []
        for found in (machine.linear_map.tables.violations,
                      *(table.violations for table in (*machine.driver.host_tables(), *guests))):
            yield from map(str, found)

    # -- the others ----------------------------------------------------------------------------------------------------

    def unlike(self, saved: bytes, *, thorough: bool = False) -> Iterable[str]:
        """What is not the same of the pages that one stands for in state *saved*: of a few, or (*thorough*) of all."""
        frames, draw = range(len(self.host.machine.watched)), self._draw
        if thorough:
            # Of a block, and of what is free, there is one record; of pages that are folios of their own there are 256.
            return [*self._violations(), *unlike(self.host, saved, [
                (frame, at) for frame in frames for at in (range(SHARE) if self._is_loose(Pfn(frame)) else (0, SHARE - 1))])]
        return unlike(self.host, saved, [
            (draw.choice(frames), draw.choice((0, SHARE - 1, draw.randrange(SHARE)))) for _ in range(2)])

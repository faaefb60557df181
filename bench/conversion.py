"""The benchmark model: conversions of guest memory, with everything that may cross them.

Rule of this file: the scenario, as procedures over the real primitives and a host just large enough for them. It is
the same scenario as conversion.pml, step for step; that file says why both have the same states. A procedure acts on
what it reads before its next step, so a party never remembers anything but where it stands (and which round it is).
"""

from __future__ import annotations

from typing import Any

from guest_memfd.explore.engine.program import Program
from guest_memfd.words.outcome import Outcome
from guest_memfd.words.primitives import Folio, Host, Locked, Lookup, Primitive, Steps

KERNEL, GUEST = Host("library"), Host("guest")

# Bytes of the shared state: those of page p start at 1 + p * PER_PAGE.
INVALIDATE = 0
OWNER, DIRECT, STALE, USER, GMAP, REFS, LOCK = range(7)
PER_PAGE = 7
"""owner: 1 the guest's; direct, stale: kernel mapping, and TLB entries that outlived it; user, gmap: mapped by the
VMM, by the guest's stage 2; refs: beyond the page cache's own; lock, invalidate lock: party number + 1."""

NOTHING: tuple[Any, ...] = ()


# -- the parties -----------------------------------------------------------------------------------------------------


def to_private(page: int) -> Steps[None]:
    """Convert *page*: unmap it and count references under the folio lock, zap the direct map, flush, give it away."""
    folio = Folio(page)
    yield from KERNEL.down_write("invalidate")
    if not (yield from KERNEL.lock_folio(folio)).no_direct_map:
        yield from KERNEL.unmap_mapping_pages(page, 1)
        if (yield from KERNEL.folio_ref_count(folio)) == 1:
            yield from KERNEL.set_direct_map_invalid_noflush(folio)
            yield from KERNEL.flush_tlb_kernel_range((folio,))
            yield from KERNEL.hyp_call("lend", page)
    yield from KERNEL.unlock_folio(folio)
    yield from KERNEL.up_write("invalidate")


def to_shared(page: int) -> Steps[None]:
    """Take *page* back: reclaim first, and only then map it."""
    folio = Folio(page)
    yield from KERNEL.down_write("invalidate")
    if (yield from KERNEL.lock_folio(folio)).no_direct_map:
        yield from KERNEL.hyp_call("reclaim", page)
        yield from KERNEL.set_direct_map_default_noflush(folio)
    yield from KERNEL.unlock_folio(folio)
    yield from KERNEL.up_write("invalidate")


def vcpu(page: int, rounds: int) -> Steps[None]:
    """The guest touches *page*; a stage-2 fault looks the folio up, locks it and maps it."""
    folio = Folio(page)
    for _round in range(rounds):
        if (yield from GUEST.guest_access(page, True)) == "fault":
            yield from KERNEL.filemap_get_folio(page)
            yield from KERNEL.lock_folio(folio)
            yield from KERNEL.hyp_call("map", page)
            yield from KERNEL.unlock_folio(folio)
            yield from KERNEL.folio_put(folio)


def gup(page: int) -> Steps[None]:
    """The VMM faults *page* in, a device pins it (GUP-fast), writes to it and lets go."""
    folio = Folio(page)
    if not (yield from KERNEL.lock_folio(folio)).no_direct_map:
        yield from KERNEL.vmf_insert_folio(page, folio)
    yield from KERNEL.unlock_folio(folio)
    if (yield from KERNEL.gup_read_pte(page)) is not None:
        yield from KERNEL.gup_try_get(folio)
        if (yield from KERNEL.gup_recheck(page, folio, True)):
            yield from KERNEL.pin_access(folio, True, True)
            yield from KERNEL.unpin(folio, True)


def stray(page: int, rounds: int) -> Steps[None]:
    """Word loads that run into *page* through the direct map, or through a TLB entry that outlived it."""
    for _round in range(rounds):
        yield from KERNEL.load_unaligned_zeropad(page)


# -- the host --------------------------------------------------------------------------------------------------------


class Pages:
    """A `explore.engine.program.ExploredHost`: a few pages, their folio locks, and the invalidate lock.

    A primitive is a method; it changes `self.raw` and returns its result, or returns BLOCKED and changes nothing.
    """

    footprints = True

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self.raw = bytearray()
        self.me = 0
        self.notes: tuple[str, ...] = ()

    def initial(self) -> bytes:
        """Every page is the host's, mapped in the direct map and nowhere else."""
        page = bytearray(PER_PAGE)
        page[DIRECT] = 1
        return bytes(1) + bytes(page) * self.pages

    def halted(self, shared: bytes) -> bool:
        """Never: an abort is judged by the law, as an assertion is in Spin."""
        return False

    def outcomes(self, shared: bytes | bytearray, party: int, primitive: Primitive) -> list[Outcome]:
        """The one way *primitive* can end, or none."""
        watched = isinstance(shared, bytearray)
        self.raw, self.me, self.notes = shared.copy() if watched else bytearray(shared), party + 1, ()
        result = getattr(self, primitive.name)(*primitive.args)
        after: Any = self.raw if watched else bytes(self.raw)
        return [] if result is BLOCKED else [Outcome(result, after, self.notes)]

    def _at(self, page: int, field: int) -> int:
        return 1 + page * PER_PAGE + field

    def _read(self, page: int, field: int) -> int:
        return self.raw[self._at(page, field)]

    def _write(self, page: int, field: int, value: int) -> None:
        self.raw[self._at(page, field)] = value

    def down_write(self, sem: str) -> Any:
        """Exclusive, and taken in no particular order."""
        if self.raw[INVALIDATE]:
            return BLOCKED
        self.raw[INVALIDATE] = self.me
        return None

    def up_write(self, sem: str) -> None:
        """All that wait may go on."""
        self.raw[INVALIDATE] = 0

    def lock_folio(self, folio: Folio) -> Any:
        """The caller learns whether the page is the guest's."""
        if self._read(folio.pfn, LOCK):
            return BLOCKED
        self._write(folio.pfn, LOCK, self.me)
        return Locked(folio.pfn, True, bool(self._read(folio.pfn, OWNER)), False)

    def unlock_folio(self, folio: Folio) -> None:
        """All that wait may go on."""
        self._write(folio.pfn, LOCK, 0)

    def filemap_get_folio(self, index: int) -> Lookup:
        """Takes a reference."""
        self._write(index, REFS, self._read(index, REFS) + 1)
        return Lookup(Folio(index), index)

    def folio_put(self, folio: Folio, kind: str = "lookup") -> None:
        """The page cache keeps its own: nothing is freed here."""
        self._write(folio.pfn, REFS, self._read(folio.pfn, REFS) - 1)

    def folio_ref_count(self, folio: Folio) -> int:
        """With the page cache's."""
        return 1 + self._read(folio.pfn, REFS)

    def unmap_mapping_pages(self, start: int, nr: int) -> None:
        """The VMM's entry goes."""
        self._write(start, USER, 0)

    def vmf_insert_folio(self, index: int, folio: Folio) -> bool:
        """The VMM's entry comes."""
        self._write(index, USER, 1)
        return True

    def set_direct_map_invalid_noflush(self, folio: Folio) -> int:
        """The entry goes, the TLBs still have it."""
        self._write(folio.pfn, DIRECT, 0)
        self._write(folio.pfn, STALE, 1)
        return 0

    def flush_tlb_kernel_range(self, folios: tuple[Folio, ...]) -> None:
        """Now it is gone from the TLBs too."""
        for folio in folios:
            self._write(folio.pfn, STALE, 0)

    def set_direct_map_default_noflush(self, folio: Folio) -> int:
        """The entry comes back."""
        self._write(folio.pfn, DIRECT, 1)
        return 0

    def hyp_call(self, name: str, page: int) -> int:
        """lend: to the guest; reclaim: back, out of the guest's stage 2; map: into the guest's stage 2."""
        if name == "map":
            self._write(page, GMAP, 1)
        else:
            self._write(page, OWNER, int(name == "lend"))
        if name == "reclaim":
            self._write(page, GMAP, 0)
        return 0

    def guest_access(self, gfn: int, write: bool) -> str:
        """Through stage 2."""
        return "ok" if self._read(gfn, GMAP) else "fault"

    def gup_read_pte(self, index: int) -> Folio | None:
        """Nothing is held yet."""
        return Folio(index) if self._read(index, USER) else None

    def gup_try_get(self, folio: Folio) -> bool:
        """Speculative."""
        self._write(folio.pfn, REFS, self._read(folio.pfn, REFS) + 1)
        return True

    def gup_recheck(self, index: int, folio: Folio, foll_pin: bool) -> bool:
        """Keeps the reference if the entry is still there."""
        if self._read(index, USER):
            return True
        self.unpin(folio, foll_pin)
        return False

    def pin_access(self, folio: Folio, write: bool, dma: bool) -> str:
        """A write to a page that is the guest's is an abort."""
        return self._touch(folio.pfn, True)

    def unpin(self, folio: Folio, foll_pin: bool) -> None:
        """Lets go."""
        self.folio_put(folio)

    def load_unaligned_zeropad(self, pfn: int) -> str:
        """Reaches the page through the direct map, or what the TLB kept of it; not mapped at all is fixed up."""
        return self._touch(pfn, bool(self._read(pfn, DIRECT) or self._read(pfn, STALE)))

    def _touch(self, pfn: int, mapped: bool) -> str:
        if mapped and self._read(pfn, OWNER):
            self.notes = ("the host touches a page that is the guest's",)
            return "abort"
        return "ok"


BLOCKED = object()


class HostSurvives:
    """The law of the model; conversion.pml asserts the same where the host touches a page."""

    name = "host-survives"

    def in_state(self, shared: bytes) -> str | None:
        """Judged by what happens, not by states."""
        return None

    def on_note(self, note: Any) -> str | None:
        """Every note is an abort."""
        return str(note)

    def at_end(self, shared: bytes) -> str | None:
        """Nothing is asked at the end."""
        return None


def parties(small: bool, vcpu_rounds: int, stray_rounds: int) -> list[Program]:
    """The parties of a scenario, in the order of conversion.pml: four around page 0, and three more if not *small*."""
    starts = {
        "to_private 0": lambda: to_private(0), "gup 0": lambda: gup(0), "vcpu 0": lambda: vcpu(0, vcpu_rounds),
        "stray 0": lambda: stray(0, stray_rounds),
    }
    if not small:
        starts |= {"to_shared 0": lambda: to_shared(0), "to_private 1": lambda: to_private(1),
                   "vcpu 1": lambda: vcpu(1, vcpu_rounds)}
    return [Program(number, name, start) for number, (name, start) in enumerate(starts.items())]

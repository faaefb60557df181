"""A TLB that forgets nothing: an entry stays until the operation that has to remove it.

Theory of operation. A real TLB may drop an entry at any time, and may fill itself at any time with any valid translation.
Software is wrong if it depends on either. So this TLB is the worst one that the architecture permits: it keeps whatever it
may keep, and it removes only what an operation must remove. A flush that is missing, too small, or of the wrong kind then
shows as a stale answer in every run, not once in a million.

Kept, per VMID (`entry.Context`), are five kinds of information, because TLBI operations distinguish them:

    combined     VA -> PA over both stages, by ASID (None: global)
    stage1       VA -> IPA, by ASID: as large as the leaf; combined entries are made from it
    stage2       IPA -> PA: what combined entries are made from, and where stage-1 tables lie
    tables1      stage-1 table descriptors (a walk cache), by ASID, also for global pages
    tables2      stage-2 table descriptors

Each is a dictionary by size, then by number at that size, so a look-up asks once for each size. Never kept: what ends in a
translation, address size or access flag fault. So invalid to valid needs no TLBI (mmu.py inserts nothing then). An entry
that fails permission is kept, since the fault comes from the entry.

Invariants:

- Of entries that overlap, the oldest answers (`born`). Software that replaces an entry without removing the old one gets
  the old translation. `overlapping` is for MMUs that report a TLB conflict instead.
- A combined entry is as large as the smaller of its two leaves. An operation by VA removes by the stage-1 leaf, so all
  pieces that were cut from one leaf go with any address of it. `pieces` finds them; without it a block of stage 1 over
  pages of stage 2 would be flushed for one page only.
- A contiguous run is kept as one entry and singly. An operation for one page removes the run as a whole, and the single
  entries of the other pages stay.
- Operations by IPA leave combined entries alone. This is why a hypervisor has to follow IPAS2E1IS with VMALLE1IS.
- Table descriptors of stage 1 are kept with the addresses that stage 1 gave (IPAs), and are translated anew at each use.

Left out: capacity, replacement, and time. An operation takes effect at once and on all CPUs it names, so a missing DSB
cannot be seen. There is one security state, no FEAT_XS, and no CnP: TLBs of two CPUs share nothing.

Source: Arm ARM D8.16 (TLB maintenance), R_PXKLF and around for what may be cached; tlbi.py has the operations by name.
Tests: tests/test_arm64_tlb.py, rule by rule (test_three_kinds_of_entry, test_what_goes_and_what_stays,
test_a_piece_of_a_block_goes_with_any_address_of_it, test_stage2_needs_both_operations).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from guest_memfd.machine.hw.arm64.entry import Context, Sized, Tables
from guest_memfd.machine.hw.arm64.entry import TlbEntry as TlbEntry
from guest_memfd.machine.hw.arm64.walk import PassedEntry
from guest_memfd.words.units import Ipa, Pa, Va

VA_MASK = (1 << 56) - 1


class Tlb:
    """The TLB of one CPU."""

    def __init__(self) -> None:
        self._contexts: dict[int, Context] = {}
        self._born = 0

    # -- lookup: the oldest of several that overlap, which software should have removed -------------------------------

    def combined(self, vmid: int, asid: int, va: Va) -> TlbEntry | None:
        """The combined entry for VA[55:0] *va*."""
        context = self._contexts.get(vmid)
        return None if context is None else _find(context.combined, asid, va)

    def stage1(self, vmid: int, asid: int, va: Va) -> TlbEntry | None:
        """The stage-1-only entry for *va*."""
        context = self._contexts.get(vmid)
        return None if context is None else _find(context.stage1, asid, va)

    def stage2(self, vmid: int, ipa: Ipa) -> TlbEntry | None:
        """The stage-2-only entry for *ipa*."""
        context = self._contexts.get(vmid)
        if context is None:
            return None
        best = None
        for shift, pages in context.stage2.items():
            entry = pages.get(ipa >> shift)
            # The oldest. Hardware may answer with any of them, and that software left an old one in place shows only
            # if it is the old one that answers.
            if entry is not None and (best is None or entry.born < best.born):
                best = entry
        return best

    def table1(self, vmid: int, asid: int, va: Va) -> PassedEntry | None:
        """The deepest stage-1 table descriptor known on the way to *va*."""
        context = self._contexts.get(vmid)
        return None if context is None else _deepest(context.tables1.get(asid), va)

    def table2(self, vmid: int, ipa: Ipa) -> PassedEntry | None:
        """The deepest stage-2 table descriptor known on the way to *ipa*."""
        context = self._contexts.get(vmid)
        return None if context is None else _deepest(context.tables2, ipa)

    def overlapping(self, vmid: int, asid: int, va: Va) -> list[TlbEntry]:
        """Every combined entry for *va*; more than one that do not agree are a TLB conflict."""
        context = self._contexts.get(vmid)
        lanes = () if context is None else (context.combined.get(asid, {}), context.combined.get(None, {}))
        return [entry for lane in lanes for shift, pages in lane.items() if (entry := pages.get(va >> shift))]

    # -- filling ------------------------------------------------------------------------------------------------------

    def insert(self, entry: TlbEntry) -> None:
        """Keep *entry*; one of the same context, size and address is replaced."""
        # Also for an entry that replaces another: it counts as new, so an older one that overlaps it goes on
        # answering.
        self._born += 1
        entry.born = self._born
        context = self._context(entry.vmid)
        shift = entry.shift
        number = entry.ia >> shift
        if entry.kind == "stage2":
            context.stage2.setdefault(shift, {})[number] = entry
            return
        lanes = context.combined if entry.kind == "combined" else context.stage1
        lanes.setdefault(entry.asid, {}).setdefault(shift, {})[number] = entry
        # A piece of a larger stage-1 leaf. An operation by any address of the leaf must find it, and it is not where
        # such an address would be looked up.
        if entry.leaf_shift > shift:
            leaves = context.pieces.setdefault(entry.asid, {}).setdefault(entry.leaf_shift, {})
            leaves.setdefault(entry.ia >> entry.leaf_shift, {})[shift, number] = None

    def insert_tables(self, vmid: int, asid: int | None, ia: int, passed: list[PassedEntry]) -> None:
        """Keep the table descriptors that a walk of *ia* went through; *asid* None: stage 2."""
        context = self._context(vmid)
        # By ASID even below a global page: a table descriptor has no nG bit that could say otherwise.
        lane = context.tables2 if asid is None else context.tables1.setdefault(asid, {})
        for one in passed:
            lane.setdefault(one.shift, {})[ia >> one.shift] = one

    def _context(self, vmid: int) -> Context:
        context = self._contexts.get(vmid)
        if context is None:
            context = self._contexts[vmid] = Context()
        return context

    # -- what is there ------------------------------------------------------------------------------------------------

    def entries(self) -> Iterator[TlbEntry]:
        """Every translation kept, table descriptors left out."""
        for context in self._contexts.values():
            for lanes in (context.combined, context.stage1):
                for lane in lanes.values():
                    yield from _all(lane)
            yield from _all(context.stage2)

    def tables(self) -> Iterator[tuple[int, int | None, PassedEntry]]:
        """Every table descriptor kept: VMID, ASID (None: of stage 2), and where it leads."""
        for vmid, context in self._contexts.items():
            for asid, lane in (*context.tables1.items(), (None, context.tables2)):
                for known in lane.values():
                    for passed in known.values():
                        yield vmid, asid, passed

    def holds_stage1(self, va: Va, asid: int | None, vmid: int) -> bool:
        """Whether a stage-1-only or combined entry, global or of *asid* (None: of any), translates *va*."""
        context = self._contexts.get(vmid)
        if context is None:
            return False
        # Entries are kept without the top byte, which TBI may ignore and which TLBI does not have.
        va &= VA_MASK
        return any(va >> shift in pages
                   for lanes in (context.combined, context.stage1) for tag, lane in lanes.items()
                   if asid is None or tag is None or tag == asid
                   for shift, pages in lane.items())

    def holds_stage2(self, ipa: Ipa, vmid: int) -> bool:
        """Whether a stage-2-only or combined entry leads through *ipa*."""
        context = self._contexts.get(vmid)
        if context is None:
            return False
        return any(ipa >> shift in pages for shift, pages in context.stage2.items()) or any(
            # A combined entry has no IPA as its key; whether it leads through one has to be asked of each.
            entry.s2 is not None and ipa >> entry.shift == entry.ipa >> entry.shift
            for lane in context.combined.values() for entry in _all(lane))

    def of_stage2(self, vmid: int) -> Iterator[TlbEntry]:
        """The stage-2-only entries of one VMID."""
        context = self._contexts.get(vmid)
        return iter(()) if context is None else _all(context.stage2)

    def reaching(self, pa: Pa) -> list[TlbEntry]:
        """The entries that lead to physical address *pa*: combined ones and stage-2-only ones."""
        return [entry for entry in self.entries() if entry.kind != "stage1" and entry.oa <= pa < entry.oa + entry.size]

    # -- removal: what the operations of tlbi.py are made of ----------------------------------------------------------

    def clear(self) -> None:
        """Everything of all VMIDs."""
        self._contexts.clear()

    def drop_vmid(self, vmid: int) -> None:
        """Everything of one VMID."""
        self._contexts.pop(vmid, None)

    def drop_all_stage1(self, vmid: int) -> None:
        """All stage-1 information of one VMID: stage-1-only, combined, and stage-1 tables."""
        context = self._contexts.get(vmid)
        if context is not None:
            context.forget_stage1()

    def drop_asid(self, vmid: int, asid: int) -> None:
        """The stage-1 information of one ASID that is not global."""
        context = self._contexts.get(vmid)
        if context is not None:
            context.forget_asid(asid)

    def drop_va(self, vmid: int, asid: int | None, start: int, size: int, level: int | None, last_only: bool) -> None:
        """Stage-1 information for [start, start+size), global or of *asid* (None: of any).

        *level*: only leaves of that level, as a TTL hint permits. *last_only*: table descriptors stay.
        """
        context = self._contexts.get(vmid)
        if context is None:
            return
        start &= VA_MASK
        for tag in list(context.stage1.keys() | context.combined.keys() | context.tables1.keys()):
            # An operation for one ASID removes global entries as well (VAE1); one for all ASIDs removes everything.
            if asid is not None and tag is not None and tag != asid:
                continue
            # Both kinds hold stage-1 information, so an operation by VA has to reach both.
            for lanes in (context.stage1, context.combined):
                _drop(lanes.get(tag, {}), start, size, level)
            self._drop_pieces(context, tag, start, size, level)
            # VALE1 and VAALE1 leave walk caches alone. A table that is freed after such an operation can still be
            # walked: this is how that mistake shows.
            if not last_only:
                _drop_tables(context.tables1.get(tag, {}), start, size)

    # The rest of every stage-1 leaf that the range touches.
    @staticmethod
    def _drop_pieces(context: Context, tag: int | None, start: int, size: int, level: int | None) -> None:
        lane = context.combined.get(tag, {})
        for leaf_shift, leaves in context.pieces.get(tag, {}).items():
            for leaf in _numbers(leaves, start, size, leaf_shift):
                for shift, number in list(leaves.get(leaf, ())):
                    entry = lane.get(shift, {}).get(number)
                    # The note of a piece outlives the piece itself, which may have been replaced or dropped: then
                    # only the note goes.
                    if entry is None or entry.leaf_shift != leaf_shift or level is None or entry.level == level:
                        del leaves[leaf][shift, number]
                        if entry is not None and entry.leaf_shift == leaf_shift:
                            del lane[shift][number]

    def drop_ipa(self, vmid: int, start: int, size: int, level: int | None, last_only: bool) -> None:
        """Stage-2-only information for [start, start+size); combined entries stay."""
        context = self._contexts.get(vmid)
        if context is None:
            return
        # Not the combined entries, although they were made from these. IPAS2E1 need not find them, so it does not.
        _drop(context.stage2, start, size, level)
        if not last_only:
            _drop_tables(context.tables2, start, size)


def _find(lanes: dict[int | None, Sized], asid: int, va: Va) -> TlbEntry | None:
    best = None
    # Own entries and global ones compete by age alone.
    for tag in (asid, None):
        lane = lanes.get(tag)
        if lane is not None:
            for shift, pages in lane.items():
                entry = pages.get(va >> shift)
                if entry is not None and (best is None or entry.born < best.born):
                    best = entry
    return best


def _deepest(lane: Tables | None, ia: int) -> PassedEntry | None:
    best = None
    for shift, tables in (lane or {}).items():
        found = tables.get(ia >> shift)
        if found is not None and (best is None or found.level > best.level):
            best = found
    return best


def _all(lane: Sized) -> Iterator[TlbEntry]:
    for pages in lane.values():
        yield from pages.values()


# Which of *known*, numbers at *shift*, the range touches; whichever are fewer are gone through.
def _numbers(known: Collection[int], start: int, size: int, shift: int) -> list[int]:
    first, last = start >> shift, (start + size - 1) >> shift
    # A flush of one page among thousands of entries, or of a gigabyte among ten: the shorter list is walked.
    if last - first < len(known):
        return [number for number in range(first, last + 1) if number in known]
    return [number for number in known if first <= number <= last]


def _drop(lane: Sized, start: int, size: int, level: int | None) -> None:
    for shift, pages in lane.items():
        for number in _numbers(pages, start, size, shift):
            if level is None or pages[number].level == level:
                del pages[number]


def _drop_tables(lane: Tables, start: int, size: int) -> None:
    for shift, tables in lane.items():
        for number in _numbers(tables, start, size, shift):
            del tables[number]

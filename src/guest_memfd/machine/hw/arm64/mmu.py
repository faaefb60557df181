"""The MMU of one CPU: the TLB answers first, whatever memory says by now; a walk fills it.

Theory of operation. walk.py computes one translation from memory alone. A CPU does not: it answers from its TLB, and walks
only for what it does not find. The difference between the two is a stale translation, and to find those is what this
machine is for. So the MMU is built from the same parts as the walk, with the TLB between them.

One access (`translate`) goes like this:

1. Select the half of the address space by VA[55]. An address outside of both ends in a translation fault of level 0
   before any TLB is asked, as it depends on TCR_EL1 alone.
2. A combined entry, if there is one, answers alone: address and permissions of both stages, without a look at memory.
3. Else the stage-1 entry, kept or walked for. The walk begins at the deepest table descriptor that the TLB has. Each
   descriptor lies at an IPA, so it is translated by stage 2 first, through the same TLB; a fault there is a stage-2 fault
   with S1PTW.
4. Permission of stage 1 is checked before stage 2 is asked for the final IPA: a stage-1 fault hides a stage-2 fault.
5. The stage-2 entry, kept or walked for, and the combined entry that is made of the two.
6. Permission of stage 2.

Order of insertion matters where a leaf is part of a contiguous run: the run is inserted first, so it is the older of two
that overlap, and answers as long as it is there. The combined entry is inserted before stage 2's permissions are checked,
and the stage-1 entry before stage 1's, as an entry that fails permission may be cached.

Invariants: a walk that ends in a translation, address size or access flag fault leaves no translation, but the table
descriptors it went through stay (`finally`): hardware may cache them even if the walk fails. PSTATE.PAN and the exception
level are not part of an entry; they are looked at when it is used. `at_s1` asks stage 1 without leaving an entry that
goes around stage 2.

`prefetch` is a speculative access. It may happen at any time and for any address, so it fills the TLB with everything
valid on the way, no matter who may use it, and never faults. lockstep calls it before every primitive
(machine/adversary.py).

Left out: hardware updates of the access flag and the dirty state (AF=0 always faults), nested virtualisation, and EL2's
own regime. *conflict_aborts* chooses between the two behaviours that the architecture permits for overlapping entries.

Source: Arm ARM D8; AArch64.S1Translate and S2Translate. Tests: tests/test_arm64_tlb.py
(test_a_stale_entry_wins_over_memory, test_random_changes_with_full_maintenance_are_never_stale), and
tests/test_arm64_oracle.py (test_tlb_and_walk_agree): with all maintenance done, the MMU answers as the walk does.
"""

from __future__ import annotations

from guest_memfd.machine.hw.arm64 import permission
from guest_memfd.machine.hw.arm64.entry import TlbEntry
from guest_memfd.machine.hw.arm64.fault import PERMISSION, TLB_CONFLICT, Fault
from guest_memfd.machine.hw.arm64.permission import BITS, Access
from guest_memfd.machine.hw.arm64.regime import Plan, Stage1, Stage2
from guest_memfd.machine.hw.arm64.tlb import VA_MASK, Tlb
from guest_memfd.machine.hw.arm64.walk import (
    Memory,
    PassedEntry,
    Translation,
    Who,
    begin,
    check_stage1,
    descend,
    effective,
    select,
    stage1_off,
    walk_stage2,
)
from guest_memfd.words.units import Ipa, Pa, Va, identity_pa

_NG = 1 << 11


class Mmu:
    """Translates for one CPU through *tlb*.

    *conflict_aborts*: whether overlapping entries that disagree end in a TLB conflict abort, as they may without
    FEAT_BBM level 3; otherwise the oldest of them is used. `hits` and `walks` count.
    """

    def __init__(self, memory: Memory, tlb: Tlb, *, conflict_aborts: bool = False) -> None:
        self.memory, self.tlb, self.conflict_aborts = memory, tlb, conflict_aborts
        self.hits = self.walks = 0

    def translate(self, va: Va, access: Access, el: int, s1: Stage1, s2: Stage2 | None = None) -> Translation:
        """Translate *va* for *access* from *el*; raises Fault."""
        who: Who = (1, False, va, None, access, el)
        if not s1.enabled:
            ipa = stage1_off(va, s1, who)
            if s2 is None:
                return Translation(identity_pa(ipa), None, None, 48, permission.ALL, el)
            entry = self._stage2(ipa, s2, (2, False, va, ipa, access, el))
            self._check_stage2(entry, va, ipa, False, access, el)
            return Translation(entry.oa + (ipa - entry.ia), None, entry.s2, entry.shift, entry.may2, el)
        # Before the TLB: whether the address is in a half at all follows from TCR_EL1, and no entry can say
        # otherwise.
        plan = select(s1, va, who)
        hit = self._combined(va, s1, s2, who)
        if hit is not None:
            self.hits += 1
        else:
            self.walks += 1
            first = self._stage1(va, plan, s1, s2, who)
            assert first.s1 is not None
            # Before stage 2 is walked for the final address: if both stages refuse, stage 1's fault is the one that
            # is reported.
            check_stage1(first.may, first.s1.level, s1.pan, who)
            hit = self._combine(va, first, s2, access, el)
        return self._answer(hit, va, s1, who)

    def prefetch(self, va: Va, s1: Stage1, s2: Stage2 | None = None) -> None:
        """A speculative access: fills the TLB with every valid entry on the way, whatever it permits; never faults."""
        who: Who = (1, False, va, None, "r", 1)
        try:
            if not s1.enabled:
                if s2 is not None:
                    ipa = stage1_off(va, s1, who)
                    self._stage2(ipa, s2, (2, False, va, ipa, "r", 1))
                return
            plan = select(s1, va, who)
            if self._combined(va, s1, s2, who) is None:
                self._combine(va, self._stage1(va, plan, s1, s2, who), s2, "r", 1)
        # A speculative access has no effect but on the TLB: what would fault is not done.
        except Fault:
            pass

    def at_s1(self, va: Va, access: Access, el: int, s1: Stage1, s2: Stage2 | None = None) -> Translation:
        """AT S1E1R, S1E1W, S1E0R and S1E0W: stage 1 alone, so that *pa* is an IPA; PSTATE.PAN does not count.

        *s2* still translates the addresses of the tables. Raises Fault.
        """
        who: Who = (1, False, va, None, access, el)
        if not s1.enabled:
            return Translation(identity_pa(stage1_off(va, s1, who)), None, None, 48, permission.ALL, el)
        entry = self._stage1(va, select(s1, va, who), s1, s2, who)
        assert entry.s1 is not None
        check_stage1(entry.may, entry.s1.level, False, who)
        return Translation(entry.oa + ((va & VA_MASK) - entry.ia), entry.s1, None, entry.shift, entry.may, el)

    # -- a combined entry answers ----------------------------------------------------------------------------------

    def _combined(self, va: Va, s1: Stage1, s2: Stage2 | None, who: Who) -> TlbEntry | None:
        vmid = s2.vmid if s2 is not None else 0
        if self.conflict_aborts:
            found = self.tlb.overlapping(vmid, s1.asid, va & VA_MASK)
            # Overlapping entries that say the same do no harm: a block and its pages, after a live split.
            if len(found) > 1 and not all(found[0].agrees(other) for other in found):
                raise Fault(TLB_CONFLICT, None, *who)
        return self.tlb.combined(vmid, s1.asid, va & VA_MASK)

    def _answer(self, hit: TlbEntry, va: Va, s1: Stage1, who: Who) -> Translation:
        access, el = who[4], who[5]
        may, may2, offset = hit.may, hit.may2, (va & VA_MASK) - hit.ia
        need = BITS[el, access]
        # The common case needs one test. PAN is not in the entry, because software changes it without a TLBI.
        if s1.pan or not may & need:
            assert hit.s1 is not None
            check_stage1(may, hit.s1.level, s1.pan, who)
            may = effective(may, s1.pan)
        if not may2 & need:
            self._check_stage2(hit, va, hit.ipa + offset, False, access, el)
        return Translation(hit.oa + offset, hit.s1, hit.s2, hit.shift, may & may2, el)

    @staticmethod
    def _check_stage2(entry: TlbEntry, va: Va, ipa: Ipa, s1ptw: bool, access: str, el: int) -> None:
        if not entry.may2 & BITS[el, "r" if s1ptw else access]:
            assert entry.s2 is not None
            raise Fault(PERMISSION, entry.s2.level, 2, s1ptw, va, ipa, access, el)

    # -- the parts it is made of -------------------------------------------------------------------------------------

    # The stage-1-only entry for *va*, kept or walked for.
    def _stage1(self, va: Va, plan: Plan, s1: Stage1, s2: Stage2 | None, who: Who) -> TlbEntry:
        tlb, vmid, asid, key = self.tlb, s2.vmid if s2 is not None else 0, s1.asid, va & VA_MASK
        known = tlb.stage1(vmid, asid, key)
        if known is not None:
            return known
        # EPD and a wrong base keep a walk from beginning; an entry that is in the TLB already answers without one.
        begin(plan, who)
        access, el = who[4], who[5]

        def locate(ipa: Ipa) -> Pa:
            assert s2 is not None
            # The descriptor's own address. Its translation is cached as well, so a table page that stage 2 withholds
            # later can still be walked.
            entry = self._stage2(ipa, s2, (2, True, va, ipa, access, el))
            self._check_stage2(entry, va, ipa, True, access, el)
            return entry.oa + (ipa - entry.ia)

        passed: list[PassedEntry] = []
        try:
            leaf, oa, shift, run, tables = descend(self.memory.read64, plan, va, who, locate if s2 is not None else None,
                                                   passed, tlb.table1(vmid, asid, key))
        # Also after a fault: the descriptors that were read on the way are valid, and hardware may keep them.
        finally:
            if passed:
                tlb.insert_tables(vmid, asid, key, passed)
        may = permission.stage1(leaf.value, tables, s1.wxn)
        # Without nG the entry is global: any ASID may use it, and an operation by VA removes it whatever its ASID.
        tag = asid if leaf.value & _NG else None
        # A run is kept as one entry and singly; the run is the older one and answers while it is there.
        entries = [TlbEntry("stage1", vmid, tag, key, oa, size, size, leaf.level, may, permission.ALL, leaf, None, oa, shift)
                   for size in ((run, shift) if run != shift else (shift,))]
        return self._insert(entries)

    # The stage-2-only entry for *ipa*, kept or walked for; its permissions are the caller's business.
    def _stage2(self, ipa: Ipa, s2: Stage2, who: Who) -> TlbEntry:
        tlb, vmid = self.tlb, s2.vmid
        known = tlb.stage2(vmid, ipa)
        if known is not None:
            return known
        passed: list[PassedEntry] = []
        try:
            leaf = walk_stage2(self.memory.read64, s2, ipa, who, passed, tlb.table2(vmid, ipa))
        finally:
            if passed:
                tlb.insert_tables(vmid, None, ipa, passed)
        entries = [TlbEntry("stage2", vmid, None, ipa, leaf.oa, size, size, leaf.entry.level, permission.ALL, leaf.may, None,
                            leaf.entry, ipa, leaf.shift)
                   for size in ((leaf.run, leaf.shift) if leaf.run != leaf.shift else (leaf.shift,))]
        return self._insert(entries)

    # Entries over both stages, as large as the smaller of the two; where one is a run, one for the single leaves as well.
    def _combine(self, va: Va, first: TlbEntry, s2: Stage2 | None, access: str, el: int) -> TlbEntry:
        key = va & VA_MASK
        ipa = Ipa(first.oa + (key - first.ia))
        if s2 is None:
            second, pa, may2, leaf2, large, unit = None, identity_pa(ipa), permission.ALL, None, 64, 64
        else:
            second = self._stage2(ipa, s2, (2, False, va, ipa, access, el))
            pa, may2, leaf2 = second.oa + (ipa - second.ia), second.may2, second.s2
            large, unit = second.shift, second.unit
        sizes = ((min(first.shift, large), first.leaf_shift), (min(first.unit, unit), first.unit))
        entries = [TlbEntry("combined", first.vmid, first.asid, key, pa, shift, leaf_shift, first.level, first.may, may2,
                            first.s1, leaf2, ipa, shift)
                   for shift, leaf_shift in (sizes if sizes[0] != sizes[1] else sizes[:1])]
        return self._insert(entries)

    # The first, which is the oldest from now on, answers.
    def _insert(self, entries: list[TlbEntry]) -> TlbEntry:
        for entry in entries:
            self.tlb.insert(entry)
        return entries[0]

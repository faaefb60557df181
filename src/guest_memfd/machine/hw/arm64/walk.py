"""One translation, straight from memory: the order of the steps, and of the faults they end in.

Theory of operation. A virtual address is translated twice: stage 1 (the kernel's tables) makes an intermediate physical
address of it, stage 2 (the hypervisor's) a physical one. This is a function of memory and registers; nothing is cached. It
is what the MMU does when its TLB is empty, and what a TLB's answers are compared with.

Registers are decoded once, into a `Plan` (regime.py): for each level the shift, the index mask, the bits of the output
address of a leaf and the size of a contiguous run. `descend` follows a plan and serves both stages. At stage 1 with
stage 2 enabled, the address of every descriptor is an IPA; *locate* translates it. So one access reads up to 4 + 4 x 4 + 4
descriptors.

The order of checks decides which fault is reported, and the kernel acts on which it is (machine/linux/mem_abort.py):

1. Before the walk: VA outside of its half, EPD, a size or a base that does not fit the registers: level 0.
2. At each level: the stage-2 fault of the descriptor's own address (S1PTW, with the level of stage 2; a walk needs only
   read permission); the external abort of reading it; an invalid descriptor (translation); a next table beyond the
   physical size (address size).
3. At the leaf: output address beyond the size, then AF=0, then permission. Permission comes last, as it depends on the
   whole way: at stage 1 each table descriptor can take rights away (APTable, PXNTable, UXNTable), and their bits are ORed.
4. Stage 2 of the final IPA, in the same order: after all of stage 1, permission included.

Faults carry the level and stage, so EL2 and the kernel see the syndrome that hardware would give (fault.py).

Left out, with the choice that was made where the architecture leaves one: a misprogrammed contiguous bit does not fault; a
contiguous run that reaches beyond the input address range is cut off there; nT is ignored; AF=0 always faults (no
FEAT_HAFDBS); LPA2 is refused where registers are decoded. There is no alignment fault of Device memory here.

Source: AArch64.S1Translate, S1Walk, S2Translate and S2Walk of the Arm ARM. Tests: tests/test_arm64_walk.py, rule by rule;
tests/test_arm64_oracle.py compares with Unicorn's MMU, which others have written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from guest_memfd.compat import override
from guest_memfd.machine.hw.arm64 import permission
from guest_memfd.machine.hw.arm64.descriptor import Entry as Entry
from guest_memfd.machine.hw.arm64.fault import (
    ACCESS_FLAG,
    ADDRESS_SIZE,
    EXTERNAL_ABORT,
    PERMISSION,
    TRANSLATION,
    Fault,
)
from guest_memfd.machine.hw.arm64.permission import BITS, Access
from guest_memfd.machine.hw.arm64.regime import Plan
from guest_memfd.machine.hw.arm64.regime import Stage1 as Stage1
from guest_memfd.machine.hw.arm64.regime import Stage2 as Stage2
from guest_memfd.machine.hw.ram import BusError
from guest_memfd.words.units import Ipa, Pa, Va, identity_pa

_AF = 1 << 10
_CONTIGUOUS = 1 << 52

# Of a Pa; of what *locate* makes one of, where a walk has that.
Read = Callable[[Any], int]
# Whose walk it is, as Fault wants it: stage, s1ptw, va, ipa, access, el.
Who = tuple[int, bool, Va | None, Ipa | None, str, int]


class Memory(Protocol):
    """What holds the tables; raises BusError where there is nothing."""

    def read64(self, pa: Pa, /) -> int:
        """The doubleword at *pa*."""


class Leaf(NamedTuple):
    """Where one stage ends: *oa* of the address asked for, the leaf, what it permits, and log2 of the bytes it maps.

    *run* is log2 of the contiguous run the leaf belongs to (*shift* when to none).
    """

    oa: Pa
    entry: Entry
    may: int
    shift: int
    run: int


class PassedEntry(NamedTuple):
    """A valid table descriptor that a walk went through; *attributes* are the hierarchical bits so far."""

    level: int      # of the table it leads to
    shift: int      # log2 of what it spans
    table: Pa
    attributes: int


class Translation:
    """The answer to one access: *pa*, both leaves (None: the stage is off), and the bytes around for which it is linear."""

    __slots__ = ("el", "may", "pa", "s1", "s2", "shift")

    def __init__(self, pa: Pa, s1: Entry | None, s2: Entry | None, shift: int, may: int, el: int) -> None:
        self.pa, self.s1, self.s2, self.shift, self.may, self.el = pa, s1, s2, shift, may, el

    @property
    def size(self) -> int:
        """Bytes, aligned to themselves at both ends, for which VA to PA is linear."""
        return 1 << self.shift

    @property
    def readable(self) -> bool:
        """Whether its EL may read, PAN included."""
        return bool(self.may & BITS[self.el, "r"])

    @property
    def writable(self) -> bool:
        """Whether its EL may write, PAN included."""
        return bool(self.may & BITS[self.el, "w"])

    @property
    def executable(self) -> bool:
        """Whether its EL may execute."""
        return bool(self.may & BITS[self.el, "x"])

    @override
    def __repr__(self) -> str:
        rights = "".join(c for c, on in zip("rwx", (self.readable, self.writable, self.executable), strict=True) if on)
        return f"<PA={self.pa:#x} {rights or '-'} at EL{self.el}, linear for {self.size:#x}>"


def descend(read: Read, plan: Plan, ia: int, who: Who, locate: Callable[[Any], Pa] | None = None,
            passed: list[PassedEntry] | None = None, start: PassedEntry | None = None) -> tuple[Entry, Any, int, int, int]:
    """Follow tables to the leaf of *ia*: the entry, OA, log2 of its size and of its run, ORed hierarchical bits.

    OA is an Ipa at stage 1, a Pa at stage 2. *locate* turns the address of a stage-1 descriptor into a PA (stage 2);
    *start* is a table descriptor known from earlier, *passed* collects those gone through. Raises Fault.
    """
    table: Any = plan.base                              # an address of the kind that *read*, or *locate*, is given
    steps, attributes = plan.steps, 0
    if start is not None:
        # From the deepest table that is known, with the hierarchical bits of the tables above it, which are not read
        # again.
        steps, table, attributes = steps[max(0, start.level - steps[0].level):], start.table, start.attributes
    level = 0
    try:
        for level, shift, index, leaf, run in steps:
            at = table + ((ia >> shift & index) << 3)
            if locate is not None:
                # Every descriptor of stage 1 lies at an IPA. A hypervisor can withhold a table page, and then the
                # walk itself faults.
                at = locate(at)
            value = read(at)
            # One test for both bits: 3 is a table above level 3 and a page at it, 1 is a block, 0 and 2 are invalid.
            found = value & 3
            if found == 3 and level < 3:
                table = value & plan.next_table
                if plan.wide:
                    table |= (value >> 12 & 15) << 48
                # Checked for each table, not only for the leaf: the next read would go to an address that does not
                # exist.
                if table >= plan.limit:
                    raise Fault(ADDRESS_SIZE, level, *who)
                if plan.hierarchical:
                    # ORed, since each table can only take rights away. The bits that are not hierarchical do no harm:
                    # they are masked out.
                    attributes |= value
                if passed is not None:
                    passed.append(PassedEntry(level + 1, shift, table, attributes))
                continue
            # *leaf* is 0 where this granule has no blocks at this level: the encoding is reserved, and reserved is
            # invalid.
            if not leaf or not (found == 3 or (found == 1 and level < 3)):
                raise Fault(TRANSLATION, level, *who)
            oa = value & leaf
            if plan.wide:
                oa |= (value >> 12 & 15) << 48
            # Before AF: the order of the checks is the architecture's, and each ends in another fault.
            if oa >= plan.limit:
                raise Fault(ADDRESS_SIZE, level, *who)
            if not value & _AF:
                raise Fault(ACCESS_FLAG, level, *who)
            return (Entry(level, at, value), oa | ia & (1 << shift) - 1, shift,
                    min(run, plan.ia_bits) if value & _CONTIGUOUS else shift, attributes)
    # The table lies where no memory is. To EL1 this is an external abort on a walk, with the level.
    except BusError:
        raise Fault(EXTERNAL_ABORT, level, *who) from None
    raise AssertionError("level 3 never leads to a table")


def walk_stage2(read: Read, s2: Stage2, ipa: Ipa, who: Who, passed: list[PassedEntry] | None = None,
                start: PassedEntry | None = None) -> Leaf:
    """The stage-2 leaf of *ipa*; permissions are not checked. Raises Fault."""
    plan = s2.plan
    # A geometry that cannot be walked comes before the size of the address, and a base beyond the output size after
    # it.
    if plan.wrong is not None and plan.wrong[0] == TRANSLATION:
        raise Fault(plan.wrong[0], plan.wrong[1], *who)
    if ipa >> plan.ia_bits:
        raise Fault(TRANSLATION, 0, *who)
    if plan.wrong is not None:
        raise Fault(plan.wrong[0], plan.wrong[1], *who)
    entry, oa, shift, run, _ = descend(read, plan, ipa, who, None, passed, start)
    return Leaf(oa, entry, permission.stage2(entry.value, s2.features.xnx), shift, run)


def check_stage2(leaf: Leaf, who: Who) -> None:
    """Raise the permission fault of a stage-2 leaf; a stage-1 walk only reads."""
    access, el = who[4], who[5]
    if not leaf.may & BITS[el, "r" if who[1] else access]:
        raise Fault(PERMISSION, leaf.entry.level, *who)


def select(s1: Stage1, va: Va, who: Who) -> Plan:
    """The plan of the half that *va* is in; raises the fault of an address outside, before any TLB is asked."""
    plan = s1.high if va >> 55 & 1 else s1.low
    if va & plan.tag_mask != plan.tag_value or (plan.e0pd and not who[5]):
        raise Fault(TRANSLATION, 0, *who)
    return plan


def begin(plan: Plan, who: Who) -> None:
    """Raise what keeps a walk of stage 1 from beginning: EPD, TxSZ, the base. A TLB that holds an answer is asked before."""
    if plan.epd:
        raise Fault(TRANSLATION, 0, *who)
    if plan.wrong is not None:
        raise Fault(plan.wrong[0], plan.wrong[1], *who)


def check_stage1(may: int, level: int, pan: bool, who: Who) -> None:
    """Raise the permission fault of a stage-1 leaf."""
    access, el = who[4], who[5]
    if not may & BITS[el, access] or (pan and permission.denied_by_pan(may, access, el)):
        raise Fault(PERMISSION, level, *who)


def effective(may: int, pan: bool) -> int:
    """What is left of a stage-1 set under PSTATE.PAN."""
    return may & ~(permission.R1 | permission.W1) if pan and may & (permission.R0 | permission.W0) else may


def stage1_off(va: Va, s1: Stage1, who: Who) -> Ipa:
    """The output address with SCTLR_EL1.M clear: the VA, which has to be a physical address (S1DisabledOutput).

    The top byte is ignored only where TBI says so.
    """
    tagged = s1.tcr.tbi1 if va >> 55 & 1 else s1.tcr.tbi0
    address = va & (1 << 56) - 1 if tagged else va
    if address >> s1.features.pa_bits:
        raise Fault(ADDRESS_SIZE, 0, *who)
    return Ipa(address)


def walk(memory: Memory, va: Va, access: Access, el: int, s1: Stage1, s2: Stage2 | None = None) -> Translation:
    """Translate *va* for *access* from *el* with nothing but what is in memory now; raises Fault."""
    read = memory.read64
    who: Who = (1, False, va, None, access, el)
    entry1, may, shift = None, permission.ALL, 48
    if s1.enabled:
        plan = select(s1, va, who)
        begin(plan, who)

        def locate(ipa: Ipa) -> Pa:
            assert s2 is not None
            walker: Who = (2, True, va, ipa, access, el)
            leaf = walk_stage2(read, s2, ipa, walker)
            check_stage2(leaf, walker)
            # A walk reads only, so stage 2 must allow reading; the hardware update of AF, which would write, is not
            # modelled.
            return leaf.oa

        entry1, oa, shift, _, tables = descend(read, plan, va, who, locate if s2 is not None else None)
        may = permission.stage1(entry1.value, tables, s1.wxn)
        check_stage1(may, entry1.level, s1.pan, who)
        may = effective(may, s1.pan)
    else:
        oa = stage1_off(va, s1, who)
    if s2 is None:
        return Translation(identity_pa(oa), entry1, None, shift, may, el)
    who = (2, False, va, oa, access, el)
    leaf = walk_stage2(read, s2, oa, who)
    check_stage2(leaf, who)
    return Translation(leaf.oa, entry1, leaf.entry, min(shift, leaf.shift), may & leaf.may, el)

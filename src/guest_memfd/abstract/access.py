"""How the kernel of the abstract host reaches memory, and what is known of a page's contents until it is free.

An access of the kernel passes two gates, stage 1 and stage 2, as arch/arm64/mm/fault.c has it: a stage-1
translation fault goes through the exception table; a stage-2 abort is injected by the hypervisor as the kind it
chooses, and only some kinds consult the table. The allocator writes to a page, too, when the last reference goes.
"""

from __future__ import annotations

from guest_memfd.abstract import state as st
from guest_memfd.abstract.base import AbstractBase
from guest_memfd.core.hypervisor import DATA_ABORT, SEA, Hypervisor
from guest_memfd.errors import shown
from guest_memfd.words import facts
from guest_memfd.words.pagestate import (
    ALLOCATED,
    ANY,
    CONTENTION,
    CONTENTS,
    DATA,
    FREE,
    GUEST,
    JUNK,
    KEPT,
    OWNERS,
    SECRET,
    UNMAPPED,
    ZERO,
)
from guest_memfd.words.primitives import OPS, Folio
from guest_memfd.words.units import Gfn, Pfn


def _yes(hypervisor: Hypervisor, name: str, answer: object) -> bool:
    if type(answer) is not bool:
        raise TypeError(f"{name} of {hypervisor.name!r} returned {shown(answer)}, not True or False")
    return answer


class AbstractAccess(AbstractBase):
    """load_unaligned_zeropad ... image_copy, and `kernel_access`, the one way the kernel touches memory."""

    # -- accesses ------------------------------------------------------------------------------------------------

    def note_access(self, frame: st.Frame, who: str, what: str, via: str, write: bool) -> None:
        """Record that *who* reached the contents."""
        # What the reader should find is known only of a page that a file holds.
        number = frame.slot - 1 if frame.slot else None
        expect = self.state.page(number).expect if number is not None else ANY
        self.notes.append(facts.Access(
            who, what, via, frame.number, write, self._seen_by(who, frame), self.guests(frame),
            bool(frame.gmap) or frame.owner == GUEST, None if number is None else self.index(number),
            None if expect == ANY else CONTENTS[expect], frame.allocated == FREE, bool(frame.handled)))

    # Memory that is encrypted for its guest is something else for everybody else.
    def _seen_by(self, who: str, frame: st.Frame) -> str:
        if self.hypervisor.encrypts and who != "guest" and frame.owner == GUEST:
            return "ciphertext"
        return CONTENTS[frame.content]

    def kernel_access(self, frame: st.Frame, who: str, what: str, *, write: bool, fixup: bool) -> str:
        """One access through the direct map: ``ok``, ``fixed`` (the exception table), or the end of the kernel."""
        # A stale TLB entry lets an access through that the table no longer allows: a hit comes before a walk.
        if not frame.s1 and not frame.stale:
            self.notes.append(facts.Abort(
                what, 1, frame.number, "translation fault", fixup,
                "a stage-1 fault goes through the exception table" if fixup else "no exception-table entry: oops"))
            return "fixed" if fixup else self.panic()
        # Stage 2 is asked after stage 1, so a hole in stage 1 keeps stage 2's abort from happening at all: this is
        # what a hole is for.
        if self.withheld(frame, write):
            return self._stage2_abort(frame, who, what, write=write, fixup=fixup)
        self.note_access(frame, who, what, "direct map" if frame.s1 else "stale TLB entry", write)
        self.spoilt(frame, write)
        return "ok"

    def exported(self, frame: st.Frame, what: str) -> bool:
        """Whether the host may go on, as the page that it has touched is exported."""
        if not self.exports:
            return False
        asked = frame.asked
        done = not frame.stuck and _yes(self.hypervisor, "exports", self.hypervisor.exports(self, frame.number))
        if done:
            frame.asked = asked                     # its guest still has a use for it
            self._overtakes_faults(frame)
            self.notes.append(facts.Abort(what, 2, frame.number, self.hypervisor.abort or "", True, "the page is exported"))
        return done

    # A fault of the guest that has mapped it, and has not returned yet, was right about it.
    def _overtakes_faults(self, frame: st.Frame) -> None:
        for ghost in self.state.ghosts():
            if frame.slot and ghost.op == OPS.index("fault") + 1 and ghost.scope >> self.index(frame.slot - 1) & 1:
                ghost.reasons |= CONTENTION

    def is_exported(self, frame: st.Frame) -> bool:
        """Whether *frame* is a guest's, and accessible to the host because it was exported."""
        return self.exports and frame.owner == GUEST and bool(frame.s2)

    @property
    def exports(self) -> bool:
        """Whether a page that the host touches is exported, under this hypervisor."""
        return self.hypervisor.exports is not Hypervisor.exports

    def spoilt(self, frame: st.Frame, write: bool) -> None:
        """What the host writes to a page that was exported is no longer what its guest has put there."""
        if not write or not self.is_exported(frame):
            return
        gfn = self.state.page(frame.slot - 1).binding - 1 if frame.slot else -1
        if gfn >= 0:
            self.notes.append(facts.Destroyed(frame.number, "the host has written to it, and it is not imported so"))
            self.gfn(Gfn(gfn)).gpoison = 1

    def withheld(self, frame: st.Frame, write: bool, *, alone: bool = False) -> bool:
        """Whether the hypervisor refuses the access; *alone*: it goes through an entry that maps this page only."""
        # Where only writes are checked, that is done at the size of the entry that they go through.
        if self.hypervisor.guards == "accesses":
            return not frame.s2
        order = 0 if alone else self.leaf("s1_leaf", frame.number)
        first = Pfn(frame.number >> order << order)
        return write and any(not part.s2 for part in self.frames_of(Folio(first, order)))

    def _stage2_abort(self, frame: st.Frame, who: str, what: str, *, write: bool, fixup: bool) -> str:
        kind = self.hypervisor.abort or DATA_ABORT
        if self.exported(frame, what):
            self.note_access(frame, who, what, "direct map", write)
            self.spoilt(frame, write)
            return "ok"
        if kind == SEA:
            # Two conditions: the access has an entry in the exception table, and this kernel's do_sea() looks there.
            survived = fixup and self.sea_fixup
            why = ("do_sea() consults the exception table in this design" if survived else
                   "do_sea() does not look at exception tables" if not self.sea_fixup else
                   "this access has no exception-table entry")
            self.notes.append(facts.Abort(what, 2, frame.number, SEA, survived, why))
            return "fixed" if survived else self.panic()
        # The exception table comes before force reclaim (is_spurious_el1_translation_fault() is called only without a
        # fixup), so the guest keeps its page.
        if fixup:
            fault = "translation fault" if kind == DATA_ABORT else kind
            self.notes.append(facts.Abort(what, 2, frame.number, kind, True, f"a {fault} goes through the exception table"))
            return "fixed"
        # The kernel must read or die, so under pKVM the guest loses the page. The access is then repeated, and reads
        # zeros.
        if not _yes(self.hypervisor, "force_reclaim", self.hypervisor.force_reclaim(self, frame.number)):
            self.notes.append(facts.Abort(what, 2, frame.number, kind, False, "no exception-table entry: oops"))
            self.panic()
        self.notes.append(facts.Abort(what, 2, frame.number, kind, True, "the page is reclaimed by force"))
        self.note_access(frame, who, what, "direct map", write)
        return "ok"

    def load_unaligned_zeropad(self, pfn: Pfn) -> str:
        """A word load that runs into *pfn*: it has an exception-table entry."""
        return self.kernel_access(self.state.frame(pfn), "kernel", "load_unaligned_zeropad", write=False, fixup=True)

    def copy_from_kernel_nofault(self, pfn: Pfn) -> str:
        """/proc/kcore: it has an exception-table entry; poisoned pages are skipped."""
        frame = self.state.frame(pfn)
        if frame.poison:
            return "skipped"
        return self.kernel_access(frame, "kernel", "copy_from_kernel_nofault", write=False, fixup=True)

    def read_folio(self, folio: Folio) -> str:
        """A plain read through the direct map, of a folio that the reader found in the page cache."""
        for frame in self.frames_of(folio):
            self.kernel_access(frame, "kernel", "read_folio", write=False, fixup=False)
        return "ok"

    def clear_folio(self, folio: Folio) -> None:
        """A plain write through the direct map."""
        for frame in self.frames_of(folio):
            self.kernel_access(frame, "library", "clear_folio", write=True, fixup=False)
            frame.content = ZERO

    def clear_folio_local(self, folio: Folio) -> None:
        """A write through a private mapping of this CPU: stage 2 still has a say."""
        for frame in self.frames_of(folio):
            self._write_local(frame, "clear_folio_local")
            frame.content = ZERO

    def _write_local(self, frame: st.Frame, what: str) -> None:
        if self.withheld(frame, True, alone=True):
            self._stage2_abort(frame, "library", what, write=True, fixup=False)
        self.note_access(frame, "library", what, "local mapping", True)

    def write_folio(self, folio: Folio, local: bool) -> None:
        """What user space gives is known to it, and is there from now on."""
        for frame in self.frames_of(folio):
            if local:
                self._write_local(frame, "write_folio")
            else:
                self.kernel_access(frame, "library", "write_folio", write=True, fixup=False)
            self.written(frame)

    def image_copy(self, pfn: Pfn) -> str:
        """safe_copy_page() (kernel/power/snapshot.c): map a hole for the moment, copy plainly, make it again and flush."""
        frame = self.state.frame(pfn)
        if not frame.allocated or frame.poison:
            return "skipped"
        # As safe_copy_page(): the mapping of one page is made for the copy. It is what lets guest memory get into an
        # image.
        hole = not frame.s1
        if hole:
            self.cut_leaf("s1_leaf", Folio(pfn))
            frame.s1 = 1
        self.kernel_access(frame, "image", "safe_copy_page", write=False, fixup=False)
        if hole:
            frame.s1 = frame.stale = 0
        return "copied"

    # -- what a page is known to hold ----------------------------------------------------------------------------------

    def expect(self, frame: st.Frame, content: int) -> None:
        """Who reads the page of the file that *frame* is should find *content*."""
        if frame.slot:
            self.state.page(frame.slot - 1).expect = content

    def written(self, frame: st.Frame) -> None:
        """The host has put something into *frame*, which it knows."""
        frame.content = DATA
        self.expect(frame, DATA)

    def declassify(self, pfn: Pfn) -> None:
        """The guest agrees that the host may read what it wrote."""
        frame = self.state.frame(pfn)
        if frame.content == SECRET:
            frame.content = DATA
            self.expect(frame, DATA)

    def note_private(self, frame: st.Frame, how: str) -> None:
        """A frame is the guest's alone from now on."""
        cached = any(vm.gpc == frame.number + 1 for vm in self.state.vms())
        head = self.state.head(frame)
        self.notes.append(facts.MadePrivate(how, frame.number, head.pin + head.get, cached))

    # -- the last reference --------------------------------------------------------------------------------

    def free_if_unused(self, head: st.Frame) -> None:
        """free_pages_prepare(): debug options write to the pages, and their next owner finds what they hold.

        *head* is the first frame of a folio. A page whose memory is broken is kept, and the others are freed.
        """
        if head.refs() or head.allocated != ALLOCATED:
            return
        parts = self.state.parts(head)
        for frame in parts:
            if not frame.poison:
                self.notes.append(facts.Freed(
                    frame.number, OWNERS[frame.owner], CONTENTS[frame.content], bool(frame.gmap or frame.gstale)))
        if head.lock and not head.poison:
            self.die(f"pfn{head.number} is freed while locked")
        # Flags of a large folio are no page's once it has come apart.
        if len(parts) > 1:
            head.uptodate = head.no_direct_map = 0
        for frame in parts:
            self._free(frame)

    def _free(self, frame: st.Frame) -> None:
        if frame.poison:
            frame.allocated = KEPT
        else:
            # It came without a direct map: the allocator gives it one again when it needs the page as another.
            if frame.no_direct_map == UNMAPPED:
                frame.s1 = 1
            if self.kernel.init_on_free:
                self.kernel_access(frame, "allocator", "free-time poisoning", write=True, fixup=False)
                frame.content = JUNK
            frame.allocated = FREE
            frame.uptodate = frame.no_direct_map = 0
        self.make_folio(frame, 0)

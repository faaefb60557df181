"""The guest's side of the abstract host: stage-2 tables for the hypervisors' EL2 code, guest accesses, pfn caches."""

from __future__ import annotations

from guest_memfd.abstract import state as st
from guest_memfd.abstract.access import AbstractAccess
from guest_memfd.abstract.operations import AbstractOperations
from guest_memfd.core.hypervisor import check_owner
from guest_memfd.words import facts
from guest_memfd.words.pagestate import (
    ANY,
    CONTENTION,
    DATA,
    EVICTED,
    FOR_GOOD,
    GONE,
    GUEST,
    HELD,
    HOST,
    OWNERS,
    RUNNING,
    SECRET,
    ZERO,
)
from guest_memfd.words.primitives import OPS, Folio
from guest_memfd.words.units import Gfn, Index, Pfn


class AbstractGuestSide(AbstractAccess, AbstractOperations):
    """hyp_call ... gpc_drop; and the `core.hypervisor.Stage2` protocol that EL2 code works on."""

    _refused = False

    # -- Stage2: what a hypervisor can do ------------------------------------------------------------------------

    def owner(self, pfn: Pfn) -> str:
        """The hypervisor's record, as far as it is about this VM: what is another guest's is none of its business."""
        frame = self.state.frame(pfn)
        return OWNERS[frame.owner] if frame.owner == HOST or frame.of == self.vm.number else "other guest"

    def set_owner(self, pfn: Pfn, owner: str) -> None:
        """Change the record; GUEST makes the frame private to the guest."""
        check_owner(owner)
        frame = self.state.frame(pfn)
        frame.owner = OWNERS.index(owner)
        frame.withdrawn = 0
        frame.of = self.vm.number if frame.owner != HOST else 0
        if owner == "guest":
            self.note_private(frame, "donated")

    def host_maps(self, pfn: Pfn, allowed: bool, order: int = 0) -> None:
        """Host stage 2. Taking a page away ends in TLBI VMALLE1IS, which empties the host's stage-1 TLBs as well."""
        self.cut_leaf("s2_leaf", Folio(pfn, order))
        self.set_leaf("s2_leaf", pfn, order)
        for frame in self.frames_of(Folio(pfn, order)):
            frame.s2 = int(allowed)
        if not allowed:
            # TLBI VMALLE1IS is for all addresses. So a page that the driver forgot to flush is flushed here, by an
            # unrelated donation, and the mistake shows only where no such call comes in between.
            for frame in self.state.frames():
                frame.stale = 0

    def host_leaf(self, pfn: Pfn) -> int:
        """As it was last changed."""
        return self.leaf("s2_leaf", pfn)

    def host_split(self, pfn: Pfn, order: int) -> None:
        """One entry of each page, which says the same."""
        self.split_leaves("s2_leaf", Folio(pfn, order))

    def guest_map(self, gfn: Gfn, pfn: Pfn, order: int = 0) -> None:
        """Guest stage 2: gfn -> pfn, in place of what it mapped. A TLB entry that says the same has outlived nothing."""
        whole = not (gfn | pfn) & ((1 << order) - 1)
        for at, frame in enumerate(self.frames_of(Folio(pfn, order))):
            self._map(self.gfn(gfn + at), frame)
            self.cut_leaf("guest_leaf", Folio(frame.number, order if whole else 0))
        if whole:
            self.set_leaf("guest_leaf", pfn, order)

    def _map(self, entry: st.GfnRecord, frame: st.Frame) -> None:
        # A gfn maps one page: what it mapped before is replaced.
        for other in self.state.frames():
            if other.gmap == entry.number + 1 and other.number != frame.number:
                self.cut_leaf("guest_leaf", Folio(other.number))
                other.gmap = other.asked = 0
        if not frame.gmap:
            # Whether the guest itself has asked for the page. Of a page that was given to it without its asking it
            # cannot be said that it holds on to it.
            frame.asked = int(self.state.ghost(self.who).op == OPS.index("fault") + 1)
        frame.gmap = entry.number + 1
        if frame.gstale == frame.gmap:
            frame.gstale = 0
        entry.gpoison = 0
        # memory_failure() has told everybody that the page is lost; to map it again is to hand broken memory out.
        if frame.handled:
            self.notes.append(facts.Given("the guest", frame.number))

    def guest_leaf(self, gfn: Gfn) -> int:
        """The order of the leaf that maps *gfn*."""
        entry = self.gfn(gfn).number + 1
        return next((self.leaf("guest_leaf", frame.number) for frame in self.state.frames() if frame.gmap == entry), 0)

    def guest_split(self, gfn: Gfn, order: int) -> None:
        """One leaf of each page; what a TLB has of the large one says the same."""
        for frame in self.state.frames():
            if self.gfn(gfn).number < frame.gmap <= self.gfn(gfn).number + (1 << order):
                self.cut_leaf("guest_leaf", Folio(frame.number))

    def guest_unmap(self, gfn: Gfn, pfn: Pfn, *, flush: bool = True) -> bool:
        """Remove gfn -> pfn, and what else its leaf maps; False when it is not mapped so. Without *flush* TLBs keep it."""
        entry, frame = self.gfn(gfn).number + 1, self.state.frame(pfn)
        if flush:
            frame.gstale = 0
        if frame.gmap != entry:
            return False
        order = self.leaf("guest_leaf", pfn)
        for part in self.frames_of(Folio(Pfn(pfn >> order << order), order)):
            part.gstale = 0 if flush else part.gmap
            part.gmap = part.asked = 0
            self.set_leaf("guest_leaf", part.number, 0)
        index = self.ours(frame)
        # That the rest of the leaf goes with it is how tables are: what comes of it is for the other laws.
        if index is not None:
            self.out_of_scope("takes the page from the guest", index)
        return True

    def gfn_of(self, pfn: Pfn) -> Gfn | None:
        """The gfn of this VM that maps *pfn*, if any."""
        gfn = self.state.frame(pfn).gmap - 1 - self.vm.number * self.sizes.gfns
        return Gfn(gfn) if 0 <= gfn < self.sizes.gfns else None

    def scrub(self, pfn: Pfn) -> None:
        """Zero and clean the page, at EL2."""
        frame = self.state.frame(pfn)
        frame.content = ZERO

    def zeroed(self, pfn: Pfn) -> None:
        """Zeros, and who reads there expects them."""
        frame = self.state.frame(pfn)
        frame.content = ZERO
        self.expect(frame, ZERO)

    def lose(self, pfn: Pfn, how: str) -> None:
        """Zeros stand for what no one can make sense of."""
        frame, ghost = self.state.frame(pfn), self.state.ghost(self.who)
        index = self.ours(frame)
        asked = not ghost.op or self.file.inode == EVICTED or (index is not None and ghost.scope >> index & 1)
        if not asked and index is not None and self.page(index).expect not in (ZERO, ANY):
            self.notes.append(facts.Destroyed(pfn, how))
        self.zeroed(pfn)

    def destroy(self, pfn: Pfn, gfn: Gfn, how: str) -> None:
        """Take the page from a living guest that never agreed: its contents are lost, its next access says so."""
        self.scrub(pfn)
        self.notes.append(facts.Destroyed(pfn, how))
        self.gfn(gfn).gpoison = 1

    def poisoned(self, gfn: Gfn) -> bool:
        """Whether the entry of *gfn* is POISONED: `destroy` took its page, and the guest's next access reports it."""
        return bool(self.gfn(gfn).gpoison)

    def locked_in(self, pfn: Pfn) -> bool:
        """Whether the guest holds on to the page."""
        return bool(self.state.frame(pfn).locked_in)

    def set_locked_in(self, pfn: Pfn, locked: bool) -> None:
        """The guest holds on, or lets go."""
        self.state.frame(pfn).locked_in = int(locked)

    def forget(self, pfn: Pfn) -> None:
        """The guest gives up the contents: no one relies on them from here on."""
        frame = self.state.frame(pfn)
        if frame.slot:
            self.state.page(frame.slot - 1).expect = ANY

    def vm_alive(self) -> bool:
        """Whether the VM still runs."""
        return self.vm.vm == RUNNING

    def refuse(self, call: str, errno: int) -> int:
        """Return -errno, and let the laws know that this is a rule and not a failure."""
        self.notes.append(facts.Refused(call, errno))
        self._refused = True
        return -errno

    # -- primitives ----------------------------------------------------------------------------------------------

    def hyp_call(self, name: str, *args: object) -> int:
        """Run the hypervisor's own code; what it has once refused for good it refuses ever after."""
        code = self.hypervisor.hypercalls.get(name)
        if code is None:
            raise LookupError(f"hypervisor {self.hypervisor.name!r} has no hypercall {name!r}")
        if self.vm.vm == GONE:
            self.gone("the VM, in hypercall")
        if self.file.released:
            self.gone("what the hypervisor keeps of the file, in hypercall")
        self.count("calls")
        frame = self.subject(args)
        if frame is not None and name in self.hypervisor.final and any(part.stuck for part in self.state.parts(frame)):
            self.against(FOR_GOOD, frame)
            return self.hypervisor.final[name]
        # Set by `refuse` within this call only.
        self._refused = False
        asked = frame.asked if frame is not None and self.exports else 0
        ret = code(self, *args)
        # What is exported its guest has asked for, and has a use for still.
        if frame is not None and self.is_exported(frame):
            frame.asked = asked
        wrong = self.hypervisor.wrong_result(name, ret)
        if wrong is not None:
            raise TypeError(wrong)
        # A guest that has never asked for a page, nor written to it, cannot be said to hold on to it.
        if self._refused and (frame is None or any(part.asked or part.content != ZERO for part in self.state.parts(frame))):
            self.against(HELD, frame)
        return ret

    def subject(self, args: tuple[object, ...]) -> st.Frame | None:
        """The frame a hypercall is about: that of the first folio among its arguments."""
        folio = next((arg for arg in args if isinstance(arg, Folio)), None)
        return None if folio is None else self.state.frame(folio.pfn)


    def guest_access(self, gfn: Gfn, write: bool) -> str:
        """Through a TLB entry that should be gone if there is one, as a hit comes before a walk; else guest stage 2."""
        entry = self.gfn(gfn)
        if self.vm.vm != RUNNING:
            return "stopped"
        # The table's mapping and the stale entry can be two different frames at once.
        reached = (f for f in self.state.frames() if entry.number + 1 in (f.gmap, f.gstale))
        frame = min(reached, key=lambda f: f.gstale != entry.number + 1, default=None)
        if frame is None:
            return "poisoned" if entry.gpoison else "fault"
        via = "guest mapping" if frame.gmap == entry.number + 1 else "stale guest TLB entry"
        # The access is carried out, as hardware would do it; the note tells the laws.
        if not self._guest_may(frame, gfn):
            self.notes.append(facts.StrayGuest(frame.number, via))
            return "ok"
        self.note_access(frame, "guest", "guest access", via, write)
        if frame.gmap == entry.number + 1:              # a TLB hit is nothing the hypervisor sees
            self.hypervisor.guest_touches(self, frame.number)
        if write:
            private = frame.owner == GUEST or (frame.owner == HOST and self.state.private(frame))
            frame.content = SECRET if private else DATA
            self.expect(frame, frame.content)
        return "ok"

    # The guest's own: the page the file holds at the index that this gfn is bound to.
    def _guest_may(self, frame: st.Frame, gfn: Gfn) -> bool:
        if self.ours(frame) is None or self.state.page(frame.slot - 1).binding != gfn + 1:
            return False
        if not self.hypervisor.tracks_owner:
            return True
        return frame.owner != HOST and frame.of == self.vm.number

    def guest_consents(self, gfn: Gfn) -> str:
        """The hypervisor's own way of letting go."""
        if self.vm.vm != RUNNING:
            return "stopped"
        entry = self.gfn(gfn)
        frame = next((f for f in self.state.frames() if f.gmap == entry.number + 1), None)
        if frame is None:
            return "fault"
        self.hypervisor.guest_consents(self, frame.number)
        return "ok"

    def gmem_invalidate_begin(self, start: Index, nr: int) -> None:
        """Kernel mappings of the range end; a reader of the cache's lock is waited for."""
        if not self._is_bound("gmem_invalidate_begin"):
            return
        vm = self.vm
        if vm.gpc:
            frame = self.state.frame(vm.gpc - 1)
            index = self.ours(frame)
            if not frame.slot or (index is not None and start <= index < start + nr):
                # A reader holds the lock of the cache over its access, and an invalidation waits for it.
                if vm.gpc_readers:
                    self.wait()
                vm.gpc = 0
        vm.gpc_fresh = 0
        vm.progress += 1
        ghost = self.state.ghost(self.who)
        ghost.begun += 1
        about = self.indexes[max(start, 0):max(start + nr, 0)]
        vm.range = self._hull(vm.range | sum(1 << self.page(i).binding - 1 for i in about if self.page(i).binding))
        for index in about:
            ghost.announced |= 1 << index
            # Of a large folio all of it may be announced, whatever part is meant: who looks again finds the rest as it was.
            if not self.about_block(index):
                self.out_of_scope("announces an invalidation", index)

    def gmem_invalidate_end(self) -> None:
        """The sequence moves on: a caller that sampled it before must look again."""
        ghost, bound = self.state.ghost(self.who), self._is_bound("gmem_invalidate_end")
        if not ghost.begun:
            if bound:
                self.die("gmem_invalidate_end without begin")
            return
        ghost.begun -= 1
        # They may be nested, as invalidations of a VM are: what was announced holds until the last has ended.
        if not ghost.begun:
            ghost.announced = 0
        self.vm.progress -= 1
        self.vm.gpc_fresh = 0
        if not self.vm.progress:
            self.vm.range = 0
        # Where nobody has sampled it as it is, that it moves makes no difference to anybody.
        self.vm.seq += self.vm.sampled
        self.vm.sampled = 0

    # One range for all that are under way (kvm_mmu_invalidate_range_add()).
    @staticmethod
    def _hull(gfns: int) -> int:
        return (1 << gfns.bit_length()) - (gfns & -gfns) if gfns else 0

    def mmu_invalidate_seq(self) -> int:
        """Counted from the first reader on."""
        self.vm.sampled = 1
        return int(self.vm.seq)

    def mmu_invalidate_retry(self, seq: int, gfn: Gfn) -> bool:
        """By the range while one is under way, by the sequence afterwards."""
        retry = bool(self.vm.range >> gfn & 1) or self.vm.seq != seq
        if retry:
            self.against(CONTENTION)
        return retry

    # Invalidation goes through the bindings (kvm_gmem_invalidate_begin()): without one there is no VM to tell.
    def _is_bound(self, what: str) -> bool:
        bound = self.bound()
        if bound and self.vm.vm == GONE:
            self.gone(f"the VM, in {what}")
        return bound

    # -- gfn_to_pfn_cache ----------------------------------------------------------------------------------------

    def gpc_begin(self, index: Index) -> bool:
        """Sample the sequence, if there is a memslot to come back to."""
        if not self.page(index).binding:
            return False
        self.vm.gpc_fresh = 1
        return True

    def gpc_commit(self, folio: Folio) -> bool:
        """Fill the cache, unless an invalidation runs or has run since `gpc_begin`: mmu_notifier_retry_cache()."""
        if self.vm.progress or not self.vm.gpc_fresh:
            return False
        self.vm.gpc = folio.pfn + 1
        return True

    def gpc_read_lock(self) -> bool:
        """Valid and locked, or neither."""
        if not self.vm.gpc:
            return False
        self.vm.gpc_readers = 1
        return True

    def gpc_access(self, write: bool) -> str:
        """A plain access of the kernel through its cached mapping, which is the direct map."""
        frame = self.state.frame(self.vm.gpc - 1)
        self.kernel_access(frame, "kernel", "gfn_to_pfn_cache user", write=write, fixup=False)
        if write:
            self.written(frame)
        return "ok"

    def gpc_access_vmap(self, write: bool) -> str:
        """Through pages that the cache has mapped for itself; its users are waited for before that mapping goes."""
        frame = self.state.frame(self.vm.gpc - 1)
        self.note_access(frame, "kernel", "gfn_to_pfn_cache user", "vmap", write)
        if write:
            self.written(frame)
        return "ok"

    def gpc_read_unlock(self) -> None:
        """Let invalidations go on."""
        self.vm.gpc_readers = 0

    def gpc_drop(self) -> None:
        """The cache is given up."""
        self.vm.gpc = self.vm.gpc_fresh = 0

"""The guest's side of the abstract host: stage-2 tables for the hypervisors' EL2 code, guest accesses, pfn caches."""

from __future__ import annotations

from guest_memfd.hosts.abstract import notes
from guest_memfd.hosts.abstract import state as st
from guest_memfd.hosts.abstract.mappings import Mappings
from guest_memfd.hosts.host import Folio


class GuestSide(Mappings):
    """hypercall ... gpc_drop; and the `hypervisors.hypervisor.Stage2` protocol that EL2 code works on."""

    # -- Stage2: what a hypervisor can do ------------------------------------------------------------------------

    def owner(self, pfn: int) -> str:
        """The hypervisor's record."""
        return st.OWNERS[self.state.frame(pfn).owner]

    def set_owner(self, pfn: int, owner: str) -> None:
        """Change the record; GUEST makes the frame private to the guest."""
        frame = self.state.frame(pfn)
        frame.owner = st.OWNERS.index(owner)
        if owner == "guest":
            self.note_private(frame, "donated")

    def host_maps(self, pfn: int, allowed: bool) -> None:
        """Host stage 2. Taking a page away ends in TLBI VMALLE1IS, which empties the host's stage-1 TLBs as well."""
        self.state.frame(pfn).s2 = int(allowed)
        if not allowed:
            for frame in self.state.frames():
                frame.stale = 0

    def guest_map(self, gfn: int, pfn: int) -> None:
        """Guest stage 2: gfn -> pfn. A TLB entry that says the same has outlived nothing any more."""
        frame = self.state.frame(pfn)
        frame.gmap = gfn + 1
        if frame.gstale == gfn + 1:
            frame.gstale = 0
        self.state.page(gfn).gpoison = 0

    def guest_unmap(self, gfn: int, pfn: int, *, flush: bool = True) -> bool:
        """Remove gfn -> pfn; False when it is not mapped so. Without *flush* TLBs keep it."""
        frame = self.state.frame(pfn)
        if flush:
            frame.gstale = 0
        if frame.gmap != gfn + 1:
            return False
        frame.gmap = 0
        if not flush:
            frame.gstale = gfn + 1
        index = frame.slot - 1
        if index >= 0:
            self.out_of_scope("takes the page from the guest", index)
        return True

    def guest_maps(self, pfn: int) -> int | None:
        """The gfn that maps *pfn*, if any."""
        gmap = self.state.frame(pfn).gmap
        return gmap - 1 if gmap else None

    def scrub(self, pfn: int) -> None:
        """Zero and clean the page, at EL2."""
        frame = self.state.frame(pfn)
        frame.content = st.ZERO

    def destroy(self, pfn: int, gfn: int, how: str) -> None:
        """Take the page from a living guest that never agreed: its contents are lost, its next access says so."""
        self.scrub(pfn)
        self.notes.append(notes.Destroyed(pfn, how))
        self.state.page(gfn).gpoison = 1

    def poisoned(self, gfn: int) -> bool:
        """What `destroy` left."""
        return bool(self.state.page(gfn).gpoison)

    def locked_in(self, pfn: int) -> bool:
        """Whether the guest holds on to the page."""
        return bool(self.state.frame(pfn).locked_in)

    def set_locked_in(self, pfn: int, locked: bool) -> None:
        """The guest holds on, or lets go."""
        self.state.frame(pfn).locked_in = int(locked)

    def declassify(self, pfn: int) -> None:
        """The guest agrees that the host may read what it wrote."""
        frame = self.state.frame(pfn)
        if frame.content == st.SECRET:
            frame.content = st.DATA
            self._expect(frame, st.DATA)

    def forget(self, pfn: int) -> None:
        """The guest gives up the contents: nobody relies on them from here on."""
        frame = self.state.frame(pfn)
        if frame.slot:
            self.state.page(frame.slot - 1).expect = st.ANY

    def vm_alive(self) -> bool:
        """Whether the VM still runs."""
        return self.state.vm == st.RUNNING

    def refuse(self, call: str, errno: int) -> int:
        """Return -errno, and let the laws know that this is a rule and not a failure."""
        self.notes.append(notes.Refused(call, errno))
        return -errno

    # -- primitives ----------------------------------------------------------------------------------------------

    def hypercall(self, name: str, *args: object) -> int:
        """Run the hypervisor's own code."""
        code = self.hypervisor.hypercalls.get(name)
        if code is None:
            raise LookupError(f"hypervisor {self.hypervisor.name!r} has no hypercall {name!r}")
        ret = code(self, *args)
        if not isinstance(ret, int):
            raise TypeError(f"hypercall {name!r} of {self.hypervisor.name!r} returned {ret!r}, not 0 or -errno")
        return ret

    def note_private(self, frame: st.Frame, how: str) -> None:
        """A frame is the guest's alone from now on."""
        cached = bool(self.state.gpc) and self.state.gpc - 1 == frame.number
        self.notes.append(notes.MadePrivate(how, frame.number, frame.pin + frame.get, cached))

    def guest_access(self, gfn: int, write: bool) -> str:
        """Through a TLB entry that should be gone if there is one, as a hit comes before a walk; else guest stage 2."""
        state = self.state
        if state.vm != st.RUNNING:
            return "stopped"
        reached = (f for f in state.frames() if gfn + 1 in (f.gmap, f.gstale))
        frame = min(reached, key=lambda f: f.gstale != gfn + 1, default=None)
        if frame is None:
            return "poisoned" if state.page(gfn).gpoison else "fault"
        via = "guest mapping" if frame.gmap == gfn + 1 else "stale guest TLB entry"
        if not self._guest_may(frame, gfn):
            self.notes.append(notes.StrayGuest(frame.number, via))
            return "ok"
        self.note_access(frame, "guest", "guest access", via, write)
        if frame.gmap == gfn + 1:                       # a TLB hit is nothing the hypervisor sees
            self.hypervisor.guest_touches(self, frame.number)
        if write:
            private = frame.owner == st.GUEST or (frame.owner == st.HOST and state.private(frame))
            frame.content = st.SECRET if private else st.DATA
            self._expect(frame, frame.content)
        return "ok"

    # The guest's own: the page the file holds at the index that this gfn is bound to.
    def _guest_may(self, frame: st.Frame, gfn: int) -> bool:
        if not frame.slot or self.state.page(frame.slot - 1).binding != gfn + 1:
            return False
        return frame.owner != st.HOST or not self.hypervisor.tracks_owner

    def guest_consents(self, gfn: int) -> str:
        """The hypervisor's own way of letting go."""
        if self.state.vm != st.RUNNING:
            return "stopped"
        frame = next((f for f in self.state.frames() if f.gmap == gfn + 1), None)
        if frame is None:
            return "fault"
        self.hypervisor.guest_consents(self, frame.number)
        return "ok"

    def mmu_invalidate_begin(self, start: int, nr: int) -> None:
        """Kernel mappings of the range end; a reader of the cache's lock is waited for."""
        state = self.state
        if state.gpc:
            frame = state.frame(state.gpc - 1)
            if start < frame.slot <= start + nr or not frame.slot:
                if state.gpc_readers:
                    self.wait()
                state.gpc = 0
        state.gpc_fresh = 0
        state.progress += 1

    def mmu_invalidate_end(self) -> None:
        """The sequence moves on: whoever sampled it before must look again."""
        if not self.state.progress:
            self.die("mmu_invalidate_end without begin")
        self.state.progress -= 1
        self.state.gpc_fresh = 0

    # -- gfn_to_pfn_cache ----------------------------------------------------------------------------------------

    def gpc_begin(self, index: int) -> None:
        """Sample the sequence."""
        self.state.gpc_fresh = 1

    def gpc_commit(self, folio: Folio) -> bool:
        """mmu_notifier_retry_cache()."""
        if self.state.progress or not self.state.gpc_fresh:
            return False
        self.state.gpc = folio.pfn + 1
        return True

    def gpc_read_lock(self) -> bool:
        """Valid and locked, or neither."""
        if not self.state.gpc:
            return False
        self.state.gpc_readers = 1
        return True

    def gpc_access(self, write: bool) -> str:
        """A plain access of the kernel through its cached mapping, which is the direct map."""
        frame = self.state.frame(self.state.gpc - 1)
        self.kernel_access(frame, "kernel", "gfn_to_pfn_cache user", write=write, fixup=False)
        if write:
            self._written(frame)
        return "ok"

    def gpc_read_unlock(self) -> None:
        """Let invalidations go on."""
        self.state.gpc_readers = 0

    def gpc_drop(self) -> None:
        """The cache is given up."""
        self.state.gpc = self.state.gpc_fresh = 0

"""The guest's side of the emulated host: hypercalls, guest accesses on a real vCPU, pfn caches."""

from __future__ import annotations

from guest_memfd.machine.board.tracer import GUEST_TOKEN, KERNEL_TOKEN
from guest_memfd.machine.hw.ram import PAGE
from guest_memfd.machine.linux.page import Page
from guest_memfd.machine.primitives.user import UserMappings
from guest_memfd.words import facts
from guest_memfd.words.pagestate import DATA, FAILURE, FOR_GOOD, GONE, HELD, RUNNING, SECRET, ZERO
from guest_memfd.words.primitives import EAGAIN, ENOMEM, Folio


class GuestSide(UserMappings):
    """The guest's side, hypercall to gpc_drop: EL2's code, guest accesses, and pfn caches of the kernel."""

    def hypercall(self, name: str, *args: object) -> int:
        """The driver's code around one hypercall; what it did to the page is read off EL2's own records."""
        if self.vm.state == GONE:
            self.gone("the VM, in hypercall")
        if self.inode.released:
            self.gone("what the hypervisor keeps of the file, in hypercall")
        machine = self.machine
        folio = next(arg for arg in args if isinstance(arg, Folio))
        page = self.page(folio)
        # Before and after: what the hypercall did is read off EL2's records, not believed from its result.
        owner, mapped = machine.driver.owner(page.pa), machine.driver.guest_maps(self.vm, page.pa)
        machine.tracer.counts(self.who, "calls")
        asked = self.asked(page)
        ret = machine.driver.hypercall(self.vm, name, args)
        if machine.driver.keeps(name, args):
            self.against(FOR_GOOD, page)
        # A refusal that is a rule of the hypervisor's is no failure, and the laws must tell the two apart.
        elif (name, ret) in machine.driver.rules:
            self.notes.append(facts.Refused(name, -ret))
            # A guest that has never asked for the page, nor written to it, cannot be said to hold on to it.
            if asked:
                self.against(HELD, page)
        elif ret in (-ENOMEM, -EAGAIN):
            self.against(FAILURE, page if ret == -EAGAIN else None)
        now = machine.driver.guest_maps(self.vm, page.pa)
        if mapped is None and now is not None:
            machine.tracer.mapped(self.who, page)
        if page.handled and mapped is None and now is not None:
            self.notes.append(facts.Given("the guest", machine.number(page.pa)))
        if owner != "guest" and machine.driver.owner(page.pa) == "guest":
            self.note_private(page, "donated")
        if mapped is not None and machine.driver.guest_maps(self.vm, page.pa) is None and page.inode is self.inode:
            machine.tracer.out_of_scope(self, "takes the page from the guest", page.index, page.nr)
        machine.tracer.after_hypercall(page, machine.driver.sanitised)
        return ret

    def asked(self, page: Page) -> bool:
        """Whether the guest can hold on to *page*: it has written to it, or was given it when it had faulted there."""
        tracer = self.machine.tracer
        return tracer.content(page) != ZERO or page.pa in tracer.asked

    def note_private(self, page: Page, how: str) -> None:
        """A folio is the guest's alone from now on."""
        cached = self.vm.gpc is page
        self.notes.append(facts.MadePrivate(how, self.machine.number(page.pa), page.pin + page.get, cached))

    def guest_access(self, gfn: int, write: bool) -> str:
        """One load or store of the vCPU, through guest stage 2 or a TLB entry that should be gone."""
        machine, vm = self.machine, self.vm
        if vm.state != RUNNING:
            return "stopped"
        # Before the access: afterwards a store has replaced what was there.
        before = machine.tracer.contents()
        ran = machine.driver.guest_access(vm, gfn * PAGE, write, GUEST_TOKEN)
        if ran.exit is not None:
            return ran.exit
        page = machine.page_at(ran.pa)
        # The CPU says where it arrived. If the tables say otherwise, a TLB entry has outlived its mapping.
        via = "guest mapping" if machine.driver.lookup(vm, gfn * PAGE) == ran.pa else "stale guest TLB entry"
        if not self._guest_may(page, gfn):
            self.notes.append(facts.StrayGuest(machine.number(page.pa), via))
            return "ok"
        self.note_access(page, "guest", "guest access", via, write, before(page))
        if write:
            owner = machine.driver.owner(page.pa)
            secret = owner == "guest" or (owner == "host" and self.private(page))
            machine.tracer.wrote(page, SECRET if secret else DATA)
        return "ok"

    # The guest's own: the page the file holds at the index that this gfn is bound to.
    def _guest_may(self, page: Page, gfn: int) -> bool:
        if page.inode is not self.inode or self.inode.entry("bindings", page.index) != gfn + 1:
            return False
        return self.machine.driver.owner(page.pa) != "host" or not self.machine.hypervisor.tracks_owner

    def guest_consents(self, gfn: int) -> str:
        """The hypervisor's own way of letting go, by the guest's own hypercall."""
        machine, vm = self.machine, self.vm
        if vm.state != RUNNING:
            return "stopped"
        pa = machine.driver.lookup(vm, gfn * PAGE)
        if pa is None:
            return "fault"
        if machine.driver.guest_consents(vm, gfn * PAGE):
            machine.tracer.consented(machine.page_at(pa))
        return "ok"

    def mmu_invalidate_begin(self, start: int, nr: int) -> None:
        """Kernel mappings of the range end; a reader of the cache's lock is waited for (virt/kvm/pfncache.c)."""
        if not self._is_bound("mmu_invalidate_begin"):
            return
        vm, page = self.vm, self.vm.gpc
        if page is not None and (page.inode is None or (page.inode is self.inode and start <= page.index < start + nr)):
            if vm.gpc_readers:
                self.wait()
            vm.gpc = None
        vm.gpc_fresh = False
        vm.begun[self.who] += 1
        self.machine.tracer.announces(self, start, nr)

    def mmu_invalidate_end(self) -> None:
        """The sequence moves on: a caller that sampled it before must look again."""
        bound = self._is_bound("mmu_invalidate_end")
        if not self.vm.begun[self.who]:
            if bound:
                self.die("mmu_invalidate_end without begin")
            return
        self.vm.begun[self.who] -= 1
        self.machine.tracer.announced.pop(self.who, None)
        self.vm.gpc_fresh = False

    # It is found through the bindings (kvm_gmem_invalidate_begin()): without one there is no VM to tell.
    def _is_bound(self, what: str) -> bool:
        bound = self.inode.bound()
        if bound and self.vm.state == GONE:
            self.gone(f"the VM, in {what}")
        return bound

    # -- gfn_to_pfn_cache ----------------------------------------------------------------------------------------

    def gpc_begin(self, index: int) -> bool:
        """Sample the sequence, if there is a memslot to come back to."""
        if not self.inode.entry("bindings", index):
            return False
        self.vm.gpc_fresh = True
        return True

    def gpc_commit(self, folio: Folio) -> bool:
        """Fill the cache, unless an invalidation runs or has run since `gpc_begin`: mmu_notifier_retry_cache()."""
        if any(self.vm.begun.values()) or not self.vm.gpc_fresh:
            return False
        self.vm.gpc = self.page(folio)
        return True

    def gpc_read_lock(self) -> bool:
        """Valid and locked, or neither."""
        if self.vm.gpc is None:
            return False
        self.vm.gpc_readers = 1
        return True

    def gpc_access(self, write: bool) -> str:
        """A plain access of the kernel through its cached mapping, which is the direct map."""
        page = self.vm.gpc
        assert page is not None
        self.kernel_access(page, "kernel", "gfn_to_pfn_cache user", "plain_write" if write else "plain_read",
                           self.machine.linear_map.va(page.pa))
        if write:
            self.written(page, KERNEL_TOKEN)
        return "ok"

    def gpc_read_unlock(self) -> None:
        """Let invalidations go on."""
        self.vm.gpc_readers = 0

    def gpc_drop(self) -> None:
        """The cache is given up."""
        self.vm.gpc, self.vm.gpc_fresh = None, False

"""The guest's side of the emulated host: hypercalls, guest accesses on a real vCPU, pfn caches."""

from __future__ import annotations

from errno import EAGAIN, ENOMEM

from guest_memfd.machine.board.tracer import GUEST_TOKEN, KERNEL_TOKEN
from guest_memfd.machine.linux.folio import LinuxFolio
from guest_memfd.machine.primitives import contents
from guest_memfd.machine.primitives.base import Base
from guest_memfd.words import facts
from guest_memfd.words.pagestate import CONTENTION, DATA, FAILURE, FOR_GOOD, GONE, HELD, RUNNING, SECRET
from guest_memfd.words.primitives import Folio
from guest_memfd.words.units import Gfn, Index, Ipa, Pa, gfn_to_gpa


def hyp_call(host: Base, name: str, *args: object) -> int:
    """The driver's code around one hypercall; what it did to the page is read off EL2's own records."""
    if host.vm.state == GONE:
        host.gone("the VM, in hypercall")
    if host.inode.released:
        host.gone("what the hypervisor keeps of the file, in hypercall")
    machine = host.machine
    folio = next(arg for arg in args if isinstance(arg, Folio))
    page = host.page(folio)
    # Before and after: what the hypercall did is read off EL2's records, not believed from its result.
    driver = machine.driver
    before = {pa: (driver.owner(pa), driver.ipa_of(host.vm, pa), driver.may_sanitise(host.vm, pa))
              for pa in {machine.spot(page, at): None for at in machine.named(*contents.area(folio))}}
    machine.tracer.counts(host.who, "calls")
    asked = host.asked(page)
    ret = driver.hypercall(host.vm, name, args)
    if driver.keeps(name, args):
        host.against(FOR_GOOD, page)
    # A refusal that is a rule of the hypervisor's is no failure, and the laws must tell the two apart.
    elif (name, ret) in driver.rules:
        host.notes.append(facts.Refused(name, -ret))
        # A guest that has never asked for the page, nor written to it, cannot be said to hold on to it.
        if asked:
            host.against(HELD, page)
    elif ret in (-ENOMEM, -EAGAIN):
        host.against(FAILURE, page if ret == -EAGAIN else None)
    for pa, (owner, mapped, held) in before.items():
        _changed(host, page, pa, owner, mapped)
        machine.tracer.after_hypercall(page, pa, driver.sanitised and held)
    return ret


# What a hypercall has made of the page of *page* at *pa*.
def _changed(host: Base, page: LinuxFolio, pa: Pa, owner: str, mapped: Ipa | None) -> None:
    machine = host.machine
    now = machine.driver.ipa_of(host.vm, pa)
    if mapped is None and now is not None:
        machine.tracer.mapped(host.who, pa)
        if pa in page.handled:
            host.notes.append(facts.Given("the guest", machine.number(pa)))
    if owner != "guest" and machine.driver.owner(pa) == "guest":
        note_private(host, page, pa, "donated")
    if mapped is not None and now is None and page.inode is host.inode:
        # Where pages are watched it is about the one at *pa*; else that one stands for the folio.
        machine.tracer.out_of_scope(host, "takes the page from the guest", page.index_of(pa),
                                    1 if machine.watched else page.nr)


def note_private(host: Base, page: LinuxFolio, pa: Pa, how: str) -> None:
    """The page of *page* at *pa* is the guest's alone from now on."""
    cached = host.vm.gpc is page and pa == page.pa
    host.notes.append(facts.MadePrivate(how, host.machine.number(pa), page.pin + page.get, cached))


def guest_access(host: Base, gfn: Gfn, write: bool) -> str:
    """One load or store of the vCPU, through guest stage 2 or a TLB entry that should be gone."""
    machine, vm = host.machine, host.vm
    if vm.state != RUNNING:
        return "stopped"
    # Before the access: afterwards a store has replaced what was there.
    before = machine.tracer.contents()
    ran = machine.driver.guest_access(vm, gfn_to_gpa(gfn), write, GUEST_TOKEN)
    if ran.exit is not None:
        return ran.exit
    page = machine.page_at(ran.pa)
    pa = machine.spot(page, ran.pa)
    # The CPU says where it arrived. If the tables say otherwise, a TLB entry has outlived its mapping.
    via = "guest mapping" if machine.driver.lookup(vm, gfn_to_gpa(gfn)) == ran.pa else "stale guest TLB entry"
    if not _guest_may(host, page, pa, gfn):
        host.notes.append(facts.StrayGuest(machine.number(pa), via))
        return "ok"
    contents.note_access(host, page, pa, "guest", "guest access", via, write, before(pa))
    if write:
        owner = machine.driver.owner(pa)
        secret = owner == "guest" or (owner == "host" and host.private(page, pa))
        machine.tracer.wrote(page, pa, SECRET if secret else DATA)
    return "ok"


# The guest's own: the page the file holds at the index that this gfn is bound to.
def _guest_may(host: Base, page: LinuxFolio, pa: Pa, gfn: Gfn) -> bool:
    if page.inode is not host.inode or host.inode.entry("bindings", page.index_of(pa)) != gfn + 1:
        return False
    return host.machine.driver.owner(pa) != "host" or not host.machine.hypervisor.tracks_owner


def guest_consents(host: Base, gfn: Gfn) -> str:
    """The hypervisor's own way of letting go, by the guest's own hypercall."""
    machine, vm = host.machine, host.vm
    if vm.state != RUNNING:
        return "stopped"
    pa = machine.driver.lookup(vm, gfn_to_gpa(gfn))
    if pa is None:
        return "fault"
    if machine.driver.guest_consents(vm, gfn_to_gpa(gfn)):
        page = machine.page_at(pa)
        machine.tracer.consented(page, machine.spot(page, pa))
    return "ok"


def gmem_invalidate_begin(host: Base, start: Index, nr: int) -> None:
    """Kernel mappings of the range end; a reader of the cache's lock is waited for (virt/kvm/pfncache.c)."""
    if not _is_bound(host, "gmem_invalidate_begin"):
        return
    vm, page = host.vm, host.vm.gpc
    if page is not None and (page.inode is None or (page.inode is host.inode and start <= page.index < start + nr)):
        if vm.gpc_readers:
            host.wait()
        vm.gpc = None
    vm.gpc_fresh = False
    vm.begun[host.who] += 1
    bound = host.inode.trees["bindings"].load(start, nr).ends()
    if bound is not None:
        # One range for all that are under way (kvm_mmu_invalidate_range_add()).
        begun = vm.invalidated or range(bound[0] - 1, bound[1])
        vm.invalidated = range(min(begun.start, bound[0] - 1), max(begun.stop, bound[1]))
    host.machine.tracer.announces(host, start, nr)


def gmem_invalidate_end(host: Base) -> None:
    """The sequence moves on: a caller that sampled it before must look again."""
    bound = _is_bound(host, "gmem_invalidate_end")
    if not host.vm.begun[host.who]:
        if bound:
            host.die("gmem_invalidate_end without begin")
        return
    host.vm.begun[host.who] -= 1
    # They may be nested, as invalidations of a VM are: what was announced holds until the last has ended.
    if not host.vm.begun[host.who]:
        host.machine.tracer.announced.pop(host.who, None)
    host.vm.gpc_fresh = False
    if not host.vm.begun.total():
        host.vm.invalidated = range(0)
    host.vm.seq += host.vm.sampled
    host.vm.sampled = False


def mmu_invalidate_seq(host: Base) -> int:
    """Counted from the first reader of memslots on."""
    host.vm.sampled = True
    return host.vm.seq


def mmu_invalidate_retry(host: Base, seq: int, gfn: Gfn) -> bool:
    """By the range while one is under way, by the sequence afterwards."""
    retry = gfn in host.vm.invalidated or host.vm.seq != seq
    if retry:
        host.against(CONTENTION)
    return retry


# It is found through the bindings (kvm_gmem_invalidate_begin()): without one there is no VM to tell.
def _is_bound(host: Base, what: str) -> bool:
    bound = host.inode.bound()
    if bound and host.vm.state == GONE:
        host.gone(f"the VM, in {what}")
    return bound


# -- gfn_to_pfn_cache ----------------------------------------------------------------------------------------


def gpc_begin(host: Base, index: Index) -> bool:
    """Sample the sequence, if there is a memslot to come back to."""
    if not host.inode.entry("bindings", index):
        return False
    host.vm.gpc_fresh = True
    return True


def gpc_commit(host: Base, folio: Folio) -> bool:
    """Fill the cache, unless an invalidation runs or has run since `gpc_begin`: mmu_notifier_retry_cache()."""
    if any(host.vm.begun.values()) or not host.vm.gpc_fresh:
        return False
    host.vm.gpc = host.page(folio)
    return True


def gpc_read_lock(host: Base) -> bool:
    """Valid and locked, or neither."""
    if host.vm.gpc is None:
        return False
    host.vm.gpc_readers = 1
    return True


def gpc_access(host: Base, write: bool) -> str:
    """A plain access of the kernel through its cached mapping, which is the direct map."""
    page = host.vm.gpc
    assert page is not None
    contents.kernel_access(host, page, "kernel", "gfn_to_pfn_cache user",
                           "plain_write" if write else "plain_read", host.machine.linear_map.va(page.pa))
    if write:
        contents.written(host, page, page.pa, KERNEL_TOKEN)
    return "ok"


def gpc_access_vmap(host: Base, write: bool) -> str:
    """A plain access of the kernel through a mapping that the cache has made for itself."""
    page = host.vm.gpc
    assert page is not None
    contents.note_access(host, page, page.pa, "kernel", "gfn_to_pfn_cache user", "vmap", write,
                         host.machine.tracer.content(page.pa))
    if write:
        contents.written(host, page, page.pa, KERNEL_TOKEN)
    return "ok"


def gpc_read_unlock(host: Base) -> None:
    """Let invalidations go on."""
    host.vm.gpc_readers = 0


def gpc_drop(host: Base) -> None:
    """The cache is given up."""
    host.vm.gpc, host.vm.gpc_fresh = None, False

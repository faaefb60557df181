"""Pages change hands here: the transitions of pKVM at EL2, each a set of checks and then a change that is complete.

Theory of operation. EL2 trusts neither host nor guest. For each page it knows who owns it and who has borrowed it, and a
transition is allowed from one combination only. What EL2 knows is kept in three places that must agree:

    hyp_vmemmap          a word for each page: state for the host, state for the hypervisor, number of guests that borrow it
    the host's stage 2   a page that the host may not touch is an invalid entry with a note: owner, and for a guest its
                         handle and gfn (annotation.py)
    a guest's stage 2    maps the page, with its state (OWNED, SHARED_OWNED, SHARED_BORROWED) in software bits of the leaf;
                         or POISONED, if the host took the page by force

The states of both sides form pairs. Donation: host OWNED -> NOPAGE, guest NOPAGE -> OWNED. Sharing by the host: host
SHARED_OWNED, guest SHARED_BORROWED. MEM_SHARE by a guest: guest SHARED_OWNED, host SHARED_BORROWED.

Every transition is: all checks (checks.py, which changes nothing); then the steps that can run out of memory; then the
rest, which cannot fail. It returns 0 or -errno and, unless it returns 0, has changed nothing but the memcache, which it
may have refilled. The order of the changes is the other invariant: where a page is taken from one side, it has left the
tables and TLBs of that side before the other side gets it.

- `donate_guest`: table pages for the guest's map are there (memcache); the host's entry is annotated, which removes it
  from the TLBs of the host and can need memory; the guest's entry is made last. So no CPU reaches it for both.
- `reclaim_dying_guest_page`: out of the guest's table and the TLBs, zeroed, and only then mapped for the host.
- `force_reclaim_guest_page`: the guest's entry is POISONED first. Its next access must end in an error and not in a
  page of zeros that it would take for its own. Then zeroed, then the host's.

Frame numbers count 4 KiB pages. What differs from arch/arm64/kvm/hyp/nvhe/mem_protect.c (7.3), and is marked so:

- Sizes. Upstream donates and reclaims pages; here a range may also be 2 MiB or 1 GiB (nr = 512, 262144 pages), all of
  whose pages are in one state, and is one leaf on both sides. share_guest() has upstream's 2 MiB, and 1 GiB as well.
- ADDITION: share_guest() and unshare_guest() for protected guests, unshare(), check_consent(): conversion in place.
- -ENOMEM of the host's side has no counterpart upstream, where the pool has a page for every table there can be.
- There is no lock: a transition is one step. Upstream holds the host's component lock and the guest's.

Tests: tests/test_pkvm_transitions.py (test_every_call_in_every_situation: each call in each combination of states;
test_out_of_memory_at_every_allocation_loses_nothing; test_force_reclaim_poisons_before_it_zeroes_before_it_gives_back;
test_el2_does_what_the_abstract_el2_does). Laws: one-owner, no-stale-mapping, no-stale-data.
"""

from __future__ import annotations

from errno import E2BIG, EAGAIN, EBUSY, EFAULT, EINVAL, ENOENT, ENOMEM, EPERM
from typing import TYPE_CHECKING

from guest_memfd.errors import EHWPOISON
from guest_memfd.machine.el2.kvm.pgtable import leaf_attributes, page_of, tables_to_split
from guest_memfd.machine.el2.pkvm import checks
from guest_memfd.machine.el2.pkvm.annotation import POISONED, PageOwner
from guest_memfd.machine.el2.pkvm.states import HypPage, PkvmState
from guest_memfd.machine.hw.arm64.descriptor import Entry
from guest_memfd.machine.hw.buddy import OutOfMemory
from guest_memfd.words.units import PAGE, Gfn, Pa, Pfn, gfn_to_gpa, identity_ipa, pa_to_pfn, pfn_to_pa, span

if TYPE_CHECKING:
    from guest_memfd.machine.el2.pkvm.el2 import El2
    from guest_memfd.machine.el2.pkvm.vm import PkvmHypVm


def _set(el2: El2, pfn: Pfn, order: int, host: PkvmState, hyp: PkvmState = PkvmState.NOPAGE, guests: int = 0) -> None:
    el2.vmemmap.set(pfn, order, HypPage(host=host, hyp=hyp, guests=guests))


def _guest_map(vm: PkvmHypVm, gfn: Gfn, order: int, pfn: Pfn, state: PkvmState, prot: str = "rwx") -> None:
    vm.pgt.map(gfn_to_gpa(gfn), order, pfn_to_pa(pfn), leaf_attributes(prot, state=state))
    vm.mapped(gfn, pfn)


def _guest_unmap(vm: PkvmHypVm, gfn: Gfn) -> None:
    entry = vm.pgt.unmap(gfn_to_gpa(gfn))
    vm.unmapped(gfn, pa_to_pfn(entry.oa))


# host_stage2_set_owner_metadata_locked() with the donation's data.
def _donated(el2: El2, vm: PkvmHypVm, pfn: Pfn, order: int, gfn: Gfn) -> int:
    try:
        # First the table, which can fail; the record follows when it has succeeded. In between no one looks: a
        # transition is one step.
        el2.host.give_away(pfn, order, PageOwner.GUEST, vm.handle, gfn)
    except OutOfMemory:
        return -ENOMEM
    _set(el2, pfn, order, PkvmState.NOPAGE)
    return 0


# host_stage2_set_owner_locked() to the host: mapped RWX at once, in the entry that was annotated.
def _returned(el2: El2, pfn: Pfn, order: int) -> None:
    el2.host.take_back(pfn, order)
    _set(el2, pfn, order, PkvmState.OWNED)


# -- host and hypervisor -------------------------------------------------------------------------------------------


def share_hyp(el2: El2, pfn: Pfn) -> int:
    """host OWNED -> SHARED_OWNED, hypervisor SHARED_BORROWED."""
    ret = checks.host_and_hyp(el2, pfn, 0, PkvmState.OWNED, PkvmState.NOPAGE)
    if not ret:
        _set(el2, pfn, 0, PkvmState.SHARED_OWNED, PkvmState.SHARED_BORROWED)
    return ret


def unshare_hyp(el2: El2, pfn: Pfn) -> int:
    """The way back; -EBUSY while pinned."""
    # Both sides are checked although they must agree: a record that does not is a mistake of EL2's, and must not
    # become a page with two owners.
    ret = checks.host_and_hyp(el2, pfn, 0, PkvmState.SHARED_OWNED, PkvmState.SHARED_BORROWED)
    # EL2 itself works with the page (hyp_pin_shared_mem()); the host must not take it away meanwhile.
    if not ret and el2.vmemmap.page(pfn).refcount:
        ret = -EBUSY
    if not ret:
        _set(el2, pfn, 0, PkvmState.OWNED)
    return ret


def pin_shared_mem(el2: El2, pfn: Pfn) -> int:
    """hyp_pin_shared_mem() of one page."""
    ret = checks.host_and_hyp(el2, pfn, 0, PkvmState.SHARED_OWNED, PkvmState.SHARED_BORROWED)
    if not ret:
        page = el2.vmemmap.page(pfn)
        el2.vmemmap.set(pfn, 0, page._replace(refcount=page.refcount + 1))
    return ret


def donate_hyp(el2: El2, pfn: Pfn, nr: int) -> int:
    """*nr* pages: host OWNED -> hypervisor OWNED."""
    for at in span(pfn, nr):
        ret = checks.range_allowed_memory(el2, pfn, nr) or checks.host_and_hyp(el2, at, 0, PkvmState.OWNED, PkvmState.NOPAGE)
        if ret:
            return ret
    for at in span(pfn, nr):
        try:
            el2.host.give_away(at, 0, PageOwner.HYP)
        except OutOfMemory:
            # All pages or none. The entries that are put back have their size already, so this cannot fail.
            for undo in span(pfn, at - pfn):
                _returned(el2, undo, 0)
            return -ENOMEM
        _set(el2, at, 0, PkvmState.NOPAGE, PkvmState.OWNED)
    return 0


def hyp_donate_host(el2: El2, pfn: Pfn, nr: int) -> int:
    """*nr* pages: hypervisor OWNED -> host OWNED, mapped RWX; no one zeroes them here.

    -EINVAL for what EL2 has had from the start, in larger leaves: it is never asked for.
    """
    for at in span(pfn, nr):
        page = el2.vmemmap.page(at)
        if page.hyp is not PkvmState.OWNED or page.host is not PkvmState.NOPAGE:
            return -EPERM
        if el2.host.pgt.leaf(identity_ipa(pfn_to_pa(at))).order:
            return -EINVAL
    for at in span(pfn, nr):
        _returned(el2, at, 0)
    return 0


def share_ffa(el2: El2, pfn: Pfn, nr: int) -> int:
    """*nr* pages: host OWNED -> SHARED_OWNED, with someone in the secure world."""
    return _ffa(el2, pfn, nr, PkvmState.OWNED, PkvmState.SHARED_OWNED)


def unshare_ffa(el2: El2, pfn: Pfn, nr: int) -> int:
    """*nr* pages: host SHARED_OWNED -> OWNED, the secure world has let go; -EPERM where a page is in another state."""
    return _ffa(el2, pfn, nr, PkvmState.SHARED_OWNED, PkvmState.OWNED)


def _ffa(el2: El2, pfn: Pfn, nr: int, old: PkvmState, new: PkvmState) -> int:
    for at in span(pfn, nr):
        page = el2.vmemmap.page(at)
        ret = checks.range_allowed_memory(el2, pfn, nr) or checks.host_page_state(el2, at, 0, old)
        if ret or page.hyp is not PkvmState.NOPAGE or page.guests:
            return ret or -EPERM
    for at in span(pfn, nr):
        _set(el2, at, 0, new)
    return 0


# -- host and guest ------------------------------------------------------------------------------------------------


def donate_guest(el2: El2, vm: PkvmHypVm, pfn: Pfn, gfn: Gfn, nr: int = 1) -> int:
    """host OWNED, guest NOPAGE -> the guest's, mapped RWX there, annotated in the host's table."""
    order = checks.transition_order(nr, pfn, gfn)
    if order < 0:
        return order
    ret = checks.host_and_hyp(el2, pfn, order, PkvmState.OWNED, PkvmState.NOPAGE)
    if ret:
        return ret
    # Before the guest's table is read: beyond its width there is nothing that could be read.
    if not vm.in_range(gfn, nr):
        return -EINVAL
    # To map over a page would lose it: it would stay the guest's, with no gfn by which the host could reclaim it.
    if not checks.guest_is_empty(vm, gfn, order):
        return -EPERM
    # The guest's map must not fail after the host has lost the page. This takes pages from what the host offers, and
    # is the only effect that stays after a refusal.
    if not vm.memcache_ready():
        return -ENOMEM
    ret = _donated(el2, vm, pfn, order, gfn)
    if not ret:
        # Last: until here neither host nor guest reaches the page, and never both.
        _guest_map(vm, gfn, order, pfn, PkvmState.OWNED)
    return ret


def share_guest(el2: El2, vm: PkvmHypVm, pfn: Pfn, gfn: Gfn, nr: int = 1, prot: str = "rwx") -> int:
    """The guest borrows: host OWNED -> SHARED_OWNED, or one more guest of a page that guests borrow already.

    ADDITION: protected guests may borrow, too, one at a time, as the abstract host has it.
    """
    order = checks.transition_order(nr, pfn, gfn)
    if order < 0 or not set(prot) <= set("rwx"):
        return -EINVAL
    ret = checks.range_allowed_memory(el2, pfn, nr)
    if ret:
        return ret
    if not vm.in_range(gfn, nr):
        return -EINVAL
    pages = list(el2.vmemmap.pages(pfn, order))
    if not all(checks.may_share(page, vm.protected) for page in pages):
        return -EPERM
    if not checks.guest_is_empty(vm, gfn, order):
        return -EPERM
    # A count that ran over would say "no guest" while guests map the page.
    if not all(page.may_be_shared_again for page in pages):
        return -EBUSY
    if not vm.memcache_ready():
        return -ENOMEM
    # The count before the map, the unmap before the count: a page that a guest maps is always recorded as shared.
    _count_guests(el2, pfn, order, 1)
    _guest_map(vm, gfn, order, pfn, PkvmState.SHARED_BORROWED, prot)
    return 0


# One guest more or less borrows each of the pages; some of them may be another guest's, too.
def _count_guests(el2: El2, pfn: Pfn, order: int, change: int) -> None:
    # Pages of one block may be lent to different numbers of guests; then each has a record of its own.
    if order and len(list(el2.vmemmap.pages(pfn, order))) > 1:
        for at in span(pfn, 1 << order):
            _count_guests(el2, at, 0, change)
        return
    guests = el2.vmemmap.page(pfn).guests + change
    _set(el2, pfn, order, PkvmState.SHARED_OWNED if guests else PkvmState.OWNED, guests=guests)


def unshare_guest(el2: El2, vm: PkvmHypVm, gfn: Gfn, nr: int = 1) -> int:
    """What the guest borrowed leaves it; the host is its only user again when no other guest borrows it.

    ADDITION: -ENOENT, where upstream has -EPERM, for a page that a protected guest owns: it has not borrowed it.
    """
    order = checks.transition_order(nr, gfn)
    if order < 0:
        return order
    entry = vm.pgt.leaf(gfn_to_gpa(gfn))
    if not entry.valid:
        return -ENOENT
    if checks.guest_page_state(entry) is not PkvmState.SHARED_BORROWED:
        # The library asks without knowing whether the guest borrowed the page or owns it, and tells the two apart by
        # this.
        return -ENOENT if vm.protected else -EPERM
    # Part of a block cannot be unshared: the guest's leaf would have to be split, and what is left would have to be
    # counted anew.
    if entry.order != order:
        return -E2BIG
    _give_borrowed_back(el2, vm, gfn, entry)
    return 0


def _give_borrowed_back(el2: El2, vm: PkvmHypVm, gfn: Gfn, entry: Entry) -> None:
    pfn = pa_to_pfn(entry.oa)
    # Unmapped and flushed before the host is told that it is the only user again.
    _guest_unmap(vm, gfn)
    _count_guests(el2, pfn, entry.order, -1)


def reclaim_dying_guest_page(el2: El2, vm: PkvmHypVm, gfn: Gfn, nr: int = 1) -> int:
    """A dying guest's page: unmapped there, zeroed, and the host's again; 0 when there is nothing to reclaim.

    -EPERM for a living guest. Upstream returns -EINVAL then, and -ENOENT for a gfn that maps nothing: here it means, as
    on the abstract host, that the host has the page already. ADDITION: a borrowed page goes back as well. A range that the
    guest maps in smaller leaves is reclaimed leaf by leaf.
    """
    order = checks.transition_order(nr, gfn)
    if order < 0:
        return order
    if vm.pgt.leaf(gfn_to_gpa(gfn)).order < order:
        return _reclaim_leaves(el2, vm, gfn, nr)
    ret, entry = checks.valid_guest_leaf(vm, gfn, order)
    # Nothing there, or taken by force before: the host has the page already, so the call has nothing to do and may be
    # repeated.
    if ret in (-ENOENT, -EHWPOISON):
        return 0
    # The guest's own page. Only its end makes it the host's: a living guest would have to agree, and it does that by
    # MEM_SHARE.
    if not vm.dying:
        return -EPERM
    if ret:
        return ret
    pfn = pa_to_pfn(entry.oa)
    if checks.guest_page_state(entry) is PkvmState.SHARED_BORROWED:
        if not vm.protected:
            return -EPERM
        el2.ram.zero(entry.oa, PAGE << order)
        _give_borrowed_back(el2, vm, gfn, entry)
        return 0
    _guest_unmap(vm, gfn)
    # After the guest's mapping has gone, or a vCPU could write after the zeroing; before the host's is there, or the
    # host could read before it.
    el2.ram.zero(entry.oa, PAGE << order)
    _returned(el2, pfn, order)
    return 0


# The first that is refused ends it: those before it are the host's, as when the call is repeated.
def _reclaim_leaves(el2: El2, vm: PkvmHypVm, gfn: Gfn, nr: int) -> int:
    for at, entry in vm.leaves(gfn, nr):
        # With its last entry a table goes, and what was after it is part of a larger one, which is empty.
        ret = reclaim_dying_guest_page(el2, vm, at, 1 << entry.order) if entry.value else 0
        if ret:
            return ret
    return 0


def force_reclaim_guest_page(el2: El2, phys: Pa) -> int:
    """The host's page after all: the guest's entry is POISONED, then the page is zeroed, then the host maps it.

    *phys* in bytes. Of a block only that page, where there is memory to split it, else all of it. -EAGAIN: not withheld any
    more, try the access again; -EPERM: not a guest's own page; -EFAULT: no memory.
    """
    pfn = pa_to_pfn(phys)
    if el2.host.region(phys) is None:
        return -EFAULT
    # The host may touch it: its abort was answered meanwhile. -EAGAIN lets Linux try the access again.
    if el2.vmemmap.page(pfn).host is not PkvmState.NOPAGE:
        return -EAGAIN
    note = el2.host.note(phys)
    if note is None:
        return -EINVAL
    # EL2's own page is never given up, even if the host cannot go on without it. 6.12 knows no force reclaim.
    if note.owner is not PageOwner.GUEST or el2.release != "7.3":
        return -EPERM
    vm = el2.vms.get(note.handle)
    # The VM has been torn down meanwhile: the access is worth another try.
    if vm is None:
        return -EAGAIN
    entry = vm.pgt.leaf(gfn_to_gpa(note.gfn))
    # SHARED_OWNED: the guest lets the host use the page, so the host's abort had another reason.
    if checks.guest_page_state(entry) is not PkvmState.OWNED:
        return -EPERM
    gfn = note.gfn
    if entry.order and not split_guest(el2, vm, gfn):
        gfn += pfn - pa_to_pfn(entry.oa)
        entry = vm.pgt.leaf(gfn_to_gpa(gfn))
    # Poison, zero, give back. The guest must meet an error at its next access; a page of zeros would look like memory
    # that it has lost without a reason.
    vm.pgt.annotate(gfn_to_gpa(gfn), entry.order, POISONED.encode())
    vm.unmapped(gfn, pa_to_pfn(entry.oa))
    el2.ram.zero(entry.oa, PAGE << entry.order)
    _returned(el2, pa_to_pfn(entry.oa), entry.order)
    return 0


def split_guest(el2: El2, vm: PkvmHypVm, gfn: Gfn) -> int:
    """The guest's block at *gfn* becomes pages, with their contents and states; 0 also where there is none, or -ENOMEM.

    The host's annotation is copied down to its pages first. "KVM: arm64: pKVM huge mappings", v2 (11 Sep 2026).
    """
    entry = vm.pgt.leaf(gfn_to_gpa(gfn))
    if not entry.valid or not entry.order:
        return 0
    if not vm.memcache.refill(tables_to_split(entry.order)):
        return -ENOMEM
    head, pfn = Gfn(gfn & -1 << entry.order), pa_to_pfn(entry.oa)
    try:
        # It says of each page what it has said of all, so it may stay split if the next step fails.
        el2.host.split_note(pfn)
        vm.pgt.split(gfn_to_gpa(gfn), page_of)
    except OutOfMemory:
        return -ENOMEM
    vm.unmapped(head, pfn)
    for at in range(1 << entry.order):
        vm.mapped(head + at, pfn + at)
    return 0


# -- the guest's own calls -----------------------------------------------------------------------------------------


def guest_share_host(el2: El2, vm: PkvmHypVm, gfn: Gfn) -> int:
    """MEM_SHARE: guest OWNED -> SHARED_OWNED, host NOPAGE -> SHARED_BORROWED, mapped RWX; pages only."""
    ret, entry = checks.valid_guest_leaf(vm, gfn, 0)
    if ret:
        return ret
    pfn = pa_to_pfn(entry.oa)
    if checks.guest_page_state(entry) is not PkvmState.OWNED:
        return -EPERM
    ret = checks.host_page_state(el2, pfn, 0, PkvmState.NOPAGE)
    if ret:
        return ret
    # The guest's state first: while it says OWNED no entry of the host may map the page.
    _guest_map(vm, gfn, 0, pfn, PkvmState.SHARED_OWNED)
    el2.host.take_back(pfn, 0)
    _set(el2, pfn, 0, PkvmState.SHARED_BORROWED)
    return 0


def guest_unshare_host(el2: El2, vm: PkvmHypVm, gfn: Gfn) -> int:
    """MEM_UNSHARE: guest SHARED_OWNED -> OWNED, host SHARED_BORROWED -> NOPAGE, annotated; pages only."""
    ret, entry = checks.valid_guest_leaf(vm, gfn, 0)
    if ret:
        return ret
    pfn = pa_to_pfn(entry.oa)
    if checks.guest_page_state(entry) is not PkvmState.SHARED_OWNED:
        return -EPERM
    # The host loses it before the guest's entry says OWNED; from then on the guest may put secrets there.
    ret = checks.host_page_state(el2, pfn, 0, PkvmState.SHARED_BORROWED) or _donated(el2, vm, pfn, 0, gfn)
    if not ret:
        _guest_map(vm, gfn, 0, pfn, PkvmState.OWNED)
    return ret


# -- additions for conversion in place -----------------------------------------------------------------------------


def unshare(el2: El2, vm: PkvmHypVm, gfn: Gfn) -> int:
    """ADDITION: the host has let go of what the guest shared, so its MEM_UNSHARE completes; -EPERM: it shares nothing."""
    ret = guest_unshare_host(el2, vm, gfn)
    # One answer for every state in which there is nothing to complete; want of memory is not among them, as it
    # passes.
    return ret if ret in (0, -ENOMEM) else -EPERM


def check_consent(el2: El2, vm: PkvmHypVm, gfn: Gfn, nr: int, converting: bool) -> int:
    """ADDITION: -EBUSY unless the guest has agreed that its pages go: by MEM_SHARE for a conversion, else by dying."""
    order = checks.transition_order(nr, gfn)
    if order < 0:
        return order
    for _, entry in vm.leaves(gfn, nr):
        state = checks.guest_page_state(entry)
        free = state is PkvmState.SHARED_OWNED if converting else vm.dying
        if state in (PkvmState.OWNED, PkvmState.SHARED_OWNED) and not free:
            return -EBUSY
    return 0

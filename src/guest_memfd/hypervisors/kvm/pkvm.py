"""Protected KVM on arm64: EL2 owns the host's stage 2, pages are donated to a guest, shared by it, reclaimed from it.

Sources: arch/arm64/kvm/hyp/nvhe/mem_protect.c (7.3): transitions and return codes; host_inject_mem_abort() for
the abort, arch/arm64/mm/fault.c for force reclaim. Differs from upstream in two places, both needed for conversion in place:
a protected guest may also borrow host pages (share_guest), and a guest's MEM_UNSHARE completes only when the host has
let go (`unshare`, called by `make_private`).
"""

from __future__ import annotations

from errno import E2BIG, EAGAIN, EBUSY, EIO, ENOENT, ENOMEM, EPERM
from typing import Any

from guest_memfd.compat import override
from guest_memfd.core.hypervisor import DATA_ABORT, Hypervisor, Stage2, all_owned
from guest_memfd.core.ops import GuestMemfdOps, Reason
from guest_memfd.words.primitives import Folio, Steps
from guest_memfd.words.units import Gfn, Pfn

# -- EL2 -----------------------------------------------------------------------------------------------------------


def donate_guest(stage2: Stage2, gfn: Gfn, folio: Folio) -> int:
    """host OWNED, guest NOPAGE -> guest OWNED, mapped RWX; -EPERM otherwise."""
    # A poisoned gfn stays unusable. Were it filled again, the guest would find zeros where it has written and would
    # not notice that it has lost a page.
    if not all_owned(stage2, folio, "host") or _poisoned(stage2, gfn, folio):
        return -EPERM
    for pfn in folio.pfns:
        stage2.set_owner(pfn, "guest")
        stage2.set_locked_in(pfn, True)
    # The host loses the page, TLBs included, before the guest gets it.
    stage2.host_maps(folio.pfn, False, folio.order)
    stage2.guest_map(gfn, folio.pfn, folio.order)
    return 0


def share_guest(stage2: Stage2, gfn: Gfn, folio: Folio) -> int:
    """host OWNED, guest NOPAGE -> SHARED_OWNED, guest SHARED_BORROWED; -EPERM otherwise."""
    if not all_owned(stage2, folio, "host") or _poisoned(stage2, gfn, folio):
        return -EPERM
    # The host keeps its mapping: a shared page is the host's, and the guest only borrows it.
    for pfn in folio.pfns:
        stage2.set_owner(pfn, "shared")
    stage2.guest_map(gfn, folio.pfn, folio.order)
    return 0


def unshare_guest(stage2: Stage2, gfn: Gfn, folio: Folio) -> int:
    """The host's page leaves the guest; -ENOENT when the guest had not borrowed it."""
    if not all_owned(stage2, folio, "shared"):
        return -ENOENT
    if stage2.guest_leaf(gfn) > folio.order:
        return -E2BIG
    for at, pfn in enumerate(folio.pfns):
        stage2.guest_unmap(gfn + at, pfn)
        stage2.set_owner(pfn, "host")
    return 0


def unshare(stage2: Stage2, gfn: Gfn, folio: Folio) -> int:
    """Complete the guest's MEM_UNSHARE: what the host borrowed is the guest's alone again; -EPERM otherwise."""
    if not all_owned(stage2, folio, "borrowed"):
        return -EPERM
    # The guest has asked for this long ago; it becomes true only now, when the host has let go of the page.
    for pfn in folio.pfns:
        stage2.set_owner(pfn, "guest")
        stage2.set_locked_in(pfn, True)
    stage2.host_maps(folio.pfn, False, folio.order)
    return 0


def check_consent(stage2: Stage2, gfn: Gfn, folio: Folio, converting: bool) -> int:
    """-EBUSY: a conversion needs the guest's MEM_SHARE, dying or not; everything else needs its death."""
    for pfn in folio.pfns:
        owner = stage2.owner(pfn)
        free = owner == "borrowed" if converting else not stage2.vm_alive()
        # `refuse` and not a plain -EBUSY: the laws must be able to tell a guest that holds on from a call that failed.
        if owner in ("guest", "borrowed") and not free:
            return stage2.refuse("check_consent", EBUSY)
    return 0


def reclaim_dying_guest_page(stage2: Stage2, gfn: Gfn, folio: Folio) -> int:
    """Zero, unmap, give back; -EPERM for a living guest, 0 when the host owns it already."""
    if all_owned(stage2, folio, "host"):
        return 0
    if stage2.vm_alive():
        return stage2.refuse("reclaim_dying_guest_page", EPERM)
    if stage2.guest_leaf(gfn) > folio.order:
        return -E2BIG
    whole = stage2.guest_leaf(gfn) == folio.order
    # Unmap, zero, give back, in this order. A guest vCPU that still runs could write after the zeroing; the host
    # could read before it.
    for at, pfn in enumerate(folio.pfns):
        if stage2.owner(pfn) != "host":
            stage2.guest_unmap(gfn + at, pfn)
            stage2.scrub(pfn)
            stage2.forget(pfn)
            stage2.set_locked_in(pfn, False)
            stage2.set_owner(pfn, "host")
            if not whole:
                stage2.host_maps(pfn, True)
    # What the guest has mapped as one is one for the host, too: EL2 has one note for it.
    if whole:
        stage2.host_maps(folio.pfn, True, folio.order)
    return 0


def split_guest(stage2: Stage2, gfn: Gfn, folio: Folio) -> int:
    """__pkvm_host_split_guest(): what maps the folio is a leaf of each page from now on, and so are its annotations."""
    if stage2.guest_leaf(gfn) and stage2.owner(folio.pfn) == "guest":
        stage2.host_split(folio.pfn, folio.order)
    stage2.guest_split(gfn, folio.order)
    return 0


def _poisoned(stage2: Stage2, gfn: Gfn, folio: Folio) -> bool:
    return any(stage2.poisoned(gfn + at) for at in range(folio.nr))


def guest_share_host(stage2: Stage2, pfn: Pfn) -> None:
    """HVC MEM_SHARE: the guest lets the host use its page."""
    gfn = stage2.gfn_of(pfn)
    if stage2.owner(pfn) == "guest" and gfn is not None:
        # A share of a part of a block exits to the host, which gives EL2 memory and has it split (PKVM_HYP_REQ_SPLIT).
        stage2.guest_split(gfn, 0)
        stage2.set_owner(pfn, "borrowed")
        stage2.set_locked_in(pfn, False)
        stage2.host_maps(pfn, True)
        # MEM_SHARE is the guest's word that the host may read what is in the page.
        stage2.declassify(pfn)


def force_reclaim(stage2: Any, pfn: Pfn) -> bool:
    """__pkvm_force_reclaim_guest_page(): poison the guest's entry, zero the page, give it to the host."""
    gfn = stage2.gfn_of(pfn)
    if stage2.owner(pfn) != "guest" or gfn is None:
        return False
    # Only the page that was touched, of a block that is larger.
    stage2.guest_split(gfn, 0)
    # One step here; EL2 poisons before it zeroes (machine/el2/pkvm/transitions.py), because the guest must meet an error
    # and not a page of zeros.
    stage2.guest_unmap(gfn, pfn)
    stage2.destroy(pfn, gfn, "reclaimed by force because the host touched it")
    stage2.set_locked_in(pfn, False)
    stage2.set_owner(pfn, "host")
    stage2.host_maps(pfn, True)
    return True


# -- the driver's half ---------------------------------------------------------------------------------------------


class PkvmOps(GuestMemfdOps):
    """One hypercall each; the guest's consent is its MEM_SHARE."""

    module = "kvm"
    scrubs = True

    @override
    def prepare_private(self, gfn: Gfn, folio: Folio) -> Steps[int]:
        """Donate; -EPERM means that the guest has it already."""
        ret = yield from self.by_page(-EPERM, "donate_guest", gfn, folio)
        # Every entry of the library can be repeated. A fault that failed after the donation finds the page donated.
        return 0 if ret == -EPERM else ret

    @override
    def prepare_shared(self, gfn: Gfn, folio: Folio) -> Steps[int]:
        """Lend it to both; -EPERM means that both have it already."""
        ret = yield from self.host.hyp_call("share_guest", gfn, folio)
        return 0 if ret == -EPERM else ret

    @override
    def split(self, gfn: Gfn, folio: Folio) -> Steps[int]:
        """EL2 refuses to unmap a part of a block, so it is asked for leaves of single pages; 0 or -ENOMEM."""
        return (yield from self.host.hyp_call("split_guest", gfn, folio))

    @override
    def invalidate(self, gfn: Gfn, folio: Folio, private: bool, reason: Reason) -> Steps[int]:
        """Unshare a shared page; a private one needs the guest's consent or its death.

        A page that is the guest's own, which it only lets the host use, comes back with the guest's death: asked and done
        in one call, as the guest may die between two.
        """
        if private:
            # Teardown does not ask for consent: the VM is dying, and its pages come back one by one with `reclaim`.
            return 0 if reason == "teardown" else (
                yield from self.host.hyp_call("check_consent", gfn, folio, reason == "to_shared"))
        ret = yield from self.host.hyp_call("unshare_guest", gfn, folio)
        # -ENOENT: the guest has not borrowed it, so it is the guest's own page which it lets the host use.
        if ret != -ENOENT:
            return ret
        if reason == "to_private":
            return 0
        ret = yield from self.reclaim(gfn, folio)
        # The guest lives and owns the page, so to remove it would be to take it by force.
        return -EBUSY if ret == -EPERM else ret

    @override
    def make_shared(self, gfn: Gfn, folio: Folio) -> Steps[int]:
        """The guest has shared it: EL2 lets the host in already."""
        yield from ()
        return 0

    @override
    def make_private(self, gfn: Gfn, folio: Folio) -> Steps[None]:
        """The host has let go: the guest's MEM_UNSHARE may complete (-EPERM: it had none under way)."""
        yield from self.host.hyp_call("unshare", gfn, folio)

    @override
    def reclaim(self, gfn: Gfn, folio: Folio) -> Steps[int]:
        """Only a dying guest gives pages back."""
        return (yield from self.host.hyp_call("reclaim_dying_guest_page", gfn, folio))


PKVM = Hypervisor(
    name="pkvm",
    title="protected KVM (arm64): donate, share, reclaim; injects a data abort that the kernel can fix up",
    lending="pKVM says donate (donate_guest), and reclaim or unshare for the way back",
    module="kvm",
    ops=PkvmOps,
    hypercalls={
        "donate_guest": donate_guest, "share_guest": share_guest, "unshare_guest": unshare_guest, "unshare": unshare,
        "check_consent": check_consent, "reclaim_dying_guest_page": reclaim_dying_guest_page, "split_guest": split_guest,
    },
    fallible={"donate_guest": -ENOMEM, "share_guest": -ENOMEM, "split_guest": -ENOMEM, "reclaim_dying_guest_page": -EAGAIN},
    final={"unshare_guest": -EIO, "reclaim_dying_guest_page": -EIO},
    abort=DATA_ABORT,
    tracks_owner=True,
    consents="MEM_SHARE",
    guest_consents=guest_share_host,
    force_reclaim=force_reclaim,
    pfn_cache=True,
    large=True,
)

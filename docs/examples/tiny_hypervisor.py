"""`tiny`: a hypervisor that keeps an owner per page, lends pages to a guest, and takes them back from a dead one.

Its guests cannot give a page up, so every conversion and punch of a page the guest has is refused with -EBUSY.
"""

from __future__ import annotations

from errno import EBUSY, ENOMEM, EPERM

from guest_memfd import SEA, Folio, Gfn, GuestMemfdOps, Hypervisor, Reason, Stage2, Steps

# -- its own half: what each hypercall does, in one atomic step -------------------------------------------------------


def lend(stage2: Stage2, gfn: Gfn, folio: Folio) -> int:
    """host -> guest; the host's mapping goes, the guest's comes. -EPERM: not the host's."""
    if stage2.owner(folio.pfn) != "host":
        return -EPERM
    stage2.set_owner(folio.pfn, "guest")
    stage2.host_maps(folio.pfn, False)
    stage2.guest_map(gfn, folio.pfn)
    return 0


def share(stage2: Stage2, gfn: Gfn, folio: Folio) -> int:
    """host -> shared: both map it. -EPERM: not the host's."""
    if stage2.owner(folio.pfn) != "host":
        return -EPERM
    stage2.set_owner(folio.pfn, "shared")
    stage2.guest_map(gfn, folio.pfn)
    return 0


def unshare(stage2: Stage2, gfn: Gfn, folio: Folio) -> int:
    """shared -> host; 0 as well when it was not shared."""
    if stage2.owner(folio.pfn) == "shared":
        stage2.guest_unmap(gfn, folio.pfn)
        stage2.set_owner(folio.pfn, "host")
    return 0


def ask(stage2: Stage2, folio: Folio, contents_matter: bool) -> int:
    """Would the guest let the page go? -EBUSY: never with its contents, and without them only when it is dead."""
    if stage2.owner(folio.pfn) == "guest" and (contents_matter or stage2.vm_alive()):
        return stage2.refuse("ask", EBUSY)
    return 0


def take_back(stage2: Stage2, gfn: Gfn, folio: Folio) -> int:
    """guest -> host, zeroed; 0 as well when it was the host's. -EBUSY: the guest lives."""
    if stage2.owner(folio.pfn) == "host":
        return 0
    if stage2.vm_alive():
        return stage2.refuse("take_back", EBUSY)
    stage2.guest_unmap(gfn, folio.pfn)
    stage2.scrub(folio.pfn)
    stage2.forget(folio.pfn)
    stage2.set_owner(folio.pfn, "host")
    stage2.host_maps(folio.pfn, True)
    return 0


# -- the driver's half: what the library asks of the kernel module ----------------------------------------------------


class TinyOps(GuestMemfdOps):
    """One hypercall each."""

    module = "tiny"
    scrubs = True                   # take_back leaves zeros

    def prepare_private(self, gfn: Gfn, folio: Folio) -> Steps[int]:
        """Lend it; -EPERM means that the guest has it already."""
        ret = yield from self.host.hyp_call("lend", gfn, folio)
        return 0 if ret == -EPERM else ret

    def prepare_shared(self, gfn: Gfn, folio: Folio) -> Steps[int]:
        """Share it; -EPERM means that it is shared already."""
        ret = yield from self.host.hyp_call("share", gfn, folio)
        return 0 if ret == -EPERM else ret

    def invalidate(self, gfn: Gfn, folio: Folio, private: bool, reason: Reason) -> Steps[int]:
        """A shared page is the host's at once; a private one is asked for. Nothing refuses under teardown."""
        if not private:
            return (yield from self.host.hyp_call("unshare", gfn, folio))
        if reason == "teardown":
            return 0
        return (yield from self.host.hyp_call("ask", folio, reason == "to_shared"))

    def make_shared(self, gfn: Gfn, folio: Folio) -> Steps[int]:
        """`invalidate` has agreed, so the guest never had the page: it is the host's."""
        yield from ()
        return 0

    def make_private(self, gfn: Gfn, folio: Folio) -> Steps[None]:
        """The next guest fault lends it."""
        yield from ()

    def reclaim(self, gfn: Gfn, folio: Folio) -> Steps[int]:
        """Take it back for good."""
        return (yield from self.host.hyp_call("take_back", gfn, folio))


TINY = Hypervisor(
    name="tiny",
    title="an owner per page; lend, share, take back",
    module="tiny",
    ops=TinyOps,
    hypercalls={"lend": lend, "share": share, "unshare": unshare, "ask": ask, "take_back": take_back},
    fallible={"lend": -ENOMEM, "share": -ENOMEM},
    abort=SEA,
    tracks_owner=True,
)

"""Gunyah as a client of the library: lend is donate + private map, share is donate to the sibling + VMMIO map.

A -EINVAL from a donate means "not the owner": the page is where it should be already, so every entry can be repeated.
"""

from __future__ import annotations

from errno import EAGAIN, EINVAL, EIO, ENOMEM

from guest_memfd.compat import override
from guest_memfd.core.hypervisor import SEA, Hypervisor
from guest_memfd.core.ops import GuestMemfdOps, Reason
from guest_memfd.hypervisors.gunyah import driver, el2
from guest_memfd.words.primitives import Folio, Steps
from guest_memfd.words.units import Gfn


class GunyahOps(GuestMemfdOps):
    """Reclaiming after an unmap is synchronised: no NOSYNC on this path."""

    module = "gunyah"
    scrubs = True

    @override
    def prepare_private(self, gfn: Gfn, folio: Folio) -> Steps[int]:
        """Lend. A map that fails leaves the page donated; the next attempt maps it, `reclaim` takes it back."""
        # Ownership before the mapping: a page that is mapped while the host owns it could be reached by both.
        ret = yield from self.by_page(-EINVAL, "donate_to_protected", None, folio)
        if ret not in (0, -EINVAL):
            return ret
        return (yield from self.host.hyp_call("map_private", gfn, folio))

    @override
    def prepare_shared(self, gfn: Gfn, folio: Folio) -> Steps[int]:
        """Share: donate to the sibling extent, then map; a map that fails is repeated as in `prepare_private`."""
        ret = yield from self.host.hyp_call("donate_to_sibling", folio)
        if ret not in (0, -EINVAL):
            return ret
        return (yield from self.host.hyp_call("map_vmmio", gfn, folio))

    @override
    def invalidate(self, gfn: Gfn, folio: Folio, private: bool, reason: Reason) -> Steps[int]:
        """Unmap; the hypervisor refuses with -EBUSY while the guest has the page locked."""
        kind = "unmap_private" if private else "unmap_vmmio"
        ret = yield from self.by_page(-EINVAL, kind, gfn, folio, True)
        # The hypervisor says RETRY. It passes, and a refusal here would be taken for the guest's.
        if ret == -EAGAIN:
            ret = yield from self.by_page(-EINVAL, kind, gfn, folio, True)
        # -EINVAL: it was not mapped, which is what was asked for. A private page stays the guest's; `reclaim` or
        # `make_shared` takes it back.
        if ret not in (0, -EINVAL) or private:
            return 0 if ret == -EINVAL else ret
        # A shared page must be wholly the host's after `invalidate` (core/ops.py), so its extent changes, too.
        ret = yield from self.host.hyp_call("donate_from_sibling", folio)
        return 0 if ret == -EINVAL else ret

    @override
    def make_shared(self, gfn: Gfn, folio: Folio) -> Steps[int]:
        """Take it back; the contents are what the guest left when it relinquished the page."""
        return (yield from self.reclaim(gfn, folio))

    @override
    def make_private(self, gfn: Gfn, folio: Folio) -> Steps[None]:
        """The next guest access lends it."""
        yield from ()

    @override
    def reclaim(self, gfn: Gfn, folio: Folio) -> Steps[int]:
        """Donate it back to the host."""
        ret = yield from self.by_page(-EINVAL, "donate_from_protected", None, folio)
        return 0 if ret == -EINVAL else ret


GUNYAH = Hypervisor(
    name="gunyah",
    title="Gunyah (arm64): lend, share, reclaim; what the guest has locked is not given back; injects an external abort",
    lending="Gunyah has two hypercalls for it, donate_to_protected and map_private; donate_from_protected takes it back",
    module="gunyah",
    ops=GunyahOps,
    hypercalls={
        "donate_to_protected": el2.donate_to_protected, "donate_from_protected": el2.donate_from_protected,
        "donate_to_sibling": el2.donate_to_sibling, "donate_from_sibling": el2.donate_from_sibling,
        "map_private": el2.map_private, "map_vmmio": el2.map_vmmio,
        "unmap_private": el2.unmap_private, "unmap_vmmio": el2.unmap_vmmio,
    },
    fallible={
        "donate_to_protected": -ENOMEM, "donate_to_sibling": -ENOMEM, "map_private": -ENOMEM, "map_vmmio": -ENOMEM,
        "unmap_private": -EAGAIN, "unmap_vmmio": -EAGAIN, "donate_from_protected": -EAGAIN,
    },
    final={"unmap_private": -EIO, "unmap_vmmio": -EIO, "donate_from_protected": -EIO, "donate_from_sibling": -EIO},
    abort=SEA,
    tracks_owner=True,
    consents="relinquish",
    guest_consents=el2.unlock_pages,
    guest_touches=el2.guest_touches,
    driver=driver,
    large=True,
)

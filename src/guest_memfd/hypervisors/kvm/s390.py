"""KVM on s390, protected virtualization: a host access to a secure page has it exported, encrypted, and is repeated.

The Ultravisor (UV) keeps the pages of a protected guest secure. A host that touches one takes a secure storage access
exception, and its handler does not begin with an exception table: it has the page exported, and the access is made again. So
the host survives, and what it reads is ciphertext. The guest notices a fault at its next access, at which KVM has the page
imported: it is decrypted, and its *integrity* is checked. What the host has written to it meanwhile is found out then, and
the page is refused for good. Where the export fails, as the UV keeps the page, the exception table is asked, or the kernel
stops.

The guest shares a page by Set Shared Access, with its contents. To take one back without its contents is to destroy it.

KVM counts the references of a folio before it makes it secure, and faults again if there are others than its own. Here that
is done where the library converts a page and not at the import, where a second vCPU that waits for the folio has one, too.

Assumed: a page that was destroyed while its guest lives may be imported anew, as zeros; one that the guest has not shared is
not converted, as the host could only destroy it. Left out: pages that are pinned shared, large folios, which KVM splits, and
DMA, for which the export is done before.
Sources: arch/s390/mm/fault.c do_secure_storage_access() (in_atomic(): CVE-2025-38359; exception table: CVE-2026-31568);
arch/s390/kernel/uv.c make_folio_secure(), uv_convert_from_secure(), uv_destroy_folio().
"""

from __future__ import annotations

from errno import EAGAIN, EBUSY, EIO, ENOENT, ENOMEM, EPERM
from typing import Any

from guest_memfd.compat import override
from guest_memfd.core.convert import CACHE_AND_LOOKUP
from guest_memfd.core.hypervisor import SECURE_STORAGE, Hypervisor, Stage2
from guest_memfd.core.ops import Reason
from guest_memfd.hypervisors.kvm.coco import CocoOps, map_shared, unmap_shared
from guest_memfd.words.primitives import Folio, Host, Steps
from guest_memfd.words.units import Gfn, Pfn

# -- the Ultravisor -------------------------------------------------------------------------------------------------------


def convert_to_secure(stage2: Stage2, gfn: Gfn, folio: Folio) -> int:
    """Import: zeros the first time, then what was exported; -EPERM if it is not that any more, or not the guest's."""
    pfn = folio.pfn
    owner = stage2.owner(pfn)
    # Poisoned: the host has written to it since its export.
    if owner in ("shared", "other guest") or stage2.poisoned(gfn):
        return -EPERM
    if owner == "host":
        stage2.set_owner(pfn, "guest")
        stage2.zeroed(pfn)
    # What the guest shares is mapped, and stays accessible to the host.
    if owner != "borrowed":
        stage2.host_maps(pfn, False)
    stage2.guest_map(gfn, pfn)
    return 0


def convert_from_secure(stage2: Stage2, gfn: Gfn, folio: Folio) -> int:
    """Export: the guest cannot reach the page before it is imported again, and the host finds it encrypted."""
    stage2.guest_unmap(gfn, folio.pfn)
    if stage2.owner(folio.pfn) == "guest":
        stage2.host_maps(folio.pfn, True)
    return 0


def destroy_secure(stage2: Stage2, gfn: Gfn, folio: Folio) -> int:
    """Clear the page, and give it to the host; 0 as well for one that is the host's."""
    pfn = folio.pfn
    if stage2.owner(pfn) in ("guest", "borrowed"):
        stage2.guest_unmap(gfn, pfn)
        stage2.lose(pfn, "destroyed")
        stage2.set_owner(pfn, "host")
        stage2.host_maps(pfn, True)
    return 0


def check_shared(stage2: Stage2, folio: Folio) -> int:
    """-EBUSY for a page that the guest has and has not shared."""
    return stage2.refuse("check_shared", EBUSY) if stage2.owner(folio.pfn) == "guest" else 0


def map_page(stage2: Stage2, gfn: Gfn, folio: Folio) -> int:
    """KVM's own tables, of a page that the guest shares or borrows; -EPERM for what the guest has."""
    if stage2.owner(folio.pfn) != "borrowed":
        return map_shared(stage2, gfn, folio)
    stage2.guest_map(gfn, folio.pfn)
    return 0


def unmap(stage2: Stage2, gfn: Gfn, folio: Folio) -> int:
    """Take the host's page from the guest; -ENOENT for one that is the guest's own, which it only shares."""
    return -ENOENT if stage2.owner(folio.pfn) == "borrowed" else unmap_shared(stage2, gfn, folio)


def remove_shared(stage2: Stage2, folio: Folio) -> int:
    """Complete the guest's Remove Shared Access: what it has shared is secure again; nothing for any other page."""
    if stage2.owner(folio.pfn) == "borrowed":
        stage2.set_owner(folio.pfn, "guest")
        stage2.host_maps(folio.pfn, False)
    return 0


def set_shared(stage2: Stage2, pfn: Pfn) -> None:
    """Set Shared Access: the guest lets the host use its page, and what is in it."""
    if stage2.owner(pfn) == "guest":
        stage2.set_owner(pfn, "borrowed")
        stage2.host_maps(pfn, True)
        stage2.declassify(pfn)


def export(stage2: Any, pfn: Pfn) -> bool:
    """do_secure_storage_access(): have the page exported; False if the UV will not."""
    gfn = stage2.gfn_of(pfn)
    if stage2.owner(pfn) != "guest":
        return False
    if gfn is not None:
        stage2.guest_unmap(gfn, pfn)
    stage2.host_maps(pfn, True)
    return True


# -- the driver's half ----------------------------------------------------------------------------------------------------


class S390Ops(CocoOps):
    """Imports at the fault, exports what is taken from the guest, destroys what it will not have back."""

    def __init__(self) -> None:
        super().__init__()
        self.mm = Host("mm")

    @override
    def prepare_private(self, gfn: Gfn, folio: Folio) -> Steps[int]:
        """Import; -ENOMEM (tables of the guest)."""
        return (yield from self.host.hyp_call("convert_to_secure", gfn, folio))

    @override
    def invalidate(self, gfn: Gfn, folio: Folio, private: bool, reason: Reason) -> Steps[int]:
        """Export a private page, or ask whether the guest shares it; unmap a shared one, or destroy the guest's own.

        -EBUSY: the guest has not shared it; -EAGAIN: somebody refers to a page that is to become private.
        """
        if private:
            if reason == "to_shared":
                return (yield from self.host.hyp_call("check_shared", folio))
            # A dying guest needs no export: its pages are destroyed.
            return 0 if reason == "teardown" else (yield from self.host.hyp_call("convert_from_secure", gfn, folio))
        # make_folio_secure(): the page cache, and who looks.
        if reason == "to_private" and (yield from self.mm.folio_ref_count(folio)) > CACHE_AND_LOOKUP:
            return -EAGAIN
        ret = yield from self.host.hyp_call("unmap", gfn, folio)
        if ret != -ENOENT:
            return ret
        # The guest's own, and it keeps it mapped. `make_private` says what it is then.
        return 0 if reason == "to_private" else (yield from self.reclaim(gfn, folio))

    @override
    def make_shared(self, gfn: Gfn, folio: Folio) -> Steps[int]:
        """The guest has shared it: the UV lets the host in already."""
        yield from ()
        return 0

    @override
    def make_private(self, gfn: Gfn, folio: Folio) -> Steps[None]:
        """What the guest had shared is its own again; any other page is imported at its next access."""
        yield from self.host.hyp_call("remove_shared", folio)

    @override
    def reclaim(self, gfn: Gfn, folio: Folio) -> Steps[int]:
        """Destroy; -EIO if the UV will not: the page is leaked."""
        return (yield from self.host.hyp_call("destroy_secure", gfn, folio))


S390 = Hypervisor(
    name="s390",
    title="KVM on s390, protected virtualization: a host access exports the page, encrypted, and is repeated",
    lending="KVM has the Ultravisor import the page (convert_to_secure), and export or destroy it",
    module="kvm",
    ops=S390Ops,
    hypercalls={
        "convert_to_secure": convert_to_secure, "convert_from_secure": convert_from_secure, "destroy_secure": destroy_secure,
        "check_shared": check_shared, "remove_shared": remove_shared, "map_shared": map_page, "unmap": unmap,
    },
    fallible={"convert_to_secure": -ENOMEM, "map_shared": -ENOMEM, "convert_from_secure": -EAGAIN,
              "destroy_secure": -EAGAIN},
    final={"convert_from_secure": -EIO, "destroy_secure": -EIO},
    abort=SECURE_STORAGE,
    exports=export,
    tracks_owner=True,
    encrypts=True,
    consents="Set Shared Access",
    guest_consents=set_shared,
    pfn_cache=True,
)

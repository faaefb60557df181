"""Mistakes under s390: KVM, its fault handler, or the Ultravisor, with one of them each (tests/test_s390.py)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from guest_memfd.core.gmem import Held
from guest_memfd.core.hypervisor import Stage2
from guest_memfd.designs.none import NoDesign
from guest_memfd.hypervisors.kvm import s390
from guest_memfd.words.primitives import Folio, Steps
from guest_memfd.words.units import Gfn, Index, Pfn


class ForgetsTheExport(s390.S390Ops):
    """What is taken from the guest is only unmapped from it: it stays secure, and is the host's by the library's word."""

    def invalidate(self, gfn: Gfn, folio: Folio, private: bool, reason: Any) -> Steps[int]:
        if private and reason == "punch":
            return (yield from self.host.hyp_call("unmap", gfn, folio))
        return (yield from super().invalidate(gfn, folio, private, reason))

    def reclaim(self, gfn: Gfn, folio: Folio) -> Steps[int]:
        yield from ()
        return 0


class CountsNoReferences(s390.S390Ops):
    """make_folio_secure() without folio_ref_freeze()."""

    def invalidate(self, gfn: Gfn, folio: Folio, private: bool, reason: Any) -> Steps[int]:
        if private or reason != "to_private":
            return (yield from super().invalidate(gfn, folio, private, reason))
        yield from self.host.hyp_call("unmap", gfn, folio)
        return 0


class TrustsTheDriver(NoDesign):
    """A design that leaves it to the driver to look at references, and pages in the direct map."""

    name = "trusts-the-driver"

    def unexpected_refs(self, folios: tuple[Held, ...]) -> Steps[Index | None]:
        yield from ()
        return None


def _destroys(stage2: Stage2, gfn: Gfn, folio: Folio) -> int:
    ret = s390.convert_from_secure(stage2, gfn, folio)
    stage2.scrub(folio.pfn)
    return ret


def _destroys_what_is_touched(stage2: Any, pfn: Pfn) -> bool:
    gfn = stage2.gfn_of(pfn)
    done = s390.export(stage2, pfn)
    if done and gfn is not None:
        stage2.destroy(pfn, gfn, "destroyed because the host touched it")
    return done


def _imports_what_is_new(stage2: Stage2, gfn: Gfn, folio: Folio) -> int:
    return 0 if stage2.owner(folio.pfn) == "guest" else s390.convert_to_secure(stage2, gfn, folio)


FORGETS_THE_EXPORT = replace(s390.S390, ops=ForgetsTheExport)
COUNTS_NO_REFERENCES = replace(s390.S390, ops=CountsNoReferences)
DESTROYS_FOR_AN_EXPORT = replace(s390.S390, hypercalls={**s390.S390.hypercalls, "convert_from_secure": _destroys})
DESTROYS_WHAT_IS_TOUCHED = replace(s390.S390, exports=_destroys_what_is_touched)
NEVER_EXPORTS = replace(s390.S390, exports=lambda stage2, pfn: False)
IMPORTS_ONCE = replace(s390.S390, hypercalls={**s390.S390.hypercalls, "convert_to_secure": _imports_what_is_new})

"""How a file is filled beside faults, and how the kernel finds a page of it: what a design may have, and no other has.

A party that needs one of these is there where the design has it (scenarios/filling.py).
"""

from __future__ import annotations

from collections.abc import Callable
from errno import EFAULT
from typing import Protocol, runtime_checkable

from guest_memfd.core.gmem import Gmem
from guest_memfd.words.pagestate import SHARED_PAGE
from guest_memfd.words.primitives import Folio, Steps
from guest_memfd.words.units import Index


@runtime_checkable
class Written(Protocol):
    """write(2) of the file: "guest_memfd: add write" v7 (14 Nov 2025), in whole pages."""

    def write(self, index: Index) -> Steps[int]:
        """Copy a page from user space into the shared page *index*: 0, or -errno and nothing is written."""


@runtime_checkable
class Populated(Protocol):
    """kvm_gmem_populate(): what a guest begins with is copied into its private pages before it runs."""

    def populate(self, index: Index) -> Steps[int]:
        """Copy a page from user space into the private page *index*, which is not there yet: 0, or -errno."""


@runtime_checkable
class Copied(Protocol):
    """UFFDIO_COPY: "guest_memfd: userfaultfd" v2 (6 Mar 2026)."""

    def copy(self, index: Index) -> Steps[int]:
        """A new shared page *index*, filled from user space and mapped: 0, or -errno (-EEXIST: it is there)."""


@runtime_checkable
class PfnCached(Protocol):
    """gfn_to_pfn_cache without GUP: "KVM: pfncache: guest_memfd without a direct map" RFC v2 (26 Feb 2026)."""

    def cached_pfn(self, index: Index) -> Steps[Folio | int]:
        """The folio of the shared page *index*, without a reference: who keeps it looks at the mmu sequence; or -errno."""


def on_shared(gmem: Gmem, op: str, index: Index, locked: Callable[[Index], Steps[int]]) -> Steps[int]:
    """*locked*(index) as operation *op*, under the invalidate lock, shared; -EFAULT for a private page."""
    host = gmem.host
    yield from host.begin_op(op, index, 1)
    yield from host.down_read("invalidate")
    (attribute,) = yield from host.tree_load("attributes", index, 1)
    ret = (yield from locked(index)) if attribute == SHARED_PAGE else -EFAULT
    yield from host.end_op(ret)
    yield from host.up_read("invalidate")
    return ret


def pfn_of_shared(gmem: Gmem, index: Index) -> Steps[Folio | int]:
    """The folio of page *index*, as a fault of the VMM finds it, for the kernel's own use, and without a reference.

    -EFAULT for a private page, and what `grab_folio` and `make_accessible` return. Source: kvm_gmem_get_pfn().
    """
    host = gmem.host
    yield from host.down_read("invalidate")
    (attribute,) = yield from host.tree_load("attributes", index, 1)
    grabbed = (yield from gmem.grab_folio(index)) if attribute == SHARED_PAGE else -EFAULT
    if isinstance(grabbed, int):
        found: Folio | int = grabbed
    else:
        found = (yield from gmem.make_accessible(grabbed)) or grabbed.folio
        yield from gmem.unlock_and_put(grabbed.folio)
    yield from host.up_read("invalidate")
    return found

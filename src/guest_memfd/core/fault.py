"""Faults: how a page gets into the guest, and into the VMM's page table.

Both run under the invalidate lock, shared: conversion, hole punching, bind and unbind are excluded until the mapping
is made, so there is no sequence to recheck. (KVM's own path drops the lock before it maps and retries instead.)
"""

from __future__ import annotations

from errno import EAGAIN, EFAULT, EINVAL

from guest_memfd.core.gmem import Gmem, Grabbed
from guest_memfd.words.pagestate import PRIVATE_PAGE, SHARED_PAGE
from guest_memfd.words.primitives import Steps, VmFault
from guest_memfd.words.units import Gfn, Index


def guest_fault(gmem: Gmem, gfn: Gfn, index: Index) -> Steps[int]:
    """Give the guest page *index* at *gfn*, with the folio it lies in; 0, -EFAULT (not bound so), or a refusal."""
    host = gmem.host
    yield from host.begin_op("fault", index, 1, gfn)
    if not (yield from host.get_file()):           # kvm_gmem_get_file(): the slot's pointer does not keep it
        yield from host.end_op(-EFAULT)
        return -EFAULT
    # From looking at the trees to the mapping made. KVM's own path drops the lock before it maps, and has to
    # compare a sequence number afterwards; here no conversion can come in between.
    yield from host.down_read("invalidate")
    (bound,) = yield from host.tree_load("bindings", index, 1)
    # The slot may have been unbound, or bound elsewhere, while this vCPU was on its way.
    ret = (yield from gmem.fault_bound(gfn, index)) if bound == gfn + 1 else -EFAULT
    yield from host.end_op(ret)
    yield from host.up_read("invalidate")
    # After the lock is dropped: this may be the last reference, and the end of the inode takes the lock again.
    yield from gmem.close()
    return ret


def fault_bound(gmem: Gmem, gfn: Gfn, index: Index) -> Steps[int]:
    """Give the guest page *index*, which is bound to *gfn*, under the invalidate lock; 0 or -errno."""
    (attribute,) = yield from gmem.host.tree_load("attributes", index, 1)
    grabbed = yield from gmem.grab_folio(index)
    if isinstance(grabbed, int):
        return grabbed
    # The hypervisor is given the whole folio, so the gfn must be that of its first page.
    head = gfn - (index - grabbed.pgoff)
    if attribute == PRIVATE_PAGE:
        ret = yield from gmem.give_private(head, grabbed)
    else:
        ret = yield from gmem.ops.prepare_shared(head, grabbed.folio)
    yield from gmem.unlock_and_put(grabbed.folio)
    return ret


def give_private(gmem: Gmem, gfn: Gfn, grabbed: Grabbed) -> Steps[int]:
    """The host lets go first - direct map, then TLBs - and only then the guest gets the page."""
    # A fault that failed after its zap leaves the mark. The page is out of the direct map already, and a second
    # zap would count it twice.
    if not grabbed.no_direct_map:
        ret = yield from gmem.zap(grabbed.folio)
        if ret:
            return ret
    return (yield from gmem.ops.prepare_private(gfn, grabbed.folio))


def user_fault(gmem: Gmem, index: Index) -> Steps[VmFault]:
    """Map page *index* into the VMM; ``ok``, ``retry`` (VM_FAULT_RETRY), or ``SIGBUS`` (private, poisoned, no memory).

    To try again is the answer where the VMA went, and where others were faster too often (-EAGAIN of `grab_folio`).
    """
    host = gmem.host
    if index >= gmem.size:
        return "SIGBUS"
    yield from host.begin_op("user_fault", index, 1)
    yield from host.down_read("invalidate")
    answer = yield from gmem.fault_shared(index)
    yield from host.end_op(-EFAULT if answer == "SIGBUS" else 0)
    yield from host.up_read("invalidate")
    return answer


def fault_shared(gmem: Gmem, index: Index) -> Steps[VmFault]:
    """Map page *index* into the VMM under the invalidate lock; ``ok``, ``retry`` or ``SIGBUS``, as `user_fault`.

    Ask first: a private page is never grabbed, let alone zeroed, for the host.
    """
    # The order matters: to grab is to allocate and zero, through the direct map, a page that may be the guest's.
    (attribute,) = yield from gmem.host.tree_load("attributes", index, 1)
    if attribute != SHARED_PAGE:
        return "SIGBUS"
    grabbed = yield from gmem.grab_folio(index)
    if isinstance(grabbed, int):
        return "retry" if grabbed == -EAGAIN else "SIGBUS"
    # Before the entry is installed: GUP may hand the page to a driver that uses its kernel address.
    if (yield from gmem.make_accessible(grabbed)):
        answer: VmFault = "SIGBUS"
    else:
        mapped = yield from gmem.host.vmf_insert_folio(index, grabbed.folio)
        answer = "ok" if mapped else "retry"
    yield from gmem.unlock_and_put(grabbed.folio)
    return answer


def make_accessible(gmem: Gmem, grabbed: Grabbed) -> Steps[int]:
    """A shared page is in the direct map before the host may use it; 0 or -ENOMEM."""
    return (yield from gmem.restore(grabbed.folio)) if grabbed.no_direct_map else 0


def allocate(gmem: Gmem, start: Index, nr: int) -> Steps[int]:
    """fallocate(KEEP_SIZE): have the pages of [start, start+nr); on -ENOMEM those already allocated stay."""
    host = gmem.host
    if not gmem.has(start, nr):
        return -EINVAL
    yield from host.begin_op("allocate", start, nr)
    yield from host.down_read("invalidate")
    ret, index = 0, start
    while not ret and index < start + nr:
        grabbed = yield from gmem.grab_folio(index)
        if isinstance(grabbed, int):
            ret = grabbed
        else:
            yield from gmem.unlock_and_put(grabbed.folio)
            index = grabbed.pgoff + grabbed.folio.nr
    yield from host.end_op(ret, index if ret else None)
    yield from host.up_read("invalidate")
    return ret

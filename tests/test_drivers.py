"""The drivers' halves: which hypercalls a driver makes for each operation of the library, and what it makes of answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from scripted import script

from guest_memfd.core.hypervisor import DATA_ABORT, GPF, RMP_FAULT, SEA, SECURE_STORAGE, Hypervisor
from guest_memfd.core.ops import GuestMemfdOps
from guest_memfd.hypervisors.gunyah.client import GUNYAH as GUNYAH_ITSELF
from guest_memfd.hypervisors.gunyah.client import GunyahOps
from guest_memfd.hypervisors.kvm.cca import CCA as CCA_ITSELF
from guest_memfd.hypervisors.kvm.cca import CcaOps
from guest_memfd.hypervisors.kvm.default import KVM as KVM_ITSELF
from guest_memfd.hypervisors.kvm.default import KvmOps
from guest_memfd.hypervisors.kvm.pkvm import PKVM as PKVM_ITSELF
from guest_memfd.hypervisors.kvm.pkvm import PkvmOps
from guest_memfd.hypervisors.kvm.s390 import S390 as S390_ITSELF
from guest_memfd.hypervisors.kvm.s390 import S390Ops
from guest_memfd.hypervisors.kvm.snp import SNP as SNP_ITSELF
from guest_memfd.hypervisors.kvm.snp import SnpOps
from guest_memfd.hypervisors.kvm.tdx import TDX as TDX_ITSELF
from guest_memfd.hypervisors.kvm.tdx import TdxOps
from guest_memfd.words.primitives import Folio

EPERM, ENOENT, EIO, EAGAIN, ENOMEM, EBUSY, EINVAL = -1, -2, -5, -11, -12, -16, -22
P, GFN = Folio(7), 3

Row = tuple[Callable[[GuestMemfdOps], Any], Sequence[tuple[str, int]], Any]


def invalidate(private: bool, reason: Any) -> Callable[[GuestMemfdOps], Any]:
    return lambda ops: ops.invalidate(GFN, P, private, reason)


def prepare_private(ops: GuestMemfdOps) -> Any:
    return ops.prepare_private(GFN, P)


def prepare_shared(ops: GuestMemfdOps) -> Any:
    return ops.prepare_shared(GFN, P)


def make_shared(ops: GuestMemfdOps) -> Any:
    return ops.make_shared(GFN, P)


def make_private(ops: GuestMemfdOps) -> Any:
    return ops.make_private(GFN, P)


def reclaim(ops: GuestMemfdOps) -> Any:
    return ops.reclaim(GFN, P)


def split(ops: GuestMemfdOps) -> Any:
    return ops.split(GFN, P)


TO_PROTECTED, TO_SIBLING = "hyp_call(donate_to_protected, pfn7)", "hyp_call(donate_to_sibling, pfn7)"
FROM_PROTECTED, FROM_SIBLING = "hyp_call(donate_from_protected, pfn7)", "hyp_call(donate_from_sibling, pfn7)"
MAP_PRIVATE, MAP_VMMIO = "hyp_call(map_private, 3, pfn7)", "hyp_call(map_vmmio, 3, pfn7)"
UNMAP_PRIVATE, UNMAP_VMMIO = "hyp_call(unmap_private, 3, pfn7, True)", "hyp_call(unmap_vmmio, 3, pfn7, True)"

GUNYAH: list[Row] = [
    # A donate that says "not the owner" has been made before.
    *((ops, [(donate, first), (mapped, last)], last) for first in (0, EINVAL) for last in (0, ENOMEM)
      for ops, donate, mapped in ((prepare_private, TO_PROTECTED, MAP_PRIVATE), (prepare_shared, TO_SIBLING, MAP_VMMIO))),
    (prepare_private, [(TO_PROTECTED, ENOMEM)], ENOMEM), (prepare_shared, [(TO_SIBLING, ENOMEM)], ENOMEM),
    # What is busy is asked once more, what is not mapped is as it should be; a shared page goes back to the host then.
    (invalidate(True, "punch"), [(UNMAP_PRIVATE, 0)], 0),
    (invalidate(True, "punch"), [(UNMAP_PRIVATE, EINVAL)], 0),
    (invalidate(True, "punch"), [(UNMAP_PRIVATE, EBUSY)], EBUSY),
    (invalidate(True, "punch"), [(UNMAP_PRIVATE, EIO)], EIO),
    (invalidate(True, "punch"), [(UNMAP_PRIVATE, EAGAIN), (UNMAP_PRIVATE, 0)], 0),
    (invalidate(True, "punch"), [(UNMAP_PRIVATE, EAGAIN), (UNMAP_PRIVATE, EAGAIN)], EAGAIN),
    (invalidate(True, "punch"), [(UNMAP_PRIVATE, EAGAIN), (UNMAP_PRIVATE, EBUSY)], EBUSY),
    (invalidate(False, "punch"), [(UNMAP_VMMIO, 0), (FROM_SIBLING, 0)], 0),
    (invalidate(False, "punch"), [(UNMAP_VMMIO, EINVAL), (FROM_SIBLING, EINVAL)], 0),
    (invalidate(False, "punch"), [(UNMAP_VMMIO, 0), (FROM_SIBLING, EIO)], EIO),
    (invalidate(False, "punch"), [(UNMAP_VMMIO, EIO)], EIO),
    (invalidate(False, "punch"), [(UNMAP_VMMIO, EAGAIN), (UNMAP_VMMIO, 0), (FROM_SIBLING, 0)], 0),
    (invalidate(False, "punch"), [(UNMAP_VMMIO, EAGAIN), (UNMAP_VMMIO, EAGAIN)], EAGAIN),
    *((ops, [(FROM_PROTECTED, first)], last) for ops in (reclaim, make_shared)
      for first, last in ((0, 0), (EINVAL, 0), (EAGAIN, EAGAIN), (EBUSY, EBUSY), (EIO, EIO))),
    (make_private, [], None),
    (GuestMemfdOps.release, [("ops_released()", None)], None),
]

DONATE, SHARE = "hyp_call(donate_guest, 3, pfn7)", "hyp_call(share_guest, 3, pfn7)"
UNSHARE_GUEST, UNSHARE = "hyp_call(unshare_guest, 3, pfn7)", "hyp_call(unshare, 3, pfn7)"
RECLAIM = "hyp_call(reclaim_dying_guest_page, 3, pfn7)"
ASK, ASK_TO_CONVERT = "hyp_call(check_consent, 3, pfn7, False)", "hyp_call(check_consent, 3, pfn7, True)"

PKVM: list[Row] = [
    *((ops, [(call, first)], last) for ops, call in ((prepare_private, DONATE), (prepare_shared, SHARE))
      for first, last in ((0, 0), (EPERM, 0), (ENOMEM, ENOMEM))),
    *((invalidate(True, reason), [(ASK_TO_CONVERT if reason == "to_shared" else ASK, ret)], ret)
      for reason in ("to_private", "to_shared", "punch", "unbind", "error") for ret in (0, EBUSY)),
    (invalidate(True, "teardown"), [], 0),
    *((invalidate(False, reason), [(UNSHARE_GUEST, ret)], ret)
      for reason in ("punch", "to_private", "teardown") for ret in (0, EIO)),
    # Not lent by the host: the guest's own, which it lets the host use.
    (invalidate(False, "to_private"), [(UNSHARE_GUEST, ENOENT)], 0),
    (invalidate(False, "punch"), [(UNSHARE_GUEST, ENOENT), (RECLAIM, 0)], 0),
    (invalidate(False, "teardown"), [(UNSHARE_GUEST, ENOENT), (RECLAIM, 0)], 0),
    (invalidate(False, "unbind"), [(UNSHARE_GUEST, ENOENT), (RECLAIM, EPERM)], EBUSY),
    (invalidate(False, "punch"), [(UNSHARE_GUEST, ENOENT), (RECLAIM, EAGAIN)], EAGAIN),
    *((reclaim, [(RECLAIM, ret)], ret) for ret in (0, EPERM, EAGAIN, EIO)),
    (make_shared, [], 0),
    (make_private, [(UNSHARE, 0)], None), (make_private, [(UNSHARE, EPERM)], None),
    (GuestMemfdOps.release, [("ops_released()", None)], None),
]

MAP, UNMAP = "hyp_call(mmu_map, 3, pfn7)", "hyp_call(mmu_unmap, 3, pfn7)"
KVM: list[Row] = [
    *((ops, [(MAP, ret)], ret) for ops in (prepare_private, prepare_shared) for ret in (0, ENOMEM)),
    *((invalidate(private, reason), [(UNMAP, ret)], ret) for private in (True, False) for reason in ("punch", "teardown")
      for ret in (0, EAGAIN)),
    (make_shared, [], 0), (make_private, [], None), (reclaim, [], 0),
    (GuestMemfdOps.release, [("ops_released()", None)], None),
]

MAP_SHARED, UNMAP_SHARED = "hyp_call(map_shared, 3, pfn7)", "hyp_call(unmap_shared, 3, pfn7)"
# Of both that encrypt: a shared page is KVM's own business, and to make shared is to give back for good.
ENCRYPTED: list[Row] = [
    *((prepare_shared, [(MAP_SHARED, ret)], ret) for ret in (0, ENOMEM)),
    *((invalidate(False, reason), [(UNMAP_SHARED, ret)], ret) for reason in ("punch", "teardown") for ret in (0, EIO)),
    (make_private, [], None),
    (GuestMemfdOps.release, [("ops_released()", None)], None),
]

AUG, REMOVE = "hyp_call(page_aug, 3, pfn7)", "hyp_call(page_remove, 3, pfn7)"
BLOCK, DEMOTE = "hyp_call(range_block, 3, pfn7)", "hyp_call(page_demote, 3, pfn7)"
TDX: list[Row] = [
    *ENCRYPTED,
    *((prepare_private, [(AUG, ret)], ret) for ret in (0, ENOMEM, EPERM)),
    *((split, [(DEMOTE, ret)], ret) for ret in (0, ENOMEM)),
    *((invalidate(private, reason), [(call, EAGAIN), (call, ret)], ret)
      for private, call in ((True, BLOCK), (False, UNMAP_SHARED))
      for reason in ("punch", "teardown") for ret in (0, EAGAIN, EIO)),
    *((invalidate(True, reason), [(BLOCK, ret)], ret) for reason in ("to_shared", "unbind") for ret in (0, EIO)),
    *((ops, [(REMOVE, ret)], ret) for ops in (reclaim, make_shared) for ret in (0, EAGAIN, EIO)),
]

ASSIGN, UNASSIGN = "hyp_call(rmp_assign, 3, pfn7)", "hyp_call(rmp_unassign, pfn7)"
SMASH, ZAP = "hyp_call(psmash, 3, pfn7)", "hyp_call(npt_zap, 3, pfn7)"
SPLIT_DIRECT_MAP = "split_direct_map(pfn7)"
SNP: list[Row] = [
    *ENCRYPTED,
    *((prepare_private, [(SPLIT_DIRECT_MAP, 0), (ASSIGN, ret)], ret) for ret in (0, ENOMEM, EPERM)),
    *((prepare_private, [(SPLIT_DIRECT_MAP, ret)], ret) for ret in (ENOMEM, EAGAIN)),
    *((split, [(SMASH, ret)], ret) for ret in (0, EIO)),
    *((split, [(SMASH, EAGAIN), (SMASH, ret)], ret) for ret in (0, EAGAIN)),
    *((invalidate(True, reason), [(ZAP, 0)], 0) for reason in ("punch", "to_shared", "teardown")),
    *((ops, [(UNASSIGN, ret)], ret) for ops in (reclaim, make_shared) for ret in (0, EAGAIN, EIO)),
]

DATA_MAP, DATA_UNMAP = "hyp_call(data_map, 3, pfn7)", "hyp_call(data_unmap, 3, pfn7)"
CCA: list[Row] = [
    *ENCRYPTED,
    *((prepare_private, [(DATA_MAP, ret)], ret) for ret in (0, ENOMEM, EPERM)),
    *((split, [("hyp_call(rtt_split, 3, pfn7)", ret)], ret) for ret in (0, ENOMEM)),
    *((invalidate(True, reason), [(DATA_UNMAP, ret)], ret)
      for reason in ("punch", "to_shared", "teardown") for ret in (0, EIO)),
    *((ops, [("hyp_call(undelegate, pfn7)", ret)], ret) for ops in (reclaim, make_shared) for ret in (0, EAGAIN, EIO)),
]

COUNT, UNMAP, DESTROY = "folio_ref_count(pfn7)", "hyp_call(unmap, 3, pfn7)", "hyp_call(destroy_secure, 3, pfn7)"
S390: list[Row] = [
    *((prepare_private, [("hyp_call(convert_to_secure, 3, pfn7)", ret)], ret) for ret in (0, ENOMEM, EPERM)),
    (prepare_shared, [("hyp_call(map_shared, 3, pfn7)", ENOMEM)], ENOMEM),
    *((invalidate(True, "to_shared"), [("hyp_call(check_shared, pfn7)", ret)], ret) for ret in (0, EBUSY)),
    (invalidate(True, "teardown"), [], 0),
    *((invalidate(True, reason), [("hyp_call(convert_from_secure, 3, pfn7)", ret)], ret)
      for reason in ("punch", "unbind", "error") for ret in (0, EAGAIN, EIO)),
    (invalidate(False, "to_private"), [(COUNT, 3)], EAGAIN),
    *((invalidate(False, "to_private"), [(COUNT, 2), (UNMAP, ret)], 0) for ret in (0, ENOENT)),
    (invalidate(False, "punch"), [(UNMAP, 0)], 0),
    *((invalidate(False, "punch"), [(UNMAP, ENOENT), (DESTROY, ret)], ret) for ret in (0, EIO)),
    (make_shared, [], 0), (make_private, [("hyp_call(remove_shared, pfn7)", 0)], None),
    *((reclaim, [(DESTROY, ret)], ret) for ret in (0, EAGAIN, EIO)),
]

LARGE = Folio(8, 2)


def of_each(call: str, *rets: int, gfn: bool = True) -> list[tuple[str, int]]:
    """*call* about each page of a folio of four."""
    args = [f"{4 + at}, pfn{8 + at}" if gfn else f"pfn{8 + at}" for at in range(4)]
    return [(f"hyp_call({call.replace('*', arg)})", ret) for arg, ret in zip(args, rets, strict=False)]


def private(ops: GuestMemfdOps) -> Any:
    return ops.prepare_private(4, LARGE)


def gone(ops: GuestMemfdOps) -> Any:
    return ops.invalidate(4, LARGE, True, "punch")


def gone_shared(ops: GuestMemfdOps) -> Any:
    return ops.invalidate(4, LARGE, False, "punch")


def back(ops: GuestMemfdOps) -> Any:
    return ops.reclaim(4, LARGE)


def cut(ops: GuestMemfdOps) -> Any:
    return ops.split(4, LARGE)


# A folio of four pages, at gfn 4: asked for as one; page by page only if a part of it may be so already.
OF_LARGE: list[tuple[type[GuestMemfdOps], Row]] = [
    *((ops, (private, [(f"hyp_call({call}, 4, pfn8/o2)", first), *of_each(f"{call}, *", *rets)], last))
      for ops, call, already in ((PkvmOps, "donate_guest", 0), (TdxOps, "page_aug", EPERM), (SnpOps, "rmp_assign", EPERM))
      for first, rets, last in ((0, (), 0), (ENOMEM, (), ENOMEM), (EPERM, (EPERM, 0, EPERM, 0), 0),
                                (EPERM, (0, ENOMEM), ENOMEM),
                                (EPERM, (0, EPERM, EPERM, EPERM), 0), (EPERM, (EPERM, EPERM, EPERM, 0), 0),
                                (EPERM, (EPERM,) * 4, already))),
    *((GunyahOps, (private, [("hyp_call(donate_to_protected, pfn8/o2)", EINVAL),
                             *of_each("donate_to_protected, *", *rets, gfn=False), *mapped], last))
      for rets, mapped, last in (((EINVAL, 0, EINVAL, 0), [("hyp_call(map_private, 4, pfn8/o2)", 0)], 0),
                                 ((EINVAL,) * 4, [("hyp_call(map_private, 4, pfn8/o2)", ENOMEM)], ENOMEM),
                                 ((EINVAL, ENOMEM), [], ENOMEM))),
    *((GunyahOps, (gone, [("hyp_call(unmap_private, 4, pfn8/o2, True)", EINVAL),
                          *of_each("unmap_private, *, True", *rets)], last))
      for rets, last in (((EINVAL, 0, 0, EINVAL), 0), ((EINVAL,) * 4, 0), ((0, EBUSY), EBUSY))),
    *((GunyahOps, (gone, [("hyp_call(unmap_private, 4, pfn8/o2, True)", EAGAIN),
                          ("hyp_call(unmap_private, 4, pfn8/o2, True)", EINVAL),
                          *of_each("unmap_private, *, True", *rets)], last))
      for rets, last in (((EINVAL, 0, 0, EINVAL), 0), ((0, EBUSY), EBUSY))),
    (GunyahOps, (gone_shared, [("hyp_call(unmap_vmmio, 4, pfn8/o2, True)", 0),
                               ("hyp_call(donate_from_sibling, pfn8/o2)", 0)], 0)),
    *((GunyahOps, (back, [("hyp_call(donate_from_protected, pfn8/o2)", EINVAL),
                          *of_each("donate_from_protected, *", *rets, gfn=False)], last))
      for rets, last in (((EINVAL, 0, 0, EINVAL), 0), ((EINVAL,) * 4, 0), ((0, EBUSY), EBUSY))),
    *((ops, (cut, [(f"hyp_call({call}, 4, pfn8/o2)", ret)], ret)) for ret in (0, ENOMEM)
      for ops, call in ((PkvmOps, "split_guest"), (TdxOps, "page_demote"), (SnpOps, "psmash"))),
    *((ops, (cut, [], 0)) for ops in (KvmOps, GunyahOps)),      # they split when a part is asked for
    *((ops, (back, [(f"hyp_call({call})", ret)], ret)) for ret in (0, EIO)
      for ops, call in ((PkvmOps, "reclaim_dying_guest_page, 4, pfn8/o2"), (TdxOps, "page_remove, 4, pfn8/o2"),
                        (SnpOps, "rmp_unassign, pfn8/o2"))),
]


def test_protected_hypervisors_zero_what_they_give_back() -> None:
    assert [ops.scrubs for ops in (KvmOps, PkvmOps, GunyahOps, TdxOps, SnpOps, CcaOps, S390Ops)] == [False, *[True] * 6]


@pytest.mark.parametrize(("ops", "row"), [
    *((GunyahOps, row) for row in GUNYAH), *((PkvmOps, row) for row in PKVM), *((KvmOps, row) for row in KVM),
    *((TdxOps, row) for row in TDX), *((SnpOps, row) for row in SNP), *((CcaOps, row) for row in CCA),
    *((S390Ops, row) for row in S390), *OF_LARGE])
def test_a_driver_makes_these_calls_and_answers_so(ops: type[GuestMemfdOps], row: Row) -> None:
    operation, calls, answer = row
    driver = ops()
    steps = driver.release() if operation is GuestMemfdOps.release else operation(driver)
    assert script(steps, *(ret for _, ret in calls)) == (answer, [call for call, _ in calls])


@pytest.mark.parametrize(("one", "told"), [
    (KVM_ITSELF, (None, False, None, True, False, "accesses")),
    (PKVM_ITSELF, (DATA_ABORT, True, "MEM_SHARE", True, False, "accesses")),
    (GUNYAH_ITSELF, (SEA, True, "relinquish", False, False, "accesses")),
    (TDX_ITSELF, (None, True, None, True, True, "accesses")),
    (CCA_ITSELF, (GPF, True, None, True, False, "accesses")),
    (S390_ITSELF, (SECURE_STORAGE, True, "Set Shared Access", True, True, "accesses")),
    (SNP_ITSELF, (RMP_FAULT, True, None, True, True, "writes"))], ids=lambda value: getattr(value, "name", ""))
def test_what_a_hypervisor_is(one: Hypervisor, told: tuple[Any, ...]) -> None:
    assert (one.abort, one.tracks_owner, one.consents, one.pfn_cache, one.encrypts, one.guards) == told
    assert one.large is (one is not S390_ITSELF)

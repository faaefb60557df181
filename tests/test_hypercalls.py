"""What the hypervisors' own halves answer and change on the abstract host, call by call, as their documents say it.

Sources: Gunyah, docs/api/gunyah_api.md (MEMEXTENT_DONATE, ADDRSPACE_MAP, ADDRSPACE_UNMAP, ADDRSPACE_MODIFY_PAGES); pKVM,
arch/arm64/kvm/hyp/nvhe/mem_protect.c (transitions and their return codes). A row says what was there, what was asked
for, the answer, and all that changed: whatever it does not name must be as it was.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import el2_bench
import pytest
from driver import Bench
from el2_bench import done

from guest_memfd.core.hypervisor import check_owner
from guest_memfd.words.pagestate import DYING
from guest_memfd.words.primitives import Folio, Primitive
from guest_memfd.words.scene import Scene

EINVAL, EBUSY, EPERM, ENOENT = -22, -16, -1, -2
P = Folio(0)
FLUSHED = {"pfn1.stale": 0}
"""Taking a page from the host ends in a flush of its TLBs, other pages' entries included."""

GUESTS = {"pfn0.owner": "guest", "pfn0.s2": 0, "pfn0.content": "secret", "page0.expect": "secret"}
HAS = {**GUESTS, "pfn0.gmap": 1}
HOLDS = {**HAS, "pfn0.locked_in": 1}
SHARES = {"pfn0.owner": "shared", "pfn0.gmap": 1}
BORROWS = {"pfn0.owner": "borrowed", "pfn0.gmap": 1, "pfn0.content": "data", "page0.expect": "data"}
DYING = {"vm0.vm": DYING}


class Row(NamedTuple):
    before: dict[str, Any]
    call: tuple[Any, ...]
    ret: int
    after: dict[str, Any]


GUNYAH = [
    Row({}, ("donate_to_protected", P), 0, {"pfn0.owner": "guest", "pfn0.s2": 0, **FLUSHED}),
    Row(GUESTS, ("donate_to_protected", P), EINVAL, {}),
    Row(SHARES, ("donate_to_protected", P), EINVAL, {}),
    Row(GUESTS, ("donate_from_protected", P), 0, {"pfn0.owner": "host", "pfn0.s2": 1}),
    Row(HAS, ("donate_from_protected", P), EBUSY, {}),                                          # it never unmaps
    Row({}, ("donate_from_protected", P), EINVAL, {}),
    Row(SHARES, ("donate_from_protected", P), EINVAL, {}),
    Row({}, ("donate_to_sibling", P), 0, {"pfn0.owner": "shared"}),
    Row(GUESTS, ("donate_to_sibling", P), EINVAL, {}),
    Row(SHARES, ("donate_to_sibling", P), EINVAL, {}),
    Row(SHARES, ("donate_from_sibling", P), 0, {"pfn0.owner": "host", "pfn0.gmap": 0}),         # mappings move with it
    Row({}, ("donate_from_sibling", P), EINVAL, {}),
    Row(GUESTS, ("donate_from_sibling", P), EINVAL, {}),
    Row(GUESTS, ("map_private", 0, P), 0, {"pfn0.gmap": 1, "pfn0.locked_in": 1}),
    Row({**GUESTS, "pfn1.gmap": 2}, ("map_private", 1, P), 0, {"pfn0.gmap": 2, "pfn0.locked_in": 1, "pfn1.gmap": 0}),
    Row({}, ("map_private", 0, P), EINVAL, {}),
    Row({"pfn0.owner": "shared"}, ("map_private", 0, P), EINVAL, {}),
    Row({"pfn0.owner": "shared"}, ("map_vmmio", 0, P), 0, {"pfn0.gmap": 1}),
    Row({}, ("map_vmmio", 0, P), EINVAL, {}),
    Row(GUESTS, ("map_vmmio", 0, P), EINVAL, {}),
    Row(HAS, ("unmap_private", 0, P, True), 0, {"pfn0.gmap": 0}),
    Row(HAS, ("unmap_private", 0, P, False), 0, {"pfn0.gmap": 0, "pfn0.gstale": 1}),            # NOSYNC
    Row({**HAS, **DYING}, ("unmap_private", 0, P, True), 0, {"pfn0.gmap": 0}),
    Row(HOLDS, ("unmap_private", 0, P, True), EBUSY, {}),
    Row({**HOLDS, **DYING}, ("unmap_private", 0, P, True), 0,
        {"pfn0.gmap": 0, "pfn0.locked_in": 0, "pfn0.content": "zero", "page0.expect": "any"}),
    Row(HAS, ("unmap_private", 1, P, True), EINVAL, {}),
    Row(GUESTS, ("unmap_private", 0, P, True), EINVAL, {}),
    Row(SHARES, ("unmap_private", 0, P, True), EINVAL, {}),
    Row(SHARES, ("unmap_vmmio", 0, P, True), 0, {"pfn0.gmap": 0}),
    Row(SHARES, ("unmap_vmmio", 0, P, False), 0, {"pfn0.gmap": 0, "pfn0.gstale": 1}),
    Row(SHARES, ("unmap_vmmio", 1, P, True), EINVAL, {}),
    Row({"pfn0.owner": "shared"}, ("unmap_vmmio", 0, P, True), EINVAL, {}),
    Row(HAS, ("unmap_vmmio", 0, P, True), EINVAL, {}),
]

RECLAIMED = {"pfn0.owner": "host", "pfn0.gmap": 0, "pfn0.content": "zero", "page0.expect": "any"}
PKVM = [
    Row({}, ("donate_guest", 0, P), 0,
        {"pfn0.owner": "guest", "pfn0.s2": 0, "pfn0.gmap": 1, "pfn0.locked_in": 1, **FLUSHED}),
    Row({"gfn0.gpoison": 1}, ("donate_guest", 0, P), EPERM, {}),
    Row(GUESTS, ("donate_guest", 0, P), EPERM, {}),
    Row(SHARES, ("donate_guest", 0, P), EPERM, {}),
    Row({}, ("share_guest", 0, P), 0, {"pfn0.owner": "shared", "pfn0.gmap": 1}),
    Row({"gfn0.gpoison": 1}, ("share_guest", 0, P), EPERM, {}),
    Row({"gfn1.gpoison": 1}, ("share_guest", 0, P), 0, {"pfn0.owner": "shared", "pfn0.gmap": 1}),
    Row(GUESTS, ("share_guest", 0, P), EPERM, {}),
    Row(SHARES, ("share_guest", 0, P), EPERM, {}),
    Row(SHARES, ("unshare_guest", 0, P), 0, {"pfn0.owner": "host", "pfn0.gmap": 0}),
    Row({}, ("unshare_guest", 0, P), ENOENT, {}),
    Row(HOLDS, ("unshare_guest", 0, P), ENOENT, {}),
    Row(BORROWS, ("unshare_guest", 0, P), ENOENT, {}),
    Row(BORROWS, ("unshare", 0, P), 0, {"pfn0.owner": "guest", "pfn0.s2": 0, "pfn0.locked_in": 1, **FLUSHED}),
    Row({}, ("unshare", 0, P), EPERM, {}),
    Row(SHARES, ("unshare", 0, P), EPERM, {}),
    Row(HOLDS, ("unshare", 0, P), EPERM, {}),
    *(Row(before, ("check_consent", 0, P, converting), ret, {}) for before, converting, ret in (
        (HOLDS, False, EBUSY), (HOLDS, True, EBUSY), ({**HOLDS, **DYING}, False, 0), ({**HOLDS, **DYING}, True, EBUSY),
        (BORROWS, False, EBUSY), (BORROWS, True, 0), ({**BORROWS, **DYING}, False, 0), ({**BORROWS, **DYING}, True, 0),
        ({}, False, 0), ({}, True, 0), (SHARES, False, 0), (SHARES, True, 0))),
    Row({}, ("reclaim_dying_guest_page", 0, P), 0, {}),
    Row(DYING, ("reclaim_dying_guest_page", 0, P), 0, {}),
    Row(HOLDS, ("reclaim_dying_guest_page", 0, P), EPERM, {}),
    Row(BORROWS, ("reclaim_dying_guest_page", 0, P), EPERM, {}),
    Row({**HOLDS, **DYING}, ("reclaim_dying_guest_page", 0, P), 0, {**RECLAIMED, "pfn0.s2": 1, "pfn0.locked_in": 0}),
    Row({**BORROWS, **DYING}, ("reclaim_dying_guest_page", 0, P), 0, RECLAIMED),
    Row(HOLDS, ("split_guest", 0, P), 0, {}),           # of a single page there is nothing to split
]

KVM = [
    Row({}, ("mmu_map", 1, P), 0, {"pfn0.gmap": 2}),
    Row({"pfn0.gmap": 2}, ("mmu_unmap", 1, P), 0, {"pfn0.gmap": 0}),
    Row({"pfn0.gmap": 2}, ("mmu_unmap", 0, P), 0, {}),
]

EXPORTED = {**GUESTS, "pfn0.s2": 1}
TAKEN = {"pfn0.s2": 0, **FLUSHED}
S390 = [
    Row({}, ("convert_to_secure", 0, P), 0, {"pfn0.owner": "guest", "pfn0.gmap": 1, **TAKEN}),
    Row(GUESTS, ("convert_to_secure", 0, P), 0, {"pfn0.gmap": 1, **FLUSHED}),
    Row(EXPORTED, ("convert_to_secure", 0, P), 0, {"pfn0.gmap": 1, **TAKEN}),
    Row({**EXPORTED, "gfn0.gpoison": 1}, ("convert_to_secure", 0, P), EPERM, {}),              # the host has written to it
    Row(SHARES, ("convert_to_secure", 0, P), EPERM, {}),
    Row({**BORROWS, "pfn0.gmap": 0}, ("convert_to_secure", 0, P), 0, {"pfn0.gmap": 1}),         # the host keeps its access
    Row(HAS, ("convert_from_secure", 0, P), 0, {"pfn0.gmap": 0, "pfn0.s2": 1}),
    Row(EXPORTED, ("convert_from_secure", 0, P), 0, {}),
    Row(BORROWS, ("convert_from_secure", 0, P), 0, {"pfn0.gmap": 0}),
    Row({}, ("convert_from_secure", 0, P), 0, {}),
    Row(HAS, ("destroy_secure", 0, P), 0,
        {"pfn0.owner": "host", "pfn0.s2": 1, "pfn0.gmap": 0, "pfn0.content": "zero", "page0.expect": "zero"}),
    Row(BORROWS, ("destroy_secure", 0, P), 0,
        {"pfn0.owner": "host", "pfn0.gmap": 0, "pfn0.content": "zero", "page0.expect": "zero"}),
    Row(SHARES, ("destroy_secure", 0, P), 0, {}),
    Row({}, ("destroy_secure", 0, P), 0, {}),
    Row(GUESTS, ("check_shared", P), EBUSY, {}),
    Row(BORROWS, ("check_shared", P), 0, {}),
    Row({}, ("check_shared", P), 0, {}),
    Row({}, ("map_shared", 0, P), 0, {"pfn0.owner": "shared", "pfn0.gmap": 1}),
    Row({**BORROWS, "pfn0.gmap": 0}, ("map_shared", 0, P), 0, {"pfn0.gmap": 1}),
    Row(GUESTS, ("map_shared", 0, P), EPERM, {}),
    Row(SHARES, ("unmap", 0, P), 0, {"pfn0.owner": "host", "pfn0.gmap": 0}),
    Row(BORROWS, ("unmap", 0, P), ENOENT, {}),
    Row(BORROWS, ("remove_shared", P), 0, {"pfn0.owner": "guest", **TAKEN}),
    Row(HAS, ("remove_shared", P), 0, {}),
    Row(SHARES, ("remove_shared", P), 0, {}),
]

# What a guest, or the host by an access of its own, makes the hypervisor do: (hypervisor, before, primitive, result, after).
BY_OTHERS = [
    ("gunyah", HOLDS, Primitive("guest_consents", (0,), "guest"), "ok",
     {"pfn0.locked_in": 0, "pfn0.content": "data", "page0.expect": "data"}),
    ("gunyah", SHARES, Primitive("guest_consents", (0,), "guest"), "ok", {}),
    ("gunyah", {**SHARES, "pfn0.locked_in": 1}, Primitive("guest_consents", (0,), "guest"), "ok", {}),
    ("gunyah", HAS, Primitive("guest_access", (0, False), "guest"), "ok", {"pfn0.locked_in": 1}),
    ("gunyah", SHARES, Primitive("guest_access", (0, False), "guest"), "ok", {}),
    ("pkvm", HOLDS, Primitive("guest_consents", (0,), "guest"), "ok",
     {"pfn0.owner": "borrowed", "pfn0.locked_in": 0, "pfn0.s2": 1, "pfn0.content": "data", "page0.expect": "data"}),
    ("pkvm", SHARES, Primitive("guest_consents", (0,), "guest"), "ok", {}),
    ("pkvm", BORROWS, Primitive("guest_consents", (0,), "guest"), "ok", {}),
    ("pkvm", HOLDS, Primitive("image_copy", (0,), "power"), "copied",                           # a plain access of the host
     {"pfn0.owner": "host", "pfn0.s2": 1, "pfn0.gmap": 0, "pfn0.locked_in": 0, "pfn0.content": "zero", "gfn0.gpoison": 1}),
    ("s390", HAS, Primitive("guest_consents", (0,), "guest"), "ok",
     {"pfn0.owner": "borrowed", "pfn0.s2": 1, "pfn0.content": "data", "page0.expect": "data"}),
    ("s390", SHARES, Primitive("guest_consents", (0,), "guest"), "ok", {}),
    ("s390", BORROWS, Primitive("guest_consents", (0,), "guest"), "ok", {}),
    ("s390", HAS, Primitive("image_copy", (0,), "power"), "copied", {"pfn0.s2": 1, "pfn0.gmap": 0}),
    ("s390", GUESTS, Primitive("image_copy", (0,), "power"), "copied", {"pfn0.s2": 1}),
]


def placed(before: dict[str, Any], hypervisor: str) -> Bench:
    """Page 0 of the file is frame 0, which is as *before* says; the host has a stale entry for frame 1."""
    return el2_bench.placed({"pfn1.stale": 1, **before}, hypervisor, Scene())


@pytest.mark.parametrize(("hypervisor", "row"), [
    *(("gunyah", row) for row in GUNYAH), *(("pkvm", row) for row in PKVM), *(("kvm", row) for row in KVM),
    *(("s390", row) for row in S390)])
def test_a_hypercall_answers_and_changes_what_it_should(hypervisor: str, row: Row) -> None:
    bench = placed(row.before, hypervisor)
    assert done(bench, Primitive("hyp_call", row.call, "module")) == (row.ret, row.after)


@pytest.mark.parametrize(("hypervisor", "before", "primitive", "result", "after"), BY_OTHERS)
def test_what_others_make_the_hypervisor_do(
    hypervisor: str, before: dict[str, Any], primitive: Primitive, result: str, after: dict[str, Any],
) -> None:
    assert done(placed(before, hypervisor), primitive) == (result, after)


@pytest.mark.parametrize("before", [GUESTS, {**SHARES, "pfn0.s2": 0}])
def test_what_no_guest_maps_or_owns_is_not_reclaimed_by_force(before: dict[str, Any]) -> None:
    bench = placed(before, "pkvm")
    assert done(bench, Primitive("image_copy", (0,), "power")) == (None, {})
    assert bench.machine.outcomes(bench.shared, 0, Primitive("image_copy", (0,), "power"))[0].notes[-1].survived is False


@pytest.mark.parametrize("ret", [1, -4096, True, "x", None, 0.0])
def test_a_result_that_is_none_is_told(ret: object) -> None:
    wrong = Bench("kvm").hypervisor.wrong_result("mmu_map", ret)
    assert wrong is not None
    assert repr(ret) in wrong


@pytest.mark.parametrize("ret", [0, -1, -4095])
def test_0_and_minus_errno_are_results(ret: int) -> None:
    assert Bench("kvm").hypervisor.wrong_result("mmu_map", ret) is None


def test_only_an_owner_is_recorded() -> None:
    for owner in ("host", "guest", "shared", "borrowed"):
        check_owner(owner)
    with pytest.raises(ValueError, match="'gust' is recorded as the owner of a page; an owner is host, guest, shared"):
        check_owner("gust")


def test_without_a_rule_of_its_own_a_hypervisor_takes_nothing_by_force() -> None:
    assert not Bench("gunyah").hypervisor.force_reclaim(None, 0)


@pytest.mark.parametrize(("hypervisor", "rows"), [("gunyah", GUNYAH), ("pkvm", PKVM), ("kvm", KVM), ("s390", S390)])
def test_every_hypercall_is_asked(hypervisor: str, rows: list[Row]) -> None:
    assert {row.call[0] for row in rows} == {*Bench(hypervisor).hypervisor.hypercalls}

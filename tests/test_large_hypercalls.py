"""What the hypervisors' own halves answer and change for a folio of two pages, and for a part of one.

Sources as in tests/test_hypercalls.py, and: Intel TDX Module, TDH.MEM.PAGE.AUG, RANGE.BLOCK, PAGE.REMOVE and PAGE.DEMOTE;
AMD64 APM volume 2, 15.36 (RMPUPDATE, PSMASH). A row says what was there, what was asked for, the answer, and all that
changed: whatever it does not name must be as it was.
"""

from __future__ import annotations

from errno import E2BIG, EBUSY, EINVAL, EIO, ENOENT, EPERM
from typing import Any, NamedTuple

import pytest
from el2_bench import done, placed

from guest_memfd.abstract.state import State
from guest_memfd.hypervisors import HYPERVISORS
from guest_memfd.words import pagestate
from guest_memfd.words.primitives import Folio, Primitive
from guest_memfd.words.scene import Scene, Slot
from guest_memfd.words.units import Gfn, Index

ONE_FOLIO = Scene("one-folio", "a folio of two pages", pages=2, frames=4, shared=(), slots=(Slot(Gfn(0), Index(0), 2),),
                  order=1)
F, FIRST, LAST = Folio(0, 1), Folio(0), Folio(1)


def both(**of_each: Any) -> dict[str, Any]:
    """The same of each of the folio's frames."""
    return {f"pfn{pfn}.{name}": value for pfn in range(2) for name, value in of_each.items()}


def leaf(kind: str, order: int) -> dict[str, Any]:
    return {f"folio{pfn}.{kind}": order for pfn in range(2)}


BY_PAGE = {"pfn0.gmap": 1, "pfn1.gmap": 2}
AS_ONE = {**BY_PAGE, **leaf("guest_leaf", 1)}
SPLIT = leaf("guest_leaf", 0)
NOT_MAPPED = {"pfn0.gmap": 0, "pfn1.gmap": 0}
NOT_MAPPED_AS_ONE = {**NOT_MAPPED, **SPLIT}
FLUSHED = {"pfn2.stale": 0}
GUESTS = {**both(owner="guest", s2=0, content="secret"), "page0.expect": "secret", "page1.expect": "secret"}
ENCRYPTED = {**GUESTS, **both(s2=1)}
HOLDS = {**GUESTS, **AS_ONE, **both(locked_in=1)}
SHARED = both(owner="shared")
LENT = {**SHARED, **AS_ONE}
BORROWED = {**both(owner="borrowed", content="data"), **AS_ONE}
DYING = {"vm0.vm": pagestate.DYING}
EMPTY = {**both(content="zero"), "page0.expect": "zero", "page1.expect": "zero"}
FORGOTTEN = {**both(content="zero"), "page0.expect": "any", "page1.expect": "any"}
LAST_GUESTS = {"pfn1.owner": "guest", "pfn1.s2": 0, "pfn1.content": "secret", "page1.expect": "secret"}
LAST_ENCRYPTED = {**LAST_GUESTS, "pfn1.s2": 1}


class Row(NamedTuple):
    before: dict[str, Any]
    call: tuple[Any, ...]
    ret: int
    after: dict[str, Any]


# What is true of a part only is refused, whichever part it is.
def parts(owner: str, call: tuple[Any, ...], errno: int, of_the_other: str = "host") -> list[Row]:
    return [Row({"pfn0.owner": one, "pfn1.owner": other}, call, -errno, {})
            for one, other in ((owner, of_the_other), (of_the_other, owner))]


KVM = [
    Row({}, ("mmu_map", 0, F), 0, AS_ONE),
    Row({}, ("mmu_map", 1, F), 0, {"pfn0.gmap": 2, "pfn1.gmap": 3}),                # no leaf where gfn and pfn disagree
    Row(AS_ONE, ("mmu_map", 0, LAST), 0, {"pfn0.gmap": 0, "pfn1.gmap": 1, **SPLIT}),
    Row(AS_ONE, ("mmu_unmap", 0, F), 0, NOT_MAPPED_AS_ONE),
    Row(AS_ONE, ("mmu_unmap", 1, LAST), 0, NOT_MAPPED_AS_ONE),                      # what maps it goes, as a whole
    Row(AS_ONE, ("mmu_unmap", 1, F), 0, {}),
    Row(BY_PAGE, ("mmu_unmap", 0, F), 0, NOT_MAPPED),
    Row(BY_PAGE, ("mmu_unmap", 1, LAST), 0, {"pfn1.gmap": 0}),
]

PKVM = [
    Row({}, ("donate_guest", 0, F), 0, {**both(owner="guest", s2=0, locked_in=1), **AS_ONE, **FLUSHED}),
    Row({}, ("donate_guest", 1, LAST), 0, {"pfn1.owner": "guest", "pfn1.s2": 0, "pfn1.locked_in": 1, "pfn1.gmap": 2,
                                           **leaf("s2_leaf", 0), **FLUSHED}),
    *parts("guest", ("donate_guest", 0, F), EPERM),
    *(Row({f"gfn{gfn}.gpoison": 1}, (call, 0, F), -EPERM, {}) for gfn in (0, 1) for call in ("donate_guest", "share_guest")),
    Row({"gfn2.gpoison": 1}, ("share_guest", 0, F), 0, {**SHARED, **AS_ONE}),
    Row({"gfn2.gpoison": 1}, ("share_guest", 1, F), -EPERM, {}),
    Row({"gfn0.gpoison": 1}, ("share_guest", 1, F), 0, {**SHARED, "pfn0.gmap": 2, "pfn1.gmap": 3}),
    *parts("guest", ("share_guest", 0, F), EPERM),
    *parts("shared", ("share_guest", 0, F), EPERM),
    Row(LENT, ("unshare_guest", 0, F), 0, {**both(owner="host"), **NOT_MAPPED_AS_ONE}),
    Row({**SHARED, **BY_PAGE}, ("unshare_guest", 1, LAST), 0, {"pfn1.owner": "host", "pfn1.gmap": 0}),
    Row(LENT, ("unshare_guest", 1, LAST), -E2BIG, {}),                              # a part of a block is not unmapped
    Row({**SHARED, **BY_PAGE}, ("unshare_guest", 0, F), 0, {**both(owner="host"), **NOT_MAPPED}),
    *parts("shared", ("unshare_guest", 0, F), ENOENT),
    Row(BORROWED, ("unshare", 0, F), 0, {**both(owner="guest", s2=0, locked_in=1), **FLUSHED}),
    *parts("borrowed", ("unshare", 0, F), EPERM, "guest"),
    *(Row(dict(zip(("pfn0.owner", "pfn1.owner"), owners, strict=True)), ("check_consent", 0, F, converting), ret, {})
      for owners, converting, ret in (
          (("host", "guest"), False, -EBUSY), (("guest", "host"), False, -EBUSY), (("host", "borrowed"), False, -EBUSY),
          (("borrowed", "guest"), True, -EBUSY), (("guest", "borrowed"), True, -EBUSY),
          (("borrowed", "borrowed"), True, 0), (("host", "borrowed"), True, 0), (("host", "host"), False, 0))),
    Row(HOLDS, ("reclaim_dying_guest_page", 0, F), -EPERM, {}),
    Row(LAST_GUESTS, ("reclaim_dying_guest_page", 0, F), -EPERM, {}),
    Row({**HOLDS, **DYING}, ("reclaim_dying_guest_page", 0, F), 0,
        {**both(owner="host", s2=1, locked_in=0), **FORGOTTEN, **NOT_MAPPED_AS_ONE}),      # as one, as it was the guest's
    Row({**HOLDS, **SPLIT, **DYING}, ("reclaim_dying_guest_page", 0, F), 0,
        {**both(owner="host", s2=1, locked_in=0), **FORGOTTEN, **NOT_MAPPED, **leaf("s2_leaf", 0)}),
    Row({**HOLDS, **DYING}, ("reclaim_dying_guest_page", 1, LAST), -E2BIG, {}),
    Row({**HOLDS, **SPLIT, **DYING}, ("reclaim_dying_guest_page", 1, LAST), 0, {
        "pfn1.owner": "host", "pfn1.s2": 1, "pfn1.locked_in": 0, "pfn1.content": "zero", "page1.expect": "any",
        "pfn1.gmap": 0, **leaf("s2_leaf", 0)}),
    Row({**LAST_GUESTS, **DYING, "pfn1.gmap": 2}, ("reclaim_dying_guest_page", 0, F), 0, {
        "pfn1.owner": "host", "pfn1.s2": 1, "pfn1.content": "zero", "page1.expect": "any", "pfn1.gmap": 0,
        **leaf("s2_leaf", 0)}),
    Row(HOLDS, ("split_guest", 0, F), 0, {**SPLIT, **leaf("s2_leaf", 0)}),
    Row(HOLDS, ("split_guest", 1, LAST), 0, {**SPLIT, **leaf("s2_leaf", 0)}),
    Row({**HOLDS, **SPLIT}, ("split_guest", 0, F), 0, {}),                          # there is no block
    Row(LENT, ("split_guest", 0, F), 0, SPLIT),                                     # the host maps its own as before
]

GUNYAH = [
    Row({}, ("donate_to_protected", F), 0, {**both(owner="guest", s2=0), **FLUSHED}),
    *parts("guest", ("donate_to_protected", F), EINVAL),
    Row(GUESTS, ("donate_from_protected", F), 0, both(owner="host", s2=1)),
    Row(GUESTS, ("donate_from_protected", LAST), 0, {"pfn1.owner": "host", "pfn1.s2": 1, **leaf("s2_leaf", 0)}),
    *parts("guest", ("donate_from_protected", F), EINVAL),
    *(Row({**GUESTS, **mapped}, ("donate_from_protected", F), -EBUSY, {})
      for mapped in ({"pfn0.gmap": 1}, {"pfn1.gmap": 2})),
    Row({}, ("donate_to_sibling", F), 0, SHARED),
    *parts("guest", ("donate_to_sibling", F), EINVAL),
    Row(LENT, ("donate_from_sibling", F), 0, {**both(owner="host"), **NOT_MAPPED_AS_ONE}),
    Row(LENT, ("donate_from_sibling", LAST), 0, {"pfn1.owner": "host", "pfn1.gmap": 0, **SPLIT}),   # the rest stays mapped
    Row({**SHARED, "pfn1.gmap": 2}, ("donate_from_sibling", F), 0, {**both(owner="host"), "pfn1.gmap": 0}),
    *parts("shared", ("donate_from_sibling", F), EINVAL),
    Row(GUESTS, ("map_private", 0, F), 0, {**AS_ONE, **both(locked_in=1)}),
    *parts("guest", ("map_private", 0, F), EINVAL),
    Row(SHARED, ("map_vmmio", 0, F), 0, AS_ONE),
    *parts("shared", ("map_vmmio", 0, F), EINVAL),
    Row({**GUESTS, **AS_ONE}, ("unmap_private", 0, F, True), 0, NOT_MAPPED_AS_ONE),
    Row({**GUESTS, **BY_PAGE}, ("unmap_private", 0, F, True), 0, NOT_MAPPED),
    Row({**GUESTS, **AS_ONE}, ("unmap_private", 0, F, False), 0, {**NOT_MAPPED_AS_ONE, "pfn0.gstale": 1, "pfn1.gstale": 2}),
    Row({**GUESTS, **AS_ONE}, ("unmap_private", 1, LAST, True), 0, {"pfn1.gmap": 0, **SPLIT}),
    *(Row({**GUESTS, **AS_ONE, f"pfn{pfn}.locked_in": 1}, ("unmap_private", 0, F, True), -EBUSY, {}) for pfn in (0, 1)),
    Row({**GUESTS, **AS_ONE, **DYING, "pfn1.locked_in": 1}, ("unmap_private", 0, F, True), 0,
        {**NOT_MAPPED_AS_ONE, "pfn1.locked_in": 0, "pfn1.content": "zero", "page1.expect": "any"}),
    Row({**HOLDS, **DYING}, ("unmap_private", 0, F, True), 0, {**NOT_MAPPED_AS_ONE, **both(locked_in=0), **FORGOTTEN}),
    *(Row({**GUESTS, **mapped}, ("unmap_private", 0, F, True), -EINVAL, {})
      for mapped in ({"pfn0.gmap": 1}, {"pfn1.gmap": 2}, {"pfn0.gmap": 2, "pfn1.gmap": 1})),
    *parts("guest", ("unmap_private", 0, F, True), EINVAL),
    Row(LENT, ("unmap_vmmio", 0, F, True), 0, NOT_MAPPED_AS_ONE),
    Row(LENT, ("unmap_vmmio", 1, LAST, True), 0, {"pfn1.gmap": 0, **SPLIT}),
    Row({**SHARED, "pfn1.gmap": 2}, ("unmap_vmmio", 0, F, True), -EINVAL, {"pfn1.gmap": 0}),
    *parts("shared", ("unmap_vmmio", 0, F, True), EINVAL),
]

ALIASES = [
    Row({}, ("map_shared", 0, F), 0, LENT),
    Row(SHARED, ("map_shared", 0, F), 0, AS_ONE),
    *parts("guest", ("map_shared", 0, F), EPERM),
    *parts("shared", ("map_shared", 0, F), EPERM),
    Row(ENCRYPTED, ("map_shared", 0, F), -EPERM, {}),
    Row(LENT, ("unmap_shared", 0, F), 0, {**both(owner="host"), **NOT_MAPPED_AS_ONE}),
    Row(LENT, ("unmap_shared", 1, LAST), 0, {"pfn1.owner": "host", **NOT_MAPPED_AS_ONE}),
    Row({**SHARED, **BY_PAGE}, ("unmap_shared", 1, LAST), 0, {"pfn1.owner": "host", "pfn1.gmap": 0}),
    Row({**SHARED, **BY_PAGE}, ("unmap_shared", 0, F), 0, {**both(owner="host"), **NOT_MAPPED}),
    Row({**ENCRYPTED, **AS_ONE}, ("unmap_shared", 0, F), 0, NOT_MAPPED_AS_ONE),
]
JUNK = {**both(content="data"), "page0.expect": "data", "page1.expect": "data"}

TDX = [
    *ALIASES,
    Row(JUNK, ("page_aug", 0, F), 0, {**both(owner="guest"), **EMPTY, **AS_ONE}),
    Row(ENCRYPTED, ("page_aug", 0, F), 0, AS_ONE),                                  # unblocked: with what it holds
    *parts("guest", ("page_aug", 0, F), EPERM),
    Row({**ENCRYPTED, **AS_ONE}, ("range_block", 0, F), 0, NOT_MAPPED_AS_ONE),
    Row({**ENCRYPTED, **AS_ONE}, ("range_block", 1, LAST), -EIO, {}),
    Row({**ENCRYPTED, **BY_PAGE}, ("range_block", 0, F), 0, NOT_MAPPED),
    Row({**ENCRYPTED, **BY_PAGE}, ("range_block", 1, LAST), 0, {"pfn1.gmap": 0}),
    Row(ENCRYPTED, ("page_remove", 0, F), 0, {**both(owner="host"), **EMPTY}),
    Row({**ENCRYPTED, **BY_PAGE}, ("page_remove", 0, F), 0, {**both(owner="host"), **EMPTY, **NOT_MAPPED}),
    Row(LAST_ENCRYPTED, ("page_remove", 0, F), 0, {"pfn1.owner": "host", "pfn1.content": "zero", "page1.expect": "zero"}),
    Row({**ENCRYPTED, "pfn0.gmap": 2, "pfn1.gmap": 3}, ("page_remove", 1, F), 0,
        {**both(owner="host"), **EMPTY, **NOT_MAPPED}),
    Row(JUNK, ("page_remove", 0, F), 0, {}),
    Row({**ENCRYPTED, **AS_ONE}, ("page_demote", 0, F), 0, SPLIT),
]

SNP = [
    *ALIASES,
    Row(JUNK, ("rmp_assign", 0, F), 0, {**both(owner="guest", s2=0), **EMPTY, **AS_ONE, **FLUSHED}),
    Row(JUNK, ("rmp_assign", 1, LAST), 0, {
        "pfn1.owner": "guest", "pfn1.s2": 0, "pfn1.content": "zero", "page1.expect": "zero", "pfn1.gmap": 2,
        **leaf("s2_leaf", 0), **FLUSHED}),
    Row(GUESTS, ("rmp_assign", 0, F), 0, AS_ONE),
    *parts("guest", ("rmp_assign", 0, F), EPERM),
    Row(GUESTS, ("rmp_unassign", F), 0, {**both(owner="host", s2=1), **EMPTY, **leaf("s2_leaf", 0)}),
    Row(GUESTS, ("rmp_unassign", LAST), -EIO, {}),                                  # FAIL_OVERLAP
    Row({**GUESTS, **leaf("s2_leaf", 0)}, ("rmp_unassign", LAST), 0,
        {"pfn1.owner": "host", "pfn1.s2": 1, "pfn1.content": "zero", "page1.expect": "zero"}),
    Row(LAST_GUESTS, ("rmp_unassign", F), 0,
        {"pfn1.owner": "host", "pfn1.s2": 1, "pfn1.content": "zero", "page1.expect": "zero", **leaf("s2_leaf", 0)}),
    Row({}, ("rmp_unassign", LAST), 0, {}),                                         # the host's already, in a large entry
    Row({**GUESTS, **AS_ONE}, ("psmash", 0, F), 0, {**SPLIT, **leaf("s2_leaf", 0)}),
    Row(GUESTS, ("npt_map", 0, F), 0, AS_ONE),
    Row(LAST_GUESTS, ("npt_map", 0, F), 0, {"pfn1.gmap": 2}),                       # what is not the guest's it cannot reach
    Row(JUNK, ("npt_map", 0, F), 0, {}),
    Row({**GUESTS, **AS_ONE}, ("npt_zap", 0, F), 0, NOT_MAPPED_AS_ONE),
    Row({**GUESTS, **AS_ONE}, ("npt_zap", 1, LAST), 0, NOT_MAPPED_AS_ONE),
]

CCA = [
    *ALIASES,
    Row(JUNK, ("data_map", 0, F), 0, {**both(owner="guest", s2=0), **EMPTY, **AS_ONE, **leaf("s2_leaf", 0), **FLUSHED}),
    Row(JUNK, ("data_map", 1, LAST), 0, {
        "pfn1.owner": "guest", "pfn1.s2": 0, "pfn1.content": "zero", "page1.expect": "zero", "pfn1.gmap": 2,
        **leaf("s2_leaf", 0), **FLUSHED}),
    Row({**JUNK, **LAST_GUESTS}, ("data_map", 0, F), 0, {        # what is delegated already keeps what it holds
        "pfn0.owner": "guest", "pfn0.s2": 0, "pfn0.content": "zero", "page0.expect": "zero", **AS_ONE,
        **leaf("s2_leaf", 0), **FLUSHED}),
    Row(GUESTS, ("data_map", 0, F), 0, AS_ONE),
    *parts("shared", ("data_map", 0, F), EPERM),
    Row({**GUESTS, **AS_ONE}, ("data_unmap", 0, F), 0, {**EMPTY, **NOT_MAPPED_AS_ONE}),
    Row({**GUESTS, **AS_ONE}, ("data_unmap", 1, LAST), -EIO, {}),
    Row({**GUESTS, **BY_PAGE}, ("data_unmap", 0, F), 0, {**EMPTY, **NOT_MAPPED}),
    Row({**GUESTS, **BY_PAGE}, ("data_unmap", 1, LAST), 0, {"pfn1.gmap": 0, "pfn1.content": "zero", "page1.expect": "zero"}),
    Row({**GUESTS, "pfn0.gmap": 2, "pfn1.gmap": 3}, ("data_unmap", 1, F), 0, {**EMPTY, **NOT_MAPPED}),
    Row({**JUNK, **BY_PAGE}, ("data_unmap", 0, F), 0, {}),
    Row(GUESTS, ("undelegate", F), 0, {**both(owner="host", s2=1), **leaf("s2_leaf", 0)}),
    Row(SHARED, ("undelegate", F), 0, {}),
    Row(LAST_GUESTS, ("undelegate", F), 0, {"pfn1.owner": "host", "pfn1.s2": 1, **leaf("s2_leaf", 0)}),
    *(Row({**GUESTS, **mapped}, ("undelegate", F), -EPERM, {}) for mapped in ({"pfn0.gmap": 1}, {"pfn1.gmap": 2})),
    Row({**GUESTS, **AS_ONE}, ("rtt_split", 0, F), 0, SPLIT),
]

ROWS = {"kvm": KVM, "pkvm": PKVM, "gunyah": GUNYAH, "tdx": TDX, "snp": SNP, "cca": CCA}


@pytest.mark.parametrize(("hypervisor", "row"), [(name, row) for name, rows in ROWS.items() for row in rows])
def test_a_hypercall_about_a_large_folio_answers_and_changes_what_it_should(hypervisor: str, row: Row) -> None:
    bench = placed({"pfn2.stale": 1, **row.before}, hypervisor, ONE_FOLIO, 2)
    assert done(bench, Primitive("hyp_call", row.call, "module")) == (row.ret, row.after)


@pytest.mark.parametrize("hypervisor", ROWS)
def test_every_hypercall_is_asked_of_a_large_folio(hypervisor: str) -> None:
    assert {row.call[0] for row in ROWS[hypervisor]} == {*HYPERVISORS[hypervisor].hypercalls}


@pytest.mark.parametrize(("folio", "splits"), [(F, 0), (LAST, 1)])
@pytest.mark.parametrize(("before", "call"), [({**GUESTS, **AS_ONE}, "unmap_private"), (LENT, "unmap_vmmio")])
def test_gunyah_splits_only_what_goes_in_part(before: dict[str, Any], call: str, folio: Folio, splits: int) -> None:
    bench = placed(before, "gunyah", ONE_FOLIO, 2)
    (begun,) = bench.machine.outcomes(bench.shared, 0, Primitive("begin_op", ("punch", 0, 2, None), "library"))
    bench.shared = begun.shared
    (outcome,) = (o for o in bench.machine.outcomes(
        bench.shared, 0, Primitive("hyp_call", (call, folio.pfn, folio, True), "module")) if not o.failed)
    assert State(outcome.shared).ghost(0).splits == splits


TWO_FOLIOS = Scene("two-folios", "two folios of two pages", pages=4, frames=4, shared=(), slots=(Slot(Gfn(0), Index(0), 4),),
                   order=1)
SECOND = Folio(2, 1)
SPLITS = [
    *((name, Primitive("guest_consents", (gfn,), "guest"), gfn // 2) for name in ("pkvm", "gunyah") for gfn in range(4)),
    *(("pkvm", Primitive("image_copy", (pfn,), "power"), pfn // 2) for pfn in range(4)),
    *((name, Primitive("hyp_call", (call, folio.pfn, folio), "module"), folio.pfn // 2) for folio in (F, SECOND)
      for name, call in (("pkvm", "split_guest"), ("tdx", "page_demote"), ("snp", "psmash"), ("cca", "rtt_split"))),
]


@pytest.mark.parametrize(("hypervisor", "made", "which"), SPLITS)
def test_the_leaf_next_to_the_one_that_is_split_stays(hypervisor: str, made: Primitive, which: int) -> None:
    """Of two blocks, one after the other, that the guest has."""
    mapped = {f"pfn{pfn}.{name}": value for pfn in range(4) for name, value in (
        ("owner", "guest"), ("s2", int(hypervisor == "tdx")), ("gmap", pfn + 1), ("locked_in", 1), ("content", "secret"))}
    mapped |= {f"folio{pfn}.guest_leaf": 1 for pfn in range(4)}
    bench = placed({**mapped, **{f"page{i}.expect": "secret" for i in range(4)}}, hypervisor, TWO_FOLIOS, 4)
    _, changed = done(bench, made)
    assert {name for name in changed if name.endswith("guest_leaf")} == {
        f"folio{2 * which + at}.guest_leaf" for at in range(2)}


@pytest.mark.parametrize("made", [Primitive("image_copy", (1,), "power"), Primitive("guest_consents", (1,), "guest")])
def test_of_a_block_one_page_is_taken_and_the_others_stay(made: Primitive) -> None:
    """pKVM splits the block of which the host has touched, or the guest has shared, a page."""
    bench = placed(HOLDS, "pkvm", ONE_FOLIO, 2)
    _, changed = done(bench, made)
    assert {name for name in changed if "0." in name} == {"folio0.guest_leaf", "folio0.s2_leaf"}
    assert (changed["folio1.guest_leaf"], changed["pfn1.locked_in"], changed["pfn1.s2"]) == (0, 0, 1)

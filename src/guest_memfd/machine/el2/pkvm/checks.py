"""What has to be so before a page changes hands. The functions answer, and change nothing.

The names are those of arch/arm64/kvm/hyp/nvhe/mem_protect.c (7.3), without the underscores. Frame numbers and orders
(0, 9, 18) count 4 KiB pages; an answer is 0 or -errno.
"""

from __future__ import annotations

from errno import E2BIG, EINVAL, ENOENT, EPERM
from typing import TYPE_CHECKING

from guest_memfd.errors import EHWPOISON
from guest_memfd.machine.el2.kvm.pgtable import STATE_SHIFT
from guest_memfd.machine.el2.pkvm.annotation import Annotation, AnnotationType
from guest_memfd.machine.el2.pkvm.states import ORDERS, HypPage, PkvmState
from guest_memfd.machine.hw.arm64.descriptor import Entry
from guest_memfd.words.units import Gfn, Pfn, gfn_to_gpa, pfn_to_pa

if TYPE_CHECKING:
    from guest_memfd.machine.el2.pkvm.el2 import El2
    from guest_memfd.machine.el2.pkvm.vm import PkvmHypVm

_ORDER_OF = {1 << order: order for order in ORDERS}


def transition_order(nr: int, *frames: int) -> int:
    """The order of *nr* pages at *frames* if that is one leaf, else -EINVAL (guest_check_transition_size())."""
    order = _ORDER_OF.get(nr, -EINVAL)
    return -EINVAL if order >= 0 and any(frame & nr - 1 for frame in frames) else order


def range_allowed_memory(el2: El2, pfn: Pfn, nr: int) -> int:
    """-EPERM: no memory, or no one's; -EINVAL: the range leaves its region (check_range_allowed_memory())."""
    # Devices are never donated, nor memory that firmware keeps.
    region = el2.host.region(pfn_to_pa(pfn))
    if region is None or region.nomap:
        return -EPERM
    return 0 if pfn_to_pa(pfn + nr) <= region.end else -EINVAL


def host_page_state(el2: El2, pfn: Pfn, order: int, state: PkvmState) -> int:
    """-EPERM unless all pages are in *state* for the host; what `range_allowed_memory` says comes first."""
    ret = range_allowed_memory(el2, pfn, 1 << order)
    if ret:
        return ret
    return 0 if all(page.host is state for page in el2.vmemmap.pages(pfn, order)) else -EPERM


def host_and_hyp(el2: El2, pfn: Pfn, order: int, host: PkvmState, hyp: PkvmState) -> int:
    """As `host_page_state`, and -EPERM unless all pages are in state *hyp* for the hypervisor."""
    ret = host_page_state(el2, pfn, order, host)
    if ret:
        return ret
    return 0 if all(page.hyp is hyp for page in el2.vmemmap.pages(pfn, order)) else -EPERM


def guest_page_state(entry: Entry) -> PkvmState:
    """From the software bits of an entry that maps, inferred for one that does not (guest_get_page_state())."""
    # A valid leaf carries its state in software bits; an invalid one says it by its note, or has nothing to say.
    if entry.valid:
        return PkvmState(entry.value >> STATE_SHIFT & 3)
    note = Annotation.decode(entry.value)
    return PkvmState.POISON if note and note.type is AnnotationType.POISONED else PkvmState.NOPAGE


def valid_guest_leaf(vm: PkvmHypVm, gfn: Gfn, order: int) -> tuple[int, Entry]:
    """The guest's entry and 0, -EHWPOISON, -ENOENT, or -E2BIG for another order (get_valid_guest_pte())."""
    entry = vm.pgt.leaf(gfn_to_gpa(gfn))
    state = guest_page_state(entry)
    if state is PkvmState.POISON:
        return -EHWPOISON, entry
    if state is PkvmState.NOPAGE:
        return -ENOENT, entry
    return (0 if entry.order == order else -E2BIG), entry


def guest_is_empty(vm: PkvmHypVm, gfn: Gfn, order: int) -> bool:
    """Whether the guest is at NOPAGE there; POISON is not."""
    return vm.pgt.empty(gfn_to_gpa(gfn), order)


def may_share(page: HypPage, protected: bool) -> bool:
    """Whether one more guest may borrow a page; ADDITION: a *protected* guest borrows it alone."""
    if page.host is PkvmState.OWNED:
        return page.hyp is PkvmState.NOPAGE
    # SHARED_OWNED without a guest is shared with EL2 or the secure world: a guest must not join them.
    return page.host is PkvmState.SHARED_OWNED and page.guests > 0 and not protected

"""Host mapping: the only code that takes pages out of the kernel's direct map and puts them back, flush included.

Theory of operation. The kernel maps all RAM in its direct map. Anything in the kernel may read through it by mistake: a
word load that runs over the end of a page (load_unaligned_zeropad()), /proc/kcore, a speculative access. A page that a
hypervisor withholds must not be there, or such a read ends in an abort of stage 2, and under Gunyah in a panic. With a hole
in stage 1 the same read is an ordinary translation fault, which the exception tables fix up.

State: one mark for each folio (folio->private, under the folio lock), which says that it may be out of the direct map, and
one count for the whole system of pages that are away (power.py), for hibernation, which would map them to copy them.

Invariants:

- A page whose entry is not present is marked. So code that frees or maps a folio looks at the mark, not at the page table.
- A marked page is up to date: it is zeroed through the direct map.
- A marked page is counted, if the policy is to count, and no other page is: while the folio lock is not held, the two agree.
- A marked page may be shared. Its mark says only that the host must restore the entry before it uses the page. That is
  why no caller has anything to undo after an error, and why a conversion to shared needs no access to the direct map.

Order of `zap`: count, mark, clear the entry, flush. Counting comes first because it can be refused: hibernation that has
begun to prepare lets no page leave. The mark comes before the entry, so that there is no moment at which the entry is
gone and the mark does not say so. The flush comes last and belongs to removal: a TLB entry outlives the table entry, and
until all CPUs have dropped it the page can still be reached. The caller may rely on the zap only after the flush;
`zap_noflush` is for batches, which flush once for all folios (convert.py).

Order of `restore`: set the entry, clear the mark, take it off the count. There is no flush: an entry that is not present
is never in a TLB (Arm ARM D8.16; mm/secretmem.c does the same). It can fail where the kernel merges leaves and has to
split one again. The failure is want of memory, so it is tried `ATTEMPTS` times. Then the caller keeps the page: it must
not be freed with a hole, since the allocator and its next owner write through the direct map.

Left out: the setters fail for -ENOMEM only; a kernel that cannot change single entries is refused at creation (file.py).
What each release of arm64 does to the tables is in machine/linux/linear_map.py, not here.

Source of the shape: mm/secretmem.c; folio_zap_direct_map()/folio_restore_direct_map() of "Direct Map Removal Support
for guest_memfd" v12; the flush belongs to removal (Mike Rapoport on the first library, 19 Aug 2024).
Tests: tests/test_planted.py has a mistake for each step, and the law that it breaks: NoFlush, FlushFirst and
ZapFailureLeavesMark one-owner; ZapFailureLeavesCount and RestoredOnce nothing-lost; FreedWithHole host-survives.
"""

from __future__ import annotations

from guest_memfd.core.gmem import Gmem
from guest_memfd.words.primitives import Folio, Steps

ATTEMPTS = 2
"""How often an entry is put back before the page is given up: the failure is want of memory, which passes."""


def zap(gmem: Gmem, folio: Folio) -> Steps[int]:
    """Take the locked *folio* out of the direct map and out of every CPU's TLB; 0, -ENOMEM or -EAGAIN (power)."""
    ret = yield from gmem.zap_noflush(folio)
    if not ret:
        yield from gmem.flush((folio,))
    return ret


def zap_noflush(gmem: Gmem, folio: Folio) -> Steps[int]:
    """As `zap`, for a batch: the caller calls `flush` before anybody may rely on it."""
    host = gmem.host
    # Counted before it leaves, in one step with the check for hibernation. Counted afterwards, an image could be
    # begun in between that does not know of the page.
    ret = yield from gmem.account(folio.nr)
    if ret:
        return ret
    # The mark before the entry: code that finds an unmarked folio writes to it through the direct map without
    # looking, and that write would fault.
    yield from host.folio_set_no_direct_map(folio, True)
    ret = yield from host.set_direct_map_invalid_noflush(folio)
    if ret:
        # The entry is as it was, so mark and count must be as they were: a mark that stays makes the next zap be
        # skipped, and the guest would get a page that the host still maps.
        yield from host.folio_set_no_direct_map(folio, False)
        yield from gmem.account(-folio.nr)
    return ret


def flush(gmem: Gmem, folios: tuple[Folio, ...]) -> Steps[None]:
    """One flush for a batch of zapped folios."""
    yield from gmem.host.flush_tlb_kernel_range(folios)


def restore(gmem: Gmem, folio: Folio) -> Steps[int]:
    """Put the locked, marked *folio* back into the direct map; 0, or -ENOMEM and it stays marked."""
    host = gmem.host
    # Splitting a leaf that was merged needs a table page. Want of memory passes, and the other end of a failure
    # is to lose the page.
    for _attempt in range(ATTEMPTS):
        ret = yield from host.set_direct_map_default_noflush(folio)
        if not ret:
            # After the entry is back, never before: an unmarked folio is used at once.
            yield from host.folio_set_no_direct_map(folio, False)
            yield from gmem.account(-folio.nr)
            return 0
    return ret

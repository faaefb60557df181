"""Large folios: when one becomes single pages, and when they become one again.

Theory of operation. A large folio is one thing throughout: private, and bound to nothing or to one run of gfns (folio.py,
`order_at`). So who makes a border inside of it - a conversion, a bind, an unbind, a punch - splits it first. A split frees
nothing, moves nothing and takes nothing from anybody: the guest keeps all pages, with their contents, and what it holds on
to. Only what was kept as one is kept page by page from then on, in this order:

1. the hypervisor's leaves (`ops.split`),
2. the hole in the direct map, if there is one: putting a page back is then the change of one entry, which cannot fail,
3. the folio, with its entry in the page cache. No one may refer to it but the page cache and us.

Each of these can fail, each leaves what can stay as it is, and all of them come before the first step of the request that
is seen by anybody. A request that fails here has changed nothing, and may be repeated. Of a range only the folios at its two
ends can be cut; a conversion to shared splits the others, too, since shared pages are single ones: then a pin on one of them
stands against the conversion of no other.

Pages become one folio again at the end of a conversion to private, where the whole folio is private and its pages lie side
by side, as they do if they have been one before. A merge is given up where anything stands against it; nothing depends on
it. Broken memory does: a page that is known to be broken is never made part of a larger folio, or no one could say which.

Left out: leaves of the direct map are not made large again (arm64 never does, x86 by itself); the guest's leaf becomes large
with its next fault there. A folio of which one page is broken is withheld as a whole until it leaves the file.

Source: "guest_memfd: HugeTLB support", RFC v2 (14 May 2025) and its rework of 2026, for splitting in place; the order of the
steps answers Yan Zhao (16 Jun 2025: split before zap) and (29 May 2025: an undo that needs memory).
"""

from __future__ import annotations

from errno import EAGAIN, EBUSY

from guest_memfd.core.gmem import Gmem, Held
from guest_memfd.words.primitives import Steps
from guest_memfd.words.units import FIRST_PAGE, Index, span


def is_cut(held: Held, start: Index, nr: int) -> bool:
    """Whether [start, start+nr) has a part of the folio, and not all of it."""
    return held.pgoff < start or held.pgoff + held.folio.nr > start + nr


def cut_off(gmem: Gmem, start: Index, nr: int, folios: tuple[Held, ...]) -> Steps[tuple[int, Index, tuple[Held, ...]]]:
    """`single_pages`, of the folios that [start, start+nr) cuts."""
    return (yield from gmem.single_pages(start, nr, folios, tuple(held for held in folios if is_cut(held, start, nr))))


def single_pages(
    gmem: Gmem, start: Index, nr: int, folios: tuple[Held, ...], cut: tuple[Held, ...],
) -> Steps[tuple[int, Index, tuple[Held, ...]]]:
    """Split those of *folios*, all that are present in [start, start+nr), that are in *cut*, too.

    0, and all that are present then; or -errno, the page index, and *folios*, of which the references are the caller's.
    """
    if not cut or not gmem.splits:
        return 0, FIRST_PAGE, folios
    ret, index = yield from gmem.split(cut)
    if ret:
        # As every other reference that stands against a conversion: who asked may try again.
        return (-EAGAIN if ret == -EBUSY else ret), max(index, start), folios
    # What was held before the split names folios that are no more.
    yield from gmem.put_all(folios)
    return 0, FIRST_PAGE, (yield from gmem.present(start, nr))


def split(gmem: Gmem, folios: tuple[Held, ...]) -> Steps[tuple[int, Index]]:
    """Make single pages of *folios*, and let everybody keep what he has of them.

    (0, 0), or -errno and the page index of the folio: -EBUSY while someone refers to a part, -ENOMEM, or as `ops.split`.
    Folios before that one are split, which no one can tell.
    """
    for held in folios:
        locked = yield from gmem.host.lock_folio(held.folio)
        ret = yield from gmem.split_locked(held, locked.no_direct_map)
        yield from gmem.host.unlock_folio(held.folio._replace(order=0) if not ret else held.folio)
        if ret:
            return ret, held.pgoff
    return 0, FIRST_PAGE


def split_locked(gmem: Gmem, held: Held, marked: bool) -> Steps[int]:
    """Split the locked folio: the steps 1 to 3 of the theory; 0, -EBUSY, -ENOMEM, or as `ops.split`."""
    ret = 0
    if held.gfn is not None:
        ret = yield from gmem.ops.split(held.gfn, held.folio)
    if not ret and marked:
        ret = yield from gmem.host.split_direct_map(held.folio)
    return ret or (yield from gmem.host.split_folio(held.folio))


def merge(gmem: Gmem, start: Index, nr: int) -> Steps[None]:
    """Make large folios of the pages around [start, start+nr) where they are one thing again, under the invalidate lock.

    The caller has no references on them.
    """
    size = 1 << gmem.order
    if not gmem.splits or size == 1:
        return
    first = Index(start & -size)
    for head in span(first, -(-(start + nr - first) // size), size):
        if (yield from gmem.order_at(head)):
            yield from gmem.host.merge_folio(head, gmem.order)

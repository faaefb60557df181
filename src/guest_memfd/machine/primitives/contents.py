"""The kernel touches memory on the emulated host: one real instruction per page-table leaf, and what comes of it.

An access runs our kernel text on the CPU. What stops it - a stage-1 fault, an abort that EL2 injects - goes through the
kernel's own fault table; this file only tells the laws what was seen.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from guest_memfd.core.hypervisor import DATA_ABORT, SEA
from guest_memfd.machine.board.hostcpu import Aborted, Ran
from guest_memfd.machine.board.tracer import KERNEL_TOKEN
from guest_memfd.machine.linux.direct_map import level_size
from guest_memfd.machine.linux.folio import LinuxFolio
from guest_memfd.machine.linux.panic import KernelPanic
from guest_memfd.machine.linux.snapshot import safe_copy_page
from guest_memfd.machine.primitives.base import Base
from guest_memfd.machine.primitives.services import Services
from guest_memfd.words import facts
from guest_memfd.words.pagestate import DATA, ZERO
from guest_memfd.words.primitives import Folio
from guest_memfd.words.units import PAGE, Pa, Pfn, pa_to_pfn, pfn_to_pa

WORD = 8
BEFORE = 4
"""load_unaligned_zeropad() starts this many bytes before the end of the page in front."""


def note_access(host: Base, page: LinuxFolio, pa: Pa, who: str, what: str, via: str, write: bool, content: int) -> None:
    """Record that *who* reached the contents of *page* at *pa*, which were *content* until then."""
    host.notes.append(host.machine.tracer.access(host, page, pa, who, what, via, write, content))


# Every abort that the CPU took on the way, as a fact.
def _note_aborts(host: Base, what: str, pa: Pa, aborts: list[Aborted], *, survived: bool) -> None:
    for aborted in aborts:
        kind = ("translation fault" if aborted.stage == 1 else SEA if aborted.external else DATA_ABORT)
        host.notes.append(facts.Abort(what, aborted.stage, host.machine.number(pa), kind, survived,
                                      aborted.words()))


def kernel_access(
    host: Base, page: LinuxFolio, who: str, what: str, symbol: str, *arguments: int, at: Pa | None = None,
) -> str:
    """Call kernel function *symbol*, which means the page of *page* at physical address *at*; None: its first.

    ``ok``, ``fixed`` (the exception table), or the end of the kernel.
    """
    machine, pa = host.machine, page.pa if at is None else at
    # Asked before the access: if it arrives although the table has no entry, it came through a TLB.
    stale = not machine.linear_map.kernel_page_present(pa)
    content = machine.tracer.content(pa)
    ran = _run(host, what, pa, lambda: machine.cpu.call(symbol, *arguments))
    if ran.fixed:
        return "fixed"
    # Compared with where the instruction really arrived. A direct map that leads to another page would otherwise
    # go unseen.
    if not any(page.pa <= to < page.pa + page.size and machine.spot(page, to) == pa for to in ran.reached):
        host.die(f"{what} reaches {ran.reached[-1]:#x} and not {pa:#x}: the direct map leads astray")
    note_access(host, page, pa, who, what, "stale TLB entry" if stale else "direct map", symbol == "plain_write",
                     ZERO if ran.reclaimed else content)
    return "ok"


def _run(host: Base, what: str, pa: Pa, run: Callable[[], Ran]) -> Ran:
    cpu = host.machine.cpu
    try:
        ran = run()
    except KernelPanic:
        _note_aborts(host, what, pa, cpu.aborts, survived=False)
        raise
    if ran.reclaimed:
        host.machine.tracer.reclaimed_by_force(host, pa)
    _note_aborts(host, what, pa, cpu.aborts, survived=True)
    return ran


def kernel_write(host: Base, page: LinuxFolio, start: Pa, size: int, who: str, what: str) -> None:
    """Store to [start, start+size) of *page*, once for what one word of it stands for."""
    machine, lm = host.machine, host.machine.linear_map
    pa = start
    if machine.watched:                                 # a folio of more than a page has two that are watched
        for at in (at for at in machine.watched if start <= at < start + size):
            kernel_access(host, page, who, what, "plain_write", lm.va(at), at=at)
        return
    while pa < start + size:
        kernel_access(host, page, who, what, "plain_write", lm.va(pa))
        # One store for each leaf: what holds for one word of it holds for all, and a folio of 1 GiB has 2^27
        # words.
        step = level_size(lm.leaf(pa).level)
        pa += step - lm.va(pa) % step


def load_unaligned_zeropad(host: Base, pfn: Pfn) -> str:
    """A word load from the page before that runs into *pfn*: it has an exception-table entry."""
    page, pa = _meant(host, pfn)
    return kernel_access(host, page, "kernel", "load_unaligned_zeropad", "load_unaligned_zeropad",
                         host.machine.linear_map.va(pa) - BEFORE, at=pa)


# The folio that *pfn* is part of, and the page of it that is meant.
def _meant(host: Base, pfn: Pfn) -> tuple[LinuxFolio, Pa]:
    page = host.machine.page_at(pfn_to_pa(pfn))
    return page, host.machine.spot(page, pfn_to_pa(pfn))


def copy_from_kernel_nofault(host: Base, pfn: Pfn) -> str:
    """/proc/kcore: it has an exception-table entry; poisoned pages are skipped (fs/proc/kcore.c)."""
    page, pa = _meant(host, pfn)
    if pa in page.broken:
        return "skipped"
    return kernel_access(host, page, "kernel", "copy_from_kernel_nofault", "copy_from_kernel_nofault",
                         host.machine.bounce_va, host.machine.linear_map.va(pa), WORD, at=pa)


def read_folio(host: Base, folio: Folio) -> str:
    """A plain read through the direct map, of a folio that the reader found in the page cache."""
    page = host.page(folio)
    for pa in host.machine.named(*area(folio)):
        kernel_access(host, page, "kernel", "read_folio", "plain_read", host.machine.linear_map.va(pa), at=pa)
    return "ok"


def area(folio: Folio) -> tuple[Pa, int]:
    """Where the pages begin that *folio* names, whatever has become of it, and how many bytes they are."""
    return pfn_to_pa(folio.pfn), folio.nr * PAGE


def clear_folio(host: Base, folio: Folio) -> None:
    """A plain write through the direct map."""
    kernel_write(host, host.page(folio), *area(folio), "library", "clear_folio")
    _zeroed(host, folio)


def clear_folio_local(host: Base, folio: Folio) -> None:
    """A write through a mapping that this CPU alone has for the moment (text_poke()): stage 2 still has a say."""
    _write_local(host, folio, "clear_folio_local")
    _zeroed(host, folio)


def _write_local(host: Base, folio: Folio, what: str) -> None:
    machine, page = host.machine, host.page(folio)
    for pa in machine.named(*area(folio)):
        content = machine.tracer.content(pa)
        with machine.poking(Folio(pa_to_pfn(pa), 0) if machine.watched else folio) as va:
            ran = _run(host, what, pa, partial(machine.cpu.call, "plain_write", va))
        note_access(host, page, pa, "library", what, "local mapping", True, ZERO if ran.reclaimed else content)


def write_folio(host: Base, folio: Folio, local: bool) -> None:
    """What user space gives, through the direct map or through a mapping of this CPU alone."""
    if local:
        _write_local(host, folio, "write_folio")
    else:
        kernel_write(host, host.page(folio), *area(folio), "library", "write_folio")
    for pa in host.machine.named(*area(folio)):
        written(host, host.page(folio), pa, KERNEL_TOKEN)


def _zeroed(host: Base, folio: Folio) -> None:
    host.machine.ram.zero(*area(folio))
    host.machine.tracer.zeroed(*area(folio))


def image_copy(host: Base, pfn: Pfn) -> str:
    """safe_copy_page(): map a hole for the moment, copy plainly, make the hole again (kernel/power/snapshot.c)."""
    machine = host.machine
    page, at = _meant(host, pfn)
    if not machine.allocated(page) or at in page.broken:
        return "skipped"

    def read(pa: Pa) -> bytes:
        kernel_access(host, page, "image", "safe_copy_page", "plain_read", machine.linear_map.va(pa), at=at)
        return machine.ram.read(pa, PAGE)

    # The kernel's own procedure, with the copy replaced by one that the laws are told of.
    safe_copy_page(Services(machine, read), at)
    return "copied"


def written(host: Base, page: LinuxFolio, pa: Pa, token: bytes) -> None:
    """Someone of the host's side has put *token* there, in the page of *page* at *pa*: both sides may know it."""
    host.machine.ram.write(pa, token)
    host.machine.tracer.wrote(page, pa, DATA)

"""The kernel touches memory on the emulated host: one real instruction per page-table leaf, and what comes of it.

An access runs our kernel text on the CPU. What stops it - a stage-1 fault, an abort that EL2 injects - goes through the
kernel's own fault table; this file only tells the laws what was seen.
"""

from __future__ import annotations

from collections.abc import Callable

from guest_memfd.core.hypervisor import DATA_ABORT, SEA
from guest_memfd.machine.board.hostcpu import Aborted, Ran
from guest_memfd.machine.board.tracer import KERNEL_TOKEN
from guest_memfd.machine.hw.ram import PAGE
from guest_memfd.machine.linux.direct_map import level_size
from guest_memfd.machine.linux.folio import LinuxFolio
from guest_memfd.machine.linux.panic import KernelPanic
from guest_memfd.machine.linux.snapshot import safe_copy_page
from guest_memfd.machine.primitives.base import Base
from guest_memfd.machine.primitives.services import Services
from guest_memfd.words import facts
from guest_memfd.words.pagestate import DATA, ZERO
from guest_memfd.words.primitives import Folio
from guest_memfd.words.units import Pa, Pfn, pfn_to_pa

WORD = 8
BEFORE = 4
"""load_unaligned_zeropad() starts this many bytes before the end of the page in front."""


def note_access(host: Base, page: LinuxFolio, who: str, what: str, via: str, write: bool, content: int) -> None:
    """Record that *who* reached the contents, which were *content* until then."""
    host.notes.append(host.machine.tracer.access(host, page, who, what, via, write, content))


# Every abort that the CPU took on the way, as a fact.
def _note_aborts(host: Base, what: str, page: LinuxFolio, aborts: list[Aborted], *, survived: bool) -> None:
    for aborted in aborts:
        kind = ("translation fault" if aborted.stage == 1 else SEA if aborted.external else DATA_ABORT)
        host.notes.append(facts.Abort(what, aborted.stage, host.machine.number(page.pa), kind, survived,
                                      aborted.words()))


def kernel_access(host: Base, page: LinuxFolio, who: str, what: str, symbol: str, *arguments: int) -> str:
    """Call kernel function *symbol*: ``ok``, ``fixed`` (the exception table), or the end of the kernel."""
    machine = host.machine
    # Asked before the access: if it arrives although the table has no entry, it came through a TLB.
    stale = not machine.linear_map.kernel_page_present(page.pa)
    content = machine.tracer.content(page)
    ran = _run(host, what, page, lambda: machine.cpu.call(symbol, *arguments))
    if ran.fixed:
        return "fixed"
    # Compared with where the instruction really arrived. A direct map that leads to another page would otherwise
    # go unseen.
    if not any(page.pa <= pa < page.pa + page.size for pa in ran.reached):
        host.die(f"{what} reaches {ran.reached[-1]:#x} and not {page.pa:#x}: the direct map leads astray")
    note_access(host, page, who, what, "stale TLB entry" if stale else "direct map", symbol == "plain_write",
                     ZERO if ran.reclaimed else content)
    return "ok"


def _run(host: Base, what: str, page: LinuxFolio, run: Callable[[], Ran]) -> Ran:
    cpu = host.machine.cpu
    try:
        ran = run()
    except KernelPanic:
        _note_aborts(host, what, page, cpu.aborts, survived=False)
        raise
    if ran.reclaimed:
        host.machine.tracer.reclaimed_by_force(host, page)
    _note_aborts(host, what, page, cpu.aborts, survived=True)
    return ran


def kernel_write(host: Base, page: LinuxFolio, who: str, what: str) -> None:
    """Store to every leaf through which the direct map shows *page*: what holds for one word of it holds for all."""
    lm = host.machine.linear_map
    pa = page.pa
    while pa < page.pa + page.size:
        kernel_access(host, page, who, what, "plain_write", lm.va(pa))
        # One store for each leaf: what holds for one word of it holds for all, and a folio of 1 GiB has 2^27
        # words.
        size = level_size(lm.leaf(pa).level)
        pa += size - lm.va(pa) % size


def load_unaligned_zeropad(host: Base, pfn: Pfn) -> str:
    """A word load from the page before that runs into *pfn*: it has an exception-table entry."""
    page = host.machine.page_at(pfn_to_pa(pfn))
    return kernel_access(host, page, "kernel", "load_unaligned_zeropad", "load_unaligned_zeropad",
                              host.machine.linear_map.va(page.pa) - BEFORE)


def copy_from_kernel_nofault(host: Base, pfn: Pfn) -> str:
    """/proc/kcore: it has an exception-table entry; poisoned pages are skipped (fs/proc/kcore.c)."""
    page = host.machine.page_at(pfn_to_pa(pfn))
    if page.hwpoison:
        return "skipped"
    return kernel_access(host, page, "kernel", "copy_from_kernel_nofault", "copy_from_kernel_nofault",
                              host.machine.bounce_va, host.machine.linear_map.va(page.pa), WORD)


def read_folio(host: Base, folio: Folio) -> str:
    """A plain read through the direct map, of a folio that the reader found in the page cache."""
    page = host.page(folio)
    return kernel_access(host, page, "kernel", "read_folio", "plain_read", host.machine.linear_map.va(page.pa))


def clear_folio(host: Base, folio: Folio) -> None:
    """A plain write through the direct map."""
    page = host.page(folio)
    kernel_write(host, page, "library", "clear_folio")
    _zeroed(host, page)


def clear_folio_local(host: Base, folio: Folio) -> None:
    """A write through a mapping that this CPU alone has for the moment (text_poke()): stage 2 still has a say."""
    page = host.page(folio)
    _write_local(host, page, "clear_folio_local")
    _zeroed(host, page)


def _write_local(host: Base, page: LinuxFolio, what: str) -> None:
    machine = host.machine
    content = machine.tracer.content(page)
    with machine.poking(page) as va:
        ran = _run(host, what, page, lambda: machine.cpu.call("plain_write", va))
    note_access(host, page, "library", what, "local mapping", True, ZERO if ran.reclaimed else content)


def write_folio(host: Base, folio: Folio, local: bool) -> None:
    """What user space gives, through the direct map or through a mapping of this CPU alone."""
    page = host.page(folio)
    if local:
        _write_local(host, page, "write_folio")
    else:
        kernel_write(host, page, "library", "write_folio")
    written(host, page, KERNEL_TOKEN)


def _zeroed(host: Base, page: LinuxFolio) -> None:
    host.machine.ram.zero(page.pa, page.size)
    host.machine.tracer.secret.discard(page.pa)


def image_copy(host: Base, pfn: Pfn) -> str:
    """safe_copy_page(): map a hole for the moment, copy plainly, make the hole again (kernel/power/snapshot.c)."""
    machine = host.machine
    page = machine.page_at(pfn_to_pa(pfn))
    if not machine.allocated(page) or page.hwpoison:
        return "skipped"

    def read(pa: Pa) -> bytes:
        kernel_access(host, page, "image", "safe_copy_page", "plain_read", machine.linear_map.va(pa))
        return machine.ram.read(pa, PAGE)

    # The kernel's own procedure, with the copy replaced by one that the laws are told of.
    safe_copy_page(Services(machine, read), page.pa)
    return "copied"


def written(host: Base, page: LinuxFolio, token: bytes) -> None:
    """Someone of the host's side has put *token* there: both sides may know it."""
    host.machine.ram.write(page.pa, token)
    host.machine.tracer.wrote(page, DATA)
